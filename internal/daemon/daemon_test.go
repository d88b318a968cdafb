package daemon

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/server"
)

// childEnv makes this test binary a daemon, for tests that need a process of its own.
const childEnv = "BANGER_TEST_DAEMON"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		if err := Run(context.Background(), childOptions()); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	// lumberjack starts one goroutine for each log and has no way to end it.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("gopkg.in/natefinch/lumberjack%2ev2.(*Logger).millRun"))
}

// childOptions follow --ready-fd 3 as client.Client passes it.
func childOptions() Options {
	paths, err := config.ResolvePaths(config.System())
	if err != nil {
		panic(err)
	}
	o := Options{Paths: paths, LogLevel: slog.LevelDebug, Open: func(context.Context, *slog.Logger) (Backend, error) {
		// One byte for each daemon that ever got the lock.
		f, err := os.OpenFile(filepath.Join(paths.State, "opened"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if _, err := f.WriteString("x"); err != nil {
			return nil, err
		}
		switch os.Getenv(childEnv) {
		case "refuse":
			return nil, fault.New(fault.Corrupt, "bundle.json", "is damaged").WithHint("make runtime")
		case "panic":
			panic("early death")
		}
		return &backend{}, nil
	}}
	if len(os.Args) == 3 && os.Args[1] == "--ready-fd" {
		o.Ready = os.NewFile(3, "ready")
	}
	return o
}

// backend has just enough for a daemon to live and die.
type backend struct {
	server.Service
	closed  atomic.Int32
	closing func()
}

func (b *backend) Status(context.Context) (sandbox.Status, error) {
	return sandbox.Status{VMM: "none"}, nil
}
func (b *backend) WatchOperation(ctx context.Context, _ string, send func(operation.Operation) error) error {
	if err := send(operation.Operation{ID: "op", State: operation.Running}); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}
func (b *backend) Close(context.Context) error {
	b.closed.Add(1)
	if b.closing != nil {
		b.closing()
	}
	return nil
}

func place(t *testing.T) config.Paths {
	t.Helper()
	dir := t.TempDir()
	env := map[string]string{"XDG_STATE_HOME": filepath.Join(dir, "state"), "XDG_RUNTIME_DIR": filepath.Join(dir, "run"),
		"XDG_CONFIG_HOME": dir, "XDG_CACHE_HOME": dir}
	for k, v := range env {
		t.Setenv(k, v)
	}
	t.Setenv("BANGER_STATE_DIR", "")
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	paths, err := config.ResolvePaths(config.System())
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

func clientOf(t *testing.T, p config.Paths, daemon string) *client.Client {
	t.Helper()
	c := client.New(client.Options{Socket: p.Socket(), StateDir: p.State, Daemon: daemon})
	t.Cleanup(c.Close)
	return c
}

// live runs a daemon in this process and returns its backend once it is ready.
func live(t *testing.T, p config.Paths, b *backend) (done chan error, stop context.CancelFunc) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done = make(chan error, 1)
	ready := make(chan struct{})
	go func() {
		// Ready is not handed to the daemon: it would move the test's stdout into its log.
		done <- Run(ctx, Options{Paths: p, LogLevel: slog.LevelDebug, Open: func(context.Context, *slog.Logger) (Backend, error) {
			close(ready)
			return b, nil
		}})
	}()
	_, _ = r.Close(), w.Close()
	select {
	case <-ready:
	case err := <-done:
		t.Fatalf("the daemon ended: %v", err)
	}
	c := clientOf(t, p, "")
	deadline := time.Now().Add(5 * time.Second)
	for {
		if up, err := c.Running(t.Context()); err != nil {
			t.Fatal(err)
		} else if up {
			return done, stop
		}
		if time.Now().After(deadline) {
			t.Fatal("the daemon does not listen")
		}
		time.Sleep(time.Millisecond)
	}
}

func ended(t *testing.T, done chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(10 * time.Second):
		t.Fatal("the daemon does not end")
		return nil
	}
}

func TestLife(t *testing.T) {
	p, b := place(t), &backend{}
	done, _ := live(t, p, b)
	for path, mode := range map[string]os.FileMode{
		p.Runtime: 0o700, p.State: 0o700, p.Socket(): 0o600, filepath.Join(p.Runtime, bangerv1.DialSocketName): 0o600, p.DaemonLog(): 0o600,
	} {
		fi, err := os.Stat(path)
		if err != nil || fi.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v; want %o", path, fi.Mode(), err, mode)
		}
	}
	c := clientOf(t, p, "")
	s, err := c.Daemon.GetStatus(t.Context(), &bangerv1.GetStatusRequest{})
	if err != nil || s.GetPid() != int32(os.Getpid()) || s.GetSocket() != p.Socket() || s.GetVmm() != "none" {
		t.Errorf("%v, %v", s, err)
	}

	// A watcher does not hold the end up.
	watched := make(chan error, 1)
	watching := make(chan struct{})
	go func() {
		_, err := c.WatchOperation(t.Context(), "op", client.Watcher{Changed: func(*bangerv1.Operation) { close(watching) }})
		watched <- err
	}()
	<-watching
	start := time.Now()
	if _, err := c.Daemon.Shutdown(t.Context(), &bangerv1.ShutdownRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := ended(t, done); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("the end took %v", took)
	}
	if err := <-watched; !fault.Is(err, fault.Unavailable) {
		t.Errorf("the watch ended with %v", err)
	}
	if n := b.closed.Load(); n != 1 {
		t.Errorf("the backend was closed %d times", n)
	}
	left, err := os.ReadDir(p.Runtime)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// Whatever a killed daemon left behind is no obstacle.
func TestStaleFiles(t *testing.T) {
	p := place(t)
	if err := errors.Join(p.EnsureState(), p.EnsureRuntime()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{p.Socket(), filepath.Join(p.Runtime, bangerv1.DialSocketName), filepath.Join(p.Runtime, unready("bangerd.sock"))} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		_ = l.Close()
	}
	if err := os.WriteFile(filepath.Join(p.State, lockName), []byte("1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	done, stop := live(t, p, &backend{})
	if _, err := clientOf(t, p, "").Daemon.GetStatus(t.Context(), &bangerv1.GetStatusRequest{}); err != nil {
		t.Error(err)
	}
	stop()
	if err := ended(t, done); err != nil {
		t.Error(err)
	}
}

func TestSecondDaemonIsRefused(t *testing.T) {
	p := place(t)
	done, stop := live(t, p, &backend{})
	err := Run(t.Context(), Options{Paths: p, Open: func(context.Context, *slog.Logger) (Backend, error) {
		t.Error("the second daemon opened the state")
		return nil, errors.New("no")
	}})
	if !fault.Is(err, fault.Exists) || fault.HintOf(err) == "" {
		t.Errorf("got %v", err)
	}
	stop()
	if err := ended(t, done); err != nil {
		t.Error(err)
	}
}

// A daemon that is started while an older one ends takes over when that one is done.
func TestSuccessorWaits(t *testing.T) {
	p := place(t)
	first, release := &backend{}, make(chan struct{})
	closing := make(chan struct{})
	first.closing = func() { close(closing); <-release }
	done, stop := live(t, p, first)
	stop()
	<-closing // the sockets are gone, the lock is held
	opened := make(chan struct{})
	ctx, end := context.WithCancel(t.Context())
	second := make(chan error, 1)
	go func() {
		second <- Run(ctx, Options{Paths: p, Open: func(context.Context, *slog.Logger) (Backend, error) {
			close(opened)
			return &backend{}, nil
		}})
	}()
	select {
	case <-opened:
		t.Error("the successor did not wait")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	if err := ended(t, done); err != nil {
		t.Error(err)
	}
	select {
	case <-opened:
	case <-time.After(5 * time.Second):
		t.Fatal("the successor never took over")
	}
	end()
	if err := ended(t, second); err != nil {
		t.Error(err)
	}
}

func TestForeignSocketDirectory(t *testing.T) {
	p := place(t)
	if err := os.Symlink(t.TempDir(), p.Runtime); err != nil {
		t.Fatal(err)
	}
	err := Run(t.Context(), Options{Paths: p, Open: func(context.Context, *slog.Logger) (Backend, error) { return &backend{}, nil }})
	if !fault.Is(err, fault.Permission) || !strings.Contains(err.Error(), p.Runtime) {
		t.Errorf("got %v", err)
	}
}

// The processes: a client starts this test binary as its daemon.

func self(t *testing.T, mode string) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(childEnv, mode)
	return exe
}

func opened(t *testing.T, p config.Paths) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p.State, "opened"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return len(b)
}

// Ten clients at once start exactly one daemon, in a session of its own, and it logs.
func TestTenClientsStartOneDaemon(t *testing.T) {
	p := place(t)
	exe := self(t, "serve")
	errs := make(chan error, 10)
	pids := make(chan int32, 10)
	for range 10 {
		c := clientOf(t, p, exe)
		go func() {
			s, err := c.Daemon.GetStatus(t.Context(), &bangerv1.GetStatusRequest{})
			pids <- s.GetPid()
			errs <- err
		}()
	}
	var pid int32
	for range 10 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
		got := <-pids
		if pid != 0 && got != pid {
			t.Errorf("pids %d and %d", pid, got)
		}
		pid = got
	}
	if n := opened(t, p); n != 1 {
		t.Errorf("%d daemons opened the state", n)
	}
	if sid, err := unix.Getsid(int(pid)); err != nil || sid != int(pid) {
		t.Errorf("session %d of process %d, %v", sid, pid, err)
	}
	if cwd, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(int(pid)), "cwd")); cwd != "/" {
		t.Errorf("working directory %s, %v", cwd, err)
	}
	if out, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(int(pid)), "fd", "2")); out != p.DaemonLog() {
		t.Errorf("stderr is %s, %v", out, err)
	}
	if was, err := clientOf(t, p, "").Shutdown(t.Context()); !was || err != nil {
		t.Errorf("Shutdown: %v, %v", was, err)
	}
	for _, line := range logLines(t, p) {
		if line["level"] == nil || line["msg"] == nil || line["time"] == nil {
			t.Errorf("not a log record: %v", line)
		}
	}
	if was, err := clientOf(t, p, "").Shutdown(t.Context()); was || err != nil {
		t.Errorf("Shutdown of nothing: %v, %v", was, err)
	}
}

