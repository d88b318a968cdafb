package process

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

const patience = 10 * time.Second

// TestMain makes this binary the program that the tests start: it tells on stdout what it was given,
// and stays until a signal ends it.
func TestMain(m *testing.M) {
	switch os.Getenv("PROCESS_TEST") {
	case "":
		goleak.VerifyTestMain(m)
	case "daemon": // starts a child and is killed before it can say more than its pid
		c := command(os.Getenv("PROCESS_DIR"), os.Args[1])
		p, err := Start(context.Background(), c)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(p.PID())
		time.Sleep(time.Minute) // to be killed long before
		os.Exit(1)
	case "child": // for at most a minute, should the test be killed itself
		time.AfterFunc(time.Minute, func() { os.Exit(1) })
		term := make(chan os.Signal, 1)
		signal.Notify(term, syscall.SIGTERM)
		report()
		<-term
		os.Exit(7)
	}
}

// inherited is what a program got from whoever started it.
type inherited struct {
	Umask     int
	Leader    bool // of its session
	Terminal  bool
	Stdin     string
	Files     []string // descriptors from 3 on that it did not open itself
	Directory string
}

func report() {
	in := inherited{Umask: unix.Umask(0)}
	sid, _ := unix.Getsid(0)
	in.Leader = sid == os.Getpid()
	if tty, err := os.Open("/dev/tty"); err == nil {
		in.Terminal = true
		tty.Close()
	}
	in.Stdin, _ = os.Readlink("/proc/self/fd/0")
	in.Directory, _ = os.Getwd()
	for fd := 3; fd < 64; fd++ {
		target, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		if err == nil && !strings.HasPrefix(target, "anon_inode:") && !strings.HasPrefix(target, "/sys/fs/cgroup/") { // the runtime's own
			in.Files = append(in.Files, target)
		}
	}
	b, _ := json.Marshal(in)
	fmt.Printf("%s\n", b)
	fmt.Fprintln(os.Stderr, "ready")
}

func command(dir, marker string) Command {
	return Command{
		Path: "/proc/self/exe", Args: []string{"child", marker}, Dir: dir, Env: []string{"PROCESS_TEST=child"},
		Log: filepath.Join(dir, "log"), Pidfile: filepath.Join(dir, "pid"), Marker: marker,
	}
}

func newCommand(t *testing.T) Command {
	t.Helper()
	return command(t.TempDir(), "banger-test-"+strings.NewReplacer("/", "_", "-", "_").Replace(t.Name())+fmt.Sprint(os.Getpid()))
}

func start(t *testing.T, c Command) *Process {
	t.Helper()
	p, err := Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(t, p) })
	waitFor(t, c.Log, "ready\n")
	return p
}

func kill(t *testing.T, p *Process) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := p.Kill(ctx); err != nil {
		t.Error(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// waitFor waits until the file holds the text, by inotify on its directory.
func waitFor(t *testing.T, path, text string) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(path), unix.IN_MODIFY|unix.IN_CREATE); err != nil {
		t.Fatal(err)
	}
	f.SetReadDeadline(time.Now().Add(patience))
	for {
		b, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(b), text) {
			return
		}
		if _, err := f.Read(make([]byte, 4096)); err != nil {
			t.Fatalf("%s does not say %q: %v; it says %q", path, text, err, b)
		}
	}
}

func done(t *testing.T, p *Process) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(patience):
		t.Fatalf("process %d: not done after %v", p.PID(), patience)
	}
}

// gone checks that the kernel knows the pid no more, not even as a zombie.
func gone(t *testing.T, pid int) {
	t.Helper()
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("/proc/%d: %v, want it gone", pid, err)
	}
}

