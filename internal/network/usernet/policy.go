package usernet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var (
	errNAT     = errors.New("the VM may not go out: NAT is off")
	errGateway = errors.New("the gateway serves DNS alone")
	errNobody  = errors.New("the guest is alone on its network")
	errHost    = errors.New("the address is the host's own")
)

// permits says whether a guest may get to an address now. The stack itself serves DNS and comes before.
func (n *Network) permits(to netip.Addr) error {
	switch {
	case to == n.cfg.Gateway4 || to == n.cfg.Gateway6:
		return errGateway
	case n.cfg.Guest4.Contains(to) || n.cfg.Guest6.Contains(to):
		return errNobody
	case !n.nat.Load():
		return errNAT
	}
	return n.outside.Reach(to)
}

// hostReach refuses what is the host's own: whatever the kernel would deliver locally, by its own table of routes
// (ip-route(8), "table local"), so that an address which the host gets later counts at once. It refuses as well what no
// router passes on: link-local addresses, among which clouds have the service that hands out credentials, and multicast.
func hostReach(to netip.Addr) error {
	to = to.Unmap()
	if !to.IsGlobalUnicast() || compatible.Contains(to) || sixToFour.Contains(to) {
		return fmt.Errorf("%s is no address that is reached through a router", to)
	}
	if nat64.Contains(to) { // some hosts translate these themselves
		b := to.As16()
		v4 := netip.AddrFrom4([4]byte(b[12:]))
		if routes, err := netlink.RouteGet(v4.AsSlice()); !v4.IsGlobalUnicast() || err == nil && !forwarded(routes) {
			return errHost
		}
	}
	routes, err := netlink.RouteGet(to.AsSlice())
	if err != nil {
		return fmt.Errorf("%s: %w", to, err)
	}
	if !forwarded(routes) {
		return errHost
	}
	return nil
}

// forwarded says whether the kernel would send packets out by routes.
func forwarded(routes []netlink.Route) bool {
	return !slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Type != unix.RTN_UNICAST })
}

// IPv6 addresses that stand for IPv4 ones: RFC 4291 2.5.5.1, RFC 3056 2, RFC 6052 2.1.
var (
	compatible = netip.MustParsePrefix("::/96")
	sixToFour  = netip.MustParsePrefix("2002::/16")
	nat64      = netip.MustParsePrefix("64:ff9b::/96")
)

// dialHost connects, and lets go again of a connection that turns out to be with the host itself: its address may have come
// after it was looked for.
func dialHost(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true}}
	conn, err := d.DialContext(ctx, network, to.String())
	if err != nil {
		return nil, err
	}
	if local, err := netip.ParseAddrPort(conn.LocalAddr().String()); err != nil || local.Addr().Unmap() == to.Addr().Unmap() {
		return nil, errors.Join(errHost, err, conn.Close())
	}
	return conn, nil
}
