// Package hostnet owns what a bridge network is made of on the host: the bridge, the TAP devices, their
// addresses and settings, and the firewall's tables. It is the privileged part: its methods are the few
// verbs that need root (CAP_NET_ADMIN), each of which can be repeated.
//
// It decides nothing: what there is to be comes from internal/network. It executes no program, and never
// changes what is not this installation's: devices are known by their names and hardware addresses,
// tables by their names, which carry the installation's id. Two exceptions are said where they are made:
// ip_forward, which is turned on and never off, and two rules of ours in Docker's chain for users.
package hostnet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/network"
)

// answerTime bounds one request to the kernel, which answers at once unless something is very wrong.
const answerTime = 10 * time.Second

// bridgeSlot is the slot whose MAC is the bridge's: the one after the last that a plan has addresses for.
const bridgeSlot = 1<<16 - 1

// Settings say what one installation's network is called and where it lies.
type Settings struct {
	Plan   network.Plan
	Bridge string // name of the bridge, at most 15 characters
	Owner  int    // user id that may open the TAPs
}

// Host is the network namespace of the process that made it. Safe for concurrent use.
type Host struct {
	s  Settings
	nl *netlink.Handle

	rules rules

	mu    sync.Mutex // guards what follows, and that one goroutine at a time measures and acts
	index int        // of the bridge, when it was last seen
	mtu   int
}

// Open returns a Host. It makes nothing. fault.Unavailable if the kernel cannot be spoken to.
func Open(s Settings) (*Host, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err == nil {
		err = h.SetSocketTimeout(answerTime)
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, s.Bridge, "the kernel's network configuration cannot be reached")
	}
	return &Host{s: s, nl: h, rules: rules{bridge: s.Bridge}}, nil
}

// Close releases what Open took. The network stays as it is.
func (h *Host) Close() { h.nl.Close() }

func failed(err error, subject, format string, args ...any) *fault.Error {
	code := fault.Internal
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EROFS) {
		code = fault.Permission
	}
	return fault.Wrap(err, code, subject, format, args...).WithOp("host network")
}

// Setup makes the bridge with the given addresses (each with its network's length), or repairs it. It returns
// the MTU of the network, which is the uplink's. fault.Exists if a device of the bridge's name is not
// ours or the host uses an address of the plan's ranges elsewhere: the hint has what to set instead.
func (h *Host) Setup(ctx context.Context, addresses []netip.Prefix) (mtu int, err error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	bridge, err := h.ownBridge()
	if err != nil {
		return 0, err
	}
	if bridge == nil {
		if err := h.conflict(); err != nil {
			return 0, err
		}
		if bridge, err = h.makeBridge(); err != nil {
			return 0, err
		}
	}
	if err := h.settle(bridge, addresses); err != nil {
		return 0, err
	}
	h.index = bridge.Attrs().Index
	return h.mtu, nil
}

// Check says whether the network could be made: whether this process may, whether the kernel has what it takes, and whether the
// bridge's name and the ranges are free or ours. It changes nothing.
func (h *Host) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return failed(err, "/dev/net/tun", "no TAP device can be made").WithHint("sudo modprobe tun; in a container, it needs that device")
	} else if err := unix.Close(fd); err != nil {
		return failed(err, "/dev/net/tun", "it does not close")
	}
	// Most containers have settings of the kernel to read alone.
	if err := unix.Access(sysctls+"ipv4/ip_forward", unix.W_OK); err != nil {
		return failed(err, sysctls, "the network's settings cannot be changed").
			WithHint("/proc/sys has to be writable: a container needs to be privileged; or set network = \"user\" in config.toml, which takes no privilege; then banger daemon stop")
	}
	// It is told to those alone who may change the firewall.
	if _, err := generation(); err != nil {
		return failed(err, "nftables", "the firewall cannot be reached").
			WithHint("the kernel needs nf_tables: sudo modprobe nf_tables; a container needs CAP_NET_ADMIN")
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	b, err := h.ownBridge()
	if err != nil || b != nil {
		return err
	}
	return h.conflict()
}

