// Package rootfs owns the look at a root filesystem before it becomes an image: which filesystem it is, whether it
// is whole, and whether what is in it can boot here.
//
// It reads the file and never mounts it, runs no program and changes nothing.
package rootfs

import (
	"encoding/binary"
	"errors"
	"io"
	"os"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// The filesystems that a guest can have as its root.
const (
	Ext4     = "ext4"
	Erofs    = "erofs"
	Squashfs = "squashfs"
)

// Info is what Check found.
type Info struct {
	Filesystem string
	Bytes      int64  // of the filesystem; the file may be longer
	Init       string // path, without symbolic links; "" if the filesystem could not be looked into, or has none and needs none
	// Container is what an image that was made for containers says of the programs that run in it; nil: nothing that a guest
	// could read.
	Container *boot.Container
}

// inits are the paths at which the guest looks for an init, in its order (internal/guest/pid1).
var inits = []string{"/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/etc/init", "/bin/init"}

// Detect tells which filesystem a file holds, and how many bytes it has. fault.Invalid if that is none that a guest
// can have as its root, fault.Corrupt if the file is shorter than its filesystem.
func Detect(path string) (Info, error) {
	f, err := open(path)
	if err != nil {
		return Info{}, err
	}
	defer f.Close()
	return detect(f)
}

func open(path string) (*os.File, error) {
	f, err := os.Open(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, fault.Wrap(err, fault.NotFound, path, "does not exist")
	case err != nil:
		return nil, fault.Wrap(err, fault.Permission, path, "cannot be read").WithHint("check it: ls -l %s", path)
	}
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(fault.Wrap(err, fault.Invalid, path, "is not a regular file").WithHint("give the image file of a filesystem"), f.Close())
	}
	return f, nil
}

