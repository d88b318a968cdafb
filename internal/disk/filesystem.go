package disk

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Filesystem is what a directory's filesystem means for the disks in it.
type Filesystem struct {
	Name   string // as mount(8) has it, or its number in statfs(2)
	Clones bool   // disks are copied without copying blocks (FICLONE, ioctl_ficlone(2))
	// Doubt says why disks should not lie there; "" if they may.
	Doubt string
	Free  int64 // bytes for this user
	Total int64
}

// filesystems are those that statfs(2) and the kernel's include/uapi/linux/magic.h name, as far as people keep disks on them.
var filesystems = map[int64]struct{ name, doubt string }{
	unix.EXT4_SUPER_MAGIC:      {"ext4", ""},
	unix.XFS_SUPER_MAGIC:       {"xfs", ""},
	unix.BTRFS_SUPER_MAGIC:     {"btrfs", ""},
	unix.F2FS_SUPER_MAGIC:      {"f2fs", ""},
	0xca451a4e:                 {"bcachefs", ""},
	0x2fc12fc1:                 {"zfs", ""},
	unix.OVERLAYFS_SUPER_MAGIC: {"overlay", ""},
	unix.TMPFS_MAGIC:           {"tmpfs", "it is memory: VMs are gone with the host's next boot"},
	unix.RAMFS_MAGIC:           {"ramfs", "it is memory: VMs are gone with the host's next boot"},
	unix.NFS_SUPER_MAGIC:       {"nfs", "over a network a guest's disk stops with every pause of the server"},
	unix.CIFS_SUPER_MAGIC:      {"cifs", "over a network a guest's disk stops with every pause of the server"},
	unix.SMB2_SUPER_MAGIC:      {"cifs", "over a network a guest's disk stops with every pause of the server"},
	unix.V9FS_MAGIC:            {"9p", "it may not keep what a guest was told is written"},
	unix.MSDOS_SUPER_MAGIC:     {"vfat", "it has no sparse files, and none over 4 GiB"},
	unix.EXFAT_SUPER_MAGIC:     {"exfat", "it has no sparse files: each disk takes all of its size"},
}

// FilesystemOf looks at the filesystem that dir lies on. Nothing is left behind.
func FilesystemOf(dir string) (Filesystem, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return Filesystem{}, wrap(&os.PathError{Op: "statfs", Path: dir, Err: err}, dir)
	}
	f := Filesystem{Name: fmt.Sprintf("%#x", st.Type), Free: int64(st.Bavail) * st.Bsize, Total: int64(st.Blocks) * st.Bsize}
	if known, ok := filesystems[int64(uint32(st.Type))]; ok {
		f.Name, f.Doubt = known.name, known.doubt
	}
	clones, err := clonesIn(dir)
	f.Clones = clones
	return f, err
}

// clonesIn tries it with two files that have no name. A filesystem that has no such files (O_TMPFILE, open(2)) cannot clone
// either: those that can have them.
func clonesIn(dir string) (bool, error) {
	nameless := func() (*os.File, error) {
		fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), dir), nil
	}
	from, err := nameless()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, wrap(&os.PathError{Op: "open", Path: dir, Err: err}, dir)
	}
	defer from.Close()
	if _, err := from.Write(make([]byte, 64<<10)); err != nil { // more than a block of any
		return false, wrap(err, dir)
	}
	to, err := nameless()
	if err != nil {
		return false, wrap(&os.PathError{Op: "open", Path: dir, Err: err}, dir)
	}
	defer to.Close()
	return unix.IoctlFileClone(int(to.Fd()), int(from.Fd())) == nil, nil
}