// ownBridge returns our bridge, nil if there is none. fault.Exists if another has its name: the hint has a name that is free, and
// a range as well if ours is that one's.
func (h *Host) ownBridge() (netlink.Link, error) {
	l, own, err := h.findBridge()
	if err != nil || l == nil || own {
		return l, err
	}
	whose, set := "is not this installation's", fmt.Sprintf("bridge_name = %q", otherName(h.s))
	if _, other := installationOf(l); other {
		whose = "is the bridge of another installation of banger"
	}
	if taken, err := h.takenBut(0); err == nil && fault.Is(network.Conflict(h.s.Plan, taken), fault.Exists) {
		if free := network.Free(h.s.Plan.IPv4.Bits(), taken); free.IsValid() {
			set += fmt.Sprintf(" and cidr = \"%s\"", free)
		}
	}
	return nil, fault.New(fault.Exists, h.s.Bridge, "a network device of this name is there already, and %s", whose).
		WithOp("host network").WithHint("choose others in config.toml, as %s, then `banger daemon stop`", set)
}

// findBridge returns the device that has the bridge's name, nil if there is none, and whether it is ours.
func (h *Host) findBridge() (l netlink.Link, own bool, err error) {
	l, err = h.nl.LinkByName(h.s.Bridge)
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing):
		return nil, false, nil
	case err != nil:
		return nil, false, failed(err, h.s.Bridge, "the bridge cannot be looked for")
	}
	return l, l.Type() == "bridge" && l.Attrs().HardwareAddr.String() == h.s.Plan.MAC(bridgeSlot).String(), nil
}

// aliasPrefix begins the label of each installation's bridge; its id follows.
const aliasPrefix = "banger "

// installationOf is whose bridge a device says that it is.
func installationOf(l netlink.Link) (string, bool) {
	return strings.CutPrefix(l.Attrs().Alias, aliasPrefix)
}

// otherName is a bridge name that no other installation proposes.
func otherName(s Settings) string { return strings.TrimSuffix(s.Plan.TAPPrefix(), "-") }

// makeBridge makes it with our hardware address, by which it is known: from the first moment on, whenever
// this process ends.
func (h *Host) makeBridge() (netlink.Link, error) {
	b := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: h.s.Bridge, HardwareAddr: h.s.Plan.MAC(bridgeSlot)}}
	// Without a querier nobody tells a snooping bridge who listens: neighbour discovery is to reach all.
	off := false
	b.MulticastSnooping = &off
	if err := h.nl.LinkAdd(b); err != nil {
		return nil, failed(err, h.s.Bridge, "the bridge cannot be made")
	}
	l, err := h.nl.LinkByName(h.s.Bridge)
	if err != nil {
		return nil, failed(err, h.s.Bridge, "the bridge was made and is gone")
	}
	return l, nil
}

