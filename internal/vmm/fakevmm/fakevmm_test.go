package fakevmm_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 10 * time.Second

func newWorld(t *testing.T) *fakevmm.World {
	t.Helper()
	w, err := fakevmm.Open(filepath.Join(t.TempDir(), "world"))
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func newSpec(t *testing.T, id string) vmm.Spec {
	t.Helper()
	dir := t.TempDir()
	s := vmm.Spec{
		ID: id, Owner: "test", Name: "vm-" + id, RunDir: filepath.Join(dir, "run"), Log: filepath.Join(dir, "log"),
		Kernel: filepath.Join(dir, "vmlinux"), Initrd: filepath.Join(dir, "initrd.img"), VCPU: 1, MemoryMiB: 64,
	}
	if err := os.Mkdir(s.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{s.Kernel, s.Initrd} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func start(t *testing.T, d *fakevmm.Driver, s vmm.Spec) vmm.Machine {
	t.Helper()
	m, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func wait(t *testing.T, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("%s: nothing after %v", what, patience)
	}
}

// TestEndFromOutside ends machines as another process would, and compares what the daemon sees.
func TestEndFromOutside(t *testing.T) {
	w := newWorld(t)
	d := fakevmm.New(w, nil)
	s := newSpec(t, "a")
	m := start(t, d, s)
	if err := w.End(s.Name, vmm.GuestReset); err != nil {
		t.Fatal(err)
	}
	wait(t, m.Done(), "end with a reason")
	if got := m.Exit().Reason; got != vmm.GuestReset {
		t.Errorf("exit reason %q, want %q", got, vmm.GuestReset)
	}

	m = start(t, d, s)
	if err := os.Remove(filepath.Join(w.Dir(), "machines", s.Marker()+".json")); err != nil {
		t.Fatal(err)
	}
	wait(t, m.Done(), "record removed")
	if got := m.Exit().Reason; got != vmm.Crashed {
		t.Errorf("exit reason %q, want %q", got, vmm.Crashed)
	}
	if err := w.End(s.Name, vmm.Killed); !fault.Is(err, fault.NotFound) {
		t.Errorf("End of a machine that is gone: %v, want not_found", err)
	}
}

// TestFaults scripts each fault of the package comment and looks at what the daemon would see.
func TestFaults(t *testing.T) {
	served := func(_ context.Context, _ *fakevmm.Guest, c net.Conn) { io.WriteString(c, "here") }
	for _, c := range []struct {
		name, faults string
		check        func(t *testing.T, w *fakevmm.World, d *fakevmm.Driver, s vmm.Spec)
	}{
		{"refuse", "vm-a refuse no such luck", func(t *testing.T, w *fakevmm.World, d *fakevmm.Driver, s vmm.Spec) {
			if _, err := d.Start(t.Context(), s); !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "no such luck") {
				t.Errorf("Start: %v, want unavailable with the scripted text", err)
			}
			empty(t, w, s)
		}},
		{"by id, another VM's", "b refuse\nvm-b refuse", func(t *testing.T, w *fakevmm.World, d *fakevmm.Driver, s vmm.Spec) {
			start(t, d, s)
		}},
		{"hold", "# a comment\n\n* hold", func(t *testing.T, w *fakevmm.World, d *fakevmm.Driver, s vmm.Spec) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if _, err := d.Start(ctx, s); fault.CodeOf(err) != fault.Timeout {
				t.Errorf("Start under hold: %v, want a timeout", err)
			}
			empty(t, w, s)
			got := make(chan error, 1)
			go func() { _, err := d.Start(t.Context(), s); got <- err }()
			if err := w.SetFaults(""); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-got:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(patience):
				t.Fatal("Start did not notice that the hold was lifted")
			}
			start(t, d, s).Kill(t.Context())
		}},
		{"die", "a die", func(t *testing.T, w *fakevmm.World, d *fakevmm.Driver, s vmm.Spec) {
			m := start(t, d, s)
			wait(t, m.Done(), "die")
			if got := m.Exit().Reason; got != vmm.Crashed {
				t.Errorf("exit reason %q", got)
			}
			empty(t, w, s)
		}},
		{"mute", "a mute", func(t *testing.T, w *fakevmm.World, d *fakevmm.Driver, s vmm.Spec) {
			m := start(t, d, s)
			c, err := m.Link().Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			if n, err := c.Read(make([]byte, 8)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("Read of a mute guest: %d bytes, %v; want a timeout", n, err)
			}
			if err := w.SetFaults(""); err != nil {
				t.Fatal(err)
			}
			c.SetReadDeadline(time.Now().Add(patience))
			if b, err := io.ReadAll(c); err != nil || string(b) != "here" {
				t.Errorf("after the fault was lifted: %q, %v", b, err)
			}
		}},
		{"pause", "a pause", func(t *testing.T, w *fakevmm.World, d *fakevmm.Driver, s vmm.Spec) {
			m := start(t, d, s)
			select {
			case c := <-m.(vmm.Reporter).Changes():
				if c.State != vmm.Paused || c.Reason != "io-error" {
					t.Errorf("change %+v", c)
				}
			case <-time.After(patience):
				t.Fatal("no change was reported")
			}
			for _, step := range []struct {
				faults string
				want   vmm.State
			}{{"a pause", vmm.Paused}, {"", vmm.Running}} {
				if err := w.SetFaults(step.faults); err != nil {
					t.Fatal(err)
				}
				if err := m.Resume(t.Context()); err != nil {
					t.Fatal(err)
				}
				if got, err := m.State(t.Context()); err != nil || got != step.want {
					t.Errorf("with faults %q after Resume: %v, %v; want %v", step.faults, got, err, step.want)
				}
			}
		}},
		{"console", "a console banger: fatal: root: no disk", func(t *testing.T, w *fakevmm.World, d *fakevmm.Driver, s vmm.Spec) {
			start(t, d, s)
			if b, err := os.ReadFile(s.Log); err != nil || !strings.Contains(string(b), "\nbanger: fatal: root: no disk\n") {
				t.Errorf("log %q, %v", b, err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			if err := w.SetFaults(c.faults); err != nil {
				t.Fatal(err)
			}
			c.check(t, w, fakevmm.New(w, served), newSpec(t, "a"))
		})
	}
}

// TestDeafGuest asks a guest to power off twice: while it is deaf, and when it is not any more.
func TestDeafGuest(t *testing.T) {
	w := newWorld(t)
	d := fakevmm.New(w, func(_ context.Context, g *fakevmm.Guest, c net.Conn) {
		if err := g.PowerOff(); err != nil {
			t.Error(err)
		}
		io.WriteString(c, "asked")
	})
	m := start(t, d, newSpec(t, "a"))
	ask := func() {
		t.Helper()
		c, err := m.Link().Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.ReadAll(c) // the connection ends when the agent has returned
	}
	if err := w.SetFaults("a deaf"); err != nil {
		t.Fatal(err)
	}
	ask()
	if got, err := m.State(t.Context()); err != nil || got != vmm.Running {
		t.Fatalf("a deaf guest is %v, %v after the power-off", got, err)
	}
	if err := w.SetFaults(""); err != nil {
		t.Fatal(err)
	}
	ask()
	wait(t, m.Done(), "power-off")
	if got := m.Exit().Reason; got != vmm.GuestShutdown {
		t.Errorf("exit reason %q", got)
	}
}

// TestConcurrentStarts lets 20 drivers start the same machine at once: one start, 20 handles of it.
func TestConcurrentStarts(t *testing.T) {
	w := newWorld(t)
	s := newSpec(t, "a")
	var wg sync.WaitGroup
	pids := make([]int, 20)
	for i := range pids {
		wg.Go(func() {
			m, err := fakevmm.New(w, nil).Start(context.Background(), s)
			if err != nil {
				t.Error(err)
				return
			}
			pids[i] = m.PID()
			m.Close()
		})
	}
	wg.Wait()
	for _, pid := range pids {
		if pid != pids[0] || pid <= 4<<20 {
			t.Fatalf("pids %v: want one, and above any of the kernel's", pids)
		}
	}
	journal, err := w.Journal()
	if err != nil || len(journal) != 1 || journal[0] != "start banger-test-a vm-a" {
		t.Errorf("journal %q, %v", journal, err)
	}
}

// BenchmarkStart is what one machine costs with a thousand others in the same world.
func BenchmarkStart(b *testing.B) {
	w, err := fakevmm.Open(filepath.Join(b.TempDir(), "world"))
	if err != nil {
		b.Fatal(err)
	}
	d := fakevmm.New(w, nil)
	dir := b.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		b.Fatal(err)
	}
	begin := func(i int) vmm.Machine {
		m, err := d.Start(b.Context(), vmm.Spec{ID: fmt.Sprint(i), Owner: "bench", Name: "x", RunDir: dir, Log: file, Kernel: file, Initrd: file, VCPU: 1, MemoryMiB: 1})
		if err != nil {
			b.Fatal(err)
		}
		return m
	}
	for i := range 1000 {
		defer begin(i).Close()
	}
	for b.Loop() {
		m := begin(1000)
		if err := m.Kill(b.Context()); err != nil {
			b.Fatal(err)
		}
		m.Close()
	}
}

// empty checks that neither a machine nor a file of it was left.
func empty(t *testing.T, w *fakevmm.World, s vmm.Spec) {
	t.Helper()
	if all, err := w.Machines(); err != nil || len(all) != 0 {
		t.Errorf("machines %v, %v; want none", all, err)
	}
	if left, err := os.ReadDir(s.RunDir); err != nil || len(left) != 0 {
		t.Errorf("run directory holds %v, %v; want nothing", left, err)
	}
}