func detect(f *os.File) (Info, error) {
	path := f.Name()
	fi, err := f.Stat()
	if err != nil {
		return Info{}, fault.Wrap(err, fault.Internal, path, "cannot be looked at")
	}
	head := make([]byte, 4096)
	if n, err := f.ReadAt(head, 0); n < 2048 {
		return Info{}, fault.Wrap(ignoreEOF(err), fault.Invalid, path, "is too short to hold a filesystem: %d bytes", n)
	}
	le := binary.LittleEndian
	var info Info
	switch {
	case le.Uint16(head[1024+0x38:]) == 0xEF53:
		sb, err := ext4.ReadSuperblock(f, path)
		if err != nil {
			return Info{}, err
		}
		info = Info{Filesystem: Ext4, Bytes: sb.Bytes()}
	case le.Uint32(head[1024:]) == 0xE0F5E1E2: // struct erofs_super_block of the kernel's erofs_fs.h
		bits := head[1024+12]
		if bits < 9 || bits > 16 {
			return Info{}, fault.New(fault.Corrupt, path, "has an erofs superblock with blocks of 2^%d bytes", bits)
		}
		info = Info{Filesystem: Erofs, Bytes: int64(le.Uint32(head[1024+36:])) << bits}
	case string(head[:4]) == "hsqs": // struct squashfs_super_block of the kernel's squashfs_fs.h
		used := le.Uint64(head[40:])
		if used > 1<<62 {
			return Info{}, fault.New(fault.Corrupt, path, "has a squashfs superblock that claims more bytes than a file can have")
		}
		info = Info{Filesystem: Squashfs, Bytes: int64(used)}
	default:
		f := fault.New(fault.Invalid, path, "holds none of the filesystems that a guest can boot from: ext4, erofs, squashfs")
		if what := otherFile(head); what != "" {
			return Info{}, f.WithHint("it looks like %s", what)
		}
		return Info{}, f
	}
	if fi.Size() < info.Bytes {
		return Info{}, fault.New(fault.Corrupt, path, "is cut off: its filesystem is %s, the file %s", vm.FormatSize(info.Bytes), vm.FormatSize(fi.Size())).
			WithHint("copy or download it again")
	}
	return info, nil
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// otherFile names what people give by mistake.
func otherFile(head []byte) string {
	for _, known := range []struct {
		at         int
		magic, say string
	}{
		{0, "QFI\xfb", "a qcow2 image: convert it with qemu-img convert -O raw, and take the root partition out of it"},
		{0, "\x1f\x8b", "a gzip file: unpack it first"}, {0, "\xfd7zXZ", "an xz file: unpack it first"}, {0, "\x28\xb5\x2f\xfd", "a zstd file: unpack it first"},
		{510, "\x55\xaa", "a disk with partitions: take the root partition out of it"},
		{257, "ustar", "a tar archive: banger image pull takes images of containers"},
		{0, "XFSB", "an XFS filesystem"}, {0, "\x7fELF", "a program or a kernel"},
	} {
		if len(head) >= known.at+len(known.magic) && string(head[known.at:known.at+len(known.magic)]) == known.magic {
			return known.say
		}
	}
	return ""
}

// Check is Detect, and for ext4 also a look at what is in it: it was unmounted in order, and has an init for this
// architecture, or says that banger's own is to run. fault.Invalid or fault.Corrupt with the reason if a guest could not boot from it. erofs and squashfs are not
// looked into: a guest that finds no init there says so when it boots.
func Check(path string) (Info, error) {
	f, err := open(path)
	if err != nil {
		return Info{}, err
	}
	defer f.Close()
	info, err := detect(f)
	if err != nil || info.Filesystem != Ext4 {
		return info, err
	}
	r, err := ext4.NewReader(f, path)
	if errors.Is(err, ext4.ErrUnreadable) {
		return info, nil
	}
	if err != nil {
		return info, err
	}
	if !r.Superblock().Clean() {
		return info, fault.New(fault.Invalid, path, "was not unmounted in order: it is mounted now, or its journal has to be replayed").
			WithHint("unmount it, then: e2fsck -f %s", path)
	}
	if info.Container, err = container(r); err == nil && (info.Container == nil || !info.Container.NoInit) {
		info.Init, err = findInit(r, path)
	}
	if errors.Is(err, ext4.ErrUnreadable) {
		return info, nil
	}
	return info, err
}

// container reads what the root filesystem says of its programs, as the guest does (internal/guest/pid1). What cannot be
// understood is as good as nothing: the guest notes it, and boots with the image's init.
func container(r *ext4.Reader) (*boot.Container, error) {
	f, err := r.Lookup(boot.ContainerPath)
	if fault.Is(err, fault.NotFound) || err == nil && (!f.Regular() || f.Size > boot.MaxContainerSize) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	b, err := r.Head(f, boot.MaxContainerSize)
	if err != nil {
		return nil, err
	}
	c, err := boot.ParseContainer(b)
	if err != nil {
		return nil, nil
	}
	return &c, nil
}

func findInit(r *ext4.Reader, path string) (string, error) {
	for _, name := range inits {
		f, err := r.Lookup(name)
		if fault.Is(err, fault.NotFound) {
			continue
		}
		if err != nil {
			return "", err
		}
		if !f.Regular() || !f.Executable() {
			return "", fault.New(fault.Invalid, path, "its init, %s, is not a program", name)
		}
		head, err := r.Head(f, 64)
		if err != nil {
			return "", err
		}
		return f.Path, checkProgram(head, path, f.Path)
	}
	return "", fault.New(fault.Invalid, path, "has no init: a guest would have nothing to start (looked for /sbin/init and systemd)").
		WithHint("install an init in it (Debian: systemd-sysv); images of containers are taken by banger image pull")
}

// machines names the architectures of ELF files (e_machine) that people mix up.
var machines = map[uint16]string{3: "i386", 21: "ppc64", 22: "s390x", 40: "arm", 62: "amd64", 183: "arm64", 243: "riscv64"}

// amd64 is the only architecture that guests have.
const amd64 = 62

// checkProgram refuses a program for another machine. A script is no such thing: its interpreter is the guest's to find.
func checkProgram(head []byte, path, init string) error {
	if len(head) > 2 && string(head[:2]) == "#!" {
		return nil
	}
	if len(head) < 20 || string(head[:4]) != "\x7fELF" {
		return fault.New(fault.Invalid, path, "its init, %s, is neither a program nor a script", init)
	}
	if machine := binary.LittleEndian.Uint16(head[18:]); machine != amd64 || head[4] != 2 || head[5] != 1 {
		name := machines[machine]
		if name == "" || machine == amd64 {
			name = "another architecture"
		}
		return fault.New(fault.Invalid, path, "is for %s: its init, %s, cannot run here", name, init).WithHint("take the image for amd64")
	}
	return nil
}
