package sandbox

import (
	"testing"

	"git.thaloco.com/thaloco/banger/internal/vm"
)

// A host that goes down in order stops its VMs first. What was wanted stays: VMs with autostart come back with the next
// boot, also if the daemon is started again before it, and the others are stopped.
func TestPowerOff(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	back, not, down := r.create("back"), r.create("not"), r.create("down")
	yes := true
	for _, id := range []vm.ID{back.ID, down.ID} {
		r.done(r.s.Set(r.ctx(), id, SetRequest{Change: vm.Change{Autostart: &yes}}))
	}
	r.done(r.s.Stop(r.ctx(), down.ID, false))
	for _, id := range []vm.ID{back.ID, not.ID, down.ID} {
		r.done(r.s.PowerOff(r.ctx(), id))
		if v := r.vm(id); v.State != vm.Stopped {
			t.Errorf("left %s", brief([]vm.VM{v}))
		}
	}
	r.restart() // on the same boot: nothing starts them
	for _, id := range []vm.ID{back.ID, not.ID, down.ID} {
		if v := r.vm(id); v.State != vm.Stopped {
			t.Errorf("the same boot: left %s", brief([]vm.VM{v}))
		}
	}
	r.boot = "boot-2"
	r.restart()
	for id, want := range map[vm.ID]vm.State{back.ID: vm.Running, not.ID: vm.Stopped, down.ID: vm.Stopped} {
		if v := r.vm(id); v.State != want {
			t.Errorf("after the boot: left %s, want %s", brief([]vm.VM{v}), want)
		}
	}
	r.check()
}