// TestInheritance starts a program from a daemon that has a descriptor without close-on-exec and a
// lax umask, and compares what the program got.
func TestInheritance(t *testing.T) {
	leak, err := os.Open("/etc/hostname")
	if err != nil {
		t.Fatal(err)
	}
	defer leak.Close()
	if _, err := unix.FcntlInt(leak.Fd(), unix.F_SETFD, 0); err != nil {
		t.Fatal(err)
	}
	mask := unix.Umask(0o002)
	defer unix.Umask(mask)
	given, err := os.Open("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	defer given.Close()

	c := newCommand(t)
	c.Files = []*os.File{given}
	if err := os.WriteFile(c.Log, []byte("an earlier run\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, c)

	b, err := os.ReadFile(c.Log)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	if lines[0] != "an earlier run" {
		t.Errorf("the log was not appended to: %q", b)
	}
	var got inherited
	if err := json.Unmarshal([]byte(lines[1]), &got); err != nil {
		t.Fatalf("%q: %v", lines[1], err)
	}
	want := inherited{Umask: 0o077, Leader: true, Stdin: "/dev/null", Files: []string{"/etc/passwd"}, Directory: c.Dir}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("inherited (-want +got):\n%s", diff)
	}
	if now := unix.Umask(0o002); now != 0o002 {
		t.Errorf("Start changed the daemon's umask to %#o", now)
	}
	if st, err := os.Stat(c.Pidfile); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("pidfile: %v, %v", st, err)
	}
}

// TestEnd ends children in each way, and compares what is told of it.
func TestEnd(t *testing.T) {
	for _, c := range []struct {
		name string
		sig  syscall.Signal
		want func(syscall.WaitStatus) bool
	}{
		{"handled", syscall.SIGTERM, func(s syscall.WaitStatus) bool { return s.Exited() && s.ExitStatus() == 7 }},
		{"not handled", syscall.SIGKILL, func(s syscall.WaitStatus) bool { return s.Signaled() && s.Signal() == syscall.SIGKILL }},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := start(t, newCommand(t))
			if _, ok := p.Status(); ok {
				t.Error("a running process has a status")
			}
			if err := p.Signal(int(c.sig)); err != nil {
				t.Fatal(err)
			}
			done(t, p)
			gone(t, p.PID())
			if s, ok := p.Status(); !ok || !c.want(s) {
				t.Errorf("status %#x, %v", s, ok)
			}
			if err := p.Signal(int(syscall.SIGTERM)); !fault.Is(err, fault.Precondition) {
				t.Errorf("Signal after its end: %v, want precondition", err)
			}
			if err := p.Kill(t.Context()); err != nil {
				t.Errorf("Kill after its end: %v", err)
			}
		})
	}
	t.Run("no such signal", func(t *testing.T) {
		p := start(t, newCommand(t))
		if err := p.Signal(4711); !fault.Is(err, fault.Invalid) {
			t.Errorf("Signal(4711): %v, want invalid", err)
		}
	})
}

// TestStartFails looks at what is left of programs that cannot be started.
func TestStartFails(t *testing.T) {
	t.Run("no program", func(t *testing.T) {
		c := newCommand(t)
		c.Path = "/nonexistent/program"
		if _, err := Start(t.Context(), c); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v, want not exist", err)
		}
		if _, err := os.Stat(c.Pidfile); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("pidfile: %v", err)
		}
	})
	t.Run("no room for the pidfile", func(t *testing.T) {
		c := newCommand(t)
		c.Pidfile = filepath.Join(c.Dir, "missing", "pid")
		if _, err := Start(t.Context(), c); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v, want not exist", err)
		}
		if _, err := scan(t.Context(), c.Marker); !fault.Is(err, fault.NotFound) {
			t.Errorf("scan: %v, want that the process was killed", err)
		}
	})
}

// TestFind finds a process again by each of its traces, and sees its end although it reaped nothing.
func TestFind(t *testing.T) {
	for _, c := range []struct {
		name  string
		trace func(t *testing.T, pidfile string)
		open  bool // whether Open finds it, too
	}{
		{"by its pidfile", func(*testing.T, string) {}, true},
		{"without a pidfile", func(t *testing.T, path string) { must(t, Forget(path)) }, false},
		{"with the intent to start it", func(t *testing.T, path string) {
			r, err := readPidfile(path)
			must(t, err)
			r.PID, r.Start = starting, 0
			must(t, writePidfile(path, r))
		}, true},
		{"with half a pidfile", func(t *testing.T, path string) { must(t, os.WriteFile(path, []byte(`{"pid":1`), 0o600)) }, true},
		{"with a pidfile of another boot", func(t *testing.T, path string) {
			r, err := readPidfile(path)
			must(t, err)
			r.Boot = "00000000-0000-0000-0000-000000000000"
			must(t, writePidfile(path, r))
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := newCommand(t)
			p := start(t, cmd)
			c.trace(t, cmd.Pidfile)
			if opened, err := Open(t.Context(), cmd.Pidfile, cmd.Marker); c.open && err != nil || !c.open && !fault.Is(err, fault.NotFound) {
				t.Errorf("Open: %v", err)
			} else if err == nil {
				must(t, opened.Close())
			}
			c.trace(t, cmd.Pidfile)
			found, err := Find(t.Context(), cmd.Pidfile, cmd.Marker)
			if err != nil {
				t.Fatal(err)
			}
			defer found.Close()
			if found.PID() != p.PID() {
				t.Fatalf("found %d, want %d", found.PID(), p.PID())
			}
			if r, err := readPidfile(cmd.Pidfile); err != nil || r.PID != p.PID() {
				t.Errorf("pidfile after Find: %+v, %v", r, err)
			}
			if err := found.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
			done(t, found)
			done(t, p)
			if _, err := Find(t.Context(), cmd.Pidfile, cmd.Marker); !fault.Is(err, fault.NotFound) {
				t.Errorf("Find after the end: %v, want not_found", err)
			}
		})
	}
}

