package sandbox

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

func ptr[T any](v T) *T { return &v }

// sized checks that record, files and running machine agree on the sizes of the disks.
func (r *rig) sized(id vm.ID, work, system int64) {
	r.t.Helper()
	v := r.vm(id)
	if v.Spec.DiskSize != work || v.Spec.SystemSize != system {
		r.t.Errorf("the record says %d and %d, want %d and %d", v.Spec.DiskSize, v.Spec.SystemSize, work, system)
	}
	for path, size := range map[string]int64{r.s.workDisk(id): work, r.s.systemDisk(id): system} {
		if fi, err := os.Stat(path); err != nil || fi.Size() != size {
			r.t.Errorf("%s: %v, %v; want %d bytes", path, fi, err, size)
		}
	}
	for _, m := range r.machines() {
		if m.Spec.ID == string(id) && (m.Sizes[vmm.RoleWork] != work || m.Sizes[vmm.RoleSystem] != system) {
			r.t.Errorf("the guest believes %v, want %d and %d", m.Sizes, work, system)
		}
	}
}

func (r *rig) set(id vm.ID, c vm.Change, restart bool) (operation.Operation, error) {
	return r.s.Set(r.ctx(), id, SetRequest{Change: c, Restart: restart})
}

func TestSetOfARunningVM(t *testing.T) {
	r := newRig(t).start()
	v := r.create("web")
	op := r.done(r.set(v.ID, vm.Change{DiskSize: ptr[int64](vm.GiB), Autostart: ptr(true), Labels: map[string]string{"team": "web"}}, false))
	if len(op.Notices) != 0 {
		t.Errorf("notices: %q", op.Notices)
	}
	r.sized(v.ID, vm.GiB, vm.MinDiskBytes)
	after := r.vm(v.ID)
	if after.PID != v.PID || !after.Spec.Autostart || after.Spec.Labels["team"] != "web" {
		t.Errorf("%+v", after.Spec)
	}
	op = r.done(r.set(v.ID, vm.Change{DiskSize: ptr[int64](vm.GiB), DropLabels: []string{"nothing"}}, false))
	if !slices.Equal(op.Notices, []string{"already so"}) {
		t.Errorf("notices of a set that changes nothing: %q", op.Notices)
	}
	r.done(r.set(v.ID, vm.Change{DropLabels: []string{"team"}, Labels: map[string]string{"a": "b"}}, false))
	if l := r.vm(v.ID).Spec.Labels; len(l) != 1 || l["a"] != "b" {
		t.Errorf("labels: %v", l)
	}
	r.check()
}

// What is refused changes nothing, also of what could have been done.
func TestSetIsAllOrNothing(t *testing.T) {
	r := newRig(t).start()
	v := r.create("web")
	for what, c := range map[string]struct {
		change     vm.Change
		code       fault.Code
		text, hint string
	}{
		"a smaller disk":   {vm.Change{DiskSize: ptr[int64](vm.GiB), SystemSize: ptr[int64](1)}, fault.Invalid, "made smaller", "above 512M"},
		"too much memory":  {vm.Change{DiskSize: ptr[int64](vm.GiB), MemoryMiB: ptr[int64](9000)}, fault.Invalid, "the host has no more", "--memory"},
		"no vcpu":          {vm.Change{Autostart: ptr(true), VCPU: ptr(0)}, fault.Invalid, "vcpu", "--vcpu 1"},
		"a bad label":      {vm.Change{DiskSize: ptr[int64](vm.GiB), Labels: map[string]string{"A": ""}}, fault.Invalid, "label", "team=web"},
		"too large a disk": {vm.Change{Autostart: ptr(true), DiskSize: ptr[int64](vm.MaxDiskBytes + vm.MiB)}, fault.Invalid, "disk size", "16G"},
		"what needs a stop": {vm.Change{DiskSize: ptr[int64](vm.GiB), MemoryMiB: ptr[int64](512), VCPU: ptr(1)}, fault.Precondition,
			"vcpu and memory can change only while it is stopped", "--restart"},
	} {
		_, err := r.set(v.ID, c.change, false)
		wants(t, what, err, c.code, c.text, c.hint)
	}
	if got := r.vm(v.ID); !vm.Same(got.Spec, v.Spec) || got.PID != v.PID {
		t.Errorf("something was set: %+v", got.Spec)
	}
	r.sized(v.ID, vm.MinDiskBytes, vm.MinDiskBytes)
	_, err := r.set("0123", vm.Change{Autostart: ptr(true)}, false)
	wants(t, "nobody", err, fault.NotFound, "no such VM", "banger vm list")
}

