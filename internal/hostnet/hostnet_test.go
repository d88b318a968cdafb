package hostnet

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/network/networktest"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

const installation = "a1b2c3d4e5f6"

func sample() Settings {
	return Settings{Bridge: "banger0", Plan: network.Plan{Installation: installation, IPv4: netip.MustParsePrefix("172.16.88.0/22"), IPv6: network.UniqueLocal(installation)}}
}

func open(t testing.TB, s Settings) *Host {
	t.Helper()
	h, err := Open(s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

func addresses(p network.Plan) []netip.Prefix { return []netip.Prefix{p.Host4(), p.Host6()} }

func setUp(t testing.TB, h *Host) {
	t.Helper()
	if _, err := h.Setup(t.Context(), addresses(h.s.Plan)); err != nil {
		t.Fatal(err)
	}
}

// who makes the guests of a policy: nat and group by slot.
func (h *Host) who(t testing.TB, slots int, change func(slot int, g *network.Guest)) network.Policy {
	t.Helper()
	p := network.Policy{Installation: installation, Bridge: h.s.Bridge, TAPPrefix: h.s.Plan.TAPPrefix(), Hosts: []netip.Addr{h.s.Plan.Host4().Addr(), h.s.Plan.Host6().Addr()}}
	for slot := range slots {
		i := h.interfaceOf(t, slot)
		g := network.Guest{TAP: i.TAP, MAC: i.MAC, IPv4: i.IPv4.Addr(), IPv6: i.IPv6.Addr()}
		change(slot, &g)
		p.Guests = append(p.Guests, g)
	}
	return p
}

func (h *Host) interfaceOf(t testing.TB, slot int) vm.Interface {
	t.Helper()
	i, err := h.s.Plan.Interface(slot, 1500)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// state is everything that there is, for comparisons.
func state(t testing.TB, h *Host) string {
	t.Helper()
	var b strings.Builder
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		a := l.Attrs()
		fmt.Fprintln(&b, a.Index, a.Name, l.Type(), a.Alias, a.HardwareAddr, a.MTU, a.MasterIndex, a.Flags, a.Group)
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range addrs {
			fmt.Fprintln(&b, " ", x.IPNet, x.Flags)
		}
	}
	g, err := generation()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(&b, "generation", g)
	return b.String()
}

// TestReconcileTwice: what is as it should be is left alone.
func TestReconcileTwice(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	h := open(t, sample())
	step := func(h *Host) {
		setUp(t, h)
		for slot := range 3 {
			if err := h.AddTAP(t.Context(), slot, slot != 1); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.Policy(t.Context(), h.who(t, 3, func(slot int, g *network.Guest) { g.NAT = slot == 0 })); err != nil {
			t.Fatal(err)
		}
	}
	step(h)
	before := state(t, h)
	step(h)
	if after := state(t, h); after != before {
		t.Errorf("the second time changed something:\n%s\nbefore:\n%s", after, before)
	}
	// Another process, which does not know what the first has set, says it again and changes no device.
	other := open(t, sample())
	step(other)
	trim := func(s string) string { devices, _, _ := strings.Cut(s, "generation"); return devices }
	if after := state(t, h); trim(after) != trim(before) {
		t.Errorf("another daemon changed something:\n%s\nbefore:\n%s", after, before)
	}
	// And the first notices that somebody was there.
	step(h)
	if slots, err := h.TAPs(t.Context()); err != nil || !slices.Equal(slots, []int{0, 1, 2}) {
		t.Errorf("TAPs: %v, %v", slots, err)
	}
	if v, err := readSysctl("ipv4/ip_forward"); v != "1" || err != nil {
		t.Errorf("ip_forward is %q, %v, with a guest that has NAT", v, err)
	}

	// Nothing is left but ip_forward.
	for range 2 {
		if err := h.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "b") {
			t.Errorf("%s is left", l.Attrs().Name)
		}
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	if tables, err := c.ListTables(); err != nil || len(tables) != 0 {
		t.Errorf("%d tables are left, %v", len(tables), err)
	}
	if v, _ := readSysctl("ipv4/ip_forward"); v != "1" {
		t.Error("ip_forward was turned off")
	}
}

// TestForeignBridge: what has the name and is not ours stays as it is.
func TestForeignBridge(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	s := sample()
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: s.Bridge}}); err != nil {
		t.Fatal(err)
	}
	h := open(t, s)
	before := state(t, h)
	if _, err := h.Setup(t.Context(), addresses(s.Plan)); !fault.Is(err, fault.Exists) || !strings.Contains(fault.HintOf(err), `bridge_name = "bgra1b2c3"`) {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	if after := state(t, h); after != before {
		t.Errorf("it changed:\n%s\nbefore:\n%s", after, before)
	}
	if err := h.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := netlink.LinkByName(s.Bridge); err != nil {
		t.Errorf("somebody else's bridge was removed: %v", err)
	}
}

func TestConflictWithTheHostsRoutes(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	s := sample()
	_, _ = veth(t, "uplink", "192.0.2.1/24")
	l, err := netlink.LinkByName("uplink")
	if err != nil {
		t.Fatal(err)
	}
	for _, route := range []string{"172.16.0.0/20", "172.16.90.0/24"} {
		_, dst, err := net.ParseCIDR(route)
		if err != nil {
			t.Fatal(err)
		}
		r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Table: 1000} // as VPNs do
		if err := netlink.RouteAdd(r); err != nil {
			t.Fatal(err)
		}
	}
	h := open(t, s)
	if _, err := h.Setup(t.Context(), addresses(s.Plan)); !fault.Is(err, fault.Exists) || !strings.Contains(err.Error(), "172.16.90.0/24 by uplink") ||
		!strings.Contains(fault.HintOf(err), `cidr = "172.16.16.0/22"`) {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	if _, err := netlink.LinkByName(s.Bridge); err == nil {
		t.Error("the bridge was made nevertheless")
	}
}

// veth makes a link to a namespace that is the world beyond the host, and returns that one's end.
func veth(t *testing.T, name, address string) (world netns.NsHandle, host netlink.Link) {
	t.Helper()
	runtime.LockOSThread()
	here, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	if world, err = netns.New(); err != nil {
		t.Fatal(err)
	}
	if err := netns.Set(here); err != nil {
		t.Fatal(err)
	}
	runtime.UnlockOSThread()
	t.Cleanup(func() { _ = world.Close(); _ = here.Close() })
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: 1400}, PeerName: "world", PeerMTU: 1400, PeerNamespace: netlink.NsFd(int(world))}
	if err := netlink.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	if host, err = netlink.LinkByName(name); err != nil {
		t.Fatal(err)
	}
	configure(t, netlink.LinkByName, netlink.AddrAdd, netlink.LinkSetUp, name, address)
	return world, host
}

