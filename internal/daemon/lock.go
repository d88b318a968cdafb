package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/privatedir"
)

const lockName = "bangerd.lock"

// errRunning says that another daemon of the same state directory serves already.
var errRunning = errors.New("another bangerd serves this state directory")

// acquire takes the state directory's lock. While another process holds it, acquire waits: that
// process either ends (a daemon that is shutting down; the lock is ours then) or begins to answer
// on the socket (errRunning). The kernel drops the lock when the process dies, so that nothing
// stale can be left.
func acquire(ctx context.Context, paths config.Paths, sockets *privatedir.Dir) (*os.File, error) {
	path := filepath.Join(paths.State, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fault.Wrap(err, fault.Permission, path, "cannot open the daemon's lock")
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = await(ctx, f, sockets, filepath.Base(paths.Socket()))
	}
	if err != nil {
		_ = f.Close()
		if errors.Is(err, errRunning) {
			return nil, err
		}
		return nil, fault.Wrap(err, fault.CodeOf(err), path, "cannot get the daemon's lock (held by process %s)", holder(path))
	}
	// For people who look; nothing reads it back but holder's message.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	return f, nil
}

func holder(path string) string {
	b, err := os.ReadFile(path)
	if s := strings.TrimSpace(string(b)); err == nil && s != "" {
		return s
	}
	return "unknown"
}

// await waits for the lock or for an answer on the socket, whichever comes first.
func await(ctx context.Context, f *os.File, sockets *privatedir.Dir, name string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	// A daemon listens first and then moves its socket into place (see listen).
	if _, err := unix.InotifyAddWatch(fd, sockets.Path(), unix.IN_MOVED_TO); err != nil {
		return fmt.Errorf("inotify on %s: %w", sockets.Path(), err)
	}
	moved := make(chan struct{}, 1)
	go func() {
		buf := make([]byte, 4096)
		for {
			if _, err := events.Read(buf); err != nil {
				return
			}
			select {
			case moved <- struct{}{}:
			default:
			}
		}
	}()
	// flock(2) cannot be cancelled. The waiting thread has a descriptor of its own, so that a lock
	// that comes after await gave up is let go of again.
	own, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("dup: %w", err)
	}
	locked, gaveUp := make(chan error), make(chan struct{})
	defer close(gaveUp)
	go func() {
		defer unix.Close(own)
		err := unix.Flock(own, unix.LOCK_EX)
		for err == unix.EINTR {
			err = unix.Flock(own, unix.LOCK_EX)
		}
		select {
		case locked <- err:
		case <-gaveUp:
		}
	}()
	for {
		if answers(sockets, name) {
			return errRunning
		}
		select {
		case err := <-locked:
			return err
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func answers(sockets *privatedir.Dir, name string) bool {
	conn, err := net.Dial("unix", sockets.Address(name))
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}
