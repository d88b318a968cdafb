package pid1

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

// bindNative puts the system disk's own directory over p, which is open as at. The first time, it is filled with what
// the base has there: into a temporary name, flushed, renamed, so that a crash in between starts
// over and never shows a part.
func bindNative(at *os.File, p string) error {
	store := system.SystemMount + "/native"
	own := filepath.Join(store, unitName(p))
	if _, err := os.Lstat(own); errors.Is(err, os.ErrNotExist) {
		if err := seed(at, store, own); err != nil {
			return fmt.Errorf("seed %s: %w", p, err)
		}
	} else if err != nil {
		return err
	}
	return system.PathError("bind", p, unix.Mount(own, magicPath(at), "", unix.MS_BIND, ""))
}

func seed(from *os.File, store, own string) error {
	part := own + ".part"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	c := copier{links: map[inode]string{}}
	if err := c.copy(magicPath(from)+"/.", part); err != nil {
		return err
	}
	d, err := os.Open(store)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return err
	}
	if err := os.Rename(part, own); err != nil {
		return err
	}
	return d.Sync()
}

// fill gives a filesystem that nobody has used, mounted at to, what from holds: one with nothing but lost+found, which goes with
// the first `rm -rf`. The copy has a name of its own until it is whole, and is then moved up entry by entry; after a crash the
// next boot starts over, or goes on.
func fill(from *os.File, to string) error {
	const copied = ".banger-seed"
	entries, err := os.ReadDir(to)
	if err != nil {
		return err
	}
	whole := filepath.Join(to, copied)
	fresh, used, ready := false, false, false
	for _, e := range entries {
		switch e.Name() {
		case "lost+found":
			fresh = true
		case copied:
			ready = true
		case copied + ".part":
		default:
			used = true
		}
	}
	if !ready {
		if used || !fresh {
			return nil
		}
		if err := seed(from, to, whole); err != nil {
			return err
		}
	}
	if entries, err = os.ReadDir(whole); err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == "lost+found" { // that of the image's own filesystem
			continue
		}
		if err := os.Rename(filepath.Join(whole, e.Name()), filepath.Join(to, e.Name())); err != nil {
			return err
		}
	}
	var st unix.Stat_t
	if err := unix.Lstat(whole, &st); err != nil {
		return system.PathError("stat", whole, err)
	}
	return errors.Join(copier{}.attributes(whole, to, &st), os.RemoveAll(whole))
}

type inode struct{ dev, ino uint64 }

// copier copies a tree with owners, modes, times, extended attributes and hard links.
type copier struct{ links map[inode]string }

func (c copier) copy(from, to string) error {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return system.PathError("stat", from, err)
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		id := inode{st.Dev, st.Ino}
		if first, ok := c.links[id]; ok {
			return os.Link(first, to)
		}
		c.links[id] = to
	}
	switch kind {
	case unix.S_IFDIR:
		if err := os.Mkdir(to, 0o700); err != nil {
			return err
		}
		entries, err := os.ReadDir(from)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := c.copy(from+"/"+e.Name(), filepath.Join(to, e.Name())); err != nil {
				return err
			}
		}
	case unix.S_IFREG:
		if err := copyFile(from, to, 0o600); err != nil {
			return err
		}
	case unix.S_IFLNK:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		if err := os.Symlink(target, to); err != nil {
			return err
		}
	default:
		if err := unix.Mknod(to, st.Mode, int(st.Rdev)); err != nil {
			return system.PathError("mknod", to, err)
		}
	}
	return c.attributes(from, to, &st)
}

// attributes sets the owner first, since chown clears setuid bits and capabilities.
func (c copier) attributes(from, to string, st *unix.Stat_t) error {
	if err := os.Lchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := copyXattrs(from, to); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
			return system.PathError("chmod", to, err)
		}
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	return system.PathError("utimes", to, unix.UtimesNanoAt(unix.AT_FDCWD, to, times, unix.AT_SYMLINK_NOFOLLOW))
}

// copyXattrs copies all but overlayfs's own attributes, which mean nothing elsewhere.
func copyXattrs(from, to string) error {
	names := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err := unix.Llistxattr(from, names)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return system.PathError("listxattr", from, err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value := make([]byte, 64<<10) // XATTR_SIZE_MAX
		n, err := unix.Lgetxattr(from, name, value)
		if err != nil {
			return system.PathError("getxattr", from, err)
		}
		if err := unix.Lsetxattr(to, name, value[:n], 0); err != nil {
			return system.PathError("setxattr", to, err)
		}
	}
	return nil
}
