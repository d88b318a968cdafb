package qemu

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// program puts a shell script in QEMU's place, first in PATH.
func program(t *testing.T, script string) (path string) {
	t.Helper()
	dir := t.TempDir()
	path = filepath.Join(dir, "qemu-system-x86_64")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return path
}

// TestCheck gives the driver good and bad programs, and counts how often it runs them.
func TestCheck(t *testing.T) {
	runs := filepath.Join(t.TempDir(), "runs")
	say := func(version string) string { return fmt.Sprintf("echo x >>%s; echo '%s'", runs, version) }
	path := program(t, say("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"))
	d := New(false)
	for range 3 {
		if err := d.Check(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(runs); err != nil || string(b) != "x\n" {
		t.Errorf("the program ran %d times, %v; want once", len(b)/2, err)
	}
	// The program is upgraded, or in this case not.
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+say("QEMU emulator version 5.2.0")+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.Check(t.Context()); !fault.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "5.2") || fault.HintOf(err) == "" {
			t.Errorf("version 5.2: %v, want unsupported with a hint", err)
		}
	}
	if b, err := os.ReadFile(runs); err != nil || string(b) != "x\nx\n" {
		t.Errorf("the programs ran %d times, %v; want twice", len(b)/2, err)
	}

	program(t, "exit 127")
	if err := New(false).Check(t.Context()); !fault.Is(err, fault.Unavailable) || fault.HintOf(err) == "" {
		t.Errorf("a program that does not run: %v", err)
	}
	program(t, "echo hello")
	if err := New(false).Check(t.Context()); !fault.Is(err, fault.Unsupported) {
		t.Errorf("a program that is not QEMU: %v", err)
	}
}

// TestVersions holds what is done for a version against the first that does without.
func TestVersions(t *testing.T) {
	for output, want := range map[string]bool{
		"QEMU emulator version 7.2.22 (Debian 1:7.2)": false,
		"QEMU emulator version 8.0.4":                 false,
		"QEMU emulator version 8.1.0":                 true,
		"QEMU emulator version 10.0.2":                true,
	} {
		v, err := judge("qemu", output)
		if err != nil || v.atLeast(parallel) != want {
			t.Errorf("%s: %+v, %v; parallel should be %v", output, v, err, want)
		}
	}
}

// TestNoProgram looks for QEMU where there is none.
func TestNoProgram(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, err := os.Stat("/usr/libexec/qemu-kvm"); err == nil {
		t.Fatal("this host has a QEMU outside of PATH: the test cannot hide it")
	}
	s := newSpec(t)
	_, err := New(false).Start(t.Context(), s)
	for what, err := range map[string]error{"Check": New(false).Check(t.Context()), "Start": err} {
		if !fault.Is(err, fault.Unavailable) || fault.HintOf(err) != "sudo apt install qemu-system-x86" {
			t.Errorf("%s: %v, hint %q", what, err, fault.HintOf(err))
		}
	}
	wantNothing(t, s)
}

func wantNothing(t *testing.T, s vmm.Spec) {
	t.Helper()
	if pids := processes(t, s); len(pids) != 0 {
		t.Errorf("processes %v are left", pids)
	}
	if left, err := os.ReadDir(s.RunDir); err != nil || len(left) != 0 {
		t.Errorf("the run directory holds %v, %v", left, err)
	}
}

// TestStartFails puts programs in QEMU's place that go wrong in ways a real one is hard to bring to,
// and compares the faults. None may leave a process or a file.
func TestStartFails(t *testing.T) {
	for _, c := range []struct {
		name, script string
		bound        time.Duration
		code         fault.Code
		want         string
	}{
		{"ends", "echo 'qemu: what went wrong' >&2; exit 3", patience, fault.Unavailable, "ended with status 3 before the machine was ready: qemu: what went wrong"},
		{"ends silently", "exit 1", patience, fault.Unavailable, "and said nothing"},
		{"crashes", "kill -SEGV $$", patience, fault.Unavailable, "signal 11"},
		{"hangs", "exec sleep 600 # $@", 200 * time.Millisecond, fault.Timeout, "its monitor had not answered"},
		{"closes its monitor", "exec 3<&- 4<&-; exec sleep 600", patience, fault.Unavailable, "monitor fails"},
		{"vsock collision", "echo 'qemu-system-x86_64: -device vhost-vsock-pci,guest-cid=42: vhost-vsock: unable to set guest cid: Address already in use' >&2; exit 1",
			patience, fault.Busy, "vsock context id 4711"},
		{"no memory", "echo 'qemu-system-x86_64: cannot set up guest memory: Cannot allocate memory' >&2; exit 1", patience, fault.Exhausted, "32 MiB"},
	} {
		t.Run(c.name, func(t *testing.T) {
			program(t, `[ "$1" = --version ] && { echo 'QEMU emulator version 7.2.22'; exit 0; }; `+c.script)
			s := newSpec(t)
			ctx, cancel := context.WithTimeout(t.Context(), c.bound)
			defer cancel()
			begin := time.Now()
			m, err := New(false).Start(ctx, s)
			if err == nil {
				m.Kill(ctx)
				t.Fatal("it started")
			}
			if fault.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v (%s); want %q (%s)", err, fault.CodeOf(err), c.want, c.code)
			}
			if took := time.Since(begin); took > c.bound+5*time.Second {
				t.Errorf("it took %v", took)
			}
			wantNothing(t, s)
		})
	}
}

