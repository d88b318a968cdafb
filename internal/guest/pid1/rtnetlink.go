package pid1

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// routeConn speaks rtnetlink(7): the few requests that a static configuration takes. A library for it
// would be a tenth of this program, which every guest reads from its initrd.
type routeConn struct {
	fd  int
	seq uint32
}

func dialRoute() (*routeConn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	// The kernel answers from within the send; the bound is for a kernel that would not.
	err = errors.Join(unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("netlink: %w", err), unix.Close(fd))
	}
	return &routeConn{fd: fd}, nil
}

func (c *routeConn) close() { _ = unix.Close(c.fd) }

// interfaceIndex is the number by which rtnetlink knows an interface.
func interfaceIndex(name string) (int32, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(s)
	if err := unix.IoctlIfreq(s, unix.SIOCGIFINDEX, ifr); err != nil {
		return 0, os.NewSyscallError("SIOCGIFINDEX", err)
	}
	return int32(ifr.Uint32()), nil
}

// up sets the MTU, unless it is 0, and brings the interface up.
func (c *routeConn) up(index int32, mtu int) error {
	// struct ifinfomsg of linux/rtnetlink.h.
	m := append([]byte{unix.AF_UNSPEC, 0, 0, 0}, native32(uint32(index))...)
	m = append(append(m, native32(unix.IFF_UP)...), native32(unix.IFF_UP)...)
	if mtu != 0 {
		m = attribute(m, unix.IFLA_MTU, native32(uint32(mtu)))
	}
	return c.request(unix.RTM_NEWLINK, 0, m)
}

// setHardware sets the hardware address. One that somebody set, other than one that the kernel chose, is left alone by
// systemd-udevd (systemd.link(5), MACAddressPolicy=).
func (c *routeConn) setHardware(index int32, mac []byte) error {
	m := append([]byte{unix.AF_UNSPEC, 0, 0, 0}, native32(uint32(index))...)
	m = append(m, make([]byte, 8)...) // no flag changes
	return c.request(unix.RTM_NEWLINK, 0, attribute(m, unix.IFLA_ADDRESS, mac))
}

// addAddress gives the interface an address. An IPv6 address is used at once: the host gave it to this VM
// alone, and drops whoever else would use it, so there is no duplicate to look for.
func (c *routeConn) addAddress(index int32, a netip.Prefix) error {
	f, address := family(a.Addr())
	// struct ifaddrmsg.
	m := append([]byte{f, uint8(a.Bits()), unix.IFA_F_NODAD, unix.RT_SCOPE_UNIVERSE}, native32(uint32(index))...)
	m = attribute(m, unix.IFA_LOCAL, address)
	m = attribute(m, unix.IFA_ADDRESS, address)
	if a.Addr().Is4() && a.Bits() < 31 {
		last := broadcast(a)
		m = attribute(m, unix.IFA_BROADCAST, last[:])
	}
	return c.request(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, m)
}

// broadcast is the last address of an IPv4 network.
func broadcast(p netip.Prefix) [4]byte {
	a := p.Addr().As4()
	host := uint32(1)<<(32-p.Bits()) - 1
	binary.BigEndian.PutUint32(a[:], binary.BigEndian.Uint32(a[:])|host)
	return a
}

// addRoute adds a route to the main table.
func (c *routeConn) addRoute(index int32, to netip.Prefix, via netip.Addr) error {
	f, destination := family(to.Addr())
	_, gateway := family(via)
	// struct rtmsg.
	m := []byte{f, uint8(to.Bits()), 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0}
	if to.Bits() > 0 {
		m = attribute(m, unix.RTA_DST, destination)
	}
	m = attribute(m, unix.RTA_GATEWAY, gateway)
	m = attribute(m, unix.RTA_OIF, native32(uint32(index)))
	return c.request(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, m)
}

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// attribute appends one struct rtattr, padded to four bytes.
func attribute(m []byte, kind uint16, value []byte) []byte {
	m = binary.NativeEndian.AppendUint16(m, uint16(4+len(value)))
	m = binary.NativeEndian.AppendUint16(m, kind)
	m = append(m, value...)
	for len(m)%4 != 0 {
		m = append(m, 0)
	}
	return m
}

// request sends a message and waits for the kernel's answer to it.
func (c *routeConn) request(kind, flags uint16, body []byte) error {
	c.seq++
	// struct nlmsghdr of linux/netlink.h.
	m := native32(uint32(unix.NLMSG_HDRLEN + len(body)))
	m = binary.NativeEndian.AppendUint16(m, kind)
	m = binary.NativeEndian.AppendUint16(m, unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags)
	m = append(append(m, native32(c.seq)...), native32(0)...)
	m = append(m, body...)
	if err := unix.Sendto(c.fd, m, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	for {
		n, _, err := unix.Recvfrom(c.fd, answer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		// A header, then of an NLMSG_ERROR the negative errno, 0 for done.
		a := answer[:n]
		if len(a) < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint32(a[8:]) != c.seq || binary.NativeEndian.Uint16(a[4:]) != unix.NLMSG_ERROR {
			continue
		}
		if code := int32(binary.NativeEndian.Uint32(a[unix.NLMSG_HDRLEN:])); code != 0 {
			return unix.Errno(-code)
		}
		return nil
	}
}
