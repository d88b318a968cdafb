// Package disk owns disk image files on the host: cloning, capturing by content, templates, growing,
// removing, and how much room they take.
//
// It never mounts an image and never looks into one beyond the superblock. It runs one program,
// mke2fs, and only to make a template: never to make a VM's disk.
package disk

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// ReserveBytes stay free when something is made: what two disks' journals (64 MiB each) take soon after
// the first boot whatever the guest does, and as much again for what a first boot writes, for the
// database and the logs. A host that is fuller would stop the guest minutes after its creation.
const ReserveBytes = 256 * vm.MiB

// Allocated is how many bytes of the host's disk a file takes: stat(2), st_blocks in units of 512. On
// filesystems with reflinks it counts blocks shared with other files as well.
func Allocated(path string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, wrap(&fs.PathError{Op: "stat", Path: path, Err: err}, path)
	}
	return st.Blocks * 512, nil
}

// Free is how many bytes this user can still write on the filesystem of dir, or of its nearest
// parent that exists: f_bavail of statvfs(3). Quotas are not seen.
func Free(dir string) (int64, error) {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if err == nil {
			return int64(min(st.Bavail, 1<<62/uint64(max(st.Frsize, 1)))) * st.Frsize, nil
		}
		parent := filepath.Dir(dir)
		if !errors.Is(err, unix.ENOENT) || parent == dir {
			return 0, wrap(&fs.PathError{Op: "statfs", Path: dir, Err: err}, dir)
		}
		dir = parent
	}
}

// CheckRoom tells whether need bytes can be written in dir with ReserveBytes left. fault.Exhausted
// otherwise; nothing is reserved.
func CheckRoom(dir string, need int64) error {
	free, err := Free(dir)
	if err != nil {
		return err
	}
	if need+ReserveBytes > free {
		return exhausted(nil, dir, need+ReserveBytes, free)
	}
	return nil
}

func exhausted(cause error, dir string, need, have int64) error {
	return fault.Wrap(cause, fault.Exhausted, dir, "the disk is too full: %s are needed, %s are free", vm.FormatSize(need), vm.FormatSize(have)).
		WithHint("free space on it (df -h %s), delete a VM (banger vm list), or use another disk by BANGER_STATE_DIR", dir)
}

// Inspect reads the superblock of an image. fault.NotFound, fault.Corrupt.
func Inspect(path string) (ext4.Superblock, error) {
	f, err := os.Open(path)
	if err != nil {
		return ext4.Superblock{}, wrap(err, path)
	}
	defer f.Close()
	return ext4.ReadSuperblock(f, path)
}

// State of a disk's filesystem.
type State string

// Clean: unmounted in order. Dirty: mounted now, or not unmounted; its journal will be replayed.
// Errored: the guest's kernel found damage.
const (
	Clean   State = "clean"
	Dirty   State = "dirty"
	Errored State = "errors"
)

// FilesystemState tells how the guest left a disk. fault.NotFound, fault.Corrupt.
func FilesystemState(path string) (State, error) {
	s, err := Inspect(path)
	switch {
	case err != nil:
		return "", err
	case s.Errors:
		return Errored, nil
	case s.Clean():
		return Clean, nil
	}
	return Dirty, nil
}

// Grow enlarges a disk to size bytes; the guest enlarges the filesystem. It only changes the length of
// a sparse file, so a running VM's VMM must be told besides. No effect if it has that size.
// fault.Invalid if it is larger already, fault.NotFound.
func Grow(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return wrap(err, path)
	}
	defer f.Close() // Sync has reported what matters
	if err := checkGrow(f, size); err != nil {
		return err
	}
	if fi, err := f.Stat(); err != nil || fi.Size() == size {
		return wrap(err, path)
	}
	if err := f.Truncate(size); err != nil {
		return wrap(err, path)
	}
	return wrap(f.Sync(), path)
}

func tooLarge(subject string, size, limit int64) error {
	return fault.New(fault.Invalid, subject, "%s is more than %s, the largest its filesystem can become", vm.FormatSize(size), vm.FormatSize(limit)).
		WithHint("choose a size up to %s", vm.FormatSize(limit))
}