func configure(t *testing.T, find func(string) (netlink.Link, error), add func(netlink.Link, *netlink.Addr) error, up func(netlink.Link) error, name string, list ...string) {
	t.Helper()
	l, err := find(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		a, err := netlink.ParseAddr(s)
		if err != nil {
			t.Fatal(err)
		}
		a.Flags = unix.IFA_F_NODAD
		if err := add(l, a); err != nil {
			t.Fatal(err)
		}
	}
	if err := up(l); err != nil {
		t.Fatal(err)
	}
}

// echoes runs a UDP server in the world that answers with the address that it was asked from.
func echoes(t *testing.T, world netns.NsHandle, address string, list ...string) {
	t.Helper()
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends in the world
		if err := netns.Set(world); err != nil {
			ready <- err
			return
		}
		w, err := netlink.NewHandle()
		if err != nil {
			ready <- err
			return
		}
		defer w.Close()
		for _, s := range list {
			l, err := w.LinkByName("world")
			if err != nil {
				ready <- err
				return
			}
			a, err := netlink.ParseAddr(s)
			if err == nil {
				a.Flags = unix.IFA_F_NODAD
				err = w.AddrReplace(l, a)
			}
			if err == nil {
				err = w.LinkSetUp(l)
			}
			if err != nil {
				ready <- err
				return
			}
		}
		c, err := net.ListenPacket("udp", address)
		ready <- err
		if err != nil {
			return
		}
		t.Cleanup(func() { _ = c.Close() })
		b := make([]byte, 2048)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(from.String())
			_, _ = c.WriteTo([]byte(string(b[:n])+" from "+host), from)
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
}

// lab is a host with some guests.
type lab struct {
	*testing.T
	h      *Host
	guests []*guest
	policy network.Policy
	ping   int
}

