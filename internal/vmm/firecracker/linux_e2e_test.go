//go:build e2e

package firecracker

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
	"git.thaloco.com/thaloco/banger/internal/kernel"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/vmmtest"
)

func init() { guest = runGuest }

// runGuest is a guest: it echoes on the agent's port, or ends as the kernel command line says, in the way
// in which the guest program does. The test program itself is the /init, so that a host without Go can
// run these tests; it has to be static.
func runGuest() {
	fail := func(what string, err error) {
		if err != nil {
			system.Say(fmt.Sprintf("guest: %s: %v\n", what, err))
			_ = system.Off(false)
		}
	}
	for _, m := range []struct{ kind, dir string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		_ = os.Mkdir(m.dir, 0o755)
		fail(m.dir, unix.Mount(m.kind, m.dir, m.kind, 0, ""))
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	fail("cmdline", err)
	words := strings.Fields(string(cmdline))
	if off, reset := slices.Contains(words, "poweroff"), slices.Contains(words, "reset"); off || reset {
		_ = system.Off(reset)
	}
	order, err := os.ReadFile("/banger/modules/order")
	fail("modules", err)
	for name := range strings.Lines(string(order)) {
		f, err := os.Open(filepath.Join("/banger/modules", strings.TrimSpace(name)))
		fail("modules", err)
		_ = unix.FinitModule(int(f.Fd()), "", 0) // built in, or of a device that is not there
		_ = f.Close()
	}
	l, err := vsock.Listen(vmm.AgentPort, nil)
	fail("listen", err)
	system.Say("guest: ready\n")
	if conn, err := vsock.Dial(vsock.Host, vmm.UpPort, nil); err == nil { // as the agent does
		_ = conn.Close()
	}
	for {
		conn, err := l.Accept()
		fail("accept", err)
		go func() {
			defer conn.Close()
			_, _ = io.Copy(conn, conn)
		}()
	}
}

// linux returns the bundle's kernel, and its initrd with this test program as /init.
var linux = sync.OnceValues(func() (vmlinux string, initrd []byte) {
	dir := os.Getenv(bundle.EnvDir)
	if dir == "" {
		panic(bundle.EnvDir + " is not set: it names the runtime bundle whose kernel is booted (make runtime)")
	}
	made, err := os.ReadFile(filepath.Join(dir, "initrd.img"))
	if err != nil {
		panic(err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		panic(err)
	}
	if initrd, err = kernel.RegenerateInitrd(made, self, "initrd.img"); err != nil {
		panic(err)
	}
	return filepath.Join(dir, "vmlinux"), initrd
})

// newLinux is newSpec with a Linux guest. The kernel is a link, so that a test may take it away.
func newLinux(t *testing.T) vmm.Spec {
	t.Helper()
	vmlinux, initrd := linux()
	s := newSpec(t)
	s.MemoryMiB, s.Cmdline = 256, "quiet random.trust_cpu=on"
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

// TestLinuxConformance runs the whole suite with a Linux guest that echoes: nothing is skipped. It needs
// a KVM that runs stock kernels.
func TestLinuxConformance(t *testing.T) {
	if usable, why := vmm.KVMUsable(); !usable {
		t.Skip(why)
	}
	newDriver(t) // or skips
	vmmtest.Run(t, linuxConformance())
}

// TestJailedLinuxConformance is that in real jails.
func TestJailedLinuxConformance(t *testing.T) {
	if usable, why := vmm.KVMUsable(); !usable {
		t.Skip(why)
	}
	h := jailHost(t)
	c := linuxConformance()
	// The lab's checkout, and the bundle in it, lies on overlayfs, which maps no ids.
	vmlinux, _ := linux()
	copied := filepath.Join(t.TempDir(), "vmlinux")
	if _, err := disk.Clone(t.Context(), vmlinux, copied); err != nil {
		t.Fatal(err)
	}
	spec := c.Spec
	c.Spec = func(t *testing.T) vmm.Spec {
		s := spec(t)
		if err := errors.Join(os.Remove(s.Kernel), os.Symlink(copied, s.Kernel)); err != nil {
			t.Fatal(err)
		}
		return s
	}
	c.New = func(t *testing.T) vmm.Driver {
		d := newDriver(t)
		d.UseJails(Jails{Jail: h, Want: true, Must: true})
		return d
	}
	vmmtest.Run(t, c)
}

func linuxConformance() vmmtest.Config {
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
	c.Patience = 5 * time.Minute
	c.Golden = "testdata/linux"
	return c
}
