package containerinit

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/exec"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

func TestChildrenOf(t *testing.T) {
	for command, want := range map[string]string{"": boot.SSHServerPath, "/bin/app": boot.SSHServerPath + " " + CommandName, "/usr/sbin/sshd -D": CommandName} {
		for _, have := range []bool{true, false} {
			var got []string
			for _, c := range childrenOf(boot.Container{Command: strings.Fields(command)}, have) {
				got = append(got, c.name)
			}
			if !have {
				want = strings.TrimSpace(strings.TrimPrefix(want, boot.SSHServerPath))
			}
			if strings.Join(got, " ") != want {
				t.Errorf("%q: %v", command, got)
			}
		}
	}
}

// kernel is what a supervisor sees of the world.
type kernel struct {
	mu      sync.Mutex
	next    int
	started []string
	dead    []int
	status  syscall.WaitStatus
	stopped chan bool
	command int
}

func (k *kernel) supervisor(names ...string) *supervisor {
	var children []*child
	for _, n := range names {
		children = append(children, &child{name: n})
	}
	s := newSupervisor(children)
	k.next, k.stopped = 10, make(chan bool, 2)
	s.start = func(_, name string) (int, error) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.next++
		k.started = append(k.started, name)
		return k.next, nil
	}
	s.wait = func() (int, syscall.WaitStatus) {
		if len(k.dead) == 0 {
			return 0, 0
		}
		pid := k.dead[0]
		k.dead = k.dead[1:]
		return pid, k.status
	}
	s.stop = func(command int, reboot bool) { k.command = command; k.stopped <- reboot }
	for _, c := range s.children {
		s.launch(c)
	}
	return s
}

func again(t *testing.T, s *supervisor) *child {
	t.Helper()
	select {
	case c := <-s.again:
		return c
	case <-time.After(10 * time.Second):
		t.Fatal("it is not started again")
		return nil
	}
}

func TestSupervisor(t *testing.T) {
	k := &kernel{status: 1 << 8} // exit status 1
	s := k.supervisor("sshd", CommandName)
	// One signal stands for many: orphans, and one that is ours.
	k.dead = []int{99, 11, 98}
	s.handle(unix.SIGCHLD)
	if len(k.dead) != 0 {
		t.Errorf("%d were not reaped", len(k.dead))
	}
	c := again(t, s)
	if c.name != "sshd" || c.backoff != firstBackoff {
		t.Errorf("%+v", c)
	}
	s.launch(c)
	k.dead = []int{13}
	s.handle(unix.SIGCHLD)
	if c := again(t, s); c.backoff != 2*firstBackoff {
		t.Errorf("the second time it waits %s", c.backoff)
	}
	// The command's supervisor that is done is not started again.
	k.status, k.dead = 0, []int{12}
	s.handle(unix.SIGCHLD)
	select {
	case c := <-s.again:
		t.Errorf("%s is started again", c.name)
	case <-time.After(2 * firstBackoff):
	}
}

func TestSupervisorStops(t *testing.T) {
	for sig, reboot := range map[os.Signal]bool{system.SignalPowerOff: false, system.SignalHalt: false, unix.SIGPWR: false, system.SignalReboot: true, unix.SIGINT: true} {
		k := &kernel{status: 1 << 8}
		s := k.supervisor("sshd", CommandName)
		s.handle(sig)
		s.handle(sig) // once is enough
		if got := <-k.stopped; got != reboot || k.command != 12 {
			t.Errorf("%s: reboot %v, command %d", sig, got, k.command)
		}
		k.dead = []int{11, 12}
		s.handle(unix.SIGCHLD)
		select {
		case c := <-s.again:
			t.Errorf("%s: %s is started again while all ends", sig, c.name)
		case <-k.stopped:
			t.Errorf("%s: stopped twice", sig)
		case <-time.After(2 * firstBackoff):
		}
	}
}

// lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lockedBuffer) until(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(l.String(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%q is not in the log:\n%s", text, l.String())
		}
	}
}

func start(r exec.Request) (*agentd.Process, error) { return agentd.StartProcess(r) }

func TestCommandRunsUntilItSucceeds(t *testing.T) {
	dir := t.TempDir()
	log := &lockedBuffer{}
	c := boot.Container{WorkingDir: dir, Environment: []string{"WORD=hello"}, Command: []string{"/bin/sh", "-c", "echo $WORD in $PWD; echo oops >&2; test -e again || { touch again; exit 3; }"}}
	if err := supervise(c, log, make(chan os.Signal), start); err != nil {
		t.Fatal(err)
	}
	got := log.String()
	if strings.Count(got, "hello in "+dir) != 2 || strings.Count(got, "\noops\n") != 2 || !strings.Contains(got, "ended with status 3") || !strings.Contains(got, "ended with status 0") {
		t.Errorf("%s", got)
	}
}

func TestCommandStops(t *testing.T) {
	for _, c := range []struct{ script, signal, want string }{
		{"trap 'echo quit; exit 0' QUIT; echo ready; while :; do sleep 0.05; done", "SIGQUIT", "quit"},
		{"echo ready; sleep 100", "", "ended by SIGTERM"},
	} {
		log, stop, done := &lockedBuffer{}, make(chan os.Signal, 1), make(chan error, 1)
		go func() {
			done <- supervise(boot.Container{Command: []string{"/bin/sh", "-c", c.script}, StopSignal: c.signal}, log, stop, start)
		}()
		log.until(t, "ready")
		stop <- unix.SIGTERM
		select {
		case err := <-done:
			if err != nil || !strings.Contains(log.String(), c.want) {
				t.Errorf("%v\n%s", err, log)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("it did not stop")
		}
	}
	// One that cannot be started is tried again, and stops while it waits.
	log, stop, done := &lockedBuffer{}, make(chan os.Signal, 1), make(chan error, 1)
	go func() { done <- supervise(boot.Container{Command: []string{"/nonexistent"}}, log, stop, start) }()
	log.until(t, "cannot be started")
	stop <- unix.SIGTERM
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestStopSignal(t *testing.T) {
	for in, want := range map[string]unix.Signal{"": unix.SIGTERM, "SIGQUIT": unix.SIGQUIT, "int": unix.SIGINT, "9": unix.SIGKILL, "SIGRTMIN+3": 37, "nonsense": unix.SIGTERM, "99": unix.SIGTERM} {
		if got := stopSignal(in); got != want {
			t.Errorf("%q: %v, want %v", in, got, want)
		}
	}
}

func TestLogIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log", "x")
	l, err := openLog(path, 100)
	if err != nil {
		t.Fatal(err)
	}
	for range 30 {
		if n, err := l.Write([]byte("0123456789")); n != 10 || err != nil {
			t.Fatal(n, err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, path + ".1"} {
		if st, err := os.Stat(p); err != nil || st.Size() != 100 {
			t.Errorf("%s: %v, %v", p, st, err)
		}
	}
}