func newLab(t *testing.T, guests int, change func(slot int, g *network.Guest)) *lab {
	t.Helper()
	l := &lab{T: t, h: open(t, sample())}
	setUp(t, l.h)
	for slot := range guests {
		i := l.h.interfaceOf(t, slot)
		group := network.Guest{}
		change(slot, &group)
		if err := l.h.AddTAP(t.Context(), slot, group.Group == ""); err != nil {
			t.Fatal(err)
		}
		l.guests = append(l.guests, join(t, i))
	}
	l.set(change)
	return l
}

func (l *lab) set(change func(slot int, g *network.Guest)) {
	l.Helper()
	l.policy = l.h.who(l.T, len(l.guests), change)
	if err := l.h.Policy(l.Context(), l.policy); err != nil {
		l.Fatal(err)
	}
}

// mark makes the host send a datagram of its own to a guest, which arrives after whatever is under way.
func (l *lab) mark(g *guest) string {
	l.Helper()
	l.ping++
	text := fmt.Sprintf("the host's datagram %d.", l.ping)
	c, err := net.Dial("udp", netip.AddrPortFrom(g.i.IPv4.Addr(), 7).String())
	if err != nil {
		l.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(text)); err != nil {
		l.Fatal(err)
	}
	return text
}

func (l *lab) bridgeMAC() net.HardwareAddr { return l.h.s.Plan.MAC(bridgeSlot) }

func nothing(int, *network.Guest) {}

