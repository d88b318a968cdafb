//go:build e2e

// Package e2e runs the built ./banger and ./bangerd as a user does, with real virtual machines by
// QEMU. It shows what is promised to users; it looks at no package's inside, but for the formats of
// files that a user has on the disk as well.
//
// `make test` runs what is quick (-short), `make test-full` all of it.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds on a machine of two busy cores that emulates its guests.
const (
	bootTime = 4 * time.Minute
	callTime = time.Minute
)

// checkout is the directory of the source, the programs and the runtime bundle.
var checkout = func() string {
	dir, err := filepath.Abs("../..")
	if err != nil {
		panic(err)
	}
	return dir
}()

func TestMain(m *testing.M) {
	for _, name := range []string{"banger", "bangerd", "banger-helper", "runtime/bundle.json"} {
		if _, err := os.Stat(filepath.Join(checkout, name)); err != nil {
			fmt.Fprintf(os.Stderr, "%v\nthese tests run what was built: make build runtime\n", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// slow leaves a test to `make test-full`.
func slow(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("slow: make test-full runs it")
	}
}

// host is an installation of its own: programs, settings, state. It ends with its test, and the
// test fails if it leaves a process behind.
type host struct {
	t       *testing.T
	program string // banger
	state   string
	env     []string
	sys     *syscall.SysProcAttr // who runs the programs; nil for this user
}

func newHost(t *testing.T, settings ...string) *host {
	t.Helper()
	dir, err := os.MkdirTemp("", "h")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	h := newHostIn(t, dir, settings...)
	return h
}

// newHostIn is newHost with everything in dir, which is the caller's to remove.
func newHostIn(t *testing.T, dir string, settings ...string) *host {
	t.Helper()
	h := &host{t: t, program: filepath.Join(checkout, "banger"), state: filepath.Join(dir, "state")}
	runtimeDir := filepath.Join(dir, "run")
	if err := os.MkdirAll(runtimeDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if driver := os.Getenv("BANGER_E2E_VMM"); driver != "" { // the lab: not another one without a word
		settings = append(settings, fmt.Sprintf("vmm = %q", driver))
	}
	// Root's VMs would be on a bridge: a link and rules of this machine's own, which tests leave alone. The lab is for that.
	if os.Geteuid() == 0 && os.Getenv("BANGER_E2E_VMM") == "" && !strings.Contains(strings.Join(settings, "\n"), "network =") {
		settings = append(settings, `network = "user"`)
	}
	config := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(config, []byte(strings.Join(settings, "\n")+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); !strings.HasPrefix(name, "BANGER_") || name == "BANGER_TEST_RUN" {
			h.env = append(h.env, kv)
		}
	}
	h.env = append(h.env, "BANGER_STATE_DIR="+h.state, "BANGER_CONFIG="+config, "XDG_RUNTIME_DIR="+runtimeDir,
		"BANGER_RUNTIME_DIR="+filepath.Join(checkout, "runtime"), "NO_COLOR=1")
	t.Cleanup(h.end)
	if kept := os.Getenv("BANGER_E2E_CAPTURED"); kept != "" {
		share(t, kept, h.state)
		t.Cleanup(func() { share(t, h.state, kept) })
	}
	return h
}

// underFirecracker says that the tests run in the lab, on VMs of Firecracker.
func underFirecracker() bool { return os.Getenv("BANGER_E2E_VMM") == "firecracker" }

// forget takes away what share gave: the host captures for itself.
func (h *host) forget() {
	for _, kind := range captured {
		if err := os.RemoveAll(filepath.Join(h.state, kind)); err != nil {
			h.t.Fatal(err)
		}
	}
}

// captured are the directories of captured content in an installation's state.
var captured = []string{"images", "kernels"}

// share links captured content, which nobody writes, from one installation to the next: in the lab each of them would
// spend half a minute on the copy and its checksum. The first of all still does, and on the machine itself all.
func share(t *testing.T, from, to string) {
	t.Helper()
	for _, kind := range captured {
		files, _ := filepath.Glob(filepath.Join(from, kind, strings.Repeat("[0-9a-f]", 64)))
		for _, f := range files {
			err := os.MkdirAll(filepath.Join(to, kind), 0o700)
			if err == nil {
				err = os.Link(f, filepath.Join(to, kind, filepath.Base(f)))
			}
			if err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, unix.EXDEV) {
				t.Error(err)
			}
		}
	}
}

func (h *host) setenv(name, value string) { h.env = append(h.env, name+"="+value) }

// result is how a command ended.
type result struct {
	command        string
	stdout, stderr string
	code           int
	took           time.Duration
}

func (r result) String() string {
	return fmt.Sprintf("%s: exit %d after %.1fs\n%s%s", r.command, r.code, r.took.Seconds(), r.stdout, r.stderr)
}

func (h *host) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, h.program, args...)
	cmd.Env, cmd.SysProcAttr, cmd.Dir = h.env, h.sys, "/"
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// try runs banger and returns how it ended.
func (h *host) try(args ...string) result {
	h.t.Helper()
	return h.tryInput("", args...)
}

func (h *host) tryInput(stdin string, args ...string) result {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootTime)
	defer cancel()
	cmd := h.command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	r := result{"banger " + strings.Join(args, " "), stdout.String(), stderr.String(), cmd.ProcessState.ExitCode(), time.Since(start)}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		h.t.Fatalf("%s: %v", r, errors.Join(err, ctx.Err()))
	}
	return r
}