func TestSetWithRestart(t *testing.T) {
	r := newRig(t).start()
	v := r.create("web")
	// Nothing of this needs one.
	r.done(r.set(v.ID, vm.Change{SystemSize: ptr[int64](vm.GiB)}, true))
	if r.vm(v.ID).PID != v.PID {
		t.Error("restarted for nothing")
	}
	op := r.done(r.set(v.ID, vm.Change{MemoryMiB: ptr[int64](1024), VCPU: ptr(3), DiskSize: ptr[int64](vm.GiB)}, true))
	after := r.vm(v.ID)
	m := r.machines()[0]
	if after.State != vm.Running || after.PID == v.PID || m.Spec.MemoryMiB != 1024 || m.Spec.VCPU != 3 {
		t.Errorf("%s, machine with %d MiB and %d vCPUs", brief([]vm.VM{after}), m.Spec.MemoryMiB, m.Spec.VCPU)
	}
	var stages []string
	for _, s := range op.Stages {
		stages = append(stages, s.Name)
	}
	if got := strings.Join(stages, ", "); !strings.HasPrefix(got, "shutdown, vmm end, guest config removal, network removal, enlarge disks, network, guest config, vmm, agent") {
		t.Errorf("stages: %s", got)
	}
	r.sized(v.ID, vm.GiB, vm.GiB)
	// A stopped VM is not started.
	r.done(r.s.Stop(r.ctx(), v.ID, false))
	r.done(r.set(v.ID, vm.Change{MemoryMiB: ptr[int64](512)}, true))
	if after := r.vm(v.ID); after.State != vm.Stopped || after.Spec.MemoryMiB != 512 {
		t.Errorf("%s, %d MiB", brief([]vm.VM{after}), after.Spec.MemoryMiB)
	}
	r.check()
}

// A machine that refuses, a guest that hangs or is paused: the settings are on record, the user is told,
// and they hold from the next start on.
func TestSetThatTheGuestDoesNotTake(t *testing.T) {
	r := newRig(t).start()
	v := r.create("web")
	r.faults("web stiff")
	op := r.done(r.set(v.ID, vm.Change{DiskSize: ptr[int64](vm.GiB)}, false))
	if len(op.Notices) != 2 || !strings.Contains(op.Notices[0], "holds from the next start on") || !strings.Contains(op.Notices[0], "refuses") {
		t.Errorf("notices: %q", op.Notices)
	}
	if got := r.machines()[0].Sizes[vmm.RoleWork]; got != vm.MinDiskBytes {
		t.Fatalf("a stiff machine took %d", got)
	}
	r.faults()
	r.done(r.s.Restart(r.ctx(), v.ID))
	r.sized(v.ID, vm.GiB, vm.MinDiskBytes)

	if err := r.world.Pause("web", vmm.IOError); err != nil {
		t.Fatal(err)
	}
	r.untilVM(v.ID, "a note of the pause", func(v vm.VM) bool { return v.Note != "" })
	op = r.done(r.set(v.ID, vm.Change{SystemSize: ptr[int64](vm.GiB)}, false))
	if len(op.Notices) != 1 || !strings.Contains(op.Notices[0], "paused") {
		t.Errorf("notices while it is paused: %q", op.Notices)
	}
	op = r.done(r.s.Start(r.ctx(), v.ID))
	if len(op.Notices) != 1 { // that it goes on, and nothing about its settings
		t.Errorf("notices when it goes on: %q", op.Notices)
	}
	r.sized(v.ID, vm.GiB, vm.GiB)
	r.check()
}

// If one disk cannot be enlarged, none is, and a VM that was stopped for it runs again as it was.
func TestSetWhoseDisksDoNotGrow(t *testing.T) {
	r := newRig(t).start()
	v := r.create("web")
	// Its file is shorter than the record says, and so could only be noticed by growing it: it is not a
	// file any more when the operation comes to it.
	work := r.s.workDisk(v.ID)
	var did bool
	hook := &hookedCapability{check: func() {
		if did {
			_ = os.Rename(work, work+".away")
			_ = os.Symlink(work+".away", work)
		}
		did = true
	}}
	r.s.machines.parts = append(r.s.machines.parts, hook)
	op := r.wait(r.set(v.ID, vm.Change{DiskSize: ptr[int64](vm.GiB), SystemSize: ptr[int64](vm.GiB), MemoryMiB: ptr[int64](512)}, true))
	if op.State != operation.Failed {
		t.Fatalf("%s: %v", op.State, op.Fault)
	}
	if err := os.Rename(work+".away", work); err != nil {
		t.Fatal(err)
	}
	after := r.vm(v.ID)
	if after.State != vm.Running || !vm.Same(after.Spec, v.Spec) {
		t.Errorf("%s: %+v", brief([]vm.VM{after}), after.Spec)
	}
	r.sized(v.ID, vm.MinDiskBytes, vm.MinDiskBytes)
}

