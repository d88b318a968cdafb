package vm

import (
	"maps"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Change is what a user wants to be different of a VM's settings. Fields that are nil stay as they are.
// Sizes are bytes, memory is MiB.
type Change struct {
	VCPU       *int              `json:"vcpu,omitempty"`
	MemoryMiB  *int64            `json:"memory_mib,omitempty"`
	DiskSize   *int64            `json:"disk_size,omitempty"`
	SystemSize *int64            `json:"system_size,omitempty"`
	Autostart  *bool             `json:"autostart,omitempty"`
	NAT        *bool             `json:"nat,omitempty"`
	Group      *string           `json:"network_group,omitempty"` // "" takes it out of its group
	Labels     map[string]string `json:"labels,omitempty"`        // set, beside those that are there
	DropLabels []string          `json:"drop_labels,omitempty"`   // keys; one that is not there is fine
}

// Empty says that nothing is to change.
func (c Change) Empty() bool {
	return c.VCPU == nil && c.MemoryMiB == nil && c.DiskSize == nil && c.SystemSize == nil && c.Autostart == nil && c.NAT == nil && c.Group == nil &&
		len(c.Labels) == 0 && len(c.DropLabels) == 0
}

// Apply returns the settings after the change, which are checked: against the limits, and that no disk
// becomes smaller. s is left alone. fault.Invalid.
func (c Change) Apply(s Spec, h Host) (Spec, error) {
	to := s
	set(&to.VCPU, c.VCPU)
	set(&to.MemoryMiB, c.MemoryMiB)
	set(&to.DiskSize, c.DiskSize)
	set(&to.SystemSize, c.SystemSize)
	set(&to.Autostart, c.Autostart)
	set(&to.NAT, c.NAT)
	set(&to.NetworkGroup, c.Group)
	to.Labels = maps.Clone(s.Labels)
	if to.Labels == nil {
		to.Labels = map[string]string{}
	}
	for _, key := range c.DropLabels {
		delete(to.Labels, key)
	}
	maps.Copy(to.Labels, c.Labels)
	for _, d := range []struct {
		what     string
		from, to int64
	}{{"disk size", s.DiskSize, to.DiskSize}, {"system size", s.SystemSize, to.SystemSize}} {
		if d.to < d.from {
			return s, fault.New(fault.Invalid, d.what, "it is %s, and a disk cannot be made smaller; %s is", FormatSize(d.from), FormatSize(d.to)).
				WithHint("choose a size above %s, or make a new VM", FormatSize(d.from))
		}
	}
	return to, to.Validate(h)
}

func set[T any](field *T, to *T) {
	if to != nil {
		*field = *to
	}
}

// NeedsStop names the settings, as flags are called, that differ between the two and that no running
// machine takes: a VMM is started with them.
func NeedsStop(from, to Spec) []string {
	var names []string
	if from.VCPU != to.VCPU {
		names = append(names, "vcpu")
	}
	if from.MemoryMiB != to.MemoryMiB {
		names = append(names, "memory")
	}
	return names
}

// Same says that two settings are equal.
func Same(a, b Spec) bool {
	return a.VCPU == b.VCPU && a.MemoryMiB == b.MemoryMiB && a.DiskSize == b.DiskSize && a.SystemSize == b.SystemSize &&
		a.Autostart == b.Autostart && a.NAT == b.NAT && a.NetworkGroup == b.NetworkGroup && maps.Equal(a.Labels, b.Labels)
}