// do runs banger, which must succeed, and returns what it printed on stdout.
func (h *host) do(args ...string) string {
	h.t.Helper()
	r := h.try(args...)
	if r.code != 0 {
		h.t.Fatal(r)
	}
	if r.took > time.Second {
		h.t.Logf("%5.1fs  %s", r.took.Seconds(), r.command)
	}
	return r.stdout
}

// refused runs banger, which must fail with the exit code of docs/cli.md and say each of the words.
func (h *host) refused(code int, args []string, words ...string) result {
	h.t.Helper()
	r := h.try(args...)
	if r.code != code {
		h.t.Errorf("%s\nwant exit code %d", r, code)
	}
	for _, w := range words {
		if !strings.Contains(r.stderr, w) {
			h.t.Errorf("%s\ndoes not say %q", r, w)
		}
	}
	return r
}

// create makes a VM, 1 GiB and one CPU unless told otherwise, and waits until it can be entered.
func (h *host) create(name string, flags ...string) {
	h.t.Helper()
	h.do(append([]string{"vm", "create", "--name", name, "--memory", "1G", "--vcpu", "2"}, flags...)...)
}

// in runs a shell command in the VM, which must succeed, and returns its output without the last newline.
func (h *host) in(name, command string) string {
	h.t.Helper()
	return strings.TrimSuffix(h.do("vm", "ssh", name, "--", command), "\n")
}

// machine is what --output json tells of a VM.
type machine struct {
	ID, Name, State, Note, Directory, Log string
	PID                                   int
	DiskBytes                             int64  `json:"disk_bytes"`
	VMMState                              string `json:"vmm_state"`
	Agent                                 string
	Boot                                  []struct {
		Name string
		AtMS float64 `json:"at_ms"`
	}
	Failure *struct {
		Step  string
		Error struct{ Code, Message, Hint string }
	}
}

func (h *host) json(into any, args ...string) {
	h.t.Helper()
	out := h.do(append(args, "--output", "json")...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		h.t.Fatalf("%v: %v\n%s", args, err, out)
	}
}

func (h *host) show(name string) (m machine) {
	h.t.Helper()
	h.json(&m, "vm", "show", name)
	return m
}

func (h *host) list() (all []machine) {
	h.t.Helper()
	h.json(&all, "vm", "list")
	return all
}

// until waits for a change that comes without a command of ours, and says what it waited for.
// Clients have no event to wait for on the command line, hence the polling.
func (h *host) until(what string, bound time.Duration, reached func() bool) {
	h.t.Helper()
	start := time.Now()
	for !reached() {
		if time.Since(start) > bound {
			h.t.Fatalf("not within %v: %s\n%s", bound, what, h.try("vm", "list"))
		}
		time.Sleep(200 * time.Millisecond)
	}
	h.t.Logf("%5.1fs  until %s", time.Since(start).Seconds(), what)
}

