package system

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
)

// Off ends the machine now, by power-off or by reset, after saying on the console which: where a reset
// is all there is, nothing else tells them apart. Everything must be unmounted and flushed. Returns
// only if the kernel refuses.
func Off(reset bool) error {
	command := unix.LINUX_REBOOT_CMD_POWER_OFF
	cmdline, err := os.ReadFile("/proc/cmdline")
	if reset || err == nil && slices.Contains(strings.Fields(string(cmdline)), boot.PowerOffByReboot) {
		command = unix.LINUX_REBOOT_CMD_RESTART
	}
	Say(boot.EndLine(reset))
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
// first, with whatever is mounted below it. If something is still in use, the kernel makes all of
// them read-only by force, which leaves clean disks as well. Kernel filesystems stay.
func UnmountDisks() error {
	unix.Sync()
	// A mount may be held by one that an earlier pass removes: repeat while a pass gets further.
	for {
		mounts, err := Mounts()
		if err != nil {
			return err
		}
		progress := false
		var busy error
		for _, m := range slices.Backward(mounts) {
			switch {
			case isDisk(m):
				if err := unix.Unmount(m.Path, unix.UMOUNT_NOFOLLOW); err != nil {
					busy = errors.Join(busy, PathError("unmount", m.Path, err))
					continue
				}
				progress = true
			case belowDisk(m, mounts):
				// systemd leaves control groups in use; detached they no longer hold the root.
				progress = unix.Unmount(m.Path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil || progress
			}
		}
		switch {
		case busy == nil:
			// "Unmounting" the root of this process makes it read-only and succeeds (do_umount in fs/namespace.c). Where
			// that is an overlay, the filesystem above which it lies is still mounted, and no mount shows it any more.
			if left, err := Mounts(); err != nil || slices.ContainsFunc(left, isDisk) {
				return errors.Join(err, remountReadOnly())
			}
			unix.Sync()
			return nil
		case !progress:
			if err := remountReadOnly(); err != nil {
				return errors.Join(busy, err)
			}
			return nil
		}
	}
}

// remountReadOnly is the kernel's emergency remount (sysrq 'u'): every filesystem on a block device
// becomes read-only, files open for writing or not, also those that no mount of ours shows, like
// the upper one of an overlay. It runs on a work queue and says only in the kernel's log when it
// is done.
func remountReadOnly() error {
	const doneTime = 10 * time.Second
	log, err := os.OpenFile("/dev/kmsg", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer log.Close()
	if _, err := log.Seek(0, io.SeekEnd); err != nil {
		return err
	}
	if err := log.SetReadDeadline(time.Now().Add(doneTime)); err != nil {
		return err
	}
	if err := os.WriteFile("/proc/sysrq-trigger", []byte("u"), 0); err != nil {
		return err
	}
	line := make([]byte, 8<<10) // one record a read
	for {
		n, err := log.Read(line)
		if err != nil && !errors.Is(err, unix.EPIPE) { // EPIPE: records were overwritten meanwhile
			return fmt.Errorf("emergency remount: %w", err)
		}
		if strings.Contains(string(line[:max(n, 0)]), "Emergency Remount complete") {
			unix.Sync()
			return nil
		}
	}
}

func isDisk(m Mount) bool { return !slices.Contains(kernelOnly, m.FSType) }

func belowDisk(m Mount, all []Mount) bool {
	return slices.ContainsFunc(all, func(o Mount) bool {
		return isDisk(o) && o.Path != "/" && strings.HasPrefix(m.Path, o.Path+"/")
	})
}
