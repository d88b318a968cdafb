package process

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// TestRecycledPID gives the pid of a process that ended to one that has nothing to do with it. What is left of the first finds
// nobody, and what is still held of it signals nobody.
func TestRecycledPID(t *testing.T) {
	const inside = "PROCESS_TEST_PIDS"
	if os.Getenv(inside) == "" { // in a namespace of pids, where no one else takes the pid in between
		if os.Geteuid() != 0 {
			t.Skip("a namespace of pids takes root")
		}
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestRecycledPID$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestRecycledPID ") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(t, unix.Mount("proc", "/proc", "proc", 0, ""))

	c := newCommand(t)
	p := start(t, c)
	found, err := Find(t.Context(), c.Pidfile, c.Marker) // as the next daemon does
	must(t, err)
	defer found.Close()
	must(t, unix.Kill(p.PID(), unix.SIGKILL))
	done(t, p)
	done(t, found)
	gone(t, p.PID())

	stranger := occupy(t, p.PID())
	if r, err := readPidfile(c.Pidfile); err != nil || r.PID != stranger.Process.Pid {
		t.Fatalf("the pidfile is %+v, %v; want that it names process %d", r, err, stranger.Process.Pid)
	}
	for what, look := range map[string]func() (*Process, error){
		"Open": func() (*Process, error) { return Open(t.Context(), c.Pidfile, c.Marker) },
		"Find": func() (*Process, error) { return Find(t.Context(), c.Pidfile, c.Marker) },
	} {
		if q, err := look(); !fault.Is(err, fault.NotFound) {
			t.Errorf("%s: %v, %v; want not_found", what, q, err)
		}
	}
	for what, held := range map[string]*Process{"who started it": p, "who found it": found} {
		if err := held.Signal(int(unix.SIGTERM)); !fault.Is(err, fault.Precondition) {
			t.Errorf("a signal by %s: %v, want that it is gone", what, err)
		}
		if err := held.Kill(t.Context()); err != nil {
			t.Errorf("a kill by %s: %v", what, err)
		}
	}
	ended := make(chan error, 1)
	go func() { ended <- stranger.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("the stranger ended: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	must(t, stranger.Process.Kill())
	<-ended
}

// occupy starts a program that gets the pid: the kernel gives the one after the last (proc_sys_kernel(5), ns_last_pid). A thread of
// ours may take it first, and is not there for long.
func occupy(t *testing.T, pid int) *exec.Cmd {
	t.Helper()
	for range 100 {
		must(t, os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0))
		cmd := exec.Command("/bin/sleep", "60")
		must(t, cmd.Start())
		if cmd.Process.Pid == pid {
			return cmd
		}
		must(t, cmd.Process.Kill())
		_ = cmd.Wait() // its error says that it was killed
	}
	t.Fatalf("nothing gets the pid %d", pid)
	return nil
}
