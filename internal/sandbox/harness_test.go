package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/store"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
	"git.thaloco.com/thaloco/banger/test/fakebundle"
	"git.thaloco.com/thaloco/banger/test/fakeguest"
)

// patience bounds every wait of a test. Nothing waits that long unless something is broken.
const patience = 60 * time.Second

// shared is what all tests clone from: a bundle and blank disks, made once a process.
var shared struct {
	once sync.Once
	dir  string
	err  error
}

// guestConfig is what a VM's guest is told.
func (r *rig) guestConfig(v vm.VM) boot.Config {
	r.t.Helper()
	f, err := os.Open(filepath.Join(r.paths.VM(string(v.ID)), "config.tar"))
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	c, err := boot.ReadDrive(f)
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

func sharedDir(t testing.TB) string {
	t.Helper()
	shared.once.Do(func() {
		_ = os.Unsetenv("BANGER_RUNTIME_DIR") // it would win over every test's bundle
		base := ""
		if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
			base = "/dev/shm"
		}
		if shared.dir, shared.err = os.MkdirTemp(base, "banger-cases-*"); shared.err == nil {
			shared.err = fakebundle.Make(filepath.Join(shared.dir, "bundle"))
		}
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.dir
}

func removeShared() {
	if shared.dir != "" {
		_ = os.RemoveAll(shared.dir)
	}
}

// rig is an installation on a fake host, and the daemon that runs there, in this process.
type rig struct {
	t        *testing.T
	dir      string
	bundle   string
	world    *fakevmm.World
	cfg      config.Config
	paths    config.Paths
	host     vm.Host
	boot     string
	agent    fakevmm.Agent
	driver   func(vmm.Driver) vmm.Driver // wraps the fake driver, if set
	others   []vmm.Driver                // beside it
	networks func(NetworkHost) []Network
	commit   func() // called at every boundary of the journal and of steps, if set
	s        *Service
}

// newRig makes an installation without a daemon; start starts one.
func newRig(t *testing.T) *rig {
	t.Helper()
	top := sharedDir(t)
	dir, err := os.MkdirTemp(top, "case-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return rigIn(t, dir, filepath.Join(dir, "world"))
}

func rigIn(t *testing.T, dir, world string) *rig {
	t.Helper()
	r := &rig{t: t, dir: dir, bundle: filepath.Join(sharedDir(t), "bundle"), boot: "boot-1", agent: fakeguest.Agent(nil)}
	var err error
	if r.world, err = fakevmm.Open(world); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"BANGER_STATE_DIR": filepath.Join(dir, "state"), "XDG_CACHE_HOME": sharedDir(t), "XDG_RUNTIME_DIR": dir}
	r.paths, err = config.ResolvePaths(config.Environment{Getenv: func(k string) string { return env[k] }, Home: dir, UID: os.Geteuid(), Tmp: dir})
	if err != nil {
		t.Fatal(err)
	}
	r.cfg = config.Defaults(vm.Host{CPUs: 4, MemoryMiB: 8192})
	r.cfg.RuntimeDir = r.bundle
	r.cfg.DNSListenAddr = ""
	r.networks = fakeNetworks(filepath.Join(dir, "network"))
	r.cfg.BootTimeout, r.cfg.StopTimeout = patience, patience
	r.cfg.DefaultDiskSize, r.cfg.DefaultSystemSize = vm.MinDiskBytes, vm.MinDiskBytes
	r.host = vm.Host{CPUs: 4, MemoryMiB: 8192}
	return r
}

// ownBundle gives the rig a bundle that it may damage.
func (r *rig) ownBundle() {
	r.t.Helper()
	to := filepath.Join(r.dir, "bundle")
	if err := copyTree(r.bundle, to); err != nil {
		r.t.Fatal(err)
	}
	r.bundle, r.cfg.RuntimeDir = to, to
}

// open is a daemon's start, without its end.
func (r *rig) open() error {
	for _, ensure := range []func() error{r.paths.EnsureState, r.paths.EnsureCache} {
		if err := ensure(); err != nil {
			return err
		}
	}
	st, err := store.Open(context.Background(), r.paths.Database())
	if err != nil {
		return err
	}
	if r.commit != nil {
		st.AtCommit(r.commit)
	}
	var d vmm.Driver = fakevmm.New(r.world, r.agent)
	if r.driver != nil {
		d = r.driver(d)
	}
	r.s = New(st, Options{Driver: d, Others: r.others, Config: r.cfg, Paths: r.paths, Host: r.host, Log: slog.New(slog.DiscardHandler),
		Networks: r.networks})
	if r.commit != nil {
		r.s.engine.AtStep(r.commit)
	}
	return r.s.Reconcile(context.Background(), r.boot)
}

// start starts the daemon, and ends it with the test.
func (r *rig) start() *rig {
	r.t.Helper()
	if err := r.open(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(r.stop)
	return r
}

// stop ends the daemon in order; machines run on.
func (r *rig) stop() {
	r.t.Helper()
	if r.s == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := r.s.Close(ctx); err != nil {
		r.t.Errorf("closing: %v", err)
	}
	r.s = nil
}

// restart is the next daemon, after what it found was settled.
func (r *rig) restart() {
	r.t.Helper()
	r.stop()
	if err := r.open(); err != nil {
		r.t.Fatal(err)
	}
	r.settled()
}

// settled waits until no operation runs.
func (r *rig) settled() {
	r.t.Helper()
	for {
		busy := false
		for _, op := range r.s.ops.List() {
			if op.State == operation.Running {
				busy = true
				r.wait(op, nil)
			}
		}
		if !busy {
			return
		}
	}
}

func (r *rig) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	r.t.Cleanup(cancel)
	return ctx
}

// wait waits for an operation's end.
func (r *rig) wait(op operation.Operation, err error) operation.Operation {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
	last := op
	if err := r.s.WatchOperation(r.ctx(), op.ID, func(o operation.Operation) error { last = o; return nil }); err != nil {
		r.t.Fatalf("watching %s: %v", op.Kind, err)
	}
	return last
}

// done is wait for an operation that must succeed.
func (r *rig) done(op operation.Operation, err error) operation.Operation {
	r.t.Helper()
	op = r.wait(op, err)
	if op.State != operation.Succeeded {
		r.t.Fatalf("%s of %s: %s: %v", op.Kind, op.VMName, op.State, op.Fault)
	}
	return op
}

// create makes a running VM.
func (r *rig) create(name string) vm.VM {
	r.t.Helper()
	op := r.done(r.s.Create(r.ctx(), CreateRequest{Name: name}))
	return r.vm(vm.ID(op.VMID))
}

func (r *rig) vm(id vm.ID) vm.VM {
	r.t.Helper()
	v, ok := r.s.store.VM(id)
	if !ok {
		r.t.Fatalf("VM %s has no record", id)
	}
	return v
}

// until waits for the state to be as wanted, woken by events, and returns the snapshot in which it is.
func (r *rig) until(what string, ok func(Snapshot) bool) Snapshot {
	r.t.Helper()
	found := errors.New("found")
	var last Snapshot
	err := r.s.Watch(r.ctx(), func(Event) error {
		var err error
		if last, err = r.s.snapshot(context.Background()); err != nil {
			return err
		}
		if ok(last) {
			return found
		}
		return nil
	})
	if !errors.Is(err, found) {
		r.t.Fatalf("waiting for %s: %v; %s", what, err, brief(last.VMs))
	}
	return last
}

// untilVM waits for one VM to be as wanted, with no operation running.
func (r *rig) untilVM(id vm.ID, what string, ok func(vm.VM) bool) vm.VM {
	r.t.Helper()
	var v vm.VM
	r.until(what, func(s Snapshot) bool {
		if slices.ContainsFunc(s.Operations, func(op operation.Operation) bool { return op.State == operation.Running }) {
			return false
		}
		for _, v = range s.VMs {
			if v.ID == id {
				return ok(v)
			}
		}
		return false
	})
	return v
}

// untilStage waits until an operation is at a stage.
func (r *rig) untilStage(id, stage string) {
	r.t.Helper()
	reached := errors.New("reached")
	err := r.s.WatchOperation(r.ctx(), id, func(op operation.Operation) error {
		if n := len(op.Stages); n > 0 && op.Stages[n-1].Name == stage && op.Stages[n-1].FinishedAt.IsZero() {
			return reached
		}
		return nil
	})
	if !errors.Is(err, reached) {
		r.t.Fatalf("the operation ended before stage %s: %v", stage, err)
	}
}

func (r *rig) faults(lines ...string) {
	r.t.Helper()
	if err := r.world.SetFaults(strings.Join(lines, "\n") + "\n"); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) machines() []fakevmm.Record {
	r.t.Helper()
	all, err := r.world.Machines()
	if err != nil {
		r.t.Fatal(err)
	}
	return all
}

func (r *rig) list(dir string) []string {
	r.t.Helper()
	list, err := names(dir)
	if err != nil {
		r.t.Fatal(err)
	}
	return list
}

// check holds records, journal, machines and files against each other. It wants a moment in which no
// operation runs.
func (r *rig) check() {
	r.t.Helper()
	ctx := context.Background()
	for _, op := range r.s.ops.List() {
		if op.State == operation.Running {
			r.t.Errorf("a %s still runs", op.Kind)
		}
	}
	recorded, err := r.s.store.Operations(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, op := range recorded {
		if op.State == operation.Running {
			r.t.Errorf("a %s is on record as running", op.Kind)
		}
	}
	machines := map[string]fakevmm.Record{}
	for _, m := range r.machines() {
		if m.Spec.Owner == r.s.store.InstallationID() {
			machines[m.Spec.ID] = m
		}
	}
	var dirs, runs []string
	durable := map[string]lifecycle.StepState{stepImage: lifecycle.Ready, stepSystem: lifecycle.Ready, stepWork: lifecycle.Ready}
	for _, v := range r.s.store.VMs() {
		steps, err := r.s.store.Steps(ctx, v.ID)
		if err != nil {
			r.t.Fatal(err)
		}
		if v.State != vm.Stopped || v.StartedAt != nil || exists(r.paths.VM(string(v.ID))) {
			dirs = append(dirs, string(v.ID))
		}
		want := maps.Clone(durable)
		young := v.State == vm.Stopped && v.StartedAt == nil // its create was ended by a stop: start makes the rest
		if young {
			for step := range durable {
				if steps[step] != lifecycle.Cleaning {
					steps[step] = lifecycle.Ready
				}
			}
		}
		files := map[string]bool{"system.ext4": true, "work.ext4": true}
		m, runs_ := machines[string(v.ID)]
		delete(machines, string(v.ID))
		switch v.State {
		case vm.Running:
			want[stepNetwork], want[stepConfig], want[stepVMM], want[stepAgent] = lifecycle.Ready, lifecycle.Ready, lifecycle.Ready, lifecycle.Ready
			files["config.tar"] = true
			runs = append(runs, v.ID.Short())
			if !runs_ || m.PID() != v.PID {
				r.t.Errorf("%s is running with pid %d, its machine is %v %d", v.Name, v.PID, runs_, m.PID())
			}
			if r.s.machines.get(v.ID) == nil {
				r.t.Errorf("%s is running, and the daemon does not know its machine", v.Name)
			}
			if v.Failure != nil {
				r.t.Errorf("%s is running with a failure: %+v", v.Name, v.Failure)
			}
		case vm.Stopped, vm.Failed:
			if runs_ || v.PID != 0 || r.s.machines.get(v.ID) != nil {
				r.t.Errorf("%s is %s with a machine: %v, pid %d", v.Name, v.State, runs_, v.PID)
			}
			if (v.State == vm.Failed) != (v.Failure != nil) {
				r.t.Errorf("%s is %s with failure %+v", v.Name, v.State, v.Failure)
			}
			if v.Desired != vm.WantStopped {
				r.t.Errorf("%s is %s, wanted %s", v.Name, v.State, v.Desired)
			}
		default:
			r.t.Errorf("%s is %s", v.Name, v.State)
		}
		if !maps.Equal(steps, want) {
			r.t.Errorf("%s (%s): journal %v", v.Name, v.State, steps)
		}
		for _, n := range r.list(r.paths.VM(string(v.ID))) {
			if !files[n] && n != "firecracker.log" {
				r.t.Errorf("%s (%s) has a file %s", v.Name, v.State, n)
			}
			delete(files, n)
		}
		if len(files) != 0 && !young {
			r.t.Errorf("%s (%s) lacks %v", v.Name, v.State, files)
		}
		for _, id := range []string{v.Pins.Base, v.Pins.Seed} {
			if id != "" && !young && !exists(r.s.images.content(id)) {
				r.t.Errorf("%s: its content %s is gone", v.Name, id)
			}
		}
	}
	for _, m := range machines {
		r.t.Errorf("machine of %s runs and no record says so", m.Spec.Name)
	}
	slices.Sort(dirs)
	slices.Sort(runs)
	if have := r.list(r.paths.VMs()); !slices.Equal(have, dirs) {
		r.t.Errorf("VM directories %v, want %v", have, dirs)
	}
	attached := r.list(filepath.Join(r.dir, "network"))
	for i := range attached {
		attached[i] = vm.ID(attached[i]).Short()
	}
	slices.Sort(attached)
	if !slices.Equal(attached, runs) {
		r.t.Errorf("on the network are %v, want %v", attached, runs)
	}
	if have := r.list(filepath.Join(r.paths.State, "run")); !slices.Equal(have, runs) {
		r.t.Errorf("run directories %v, want %v", have, runs)
	}
}

// nothing checks that no trace of any VM is there.
func (r *rig) nothing() {
	r.t.Helper()
	r.check()
	if n := len(r.s.store.VMs()); n != 0 {
		r.t.Errorf("%d VMs are left", n)
	}
}

// wants checks an error: its code, that its text names what it is about, and that its hint says
// what to type.
func wants(t *testing.T, what string, err error, code fault.Code, text, hint string) {
	t.Helper()
	if !fault.Is(err, code) || !strings.Contains(err.Error(), text) || !strings.Contains(fault.HintOf(err), hint) {
		t.Errorf("%s: %v (%s, hint %q), want %s with %q, hint with %q", what, err, fault.CodeOf(err), fault.HintOf(err), code, text, hint)
	}
	if err != nil && strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' && r != '\n' }) {
		t.Errorf("%s: control characters in %q", what, err.Error())
	}
}

// ended checks how an operation ended.
func ended(t *testing.T, op operation.Operation, state operation.State, code fault.Code, text, hint string) {
	t.Helper()
	if op.State != state {
		t.Errorf("%s of %s: %s (%v), want %s", op.Kind, op.VMName, op.State, op.Fault, state)
		return
	}
	if op.FinishedAt.IsZero() {
		t.Errorf("%s ended at no time", op.Kind)
	}
	if op.Fault == nil {
		t.Errorf("%s %s without a fault", op.Kind, op.State)
		return
	}
	wants(t, fmt.Sprint(op.Kind), op.Fault, code, text, hint)
}

// brief is what a failed test tells of VMs: not their keys.
func brief(vms []vm.VM) string {
	var out []string
	for _, v := range vms {
		out = append(out, fmt.Sprintf("%s %s (wanted %s, pid %d, note %q, failure %v)", v.Name, v.State, v.Desired, v.PID, v.Note, v.Failure))
	}
	return fmt.Sprintf("%d VMs: %s", len(vms), strings.Join(out, "; "))
}
