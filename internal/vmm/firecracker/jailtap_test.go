package firecracker

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/jail"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// TestJailedTAP: a machine in a jail opens its TAP, which was given to it, and no other one. It runs again in a network namespace of its own.
func TestJailedTAP(t *testing.T) {
	const variable = "FIRECRACKER_TEST_NETNS"
	if os.Getenv(variable) == "" {
		jailHost(t) // or skips
		cmd := exec.Command(os.Args[0], "-test.run", "^TestJailedTAP$", "-test.v", "-test.timeout=2m")
		cmd.Env = append(os.Environ(), variable+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		out, err := cmd.CombinedOutput()
		if errors.Is(err, syscall.EPERM) {
			t.Skip("may not make a network namespace: ", err)
		}
		if err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	for _, name := range []string{"bgr-given", "bgr-other"} {
		if err := makeTAP(name, 12345); err != nil {
			t.Fatal(err)
		}
	}
	program, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	h := jail.NewHost(jail.Options{User: os.Geteuid(), Dir: filepath.Join(t.TempDir(), "jails"), GiveTAP: func(name string, uid int) error {
		if name == "bgr-other" { // is somebody else's, still
			return nil
		}
		return hostnet.GiveTAP(name, uid)
	}, Programs: func() (jail.Programs, error) {
		return jail.Programs{Firecracker: program, Jailer: filepath.Join(filepath.Dir(program), "jailer")}, nil
	}})
	d := newDriver(t)
	d.UseJails(Jails{Jail: h, Want: true, Must: true})
	s := newSpec(t)
	s.NICs = []vmm.NIC{{MAC: "02:00:00:00:00:01", TAP: "bgr-given"}}
	m := start(t, d, s)
	l, err := netlink.LinkByName("bgr-given")
	if err != nil {
		t.Fatal(err)
	}
	if tap, ok := l.(*netlink.Tuntap); !ok || !jail.Inside(int(tap.Owner)) {
		t.Errorf("its TAP is %+v", l)
	}
	if err := hostnet.GiveTAP("bgr-given", 0); !errors.Is(err, unix.EBUSY) {
		t.Errorf("nobody has its TAP open: %v", err)
	}
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}

	other := newSpec(t)
	other.NICs = []vmm.NIC{{MAC: "02:00:00:00:00:01", TAP: "bgr-other"}}
	if m, err := d.Start(t.Context(), other); err == nil {
		own(t, m)
		t.Error("it opens a TAP that was not given to it")
	} else if !fault.Is(err, fault.Unavailable) {
		t.Errorf("%v", err)
	}
	wantNothing(t, other)
}

// makeTAP makes a TAP that stays, as hostnet does: of an owner, and of no group.
func makeTAP(name string, owner int) error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	return errors.Join(unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr), unix.IoctlSetInt(fd, unix.TUNSETOWNER, owner), unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1))
}
