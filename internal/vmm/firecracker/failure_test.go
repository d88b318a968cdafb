package firecracker

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/jail"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// program makes a shell script that stands in Firecracker's place.
func program(t *testing.T, script string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "firecracker")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestCheck gives the driver good and bad programs, and counts how often it runs them.
func TestCheck(t *testing.T) {
	runs := filepath.Join(t.TempDir(), "runs")
	say := func(version string) string { return fmt.Sprintf("echo x >>%s; echo 'Firecracker v%s'", runs, version) }
	path := program(t, say("1.12.1"))
	d := driverOf(path)
	for range 3 {
		if err := d.Check(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(runs); err != nil || string(b) != "x\n" {
		t.Errorf("the program ran %d times, %v; want once", len(b)/2, err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+say("1.11.0")+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.Check(t.Context()); !fault.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "1.11.0") || fault.HintOf(err) == "" {
			t.Errorf("version 1.11: %v, want unsupported with a hint", err)
		}
	}
	if b, err := os.ReadFile(runs); err != nil || string(b) != "x\nx\n" {
		t.Errorf("the programs ran %d times, %v; want twice", len(b)/2, err)
	}
}

// TestBadPrograms compares the faults of programs that cannot be used, from Check and from Start, which
// may leave nothing.
func TestBadPrograms(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "firecracker")
	if err := os.WriteFile(plain, []byte("#!/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(t.TempDir(), "firecracker")
	if err := os.WriteFile(foreign, []byte("\x7fELF, of another machine"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, path string
		code       fault.Code
		want       string
	}{
		{"missing", filepath.Join(t.TempDir(), "none"), fault.Unavailable, "no such file"},
		{"not executable", plain, fault.Permission, "cannot be executed"},
		{"not a program", foreign, fault.Unavailable, "does not run"},
		{"fails", program(t, "exit 127"), fault.Unavailable, "does not run"},
		{"too old", program(t, "echo Firecracker v1.11.9"), fault.Unsupported, "1.11.9, at least 1.12"},
		{"much too old", program(t, "echo Firecracker v0.25.2"), fault.Unsupported, "0.25.2"},
		{"strange version", program(t, "echo Firecracker vNext"), fault.Unsupported, "Next"},
		{"another program", program(t, "echo hello"), fault.Unsupported, "no Firecracker"},
		{"silent", program(t, "exit 0"), fault.Unsupported, "no Firecracker"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSpec(t)
			_, err := driverOf(c.path).Start(t.Context(), s)
			for what, err := range map[string]error{"Check": driverOf(c.path).Check(t.Context()), "Start": err} {
				if fault.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.want) || fault.HintOf(err) == "" {
					t.Errorf("%s: %v (%s), hint %q; want %q (%s)", what, err, fault.CodeOf(err), fault.HintOf(err), c.want, c.code)
				}
			}
			wantNothing(t, s)
		})
	}
	d := New(func() (string, error) {
		return "", fault.New(fault.Unavailable, "firecracker", "there is none").WithHint("get one")
	})
	if err := d.Check(t.Context()); !fault.Is(err, fault.Unavailable) || fault.HintOf(err) != "get one" {
		t.Errorf("none found: %v", err)
	}
	d = driverOf(program(t, "echo Firecracker v1.12.1"))
	d.kvm = func() (bool, string) { return false, "this user may not open /dev/kvm" }
	if err := d.Check(t.Context()); !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "may not open /dev/kvm") || fault.HintOf(err) == "" {
		t.Errorf("no KVM: %v", err)
	}
}

// TestNewer accepts what comes after the version that was run.
func TestNewer(t *testing.T) {
	for output, want := range map[string]bool{
		"Firecracker v1.12.0\n":                                   true,
		"Firecracker v1.16.1\n\n2026-01-01 [x] exiting\n":         true,
		"a line before\nFirecracker v2.0.0-dev\n":                 true,
		"Firecracker v1.9.1\n":                                    false,
		"Firecracker v1.12x\n":                                    false,
		"Firecracker version 1.12.1\n":                            false,
		"Firecracker v99999999999999999999.99999999999999999.1\n": false,
	} {
		if err := judge("firecracker", output); (err == nil) != want {
			t.Errorf("%q: %v", output, err)
		}
	}
}

// stages of the stand-in, in the order of a start. "request N" ends at the Nth call of the API.
var stages = []struct {
	stage string
	bound time.Duration
	code  fault.Code
	want  string
}{
	{"ends", patience, fault.Unavailable, "ended with status 3 before its guest ran: what went wrong"},
	{"ends silently", patience, fault.Unavailable, "and said nothing"},
	{"crashes", patience, fault.Unavailable, "signal 11"},
	{"never binds", 300 * time.Millisecond, fault.Timeout, "its API had not answered"},
	{"binds and ends", patience, fault.Unavailable, "ended with status 3"},
	{"binds and hangs", 300 * time.Millisecond, fault.Timeout, "its API had not answered"},
	{"closes connections", patience, fault.Unavailable, "Firecracker's API fails"},
	{"speaks no HTTP", patience, fault.Unavailable, "Firecracker's API fails"},
	{"says no JSON", patience, fault.Unavailable, "Firecracker's API fails"},
	{"another version", patience, fault.Unsupported, `says that it is version "1.11.0"`},
	{"request 1", patience, fault.Unavailable, "ended with status 3"}, // GET /version
	{"request 2", patience, fault.Unavailable, "ended with status 3"}, // the machine
	{"request 3", patience, fault.Unavailable, "ended with status 3"}, // the kernel
	{"request 4", patience, fault.Unavailable, "ended with status 3"}, // the drives
	{"request 5", patience, fault.Unavailable, "ended with status 3"},
	{"request 6", patience, fault.Unavailable, "ended with status 3"}, // the vsock
	{"request 7", patience, fault.Unavailable, "ended with status 3"}, // the entropy device
	{"request 8", patience, fault.Unavailable, "ended with status 3"}, // InstanceStart
	{"refuses 4", patience, fault.Unavailable, "Firecracker refuses the drive"},
	{"refuses 8", patience, fault.Unavailable, "in its own words"},
	{"no kvm", patience, fault.Permission, "may not open /dev/kvm"},
	{"no memory", patience, fault.Exhausted, "64 MiB"},
}

// TestStartFails lets a stand-in go wrong at each of its first stages, and compares the faults. None may
// leave a process or a file.
func TestStartFails(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range stages {
		t.Run(c.stage, func(t *testing.T) {
			t.Parallel()
			path := program(t, fmt.Sprintf(`[ "$1" = --version ] && { echo 'Firecracker v1.12.1'; exit 0; }
[ '%[1]s' = crashes ] && kill -SEGV $$
FIRECRACKER_TEST_STAGE='%[1]s' exec '%[2]s' "$@"`, c.stage, self))
			s := newSpec(t)
			d := driverOf(path)
			if err := d.Check(t.Context()); err != nil { // not within the bound
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), c.bound)
			defer cancel()
			begin := time.Now()
			m, err := d.Start(ctx, s)
			if err == nil {
				own(t, m)
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

// TestYoungFields: a field that older versions do not know, and would refuse, is sent to those that say they are younger.
func TestYoungFields(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for version, want := range map[string]string{
		"1.12.1": `{"iface_id":"net0","guest_mac":"02:00:00:00:00:01","host_dev_name":"tap0"}`,
		"1.15.9": `{"iface_id":"net0","guest_mac":"02:00:00:00:00:01","host_dev_name":"tap0"}`,
		"1.16.0": `{"iface_id":"net0","guest_mac":"02:00:00:00:00:01","host_dev_name":"tap0","mtu":1420}`,
		"2.0.0":  `{"iface_id":"net0","guest_mac":"02:00:00:00:00:01","host_dev_name":"tap0","mtu":1420}`,
	} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			s := newSpec(t)
			s.NICs = []vmm.NIC{{MAC: "02:00:00:00:00:01", MTU: 1420, TAP: "tap0"}}
			d := driverOf(program(t, fmt.Sprintf(`[ "$1" = --version ] && { echo 'Firecracker v1.12.1'; exit 0; }
FIRECRACKER_TEST_STAGE='is %s' exec '%s' "$@"`, version, self)))
			m, err := d.Start(t.Context(), s)
			if err == nil {
				own(t, m)
				t.Fatal("it started")
			}
			var r *refusal
			if !errors.As(err, &r) || r.Message != want {
				t.Errorf("%v\nwas sent, want %s", err, want)
			}
			wantNothing(t, s)
		})
	}
}

// standIn is a Firecracker that goes wrong at a stage.
func standIn(stage string) {
	leave := func() {
		fmt.Fprintln(os.Stderr, "what went wrong")
		os.Exit(3)
	}
	hang := func() { time.Sleep(10 * time.Minute); os.Exit(4) }
	switch stage {
	case "ends":
		leave()
	case "ends silently":
		os.Exit(1)
	case "never binds":
		hang()
	}
	l, err := net.Listen("unix", apiSocket)
	if err != nil {
		leave()
	}
	if stage == "binds and ends" {
		leave()
	}
	if stage == "binds and hangs" {
		hang()
	}
	if !slices.Contains([]string{"closes connections", "speaks no HTTP"}, stage) {
		requests := 0
		err = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			requests++
			refuse := func(words string) {
				w.WriteHeader(http.StatusBadRequest)
				_ = json.NewEncoder(w).Encode(map[string]string{"fault_message": words})
			}
			starts := r.URL.Path == "/actions"
			switch {
			case stage == "request "+strconv.Itoa(requests):
				leave()
			case stage == "refuses "+strconv.Itoa(requests):
				refuse("in its own words")
			case stage == "says no JSON":
				fmt.Fprint(w, "<html>")
			case stage == "another version":
				fmt.Fprint(w, `{"firecracker_version":"1.11.0"}`)
			case strings.HasPrefix(stage, "is ") && r.URL.Path == "/version":
				fmt.Fprintf(w, `{"firecracker_version":%q}`, strings.TrimPrefix(stage, "is "))
			case strings.HasPrefix(stage, "is ") && strings.HasPrefix(r.URL.Path, "/network-interfaces/"):
				body, _ := io.ReadAll(r.Body)
				refuse(string(body))
			case stage == "no kvm" && starts:
				refuse("Start microvm error: Internal error while starting microVM: Error creating KVM object: Permission denied (os error 13)\nMake sure the user launching the firecracker process is configured on the /dev/kvm file's ACL.")
			case stage == "no memory" && starts:
				refuse("Start microvm error: Cannot create mmap region: Cannot allocate memory (os error 12)")
			case r.URL.Path == "/version":
				fmt.Fprint(w, `{"firecracker_version":"1.12.1"}`)
			default:
				w.WriteHeader(http.StatusNoContent)
			}
		}))
		fmt.Fprintln(os.Stderr, err)
		os.Exit(4)
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			os.Exit(4)
		}
		if stage == "speaks no HTTP" {
			_, _ = conn.Write([]byte("220 mail.example.com ESMTP\r\n"))
		}
		_ = conn.Close()
	}
}

