package firecracker

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/jail"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
	"git.thaloco.com/thaloco/banger/internal/vmm/vmmtest"
)

// jailHost makes real jails, with the jailer beside the real Firecracker. What it changes of this host are directories of the test's: mounts
// are in namespaces of the processes.
func jailHost(t testing.TB) *jail.Host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("jails take root")
	}
	h, err := hostOf(filepath.Join(t.TempDir(), "jails"))
	if err != nil {
		t.Skipf("no Firecracker with its jailer runs here (make runtime brings both; %s names one): %v", programVariable, err)
	}
	here, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	if err := h.Check(t.Context(), here); fault.Is(err, fault.Unsupported) {
		t.Skip("this host has no jails: ", err)
	} else if err != nil {
		t.Fatal(err)
	}
	return h
}

// hostOf makes jails with their records in a directory.
func hostOf(dir string) (*jail.Host, error) {
	program, err := installed()
	if err != nil {
		return nil, err
	}
	jailer := filepath.Join(filepath.Dir(program), "jailer")
	if _, err := os.Stat(jailer); err != nil {
		return nil, err
	}
	return jail.NewHost(jail.Options{User: os.Geteuid(), Dir: dir,
		Programs: func() (jail.Programs, error) { return jail.Programs{Firecracker: program, Jailer: jailer}, nil },
		GiveTAP:  func(string, int) error { return errors.New("there are no TAPs in these tests") }}), nil
}

// startHook does something when a jail was made, before anybody hears of it.
type startHook struct {
	*jail.Host
	then func()
}

func (h startHook) Start(ctx context.Context, r jail.Request, f jail.Files) (process.Started, error) {
	s, err := h.Host.Start(ctx, r, f)
	h.then()
	return s, err
}

// asked counts the questions after a jail.
type asked struct {
	*jail.Host
	n atomic.Int32
}

func (a *asked) Find(ctx context.Context, n jail.Name) (int, *os.File, error) {
	a.n.Add(1)
	return a.Host.Find(ctx, n)
}

// TestJailedDaemonKilled ends the daemon by kill -9 when a jail was made, and later, as TestDaemonKilled does.
func TestJailedDaemonKilled(t *testing.T) {
	jailHost(t) // or skips
	for _, c := range []struct {
		when    string
		adopted bool
	}{{"jailed: started", false}, {"jailed: running", true}, {"jailed: running, pidfile lost", true}} {
		t.Run(c.when, func(t *testing.T) {
			s, jails := newSpec(t), filepath.Join(t.TempDir(), "jails")
			h, err := hostOf(jails)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = h.Signal(context.Background(), jailName(s), int(unix.SIGKILL)) }) // should the test fail before it owns it
			daemon := exec.Command("/proc/self/exe", "-test.run=^$")
			daemon.Env = append(os.Environ(), "FIRECRACKER_TEST_DAEMON="+c.when, "FIRECRACKER_TEST_DIR="+filepath.Dir(s.RunDir), "FIRECRACKER_TEST_JAILS="+jails)
			if out, err := daemon.CombinedOutput(); err == nil || daemon.ProcessState.ExitCode() != -1 {
				t.Fatalf("the daemon was not killed: %v: %s", err, out)
			}
			before := processes(t, s)
			if len(before) != 1 {
				t.Fatalf("processes %v after the crash", before)
			}
			d := newDriver(t)
			d.UseJails(Jails{Jail: h, Want: true, Must: true})
			if adopted, err := d.Adopt(t.Context(), s); c.adopted {
				if err != nil {
					t.Fatal(err)
				}
				if err := adopted.Close(); err != nil || !adopted.(*machine).Jailed() {
					t.Fatal("not in a jail", err)
				}
			} else if !fault.Is(err, fault.NotFound) {
				t.Errorf("Adopt: %v, want not found", err)
			} else {
				wantNothing(t, s)
			}
			m := start(t, d, s)
			if after := processes(t, s); len(after) != 1 || c.adopted != (after[0] == before[0]) {
				t.Errorf("processes %v after the next start, before it %v", after, before)
			}
			if err := m.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantNothing(t, s)
		})
	}
}

// TestJailedStartGivenUp: who gives up while a jail is made leaves none.
func TestJailedStartGivenUp(t *testing.T) {
	h := jailHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	d := newDriver(t)
	d.UseJails(Jails{Jail: startHook{h, cancel}, Want: true})
	s := newSpec(t)
	if m, err := d.Start(ctx, s); err == nil {
		own(t, m)
		t.Error("it is started")
	}
	wantNothing(t, s)
}

// TestJailedConformance holds Firecrackers in real jails to what those without are held to.
func TestJailedConformance(t *testing.T) {
	h := jailHost(t)
	c := conformance()
	c.New = func(t *testing.T) vmm.Driver {
		d := newDriver(t)
		d.UseJails(Jails{Jail: h, Want: true, Must: true})
		return d
	}
	vmmtest.Run(t, c)
}

// fakeJail has no jail to offer, and says so.
type fakeJail struct {
	jail.Maker
	err    error
	starts int
}

func (f *fakeJail) Find(context.Context, jail.Name) (int, *os.File, error) {
	return 0, nil, fault.New(fault.NotFound, "jail", "none runs")
}

func (f *fakeJail) Signal(context.Context, jail.Name, int) error {
	return fault.New(fault.NotFound, "jail", "none runs")
}

