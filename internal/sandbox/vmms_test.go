package sandbox

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
)

// namedDriver is a fake under another VMM's name, which keeps what it was told to start.
type namedDriver struct {
	vmm.Driver
	name    string
	started *[]vmm.Spec
}

func (d namedDriver) Name() string { return d.name }

func (d namedDriver) Start(ctx context.Context, s vmm.Spec) (vmm.Machine, error) {
	*d.started = append(*d.started, s)
	return d.Driver.Start(ctx, s)
}

// A VM runs on under the VMM that started it when the next daemon chooses another one; it is stopped
// there, and started with the same drives under the chosen one; and back.
func TestAVMChangesItsVMM(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	second, err := fakevmm.Open(filepath.Join(r.dir, "second-world"))
	if err != nil {
		t.Fatal(err)
	}
	worlds := map[string]*fakevmm.World{"qemu": r.world, "firecracker": second}
	var started []vmm.Spec
	daemon := func(chosen, other string) {
		t.Helper()
		drivers := map[string]vmm.Driver{}
		for name, w := range worlds {
			drivers[name] = namedDriver{fakevmm.New(w, r.agent), name, &started}
		}
		r.driver = func(vmm.Driver) vmm.Driver { return drivers[chosen] }
		r.others = []vmm.Driver{drivers[other]}
		if r.s == nil {
			r.start()
		} else {
			r.restart()
		}
	}
	running := func() string {
		t.Helper()
		var where []string
		for name, w := range worlds {
			ms, err := w.Machines()
			if err != nil {
				t.Fatal(err)
			}
			for range ms {
				where = append(where, name)
			}
		}
		slices.Sort(where)
		return strings.Join(where, " ")
	}
	want := func(id vm.ID, state vm.State, vmmName string) {
		t.Helper()
		if v := r.vm(id); v.State != state || v.VMM != vmmName {
			t.Errorf("%s under %s, want %s under %s", v.State, v.VMM, state, vmmName)
		}
		where := vmmName
		if state != vm.Running {
			where = ""
		}
		if got := running(); got != where {
			t.Errorf("machines run under %q, want %q", got, where)
		}
	}

	daemon("qemu", "firecracker")
	id := r.create("calm-otter").ID
	want(id, vm.Running, "qemu")

	daemon("firecracker", "qemu")
	want(id, vm.Running, "qemu")
	if d, err := r.s.Show(r.ctx(), "calm-otter"); err != nil || !strings.HasPrefix(d.Agent, "answers") {
		t.Errorf("agent %q, %v", d.Agent, err)
	}
	r.done(r.s.Stop(r.ctx(), id, false))
	want(id, vm.Stopped, "qemu")
	r.done(r.s.Start(r.ctx(), id))
	want(id, vm.Running, "firecracker")

	// The record is older than the start: its daemon was killed before it was saved.
	v := r.vm(id)
	v.VMM = "qemu"
	if err := r.s.store.Save(r.ctx(), v); err != nil {
		t.Fatal(err)
	}
	daemon("qemu", "firecracker")
	if got := running(); got != "firecracker" || r.vm(id).State != vm.Running {
		t.Errorf("%s, machines run under %q", r.vm(id).State, got)
	}
	r.done(r.s.Restart(r.ctx(), id))
	want(id, vm.Running, "qemu")

	if len(started) != 3 {
		t.Fatalf("%d starts, want 3", len(started))
	}
	if roles := len(started[0].Drives); roles != 5 {
		t.Errorf("%d drives", roles)
	}
	started[0].Cgroup = nil // a function
	for _, s := range started[1:] {
		s.Cgroup = nil
		if diff := cmp.Diff(started[0], s); diff != "" {
			t.Errorf("another VMM was told something else (-first +later):\n%s", diff)
		}
	}

	daemon("firecracker", "qemu") // deletes what runs under the other one
	r.done(r.s.Delete(r.ctx(), id))
	if got := running(); got != "" {
		t.Errorf("after the delete machines run under %q", got)
	}
}

// What a guest says at its end decides also when no daemon was there to see it.
func TestAGuestThatEndsWhileTheDaemonIsAway(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		says  string
		state vm.State
		note  string // of the VM, or of the operation that started it again
	}{
		{boot.EndLine(false), vm.Stopped, "the guest powered itself off while the daemon was away"},
		{boot.EndLine(true), vm.Running, "the guest rebooted while the daemon was away"},
		{"nothing", vm.Stopped, "its VMM ended while the daemon was away"},
	} {
		t.Run(c.says, func(t *testing.T) {
			t.Parallel()
			r := newRig(t).start()
			v := r.create("calm-otter")
			r.stop()
			log, err := os.OpenFile(filepath.Join(r.paths.VM(string(v.ID)), "firecracker.log"), os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := log.WriteString("\n" + c.says); err != nil {
				t.Fatal(err)
			}
			if err := log.Close(); err != nil {
				t.Fatal(err)
			}
			if err := r.world.End("calm-otter", vmm.Crashed); err != nil {
				t.Fatal(err)
			}
			r.restart()
			n := r.vm(v.ID)
			if n.State != c.state {
				t.Fatalf("%s, want %s", n.State, c.state)
			}
			if c.state == vm.Stopped && n.Note != c.note {
				t.Errorf("note %q, want %q", n.Note, c.note)
			}
			if c.state == vm.Running {
				if op := r.s.ops.List()[0]; n.PID == v.PID || !slices.Contains(op.Notices, c.note) {
					t.Errorf("pid %d, was %d; %q, want %q", n.PID, v.PID, op.Notices, c.note)
				}
			}
			r.check()
			r.restart() // once is enough
			if again := r.vm(v.ID); again.State != c.state || again.PID != n.PID {
				t.Errorf("the next daemon made it %s, pid %d of %d", again.State, again.PID, n.PID)
			}
		})
	}
}
