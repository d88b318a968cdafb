package jail

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// userNamespace makes a user namespace in which the owner and the group of files are a jail's user and group, and nobody else is
// anybody. A mount that is given it shows files as the jail's own (mount_setattr(2), "ID-mapped mounts"), and what the jail makes there
// belongs to the owner.
//
// A namespace needs a process: this program again, which is traced, so that it stops before it runs, and is ended. Called on a thread of
// its own, which is the tracer.
func userNamespace(owner, group, uid int) (*os.File, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	pidfd := -1
	child, err := os.StartProcess("/proc/self/exe", []string{"banger-namespace"}, &os.ProcAttr{
		Files: []*os.File{null, null, null},
		Sys: &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: owner, HostID: uid, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: group, HostID: uid, Size: 1}},
			Ptrace:      true, Pdeathsig: syscall.SIGKILL, PidFD: &pidfd,
		},
	})
	if err != nil {
		return nil, fmt.Errorf("a user namespace: %w", err)
	}
	if pidfd >= 0 {
		defer unix.Close(pidfd)
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", child.Pid))
	killed := child.Kill()
	_, waited := child.Wait()
	if err := errors.Join(err, killed, waited); err != nil {
		if ns != nil {
			_ = ns.Close()
		}
		return nil, fmt.Errorf("a user namespace: %w", err)
	}
	return ns, nil
}

// detach makes a mount of an open file or directory, which is nowhere yet, as a jail is to see it. fault.Unsupported if its
// filesystem cannot map ids. The file must be on a mount of the thread's own namespace.
func detach(f *os.File, what string, userns *os.File, readOnly bool) (tree *os.File, err error) {
	fd, err := unix.OpenTree(int(f.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	switch {
	case errors.Is(err, unix.EINVAL):
		return nil, fault.Wrap(err, fault.Unsupported, what, "it lies on a mount that the jailer does not see")
	case errors.Is(err, unix.ENOSYS):
		return nil, fault.Wrap(err, fault.Unsupported, what, "the kernel is too old for jails (Linux 5.12 is not)")
	case errors.Is(err, unix.EPERM):
		return nil, unsupported(err, "open_tree")
	case err != nil:
		return nil, fault.Wrap(err, fault.CodeOf(err), what, "it cannot be mounted")
	}
	tree = os.NewFile(uintptr(fd), what)
	set := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC, Userns_fd: uint64(userns.Fd()), Propagation: unix.MS_PRIVATE}
	if readOnly {
		set.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &set); err != nil {
		_ = tree.Close()
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil, fault.Wrap(err, fault.Unsupported, what, "its filesystem (%s) cannot map user ids with this kernel, so a jail's user could not open it", filesystem(f))
		}
		if errors.Is(err, unix.EPERM) { // root of a container
			return nil, unsupported(err, "mount_setattr")
		}
		return nil, fault.Wrap(err, fault.CodeOf(err), what, "its user ids cannot be mapped")
	}
	return tree, nil
}

// filesystem names the one that a file is on, as far as it is one that is met with.
func filesystem(f *os.File) string {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return "unknown"
	}
	names := map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.XFS_SUPER_MAGIC: "xfs", unix.TMPFS_MAGIC: "tmpfs",
		unix.OVERLAYFS_SUPER_MAGIC: "overlayfs", unix.NFS_SUPER_MAGIC: "nfs", unix.FUSE_SUPER_MAGIC: "fuse", 0x2fc12fc1: "zfs",
	}
	if name, ok := names[st.Type]; ok {
		return name
	}
	return fmt.Sprintf("of type %#x", st.Type)
}

// onThread runs f on a thread of its own, which is thrown away: what f does to its namespaces and its umask is nobody else's.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		// The main thread cannot be thrown away: it would keep the mounts of a jail for as long as this process lives.
		if unix.Gettid() == unix.Getpid() {
			done <- onThread(f) // on another one, since this one is taken
			runtime.UnlockOSThread()
			return
		}
		done <- f() // never unlocked: the thread ends with this goroutine
	}()
	return <-done
}

// detachAll is detach for all that a jail gets. A namespace is made for each group that files have, which is one as a rule.
func detachAll(mounts []mount, files []*os.File, gids []int, owner, uid int) (trees []*os.File, err error) {
	namespaces := map[int]*os.File{}
	defer func() {
		for _, ns := range namespaces {
			_ = ns.Close()
		}
		if err != nil {
			closeAll(trees)
			trees = nil
		}
	}()
	for i, m := range mounts {
		ns := namespaces[gids[i]]
		if ns == nil {
			if ns, err = userNamespace(owner, gids[i], uid); err != nil {
				return trees, fault.Wrap(err, fault.Unsupported, "jail", "user ids cannot be mapped")
			}
			namespaces[gids[i]] = ns
		}
		tree, err := detach(files[i], m.at, ns, m.readOnly)
		if err != nil {
			return trees, err
		}
		trees = append(trees, tree)
	}
	return trees, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}