// kill -9 leaves a socket that refuses; the next client is not disturbed.
func TestStartAfterKill(t *testing.T) {
	p := place(t)
	exe := self(t, "serve")
	s, err := clientOf(t, p, exe).Daemon.GetStatus(t.Context(), &bangerv1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(int(s.GetPid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	again, err := clientOf(t, p, exe).Daemon.GetStatus(t.Context(), &bangerv1.GetStatusRequest{})
	if err != nil || again.GetPid() == s.GetPid() {
		t.Fatalf("%v, %v", again, err)
	}
	if was, err := clientOf(t, p, "").Shutdown(t.Context()); !was || err != nil {
		t.Errorf("Shutdown: %v, %v", was, err)
	}
}

// A logout removes XDG_RUNTIME_DIR, a cleaner what is old in /tmp: a daemon that nobody can reach any
// more ends, and the next client gets another.
func TestStartAfterTheSocketWasRemoved(t *testing.T) {
	for name, remove := range map[string]func(config.Paths) error{
		"the directory": func(p config.Paths) error { return os.RemoveAll(p.Runtime) },
		"the socket":    func(p config.Paths) error { return os.Remove(p.Socket()) },
		"renamed":       func(p config.Paths) error { return os.Rename(p.Runtime, p.Runtime+".old") },
	} {
		t.Run(name, func(t *testing.T) {
			p := place(t)
			exe := self(t, "serve")
			s, err := clientOf(t, p, exe).Daemon.GetStatus(t.Context(), &bangerv1.GetStatusRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if err := remove(p); err != nil {
				t.Fatal(err)
			}
			again, err := clientOf(t, p, exe).Daemon.GetStatus(t.Context(), &bangerv1.GetStatusRequest{})
			if err != nil || again.GetPid() == s.GetPid() {
				t.Fatalf("%v, %v", again, err)
			}
			if was, err := clientOf(t, p, "").Shutdown(t.Context()); !was || err != nil {
				t.Errorf("Shutdown: %v, %v", was, err)
			}
		})
	}
}

// What keeps a daemon from starting is what the client reports.
func TestStartFails(t *testing.T) {
	for mode, want := range map[string]struct {
		code fault.Code
		says []string
	}{
		"refuse": {fault.Corrupt, []string{"bundle.json", "is damaged"}},
		"panic":  {fault.Unavailable, []string{"died while starting", "early death"}}, // from the end of the log
	} {
		t.Run(mode, func(t *testing.T) {
			p := place(t)
			_, err := clientOf(t, p, self(t, mode)).Daemon.GetStatus(t.Context(), &bangerv1.GetStatusRequest{})
			if !fault.Is(err, want.code) || fault.HintOf(err) == "" {
				t.Errorf("got %v (%s)", err, fault.CodeOf(err))
			}
			for _, s := range want.says {
				if err == nil || !strings.Contains(err.Error(), s) {
					t.Errorf("%q lacks %q", err, s)
				}
			}
		})
	}
	t.Run("absent", func(t *testing.T) {
		p := place(t)
		_, err := clientOf(t, p, "/nonexistent/bangerd").Daemon.GetStatus(t.Context(), &bangerv1.GetStatusRequest{})
		if !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "/nonexistent/bangerd") {
			t.Errorf("got %v", err)
		}
	})
}

// A client that is interrupted while its daemon waits for a lock leaves no waiting daemon behind.
func TestUnwantedDaemonEnds(t *testing.T) {
	p := place(t)
	if err := errors.Join(p.EnsureState(), p.EnsureRuntime()); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(p.State, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self(t, "serve"), "--ready-fd", "3")
	cmd.ExtraFiles = []*os.File{w}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	select {
	case err := <-exited:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	_ = r.Close()
	select {
	case <-exited:
	case <-time.After(5 * time.Second):
		_ = cmd.Process.Kill()
		<-exited
		t.Error("the daemon still waits")
	}
}

// The log is rotated by size, and stderr moves along.
func TestLogRotates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bangerd.log")
	l, err := openLog(path, false)
	if err != nil {
		t.Fatal(err)
	}
	record := []byte(strings.Repeat("x", 1<<20-1) + "\n")
	for range logMegabytes + 1 {
		if _, err := l.Write(record); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(filepath.Dir(path), "bangerd*.log"))
	if err != nil || len(files) != 2 {
		t.Errorf("%v, %v", files, err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() != 1<<20 || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
}

func logLines(t *testing.T, p config.Paths) []map[string]any {
	t.Helper()
	f, err := os.Open(p.DaemonLog())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out []map[string]any
	for r := bufio.NewReader(f); ; {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return out
		}
		var m map[string]any
		if err := json.Unmarshal(line, &m); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		out = append(out, m)
	}
}
