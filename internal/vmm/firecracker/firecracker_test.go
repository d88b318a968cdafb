package firecracker

import (
	"context"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

const patience = 60 * time.Second

// programVariable names the Firecracker that is tested; without it the one of the bundle or of PATH is.
const programVariable = "BANGER_TEST_FIRECRACKER"

// installed finds a real Firecracker on a host whose KVM starts machines, with or without the CPU's extensions.
func installed() (string, error) {
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	_ = kvm.Close()
	if path := os.Getenv(programVariable); path != "" {
		return path, nil
	}
	for _, dir := range []string{os.Getenv("BANGER_RUNTIME_DIR"), "../../../runtime"} {
		path, err := filepath.Abs(filepath.Join(dir, "firecracker"))
		if st, statErr := os.Stat(path); err == nil && statErr == nil && st.Mode().IsRegular() && dir != "" {
			return path, nil
		}
	}
	return exec.LookPath("firecracker")
}

// newDriver is a driver with a real Firecracker. It tries KVM whatever the CPU shows: the tiny kernel
// needs no more than a host without vmx and svm may have.
func newDriver(t testing.TB) *Driver {
	t.Helper()
	path, err := installed()
	if err != nil {
		t.Skipf("no Firecracker runs here (make runtime brings one; %s names one): %v", programVariable, err)
	}
	return driverOf(path)
}

func driverOf(path string) *Driver {
	d := New(func() (string, error) { return path, nil })
	d.kvm = func() (bool, string) { return true, "" }
	return d
}

// specIn is a machine with the tiny kernel, whose files are in dir.
func specIn(dir string) vmm.Spec {
	return vmm.Spec{
		ID: "0123456789abcdef0123456789abcdef", Owner: fmt.Sprintf("test-%08x", crc32.ChecksumIEEE([]byte(dir))), Name: "vm",
		RunDir: filepath.Join(dir, "run"), Log: filepath.Join(dir, "log"),
		Kernel: filepath.Join(dir, "vmlinux"), Initrd: filepath.Join(dir, "initrd.img"), Cmdline: "sleep", VCPU: 1, MemoryMiB: 64, CID: 4711,
		Drives: []vmm.Drive{
			{Role: vmm.RoleBase, Path: filepath.Join(dir, "a, b: base"), ReadOnly: true},
			{Role: vmm.RoleSystem, Path: filepath.Join(dir, "a, b: system")},
		},
	}
}

// newSpec is specIn with its files made. Its owner is the test's own.
func newSpec(t testing.TB) vmm.Spec {
	t.Helper()
	s := specIn(t.TempDir())
	if err := os.Mkdir(s.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	tinyKernel(t, s.Kernel)
	if err := os.WriteFile(s.Initrd, []byte("initrd"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, d := range s.Drives {
		if err := os.WriteFile(d.Path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func start(t *testing.T, d *Driver, s vmm.Spec) *machine {
	t.Helper()
	begin := time.Now()
	m, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("started in %v", time.Since(begin))
	own(t, m)
	return m.(*machine)
}

func own(t *testing.T, m vmm.Machine) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := m.Kill(ctx); err != nil {
			t.Error(err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
}

func ended(t *testing.T, m vmm.Machine) string {
	t.Helper()
	select {
	case <-m.Done():
	case <-time.After(patience):
		t.Fatal("still running")
	}
	return m.Exit().Reason
}

// TestExit lets guests end in their ways, and compares the reasons: for the daemon that started them, and
// for one that adopted them and cannot know the exit status.
func TestExit(t *testing.T) {
	for _, c := range []struct{ cmdline, want, adopted string }{
		{"poweroff", vmm.GuestShutdown, vmm.GuestShutdown},
		{"reset", vmm.GuestReset, vmm.Crashed}, // the tiny kernel has no last words; a Linux has
	} {
		t.Run(c.cmdline, func(t *testing.T) {
			s := newSpec(t)
			if err := os.WriteFile(s.Log, []byte("banger: end: reboot\nan earlier run\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			s.Cmdline = c.cmdline
			if got := ended(t, start(t, newDriver(t), s)); got != c.want {
				t.Errorf("exit reason %q, want %q", got, c.want)
			}
			b, err := os.ReadFile(s.Log)
			if err != nil || !strings.Contains(string(b), c.cmdline+" console=ttyS0") {
				t.Errorf("log %q, %v", b, err)
			}
		})
	}
}

// TestFull fills the host's disk: the machine is paused before, stays so for as long as there is no room, and
// goes on when there is.
func TestFull(t *testing.T) {
	d := newDriver(t)
	var room atomic.Int64
	room.Store(reserve)
	d.free = func(path string) (int64, error) {
		if _, err := free(path); err != nil {
			return 0, err
		}
		return room.Load(), nil
	}
	s := newSpec(t)
	m := start(t, d, s)
	next := func(state vmm.State, reason string) {
		t.Helper()
		select {
		case c := <-m.Changes():
			if c.State != state || c.Reason != reason {
				t.Fatalf("change %+v, want %s %q", c, state, reason)
			}
		case <-time.After(patience):
			t.Fatalf("never %s", state)
		}
	}
	if state, err := m.State(t.Context()); err != nil || state != vmm.Running {
		t.Fatalf("%v, %v", state, err)
	}
	room.Store(reserve - 1)
	next(vmm.Paused, vmm.NoRoom)
	if state, err := m.State(t.Context()); err != nil || state != vmm.Paused {
		t.Errorf("%v, %v", state, err)
	}
	if err := m.Resume(t.Context()); !fault.Is(err, fault.Exhausted) || fault.HintOf(err) == "" {
		t.Errorf("Resume without room: %v, want exhausted with a hint", err)
	}
	if state, err := m.State(t.Context()); err != nil || state != vmm.Paused {
		t.Errorf("after that %v, %v", state, err)
	}
	room.Store(10 << 30)
	if err := m.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	next(vmm.Running, "")
	if state, err := m.State(t.Context()); err != nil || state != vmm.Running {
		t.Errorf("%v, %v", state, err)
	}
	// One that is paused can be ended.
	room.Store(0)
	m.poke <- struct{}{}
	next(vmm.Paused, vmm.NoRoom)
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, s)
}

// TestRoom finds out that all that a machine writes to is looked at: its data disk and its log.
func TestRoom(t *testing.T) {
	m := start(t, newDriver(t), newSpec(t))
	if len(m.room.paths) != 1 { // one filesystem
		t.Fatalf("%q", m.room.paths)
	}
	want, err := free(m.spec.Log)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := m.room.least(); err != nil || got < want/2 || got > want*2 {
		t.Errorf("%d bytes are free, %v; want about %d", got, err, want)
	}
	for free, want := range map[int64]time.Duration{0: lookOften, reserve: lookOften, reserve + 1<<30: 500 * time.Millisecond, 1 << 50: lookSeldom} {
		if got := nextLook(free); got < want*9/10 || got > want*11/10 {
			t.Errorf("with %d free the next look is in %v, want about %v", free, got, want)
		}
	}
}

// TestAskedWhileItEnds asks Firecracker's API all the time while its guest ends. Firecracker may wait for
// itself for ever then, and has to be ended; why the guest ended is told all the same.
func TestAskedWhileItEnds(t *testing.T) {
	d := newDriver(t)
	for _, c := range []struct{ cmdline, want string }{{"poweroff", vmm.GuestShutdown}, {"reset", vmm.GuestReset}} {
		for range 2 {
			s := newSpec(t)
			s.Cmdline = c.cmdline
			m := start(t, d, s)
			ctx, cancel := context.WithCancel(t.Context())
			var asking sync.WaitGroup
			for range 4 {
				asking.Go(func() {
					dir, err := rundir.Open(s.RunDir)
					if err != nil {
						t.Error(err)
						return
					}
					defer dir.Close()
					for ctx.Err() == nil {
						one, stop := context.WithTimeout(ctx, time.Second)
						if c, err := dial(one, dir); err == nil {
							_ = c.do(one, "GET", "/", nil, nil) // it is there, or not
							c.close()
						}
						stop()
					}
				})
			}
			begin := time.Now()
			got := ended(t, m)
			t.Logf("it ended after %v", time.Since(begin))
			cancel()
			asking.Wait()
			if got != c.want {
				t.Errorf("exit reason %q, want %q", got, c.want)
			}
			wantNothing(t, s)
		}
	}
}
