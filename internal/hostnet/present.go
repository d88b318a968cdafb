package hostnet

import (
	"context"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/network"
)

// Present says whether the host has anything of this installation's: bridge, TAPs or tables.
func (h *Host) Present(ctx context.Context) (bool, error) {
	slots, err := h.TAPs(ctx)
	if err != nil || len(slots) > 0 {
		return len(slots) > 0, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	b, err := h.ownBridge()
	if err != nil && !fault.Is(err, fault.Exists) { // another's bridge of this name is none of ours
		return false, err
	}
	if b != nil {
		return true, nil
	}
	c, err := dialRules()
	if err != nil {
		return false, failed(err, "nftables", "the firewall cannot be reached")
	}
	tables, err := c.ListTables()
	if err != nil {
		return false, failed(err, "nftables", "the firewall's tables cannot be listed")
	}
	for _, t := range tables {
		if t.Name == network.TableName(h.s.Plan.Installation) {
			return true, nil
		}
	}
	return false, nil
}
