// Package vmmtest owns the conformance suite of the VMM port: every promise in the comments of
// package vmm, as a test that each driver passes, the fake included.
//
// It knows no driver. What a driver's guests cannot do is skipped by name, and the names are compared
// with the golden file testdata/<driver>.skips: a case that is skipped for a new reason fails.
package vmmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// Config is a driver and what its tests can make happen. Functions that are nil skip the cases that
// need them.
type Config struct {
	// New returns a driver as a new daemon on the same host would make it.
	New func(t *testing.T) vmm.Driver
	// Spec returns a machine of its own, with a base drive, a system drive, and a guest that idles.
	// Whatever it makes, t cleans up.
	Spec func(t *testing.T) vmm.Spec
	// Processes counts the VMMs of this host with the spec's marker.
	Processes func(t *testing.T, s vmm.Spec) int
	// End ends the machine of the spec from outside, with no driver's help.
	End func(t *testing.T, s vmm.Spec)

	// Leave changes the spec before its start so that the guest ends by itself for the reason, which
	// is vmm.GuestShutdown or vmm.GuestReset.
	Leave func(t *testing.T, s *vmm.Spec, reason string)
	// Forge makes the run directory look as if this process, which is no VMM, were the machine's.
	Forge func(t *testing.T, s vmm.Spec, pid int)
	// Pause makes the VMM pause the guest by itself, as on a full host.
	Pause func(t *testing.T, s vmm.Spec, m vmm.Machine)
	// Echo says that the guest's agent sends back what it gets.
	Echo bool
	// Locks says that two machines cannot write to the same drive.
	Locks bool
	// Patience bounds the wait for one thing to happen; 0 means a minute.
	Patience time.Duration
	// Golden is where the .skips files are; "" means testdata.
	Golden string
}

// suite is one Run.
type suite struct {
	Config
	mu    sync.Mutex
	skips []string
}

// Run runs the suite as subtests of t.
func Run(t *testing.T, c Config) {
	if c.Patience == 0 {
		c.Patience = time.Minute
	}
	s := &suite{Config: c}
	for _, test := range []struct {
		name string
		f    func(*suite, *testing.T)
	}{
		{"check", (*suite).check},
		{"start", (*suite).start},
		{"start twice", (*suite).startTwice},
		{"twenty starts at once", (*suite).startAtOnce},
		{"start of an invalid spec", (*suite).startInvalid},
		{"failed start leaves nothing", (*suite).startFails},
		{"cancelled start leaves nothing", (*suite).startCancelled},
		{"start over what an earlier run left", (*suite).startStale},
		{"log is appended to", (*suite).log},
		{"long run directory", (*suite).longRunDir},
		{"adopt when nothing runs", (*suite).adoptNothing},
		{"adopt without a run directory", (*suite).adoptNowhere},
		{"adopt after the daemon is gone", (*suite).adopt},
		{"adopt cleans up after a dead machine", (*suite).adoptDead},
		{"adopt is not fooled by a recycled pid", (*suite).adoptStranger},
		{"close leaves it running", (*suite).closes},
		{"kill", (*suite).kill},
		{"kill from many sides", (*suite).killAtOnce},
		{"kill an adopted machine", (*suite).killAdopted},
		{"signal", (*suite).signal},
		{"ended from outside", (*suite).ended},
		{"guest powers off", func(s *suite, t *testing.T) { s.leaves(t, vmm.GuestShutdown) }},
		{"guest resets", func(s *suite, t *testing.T) { s.leaves(t, vmm.GuestReset) }},
		{"two machines side by side", (*suite).sideBySide},
		{"two owners, same id", (*suite).owners},
		{"drives are shared for reading", (*suite).shareReading},
		{"drives are not shared for writing", (*suite).shareWriting},
		{"pause and resume", (*suite).pause},
		{"paused machine is adopted as paused", (*suite).pauseAdopted},
		{"a drive grows", (*suite).resize},
		{"sweep ends what nobody knows", (*suite).sweep},
		{"link carries bytes", (*suite).link},
		{"link after the end", (*suite).linkGone},
		{"network interface on a socket", (*suite).nicSocket},
	} {
		t.Run(strings.ReplaceAll(test.name, " ", "-"), func(t *testing.T) { test.f(s, t) })
	}
	t.Run("skips", s.compareSkips)
}

