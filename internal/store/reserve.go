package store

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A disk that guests have filled must not keep the daemon from recording that they are paused, or
// that one is deleted to make room. So a file beside the database keeps a few megabytes, which are
// given up when a write finds the disk full, and taken back when there is plenty again.
const (
	reserveBytes = 4 << 20   // thousands of records; SQLite's own files among them
	plentyBytes  = 256 << 20 // free on the disk before the reserve is taken back
	scarceBytes  = 1 << 20   // less is not enough to open a database: it begins with new files
)

type reserve struct {
	path string
	held bool
}

// openReserve finds or takes the reserve, and gives it up at once if there is no room to work.
func openReserve(database string) *reserve {
	r := &reserve{path: database + ".reserve"}
	_, err := os.Stat(r.path)
	r.held = err == nil
	if r.free() < scarceBytes {
		r.release()
	}
	r.restore()
	return r
}

// release gives the space up and reports whether there was any to give.
func (r *reserve) release() bool {
	held := r.held
	r.held = false
	return held && os.Remove(r.path) == nil
}

// restore takes the space again if there is plenty. That it cannot is no error: all goes on without.
func (r *reserve) restore() {
	if r.held || r.free() < plentyBytes {
		return
	}
	f, err := os.OpenFile(r.path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, reserveBytes)
	if errors.Is(err, unix.EOPNOTSUPP) {
		_, err = f.Write(make([]byte, reserveBytes))
	}
	if errors.Join(err, f.Close()) != nil {
		_ = os.Remove(r.path)
		return
	}
	r.held = true
}

// free is the room on the disk in bytes, plenty if it cannot be known.
func (r *reserve) free() int64 {
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(r.path), &st); err != nil {
		return plentyBytes
	}
	return int64(st.Bavail) * st.Bsize
}
