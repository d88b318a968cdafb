package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// runDir is an open run directory. Sockets in it are bound and dialled by way of /proc/self/fd, since
// its own path may be longer than the 108 bytes of sockaddr_un (unix(7)).
type runDir struct{ f *os.File }

// openRunDir opens the directory under a high descriptor number: QEMU, which gets listening sockets
// whose address holds that number, tries to unlink the address when it ends, and must not have such
// a descriptor itself.
func openRunDir(path string) (*runDir, error) {
	const high = 1000
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, high)
	if err != nil {
		return nil, &fs.PathError{Op: "dup", Path: path, Err: err}
	}
	return &runDir{os.NewFile(uintptr(n), path)}, nil
}

func (r *runDir) close() { _ = r.f.Close() }

func (r *runDir) path(name string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", r.f.Fd(), name)
}

// lock waits for the directory's flock(2): one Start, Adopt or clean-up at a time, whichever daemon
// or goroutine it comes from. It goes with close.
func (r *runDir) lock(ctx context.Context) error {
	err := unix.Flock(int(r.f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err != unix.EWOULDBLOCK {
		return err
	}
	// flock(2) cannot be interrupted, so a thread waits on a second descriptor of the same open
	// directory. When nobody waits any more, the lock is let go with that descriptor, the last one.
	fd, err := unix.FcntlInt(r.f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	got := make(chan error, 1)
	go func() {
		defer unix.Close(fd)
		for {
			if err := unix.Flock(fd, unix.LOCK_EX); err != unix.EINTR {
				got <- err
				return
			}
		}
	}()
	select {
	case err := <-got:
		return err
	case <-ctx.Done():
		return fmt.Errorf("wait for the lock of %s: %w", r.f.Name(), ctx.Err())
	}
}

// listen binds a socket in the directory and returns it for QEMU to inherit. Whoever connects from
// then on waits until QEMU accepts, or is refused when it ends: no polling for a path to appear.
func (r *runDir) listen(name string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.path(name), Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	return f, errors.Join(err, l.Close())
}

// dial connects to a socket in the directory. QEMU's queue holds one connection beside the one it
// serves: while one that was given up still stands in it, connect(2) says EAGAIN, and nothing tells
// when there is room, hence the bounded retry.
func (r *runDir) dial(ctx context.Context, name string) (net.Conn, error) {
	const pause = 5 * time.Millisecond
	var d net.Dialer
	for {
		conn, err := d.DialContext(ctx, "unix", r.path(name))
		if !errors.Is(err, unix.EAGAIN) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for room in the queue of %s: %w", name, errors.Join(ctx.Err(), err))
		case <-time.After(pause):
		}
	}
}

// clean removes what a QEMU that is gone left behind. Fine if there is nothing.
func (r *runDir) clean() error {
	var errs []error
	for _, name := range []string{monitorSocket, agentSocket, pidfile, pidfile + ".tmp"} {
		if err := unix.Unlinkat(int(r.f.Fd()), name, 0); err != nil && err != unix.ENOENT {
			errs = append(errs, &fs.PathError{Op: "remove", Path: filepath.Join(r.f.Name(), name), Err: err})
		}
	}
	return errors.Join(errs...)
}
