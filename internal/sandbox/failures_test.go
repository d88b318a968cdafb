package sandbox

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/console"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// What goes wrong with a start, however it is begun: the VM is failed, says at which step, why, and
// what to do; nothing runs; start and delete work from there.
func TestAStartThatFails(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		faults  []string
		timeout time.Duration
		step    string
		code    fault.Code
		text    string
	}{
		"refused":                {[]string{"* refuse no such machine type"}, patience, stepVMM, fault.Unavailable, "no such machine type"},
		"dies":                   {[]string{"* die"}, patience, stepAgent, fault.Unavailable, "its VMM ended while the guest was booting (crashed)"},
		"reboots while booting":  {[]string{"* die guest-reset"}, patience, stepAgent, fault.Unavailable, "guest-reset"},
		"says why and dies":      {[]string{"* console " + boot.FatalMarker + "root: no init in the image", "* die guest-shutdown"}, patience, stepAgent, fault.Unavailable, "the guest could not boot: root: no init in the image"},
		"says why in colours":    {[]string{"* console " + boot.FatalMarker + "root: \x1b[31mbad\x1b[0m \x1b]0;evil\x07\u202ebase\xff", "* die"}, patience, stepAgent, fault.Unavailable, "the guest could not boot: root: bad base"},
		"is mute":                {[]string{"* mute", "* console last \x1b[2Jwords"}, time.Second, stepAgent, fault.Timeout, "did not answer within 1s of the start\n  console: fake: start"},
		"says why and is mute":   {[]string{"* mute", "* console " + boot.FatalMarker + "drives: vdb is gone"}, time.Second, stepAgent, fault.Unavailable, "drives: vdb is gone"},
		"is paused for its disk": {[]string{"* mute", "* pause"}, time.Second, stepAgent, fault.Exhausted, "the host could not take a write"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.cfg.BootTimeout = c.timeout
			r.start()
			check := func(op operation.Operation, how string) {
				t.Helper()
				ended(t, op, operation.Failed, c.code, c.text, "banger vm")
				vms := r.s.store.VMs()
				if how == "create" && c.step == stepVMM && len(vms) == 0 {
					t.Fatal("it is gone, and its log with it")
				}
				v := vms[0]
				if v.State != vm.Failed || v.Failure == nil || v.Failure.Step != c.step || v.Failure.Code != string(c.code) ||
					!strings.Contains(v.Failure.Message, c.text) || v.Failure.Hint == "" {
					t.Errorf("%s: %s %+v", how, v.State, v.Failure)
				}
				r.check()
			}
			r.faults(c.faults...)
			check(r.wait(r.s.Create(r.ctx(), CreateRequest{Name: "calm-otter"})), "create")
			id := r.s.store.VMs()[0].ID
			check(r.wait(r.s.Start(r.ctx(), id)), "start")
			r.faults()
			r.done(r.s.Start(r.ctx(), id))
			r.check()
			r.faults(c.faults...)
			check(r.wait(r.s.Restart(r.ctx(), id)), "restart")
			op := r.done(r.s.Stop(r.ctx(), id, false))
			if v := r.vm(id); v.State != vm.Stopped || v.Failure != nil {
				t.Errorf("stop of a failed VM: %s %v", v.State, op.Notices)
			}
			check(r.wait(r.s.Start(r.ctx(), id)), "start after stop")
			r.done(r.s.Delete(r.ctx(), id))
			r.nothing()
		})
	}
}

// The reason of an earlier failure is still in the log; it is not the reason of this one.
func TestAnEarlierBootIsNotBlamed(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start()
	r.faults("* console "+boot.FatalMarker+"root: first", "* die")
	op := r.wait(r.s.Create(r.ctx(), CreateRequest{Name: "calm-otter"}))
	ended(t, op, operation.Failed, fault.Unavailable, "root: first", "")
	r.faults("* console second", "* die")
	op = r.wait(r.s.Start(r.ctx(), vm.ID(op.VMID)))
	ended(t, op, operation.Failed, fault.Unavailable, "second", "")
	if strings.Contains(op.Fault.Error(), "first") {
		t.Errorf("an earlier boot is blamed: %v", op.Fault)
	}
	log, err := os.ReadFile(r.s.logFile(vm.ID(op.VMID)))
	if err != nil || strings.Count(string(log), console.StartMark) != 2 {
		t.Errorf("the log does not part the starts: %v\n%s", err, log)
	}
}

