package hostnet

import (
	"net"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/network/networktest"
)

// TestAnotherInstallation has the name and the range that every installation begins with: what is proposed works.
func TestAnotherInstallation(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	first := open(t, sample())
	setUp(t, first)
	s := sample()
	s.Plan.Installation, s.Plan.IPv6 = "0123456789ab", network.UniqueLocal("0123456789ab")
	h := open(t, s)
	for _, err := range []error{h.Check(t.Context()), func() error { _, err := h.Setup(t.Context(), addresses(s.Plan)); return err }()} {
		if !fault.Is(err, fault.Exists) || !strings.Contains(err.Error(), "is the bridge of another installation of banger") ||
			!strings.Contains(fault.HintOf(err), `bridge_name = "bgr012345" and cidr = "172.16.0.0/22"`) {
			t.Errorf("%v, hint %q", err, fault.HintOf(err))
		}
	}
	s.Bridge = "bgr012345"
	if err := open(t, s).Check(t.Context()); !fault.Is(err, fault.Exists) || !strings.Contains(err.Error(), "by banger0, the bridge of another installation of banger,") ||
		!strings.Contains(fault.HintOf(err), `cidr = "172.16.0.0/22"`) {
		t.Errorf("with the name alone: %v, hint %q", err, fault.HintOf(err))
	}
	s.Plan.IPv4, _ = prefixOf(mustCIDR(t, "172.16.0.0/22"))
	second := open(t, s)
	setUp(t, second)
	if err := first.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := netlink.LinkByName(s.Bridge); err != nil {
		t.Errorf("the one took the other's bridge away: %v", err)
	}
}

// TestMTUFollowsTheUplink as long as no VM has an interface: those that run keep what they were told.
func TestMTUFollowsTheUplink(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	_, uplink := veth(t, "uplink", "192.0.2.1/24") // of 1400
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: uplink.Attrs().Index, Gw: mustCIDR(t, "192.0.2.2/24").IP}); err != nil {
		t.Fatal(err)
	}
	h := open(t, sample())
	wants := func(when string, want int) {
		t.Helper()
		mtu, err := h.Setup(t.Context(), addresses(h.s.Plan))
		if err == nil {
			err = h.AddTAP(t.Context(), 0, true)
		}
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		b, err := netlink.LinkByName(h.s.Bridge)
		tap, err2 := netlink.LinkByName(h.s.Plan.TAP(0))
		if err != nil || err2 != nil || mtu != want || b.Attrs().MTU != want || tap.Attrs().MTU != want {
			t.Errorf("%s: told %d, the bridge has %d, the TAP %d; want %d", when, mtu, b.Attrs().MTU, tap.Attrs().MTU, want)
		}
	}
	change := func(mtu int) {
		t.Helper()
		if err := netlink.LinkSetMTU(uplink, mtu); err != nil {
			t.Fatal(err)
		}
	}
	wants("at first", 1400)
	change(1320)
	wants("with a TAP that nobody has", 1320)
	join(t, h.interfaceOf(t, 0))
	change(1380)
	wants("with a guest", 1320)
}

func mustCIDR(t *testing.T, s string) *net.IPNet {
	t.Helper()
	ip, n, err := net.ParseCIDR(s)
	if err != nil {
		t.Fatal(err)
	}
	return &net.IPNet{IP: ip, Mask: n.Mask}
}

// TestNoRightToForward is a host whose settings cannot be written, as most containers are: it is said before anything is made, and a VM
// that is given NAT there changes nothing of what others may.
func TestNoRightToForward(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	h := open(t, sample())
	if err := h.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	setUp(t, h)
	if err := h.AddTAP(t.Context(), 0, true); err != nil {
		t.Fatal(err)
	}
	if err := h.Policy(t.Context(), h.who(t, 1, nothing)); err != nil {
		t.Fatal(err)
	}
	before := state(t, h)
	if err := os.WriteFile(sysctls+"ipv4/ip_forward", []byte("0"), 0o644); err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread() // never unlocked: its mounts are its own from here on
	const settings = "/proc/sys"
	for _, step := range []func() error{
		func() error { return unix.Unshare(unix.CLONE_NEWNS) },
		func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		func() error { return unix.Mount(settings, settings, "", unix.MS_BIND, "") },
		func() error { return unix.Mount("", settings, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "") },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.Check(t.Context()); !fault.Is(err, fault.Permission) || !strings.Contains(fault.HintOf(err), `network = "user"`) {
		t.Errorf("the check says %v, hint %q", err, fault.HintOf(err))
	}
	err := h.Policy(t.Context(), h.who(t, 1, func(_ int, g *network.Guest) { g.NAT = true }))
	if !fault.Is(err, fault.Permission) || !strings.Contains(fault.HintOf(err), "sudo sysctl -w net.ipv4.ip_forward=1") {
		t.Errorf("NAT: %v, hint %q", err, fault.HintOf(err))
	}
	if after := state(t, h); after != before {
		t.Errorf("it changed something:\n%s\nbefore:\n%s", after, before)
	}
}