// TestNotIt forges pidfiles that name living processes which are not the one that was started, as a
// recycled pid would. None may be found, so none can be signalled.
func TestNotIt(t *testing.T) {
	c := newCommand(t)
	p := start(t, c)
	genuine, err := readPidfile(c.Pidfile)
	must(t, err)
	forge := func(change func(*record)) string {
		r := genuine
		change(&r)
		path := filepath.Join(t.TempDir(), "pid")
		must(t, writePidfile(path, r))
		return path
	}
	for _, c := range []struct {
		name, pidfile, marker string
	}{
		{"another program", forge(func(r *record) {}), "banger-test-someoneelse"},
		{"part of the marker", forge(func(r *record) {}), c.Marker[:len(c.Marker)-1]},
		{"init", forge(func(r *record) { r.PID = 1 }), "banger-test-init"},
		{"a free pid", forge(func(r *record) { r.PID = 4 << 20 }), "banger-test-free"},
		{"a negative pid", forge(func(r *record) { r.PID = -p.PID() }), "banger-test-negative"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if p, err := Find(t.Context(), c.pidfile, c.marker); !fault.Is(err, fault.NotFound) {
				t.Errorf("Find: %v, %v; want not_found", p, err)
			}
		})
	}
	t.Run("same pid and marker, started at another time", func(t *testing.T) {
		if p, err := open(p.PID(), c.Marker, genuine.Start+1, false); !fault.Is(err, fault.NotFound) {
			t.Errorf("open: %v, %v; want not_found", p, err)
		}
	})
}

// TestCloseLeavesIt closes both kinds of handles and looks whether the process lives on.
func TestCloseLeavesIt(t *testing.T) {
	c := newCommand(t)
	p := start(t, c)
	found, err := Find(t.Context(), c.Pidfile, c.Marker)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		must(t, found.Close())
		must(t, p.Close())
	}
	if err := found.Signal(0); err == nil || fault.Is(err, fault.Precondition) {
		t.Errorf("Signal on a closed handle: %v; it must not say that the process is gone", err)
	}
	again, err := Find(t.Context(), c.Pidfile, c.Marker)
	if err != nil {
		t.Fatalf("after Close: %v", err)
	}
	must(t, again.Close())
}

// TestOutlivesDaemon kills -9 the process that called Start, and finds the child all the same.
func TestOutlivesDaemon(t *testing.T) {
	c := newCommand(t)
	daemon := exec.Command("/proc/self/exe", c.Marker)
	daemon.Env = append(os.Environ(), "PROCESS_TEST=daemon", "PROCESS_DIR="+c.Dir)
	out, err := daemon.StdoutPipe()
	must(t, err)
	must(t, daemon.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Errorf("the daemon says %q: %v", line, err)
	}
	must(t, daemon.Process.Kill())
	daemon.Wait() // its error says that it was killed

	p, err := Find(t.Context(), c.Pidfile, c.Marker)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(t, p) })
	if got := strings.TrimSpace(line); got != fmt.Sprint(p.PID()) {
		t.Errorf("found %d, the daemon started %s", p.PID(), got)
	}
	waitFor(t, c.Log, "ready\n")
	must(t, p.Signal(int(syscall.SIGTERM)))
	done(t, p)
	if _, ok := p.Status(); ok {
		t.Error("the status of someone else's child is known")
	}
}

// TestMany starts 50 processes and counts threads: a watched process must not cost one.
func TestMany(t *testing.T) {
	threads := func() int {
		tasks, err := os.ReadDir("/proc/self/task")
		must(t, err)
		return len(tasks)
	}
	before := threads()
	var all []*Process
	for i := range 50 {
		c := newCommand(t)
		c.Path, c.Args = "/bin/sleep", []string{"sleep", "61"}
		c.Marker = "61"
		c.Pidfile += fmt.Sprint(i)
		p, err := Start(t.Context(), c)
		must(t, err)
		t.Cleanup(func() { kill(t, p) })
		all = append(all, p)
	}
	if after := threads(); after > before+20 {
		t.Errorf("%d threads before, %d with 50 processes", before, after)
	}
	slices.Reverse(all)
	for _, p := range all {
		must(t, p.Kill(t.Context()))
		gone(t, p.PID())
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Only what carries the prefix, is wanted, and works below the directory is ended.
func TestEndAll(t *testing.T) {
	top := t.TempDir()
	start := func(dir, marker string) *Process {
		t.Helper()
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		p, err := Start(t.Context(), command(dir, marker))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Kill(context.Background()) })
		return p
	}
	name := fmt.Sprintf("sweep-%d-", os.Getpid())
	lost := start(filepath.Join(top, "state/run/a"), name+"a")
	kept := start(filepath.Join(top, "state/run/b"), name+"b")
	elsewhere := start(filepath.Join(top, "state-copy/run/c"), name+"c")
	other := start(filepath.Join(top, "state/run/d"), "other-"+name)
	// Its directory is gone, and it still is known by it.
	if err := os.RemoveAll(filepath.Join(top, "state/run/a")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(top, "state"), filepath.Join(top, "link")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ended, err := EndAll(ctx, name, filepath.Join(top, "link/run"), func(m string) bool { return m != name+"b" })
	if err != nil || !slices.Equal(ended, []string{name + "a"}) {
		t.Errorf("ended %q, %v", ended, err)
	}
	select {
	case <-lost.Done():
	case <-ctx.Done():
		t.Error("the lost one runs on")
	}
	for what, p := range map[string]*Process{"a wanted one": kept, "one of a copy": elsewhere, "a stranger": other} {
		if err := p.Signal(0); err != nil {
			t.Errorf("%s was ended: %v", what, err)
		}
	}
}
