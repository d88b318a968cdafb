// Package privatedir owns how sockets in a private directory are reached: only if the directory is
// this user's, and however long its path.
//
// It never makes or changes a directory: internal/config does.
package privatedir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Dir is an open private directory. Close it when no address of it is needed any more.
type Dir struct {
	path string
	fd   int
}

// Open opens a directory. An error for one that is absent matches fs.ErrNotExist. fault.Permission
// if it belongs to somebody else or is a symbolic link: whoever made it could be behind the sockets
// in it.
func Open(path string) (*Dir, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return nil, fault.Wrap(err, fault.Permission, "socket directory", "%s is a file or a symbolic link; a socket in it could be anyone's", path).
			WithHint("remove it: rm %s", path)
	case err != nil:
		return nil, fault.Wrap(err, fault.Permission, "socket directory", "%s cannot be used: %v", path, err).WithHint("check it: ls -ld %s", path)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return nil, fault.Wrap(err, fault.Permission, "socket directory", "%s cannot be looked at: %v", path, err)
	}
	if int(st.Uid) != os.Geteuid() {
		_ = unix.Close(fd)
		return nil, fault.New(fault.Permission, "socket directory", "%s belongs to user %d; you are %d", path, st.Uid, os.Geteuid()).
			WithHint("have %s removed by its owner, or point XDG_RUNTIME_DIR at a directory of your own", path)
	}
	return &Dir{path: path, fd: fd}, nil
}

// Path is the directory's path as it was given.
func (d *Dir) Path() string { return d.path }

// Address is a path to name in the directory that is short enough for sockaddr_un's 108 bytes
// (unix(7)) however deep the directory lies. It is valid in this process until Close.
func (d *Dir) Address(name string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", d.fd, name) }

// Close releases the descriptor.
func (d *Dir) Close() error { return unix.Close(d.fd) }
