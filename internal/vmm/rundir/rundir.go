// Package rundir owns how a VMM's run directory is used: opened, locked, its sockets bound and dialled,
// and cleaned. Drivers share it.
//
// It knows no VMM, and never makes or removes the directory itself.
package rundir

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

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/filelock"
)

// Dir is an open run directory. Sockets in it are bound and dialled by way of /proc/self/fd, since
// its own path may be longer than the 108 bytes of sockaddr_un (unix(7)).
type Dir struct{ f *os.File }

// Open opens the directory under a high descriptor number: QEMU, which gets listening sockets
// whose address holds that number, tries to unlink the address when it ends, and must not have such
// a descriptor itself. The error is an fs.PathError.
func Open(path string) (*Dir, error) {
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
	return &Dir{os.NewFile(uintptr(n), path)}, nil
}

// OpenLocked is Open and Lock for a machine of that name; its errors are faults.
func OpenLocked(ctx context.Context, path, name string) (*Dir, error) {
	dir, err := Open(path)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, name, "its run directory cannot be opened")
	}
	if err := dir.Lock(ctx); err != nil {
		dir.Close()
		return nil, fault.Wrap(err, fault.CodeOf(err), name, "another start or stop of it holds its run directory")
	}
	return dir, nil
}

// Close lets go of the directory and of its lock.
func (r *Dir) Close() { _ = r.f.Close() }

// Name is the path that the directory was opened by.
func (r *Dir) Name() string { return r.f.Name() }

// Path is a short path of a file in the directory, for this process and while the Dir is open.
func (r *Dir) Path(name string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", r.f.Fd(), name)
}

// Lock waits for the directory's flock(2): one Start, Adopt or clean-up at a time, whichever daemon
// or goroutine it comes from. It goes with Close.
func (r *Dir) Lock(ctx context.Context) error {
	err := filelock.Wait(ctx, r.f, unix.LOCK_EX)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("wait for the lock of %s: %w", r.f.Name(), ctx.Err())
	}
	return err
}

// Listen binds a socket in the directory and returns it for a VMM to inherit. Whoever connects from
// then on waits until the VMM accepts, or is refused when it ends: no polling for a path to appear.
func (r *Dir) Listen(name string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.Path(name), Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	return f, errors.Join(err, l.Close())
}

// Dial connects to a socket in the directory, and follows no link: where a VMM may write there, what it puts in the place of its
// socket does not lead its daemon elsewhere. The queue of QEMU's sockets holds one connection beside the one it
// serves: while one that was given up still stands in it, connect(2) says EAGAIN, and nothing tells
// when there is room, hence the bounded retry.
func (r *Dir) Dial(ctx context.Context, name string) (net.Conn, error) {
	const pause = 5 * time.Millisecond
	var d net.Dialer
	fd, err := unix.Openat(int(r.f.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: filepath.Join(r.f.Name(), name), Err: err}
	}
	defer unix.Close(fd)
	for {
		// A link itself is no socket: it refuses.
		conn, err := d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d", fd))
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

// Remove removes files of the directory: what a VMM that is gone left behind. Fine if there are none.
func (r *Dir) Remove(names ...string) error {
	var errs []error
	for _, name := range names {
		if err := unix.Unlinkat(int(r.f.Fd()), name, 0); err != nil && err != unix.ENOENT {
			errs = append(errs, &fs.PathError{Op: "remove", Path: filepath.Join(r.f.Name(), name), Err: err})
		}
	}
	return errors.Join(errs...)
}
