package hostnet

import (
	"errors"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/network/networktest"
)

// TestGiveTAP gives a TAP to another user, as for a jail, and has it be its owner's again; meanwhile somebody may have it open.
func TestGiveTAP(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	h := open(t, sample())
	setUp(t, h)
	name := sample().Plan.TAP(3)
	add := func() {
		t.Helper()
		if err := h.AddTAP(t.Context(), 3, true); err != nil {
			t.Fatal(err)
		}
	}
	owner := func(want int) {
		t.Helper()
		l, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if tap, ok := l.(*netlink.Tuntap); !ok || int(tap.Owner) != want {
			t.Errorf("%+v, want owner %d", l, want)
		}
	}
	add()
	owner(sample().Owner)
	const other = 2_100_000_042
	if err := GiveTAP(name, other); err != nil {
		t.Fatal(err)
	}
	owner(other)

	// A VMM has it open: nobody takes it away, and it is no error.
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		t.Fatal(err)
	}
	if err := GiveTAP(name, 1); !errors.Is(err, unix.EBUSY) {
		t.Errorf("one that is open: %v", err)
	}
	add()
	owner(other)
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	add()
	owner(sample().Owner)

	// What is not there is not made, and what is no TAP is not given.
	for _, none := range []string{sample().Plan.TAP(4), "lo"} {
		if err := GiveTAP(none, other); err == nil {
			t.Errorf("%s is given", none)
		}
	}
	if _, err := os.Stat("/proc/sys/net/ipv4/conf/" + sample().Plan.TAP(4)); err == nil {
		t.Error("a TAP was made")
	}
}