func TestGuestsDoNotReachEachOther(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	// 0 and 1 are of a group, 2 of another, 3 of none.
	groups := func(slot int, g *network.Guest) { g.Group = []string{"web", "web", "db", ""}[slot] }
	l := newLab(t, 4, groups)
	say := func(from, to int, six bool, text string) {
		a, b := l.guests[from], l.guests[to]
		if six {
			a.send(a.frame(b.mac, a.i.IPv6.Addr(), b.i.IPv6.Addr(), 9, text))
			return
		}
		a.send(a.frame(b.mac, a.i.IPv4.Addr(), b.i.IPv4.Addr(), 9, text))
	}
	for from := range 4 {
		for to := range 4 {
			for _, six := range []bool{false, true} {
				if from == to {
					continue
				}
				text := fmt.Sprintf("hello from %d to %d, IPv6 %v.", from, to, six)
				say(from, to, six, text)
				if from < 2 && to < 2 {
					l.guests[to].sees(text)
				} else {
					l.guests[to].misses(text, l.mark(l.guests[to]))
				}
			}
		}
	}
	// What goes to all goes to the group alone, and who looks for another's address does not find it.
	a := l.guests[0]
	a.send(a.frame(broadcastMAC, a.i.IPv4.Addr(), netip.MustParseAddr("255.255.255.255"), 9, "to all"))
	l.guests[1].sees("to all")
	l.guests[2].misses("to all", l.mark(l.guests[2]))
	l.guests[3].misses("to all", l.mark(l.guests[3]))
	// Nor by the host as a router, which it is for those with NAT.
	l.set(func(slot int, g *network.Guest) { groups(slot, g); g.NAT = true })
	a.send(a.frame(l.bridgeMAC(), a.i.IPv4.Addr(), l.guests[3].i.IPv4.Addr(), 9, "by the host"))
	l.guests[3].misses("by the host", l.mark(l.guests[3]))

	// Who leaves the group is out of it at once.
	l.set(func(slot int, g *network.Guest) {
		if groups(slot, g); slot == 1 {
			g.Group = ""
		}
	})
	say(0, 1, false, "after the end")
	l.guests[1].misses("after the end", l.mark(l.guests[1]))

	// Isolation holds when somebody flushed the firewall, and the next change puts it up again.
	l.set(nothing)
	for slot := range 4 {
		if err := l.h.AddTAP(t.Context(), slot, true); err != nil {
			t.Fatal(err)
		}
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	c.FlushRuleset()
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	say(0, 1, false, "without a firewall")
	l.guests[1].misses("without a firewall", l.mark(l.guests[1]))
	l.set(nothing)
	if !intact(c, l.policy) {
		t.Error("the rules were not put up again")
	}
}

// TestWatch: whatever anybody does to the firewall is told.
func TestWatch(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	h := open(t, sample())
	ctx, cancel := context.WithCancel(t.Context())
	changed, done := make(chan struct{}, 100), make(chan error, 1)
	go func() { done <- h.Watch(ctx, func() { changed <- struct{}{} }) }()
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	told := func() bool {
		// It may not listen yet: what is done before is of no interest to it.
		for range 50 {
			c.AddTable(&nftables.Table{Name: "others", Family: nftables.TableFamilyINet})
			c.FlushRuleset()
			if err := c.Flush(); err != nil {
				t.Fatal(err)
			}
			select {
			case <-changed:
				return true
			case <-time.After(100 * time.Millisecond):
			}
		}
		return false
	}
	if !told() {
		t.Error("nothing was told")
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("it does not end")
	}
}

// TestSpoofing sends what is not the guest's to a guest of its own group, which would see it.
func TestSpoofing(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	l := newLab(t, 3, func(slot int, g *network.Guest) { g.Group = "web" })
	a, b, c := l.guests[0], l.guests[1], l.guests[2]
	four, six := a.i.IPv4.Addr(), a.i.IPv6.Addr()
	local := netip.MustParseAddr("fe80::a1:b2ff:fec3:0") // of its MAC
	allNodes := netip.MustParseAddr("ff02::1")
	allNodesMAC := net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
	payload := func(f []byte, text string) []byte { return append(f, text...) }
	solicit := func(from, target netip.Addr, text string) []byte {
		return icmp6(from, allNodes, option(append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice()...), text))
	}
	own := map[string][]byte{
		"its own claim":     ether(allNodesMAC, a.mac, unix.ETH_P_IPV6, solicit(netip.IPv6Unspecified(), six, "its own claim")),
		"its IPv4":          a.frame(b.mac, four, b.i.IPv4.Addr(), 9, "its IPv4"),
		"its IPv6":          a.frame(b.mac, six, b.i.IPv6.Addr(), 9, "its IPv6"),
		"its own ARP":       payload(a.arp(1, a.mac, four, make(net.HardwareAddr, 6), b.i.IPv4.Addr().Next()), "its own ARP"),
		"its advertisement": ether(allNodesMAC, a.mac, unix.ETH_P_IPV6, advertise(six, allNodes, six, a.mac, "its advertisement")),
		"from link-local":   a.frame(b.mac, local, b.i.IPv6.Addr(), 9, "from link-local"),
	}
	vlan := a.frame(b.mac, four, b.i.IPv4.Addr(), 9, "in a VLAN")
	vlan = slices.Concat(vlan[:12], []byte{0x81, 0, 0, 1}, vlan[12:])
	otherMAC := a.frame(b.mac, four, b.i.IPv4.Addr(), 9, "another's MAC")
	copy(otherMAC[6:], c.mac)
	unknownMAC := a.frame(b.mac, four, b.i.IPv4.Addr(), 9, "nobody's MAC")
	copy(unknownMAC[6:], []byte{2, 9, 9, 9, 9, 9})
	forged := map[string][]byte{
		"another's IPv4":             a.frame(b.mac, c.i.IPv4.Addr(), b.i.IPv4.Addr(), 9, "another's IPv4"),
		"the host's IPv4":            a.frame(b.mac, l.h.s.Plan.Host4().Addr(), b.i.IPv4.Addr(), 9, "the host's IPv4"),
		"no IPv4":                    a.frame(b.mac, netip.IPv4Unspecified(), b.i.IPv4.Addr(), 9, "no IPv4"),
		"another's IPv6":             a.frame(b.mac, c.i.IPv6.Addr(), b.i.IPv6.Addr(), 9, "another's IPv6"),
		"another's link-local":       a.frame(b.mac, netip.MustParseAddr("fe80::1"), b.i.IPv6.Addr(), 9, "another's link-local"),
		"another's MAC":              otherMAC,
		"nobody's MAC":               unknownMAC,
		"in a VLAN":                  vlan,
		"another's IPv4 by ARP":      payload(a.arp(2, a.mac, c.i.IPv4.Addr(), b.mac, b.i.IPv4.Addr()), "another's IPv4 by ARP"),
		"another's MAC by ARP":       payload(a.arp(2, c.mac, four, b.mac, b.i.IPv4.Addr()), "another's MAC by ARP"),
		"the host's address by ARP":  payload(a.arp(1, a.mac, l.h.s.Plan.Host4().Addr(), b.mac, b.i.IPv4.Addr().Next()), "the host's address by ARP"),
		"reverse ARP":                payload(ether(b.mac, a.mac, 0x8035, make([]byte, 28)), "reverse ARP"),
		"another's address by ND":    ether(allNodesMAC, a.mac, unix.ETH_P_IPV6, advertise(six, allNodes, c.i.IPv6.Addr(), a.mac, "another's address by ND")),
		"a router's advertisement":   ether(allNodesMAC, a.mac, unix.ETH_P_IPV6, icmp6(local, allNodes, option(append([]byte{134, 0, 0, 0}, make([]byte, 12)...), "a router's advertisement"))),
		"a redirect":                 ether(b.mac, a.mac, unix.ETH_P_IPV6, icmp6(local, b.i.IPv6.Addr(), option(append([]byte{137, 0, 0, 0}, make([]byte, 36)...), "a redirect"))),
		"a claim of another's by ND": ether(allNodesMAC, a.mac, unix.ETH_P_IPV6, solicit(netip.IPv6Unspecified(), c.i.IPv6.Addr(), "a claim of another's by ND")),
		"spanning tree":              payload(ether(b.mac, a.mac, 38, make([]byte, 38)), "spanning tree"),
	}
	for text, f := range own {
		a.send(f)
		b.sees(text)
	}
	for text, f := range forged {
		a.send(f)
		b.misses(text, l.mark(b))
	}
	// All of it does arrive where no rule is: the frames are as they should be, and the rules bite.
	nft, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	nft.FlushRuleset()
	if err := nft.Flush(); err != nil {
		t.Fatal(err)
	}
	for text, f := range forged {
		a.send(f)
		b.sees(text)
	}
	if err := l.h.Policy(t.Context(), l.policy); err != nil {
		t.Fatal(err)
	}
	// Frames of another's port are no more its own.
	f := a.frame(b.mac, four, b.i.IPv4.Addr(), 9, "by another port")
	c.send(f)
	b.misses("by another port", l.mark(b))
	// A TAP that waits for its VM lets nothing pass.
	if err := l.h.AddTAP(t.Context(), 3, true); err != nil {
		t.Fatal(err)
	}
	d := join(t, l.h.interfaceOf(t, 3))
	d.send(d.frame(b.mac, d.i.IPv4.Addr(), b.i.IPv4.Addr(), 9, "from a warm TAP"))
	b.misses("from a warm TAP", l.mark(b))
}