// daemon returns the running daemon's process.
func (h *host) daemon() (pid int) {
	h.t.Helper()
	var status struct {
		Running bool
		PID     int
	}
	h.json(&status, "daemon", "status")
	if !status.Running {
		h.t.Fatal("no daemon runs")
	}
	return status.PID
}

// processes returns the command lines of what runs for this installation, by process.
func (h *host) processes() map[int]string {
	found := map[int]string{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		env, _ := os.ReadFile(filepath.Join(dir, "environ"))
		cwd, _ := os.Readlink(filepath.Join(dir, "cwd"))  // the network's program carries the state directory nowhere else
		out, _ := os.Readlink(filepath.Join(dir, "fd/1")) // and what runs in a jail has only its log of it
		if pid != os.Getpid() && (strings.HasPrefix(out, h.state+"/vms/") || strings.HasPrefix(cwd, h.state+"/net/") || bytes.Contains(line, []byte(h.state)) || bytes.Contains(env, []byte("BANGER_STATE_DIR="+h.state+"\x00"))) {
			found[pid] = strings.TrimSpace(strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return found
}

// machines returns the VMMs among the processes.
func (h *host) machines() (pids []int) {
	for pid, line := range h.processes() {
		if program, _, _ := strings.Cut(line, " "); strings.Contains(program, "qemu-system") || filepath.Base(program) == "firecracker" {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (h *host) end() {
	if h.t.Failed() {
		if log, err := os.ReadFile(filepath.Join(h.state, "bangerd.log")); err == nil {
			h.t.Logf("the daemon's log:\n%s", tail(log, 30))
		}
		consoles, _ := filepath.Glob(filepath.Join(h.state, "vms/*/*.log"))
		networks, _ := filepath.Glob(filepath.Join(h.state, "net/*/*.log"))
		consoles = append(consoles, networks...)
		for _, f := range consoles {
			log, _ := os.ReadFile(f)
			h.t.Logf("%s:\n%s", f, tail(log, 15))
		}
	}
	h.keepLogs()
	if r := h.try("vm", "list", "--output", "json"); r.code == 0 {
		var all []machine
		_ = json.Unmarshal([]byte(r.stdout), &all)
		for _, m := range all {
			if r := h.try("vm", "delete", m.Name); r.code != 0 {
				h.t.Error(r)
			}
		}
	}
	if r := h.try("daemon", "stop"); r.code != 0 {
		h.t.Error(r)
	}
	left := h.processes()
	for start := time.Now(); len(left) > 0 && time.Since(start) < 5*time.Second; left = h.processes() {
		time.Sleep(50 * time.Millisecond)
	}
	for pid, line := range left {
		h.t.Errorf("left behind: process %d: %s", pid, line)
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	if len(left) == 0 {
		for _, dir := range []string{"run", "vms", "net"} {
			if entries, _ := os.ReadDir(filepath.Join(h.state, dir)); len(entries) > 0 {
				h.t.Errorf("left behind: %s/%s/%s", h.state, dir, entries[0].Name())
			}
		}
	}
}

// keepLogs copies the logs of the daemon and the VMs to where the lab brings them back from.
func (h *host) keepLogs() {
	to := os.Getenv("BANGER_TEST_LOGS")
	if to == "" {
		return
	}
	logs, _ := filepath.Glob(filepath.Join(h.state, "vms/*/*.log"))
	for _, f := range append(logs, filepath.Join(h.state, "bangerd.log")) {
		rel, _ := filepath.Rel(h.state, f)
		name := strings.ReplaceAll(h.t.Name()+"-"+rel, "/", "_")
		if content, err := os.ReadFile(f); err == nil {
			if err := os.WriteFile(filepath.Join(to, name), content, 0o644); err != nil {
				h.t.Error(err)
			}
		}
	}
}

func tail(b []byte, lines int) string {
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// gone waits until a process has ended.
func gone(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(callTime.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			t.Fatalf("process %d did not end within %v: %v", pid, callTime, err)
		}
		return
	}
}

// command is a tool of the host, which an ordinary user's PATH may lack.
func command(ctx context.Context, name string, args ...string) *exec.Cmd {
	path, err := exec.LookPath(name)
	if err != nil {
		path = filepath.Join("/usr/sbin", name)
	}
	return exec.CommandContext(ctx, path, args...)
}
