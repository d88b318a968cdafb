// Package cachedir owns which entries of a directory of the cache stay: those that were used last.
//
// An entry is a file or a directory directly in it, used as a whole; the time of its last use is its time of modification. Several
// processes may share the directory. It never makes an entry, and never looks into one.
package cachedir

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/filelock"
)

// Use notes that the entry at path is used now, and reports whether it is there. Keep takes no entry away while Use looks at it, so
// one that is there stays for as long as Keep's callers let entries be young. Errors are ctx's and the filesystem's.
func Use(ctx context.Context, path string) (there bool, err error) {
	dir, err := lock(ctx, filepath.Dir(path), unix.LOCK_SH)
	if err != nil {
		return false, absent(err)
	}
	defer dir.Close()
	now := time.Now()
	err = os.Chtimes(path, now, now)
	if errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission) { // nothing is taken away there either
		_, err = os.Stat(path)
	}
	return err == nil, absent(err)
}

// Keep removes the entries of dir that ours is true of by their names, or all where it is nil, but the n that were used last and those
// that were used within the time young, which somebody may have in hand still. A dir that is not there is empty. Errors are ctx's and
// the filesystem's.
func Keep(ctx context.Context, dir string, n int, young time.Duration, ours func(name string) bool) error {
	d, err := lock(ctx, dir, unix.LOCK_EX)
	if err != nil {
		return absent(err)
	}
	defer d.Close()
	list, err := d.ReadDir(-1)
	if err != nil {
		return err
	}
	type entry struct {
		path string
		used time.Time
	}
	var found []entry
	for _, e := range list {
		if ours != nil && !ours(e.Name()) {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		found = append(found, entry{filepath.Join(dir, e.Name()), info.ModTime()})
	}
	slices.SortFunc(found, func(a, b entry) int { return cmp.Compare(b.used.UnixNano(), a.used.UnixNano()) })
	var errs []error
	for _, e := range found[min(n, len(found)):] {
		if time.Since(e.used) >= young {
			errs = append(errs, os.RemoveAll(e.path))
		}
	}
	return errors.Join(errs...)
}

// lock opens a directory with its lock of flock(2).
func lock(ctx context.Context, path string, how int) (*os.File, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := filelock.Wait(ctx, dir, how); err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	return dir, nil
}

// absent takes what is not there for no error.
func absent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
