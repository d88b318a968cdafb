package disk

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Templates are empty filesystems that disks are cloned from, in a cache directory that several
// daemons may share. A file is named <label>-<bytes>-<key>.ext4; label is the filesystem's label
// (and thereby its UUID), key its recipe. Templates are never changed.
type Templates struct{ Dir string }

// templateBytes is what a template takes on the disk, rounded up (measured: 1.1 to 1.2 MiB).
const templateBytes = 2 * vm.MiB

// Ensure makes the template of a size unless it is there, and returns its path. It runs mke2fs (18 ms,
// 1.2 MiB), so it belongs to the daemon's start and to image builds, not to the making of a VM.
// size is from vm.MinDiskBytes to vm.MaxDiskBytes. Two callers at once are no obstacle.
func (t Templates) Ensure(ctx context.Context, label string, size int64) (string, error) {
	if err := vm.ValidateDiskSize("template size", size); err != nil {
		return "", err
	}
	tool, err := ext4.FindTool(ctx)
	if err != nil {
		return "", err
	}
	format := ext4.Format{Kind: ext4.Growing, Size: size, Label: label}
	path := filepath.Join(t.Dir, label+"-"+strconv.FormatInt(size, 10)+"-"+format.Key(tool)[:16]+".ext4")
	if sound(path, size) {
		return path, nil
	}
	if err := Remove(path); err != nil { // damaged: the cache may be cleaned by anyone, or a disk failed
		return "", err
	}
	if err := os.MkdirAll(t.Dir, 0o700); err != nil {
		return "", wrap(err, t.Dir)
	}
	out, err := newTemp(t.Dir)
	if err != nil {
		return "", err
	}
	defer out.discard()
	if err := tool.Fill(ctx, out.File, format); err != nil {
		if free, ferr := Free(t.Dir); ferr == nil && fault.Is(err, fault.Exhausted) {
			return "", exhausted(err, t.Dir, templateBytes, free)
		}
		return "", wrap(err, path)
	}
	if err := out.Chmod(0o400); err != nil {
		return "", wrap(err, path)
	}
	if err := out.publish(path); err != nil && (!fault.Is(err, fault.Exists) || !sound(path, size)) {
		return "", err
	}
	return path, nil
}

// Best returns the largest sound template of a label that is not larger than size; it runs nothing.
// The larger the template, the less the guest has to add. fault.NotFound if there is none: Ensure one.
func (t Templates) Best(label string, size int64) (string, error) {
	entries, err := os.ReadDir(t.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", wrap(err, t.Dir)
	}
	best, bestSize := "", int64(0)
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), label+"-")
		bytes, _, more := strings.Cut(rest, "-")
		n, err := strconv.ParseInt(bytes, 10, 64)
		if !ok || !more || err != nil || n > size || n <= bestSize || !strings.HasSuffix(rest, ".ext4") {
			continue
		}
		if path := filepath.Join(t.Dir, e.Name()); sound(path, n) {
			best, bestSize = path, n
		}
	}
	if best == "" {
		return "", fault.New(fault.NotFound, t.Dir, "there is no template %s for a disk of %s", label, vm.FormatSize(size)).
			WithHint("restart the daemon, which makes them: banger daemon stop")
	}
	return best, nil
}

// sound tells whether a template is what its name says.
func sound(path string, size int64) bool {
	fi, err := os.Lstat(path)
	if err != nil || !fi.Mode().IsRegular() || fi.Size() != size {
		return false
	}
	s, err := Inspect(path)
	return err == nil && s.Clean() && s.Bytes() == size
}

// NewFromTemplate makes the disk dst of size bytes from a template or a work seed; the guest enlarges
// the filesystem to it. A disk that is there with this size is left alone (Present): disks appear
// complete or not at all, so it is the one that was wanted, and may hold a user's data.
// fault.Exists if it is there with another size, fault.Invalid if size does not suit the template,
// fault.Corrupt if the template has no clean filesystem, NotFound, Exhausted.
func NewFromTemplate(ctx context.Context, template, dst string, size int64) (Copied, error) {
	fi, err := os.Lstat(dst)
	switch {
	case err == nil && fi.Mode().IsRegular() && fi.Size() == size:
		return Copied{Way: Present}, nil
	case err == nil:
		return Copied{}, fault.New(fault.Exists, dst, "is there already, with %s instead of %s", vm.FormatSize(fi.Size()), vm.FormatSize(size)).
			WithHint("it may hold data: look at it, and move it away to go on")
	case !errors.Is(err, fs.ErrNotExist):
		return Copied{}, wrap(err, dst)
	}
	if err := ValidateSize(filepath.Base(dst), template, size); err != nil {
		return Copied{}, err
	}
	c, err := cloneTo(ctx, template, dst, size)
	if fault.Is(err, fault.Exists) { // somebody else made it since
		if fi, lerr := os.Lstat(dst); lerr == nil && fi.Mode().IsRegular() && fi.Size() == size {
			return Copied{Way: Present}, nil
		}
	}
	return c, err
}

// ValidateSize checks that a disk of size bytes can be made from a template or seed: not smaller than
// it, not larger than its filesystem can be grown. what names the disk. fault.Invalid, NotFound, Corrupt.
func ValidateSize(what, template string, size int64) error {
	s, err := Inspect(template)
	if err != nil {
		return err
	}
	fi, err := os.Stat(template)
	if err != nil {
		return wrap(err, template)
	}
	least := max(s.Bytes(), fi.Size())
	switch {
	case !s.Clean():
		return fault.New(fault.Corrupt, template, "was not unmounted cleanly; disks are not made from it").
			WithHint("build the runtime bundle again: make runtime")
	case fi.Size() < s.Bytes():
		return fault.New(fault.Corrupt, template, "is cut off: its filesystem is %s, the file %s", vm.FormatSize(s.Bytes()), vm.FormatSize(fi.Size())).
			WithHint("build the runtime bundle again: make runtime")
	case size < least:
		return fault.New(fault.Invalid, what, "%s is less than %s, the size of what it is made from", vm.FormatSize(size), vm.FormatSize(least)).
			WithHint("choose at least %s", vm.FormatSize((least+vm.MiB-1)/vm.MiB*vm.MiB))
	case size > s.GrowLimit:
		return tooLarge(what, size, s.GrowLimit)
	}
	return nil
}