// CheckGrow tells whether Grow would, and changes nothing. fault.Invalid if size is smaller than the disk
// or more than its filesystem can become, fault.NotFound.
func CheckGrow(path string, size int64) error {
	f, err := os.Open(path)
	if err != nil {
		return wrap(err, path)
	}
	defer f.Close()
	return checkGrow(f, size)
}

func checkGrow(f *os.File, size int64) error {
	path := f.Name()
	fi, err := f.Stat()
	switch {
	case err != nil:
		return wrap(err, path)
	case !fi.Mode().IsRegular():
		return fault.New(fault.Precondition, path, "is not a regular file")
	case size < fi.Size():
		return fault.New(fault.Invalid, path, "is %s already; a disk cannot be made smaller, and %s is", vm.FormatSize(fi.Size()), vm.FormatSize(size)).
			WithHint("choose a size above %s, or create a new VM", vm.FormatSize(fi.Size()))
	}
	if s, err := ext4.ReadSuperblock(f, path); err == nil && size > s.GrowLimit && size != fi.Size() {
		return tooLarge(path, size, s.GrowLimit)
	}
	return nil
}

// Growth is a disk and the size that it is to have, in bytes.
type Growth struct {
	Path string
	Size int64
}

// GrowAll enlarges several disks, or none: if one cannot be enlarged, those before it get back the length
// that they had. So no VMM may be told of a new length before this returns. Errors are Grow's.
func GrowAll(disks ...Growth) error {
	var was []int64
	for _, d := range disks {
		fi, err := os.Lstat(d.Path)
		if err != nil {
			err = wrap(err, d.Path)
		} else if err = Grow(d.Path, d.Size); err == nil {
			was = append(was, fi.Size())
			continue
		}
		for i, size := range was {
			err = errors.Join(err, os.Truncate(disks[i].Path, size))
		}
		return err
	}
	return nil
}

// Remove deletes a disk, for good: the removal is on the host's disk when it returns. Fine if it is
// gone. fault.Precondition for anything but a regular file.
func Remove(path string) error {
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return wrap(err, path)
	case !fi.Mode().IsRegular():
		return fault.New(fault.Precondition, path, "is not a disk image but %s", fi.Mode().Type())
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return wrap(err, path)
	}
	return syncDir(filepath.Dir(path))
}

// Fingerprint identifies the content of a file without reading it: device, inode, size, times of
// change. Two equal fingerprints of a path mean that nobody wrote to it in between; different
// ones mean nothing. It is for remembering which file was captured already.
func Fingerprint(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", wrap(err, path)
	}
	defer f.Close()
	id, err := identify(f)
	return id.String(), wrap(err, path)
}

// syncDir makes a rename or removal in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return wrap(err, dir)
	}
	defer d.Close()
	return wrap(d.Sync(), dir)
}

// wrap gives a system error its code. nil stays nil; a fault stays as it is.
func wrap(err error, path string) error {
	var f *fault.Error
	if err == nil || errors.As(err, &f) {
		return err
	}
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		dir := filepath.Dir(path)
		free, ferr := Free(dir)
		if ferr != nil {
			free = 0 // the disk is full either way
		}
		return fault.Wrap(err, fault.Exhausted, dir, "the disk is full, %s are free", vm.FormatSize(free)).
			WithHint("free space on it (df -h %s), or delete a VM (banger vm list)", dir)
	case errors.Is(err, fs.ErrNotExist):
		return fault.Wrap(err, fault.NotFound, path, "does not exist")
	case errors.Is(err, fs.ErrExist):
		return fault.Wrap(err, fault.Exists, path, "exists already")
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return fault.Wrap(err, fault.Permission, path, "cannot be accessed").WithHint("check it: ls -l %s", path)
	case errors.Is(err, syscall.EFBIG):
		return fault.Wrap(err, fault.Invalid, path, "is larger than this filesystem lets a file be").WithHint("choose a smaller size")
	case errors.Is(err, syscall.ELOOP):
		return fault.Wrap(err, fault.Precondition, path, "is a symbolic link").WithHint("give the file itself")
	}
	return fault.Wrap(err, fault.Internal, path, "input or output failed")
}
