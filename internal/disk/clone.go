package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Way says how a file came to be.
type Way string

// The ways. Present means that it was there already and was left alone.
const (
	Reflink Way = "reflink" // blocks shared with the source, copied on write by the filesystem
	Copy    Way = "copy"    // data copied, holes kept
	Present Way = "present"
)

// Copied is what a clone cost. Bytes is the data written by us: 0 for a reflink.
type Copied struct {
	Way   Way
	Bytes int64
}

// tempPrefix marks our unfinished files: they are flocked while somebody works on them.
const tempPrefix = ".banger-tmp-"

// chunk bounds how long a cancelled copy goes on.
const chunk = 8 << 20

// ficlone shares the blocks of src with dst: ioctl_ficlone(2). Tests replace it.
var ficlone = unix.IoctlFileClone

// Clone makes dst, which must not exist, a copy of src: by reflink where the filesystem can, else by
// copying data and keeping holes. dst appears complete and durable or not at all, 0600.
// fault.NotFound (src), Exists (dst), Exhausted, Permission; context errors when ctx ends.
func Clone(ctx context.Context, src, dst string) (Copied, error) {
	return cloneTo(ctx, src, dst, -1)
}

// cloneTo is Clone to another length; size -1 keeps the source's.
func cloneTo(ctx context.Context, src, dst string, size int64) (c Copied, err error) {
	in, err := openSource(src)
	if err != nil {
		return Copied{}, err
	}
	defer in.Close()
	if _, err := os.Lstat(dst); err == nil {
		return Copied{}, wrap(fs.ErrExist, dst)
	}
	out, err := newTemp(filepath.Dir(dst))
	if err != nil {
		return Copied{}, err
	}
	defer out.discard()
	if c, err = copyInto(ctx, in, out.File, nil); err != nil {
		return Copied{}, wrap(err, dst)
	}
	if size >= 0 {
		if err := out.Truncate(size); err != nil {
			return Copied{}, wrap(err, dst)
		}
	}
	return c, out.publish(dst)
}

func openSource(src string) (*os.File, error) {
	in, err := os.Open(src)
	if err != nil {
		return nil, wrap(err, src)
	}
	if fi, err := in.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(fault.Wrap(err, fault.Precondition, src, "is not a regular file"), in.Close())
	}
	return in, nil
}

// copyInto fills the empty file out with in. It fails if in changes meanwhile.
func copyInto(ctx context.Context, in, out *os.File, progress Progress) (Copied, error) {
	before, err := identify(in)
	if err != nil {
		return Copied{}, err
	}
	c := Copied{Way: Reflink}
	if err := ficlone(int(out.Fd()), int(in.Fd())); err != nil {
		if !cannotClone(err) {
			return Copied{}, os.NewSyscallError("FICLONE", err)
		}
		c.Way = Copy
		if err := roomFor(in, filepath.Dir(out.Name())); err != nil {
			return Copied{}, err
		}
		var total int64
		if total, err = Allocated(in.Name()); err != nil {
			return Copied{}, err
		}
		if c.Bytes, err = sparseCopy(ctx, in, out, before.size, func(done int64) { progress.tell("copied", done, total) }); err != nil {
			return Copied{}, err
		}
	}
	if after, err := identify(in); err != nil || after != before {
		return Copied{}, errors.Join(err, fault.New(fault.Busy, in.Name(), "changed while it was copied").
			WithHint("wait until whatever writes it is done, then try again"))
	}
	return c, nil
}

// roomFor refuses a copy that would fill the disk, instead of filling it first.
func roomFor(in *os.File, dir string) error {
	need, err := Allocated(in.Name())
	if err != nil {
		return err
	}
	free, err := Free(dir)
	if err != nil {
		return err
	}
	if need > free {
		return exhausted(nil, dir, need, free)
	}
	return nil
}