func (f *fakeJail) Check(context.Context, *os.File) error { return f.err }

func (f *fakeJail) Start(context.Context, jail.Request, jail.Files) (process.Started, error) {
	f.starts++
	return process.Started{}, f.err
}

// TestNoJail: where jails do not work, VMs start without one and say why, unless they are to run in one or not at all.
func TestNoJail(t *testing.T) {
	overlay := fault.New(fault.Unsupported, "/vm", "its filesystem (overlayfs) cannot map user ids")
	for _, c := range []struct {
		name   string
		jails  Jails
		starts bool
		why    string
	}{
		{"none", Jails{Why: "the root helper is not installed"}, true, "the root helper is not installed"},
		{"not wanted", Jails{Jail: &fakeJail{}, Why: "jailer = \"off\""}, true, "jailer = \"off\""},
		{"none, and it must", Jails{Must: true, Why: "the root helper is not installed"}, false, ""},
		{"not here", Jails{Jail: &fakeJail{err: overlay}, Want: true}, true, overlay.Error()},
		{"not here, and it must", Jails{Jail: &fakeJail{err: overlay}, Want: true, Must: true}, false, ""},
		{"it fails", Jails{Jail: &fakeJail{err: fault.New(fault.Unavailable, "root helper", "it hung up")}, Want: true}, false, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDriver(t)
			d.UseJails(c.jails)
			s := newSpec(t)
			s.ID = string(vm.NewID())
			m, err := d.Start(t.Context(), s)
			if err == nil {
				own(t, m)
			}
			if (err == nil) != c.starts {
				t.Fatalf("%v", err)
			}
			if err != nil {
				if c.jails.Must && fault.HintOf(err) == "" {
					t.Errorf("no hint: %v", err)
				}
				wantNothing(t, s)
				return
			}
			if m.(*machine).Jailed() || d.NoJail() != c.why {
				t.Errorf("in a jail: %v, why not: %q, want %q", m.(*machine).Jailed(), d.NoJail(), c.why)
			}
		})
	}
}

// TestHostileLeftovers: what a Firecracker that was taken over leaves in its directory keeps nobody from cleaning up.
func TestHostileLeftovers(t *testing.T) {
	run, elsewhere := t.TempDir(), t.TempDir()
	dir, err := rundir.Open(run)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	deep, kept := filepath.Join(run, jailDir, "a", "b"), filepath.Join(elsewhere, "kept")
	if err := errors.Join(os.MkdirAll(deep, 0o700), os.WriteFile(filepath.Join(deep, "file"), nil, 0), os.WriteFile(kept, nil, 0o600), os.Symlink(elsewhere, filepath.Join(deep, "link")),
		os.Symlink("/proc/self/root", filepath.Join(run, jailDir, apiSocket)), os.Chmod(deep, 0), os.Chmod(filepath.Dir(deep), 0)); err != nil {
		t.Fatal(err)
	}
	if err := clean(dir); err != nil { // as root nothing hinders; as an ordinary user modes do
		t.Error(err)
	}
	if left, err := os.ReadDir(run); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
	if st, err := os.Stat(kept); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("what a link leads to: %v, %v", st, err)
	}
}

// BenchmarkStart is the time from nothing to a guest that runs, with and without a jail.
func BenchmarkStart(b *testing.B) {
	h := jailHost(b)
	for _, c := range []struct {
		name  string
		jails Jails
	}{{"plain", Jails{}}, {"jail", Jails{Jail: h, Want: true, Must: true}}} {
		b.Run(c.name, func(b *testing.B) {
			d := newDriver(b)
			d.UseJails(c.jails)
			for b.Loop() {
				b.StopTimer()
				s := newSpec(b)
				s.ID = string(vm.NewID())
				b.StartTimer()
				m, err := d.Start(b.Context(), s)
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := errors.Join(m.Kill(b.Context()), m.Close()); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// TestJailedExit lets a guest power off that a daemon adopted: its end is seen at once, its last words are understood, and whoever has
// the record is asked once more, for the maker may be gone.
func TestJailedExit(t *testing.T) {
	h := &asked{Host: jailHost(t)}
	const tries = 20
	for range tries {
		s := newSpec(t)
		s.ID, s.Cmdline = string(vm.NewID()), "poweroff"
		a, b := newDriver(t), newDriver(t)
		for _, d := range []*Driver{a, b} {
			d.UseJails(Jails{Jail: h, Want: true, Must: true})
		}
		first := start(t, a, s)
		if err := first.Signal(t.Context(), int(unix.SIGSTOP)); err != nil || !first.await(true) {
			continue // the guest was quicker
		}
		m, err := b.Adopt(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		own(t, m)
		if !m.(*machine).Jailed() {
			t.Error("not in a jail")
		}
		if err := m.Signal(t.Context(), int(unix.SIGCONT)); err != nil {
			t.Fatal(err)
		}
		began, before := time.Now(), h.n.Load()
		if got := ended(t, m); got != vmm.GuestShutdown {
			t.Errorf("exit reason %q", got)
		}
		t.Logf("its end was seen after %v", time.Since(began))
		if h.n.Load() == before {
			t.Error("nobody asked after the jail that ended")
		}
		return
	}
	t.Skipf("%d guests ended before they could be stopped", tries)
}
