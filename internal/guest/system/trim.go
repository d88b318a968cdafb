package system

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fiTrim is FITRIM, _IOWR('X', 121, struct fstrim_range) (linux/fs.h).
const fiTrim = 3<<30 | 24<<16 | 'X'<<8 | 121

// Trim tells the device below a mounted filesystem which blocks that does not use, as fstrim(8) does, and
// returns how many bytes that was. EOPNOTSUPP in the error if the device takes no discards.
func Trim(path string) (int64, error) {
	dir, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	r := struct{ start, length, least uint64 }{length: ^uint64(0)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), fiTrim, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return 0, PathError("trim", path, errno)
	}
	return int64(r.length), nil
}