func TestHostIsReachedForDNSAlone(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	l := newLab(t, 1, nothing)
	g := l.guests[0]
	heard := make(chan string, 100)
	for _, port := range []string{"53", "54"} {
		for _, family := range []string{"udp4", "udp6"} {
			c, err := net.ListenPacket(family, ":"+port)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			go func() {
				b := make([]byte, 2048)
				for {
					n, from, err := c.ReadFrom(b)
					if err != nil {
						return
					}
					heard <- string(b[:n])
					_, _ = c.WriteTo([]byte("answer to "+string(b[:n])), from)
				}
			}()
		}
	}
	_, _ = veth(t, "uplink", "192.0.2.1/24")
	ask := func(from, to netip.Addr, port uint16, text string) {
		g.send(g.frame(l.bridgeMAC(), from, to, port, text))
	}
	host4, host6 := l.h.s.Plan.Host4().Addr(), l.h.s.Plan.Host6().Addr()
	for round, nat := range []bool{false, true} { // NAT leads beyond the host, not into it
		l.set(func(_ int, x *network.Guest) { x.NAT = nat })
		ask(g.i.IPv4.Addr(), host4, 54, "another port")
		ask(g.i.IPv6.Addr(), host6, 54, "another port by IPv6")
		ask(g.i.IPv4.Addr(), netip.MustParseAddr("192.0.2.1"), 53, "another address")
		ask(g.i.IPv4.Addr(), netip.MustParseAddr("127.0.0.1"), 53, "the loopback")
		last := fmt.Sprintf("DNS by IPv6, round %d", round)
		ask(g.i.IPv4.Addr(), host4, 53, "DNS")
		g.sees("answer to DNS")
		ask(g.i.IPv6.Addr(), host6, 53, last)
		g.sees("answer to " + last)
		for text := ""; text != last; {
			select {
			case text = <-heard:
				if !strings.HasPrefix(text, "DNS") {
					t.Errorf("the host was reached: %q", text)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("the host heard nothing")
			}
		}
	}
	// A TCP connection to DNS is taken, to another port it is not even refused.
	tcp, err := net.Listen("tcp", ":53")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	syn := func(port uint16) {
		g.send(ether(l.bridgeMAC(), g.mac, unix.ETH_P_IP, packet(g.i.IPv4.Addr(), host4, unix.IPPROTO_TCP, transport(unix.IPPROTO_TCP, g.i.IPv4.Addr(), host4, port, ""))))
	}
	answer := func(port uint16) bool {
		for end := time.After(time.Second); ; {
			select {
			case f := <-g.got:
				if len(f) >= 54 && f[23] == unix.IPPROTO_TCP && binary.BigEndian.Uint16(f[34:]) == port {
					return true
				}
			case <-end:
				return false
			}
		}
	}
	syn(53)
	if !answer(53) {
		t.Error("DNS over TCP is not answered")
	}
	syn(22)
	if answer(22) {
		t.Error("another port of the host answers")
	}
	l.policy.HostPorts = []uint16{22}
	if err := l.h.Policy(t.Context(), l.policy); err != nil {
		t.Fatal(err)
	}
	for port, want := range map[uint16]bool{22: true, 23: false} { // nobody listens there: it is refused
		syn(port)
		if answer(port) != want {
			t.Errorf("with port 22 of the host's allowed, port %d answers: %v", port, !want)
		}
	}
}

func TestNAT(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	world, uplink := veth(t, "uplink", "192.0.2.1/24")
	configure(t, netlink.LinkByName, netlink.AddrAdd, netlink.LinkSetUp, "uplink", "2001:db8::1/64")
	echoes(t, world, "192.0.2.2:9", "192.0.2.2/24", "2001:db8::2/64")
	echoes(t, world, "[2001:db8::2]:9")
	for _, gw := range []string{"192.0.2.2", "2001:db8::2"} {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: uplink.Attrs().Index, Gw: net.ParseIP(gw)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := sysctl("ipv6/conf/uplink/accept_ra", "1"); err != nil {
		t.Fatal(err)
	}
	nat := map[int]bool{0: true}
	set := func(slot int, g *network.Guest) { g.NAT = nat[slot] }
	l := newLab(t, 2, set)
	if b, err := netlink.LinkByName(l.h.s.Bridge); err != nil || b.Attrs().MTU != 1400 {
		t.Errorf("the bridge does not have the uplink's MTU: %v, %v", b, err)
	}
	if v, err := readSysctl("ipv6/conf/uplink/accept_ra"); v != "2" || err != nil {
		t.Errorf("accept_ra of the uplink is %q, %v: the host would lose its way out", v, err)
	}
	ask := func(g *guest, six bool, text string) {
		from, to := g.i.IPv4.Addr(), netip.MustParseAddr("192.0.2.2")
		if six {
			from, to = g.i.IPv6.Addr(), netip.MustParseAddr("2001:db8::2")
		}
		g.send(g.frame(l.bridgeMAC(), from, to, 9, text))
	}
	on := func(g *guest, text string) {
		t.Helper()
		ask(g, false, text)
		g.sees(text + " from 192.0.2.1")
		ask(g, true, text+" by IPv6")
		g.sees(text + " by IPv6 from 2001:db8::1")
	}
	off := func(g *guest, text string) {
		t.Helper()
		ask(g, false, text)
		ask(g, true, text)
		g.misses(text+" from", l.mark(g))
	}
	a, b := l.guests[0], l.guests[1]
	on(a, "with NAT")
	off(b, "without NAT")
	nat[1] = true
	l.set(set)
	on(b, "turned on")
	nat[0] = false
	l.set(set)
	off(a, "turned off") // also for the connections that there are
	on(b, "still on")
	nat[0] = true
	l.set(set)
	on(a, "on again")

	// The world reaches no guest by itself, with NAT or without.
	if err := inWorld(world, func() error {
		w, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer w.Close()
		link, err := w.LinkByName("world")
		if err != nil {
			return err
		}
		if err := w.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(l.h.s.Plan.IPv4), Gw: net.ParseIP("192.0.2.1")}); err != nil {
			return err
		}
		c, err := net.Dial("udp", netip.AddrPortFrom(a.i.IPv4.Addr(), 9).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("from the world"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	a.misses("from the world", l.mark(a))
}

// inWorld runs f in a namespace.
func inWorld(world netns.NsHandle, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(world); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// TestDocker puts up what Docker does, as iptables-nft makes it.
func TestDocker(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	world, uplink := veth(t, "uplink", "192.0.2.1/24")
	echoes(t, world, "192.0.2.2:9", "192.0.2.2/24")
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: uplink.Attrs().Index, Gw: net.ParseIP("192.0.2.2")}); err != nil {
		t.Fatal(err)
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	drop := nftables.ChainPolicyDrop
	table := c.AddTable(&nftables.Table{Name: "filter", Family: nftables.TableFamilyIPv4})
	forward := c.AddChain(&nftables.Chain{Name: "FORWARD", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	l := newLab(t, 2, func(_ int, g *network.Guest) { g.NAT = true; g.Group = "web" })
	found, err := l.h.Obstacles()
	if err != nil || len(found) != 1 || found[0].Table != "ip filter" || found[0].Chain != "FORWARD" || !strings.Contains(found[0].Fix, "sudo nft insert rule ip filter FORWARD iifname banger0 accept") {
		t.Errorf("obstacles: %+v, %v", found, err)
	}
	a, b := l.guests[0], l.guests[1]
	ask := func(text string) {
		a.send(a.frame(l.bridgeMAC(), a.i.IPv4.Addr(), netip.MustParseAddr("192.0.2.2"), 9, text))
	}
	ask("before Docker")
	a.misses("before Docker from", l.mark(a))
	user := c.AddChain(&nftables.Chain{Name: dockerChain, Table: table})
	c.InsertRule(&nftables.Rule{Table: table, Chain: forward, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: dockerChain}}})
	c.AddRule(&nftables.Rule{Table: table, Chain: user, Exprs: []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictReturn}}})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	for range 3 { // our rules are there once
		if err := l.h.Policy(t.Context(), l.policy); err != nil {
			t.Fatal(err)
		}
	}
	ask("beside Docker")
	a.sees("beside Docker from 192.0.2.1")
	// With br_netfilter what goes from guest to guest passes Docker's chain as well.
	a.send(a.frame(b.mac, a.i.IPv4.Addr(), b.i.IPv4.Addr(), 9, "in the group"))
	b.sees("in the group")
	rules := func() int {
		r, err := c.GetRules(table, user)
		if err != nil {
			t.Fatal(err)
		}
		return len(r)
	}
	if n := rules(); n != 3 {
		t.Errorf("Docker's chain has %d rules, want its own and two", n)
	}
	if found, err := l.h.Obstacles(); err != nil || len(found) != 0 {
		t.Errorf("obstacles: %+v, %v", found, err)
	}
	if err := l.h.Remove(context.Background()); err != nil {
		t.Fatal(err)
	}
	if n := rules(); n != 1 {
		t.Errorf("%d rules are left in Docker's chain, want its own", n)
	}
}

// TestSweep ends a process in the middle of making 200 TAPs; another one finds and removes them.
func TestSweep(t *testing.T) {
	const many, halfway, childEnv = 200, 100, "BANGER_HOSTNET_TEST_CHILD"
	if os.Getenv(childEnv) != "" {
		h := open(t, sample())
		setUp(t, h)
		for slot := range many {
			if err := h.AddTAP(t.Context(), slot, true); err != nil {
				t.Fatal(err)
			}
			if slot == halfway {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			}
		}
	}
	if !networktest.Inside(t) {
		return
	}
	// A device of somebody else's, with a name that begins alike.
	if err := makeTAP("bgra1b2c3-x", 0); err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0], "-test.run", "^TestSweep$")
	child.Env = append(os.Environ(), childEnv+"=1")
	if out, err := child.CombinedOutput(); err == nil || child.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the child ended otherwise: %v\n%s", err, out)
	}
	h := open(t, sample())
	slots, err := h.TAPs(t.Context())
	if err != nil || len(slots) != halfway+1 {
		t.Fatalf("%d TAPs were left, %v; want %d", len(slots), err, halfway+1)
	}
	setUp(t, h)
	start := time.Now()
	if err := h.DeleteTAPs(t.Context(), append(slots, 777)); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d TAPs in %v", len(slots), time.Since(start))
	if slots, err := h.TAPs(t.Context()); err != nil || len(slots) != 0 {
		t.Errorf("%v are left, %v", slots, err)
	}
	if _, err := netlink.LinkByName("bgra1b2c3-x"); err != nil {
		t.Errorf("somebody else's device is gone: %v", err)
	}
	if _, err := netlink.LinkByName("lo"); err != nil {
		t.Errorf("the loopback is gone: %v", err)
	}
}