// cannotClone tells errors that mean "not here" from real ones: another filesystem, one without
// reflinks, a file that may not share blocks (btrfs nodatacow), a seccomp filter.
func cannotClone(err error) bool {
	for _, e := range []error{unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL, unix.ENOTTY, unix.ENOSYS, unix.EPERM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// extents calls f for each run of data in a file of that size: lseek(2), SEEK_DATA. A filesystem that
// does not know holes reports one run.
func extents(file *os.File, size int64, f func(offset, length int64) error) error {
	for offset := int64(0); offset < size; {
		start, err := file.Seek(offset, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			return nil // only a hole is left
		case errors.Is(err, unix.EINVAL):
			return f(offset, size-offset)
		case err != nil:
			return err
		}
		end, err := file.Seek(start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		start, end = min(start, size), min(end, size)
		if start < end {
			if err := f(start, end-start); err != nil {
				return err
			}
		}
		offset = end
	}
	return nil
}

// sparseCopy copies the data of in and leaves holes. It returns the bytes written, and tells them on the way.
func sparseCopy(ctx context.Context, in, out *os.File, size int64, tell func(written int64)) (written int64, err error) {
	if err := out.Truncate(size); err != nil {
		return 0, err
	}
	inKernel := true
	var buf []byte
	err = extents(in, size, func(offset, length int64) error {
		for end := offset + length; offset < end; {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			tell(written)
			want := min(end-offset, chunk)
			if inKernel {
				from, to := offset, offset
				n, err := unix.CopyFileRange(int(in.Fd()), &from, int(out.Fd()), &to, int(want), 0)
				switch {
				case err == nil && n > 0:
					offset += int64(n)
					written += int64(n)
					continue
				case err == nil, cannotClone(err):
					// 0 bytes means the end of the file to some filesystems and "not here" to others.
					inKernel = false
				case errors.Is(err, unix.EINTR):
					continue
				default:
					return os.NewSyscallError("copy_file_range", err)
				}
			}
			if buf == nil {
				buf = make([]byte, 1<<20)
			}
			n, err := in.ReadAt(buf[:min(want, int64(len(buf)))], offset)
			if n == 0 {
				if errors.Is(err, io.EOF) {
					return fault.New(fault.Busy, in.Name(), "became shorter while it was copied")
				}
				return err
			}
			if _, err := out.WriteAt(buf[:n], offset); err != nil {
				return err
			}
			offset += int64(n)
			written += int64(n)
		}
		return nil
	})
	return written, err
}

// identity of a file's content, as far as stat(2) tells.
type identity struct {
	dev, ino             uint64
	size                 int64
	mtimeNano, ctimeNano int64
}

func (i identity) String() string {
	return fmt.Sprintf("%d:%d:%d:%d:%d", i.dev, i.ino, i.size, i.mtimeNano, i.ctimeNano)
}

func identify(f *os.File) (identity, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return identity{}, os.NewSyscallError("fstat", err)
	}
	return identity{st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()}, nil
}

// temp is an unfinished file of ours. It is locked, so that Sweep knows it from one left by a crash.
type temp struct {
	*os.File
	published bool
}

func newTemp(dir string) (*temp, error) {
	f, err := os.CreateTemp(dir, tempPrefix+"*") // O_EXCL, 0600
	if err != nil {
		return nil, wrap(err, filepath.Join(dir, tempPrefix))
	}
	t := &temp{File: f}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.discard()
		return nil, wrap(os.NewSyscallError("flock", err), f.Name())
	}
	return t, nil
}

// discard removes the file unless it was published. It is for defer.
func (t *temp) discard() {
	if !t.published {
		_ = os.Remove(t.Name()) // the failure that led here is being returned; Sweep takes what is left
	}
	_ = t.Close() // publish has synced
}

// publish gives the file its name, which must be free, and makes both durable.
func (t *temp) publish(dst string) error {
	if err := t.Sync(); err != nil {
		return wrap(err, dst)
	}
	err := unix.Renameat2(unix.AT_FDCWD, t.Name(), unix.AT_FDCWD, dst, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// Some network filesystems have no RENAME_NOREPLACE; a hard link never replaces either.
		if err = unix.Link(t.Name(), dst); err == nil {
			err = unix.Unlink(t.Name())
		}
	}
	if err != nil {
		return wrap(&fs.PathError{Op: "rename", Path: dst, Err: err}, dst)
	}
	t.published = true
	return syncDir(filepath.Dir(dst))
}

// Sweep removes what a crash left unfinished in dir: our temporary files that nobody works on. It
// returns their names. Fine if dir does not exist.
func Sweep(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, wrap(err, dir)
	}
	var swept []string
	var errs []error
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tempPrefix) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		ok, err := sweepOne(path)
		if ok {
			swept = append(swept, path)
		}
		errs = append(errs, err)
	}
	return swept, errors.Join(errs...)
}

func sweepOne(path string) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // its maker was quicker
	}
	if err != nil {
		return false, wrap(err, path)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return false, nil
		}
		return false, wrap(os.NewSyscallError("flock", err), path)
	}
	return true, wrap(os.RemoveAll(path), path)
}