// settle gives the bridge what it is to have.
func (h *Host) settle(bridge netlink.Link, addresses []netip.Prefix) error {
	a := bridge.Attrs()
	alias := aliasPrefix + h.s.Plan.Installation
	if a.Alias != alias { // for people; the hardware address is what counts
		if err := h.nl.LinkSetAlias(bridge, alias); err != nil {
			return failed(err, h.s.Bridge, "the bridge cannot be labelled")
		}
	}
	// The host is the guests' router and takes advice from none of them.
	for _, set := range []struct{ path, value string }{
		{"ipv6/conf/" + h.s.Bridge + "/accept_ra", "0"},
		{"ipv6/conf/" + h.s.Bridge + "/autoconf", "0"},
		{"ipv4/conf/" + h.s.Bridge + "/accept_redirects", "0"},
		{"ipv6/conf/" + h.s.Bridge + "/accept_redirects", "0"},
		{"ipv4/conf/" + h.s.Bridge + "/send_redirects", "0"},
	} {
		if err := sysctl(set.path, set.value); err != nil && !errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
			return failed(err, h.s.Bridge, "%s cannot be set", set.path)
		}
	}
	uplink, err := h.uplinkMTU()
	if err != nil {
		return err
	}
	// What runs keeps the MTU that it was told, and so does who comes beside it: a bridge drops what is too long for a port
	// without a word. With nobody there it is the uplink's.
	h.mtu = a.MTU
	if busy, err := h.busy(); err != nil {
		return err
	} else if !busy || a.MTU == 0 {
		h.mtu = uplink
	}
	if a.MTU != h.mtu {
		if err := h.nl.LinkSetMTU(bridge, h.mtu); err != nil {
			return failed(err, h.s.Bridge, "the bridge's MTU cannot be set to %d", h.mtu)
		}
	}
	if err := h.settleAddresses(bridge, addresses); err != nil {
		return err
	}
	if a.Flags&net.FlagUp == 0 {
		if err := h.nl.LinkSetUp(bridge); err != nil {
			return failed(err, h.s.Bridge, "the bridge cannot be brought up")
		}
	}
	return nil
}

// busy says whether a VMM has one of our TAPs: those that nobody has open carry nothing (IFF_LOWER_UP, netdevice(7)).
func (h *Host) busy() (bool, error) {
	links, err := dump(h.nl.LinkList)
	if err != nil {
		return false, failed(err, h.s.Bridge, "the host's network devices cannot be read")
	}
	return slices.ContainsFunc(links, func(l netlink.Link) bool {
		return strings.HasPrefix(l.Attrs().Name, h.s.Plan.TAPPrefix()) && l.Attrs().RawFlags&unix.IFF_LOWER_UP != 0
	}), nil
}

func (h *Host) settleAddresses(bridge netlink.Link, want []netip.Prefix) error {
	have, err := dump(func() ([]netlink.Addr, error) { return h.nl.AddrList(bridge, netlink.FAMILY_ALL) })
	if err != nil {
		return failed(err, h.s.Bridge, "the bridge's addresses cannot be read")
	}
	there := map[netip.Prefix]bool{}
	for _, a := range have {
		p, ok := prefixOf(a.IPNet)
		if !ok || p.Addr().IsLinkLocalUnicast() {
			continue
		}
		there[p] = true
		if !slices.Contains(want, p) {
			if err := h.nl.AddrDel(bridge, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return failed(err, h.s.Bridge, "the address %s cannot be taken off", p)
			}
		}
	}
	for _, p := range want {
		if there[p] {
			continue
		}
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD // nobody else is there to have it, and it is to answer at once
		}
		err := h.nl.AddrReplace(bridge, a)
		if err != nil && (p.Addr().Is4() || !noIPv6()) {
			return failed(err, h.s.Bridge, "the address %s cannot be given to the bridge", p)
		}
	}
	return nil
}

// noIPv6 says whether this kernel has no IPv6, or has it turned off.
func noIPv6() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	return err != nil || strings.TrimSpace(string(b)) == "1"
}

