package vm

import (
	"slices"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func TestChange(t *testing.T) {
	was := Spec{VCPU: 1, MemoryMiB: 1024, DiskSize: 8 * GiB, SystemSize: 16 * GiB, Labels: map[string]string{"a": "1", "b": "2"}}
	host := Host{CPUs: 2, MemoryMiB: 4096}
	two, memory, less, more := 2, int64(2048), 4*GiB, 32*GiB
	on, group, bad := true, "team", "No Team"
	for name, c := range map[string]struct {
		change  Change
		empty   bool
		stop    string
		message string // "" is valid
		check   func(Spec) bool
	}{
		"nothing": {Change{}, true, "", "", func(s Spec) bool { return Same(s, was) }},
		"all": {Change{VCPU: &two, MemoryMiB: &memory, DiskSize: &more, SystemSize: &more, Autostart: &on,
			Labels: map[string]string{"c": "3"}, DropLabels: []string{"a", "x"}}, false, "vcpu memory", "",
			func(s Spec) bool {
				return s.VCPU == 2 && s.MemoryMiB == 2048 && s.DiskSize == more && s.SystemSize == more && s.Autostart &&
					len(s.Labels) == 2 && s.Labels["b"] == "2" && s.Labels["c"] == "3"
			}},
		"a group":        {Change{Group: &group}, false, "", "", func(s Spec) bool { return s.NetworkGroup == "team" }},
		"no group":       {Change{Group: &bad}, false, "", "network group", nil},
		"live only":      {Change{DiskSize: &more, Autostart: &on}, false, "", "", func(s Spec) bool { return s.DiskSize == more && s.SystemSize == 16*GiB }},
		"a smaller disk": {Change{DiskSize: &less}, false, "", "disk size: it is 8G, and a disk cannot be made smaller; 4G is", nil},
		"smaller system": {Change{SystemSize: &less, MemoryMiB: &memory}, false, "", "system size: it is 16G", nil},
		"absurd":         {Change{MemoryMiB: &more}, false, "", "the host has no more", nil},
	} {
		to, err := c.change.Apply(was, host)
		if c.change.Empty() != c.empty {
			t.Errorf("%s: empty is %v", name, !c.empty)
		}
		if c.message != "" {
			if !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), c.message) || fault.HintOf(err) == "" {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil || !c.check(to) {
			t.Errorf("%s: %+v, %v", name, to, err)
		}
		if got := NeedsStop(was, to); !slices.Equal(got, strings.Fields(c.stop)) {
			t.Errorf("%s needs a stop for %v", name, got)
		}
		if Same(was, to) != c.empty {
			t.Errorf("%s: same is %v", name, !c.empty)
		}
	}
	if len(was.Labels) != 2 {
		t.Errorf("the old settings were changed: %v", was.Labels)
	}
}
