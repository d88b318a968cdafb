package system

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// PowerOffByReboot on the kernel command line says that this machine ends by a reset: Firecracker
// has no power switch, a power-off would hang there, and its VMM exits when the guest resets.
const PowerOffByReboot = "banger.poweroff=reboot"

// Off ends the machine now, by power-off or by reset. Everything must be unmounted and flushed.
// Returns only if the kernel refuses.
func Off(reset bool) error {
	command := unix.LINUX_REBOOT_CMD_POWER_OFF
	cmdline, err := os.ReadFile("/proc/cmdline")
	if reset || err == nil && slices.Contains(strings.Fields(string(cmdline)), PowerOffByReboot) {
		command = unix.LINUX_REBOOT_CMD_RESTART
	}
	return fmt.Errorf("reboot: %w", unix.Reboot(command))
}

// Mount is one line of mountinfo (proc_pid_mountinfo(5)).
type Mount struct {
	Path   string
	FSType string
	Device string // "major:minor"
	Source string
}

// Mounts reads this process's mounts in the order they were made.
func Mounts() ([]Mount, error) {
	content, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(string(content)), nil
}

func parseMounts(mountinfo string) []Mount {
	var mounts []Mount
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		fields, rest := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(rest) < 2 {
			continue
		}
		mounts = append(mounts, Mount{Path: unescape(fields[4]), Device: fields[2], FSType: rest[0], Source: unescape(rest[1])})
	}
	return mounts
}

// unescape undoes the octal escapes of space, tab, line end and backslash.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// kernelOnly are filesystems without a disk: nothing is lost if they stay mounted, and the program
// that unmounts needs some of them.
var kernelOnly = []string{"proc", "sysfs", "devtmpfs", "devpts", "tmpfs", "ramfs", "rootfs", "cgroup", "cgroup2",
	"mqueue", "hugetlbfs", "debugfs", "tracefs", "securityfs", "configfs", "bpf", "pstore", "efivarfs",
	"binfmt_misc", "autofs", "fusectl", "nsfs", "rpc_pipefs"}

// UnmountDisks flushes and unmounts every filesystem that is on a disk or over one, the latest
// first, with whatever is mounted below it. What is still in use is made read-only, which leaves a
// clean filesystem as well. The error names what stayed writable. Kernel filesystems stay.
func UnmountDisks() error {
	unix.Sync()
	// A mount may be held by one that an earlier pass removes: repeat while a pass gets further.
	for {
		mounts, err := Mounts()
		if err != nil {
			return err
		}
		progress, left := false, false
		var failed error
		for _, m := range slices.Backward(mounts) {
			if !onDisk(m, mounts) {
				continue
			}
			if err := unix.Unmount(m.Path, unix.UMOUNT_NOFOLLOW); err == nil {
				progress = true
				continue
			} else if isDisk(m) {
				left = true
				failed = errors.Join(failed, PathError("unmount", m.Path, err))
			}
		}
		switch {
		case !left:
			unix.Sync()
			return nil
		case !progress:
			return errors.Join(seal(mounts), withoutSealed(failed))
		}
	}
}

// withoutSealed exists to say why the mounts were sealed instead of unmounted, if anything stayed
// writable; see seal.
func withoutSealed(failed error) error {
	if stillWritable() {
		return failed
	}
	return nil
}

// seal makes what cannot be unmounted read-only: first politely, then by the kernel's emergency
// remount, which does it with files open for writing (sysrq 'u').
func seal(mounts []Mount) error {
	for _, m := range slices.Backward(mounts) {
		if isDisk(m) {
			_ = unix.Mount("", m.Path, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") // judged by stillWritable
		}
	}
	unix.Sync()
	if !stillWritable() {
		return nil
	}
	if err := os.WriteFile("/proc/sysrq-trigger", []byte("u"), 0); err != nil {
		return err
	}
	// The kernel does it on a work queue and tells nobody but its log.
	for range 50 {
		if !stillWritable() {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return errors.New("a filesystem is still writable after the emergency remount")
}

func stillWritable() bool {
	content, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(content)) {
		_, after, _ := strings.Cut(line, " - ")
		rest := strings.Fields(after)
		if len(rest) == 3 && !slices.Contains(kernelOnly, rest[0]) && rest[0] != "overlay" &&
			slices.Contains(strings.Split(rest[2], ","), "rw") {
			return true
		}
	}
	return false
}

func isDisk(m Mount) bool { return !slices.Contains(kernelOnly, m.FSType) }

// onDisk is true for a disk's mount and for anything mounted below one.
func onDisk(m Mount, all []Mount) bool {
	if isDisk(m) {
		return true
	}
	return slices.ContainsFunc(all, func(o Mount) bool {
		return isDisk(o) && o.Path != "/" && strings.HasPrefix(m.Path, o.Path+"/")
	})
}
