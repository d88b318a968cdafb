//go:build e2e

package qemu

import (
	"bytes"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/kernel"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/vmmtest"
)

// linux returns the bundle's kernel, and its initrd with the program of testdata/guest as /init.
var linux = sync.OnceValues(func() (vmlinux string, initrd []byte) {
	dir := os.Getenv(bundle.EnvDir)
	if dir == "" {
		panic(bundle.EnvDir + " is not set: it names the runtime bundle whose kernel is booted (make runtime)")
	}
	made, err := os.ReadFile(filepath.Join(dir, "initrd.img"))
	if err != nil {
		panic(err)
	}
	tmp, err := os.MkdirTemp("", "banger-qemu-guest-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(tmp)
	program := filepath.Join(tmp, "init")
	build := exec.Command("go", "build", "-o", program, "./testdata/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		panic(string(out))
	}
	init, err := os.ReadFile(program)
	if err != nil {
		panic(err)
	}
	if initrd, err = kernel.RegenerateInitrd(made, init, "initrd.img"); err != nil {
		panic(err)
	}
	return filepath.Join(dir, "vmlinux"), initrd
})

// newLinux is newSpec with a Linux guest. The kernel is a link, so that a test may take it away.
func newLinux(t *testing.T) vmm.Spec {
	t.Helper()
	vmlinux, initrd := linux()
	s := newSpec(t)
	s.MemoryMiB, s.Cmdline = 192, "quiet random.trust_cpu=on"
	if err := os.Remove(s.Kernel); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(vmlinux, s.Kernel); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.Initrd, initrd, 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestLinuxConformance runs the whole suite with a Linux guest that echoes: nothing is skipped.
func TestLinuxConformance(t *testing.T) {
	c := conformance()
	plain := c.Spec
	c.Spec = func(t *testing.T) vmm.Spec {
		s := newLinux(t)
		s.ID = plain(t).ID
		return s
	}
	c.Leave = func(t *testing.T, s *vmm.Spec, reason string) {
		s.Cmdline += " " + map[string]string{vmm.GuestShutdown: "poweroff", vmm.GuestReset: "reset"}[reason]
	}
	c.Echo = true
	c.Patience = 3 * time.Minute
	c.Golden = "testdata/linux"
	vmmtest.Run(t, c)
}

// TestHostFull lets a guest write more than its host takes. The guest must be paused with a reason,
// go on when there is room, and never see an error. A limit on QEMU's file sizes stands for the full
// disk: it fails the same write(2), and needs neither root nor a filesystem.
func TestHostFull(t *testing.T) {
	signal.Ignore(syscall.SIGXFSZ) // inherited by QEMU; else the limit would kill it
	defer signal.Reset(syscall.SIGXFSZ)
	s := newLinux(t)
	s.Cmdline += " write"
	const size, limit = 16 << 20, 8 << 20
	disk := s.Drives[1].Path
	if err := os.Truncate(disk, size); err != nil {
		t.Fatal(err)
	}
	m := start(t, s)
	setLimit := func(n uint64) {
		t.Helper()
		if err := unix.Prlimit(m.PID(), unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: n, Max: unix.RLIM_INFINITY}, nil); err != nil {
			t.Fatal(err)
		}
	}
	setLimit(limit)
	changes := m.(vmm.Reporter).Changes()
	next := func(want vmm.State, reason string) {
		t.Helper()
		select {
		case c := <-changes:
			if c.State != want || c.Reason != reason {
				t.Fatalf("change %+v, want %s %q", c, want, reason)
			}
		case <-time.After(3 * time.Minute):
			b, _ := os.ReadFile(s.Log)
			t.Fatalf("not %s; the log says:\n%s", want, b)
		}
	}
	next(vmm.Paused, "io-error")
	for range 2 { // no room yet: it goes on and stops again
		if err := m.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		for again := false; !again; {
			select {
			case c := <-changes:
				again = c.State == vmm.Paused
			case <-time.After(3 * time.Minute):
				t.Fatal("it did not stop again")
			}
		}
	}
	setLimit(unix.RLIM_INFINITY)
	if err := m.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitForLog(t, s.Log, "guest: all written")
	got, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	for i := range size >> 20 {
		if block := got[i<<20 : (i+1)<<20]; !bytes.Equal(block, bytes.Repeat([]byte{byte(i + 1)}, 1<<20)) {
			t.Errorf("block %d on the host is not what the guest wrote and flushed", i)
		}
	}
}

// waitForLog waits until the log holds the line, by inotify.
func waitForLog(t *testing.T, path, line string) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_MODIFY); err != nil {
		t.Fatal(err)
	}
	if err := f.SetReadDeadline(time.Now().Add(3 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	for {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), line) {
			return
		}
		if _, err := f.Read(make([]byte, 4096)); err != nil {
			t.Fatalf("the log never said %q: %v\n%s", line, err, b)
		}
	}
}
