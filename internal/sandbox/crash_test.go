package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/store"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
	"git.thaloco.com/thaloco/banger/test/fakebundle"
	"git.thaloco.com/thaloco/banger/test/fakeguest"
)

// The signature test. A daemon process is ended at every boundary of every operation, where a
// boundary is a moment before or after a commit of the production journal, or after a step: that is, between any two
// things that are done to the host. The daemon that follows is ended at each of its boundaries as
// well. Whatever happens, the next one must converge: records, journal, machines, files agree, what
// a user wanted is so, no work disk is ever made anew, and one more daemon changes nothing.
//
// Only the VMM is fake, and its machines survive the process as real ones do.

const (
	crashEnv  = "BANGER_CRASH_CHILD"
	crashExit = 42
)

// crashChild is what a child process is told to do.
type crashChild struct {
	Dir     string // everything but the templates
	Cache   string // templates, shared: made once
	Do      string // operation, or "" for recovery alone
	CrashAt int    // boundary to end at, from 1; 0 for none
	Reboot  bool   // pretend that the host was booted anew
}

func TestMain(m *testing.M) {
	if spec := os.Getenv(crashEnv); spec != "" {
		var c crashChild
		if err := json.Unmarshal([]byte(spec), &c); err != nil {
			panic(err)
		}
		if err := c.run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	removeShared()
	os.Exit(code)
}

// setRestart is a set that stops and starts its VM.
const setRestart = operation.Kind("set with restart")

// registerBase makes the image that a build begins with.
const registerBase = operation.Kind("register base")

func crashChange(restart bool) vm.Change {
	disk, system, memory := 2*vm.MinDiskBytes, 3*vm.MinDiskBytes, int64(1024)
	c := vm.Change{DiskSize: &disk, SystemSize: &system, Labels: map[string]string{"set": "yes"}}
	if restart {
		c.MemoryMiB = &memory
	}
	return c
}

func (c crashChild) paths() (config.Paths, error) {
	env := map[string]string{"BANGER_STATE_DIR": filepath.Join(c.Dir, "state"), "XDG_CACHE_HOME": c.Cache, "XDG_RUNTIME_DIR": c.Dir}
	return config.ResolvePaths(config.Environment{Getenv: func(k string) string { return env[k] }, Home: c.Dir, UID: os.Geteuid(), Tmp: c.Dir})
}

// open is a daemon's start, with a counter at every boundary.
func (c crashChild) open(ctx context.Context, count *int) (*Service, error) {
	p, err := c.paths()
	if err != nil {
		return nil, err
	}
	if err := p.EnsureState(); err != nil {
		return nil, err
	}
	if err := p.EnsureCache(); err != nil {
		return nil, err
	}
	st, err := store.Open(ctx, p.Database())
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	boundary := func() {
		mu.Lock()
		defer mu.Unlock()
		if *count++; *count == c.CrashAt {
			os.Exit(crashExit) // as kill -9 does: nothing deferred runs
		}
	}
	st.AtCommit(boundary)
	world, err := fakevmm.Open(filepath.Join(c.Dir, "world"))
	if err != nil {
		return nil, err
	}
	cfg := config.Defaults(config.Host())
	cfg.RuntimeDir = filepath.Join(c.Cache, "bundle")
	cfg.DNSListenAddr = ""
	cfg.BootTimeout, cfg.StopTimeout = childTime/2, childTime/2 // nothing here takes long, but for a machine that is busy
	cfg.DefaultDiskSize, cfg.DefaultSystemSize = vm.MinDiskBytes, vm.MinDiskBytes
	cfg.MiseSource, cfg.OpencodeSource = filepath.Join(c.Cache, "tool"), filepath.Join(c.Cache, "tool")
	cfg.TmuxResurrectSource, cfg.TmuxContinuumSource = filepath.Join(c.Cache, "resurrect.tar"), filepath.Join(c.Cache, "continuum.tar")
	s := New(st, Options{Driver: fakevmm.New(world, fakeguest.Agent(nil)), Config: cfg, Paths: p, Log: slog.New(slog.DiscardHandler),
		Networks: fakeNetworks(filepath.Join(c.Dir, "network"))})
	s.engine.AtStep(boundary)
	boot := "boot-1"
	if c.Reboot {
		boot = "boot-2"
	}
	return s, s.Reconcile(ctx, boot)
}

// childTime bounds what one daemon does of a case: milliseconds, on a machine that does nothing else.
const childTime = 2 * time.Minute

func (c crashChild) run() error {
	ctx, cancel := context.WithTimeout(context.Background(), childTime)
	defer cancel()
	count := 0
	s, err := c.open(ctx, &count)
	if err != nil {
		return err
	}
	if c.Do != "" {
		v, _ := s.store.VMByName("calm-otter")
		switch operation.Kind(c.Do) {
		case operation.Create:
			_, err = s.Create(ctx, CreateRequest{Name: "calm-otter"})
		case operation.Start:
			_, err = s.Start(ctx, v.ID)
		case operation.Stop:
			_, err = s.Stop(ctx, v.ID, false)
		case operation.Restart:
			_, err = s.Restart(ctx, v.ID)
		case operation.Delete:
			_, err = s.Delete(ctx, v.ID)
		case operation.Set: // the disks of a VM that runs grow, as do those of one that does not
			_, err = s.Set(ctx, v.ID, SetRequest{Change: crashChange(false)})
		case registerBase:
			_, err = s.RegisterImage(ctx, RegisterRequest{Name: "base", Rootfs: filepath.Join(c.Cache, "base.ext4")})
		case operation.ImageBuild:
			_, _, err = s.BuildImage(ctx, BuildRequest{Name: "dev", From: "base"})
		case setRestart:
			_, err = s.Set(ctx, v.ID, SetRequest{Change: crashChange(true), Restart: true})
		case "start-if-there":
			if v.ID != "" {
				_, err = s.Start(ctx, v.ID)
			}
		}
		if err != nil {
			return err
		}
	}
	for _, op := range s.ops.List() {
		err := s.WatchOperation(ctx, op.ID, func(o operation.Operation) error {
			if o.State == operation.Failed && o.Kind != "" && (c.Do == string(o.Kind) || c.Do == string(setRestart) && o.Kind == operation.Set) {
				return fmt.Errorf("%s failed: %w", o.Kind, o.Fault)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if err := s.Close(ctx); err != nil {
		return err
	}
	fmt.Println(count)
	return nil
}

// spawn runs a child and returns how many boundaries it passed, or crashed.
func (c crashChild) spawn(ctx context.Context) (boundaries int, crashed bool, err error) {
	spec, err := json.Marshal(c)
	if err != nil {
		return 0, false, err
	}
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), crashEnv+"="+string(spec), "BANGER_RUNTIME_DIR=")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == crashExit {
		return 0, true, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("child %s: %w: %s", spec, err, stderr.String())
	}
	_, err = fmt.Sscan(string(out), &boundaries)
	return boundaries, false, err
}

// prepare gives the commands that lead to the state in which each operation is tried.
var crashCases = []struct {
	op     operation.Kind
	before []operation.Kind
	want   string // "running", "stopped", "gone": what the user wanted in the end
}{
	{operation.Create, nil, "running"},
	{operation.Stop, []operation.Kind{operation.Create}, "stopped"},
	{operation.Start, []operation.Kind{operation.Create, operation.Stop}, "running"},
	{operation.Restart, []operation.Kind{operation.Create}, "running"},
	{operation.Restart, []operation.Kind{operation.Create, operation.Stop}, "running"},
	{operation.Set, []operation.Kind{operation.Create}, "running"},
	{operation.Set, []operation.Kind{operation.Create, operation.Stop}, "stopped"},
	{setRestart, []operation.Kind{operation.Create}, "running"},
	{operation.Delete, []operation.Kind{operation.Create}, "gone"},
	{operation.Delete, []operation.Kind{operation.Create, operation.Stop}, "gone"},
	{operation.ImageBuild, []operation.Kind{registerBase}, "gone"},
}

// manyFailures is when the test has seen enough to say what is wrong.
const manyFailures = 8

const workMark = "a user's file"

// look checks that everything agrees and returns the state of the VM. marked says that the work
// disk carries a mark that must still be there.
func look(dir, cache string, marked bool) (state string, err error) {
	ctx := context.Background()
	c := crashChild{Dir: dir, Cache: cache}
	p, err := c.paths()
	if err != nil {
		return "", err
	}
	st, err := store.Open(ctx, p.Database())
	if err != nil {
		return "", err
	}
	defer st.Close()
	world, err := fakevmm.Open(filepath.Join(dir, "world"))
	if err != nil {
		return "", err
	}
	machines, err := world.Machines()
	if err != nil {
		return "", err
	}
	ops, err := st.Operations(ctx)
	if err != nil {
		return "", err
	}
	for _, op := range ops {
		if op.State == operation.Running {
			return "", fmt.Errorf("operation %s is still recorded as running", op.Kind)
		}
	}
	dirs, err := names(p.VMs())
	if err != nil {
		return "", err
	}
	runs, err := names(filepath.Join(p.State, "run"))
	if err != nil {
		return "", err
	}
	bases, err := names(p.Images())
	if err != nil {
		return "", err
	}
	attached, err := names(filepath.Join(dir, "network"))
	if err != nil {
		return "", err
	}
	images, err := st.Images(ctx)
	if err != nil {
		return "", err
	}
	for _, img := range images {
		if img.Name != defaultImage && (!slices.Contains(bases, img.Base) || img.Seed != "" && !slices.Contains(bases, img.Seed)) {
			return "", fmt.Errorf("the image %s is not whole: %v", img.Name, bases)
		}
	}
	for _, id := range bases {
		if !slices.ContainsFunc(images, func(img image.Image) bool { return img.Base == id || img.Seed == id }) {
			return "", fmt.Errorf("%s belongs to no image", id)
		}
	}
	vms := st.VMs()
	if len(vms) == 0 {
		if len(machines)+len(dirs)+len(runs)+len(attached) != 0 {
			return "", fmt.Errorf("no VM is left, but %d machines, directories %v, run directories %v, networks %v are", len(machines), dirs, runs, attached)
		}
		return "gone", nil
	}
	v := vms[0]
	if len(dirs) != 1 || dirs[0] != string(v.ID) {
		return "", fmt.Errorf("VM directories: %v", dirs)
	}
	for _, id := range []string{v.Pins.Base, v.Pins.Seed} {
		if !strings.Contains(strings.Join(bases, " "), id) {
			return "", fmt.Errorf("%s is not captured: %v", id, bases)
		}
	}
	if err := asSet(p, v, machines); err != nil {
		return "", err
	}
	steps, err := st.Steps(ctx, v.ID)
	if err != nil {
		return "", err
	}
	want := map[string]lifecycle.StepState{stepImage: lifecycle.Ready, stepSystem: lifecycle.Ready, stepWork: lifecycle.Ready}
	files := []string{"system.ext4", "work.ext4"}
	switch v.State {
	case vm.Running:
		want[stepNetwork], want[stepConfig], want[stepVMM], want[stepAgent] = lifecycle.Ready, lifecycle.Ready, lifecycle.Ready, lifecycle.Ready
		files = append(files, "config.tar")
		if len(machines) != 1 || machines[0].Spec.ID != string(v.ID) || machines[0].PID() != v.PID {
			return "", fmt.Errorf("the VM is running, the machines are %+v", machines)
		}
		if len(runs) != 1 || len(attached) != 1 || attached[0] != string(v.ID) {
			return "", fmt.Errorf("run directories: %v, networks: %v", runs, attached)
		}
	case vm.Stopped:
		if len(machines)+len(runs)+len(attached) != 0 || v.PID != 0 {
			return "", fmt.Errorf("the VM is stopped, but %d machines run, run directories: %v, networks: %v, pid %d", len(machines), runs, attached, v.PID)
		}
	default:
		return "", fmt.Errorf("the VM is %s, wanted %s: %+v", v.State, v.Desired, v.Failure)
	}
	if string(v.State) != string(v.Desired) {
		return "", fmt.Errorf("the VM is %s, wanted %s", v.State, v.Desired)
	}
	if fmt.Sprint(steps) != fmt.Sprint(want) {
		return "", fmt.Errorf("journal: %v, want %v", steps, want)
	}
	have, err := names(p.VM(string(v.ID)))
	if err != nil {
		return "", err
	}
	var disks []string
	for _, n := range have {
		if n != "firecracker.log" {
			disks = append(disks, n)
		}
	}
	sort.Strings(files)
	if fmt.Sprint(disks) != fmt.Sprint(files) {
		return "", fmt.Errorf("files: %v, want %v", disks, files)
	}
	if marked {
		f, err := os.Open(filepath.Join(p.VM(string(v.ID)), "work.ext4"))
		if err != nil {
			return "", err
		}
		defer f.Close()
		b := make([]byte, len(workMark))
		if _, err := f.ReadAt(b, vm.MinDiskBytes-4096); err != nil {
			return "", err
		} else if string(b) != workMark {
			return "", fmt.Errorf("the work disk was made anew: %q", b)
		}
	}
	return string(v.State), nil
}

// asSet checks that files, record and machine agree on the settings, and that a set was done as a whole or
// not at all.
func asSet(p config.Paths, v vm.VM, machines []fakevmm.Record) error {
	was := vm.Spec{DiskSize: vm.MinDiskBytes, SystemSize: vm.MinDiskBytes, MemoryMiB: config.Defaults(config.Host()).DefaultMemoryMiB}
	want := was
	if v.Spec.Labels["set"] == "yes" {
		c := crashChange(v.Spec.MemoryMiB != was.MemoryMiB)
		want.DiskSize, want.SystemSize = *c.DiskSize, *c.SystemSize
		if c.MemoryMiB != nil {
			want.MemoryMiB = *c.MemoryMiB
		}
	}
	if v.Spec.DiskSize != want.DiskSize || v.Spec.SystemSize != want.SystemSize || v.Spec.MemoryMiB != want.MemoryMiB {
		return fmt.Errorf("settings are half set: %+v", v.Spec)
	}
	sizes := map[vmm.Role]int64{vmm.RoleWork: v.Spec.DiskSize, vmm.RoleSystem: v.Spec.SystemSize}
	for role, size := range sizes {
		fi, err := os.Stat(filepath.Join(p.VM(string(v.ID)), string(role)+".ext4"))
		if err != nil {
			return err
		}
		if fi.Size() != size {
			return fmt.Errorf("the %s disk has %d bytes, the record says %d", role, fi.Size(), size)
		}
	}
	for _, m := range machines {
		for role, size := range sizes {
			if m.Sizes[role] != size {
				return fmt.Errorf("the guest believes its %s disk to have %d bytes, the record says %d", role, m.Sizes[role], size)
			}
		}
		if m.Spec.MemoryMiB != v.Spec.MemoryMiB {
			return fmt.Errorf("the machine has %d MiB, the record says %d", m.Spec.MemoryMiB, v.Spec.MemoryMiB)
		}
	}
	return nil
}

// wreck looks at what a crash left before anyone repairs it. What exists must be on record, or a later
// stop or delete would not know of it; and what stands on something must not outlive it.
func wreck(dir, cache string) error {
	ctx := context.Background()
	p, err := crashChild{Dir: dir, Cache: cache}.paths()
	if err != nil {
		return err
	}
	st, err := store.Open(ctx, p.Database())
	if err != nil {
		return err
	}
	defer st.Close()
	world, err := fakevmm.Open(filepath.Join(dir, "world"))
	if err != nil {
		return err
	}
	machines, err := world.Machines()
	if err != nil {
		return err
	}
	for _, m := range machines {
		for _, d := range m.Spec.Drives {
			if !exists(d.Path) {
				return fmt.Errorf("a machine runs without its drive %s", d.Role)
			}
		}
		steps, err := st.Steps(ctx, vm.ID(m.Spec.ID))
		if err != nil {
			return err
		}
		if steps[stepVMM] == "" {
			return fmt.Errorf("a machine runs that the journal does not know of: %v", steps)
		}
	}
	for _, v := range st.VMs() {
		steps, err := st.Steps(ctx, v.ID)
		if err != nil {
			return err
		}
		for step, path := range map[string]string{
			stepSystem: p.VM(string(v.ID)),
			stepWork:   filepath.Join(p.VM(string(v.ID)), "work.ext4"),
			stepConfig: filepath.Join(p.VM(string(v.ID)), "config.tar"),
			// Whichever of network and VMM comes first makes it, and the network is first.
			stepNetwork: p.Run(v.ID.Short()),
		} {
			if exists(path) && steps[step] == "" || step == stepNetwork && exists(filepath.Join(dir, "network", string(v.ID))) && steps[step] == "" {
				return fmt.Errorf("%s is there, and the journal does not know of step %s: %v", path, step, steps)
			}
		}
	}
	return nil
}

// running counts the machines of a world.
func running(dir string) (int, error) {
	world, err := fakevmm.Open(filepath.Join(dir, "world"))
	if err != nil {
		return 0, err
	}
	machines, err := world.Machines()
	return len(machines), err
}

// wasSet says whether the VM has the settings of crashChange.
func wasSet(dir, cache string) (bool, error) {
	p, err := crashChild{Dir: dir, Cache: cache}.paths()
	if err != nil {
		return false, err
	}
	st, err := store.Open(context.Background(), p.Database())
	if err != nil {
		return false, err
	}
	defer st.Close()
	v, ok := st.VMByName("calm-otter")
	return ok && v.Spec.Labels["set"] == "yes", nil
}

// mark writes into the work disk, as a guest does.
func mark(dir, cache string) error {
	p, err := crashChild{Dir: dir, Cache: cache}.paths()
	if err != nil {
		return err
	}
	disks, err := filepath.Glob(filepath.Join(p.VMs(), "*", "work.ext4"))
	if err != nil || len(disks) != 1 {
		return fmt.Errorf("work disks: %v, %w", disks, err)
	}
	f, err := os.OpenFile(disks[0], os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt([]byte(workMark), vm.MinDiskBytes-4096)
	return err
}

// digest is everything that a second recovery must leave as it is: the tree with sizes and times,
// the machines with their instance numbers, the records.
func digest(dir, cache string) (string, error) {
	var out strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if strings.Contains(d.Name(), "banger.db") || d.Name() == "lock" || strings.HasPrefix(d.Name(), ".") {
			return nil
		}
		info, err := d.Info()
		if err != nil || d.IsDir() {
			return err
		}
		fmt.Fprintln(&out, path, info.Size(), info.ModTime().UnixNano())
		return nil
	})
	if err != nil {
		return "", err
	}
	p, err := crashChild{Dir: dir, Cache: cache}.paths()
	if err != nil {
		return "", err
	}
	st, err := store.Open(context.Background(), p.Database())
	if err != nil {
		return "", err
	}
	defer st.Close()
	for _, v := range st.VMs() {
		steps, err := st.Steps(context.Background(), v.ID)
		if err != nil {
			return "", err
		}
		doc, err := json.Marshal(v)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(&out, string(doc), steps)
	}
	return out.String(), nil
}

// scratch is a directory for crash cases: in memory where there is such a place, for a commit waits
// for its disk and there are thousands of them.
func scratch(t *testing.T) string {
	t.Helper()
	base := ""
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		base = "/dev/shm"
	}
	dir, err := os.MkdirTemp(base, "banger-crash-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func copyTree(src, dst string) error {
	return filepath.WalkDir(src, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		to := filepath.Join(dst, rel)
		switch {
		case d.IsDir():
			return os.MkdirAll(to, 0o700)
		case d.Type().IsRegular():
			_, err := disk.Clone(context.Background(), path, to)
			return err
		}
		return nil
	})
}

// toolsForCrashes makes what a build installs, and what it begins with.
func toolsForCrashes(t *testing.T, cache string) {
	t.Helper()
	r := &rig{t: t, dir: cache}
	r.file("tool", "#!/bin/sh\n")
	r.archiveOf("resurrect.tar", "resurrect.tmux")
	r.archiveOf("continuum.tar", "continuum.tmux")
	r.rootFile("base.ext4", "a base")
}

func TestCrashAtEveryBoundary(t *testing.T) {
	root := scratch(t)
	cache := filepath.Join(root, "cache")
	if err := fakebundle.Make(filepath.Join(cache, "bundle")); err != nil {
		t.Fatal(err)
	}
	toolsForCrashes(t, cache)
	ctx := t.Context()
	var group errgroup.Group
	group.SetLimit(2 * runtime.NumCPU())
	defer group.Wait()
	var mu sync.Mutex
	total, failures := 0, 0
	// Every failure is told, up to a few: the boundaries at which one defect shows say what it is.
	fail := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		if failures++; failures <= manyFailures {
			t.Errorf(format, args...)
		}
	}
	enough := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return failures >= manyFailures
	}

	for i, c := range crashCases {
		// The state before, once; every case begins with a copy of it.
		name := fmt.Sprintf("%d-%s", i, c.op)
		before := filepath.Join(root, name+"-before")
		if err := os.MkdirAll(before, 0o700); err != nil {
			t.Fatal(err)
		}
		// A first daemon registers the bundle's image; it is no part of the operation.
		if _, _, err := (crashChild{Dir: before, Cache: cache}).spawn(ctx); err != nil {
			t.Fatal(err)
		}
		for _, op := range c.before {
			if _, _, err := (crashChild{Dir: before, Cache: cache, Do: string(op)}).spawn(ctx); err != nil {
				t.Fatal(err)
			}
			if op == operation.Create {
				if err := mark(before, cache); err != nil {
					t.Fatal(err)
				}
			}
		}
		begin, marked := "gone", slices.Contains(c.before, operation.Create)
		if marked {
			var err error
			if begin, err = look(before, cache, true); err != nil {
				t.Fatal(err)
			}
		}
		// at runs the operation with a crash at one boundary, then recoveries with a crash each at
		// the given boundaries, then one to the end, and checks.
		at := func(id string, reboot bool, crashes ...int) (passed int, err error) {
			dir := filepath.Join(root, name+"-"+id)
			defer os.RemoveAll(dir)
			if err := copyTree(before, dir); err != nil {
				return 0, err
			}
			// Paths are in the records of machines: they must be the ones of the copy.
			if err := moveWorld(before, dir); err != nil {
				return 0, err
			}
			mu.Lock()
			total++
			mu.Unlock()
			for i, n := range crashes {
				child := crashChild{Dir: dir, Cache: cache, CrashAt: n}
				if i == 0 {
					child.Do = string(c.op)
				}
				passed, crashed, err := child.spawn(ctx)
				if err != nil || !crashed {
					return passed, err // beyond the last boundary: nothing left to crash
				}
				if err := wreck(dir, cache); err != nil {
					return 0, fmt.Errorf("right after crash %d: %w", i+1, err)
				}
			}
			last := crashChild{Dir: dir, Cache: cache, Reboot: reboot}
			if reboot {
				if err := os.RemoveAll(filepath.Join(dir, "world", "machines")); err != nil {
					return 0, err
				}
				if passed, _, err = last.spawn(ctx); err != nil {
					return 0, fmt.Errorf("recovery: %w", err)
				}
				if n, err := running(dir); err != nil {
					return 0, err
				} else if n != 0 {
					return 0, fmt.Errorf("%d machines run after a reboot", n)
				}
				// What is left can be started, whatever was half-made.
				start := last
				start.Do = "start-if-there"
				if _, _, err := start.spawn(ctx); err != nil {
					return 0, err
				}
			} else if passed, _, err = last.spawn(ctx); err != nil {
				return 0, fmt.Errorf("recovery: %w", err)
			}
			state, err := look(dir, cache, marked)
			if err != nil {
				return 0, err
			}
			// A crash before the request was on record leaves what was before; from then on it is done.
			ok := state == c.want || crashes[0] == 1 && state == begin
			if reboot {
				ok = state == "running" || state == "gone" && (c.want == "gone" || begin == "gone" && crashes[0] == 1)
			}
			if !ok {
				return 0, fmt.Errorf("the VM is %s in the end, want %s", state, c.want)
			}
			if (c.op == operation.Set || c.op == setRestart) && crashes[0] > 1 {
				if ok, err := wasSet(dir, cache); err != nil {
					return 0, err
				} else if !ok {
					return 0, errors.New("what was to be set is not")
				}
			}
			one, err := digest(dir, cache)
			if err != nil {
				return 0, err
			}
			if _, _, err := last.spawn(ctx); err != nil {
				return 0, fmt.Errorf("second recovery: %w", err)
			}
			two, err := digest(dir, cache)
			if err != nil {
				return 0, err
			}
			if one != two {
				return 0, fmt.Errorf("a second recovery changed something:\n%s\nthen\n%s", one, two)
			}
			return passed, nil
		}
		n, crashed, err := func() (int, bool, error) {
			dir := filepath.Join(root, name+"-plain")
			defer os.RemoveAll(dir)
			if err := copyTree(before, dir); err != nil {
				return 0, false, err
			}
			if err := moveWorld(before, dir); err != nil {
				return 0, false, err
			}
			return crashChild{Dir: dir, Cache: cache, Do: string(c.op)}.spawn(ctx)
		}()
		if err != nil || crashed || n < 4 {
			t.Fatalf("%s: %d boundaries, %v", name, n, err)
		}
		t.Logf("%s: %d boundaries", name, n)
		for first := 1; first <= n && !enough(); first++ {
			group.Go(func() error {
				if enough() {
					return nil
				}
				passed, err := at(fmt.Sprint(first), false, first)
				if err != nil {
					fail("%s, crash at %d of %d: %v", name, first, n, err)
				}
				if _, err := at(fmt.Sprintf("%d-reboot", first), true, first); err != nil {
					fail("%s, crash at %d of %d, host rebooted: %v", name, first, n, err)
				}
				for second := 1; second <= passed && !enough(); second++ {
					if testing.Short() && second%8 != first%8 {
						continue
					}
					if _, err := at(fmt.Sprintf("%d-%d", first, second), false, first, second); err != nil {
						fail("%s, crash at %d of %d, recovery at %d of %d: %v", name, first, n, second, passed, err)
					}
				}
				return nil
			})
		}
	}
	_ = group.Wait() // its functions tell their failures themselves
	t.Logf("%d cases, %d failures", total, failures)
	if !t.Failed() && total < 400 {
		t.Errorf("only %d cases ran", total)
	}
}

// moveWorld points the fake machines' records at the copy of their files.
func moveWorld(from, to string) error {
	files, err := filepath.Glob(filepath.Join(to, "world", "machines", "*.json"))
	if err != nil {
		return err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		if err := os.WriteFile(f, []byte(strings.ReplaceAll(string(b), from+"/", to+"/")), 0o600); err != nil {
			return err
		}
	}
	return nil
}
