package agentd

import (
	"context"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/measure"
)

func (s service) Stats(ctx context.Context, _ *agentv1.StatsRequest) (*agentv1.StatsResponse, error) {
	if s.guest.Stats == nil {
		return nil, errNotHere
	}
	return s.guest.Stats(ctx)
}

// stats measures the guest, and names its disks as people know them: the system disk is what is written
// outside of /root.
func (l *live) stats(context.Context) (*agentv1.StatsResponse, error) {
	var disks []measure.Disk
	for _, m := range l.state.Mounted {
		disks = append(disks, measure.Disk{Target: m.Target, Path: m.Path})
	}
	return measure.Stats("/proc", disks)
}