// TestAnotherVMM meets a process that carries the machine's marker and is no Firecracker: the machine runs
// under another driver, which is asked separately.
func TestAnotherVMM(t *testing.T) {
	s := newSpec(t)
	other := filepath.Join(s.RunDir, "vmm.pid")
	p, err := process.Start(t.Context(), process.Command{
		Path: "/bin/sh", Args: []string{"sh", "-c", "sleep 600; :", s.Marker()}, Dir: s.RunDir, Env: []string{"PATH=/usr/bin:/bin"},
		Log: s.Log, Pidfile: other, Marker: s.Marker(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Kill(-p.PID(), unix.SIGKILL) // the shell's sleep as well: they have a session of their own
		if err := p.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if _, err := driverOf("/bin/false").Adopt(t.Context(), s); !fault.Is(err, fault.NotFound) {
		t.Errorf("Adopt: %v, want not found", err)
	}
	select {
	case <-p.Done():
		t.Error("the other VMM was ended")
	default:
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("the other driver's pidfile: %v", err)
	}
	if _, err := os.Stat(filepath.Join(s.RunDir, pidfile)); err == nil {
		t.Error("a pidfile of its own is left")
	}
}

// TestDaemonKilled ends the daemon by kill -9 at each boundary of a start. The next daemon must find what
// runs and be able to end it, and start the machine if no guest runs.
func TestDaemonKilled(t *testing.T) {
	newDriver(t)
	for _, c := range []struct {
		when    string
		process int
		adopted bool // the guest runs already
	}{
		{"intent", 0, false},
		{"started", 1, false},
		{"half configured", 1, false},
		{"running", 1, true},
		{"running, pidfile lost", 1, true},
	} {
		t.Run(c.when, func(t *testing.T) {
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
			daemon.Env = append(os.Environ(), "FIRECRACKER_TEST_DAEMON="+c.when, "FIRECRACKER_TEST_DIR="+filepath.Dir(s.RunDir))
			if out, err := daemon.CombinedOutput(); err == nil || daemon.ProcessState.ExitCode() != -1 {
				t.Fatalf("the daemon was not killed: %v: %s", err, out)
			}
			before := processes(t, s)
			if len(before) != c.process {
				t.Fatalf("processes %v after the crash, want %d", before, c.process)
			}
			d := newDriver(t)
			if adopted, err := d.Adopt(t.Context(), s); c.adopted {
				if err != nil {
					t.Fatal(err)
				}
				if err := adopted.Close(); err != nil {
					t.Fatal(err)
				}
			} else if !fault.Is(err, fault.NotFound) {
				t.Errorf("Adopt: %v, want not found", err)
			} else {
				wantNothing(t, s)
			}
			m := start(t, d, s)
			if after := processes(t, s); len(after) != 1 || c.adopted && after[0] != before[0] {
				t.Errorf("processes %v after the next start, before it %v", after, before)
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
	path, err := installed()
	if err == nil {
		c := process.Command{Path: path, Args: append([]string{path}, arguments(s)...), Dir: s.RunDir, Log: s.Log,
			Env: []string{"PATH=/usr/bin:/bin"}, Pidfile: filepath.Join(s.RunDir, pidfile), Marker: s.Marker()}
		boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
		intent := fmt.Appendf(nil, `{"pid":0,"boot_id":%q,"marker":%q}`, strings.TrimSpace(string(boot)), s.Marker())
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
		case "half configured":
			// The kernel is not there: the start fails at the second call, and dies instead of cleaning up.
			if _, err = process.Start(ctx, c); err == nil {
				err = halfConfigure(ctx, s)
			}
			if err == nil {
				die()
			}
		case "jailed: started", "jailed: running", "jailed: running, pidfile lost":
			var h *jail.Host
			if h, err = hostOf(os.Getenv("FIRECRACKER_TEST_JAILS")); err == nil {
				d := driverOf(path)
				d.UseJails(Jails{Jail: startHook{h, func() {
					if when == "jailed: started" {
						die()
					}
				}}, Want: true, Must: true})
				_, err = d.Start(ctx, s)
			}
			if err == nil && when == "jailed: running, pidfile lost" {
				err = os.Remove(c.Pidfile)
			}
			if err == nil {
				die()
			}
		case "running", "running, pidfile lost":
			if _, err = driverOf(path).Start(ctx, s); err == nil {
				if when != "running" {
					err = os.Remove(c.Pidfile)
				}
				if err == nil {
					die()
				}
			}
		}
	}
	fmt.Println(err)
	os.Exit(1)
}

func halfConfigure(ctx context.Context, s vmm.Spec) error {
	dir, err := rundir.OpenLocked(ctx, s.RunDir, s.Name)
	if err != nil {
		return err
	}
	defer dir.Close()
	socket, err := watchFor(dir, apiSocket)
	if err != nil {
		return err
	}
	defer socket.close()
	conn, err := socket.dial(ctx)
	if err != nil {
		return err
	}
	c := newClient(conn)
	defer c.close()
	for _, r := range requests(s, layout{}, oldest)[:2] {
		if err := c.do(ctx, r.method, r.path, r.body, nil); err != nil {
			return err
		}
	}
	return nil
}

// TestConnect plays Firecracker's side of a host-initiated connection.
func TestConnect(t *testing.T) {
	for _, c := range []struct {
		name, answer string
		hangs        bool
		want         string // of the error, "" for none
	}{
		{"accepted", "OK 1073741824\nhello", false, ""},
		{"closed without a byte", "", false, "EOF"},
		{"hangs", "", true, "timeout"},
		{"refused", "NO\n", false, "was answered with"},
		{"without end", "OK 10737418240000000000", true, "too long"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			us, them := net.Pipe()
			defer us.Close()
			heard := make(chan string, 1)
			go func() {
				line, _ := bufio.NewReader(them).ReadString('\n')
				heard <- line
				them.Write([]byte(c.answer))
				if !c.hangs {
					them.Close()
				}
			}()
			begin := time.Now()
			err := Connect(t.Context(), us, 1024)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if got := <-heard; got != "CONNECT 1024\n" {
				t.Errorf("it asked %q", got)
			}
			if took := time.Since(begin); took > connectTime+2*time.Second {
				t.Errorf("it took %v", took)
			}
			if c.want == "" { // nothing of the guest's was swallowed
				b := make([]byte, 16)
				if n, err := us.Read(b); err != nil || string(b[:n]) != "hello" {
					t.Errorf("%q, %v", b[:n], err)
				}
			}
			us.Close()
			them.Close()
		})
	}
	us, them := net.Pipe()
	defer us.Close()
	defer them.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Connect(ctx, us, 1024); err == nil || !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
