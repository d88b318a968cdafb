// Package console owns a VM's log: the file that a VMM appends its guest's serial console and its own
// messages to. It bounds the log's size, since a guest that prints for ever must cost its host bounded
// disk, and knows its form: where one start begins, what was written since, and how the guest said that
// it ended.
//
// The log is cut back in place, while the VMM writes to it: every writer has it open with O_APPEND, so
// that it goes on at the new end. What is kept is the end. It never moves or replaces the file, and
// trusts nothing in it: what a guest prints to mislead only explains that guest's own end.
//
// An offset into a log that is being kept means nothing a moment later: read from the end, as Tail does.
package console

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Bounds of a log, in bytes: one that has grown past Max is cut back to its last Keep, or up to a
// block of the filesystem more.
const (
	Max  = 4 << 20
	Keep = 1 << 20
)

// Bound cuts a log back if it has grown past Max. Fine if there is none.
func Bound(path string) error { return bound(path, unix.Fallocate) }

// bound is Bound by way of a fallocate(2).
func bound(path string, fallocate func(fd int, mode uint32, off, length int64) error) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.Size() <= Max {
		return err
	}
	// The kernel takes whole blocks out, in one step, and nothing that is written meanwhile is lost.
	var vfs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &vfs); err != nil {
		return fmt.Errorf("look at the filesystem of %s: %w", path, err)
	}
	block := max(vfs.Bsize, 1)
	cut := (st.Size() - Keep) / block * block
	err = fallocate(int(f.Fd()), unix.FALLOC_FL_COLLAPSE_RANGE, 0, cut)
	// ext4 and xfs can, others say EOPNOTSUPP (fallocate(2)); EINVAL: a block is larger than it seems.
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		err = moveTail(f)
	}
	if err != nil {
		return fmt.Errorf("cut %s back: %w", path, err)
	}
	return nil
}

// moveTail copies the end of a file to its beginning and cuts the rest off. What is written while the
// copy runs is copied, too; of what is written between the last look and the cut, lines may be lost.
func moveTail(f *os.File) error {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	// from stays ahead of to by what is cut off. A writer that is faster than the copy ends it at Max.
	from, to := end-Keep, int64(0)
	buf := make([]byte, 64<<10)
	for to < Max {
		n, err := f.ReadAt(buf, from)
		if n > 0 {
			if _, err := f.WriteAt(buf[:n], to); err != nil {
				return err
			}
			from, to = from+int64(n), to+int64(n)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	return f.Truncate(to)
}

// Tail returns at most the last n bytes of a file, from the start of a line where it can.
func Tail(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var b []byte
	var from int64
	for range 3 { // again if it was cut back just then: at most once in a while (pause)
		st, err := f.Stat()
		if err != nil {
			return nil, err
		}
		from = max(0, st.Size()-n)
		if b, err = io.ReadAll(io.NewSectionReader(f, from, n)); err != nil {
			return nil, err
		}
		if int64(len(b)) >= st.Size()-from {
			break
		}
	}
	if from > 0 {
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			b = b[i+1:]
		}
	}
	return b, nil
}
