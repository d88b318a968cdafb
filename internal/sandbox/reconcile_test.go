package sandbox

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// warned says whether status and doctor both carry a warning with this text.
func (r *rig) warned(text string) bool {
	r.t.Helper()
	st, err := r.s.Status(r.ctx())
	if err != nil {
		r.t.Fatal(err)
	}
	return slices.ContainsFunc(st.Warnings, func(w string) bool { return strings.Contains(w, text) }) &&
		slices.ContainsFunc(r.findings(), func(f doctor.Finding) bool { return f.Severity == doctor.Warn && strings.Contains(f.Detail, text) })
}

func TestMachinesOutliveTheDaemon(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	v := r.create("calm-otter")
	for range 2 {
		r.restart()
		n := r.vm(v.ID)
		if n.State != vm.Running || n.PID != v.PID || n.Note != "" {
			t.Errorf("%s", brief([]vm.VM{n}))
		}
		if d, err := r.s.Show(r.ctx(), "calm-otter"); err != nil || !strings.HasPrefix(d.Agent, "answers") {
			t.Errorf("agent %q, %v", d.Agent, err)
		}
		r.check()
	}
	r.done(r.s.Stop(r.ctx(), v.ID, false))
	r.check()
}

func TestStrayDirectories(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	r.create("calm-otter")
	stray, run := r.paths.VM("0123456789abcdef0123456789abcdef"), r.paths.Run("0123456789ab")
	for _, dir := range []string{stray, run} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "work.ext4"), []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(r.paths.Images(), ".banger-tmp-1"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.restart()
	if exists(run) {
		t.Error("a run directory that belongs to no VM is left")
	}
	if b, err := os.ReadFile(filepath.Join(stray, "work.ext4")); err != nil || string(b) != "precious" {
		t.Errorf("a disk without a record: %q, %v", b, err)
	}
	if !r.warned(stray) {
		t.Error("a disk without a record is not reported")
	}
	if exists(filepath.Join(r.paths.Images(), ".banger-tmp-1")) {
		t.Error("a half-written capture is left")
	}
	if err := os.RemoveAll(stray); err != nil {
		t.Fatal(err)
	}
	r.check()
}

// A database that is empty or older than the state directory costs nobody a disk, nor the base that a
// disk is worth nothing without; machines that no record knows are ended.
func TestALostDatabase(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"older", "empty"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.ownBundle()
			r.start()
			first := r.create("first")
			r.stop()
			backup := filepath.Join(r.dir, "backup.db")
			if _, err := disk.Clone(context.Background(), r.paths.Database(), backup); err != nil {
				t.Fatal(err)
			}
			r.restart()
			second := r.create("second")
			r.stop()
			for _, suffix := range []string{"", "-wal", "-shm"} {
				if err := os.Remove(r.paths.Database() + suffix); err != nil && !os.IsNotExist(err) {
					t.Fatal(err)
				}
			}
			if how == "older" {
				if err := os.Rename(backup, r.paths.Database()); err != nil {
					t.Fatal(err)
				}
			}
			// The bundle is another one by now, so that no image refers to the old content.
			r.remake("another root filesystem")
			r.restart()
			for _, v := range []vm.VM{first, second} {
				for _, file := range []string{filepath.Join(r.paths.VM(string(v.ID)), "work.ext4"), r.s.images.content(v.Pins.Base)} {
					if !exists(file) {
						t.Errorf("%s is gone", file)
					}
				}
			}
			if !r.warned(r.paths.VM(string(second.ID))) {
				t.Error("the disks without a record are not reported")
			}
			machines := r.machines()
			if how == "older" {
				if len(machines) != 1 || machines[0].Spec.Name != "first" {
					t.Errorf("%d machines run", len(machines))
				}
				if !r.warned(second.ID.Short()) {
					t.Error("the end of a machine without a record is not reported")
				}
				if v := r.vm(first.ID); v.State != vm.Running {
					t.Errorf("left %s", brief([]vm.VM{v}))
				}
			} else if len(r.s.store.VMs()) != 0 {
				t.Error("there are VMs in an empty database")
			}
		})
	}
}

func TestARecordWithoutADirectory(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	v := r.create("calm-otter")
	r.done(r.s.Stop(r.ctx(), v.ID, false))
	r.stop()
	if err := os.RemoveAll(r.paths.VM(string(v.ID))); err != nil {
		t.Fatal(err)
	}
	r.restart()
	if d, err := r.s.Show(r.ctx(), "calm-otter"); err != nil || d.DiskAllocated != 0 {
		t.Errorf("show: %+v, %v", d, err)
	}
	op := r.wait(r.s.Start(r.ctx(), v.ID))
	ended(t, op, operation.Failed, fault.Corrupt, "system disk is gone", "banger vm delete")
	r.done(r.s.Delete(r.ctx(), v.ID))
	r.nothing()
}

func TestHostReboot(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	up, down := r.create("up"), r.create("down")
	r.done(r.s.Stop(r.ctx(), down.ID, false))
	r.faults("half hold")
	half, err := r.s.Create(r.ctx(), CreateRequest{Name: "half"})
	if err != nil {
		t.Fatal(err)
	}
	r.untilStage(half.ID, stepVMM)
	r.stop()
	if err := os.RemoveAll(filepath.Join(r.world.Dir(), "machines")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(r.world.Dir(), "machines"), 0o700); err != nil {
		t.Fatal(err)
	}
	r.faults()
	r.boot = "boot-2"
	r.restart()
	for id, note := range map[vm.ID]string{up.ID: "the host was rebooted", down.ID: "", vm.ID(half.VMID): "the host was rebooted"} {
		if v := r.vm(id); v.State != vm.Stopped || v.Note != note {
			t.Errorf("left %s", brief([]vm.VM{v}))
		}
	}
	if op, err := r.s.Operation(r.ctx(), half.ID); err != nil || op.State != operation.Failed {
		t.Errorf("the create that a reboot ended: %s, %v", op.State, err)
	}
	r.check()
	for _, v := range r.s.store.VMs() {
		r.done(r.s.Start(r.ctx(), v.ID))
	}
	r.check()
	// The same boot again disturbs nothing, and neither does a host that does not tell its boot.
	for _, boot := range []string{"boot-2", "", "boot-2"} {
		r.boot = boot
		r.restart()
		for _, v := range r.s.store.VMs() {
			if v.State != vm.Running {
				t.Errorf("boot %q: left %s", boot, brief([]vm.VM{v}))
			}
		}
	}
	r.check()
}