// uplinkMTU is the MTU of the way out: of the device of the best default route, in bytes.
func (h *Host) uplinkMTU() (int, error) {
	const ethernet, least, most = 1500, 1280, 9216 // least: RFC 8200 5; most: what devices call jumbo frames
	routes, err := dump(func() ([]netlink.Route, error) { return h.nl.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return 0, failed(err, h.s.Bridge, "the host's routes cannot be read")
	}
	index, metric := 0, 0
	for _, r := range routes {
		if p, ok := prefixOf(r.Dst); ok && p.Bits() > 0 || r.LinkIndex == 0 {
			continue
		}
		if index == 0 || r.Priority < metric {
			index, metric = r.LinkIndex, r.Priority
		}
	}
	if index == 0 {
		return ethernet, nil
	}
	l, err := h.nl.LinkByIndex(index)
	if err != nil {
		return ethernet, nil // it has just gone
	}
	return min(max(l.Attrs().MTU, least), most), nil
}

// conflict looks whether the host uses a part of the plan's ranges already.
func (h *Host) conflict() error {
	taken, err := h.Taken()
	if err != nil {
		return err
	}
	return network.Conflict(h.s.Plan, taken)
}

// Taken returns what the host has addresses in or routes to, apart from our bridge, in any table.
func (h *Host) Taken() ([]network.Used, error) {
	own := 0
	if b, ours, err := h.findBridge(); err == nil && ours {
		own = b.Attrs().Index
	}
	return h.takenBut(own)
}

// takenBut leaves out what goes by one device. By gives the device's name, and whose it is if another installation says so.
func (h *Host) takenBut(own int) ([]network.Used, error) {
	names := map[int]string{}
	name := func(index int) string {
		if n, ok := names[index]; ok {
			return n
		}
		n := "?"
		if l, err := h.nl.LinkByIndex(index); err == nil {
			n = l.Attrs().Name
			if _, other := installationOf(l); other {
				n += ", the bridge of another installation of banger"
			}
		}
		names[index] = n
		return n
	}
	var out []network.Used
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) {
			return h.nl.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, failed(err, h.s.Bridge, "the host's routes cannot be read")
		}
		for _, r := range routes {
			p, ok := prefixOf(r.Dst)
			if ok && r.LinkIndex != own && r.Type != unix.RTN_MULTICAST && !p.Addr().IsLinkLocalUnicast() && !p.Addr().IsMulticast() && !p.Addr().IsLoopback() {
				out = append(out, network.Used{Range: p.Masked(), By: name(r.LinkIndex)})
			}
		}
	}
	return out, nil
}

// AddTAP makes the TAP of a slot, as a port of the bridge that is up, or repairs it. An isolated port
// reaches no other isolated one, whatever the firewall's state. Setup comes first.
func (h *Host) AddTAP(ctx context.Context, slot int, isolated bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	name := h.s.Plan.TAP(slot)
	l, err := h.nl.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		if err := makeTAP(name, h.s.Owner); err != nil {
			return failed(err, name, "the TAP device cannot be made")
		}
		// A port has no addresses of its own: it is the bridge that the host speaks by.
		if err := sysctl("ipv6/conf/"+name+"/disable_ipv6", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return failed(err, name, "IPv6 cannot be turned off on the TAP device")
		}
		l, err = h.nl.LinkByName(name)
	}
	if err != nil {
		return failed(err, name, "the TAP device cannot be looked for")
	}
	// One that was a jail's is the user's again; while a VMM has it, nobody else can open it anyway.
	if t, ok := l.(*netlink.Tuntap); ok && int(t.Owner) != h.s.Owner {
		if err := GiveTAP(name, h.s.Owner); err != nil && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	a := l.Attrs()
	if a.MTU != h.mtu {
		err = h.nl.LinkSetMTU(l, h.mtu)
	}
	if err == nil && a.MasterIndex != h.index {
		err = h.nl.LinkSetMasterByIndex(l, h.index)
	}
	if err == nil {
		err = h.nl.LinkSetIsolated(l, isolated)
	}
	if err == nil && a.Flags&net.FlagUp == 0 {
		err = h.nl.LinkSetUp(l)
	}
	if err != nil {
		return failed(err, name, "the TAP device cannot be put on the bridge %s", h.s.Bridge)
	}
	return nil
}

// makeTAP makes a persistent device that the user may open, as VMMs do: frames with a virtio header
// (Documentation/networking/tuntap.rst of the kernel).
func makeTAP(name string, owner int) error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return os.NewSyscallError("TUNSETIFF", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, owner); err != nil {
		return os.NewSyscallError("TUNSETOWNER", err)
	}
	return os.NewSyscallError("TUNSETPERSIST", unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1))
}