// hookedCapability is a host feature that has a say in settings, as one to come may.
type hookedCapability struct {
	capability
	check   func()
	applied []vm.Spec
	err     error
}

func (h *hookedCapability) Name() string { return "hooked" }

func (h *hookedCapability) CheckChange(context.Context, *vm.VM, vm.Spec) error {
	if h.check != nil {
		h.check()
	}
	return nil
}

func (h *hookedCapability) ApplySettings(_ context.Context, v *vm.VM) error {
	h.applied = append(h.applied, v.Spec)
	return h.err
}

// A capability applies its settings to a running VM, after they are on record; to one that is down it has
// nothing to apply.
func TestSetAppliesLive(t *testing.T) {
	r := newRig(t).start()
	v := r.create("web")
	hook := &hookedCapability{err: fault.New(fault.Unavailable, "web", "no \x1b[31mway")}
	r.s.machines.parts = append(r.s.machines.parts, hook)
	op := r.done(r.set(v.ID, vm.Change{Labels: map[string]string{"a": "b"}}, false))
	if len(hook.applied) != 1 || hook.applied[0].Labels["a"] != "b" {
		t.Errorf("applied: %+v", hook.applied)
	}
	if len(op.Notices) != 1 || !strings.HasSuffix(op.Notices[0], "web: no way") {
		t.Errorf("notices: %q", op.Notices)
	}
	r.done(r.s.Stop(r.ctx(), v.ID, false))
	r.done(r.set(v.ID, vm.Change{DropLabels: []string{"a"}}, false))
	if len(hook.applied) != 1 {
		t.Error("applied to a VM that is down")
	}
}

// A VM that was made and never started has its disks, and one whose start failed as well.
func TestSetBeforeTheFirstStart(t *testing.T) {
	r := newRig(t).start()
	op := r.done(r.s.Create(r.ctx(), CreateRequest{Name: "web", NoStart: true}))
	id := vm.ID(op.VMID)
	r.done(r.set(id, vm.Change{DiskSize: ptr[int64](vm.GiB), MemoryMiB: ptr[int64](512)}, false))
	r.faults("web refuse")
	r.wait(r.s.Start(r.ctx(), id))
	if r.vm(id).State != vm.Failed {
		t.Fatalf("%s", r.vm(id).State)
	}
	r.done(r.set(id, vm.Change{SystemSize: ptr[int64](vm.GiB), VCPU: ptr(1)}, false))
	if r.vm(id).State != vm.Failed {
		t.Errorf("a set made a failed VM %s", r.vm(id).State)
	}
	r.faults()
	r.done(r.s.Start(r.ctx(), id))
	r.sized(id, vm.GiB, vm.GiB)
	if m := r.machines()[0]; m.Spec.MemoryMiB != 512 || m.Spec.VCPU != 1 {
		t.Errorf("%+v", m.Spec)
	}
	r.check()
}

// After a reboot of the host, VMs that ran and are marked start again; those that did not run do not.
func TestAutostart(t *testing.T) {
	r := newRig(t).start()
	yes := vm.Change{Autostart: ptr(true)}
	ran, stopped, plain := r.create("ran"), r.create("stopped"), r.create("plain")
	r.done(r.set(ran.ID, yes, false))
	r.done(r.set(stopped.ID, yes, false))
	r.done(r.s.Stop(r.ctx(), stopped.ID, false))
	r.stop()
	for _, m := range r.machines() {
		if err := r.world.End(m.Spec.Name, vmm.Killed); err != nil {
			t.Fatal(err)
		}
	}
	r.boot = "boot-2"
	r.restart()
	for id, want := range map[vm.ID]vm.State{ran.ID: vm.Running, stopped.ID: vm.Stopped, plain.ID: vm.Stopped} {
		if v := r.vm(id); v.State != want {
			t.Errorf("%s, want %s", brief([]vm.VM{v}), want)
		}
	}
	if note := r.vm(plain.ID).Note; note != "the host was rebooted" {
		t.Errorf("note: %q", note)
	}
	r.check()
	n := len(r.machines())
	r.restart()
	if len(r.machines()) != n || r.vm(ran.ID).State != vm.Running {
		t.Error("a second start of the daemon changed something")
	}
}
