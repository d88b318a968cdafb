package usernet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// readable is what the program reads once it runs: the host's resolvers, which change, and what the kernel says of its network.
// /etc/resolv.conf is a link on most hosts, into one of these.
func readable() []string {
	paths := []string{"/proc/sys/net", "/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf"}
	if to, err := filepath.EvalSymlinks("/etc/resolv.conf"); err == nil {
		paths = append(paths, filepath.Dir(to)) // not the file: it is replaced by another one
	}
	return paths
}

// confineProgram puts the host's files out of the program's reach (landlock(7)): what takes a guest's packets apart is the first that a
// guest would break. errNoLandlock where that cannot be.
func confineProgram() error {
	return confine(readable(), func(trap, a1, a2, a3 uintptr) syscall.Errno {
		_, _, e := syscall.AllThreadsSyscall(trap, a1, a2, a3) // landlock binds a thread, and a Go program has many
		return e
	})
}

var errNoLandlock = errors.New("this kernel, or a program built with cgo, has no landlock")

// confine binds whom do does system calls for, for good: of all files they open those below readable alone, to read, and they
// execute none.
func confine(readable []string, do func(trap, a1, a2, a3 uintptr) syscall.Errno) error {
	version, _, e := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if e != 0 { // not built in, or not turned on
		return errNoLandlock
	}
	attr := unix.LandlockRulesetAttr{Handled_access_fs: 1<<13 - 1} // what there was in version 1
	for since, right := range map[uintptr]uint64{2: unix.LANDLOCK_ACCESS_FS_REFER, 3: unix.LANDLOCK_ACCESS_FS_TRUNCATE, 5: unix.LANDLOCK_ACCESS_FS_IOCTL_DEV} {
		if version >= since {
			attr.Handled_access_fs |= right
		}
	}
	if version >= 6 { // no signals: the threads of a Go program send each other some, which not every kernel tells from others
		attr.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
	}
	fd, _, e := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if e != 0 {
		return os.NewSyscallError("landlock_create_ruleset", e)
	}
	defer unix.Close(int(fd))
	allow := func(path int, access uint64) error {
		rule := unix.LandlockPathBeneathAttr{Allowed_access: access, Parent_fd: int32(path)}
		_, _, e := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, fd, unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
		if e != 0 {
			return os.NewSyscallError("landlock_add_rule", e)
		}
		return nil
	}
	for _, path := range readable {
		dir, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		err = errors.Join(allow(dir, unix.LANDLOCK_ACCESS_FS_READ_FILE|unix.LANDLOCK_ACCESS_FS_READ_DIR), unix.Close(dir))
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	// Or the next call is refused to all but root. The program was started so; it costs nothing to be sure.
	for _, call := range [][4]uintptr{{unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0}, {unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0}} {
		switch e := do(call[0], call[1], call[2], call[3]); {
		case errors.Is(e, syscall.ENOTSUP): // AllThreadsSyscall's word for cgo
			return errNoLandlock
		case e != 0:
			return os.NewSyscallError("landlock_restrict_self", e)
		}
	}
	return nil
}