// GiveTAP makes a user the one who may open a TAP that is there. An error that is unix.EBUSY says that somebody has it open.
func GiveTAP(name string, uid int) error {
	if err := giveTAP(name, uid); err != nil {
		return failed(err, name, "the TAP device cannot be given to user %d", uid)
	}
	return nil
}

func giveTAP(name string, uid int) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	// What is asked for by name is made, if it is not there. Sockets of any kind answer this (netdevice(7)).
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(socket)
	if err := unix.IoctlIfreq(socket, unix.SIOCGIFINDEX, ifr); err != nil {
		return os.NewSyscallError("SIOCGIFINDEX", err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
	}
	defer unix.Close(fd)
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return os.NewSyscallError("TUNSETIFF", err)
	}
	return os.NewSyscallError("TUNSETOWNER", unix.IoctlSetInt(fd, unix.TUNSETOWNER, uid))
}

// DeleteTAPs removes the TAPs of slots. Those that are not there are fine. Several go in one request, by a
// link group that they are put into just before: the kernel waits once for all, not 20 ms for each.
func (h *Host) DeleteTAPs(ctx context.Context, slots []int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.deleteTAPs(slots)
}

func (h *Host) deleteTAPs(slots []int) error {
	var links []netlink.Link
	for _, slot := range slots {
		l, err := h.nl.LinkByName(h.s.Plan.TAP(slot))
		var missing netlink.LinkNotFoundError
		if errors.As(err, &missing) {
			continue
		}
		if err != nil {
			return failed(err, h.s.Plan.TAP(slot), "the TAP device cannot be looked for")
		}
		links = append(links, l)
	}
	switch len(links) {
	case 0:
		return nil
	case 1:
		if err := h.nl.LinkDel(links[0]); err != nil && !errors.Is(err, unix.ENODEV) {
			return failed(err, links[0].Attrs().Name, "the TAP device cannot be removed")
		}
		return nil
	}
	group, err := h.freeGroup()
	if err != nil {
		return err
	}
	for _, l := range links {
		if err := h.nl.LinkSetGroup(l, int(group)); err != nil && !errors.Is(err, unix.ENODEV) {
			return failed(err, l.Attrs().Name, "the TAP device cannot be grouped for its removal")
		}
	}
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) {
		return failed(err, h.s.Bridge, "%d TAP devices cannot be removed", len(links))
	}
	return nil
}

// freeGroup is a link group that no device is in: deleting a group deletes whatever is in it, and every
// device that nobody put elsewhere is in group 0.
func (h *Host) freeGroup() (uint32, error) {
	links, err := dump(h.nl.LinkList)
	if err != nil {
		return 0, failed(err, h.s.Bridge, "the host's network devices cannot be read")
	}
	taken := map[uint32]bool{0: true}
	for _, l := range links {
		taken[l.Attrs().Group] = true
	}
	for {
		if g := rand.Uint32() & 0x7fffffff; !taken[g] {
			return g, nil
		}
	}
}

// TAPs returns the slots that have a TAP, in order.
func (h *Host) TAPs(ctx context.Context) ([]int, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.taps()
}

func (h *Host) taps() ([]int, error) {
	links, err := dump(h.nl.LinkList)
	if err != nil {
		return nil, failed(err, h.s.Bridge, "the host's network devices cannot be read")
	}
	var slots []int
	for _, l := range links {
		if rest, ok := strings.CutPrefix(l.Attrs().Name, h.s.Plan.TAPPrefix()); ok {
			if slot, err := strconv.Atoi(rest); err == nil && h.s.Plan.TAP(slot) == l.Attrs().Name {
				slots = append(slots, slot)
			}
		}
	}
	slices.Sort(slots)
	return slots, nil
}

