package jail

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// rootSize is what a jail's root may take of the host's memory: Firecracker's program, which the jailer copies there, is 3 MB.
const rootSize = "size=64m,nr_inodes=1024,mode=0755"

// plan is what launch does.
type plan struct {
	programs Programs
	base     string // an empty directory of the host's, over which the tmpfs is mounted, in the jail's mount namespace alone
	marker   string
	owner    int // of the files
	uid      int
	mounts   []mount
	files    []*os.File // for mounts
	gids     []int
	stdin    *os.File
	log      *os.File
}

// launch starts the jailer, which becomes Firecracker. The process is this one's child. Nothing is left of a failure.
func launch(p plan) (child *os.Process, pidfd *os.File, err error) {
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return unsupported(err, "unshare")
		}
		unix.Umask(0o077)
		// While the thread still is where the files' mounts are: no other namespace may bind them.
		trees, err := detachAll(p.mounts, p.files, p.gids, p.owner, p.uid)
		if err != nil {
			return err
		}
		defer closeAll(trees)
		if err := furnish(p, trees); err != nil {
			return err
		}
		// The jailer closes what is above 2 (its close_inherited_fds); before it runs nothing else is open in it.
		if err := unix.CloseRange(3, 1<<31-1, unix.CLOSE_RANGE_CLOEXEC); err != nil && err != unix.ENOSYS && err != unix.EINVAL { // Linux 5.11 has it
			return fmt.Errorf("close_range: %w", err)
		}
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("set no_new_privs: %w", err)
		}
		child, err = os.StartProcess(p.programs.Jailer, append([]string{p.programs.Jailer}, arguments(p.programs, p.base, p.marker, p.uid)...), &os.ProcAttr{
			Dir: "/", Env: []string{}, Files: []*os.File{p.stdin, p.log, p.log},
			Sys: &syscall.SysProcAttr{Setsid: true},
		})
		if err != nil {
			return fault.Wrap(err, fault.Unavailable, p.programs.Jailer, "the jailer cannot be started")
		}
		// Not the one by which the child is waited for: what its new owner sets of it would be set of that one, too.
		fd, err := unix.PidfdOpen(child.Pid, 0)
		if err != nil {
			kill := child.Kill()
			_, wait := child.Wait()
			return errors.Join(os.NewSyscallError("pidfd_open", err), kill, wait)
		}
		pidfd = os.NewFile(uintptr(fd), "pidfd")
		return nil
	})
	return child, pidfd, err
}

func unsupported(err error, call string) error {
	return fault.Wrap(os.NewSyscallError(call, err), fault.Unsupported, "jail", "this host does not let it be made")
}

// furnish makes the jail's root, in a mount namespace that is the calling thread's from then on.
func furnish(p plan, trees []*os.File) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return unsupported(err, "unshare")
	}
	// Nothing that is mounted here is seen elsewhere.
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return unsupported(err, "mount")
	}
	// Not nodev: the jailer makes /dev/kvm. Not noexec: it puts Firecracker there.
	if err := unix.Mount("banger-jail", p.base, "tmpfs", unix.MS_NOSUID, rootSize); err != nil {
		return unsupported(err, "mount")
	}
	// What the jailer will have to: where containers may not, VMs start without a jail, and not never.
	const kvmMajor, kvmMinor = 10, 232 // the kernel's Documentation/admin-guide/devices.txt
	probe := filepath.Join(p.base, "kvm")
	if err := unix.Mknod(probe, unix.S_IFCHR|0o600, int(unix.Mkdev(kvmMajor, kvmMinor))); err != nil {
		return unsupported(err, "mknod")
	}
	if err := os.Remove(probe); err != nil {
		return fault.Wrap(err, fault.Internal, probe, "a place in the jail cannot be made")
	}
	root := rootOf(p.programs, p.base, p.marker)
	for i, m := range p.mounts {
		at := filepath.Join(root, m.at)
		parent := at
		if !m.dir {
			parent = filepath.Dir(at)
		}
		if err := os.MkdirAll(parent, 0o755); err != nil {
			return fault.Wrap(err, fault.Internal, at, "a place in the jail cannot be made")
		}
		if !m.dir {
			if err := os.WriteFile(at, nil, 0o600); err != nil {
				return fault.Wrap(err, fault.Internal, at, "a place in the jail cannot be made")
			}
		}
		if err := unix.MoveMount(int(trees[i].Fd()), "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return unsupported(err, "move_mount")
		}
	}
	// The umask is for what Firecracker makes; the way to drives is to be passed.
	drives := filepath.Join(root, "drives")
	if err := os.Chmod(drives, 0o755); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fault.Wrap(err, fault.Internal, drives, "a place in the jail cannot be made")
	}
	return nil
}
