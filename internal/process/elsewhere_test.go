package process

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// another starts a child as somebody else would for us, as another user if this is root.
func another(t *testing.T, c Command) Started {
	t.Helper()
	cmd := exec.Command("sh", "-c", "echo ready >&2; read x", c.Marker, c.Marker)
	log, err := os.Create(c.Log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 54321, Gid: 54321}}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	exit, reaped := make(chan syscall.WaitStatus, 1), make(chan struct{})
	go func() {
		defer close(reaped)
		_ = cmd.Wait()
		exit <- cmd.ProcessState.Sys().(syscall.WaitStatus)
		close(exit)
	}()
	t.Cleanup(func() { _ = cmd.Process.Kill(); in.Close(); <-reaped })
	waitFor(t, c.Log, "ready\n")
	return Started{PID: cmd.Process.Pid, PIDFD: os.NewFile(uintptr(fd), "pidfd"), Exit: exit}
}

func wantOver(t *testing.T, p *Process) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(patience):
		t.Fatal("its end is not seen")
	}
}

// TestElsewhere: a process of another user's is found by its pidfile, told from others, and seen to end with its status.
func TestElsewhere(t *testing.T) {
	c, ctx := newCommand(t), t.Context()
	p, err := StartElsewhere(ctx, c.Pidfile, c.Marker, func(context.Context) (Started, error) {
		r, err := readPidfile(c.Pidfile)
		if err != nil || r.PID != starting || !r.Elsewhere {
			t.Errorf("the intent is %+v, %v", r, err)
		}
		return another(t, c), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if !p.Elsewhere() || !p.Carries(c.Marker) || p.Carries("-x") {
		t.Error("it is not known for what it is")
	}
	found, err := Find(ctx, c.Pidfile, c.Marker)
	if err != nil || found.PID() != p.PID() || !found.Elsewhere() {
		t.Fatalf("%+v, %v", found, err)
	}
	if _, err := Find(ctx, c.Pidfile, c.Marker+"-other"); !fault.Is(err, fault.NotFound) {
		t.Errorf("by another marker: %v", err)
	}
	if err := p.Close(); err != nil { // it is watched on, as one of our own
		t.Error(err)
	}
	if err := found.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	wantOver(t, p)
	if ws, ok := p.Status(); !ok || !ws.Signaled() || ws.Signal() != syscall.SIGKILL {
		t.Errorf("status %v, %v", ws, ok)
	}
	if _, ok := found.Status(); ok {
		t.Error("who only found it knows how it ended")
	}
}

// TestTakeIn: what the one who vouches for it knows of is taken in, and found by the pidfile from then on. Signals that this user may not send
// are sent by another.
func TestTakeIn(t *testing.T) {
	c, ctx := newCommand(t), t.Context()
	s := another(t, c)
	p, err := TakeIn(c.Pidfile, c.Marker, s.PID, s.PIDFD)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	again, err := Open(ctx, c.Pidfile, c.Marker)
	if err != nil || again.PID() != s.PID {
		t.Fatal(again, err)
	}
	defer again.Close()
	p.SignalBy(func(int) error { return errors.New("asked") })
	if err := p.Signal(0); os.Geteuid() == 0 && err != nil { // who may, does not ask
		t.Error(err)
	}
	if os.Geteuid() != 0 {
		t.Skip("the rest takes root, for another user")
	}
	// As another user.
	err = asOther(func() error { return p.Signal(9) })
	if err == nil || err.Error() != "asked" {
		t.Errorf("%v", err)
	}
	p.SignalBy(func(int) error { return fault.New(fault.NotFound, "jail", "none runs") })
	if err := asOther(func() error { return p.Signal(9) }); !fault.Is(err, fault.Precondition) {
		t.Errorf("one that ended on the way: %v", err)
	}
	if err := asOther(func() error { return again.Signal(9) }); !fault.Is(err, fault.Permission) {
		t.Errorf("who is not told whom to ask: %v", err)
	}
	if err := p.Kill(ctx); err != nil {
		t.Error(err)
	}
}

// asOther runs f with the rights of another ordinary user, on a thread that is thrown away.
func asOther(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		// Of this thread alone: the C library's, and Go's, are of the process.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 1, 1, 1); errno != 0 {
			done <- errno
			return
		}
		done <- f()
	}()
	return <-done
}

// TestStartElsewhereFails: of what did not start nothing is left.
func TestStartElsewhereFails(t *testing.T) {
	c := newCommand(t)
	want := fault.New(fault.Unsupported, "jail", "there is none")
	if _, err := StartElsewhere(t.Context(), c.Pidfile, c.Marker, func(context.Context) (Started, error) { return Started{}, want }); !fault.Is(err, fault.Unsupported) {
		t.Errorf("%v", err)
	}
	ended := exec.Command("true")
	if err := ended.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(ended.Process.Pid, 0)
	if err := errors.Join(err, ended.Wait()); err != nil {
		t.Fatal(err)
	}
	gone := Started{PID: ended.Process.Pid, PIDFD: os.NewFile(uintptr(fd), "pidfd")}
	if _, err := StartElsewhere(t.Context(), c.Pidfile, c.Marker, func(context.Context) (Started, error) { return gone, nil }); err == nil {
		t.Error("one that has ended was started")
	}
	if left, err := os.ReadDir(c.Dir); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}