// Remove takes away everything of this installation: TAPs, bridge and tables. Fine if there is nothing.
func (h *Host) Remove(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	slots, err := h.taps()
	if err != nil {
		return err
	}
	if err := h.deleteTAPs(slots); err != nil {
		return err
	}
	b, err := h.ownBridge()
	if err != nil && !fault.Is(err, fault.Exists) { // another's bridge of this name is none of ours
		return err
	}
	if b != nil {
		if err := h.nl.LinkDel(b); err != nil && !errors.Is(err, unix.ENODEV) {
			return failed(err, h.s.Bridge, "the bridge cannot be removed")
		}
	}
	return h.rules.remove(h.s.Plan.Installation)
}

// Policy sets what may pass, whole. What the kernel has already is not sent again, as long as nobody else
// changed it. With a guest that has NAT, the host is made to forward.
func (h *Host) Policy(ctx context.Context, p network.Policy) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if slices.ContainsFunc(p.Guests, func(g network.Guest) bool { return g.NAT }) {
		if err := h.forward(&p); err != nil {
			return err
		}
	}
	return h.rules.set(p)
}

// forward turns forwarding on. It is never turned off: others may have come to rely on it.
func (h *Host) forward(p *network.Policy) error {
	const four, six = "ipv4/ip_forward", "ipv6/conf/all/forwarding"
	if err := ensureSysctl(four, "1"); err != nil {
		return failed(err, "net.ipv4.ip_forward", "NAT needs it, and it cannot be turned on").WithHint("sudo sysctl -w net.ipv4.ip_forward=1")
	}
	if p.NAT6 = h.way6(); !p.NAT6 {
		return nil
	}
	if v, err := readSysctl(six); err == nil && v == "0" {
		// A host that forwards takes no router advertisements any more, unless told to (accept_ra 2): it would
		// lose its own way out (Documentation/networking/ip-sysctl.rst of the kernel).
		links, err := dump(h.nl.LinkList)
		if err != nil {
			return failed(err, h.s.Bridge, "the host's network devices cannot be read")
		}
		for _, l := range links {
			path := "ipv6/conf/" + l.Attrs().Name + "/accept_ra"
			if v, err := readSysctl(path); err == nil && v == "1" && l.Attrs().Name != h.s.Bridge {
				if err := sysctl(path, "2"); err != nil {
					return failed(err, path, "it cannot be set to 2, without which the host would lose its IPv6 route")
				}
			}
		}
	}
	if err := ensureSysctl(six, "1"); err != nil {
		return failed(err, "net.ipv6.conf.all.forwarding", "NAT needs it, and it cannot be turned on").WithHint("sudo sysctl -w net.ipv6.conf.all.forwarding=1")
	}
	return nil
}

// way6 says whether the host has a way out by IPv6.
func (h *Host) way6() bool {
	routes, err := dump(func() ([]netlink.Route, error) { return h.nl.RouteList(nil, netlink.FAMILY_V6) })
	if err != nil {
		return false
	}
	return slices.ContainsFunc(routes, func(r netlink.Route) bool {
		p, ok := prefixOf(r.Dst)
		return (!ok || p.Bits() == 0) && r.Type == unix.RTN_UNICAST && r.LinkIndex != 1 // not lo's, which is an error's
	})
}

const sysctls = "/proc/sys/net/"

func sysctl(path, value string) error { return os.WriteFile(sysctls+path, []byte(value), 0o644) }

func readSysctl(path string) (string, error) {
	b, err := os.ReadFile(sysctls + path)
	return strings.TrimSpace(string(b)), err
}

// ensureSysctl writes only what differs: some hosts let /proc/sys be read alone.
func ensureSysctl(path, value string) error {
	if have, err := readSysctl(path); err == nil && have == value {
		return nil
	}
	return sysctl(path, value)
}

// dump repeats a listing that the kernel says was interrupted by a change, which would miss what is there.
func dump[T any](list func() ([]T, error)) (out []T, err error) {
	for range 10 {
		if out, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return out, err
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if bits == 32 {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, ones), ok && a.BitLen() == bits
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
