// Package ownmounts owns how a test gets mounts of its own, and a disk that is as full as it wants. It mounts nothing where others
// see it.
package ownmounts

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Inside runs the calling test again, as a process in a mount namespace of its own, where it may mount what it likes, as root or in a
// user namespace: there it is true, and the test does its work. Elsewhere it is false once that process has passed. It runs
// beside other tests.
func Inside(t *testing.T) bool {
	t.Helper()
	const inside, done = "BANGER_TEST_OWN_MOUNTS", "own mounts: done"
	if os.Getenv(inside) != "" {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { // a test that was skipped, or not found, would pass as well
			if !t.Skipped() {
				fmt.Println(done)
			}
		})
		return true
	}
	t.Parallel()
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if uid := os.Getuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte(done)) {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

// Leave changes the size of the tmpfs at dir, so that so many bytes can still be written to it, without writing any.
func Leave(dir string, bytes uint64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	return unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, fmt.Sprintf("size=%d", (st.Blocks-st.Bfree)*uint64(st.Bsize)+bytes))
}