// What was asked for last, and had not begun, is what is done.
func TestTheLastWishOfACrashIsDone(t *testing.T) {
	t.Parallel()
	for last, want := range map[operation.Kind]vm.State{operation.Stop: vm.Stopped, operation.Delete: "", operation.Start: vm.Running} {
		t.Run(string(last), func(t *testing.T) {
			t.Parallel()
			r := newRig(t).start()
			r.faults("* hold")
			op, err := r.s.Create(r.ctx(), CreateRequest{Name: "calm-otter"})
			if err != nil {
				t.Fatal(err)
			}
			r.untilStage(op.ID, stepVMM)
			v := r.vm(vm.ID(op.VMID))
			r.stop()
			// The next operation was taken on and its daemon was killed before it began.
			if err := r.open(); err == nil {
				r.faults()
				r.settled()
				r.done(r.s.Stop(r.ctx(), v.ID, false))
				v.State, v.Desired = vm.Starting, vm.WantRunning
				if err := r.s.store.Save(r.ctx(), v, lifecycle.StepRecord{Step: stepVMM, State: lifecycle.Preparing}); err != nil {
					t.Fatal(err)
				}
				op = newOperation(last, v)
				if err := r.s.store.SaveOperation(r.ctx(), op); err != nil {
					t.Fatal(err)
				}
			}
			r.stop()
			r.restart()
			if n, ok := r.s.store.VM(v.ID); ok != (want != "") || n.State != want {
				t.Errorf("left %s", brief([]vm.VM{n}))
			}
			if op, err := r.s.Operation(r.ctx(), op.ID); err != nil || op.State != operation.Succeeded {
				t.Errorf("the %s: %s %v, %v", last, op.State, op.Fault, err)
			}
			r.check()
		})
	}
}

// A stop that a crash interrupted is finished in order: the guest is asked again, not killed.
func TestAnInterruptedStopStillAsksTheGuest(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	v := r.create("calm-otter")
	r.faults("* deaf")
	op, err := r.s.Stop(r.ctx(), v.ID, false)
	if err != nil {
		t.Fatal(err)
	}
	r.untilStage(op.ID, "shutdown")
	r.stop()
	r.faults()
	r.restart()
	journal, err := r.world.Journal()
	if err != nil {
		t.Fatal(err)
	}
	if last := journal[len(journal)-1]; !strings.HasSuffix(last, " guest-shutdown") {
		t.Errorf("the guest ended by %q", last)
	}
	if op, err := r.s.Operation(r.ctx(), op.ID); err != nil || op.State != operation.Succeeded {
		t.Errorf("the stop: %s %v", op.State, op.Fault)
	}
	r.check()
}

func TestTwoInstallationsOnOneHost(t *testing.T) {
	t.Parallel()
	one := newRig(t).start()
	two := newRig(t)
	two.world = one.world
	two.start()
	a, b := one.create("calm-otter"), two.create("calm-otter")
	if len(one.machines()) != 2 {
		t.Fatalf("%d machines", len(one.machines()))
	}
	one.restart()
	two.restart()
	one.done(one.s.Stop(one.ctx(), a.ID, true))
	if v := two.vm(b.ID); v.State != vm.Running || len(one.machines()) != 1 {
		t.Errorf("the other installation's: %s", brief([]vm.VM{v}))
	}
	one.check()
	two.check()
	one.done(one.s.Start(one.ctx(), a.ID))
	one.restart()
	two.done(two.s.Delete(two.ctx(), b.ID))
	one.check()
	two.nothing()
}

// A copy of a state directory carries the same owner. Its daemon leaves the machines of the original
// alone, also those that its records do not know.
func TestACopyOfTheStateDirectory(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	r.stop()
	c := newRig(t)
	if err := copyTree(filepath.Join(r.dir, "state"), filepath.Join(c.dir, "state")); err != nil {
		t.Fatal(err)
	}
	r.restart()
	r.create("calm-otter")
	c.world = r.world
	c.start()
	if n := len(r.machines()); n != 1 {
		t.Errorf("%d machines run", n)
	}
	r.check()
}

// What could not be reconciled of one VM is no obstacle to the others.
func TestOneVMThatCannotBeReconciled(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	bad, good := r.create("bad"), r.create("good")
	r.stop()
	file := ""
	for _, m := range r.machines() {
		if m.Spec.ID == string(bad.ID) {
			file = filepath.Join(r.world.Dir(), "machines", m.Spec.Marker()+".json")
		}
	}
	saved, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.restart()
	if !r.warned("bad could not be reconciled") {
		t.Error("not reported")
	}
	if v := r.vm(good.ID); v.State != vm.Running || r.s.machines.get(good.ID) == nil {
		t.Errorf("the other one: %s", brief([]vm.VM{v}))
	}
	if err := os.WriteFile(file, saved, 0o600); err != nil {
		t.Fatal(err)
	}
	r.restart()
	r.check()
}