// A guest that does not go is forced off, and both the operation and the VM say so.
func TestAGuestThatDoesNotPowerOff(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.cfg.StopTimeout = time.Second
	r.start()
	v := r.create("calm-otter")
	r.faults("* deaf")
	op := r.done(r.s.Stop(r.ctx(), v.ID, false))
	const note = "forced off: the guest did not power off within 1s"
	if len(op.Notices) != 1 || op.Notices[0] != note || r.vm(v.ID).Note != note {
		t.Errorf("notices %q, note %q", op.Notices, r.vm(v.ID).Note)
	}
	r.check()
	r.done(r.s.Start(r.ctx(), v.ID))
	if note := r.vm(v.ID).Note; note != "" {
		t.Errorf("a running VM is still said to be %s", note)
	}
	op = r.done(r.s.Restart(r.ctx(), v.ID))
	if len(op.Notices) != 1 || op.Notices[0] != note {
		t.Errorf("restart: %q", op.Notices)
	}
	// With force nobody is asked.
	op = r.done(r.s.Stop(r.ctx(), v.ID, true))
	if len(op.Notices) != 0 || r.vm(v.ID).Note != "" {
		t.Errorf("forced: %q, %q", op.Notices, r.vm(v.ID).Note)
	}
	r.check()
}

// Who does not want to wait for a guest's manners need not: a forced stop and a delete end a stop
// that waits.
func TestForceAndDeleteDoNotWaitForAStop(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"force", "delete"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			r := newRig(t).start() // stop_timeout is far away
			v := r.create("calm-otter")
			r.faults("* deaf")
			slow, err := r.s.Stop(r.ctx(), v.ID, false)
			if err != nil {
				t.Fatal(err)
			}
			r.untilStage(slow.ID, "shutdown")
			if how == "force" {
				r.done(r.s.Stop(r.ctx(), v.ID, true))
			} else {
				r.done(r.s.Delete(r.ctx(), v.ID))
			}
			ended(t, r.wait(slow, nil), operation.Cancelled, fault.Cancelled, "a later stop or delete took over", "")
			r.check()
			if n := len(r.s.store.VMs()); (n == 0) != (how == "delete") {
				t.Errorf("%d VMs", n)
			}
		})
	}
}

// A held start is ended by what is asked for after it.
func TestSuperseding(t *testing.T) {
	t.Parallel()
	for _, running := range []operation.Kind{operation.Create, operation.Start, operation.Restart} {
		for _, by := range []operation.Kind{operation.Stop, operation.Delete} {
			t.Run(fmt.Sprintf("%s by %s", running, by), func(t *testing.T) {
				t.Parallel()
				r := newRig(t).start()
				if running != operation.Create {
					r.create("calm-otter")
				}
				if running == operation.Start {
					r.done(r.do(operation.Stop))
				}
				r.faults("* hold")
				first, err := r.do(running)
				if err != nil {
					t.Fatal(err)
				}
				r.untilStage(first.ID, stepVMM)
				// A second one waits behind the first: that the latest is not the one at work matters.
				waiting, err := r.do(operation.Start)
				if err != nil {
					t.Fatal(err)
				}
				last := r.done(r.do(by))
				ended(t, r.wait(first, nil), operation.Cancelled, fault.Cancelled, "took over", "")
				ended(t, r.wait(waiting, nil), operation.Cancelled, fault.Cancelled, "took over", "")
				r.check()
				if v, ok := r.s.store.VM(vm.ID(last.VMID)); by == operation.Delete && ok || by == operation.Stop && v.State != vm.Stopped {
					t.Errorf("left %s", brief([]vm.VM{v}))
				}
			})
		}
	}
}