// skip records that this driver cannot run the case, and skips it.
func (s *suite) skip(t *testing.T, why string) {
	t.Helper()
	s.mu.Lock()
	s.skips = append(s.skips, fmt.Sprintf("%s: %s", t.Name()[strings.IndexByte(t.Name(), '/')+1:], why))
	s.mu.Unlock()
	t.Skip(why)
}

func (s *suite) compareSkips(t *testing.T) {
	dir := s.Golden
	if dir == "" {
		dir = "testdata"
	}
	path := filepath.Join(dir, s.New(t).Name()+".skips")
	want, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	slices.Sort(s.skips)
	got := strings.Join(s.skips, "\n")
	if got != "" {
		got += "\n"
	}
	if got != string(want) {
		t.Errorf("skipped cases are not those of %s (was the suite run with -run?)\ngot:\n%swant:\n%s", path, got, want)
	}
}

// context of one step, bounded.
func (s *suite) context(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), s.Patience)
	t.Cleanup(cancel)
	return ctx
}

// own makes sure that the machine is gone and its handle closed when the test ends.
func (s *suite) own(t *testing.T, m vmm.Machine) vmm.Machine {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), s.Patience)
		defer cancel()
		if err := m.Kill(ctx); err != nil {
			t.Errorf("clean-up: %v", err)
		}
		if err := m.Close(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	return m
}

func (s *suite) begin(t *testing.T, d vmm.Driver, spec vmm.Spec) vmm.Machine {
	t.Helper()
	m, err := d.Start(s.context(t), spec)
	if err != nil {
		t.Fatalf("Start: %v", err)
	}
	return s.own(t, m)
}

