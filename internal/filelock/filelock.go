// Package filelock owns the wait for a lock of flock(2), which the kernel gives to an open file and takes back with its last descriptor,
// whatever becomes of the process.
//
// It never opens or closes the caller's file, and knows nothing of what a lock is for.
package filelock

import (
	"context"
	"os"

	"golang.org/x/sys/unix"
)

// Wait waits for a file's lock, unix.LOCK_EX or unix.LOCK_SH, until ctx ends. The lock lasts until the file is closed, which is the
// caller's to do in any case: also of one that comes after ctx has ended nothing is left then. Errors are ctx.Err() and those of
// flock(2). Not for two calls at once with the same file.
func Wait(ctx context.Context, f *os.File, how int) error {
	switch err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err {
	case nil:
		return nil
	case unix.EWOULDBLOCK:
	default:
		return os.NewSyscallError("flock", err)
	}
	// flock(2) cannot be called off, so a thread waits on a second descriptor of the same open file, and lets go of it.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("dup", err)
	}
	got := make(chan error, 1)
	go func() {
		defer unix.Close(fd)
		for {
			if err := unix.Flock(fd, how); err != unix.EINTR {
				got <- os.NewSyscallError("flock", err)
				return
			}
		}
	}()
	select {
	case err := <-got:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
