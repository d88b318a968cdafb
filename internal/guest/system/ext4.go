package system

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Superblock facts of ext4 (kernel documentation, filesystems/ext4/super.rst), offsets in bytes
// from the superblock, which is at byte 1024 of the device.
const (
	superblockAt   = 1024
	blocksLoAt     = 0x4
	logBlockSizeAt = 0x18
	magicAt        = 0x38
	stateAt        = 0x3a
	incompatAt     = 0x60
	blocksHiAt     = 0x150
	ext4Magic      = 0xef53
	incompat64Bit  = 0x80
	stateErrors    = 0x2
)

// ext4ResizeFS is EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64) (linux/ext4.h).
const ext4ResizeFS = 1<<30 | 8<<16 | 'f'<<8 | 16

// FSType tells the filesystem on a device by its magic number; "" if it is none that is known.
func FSType(device string) (string, error) {
	b, err := readAt(device, 0, 4096)
	if err != nil {
		return "", err
	}
	le := binary.LittleEndian
	switch {
	case le.Uint16(b[superblockAt+magicAt:]) == ext4Magic:
		return "ext4", nil
	case string(b[:4]) == "hsqs":
		return "squashfs", nil
	case le.Uint32(b[superblockAt:]) == 0xe0f5e1e2:
		return "erofs", nil
	}
	return "", nil
}

// HasErrors says whether an ext4 filesystem was marked by the kernel as damaged.
func HasErrors(device string) bool {
	b, err := readAt(device, superblockAt, 1024)
	return err == nil && binary.LittleEndian.Uint16(b[stateAt:])&stateErrors != 0
}

func readAt(device string, offset int64, length int) ([]byte, error) {
	f, err := os.Open(device)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, length)
	if _, err := f.ReadAt(b, offset); err != nil {
		return nil, fmt.Errorf("read %s: %w", device, err)
	}
	return b, nil
}

// ext4Size is the size of the filesystem in blocks and of a block in bytes, from the superblock,
// which is current on a mounted filesystem too: it shares the device's page cache.
func ext4Size(device string) (blocks, blockSize int64, err error) {
	b, err := readAt(device, superblockAt, 1024)
	if err != nil {
		return 0, 0, err
	}
	le := binary.LittleEndian
	if le.Uint16(b[magicAt:]) != ext4Magic {
		return 0, 0, fmt.Errorf("%s does not hold an ext4 filesystem", device)
	}
	count := uint64(le.Uint32(b[blocksLoAt:]))
	if le.Uint32(b[incompatAt:])&incompat64Bit != 0 {
		count |= uint64(le.Uint32(b[blocksHiAt:])) << 32
	}
	return int64(count), 1024 << (le.Uint32(b[logBlockSizeAt:]) & 0x1f), nil
}

// Grow enlarges the mounted ext4 filesystem at path to its device and returns its size in bytes
// before and after. It never shrinks. The kernel does it online and through the journal: a crash
// leaves the old size or a larger one.
func Grow(device, path string) (before, after int64, err error) {
	blocks, blockSize, err := ext4Size(device)
	if err != nil {
		return 0, 0, err
	}
	d, err := os.Open(device)
	if err != nil {
		return 0, 0, err
	}
	capacity, err := d.Seek(0, 2)
	if err := errors.Join(err, d.Close()); err != nil {
		return 0, 0, err
	}
	before = blocks * blockSize
	wanted := uint64(capacity / blockSize)
	if wanted <= uint64(blocks) {
		return before, before, nil
	}
	dir, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer dir.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), ext4ResizeFS, uintptr(unsafe.Pointer(&wanted))); errno != 0 {
		return before, before, PathError("grow", path, errno)
	}
	if blocks, blockSize, err = ext4Size(device); err != nil {
		return 0, 0, err
	}
	return before, blocks * blockSize, nil
}