func TestAWaiterBehindACancelledHolderGetsThrough(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	v := r.create("calm-otter")
	r.done(r.do(operation.Stop))
	r.faults("calm-otter hold")
	holder, err := r.s.Start(r.ctx(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	r.untilStage(holder.ID, stepVMM)
	var waiters []operation.Operation
	for range 3 {
		op, err := r.s.Start(r.ctx(), v.ID)
		if err != nil {
			t.Fatal(err)
		}
		r.untilStage(op.ID, "waiting for another operation of this VM")
		waiters = append(waiters, op)
	}
	// A waiter that is cancelled changes nothing, and is no obstacle to those behind it.
	if _, err := r.s.Cancel(r.ctx(), waiters[0].ID); err != nil {
		t.Fatal(err)
	}
	ended(t, r.wait(waiters[0], nil), operation.Cancelled, fault.Cancelled, "by request", "")
	if _, err := r.s.Cancel(r.ctx(), holder.ID); err != nil {
		t.Fatal(err)
	}
	ended(t, r.wait(holder, nil), operation.Cancelled, fault.Cancelled, "by request", "")
	r.faults()
	if op := r.done(waiters[1], nil); len(op.Notices) != 0 {
		t.Errorf("notices %q", op.Notices)
	}
	if op := r.done(waiters[2], nil); len(op.Notices) != 1 || op.Notices[0] != "already running" {
		t.Errorf("notices %q", op.Notices)
	}
	r.check()
}

func TestTwoDeletesAtOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	v := r.create("calm-otter")
	one, err := r.s.Delete(r.ctx(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	two, err := r.s.Delete(r.ctx(), v.ID)
	if fault.Is(err, fault.NotFound) {
		two, err = one, nil // the first was quicker than this test
	}
	r.done(one, nil)
	r.done(two, err)
	r.nothing()
	_, err = r.s.Delete(r.ctx(), v.ID)
	wants(t, "a third", err, fault.NotFound, string(v.ID), "banger vm list")
}

// While a delete has not finished, nothing brings the VM back: its disks may be gone, and a start would
// make new ones.
func TestADeleteThatFailedIsNoStoppedVM(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	v := r.create("calm-otter")
	work := r.s.workDisk(v.ID)
	if err := os.Remove(work); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(work, 0o700); err != nil { // which is no disk, so the delete stops there
		t.Fatal(err)
	}
	op := r.wait(r.s.Delete(r.ctx(), v.ID))
	ended(t, op, operation.Failed, fault.Precondition, work, "")
	if v := r.vm(v.ID); v.State != vm.Deleting || v.Failure == nil || v.Failure.Step != stepWork {
		t.Errorf("left %s", brief([]vm.VM{v}))
	}
	for _, do := range []func() (operation.Operation, error){
		func() (operation.Operation, error) { return r.s.Start(r.ctx(), v.ID) },
		func() (operation.Operation, error) { return r.s.Stop(r.ctx(), v.ID, false) },
		func() (operation.Operation, error) { return r.s.Restart(r.ctx(), v.ID) },
	} {
		ended(t, r.wait(do()), operation.Failed, fault.Precondition, "being deleted", "banger vm delete calm-otter")
	}
	if v := r.vm(v.ID); v.State != vm.Deleting || v.Desired != vm.WantDeleted {
		t.Errorf("left %s", brief([]vm.VM{v}))
	}
	if err := os.Remove(work); err != nil {
		t.Fatal(err)
	}
	r.done(r.s.Delete(r.ctx(), v.ID))
	r.nothing()
}

// A disk that somebody took away is not replaced by an empty one.
func TestALostDiskIsNotMadeAnew(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"work.ext4", "system.ext4"} {
		r := newRig(t).start()
		v := r.create("calm-otter")
		r.done(r.s.Stop(r.ctx(), v.ID, false))
		file := filepath.Join(r.s.vmDir(v.ID), name)
		if err := os.Rename(file, file+".away"); err != nil {
			t.Fatal(err)
		}
		op := r.wait(r.s.Start(r.ctx(), v.ID))
		ended(t, op, operation.Failed, fault.Corrupt, file, "banger vm delete calm-otter")
		if exists(file) || len(r.machines()) != 0 {
			t.Errorf("%s was made anew", name)
		}
		if err := os.Rename(file+".away", file); err != nil {
			t.Fatal(err)
		}
		r.done(r.s.Start(r.ctx(), v.ID))
		r.check()
	}
}

func TestStartingTheRunningAndStoppingTheStopped(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	v := r.create("calm-otter")
	if op := r.done(r.s.Start(r.ctx(), v.ID)); len(op.Notices) != 1 || op.Notices[0] != "already running" || r.vm(v.ID).PID != v.PID {
		t.Errorf("start: %q", op.Notices)
	}
	r.done(r.s.Stop(r.ctx(), v.ID, false))
	if op := r.done(r.s.Stop(r.ctx(), v.ID, false)); len(op.Notices) != 1 || op.Notices[0] != "already stopped" {
		t.Errorf("stop: %q", op.Notices)
	}
	_, err := r.s.Kill(r.ctx(), v.ID, int(syscall.SIGTERM))
	wants(t, "kill", err, fault.Precondition, "it is stopped", "banger vm start calm-otter")
	_, err = r.s.SSHTarget(r.ctx(), v.ID)
	wants(t, "ssh", err, fault.Precondition, "it is stopped", "banger vm start calm-otter")
	_, err = r.s.DialGuest(r.ctx(), v.ID, 22, true)
	wants(t, "dial", err, fault.Precondition, "it is stopped", "banger vm start calm-otter")
	r.check()
}

func TestAPausedMachine(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	v := r.create("calm-otter")
	if err := r.world.Pause("calm-otter", "io-error"); err != nil {
		t.Fatal(err)
	}
	r.untilVM(v.ID, "the note of a pause", func(v vm.VM) bool { return strings.HasPrefix(v.Note, "paused: ") })
	_, err := r.s.DialGuest(r.ctx(), v.ID, 22, true)
	wants(t, "dial", err, fault.Precondition, "paused", "banger vm start calm-otter")
	if d, err := r.s.Show(r.ctx(), "calm-otter"); err != nil || d.VMMState != string(vmm.Paused) {
		t.Errorf("show: %s, %v", d.VMMState, err)
	}
	op := r.done(r.s.Start(r.ctx(), v.ID))
	if len(op.Notices) != 1 || op.Notices[0] != "it was paused and goes on" || r.vm(v.ID).Note != "" || r.vm(v.ID).PID != v.PID {
		t.Errorf("%q, note %q", op.Notices, r.vm(v.ID).Note)
	}
	// A stop lets it go on as well, so that the guest can end in order, and leaves no note of a pause.
	if err := r.world.Pause("calm-otter", "io-error"); err != nil {
		t.Fatal(err)
	}
	r.untilVM(v.ID, "the note of a pause", func(v vm.VM) bool { return v.Note != "" })
	op = r.done(r.s.Stop(r.ctx(), v.ID, false))
	if len(op.Notices) != 0 || r.vm(v.ID).Note != "" {
		t.Errorf("%q, note %q", op.Notices, r.vm(v.ID).Note)
	}
	r.check()
}

func TestAMachineThatEndsByItself(t *testing.T) {
	t.Parallel()
	for reason, note := range map[string]string{
		vmm.GuestShutdown: "the guest powered itself off",
		vmm.Killed:        "its VMM was killed",
		vmm.Crashed:       "its VMM ended unexpectedly",
		vmm.GuestReset:    "the guest rebooted",
	} {
		t.Run(reason, func(t *testing.T) {
			t.Parallel()
			r := newRig(t).start()
			v := r.create("calm-otter")
			if err := r.world.End("calm-otter", reason); err != nil {
				t.Fatal(err)
			}
			if reason == vmm.GuestReset {
				r.untilVM(v.ID, "a new machine", func(n vm.VM) bool { return n.State == vm.Running && n.PID != v.PID })
			} else {
				n := r.untilVM(v.ID, "the end", func(n vm.VM) bool { return n.State == vm.Stopped })
				if n.Note != note || n.StoppedAt == nil {
					t.Errorf("note %q", n.Note)
				}
			}
			if op := r.s.ops.List()[0]; len(op.Notices) != 1 || op.Notices[0] != note {
				t.Errorf("%s: %q", op.Kind, op.Notices)
			}
			r.check()

			// While the daemon is away.
			r.done(r.s.Start(r.ctx(), v.ID))
			r.stop()
			if err := r.world.End("calm-otter", reason); err != nil {
				t.Fatal(err)
			}
			r.restart()
			if n := r.vm(v.ID); n.State != vm.Stopped || n.Note != "its VMM ended while the daemon was away" {
				t.Errorf("%s, note %q", n.State, n.Note)
			}
			r.check()
		})
	}
	t.Run("by kill", func(t *testing.T) {
		t.Parallel()
		r := newRig(t).start()
		v := r.create("calm-otter")
		if _, err := r.s.Kill(r.ctx(), v.ID, int(syscall.SIGKILL)); err != nil {
			t.Fatal(err)
		}
		r.untilVM(v.ID, "the end", func(n vm.VM) bool { return n.State == vm.Stopped && n.Note == "its VMM was killed" })
		r.check()
	})
}

// endingDriver ends each machine between the agent's answer and the record of it: whoever looks at the
// state then sees one that is starting.
func TestAMachineThatEndsWhileItsStartIsRecorded(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	steps, did := 0, false
	r.s.engine.AtStep(func() {
		if steps++; steps == len(r.s.engine.Steps()) {
			did = true
			for _, m := range r.machines() {
				_ = r.world.End(m.Spec.ID, vmm.Crashed)
			}
		}
	})
	op, err := r.s.Create(r.ctx(), CreateRequest{Name: "calm-otter"})
	if err != nil {
		t.Fatal(err)
	}
	r.wait(op, nil)
	r.untilVM(vm.ID(op.VMID), "its end", func(n vm.VM) bool { return n.State == vm.Stopped || n.State == vm.Failed })
	if !did {
		t.Error("nothing was ended")
	}
	r.check()
}

func TestAPrecedingAgentNeverLeaksItsSession(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	v := r.create("calm-otter")
	m := r.s.machines.get(v.ID)
	r.faults("* mute")
	m.mu.Lock()
	sess := m.sess
	m.sess = nil
	m.mu.Unlock()
	_ = sess.Close()
	got := make(chan error, 1)
	go func() {
		_, err := r.s.machines.session(context.Background(), v.ID)
		got <- err
	}()
	r.done(r.s.Stop(r.ctx(), v.ID, true))
	if err := <-got; err == nil {
		t.Error("a session of a machine that is gone")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.sess != nil {
		t.Error("a session was left in a machine that was let go")
	}
}