// TestBusyMonitor adopts a machine whose monitor another program holds, as a second daemon with the
// same state directory would. It must fail within a bound and leave the machine alone.
func TestBusyMonitor(t *testing.T) {
	s := newSpec(t)
	m := start(t, s)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	dir, err := rundir.Open(s.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	other, err := dir.Dial(t.Context(), monitorSocket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(other).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := New(false).Adopt(ctx, s); !fault.Is(err, fault.Unavailable) || fault.HintOf(err) == "" {
		t.Errorf("Adopt: %v, hint %q; want unavailable", err, fault.HintOf(err))
	}
	other.Close()
	adopted, err := New(false).Adopt(t.Context(), s)
	if err != nil {
		t.Fatalf("after the other has gone: %v", err)
	}
	defer adopted.Close()
	if state, err := adopted.State(t.Context()); err != nil || state != vmm.Running {
		t.Errorf("%v, %v", state, err)
	}
}

// TestReconnect breaks the monitor's connection under a machine: the next question makes a new one.
func TestReconnect(t *testing.T) {
	m := start(t, newSpec(t)).(*machine)
	m.monitor.current().conn.Close()
	<-m.monitor.q.gone
	if state, err := m.State(t.Context()); err != nil || state != vmm.Running {
		t.Errorf("%v, %v", state, err)
	}
}

// TestDaemonKilled ends the daemon by kill -9 at each boundary of a start. The next daemon must find
// what runs, let the guest go, and be able to end it; and start it if nothing runs.
func TestDaemonKilled(t *testing.T) {
	for _, when := range []string{"intent", "started", "attached"} {
		t.Run(when, func(t *testing.T) {
			s := newSpec(t)
			t.Cleanup(func() { // what the daemon started, should the test fail before it owns it
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				if p, err := process.Find(ctx, filepath.Join(t.TempDir(), "pid"), s.Marker()); err == nil {
					p.Kill(ctx)
					p.Close()
				}
			})
			daemon := exec.Command("/proc/self/exe", "-test.run=^$")
			daemon.Env = append(os.Environ(), "QEMU_TEST_DAEMON="+when, "QEMU_TEST_DIR="+filepath.Dir(s.RunDir))
			if out, err := daemon.CombinedOutput(); err == nil || daemon.ProcessState.ExitCode() != -1 {
				t.Fatalf("the daemon was not killed: %v: %s", err, out)
			}
			if when == "started" { // what a daemon leaves that dies before it writes the pidfile
				b, err := os.ReadFile(filepath.Join(s.RunDir, pidfile))
				if err != nil {
					t.Fatal(err)
				}
				if want := `"pid":0`; !strings.Contains(string(b), want) {
					t.Fatalf("pidfile %s has no %s", b, want)
				}
			}
			want := 1
			if when == "intent" {
				want = 0
			}
			if got := len(processes(t, s)); got != want {
				t.Fatalf("%d processes after the crash, want %d", got, want)
			}
			m := start(t, s)
			if got := len(processes(t, s)); got != 1 {
				t.Errorf("%d processes after the next start, want 1", got)
			}
			if state, err := m.State(t.Context()); err != nil || state != vmm.Running {
				t.Errorf("%v, %v", state, err)
			}
			if err := m.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantNothing(t, s)
		})
	}
}

// crash is the daemon of TestDaemonKilled.
func crash(when, dir string) {
	s := specIn(dir)
	die := func() {
		p, _ := os.FindProcess(os.Getpid())
		p.Kill()
		select {}
	}
	ctx := context.Background()
	run, err := rundir.Open(s.RunDir)
	if err == nil {
		path, _ := find()
		args, _ := arguments(s, platform{})
		mon, _ := run.Listen(monitorSocket)
		agent, _ := run.Listen(agentSocket)
		c := process.Command{Path: path, Args: append([]string{path}, args...), Dir: s.RunDir, Log: s.Log, Env: []string{"PATH=/usr/bin:/bin"},
			Pidfile: filepath.Join(s.RunDir, pidfile), Marker: s.Marker(), Files: []*os.File{mon, agent}}
		intent := fmt.Appendf(nil, `{"pid":0,"boot_id":%q,"marker":%q}`, boot(), s.Marker())
		switch when {
		case "intent":
			if err = os.WriteFile(c.Pidfile, intent, 0o600); err == nil {
				die()
			}
		case "started":
			if _, err = process.Start(ctx, c); err == nil {
				if err = os.WriteFile(c.Pidfile, intent, 0o600); err == nil {
					die()
				}
			}
		case "attached":
			if _, err = New(false).Start(ctx, s); err == nil {
				die()
			}
		}
	}
	fmt.Println(err)
	os.Exit(1)
}

func boot() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}