func (s *suite) adopted(t *testing.T, d vmm.Driver, spec vmm.Spec) vmm.Machine {
	t.Helper()
	m, err := d.Adopt(s.context(t), spec)
	if err != nil {
		t.Fatalf("Adopt: %v", err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func (s *suite) wantDone(t *testing.T, m vmm.Machine, reasons ...string) {
	t.Helper()
	select {
	case <-m.Done():
	case <-time.After(s.Patience):
		t.Fatalf("the machine is not done after %v", s.Patience)
	}
	e := m.Exit()
	if !slices.Contains(reasons, e.Reason) {
		t.Errorf("exit reason %q, want one of %q", e.Reason, reasons)
	}
	if age := time.Since(e.At); age < 0 || age > 2*s.Patience {
		t.Errorf("exit at %v, which is not now", e.At)
	}
}

func (s *suite) wantRunning(t *testing.T, m vmm.Machine) {
	t.Helper()
	select {
	case <-m.Done():
		t.Fatalf("the machine ended: %+v", m.Exit())
	default:
	}
	if state, err := m.State(s.context(t)); err != nil || state != vmm.Running {
		t.Errorf("State: %v, %v; want running", state, err)
	}
}

func (s *suite) wantProcesses(t *testing.T, spec vmm.Spec, want int) {
	t.Helper()
	if got := s.Processes(t, spec); got != want {
		t.Errorf("%d VMMs run with the marker %s, want %d", got, spec.Marker(), want)
	}
}

// wantNothing checks that neither a process nor a file of a machine is left.
func (s *suite) wantNothing(t *testing.T, spec vmm.Spec) {
	t.Helper()
	s.wantProcesses(t, spec, 0)
	if left := names(t, spec.RunDir); len(left) != 0 {
		t.Errorf("the run directory holds %q, want nothing", left)
	}
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func wantCode(t *testing.T, what string, err error, codes ...fault.Code) {
	t.Helper()
	if err == nil || !slices.Contains(codes, fault.CodeOf(err)) {
		t.Errorf("%s: %v (%s), want %v", what, err, fault.CodeOf(err), codes)
	}
}

func (s *suite) check(t *testing.T) {
	d := s.New(t)
	for range 2 {
		if err := d.Check(s.context(t)); err != nil {
			t.Errorf("Check: %v", err)
		}
	}
	if d.Name() == "" || d.Features().Accel != "kvm" && d.Features().Accel != "tcg" {
		t.Errorf("name %q, features %+v", d.Name(), d.Features())
	}
}

func (s *suite) start(t *testing.T) {
	spec := s.Spec(t)
	m := s.begin(t, s.New(t), spec)
	s.wantRunning(t, m)
	s.wantProcesses(t, spec, 1)
	if m.PID() <= 0 {
		t.Errorf("pid %d", m.PID())
	}
	if st, err := os.Stat(spec.Log); err != nil || st.Mode().Perm()&0o077 != 0 {
		t.Errorf("log: %v, %v; want a file that is its owner's alone", st, err)
	}
}

func (s *suite) startTwice(t *testing.T) {
	spec, d := s.Spec(t), s.New(t)
	a := s.begin(t, d, spec)
	b := s.begin(t, d, spec)
	c := s.begin(t, s.New(t), spec)
	s.wantProcesses(t, spec, 1)
	for _, m := range []vmm.Machine{a, b, c} {
		s.wantRunning(t, m)
		if m.PID() != a.PID() {
			t.Errorf("pid %d, want %d", m.PID(), a.PID())
		}
	}
	if err := b.Kill(s.context(t)); err != nil {
		t.Fatal(err)
	}
	for _, m := range []vmm.Machine{a, b, c} {
		s.wantDone(t, m, vmm.Killed, vmm.Crashed)
	}
	s.wantNothing(t, spec)
}

func (s *suite) startAtOnce(t *testing.T) {
	spec := s.Spec(t)
	d := s.New(t)
	got := make([]vmm.Machine, 20)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() {
			m, err := d.Start(s.context(t), spec)
			if err != nil {
				t.Errorf("Start: %v", err)
				return
			}
			got[i] = s.own(t, m)
		})
	}
	wg.Wait()
	s.wantProcesses(t, spec, 1)
	for _, m := range got {
		if m != nil && m.PID() != got[0].PID() {
			t.Errorf("pid %d, want %d", m.PID(), got[0].PID())
		}
	}
}

func (s *suite) startInvalid(t *testing.T) {
	spec := s.Spec(t)
	spec.VCPU = 0
	_, err := s.New(t).Start(s.context(t), spec)
	wantCode(t, "Start", err, fault.Invalid)
	s.wantNothing(t, spec)
}

func (s *suite) startFails(t *testing.T) {
	spec := s.Spec(t)
	hidden := spec.Kernel + ".hidden"
	if err := os.Rename(spec.Kernel, hidden); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(spec.Log, []byte("a line of an earlier run\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := s.New(t).Start(s.context(t), spec)
	wantCode(t, "Start without a kernel", err, fault.Unavailable)
	if err != nil && (!strings.Contains(err.Error(), spec.Kernel) || strings.Contains(err.Error(), "earlier run")) {
		t.Errorf("the error neither names the kernel nor leaves out earlier runs: %v", err)
	}
	s.wantNothing(t, spec)

	if err := os.Rename(hidden, spec.Kernel); err != nil {
		t.Fatal(err)
	}
	s.wantRunning(t, s.begin(t, s.New(t), spec))
}

func (s *suite) startCancelled(t *testing.T) {
	spec := s.Spec(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := s.New(t).Start(ctx, spec)
	wantCode(t, "Start", err, fault.Cancelled)
	s.wantNothing(t, spec)

	// A machine's life is not tied to the context of its start.
	ctx, cancel = context.WithCancel(context.Background())
	m, err := s.New(t).Start(ctx, spec)
	cancel()
	if err != nil {
		t.Fatal(err)
	}
	s.wantRunning(t, s.own(t, m))
}

// leftBehind is the names of a running machine's files in its run directory.
func (s *suite) leftBehind(t *testing.T) []string {
	spec := s.Spec(t)
	m := s.begin(t, s.New(t), spec)
	left := names(t, spec.RunDir)
	if len(left) == 0 {
		t.Fatal("a running machine has no file in its run directory")
	}
	if err := m.Kill(s.context(t)); err != nil {
		t.Fatal(err)
	}
	return left
}

func (s *suite) startStale(t *testing.T) {
	spec := s.Spec(t)
	for _, name := range s.leftBehind(t) {
		if err := os.WriteFile(filepath.Join(spec.RunDir, name), []byte("stale"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.wantRunning(t, s.begin(t, s.New(t), spec))
}

func (s *suite) log(t *testing.T) {
	spec := s.Spec(t)
	before := []byte("a line of an earlier run\n")
	if err := os.WriteFile(spec.Log, before, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.begin(t, s.New(t), spec).Kill(s.context(t)); err != nil {
			t.Fatal(err)
		}
		after, err := os.ReadFile(spec.Log)
		if err != nil || !bytes.HasPrefix(after, before) {
			t.Errorf("log %q, %v; want it to start with %q", after, err, before)
		}
		before = after
	}
}

func (s *suite) longRunDir(t *testing.T) {
	spec := s.Spec(t)
	spec.RunDir = filepath.Join(t.TempDir(), strings.Repeat("a long, winding name/", 8), "run")
	if err := os.MkdirAll(spec.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	m := s.begin(t, s.New(t), spec)
	s.wantRunning(t, m)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	b := s.own(t, s.adopted(t, s.New(t), spec))
	s.wantRunning(t, b)
	if err := b.Kill(s.context(t)); err != nil {
		t.Fatal(err)
	}
	s.wantNothing(t, spec)
}

func (s *suite) adoptNothing(t *testing.T) {
	spec := s.Spec(t)
	_, err := s.New(t).Adopt(s.context(t), spec)
	wantCode(t, "Adopt", err, fault.NotFound)
	s.wantNothing(t, spec)
}

func (s *suite) adoptNowhere(t *testing.T) {
	spec := s.Spec(t)
	if err := os.RemoveAll(spec.RunDir); err != nil {
		t.Fatal(err)
	}
	_, err := s.New(t).Adopt(s.context(t), spec)
	wantCode(t, "Adopt", err, fault.NotFound)
}

func (s *suite) adopt(t *testing.T) {
	spec := s.Spec(t)
	a := s.begin(t, s.New(t), spec) // its driver and it are dropped, not closed
	b := s.adopted(t, s.New(t), spec)
	s.wantRunning(t, b)
	if b.PID() != a.PID() {
		t.Errorf("adopted %d, started %d", b.PID(), a.PID())
	}
	if err := b.Signal(s.context(t), 15); err != nil {
		t.Fatal(err)
	}
	s.wantDone(t, b, vmm.Killed)
	s.wantDone(t, a, vmm.Killed)
	s.wantNothing(t, spec)
}

func (s *suite) adoptDead(t *testing.T) {
	spec := s.Spec(t)
	m := s.begin(t, s.New(t), spec)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	s.End(t, spec)
	if len(names(t, spec.RunDir)) == 0 {
		t.Fatal("nothing was left behind, so the case proves nothing")
	}
	_, err := s.New(t).Adopt(s.context(t), spec)
	wantCode(t, "Adopt", err, fault.NotFound)
	s.wantNothing(t, spec)
}

func (s *suite) adoptStranger(t *testing.T) {
	if s.Forge == nil {
		s.skip(t, "its machines are not known by a pid")
	}
	stranger := exec.Command("sleep", "600")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { stranger.Wait(); close(ended) }()
	defer func() { stranger.Process.Kill(); <-ended }()

	spec := s.Spec(t)
	s.Forge(t, spec, stranger.Process.Pid)
	_, err := s.New(t).Adopt(s.context(t), spec)
	wantCode(t, "Adopt", err, fault.NotFound)
	s.wantNothing(t, spec)

	s.Forge(t, spec, stranger.Process.Pid)
	m := s.begin(t, s.New(t), spec)
	if m.PID() == stranger.Process.Pid {
		t.Fatal("the stranger was adopted")
	}
	if err := m.Kill(s.context(t)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
		t.Error("the stranger was ended")
	default:
	}
}

func (s *suite) closes(t *testing.T) {
	spec := s.Spec(t)
	a := s.begin(t, s.New(t), spec)
	for range 2 {
		if err := a.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
	s.wantProcesses(t, spec, 1)
	if r, ok := a.(vmm.Reporter); ok {
		select {
		case c, open := <-r.Changes():
			if open {
				t.Errorf("change %+v after Close", c)
			}
		case <-time.After(s.Patience):
			t.Error("Changes is open after Close")
		}
	}
	b := s.own(t, s.adopted(t, s.New(t), spec))
	s.wantRunning(t, b)
}

func (s *suite) kill(t *testing.T) {
	spec := s.Spec(t)
	m := s.begin(t, s.New(t), spec)
	for range 2 {
		if err := m.Kill(s.context(t)); err != nil {
			t.Fatalf("Kill: %v", err)
		}
		select {
		case <-m.Done():
		default:
			t.Fatal("Kill returned before Done")
		}
	}
	s.wantDone(t, m, vmm.Killed)
	s.wantNothing(t, spec)
	_, err := m.State(s.context(t))
	wantCode(t, "State", err, fault.Unavailable)
	wantCode(t, "Signal", m.Signal(s.context(t), 15), fault.Precondition)
	wantCode(t, "Resume", m.Resume(s.context(t)), fault.Unavailable)
	if err := m.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	s.wantRunning(t, s.begin(t, s.New(t), spec)) // at once, in the same directory
}

func (s *suite) killAtOnce(t *testing.T) {
	spec := s.Spec(t)
	a := s.begin(t, s.New(t), spec)
	b := s.adopted(t, s.New(t), spec)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if err := []vmm.Machine{a, b}[i%2].Kill(s.context(t)); err != nil {
				t.Errorf("Kill: %v", err)
			}
		})
	}
	wg.Wait()
	s.wantNothing(t, spec)
}

func (s *suite) killAdopted(t *testing.T) {
	spec := s.Spec(t)
	if err := s.begin(t, s.New(t), spec).Close(); err != nil {
		t.Fatal(err)
	}
	m := s.adopted(t, s.New(t), spec)
	if err := m.Kill(s.context(t)); err != nil {
		t.Fatal(err)
	}
	s.wantDone(t, m, vmm.Killed)
	s.wantNothing(t, spec)
}

func (s *suite) signal(t *testing.T) {
	spec := s.Spec(t)
	m := s.begin(t, s.New(t), spec)
	if err := m.Signal(s.context(t), 0); err != nil {
		t.Errorf("Signal(0): %v", err)
	}
	wantCode(t, "Signal(4711)", m.Signal(s.context(t), 4711), fault.Invalid)
	s.wantRunning(t, m)
	if err := m.Signal(s.context(t), 15); err != nil {
		t.Fatal(err)
	}
	s.wantDone(t, m, vmm.Killed)
	s.wantNothing(t, spec)
}

func (s *suite) ended(t *testing.T) {
	spec := s.Spec(t)
	m := s.begin(t, s.New(t), spec)
	s.End(t, spec)
	s.wantDone(t, m, vmm.Killed, vmm.Crashed)
	s.wantNothing(t, spec)
}

func (s *suite) leaves(t *testing.T, reason string) {
	if s.Leave == nil {
		s.skip(t, "its guests cannot end by themselves")
	}
	spec := s.Spec(t)
	s.Leave(t, &spec, reason)
	m := s.begin(t, s.New(t), spec)
	s.wantDone(t, m, reason)
	s.wantNothing(t, spec)
}

func (s *suite) sideBySide(t *testing.T) {
	d := s.New(t)
	first, second := s.Spec(t), s.Spec(t)
	a, b := s.begin(t, d, first), s.begin(t, d, second)
	if a.PID() == b.PID() {
		t.Fatalf("both have the pid %d", a.PID())
	}
	if err := a.Kill(s.context(t)); err != nil {
		t.Fatal(err)
	}
	s.wantNothing(t, first)
	s.wantRunning(t, b)
	s.wantProcesses(t, second, 1)
}

func (s *suite) owners(t *testing.T) {
	first, second := s.Spec(t), s.Spec(t)
	second.ID = first.ID
	second.Owner = first.Owner + "-other"
	a := s.begin(t, s.New(t), first)
	_, err := s.New(t).Adopt(s.context(t), second)
	wantCode(t, "Adopt by another owner", err, fault.NotFound)
	b := s.begin(t, s.New(t), second)
	if err := b.Kill(s.context(t)); err != nil {
		t.Fatal(err)
	}
	s.wantRunning(t, a)
	s.wantProcesses(t, first, 1)
	s.wantProcesses(t, second, 0)
}

// sweep leaves alone what is known, what another owner has whose name begins alike, and what a copy of
// the installation has in another directory.
func (s *suite) sweep(t *testing.T) {
	sw, ok := s.New(t).(vmm.Sweeper)
	if !ok {
		s.skip(t, "it is no Sweeper")
	}
	lost, known, alike := s.Spec(t), s.Spec(t), s.Spec(t)
	known.Owner, alike.Owner = lost.Owner, lost.Owner+"-other"
	a, b, c := s.begin(t, s.New(t), lost), s.begin(t, s.New(t), known), s.begin(t, s.New(t), alike)
	isKnown := func(id string) bool { return id == known.ID }
	for _, under := range []string{t.TempDir(), lost.RunDir[:len(lost.RunDir)-1]} { // neither is above it
		if ended, err := sw.Sweep(s.context(t), lost.Owner, under, isKnown); err != nil || len(ended) != 0 {
			t.Errorf("sweeping %s ended %q, %v", under, ended, err)
		}
	}
	s.wantRunning(t, a)
	ended, err := sw.Sweep(s.context(t), lost.Owner, filepath.Dir(lost.RunDir), isKnown)
	if err != nil || !slices.Equal(ended, []string{lost.ID}) {
		t.Errorf("ended %q, %v", ended, err)
	}
	select {
	case <-a.Done():
	case <-s.context(t).Done():
		t.Error("the machine runs on")
	}
	s.wantProcesses(t, lost, 0)
	s.wantRunning(t, b)
	s.wantRunning(t, c)
}

func (s *suite) shareReading(t *testing.T) {
	first, second := s.Spec(t), s.Spec(t)
	shared := slices.IndexFunc(first.Drives, func(d vmm.Drive) bool { return d.ReadOnly })
	second.Drives[shared].Path = first.Drives[shared].Path
	if err := os.Chmod(first.Drives[shared].Path, 0o400); err != nil {
		t.Fatal(err)
	}
	a, b := s.begin(t, s.New(t), first), s.begin(t, s.New(t), second)
	s.wantRunning(t, a)
	s.wantRunning(t, b)
}

func (s *suite) shareWriting(t *testing.T) {
	if !s.Locks {
		s.skip(t, "it does not lock its drives")
	}
	first, second := s.Spec(t), s.Spec(t)
	shared := slices.IndexFunc(first.Drives, func(d vmm.Drive) bool { return !d.ReadOnly })
	second.Drives[shared].Path = first.Drives[shared].Path
	a := s.begin(t, s.New(t), first)
	_, err := s.New(t).Start(s.context(t), second)
	wantCode(t, "Start with a drive that another machine writes to", err, fault.Busy)
	s.wantNothing(t, second)
	s.wantRunning(t, a)
}

// paused starts a machine and makes its VMM pause it.
func (s *suite) paused(t *testing.T) (vmm.Spec, vmm.Machine) {
	if s.Pause == nil {
		s.skip(t, "it is not made to pause here")
	}
	spec := s.Spec(t)
	m := s.begin(t, s.New(t), spec)
	s.Pause(t, spec, m)
	s.wantPaused(t, m)
	return spec, m
}

func (s *suite) wantPaused(t *testing.T, m vmm.Machine) {
	t.Helper()
	if r, ok := m.(vmm.Reporter); ok {
		select {
		case c, open := <-r.Changes():
			if !open || c.State != vmm.Paused || c.Reason == "" {
				t.Errorf("change %+v, %v; want paused with a reason", c, open)
			}
		case <-time.After(s.Patience):
			t.Fatalf("no change was reported in %v", s.Patience)
		}
	}
	if state, err := m.State(s.context(t)); err != nil || state != vmm.Paused {
		t.Errorf("State: %v, %v; want paused", state, err)
	}
}

func (s *suite) pause(t *testing.T) {
	_, m := s.paused(t)
	for range 2 {
		if err := m.Resume(s.context(t)); err != nil {
			t.Fatal(err)
		}
	}
	s.wantRunning(t, m)
	if r, ok := m.(vmm.Reporter); ok {
		select {
		case c := <-r.Changes():
			if c.State != vmm.Running {
				t.Errorf("change %+v, want running", c)
			}
		case <-time.After(s.Patience):
			t.Fatalf("no change was reported in %v", s.Patience)
		}
	}
}

func (s *suite) pauseAdopted(t *testing.T) {
	spec, a := s.paused(t)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	b := s.own(t, s.adopted(t, s.New(t), spec))
	s.wantPaused(t, b)
	if err := b.Resume(s.context(t)); err != nil {
		t.Fatal(err)
	}
	s.wantRunning(t, b)
}

// resize enlarges a drive's file and tells the machine, also one that was adopted by its identity alone.
func (s *suite) resize(t *testing.T) {
	spec := s.Spec(t)
	a := s.begin(t, s.New(t), spec)
	if _, ok := a.(vmm.Resizer); !ok {
		s.skip(t, "it tells nobody of a new size")
	}
	at := slices.IndexFunc(spec.Drives, func(d vmm.Drive) bool { return d.Role == vmm.RoleSystem })
	drive := spec.Drives[at]
	fi, err := os.Stat(drive.Path)
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range []vmm.Machine{a, nil} {
		if m == nil {
			if err := a.Close(); err != nil {
				t.Fatal(err)
			}
			identity := spec
			identity.Drives = nil
			m = s.own(t, s.adopted(t, s.New(t), identity))
		}
		size := fi.Size() + int64(i+1)<<20
		if err := os.Truncate(drive.Path, size); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := m.(vmm.Resizer).Resize(s.context(t), drive, size); err != nil {
				t.Error(err)
			}
		}
		if after, err := os.Stat(drive.Path); err != nil || after.Size() != size {
			t.Errorf("the file has %v bytes afterwards, want %d: %v", after.Size(), size, err)
		}
		wantCode(t, "Resize of a drive that it has not", m.(vmm.Resizer).Resize(s.context(t), vmm.Drive{Role: vmm.RoleWork, Path: drive.Path}, size), fault.Precondition)
		s.wantRunning(t, m)
		if i == 1 {
			if err := m.Kill(s.context(t)); err != nil {
				t.Fatal(err)
			}
			wantCode(t, "Resize of a machine that is gone", m.(vmm.Resizer).Resize(s.context(t), drive, size), fault.Unavailable)
		}
	}
}

func (s *suite) link(t *testing.T) {
	if !s.Echo {
		s.skip(t, "its guest has no agent")
	}
	spec := s.Spec(t)
	a := s.begin(t, s.New(t), spec)
	if up := a.Link().Up; up != nil {
		select {
		case <-up:
		case <-time.After(s.Patience):
			t.Error("the guest's word that it listens did not come")
		}
	}
	s.echo(t, a)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	s.echo(t, s.own(t, s.adopted(t, s.New(t), spec)))
}

// dial repeats: a guest that is still booting refuses on a vsock.
func (s *suite) dial(t *testing.T, m vmm.Machine) net.Conn {
	t.Helper()
	ctx := s.context(t)
	for {
		conn, err := m.Link().Dial(ctx)
		if err == nil {
			return conn
		}
		if fault.CodeOf(err) != fault.Unavailable {
			t.Fatal(err)
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-m.Done():
			t.Fatalf("the machine ended (%s): %v", m.Exit().Reason, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// echo sends a block there and back. On a Mux link stale bytes may come first.
func (s *suite) echo(t *testing.T, m vmm.Machine) {
	t.Helper()
	conn := s.dial(t, m)
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(s.Patience)); err != nil {
		t.Fatal(err)
	}
	sent := fmt.Appendf(nil, "<%d %s>", time.Now().UnixNano(), bytes.Repeat([]byte("x"), 100_000))
	go conn.Write(sent)
	var got []byte
	buf := make([]byte, 32<<10)
	for !bytes.HasSuffix(got, sent) {
		n, err := conn.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil {
			t.Fatalf("after %d of %d bytes: %v", len(got), len(sent), err)
		}
		if !m.Link().Mux && !bytes.HasPrefix(sent, got) {
			t.Fatalf("other bytes came back than were sent, among %d", len(got))
		}
	}
}

func (s *suite) linkGone(t *testing.T) {
	m := s.begin(t, s.New(t), s.Spec(t))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if c, err := m.Link().Dial(ctx); err == nil {
		c.Close()
		t.Error("Dial with a context that has ended succeeds")
	}
	var open io.ReadCloser
	if s.Echo {
		c := s.dial(t, m)
		c.SetDeadline(time.Now().Add(s.Patience))
		open = c
	}
	if err := m.Kill(s.context(t)); err != nil {
		t.Fatal(err)
	}
	if open != nil { // a connection ends with its machine
		if _, err := io.Copy(io.Discard, open); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("a connection outlives its machine")
		}
		open.Close()
	}
	_, err := m.Link().Dial(s.context(t))
	wantCode(t, "Dial after the end", err, fault.Unavailable)
}

// nicSocket wants a machine to connect its network interface to a socket before it is started, or to run and leave that to its
// guest.
func (s *suite) nicSocket(t *testing.T) {
	d, spec := s.New(t), s.Spec(t)
	path := filepath.Join(spec.RunDir, "net.sock")
	dir, err := rundir.Open(spec.RunDir) // its own path may be too long for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir.Path("net.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	spec.NICs = []vmm.NIC{{MAC: "02:00:00:00:00:01", MTU: 1420, Socket: path}}
	m := s.begin(t, d, spec)
	if d.Features().NICVsock {
		s.wantRunning(t, m)
		return
	}
	if err := l.SetDeadline(time.Now().Add(s.Patience)); err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatalf("the machine did not connect: %v", err)
	}
	defer conn.Close()
	s.wantRunning(t, m)
}
