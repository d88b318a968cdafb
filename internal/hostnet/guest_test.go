package hostnet

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/vm"
)

// guest plays a VM: it holds the TAP as a VMM does, and sends and sees whole frames.
type guest struct {
	t   *testing.T
	i   vm.Interface
	mac net.HardwareAddr
	tap *os.File
	got chan []byte
}

// header is the virtio header before each frame: struct virtio_net_hdr of linux/virtio_net.h.
const header = 10

// join attaches to the TAP of an interface and answers for its addresses.
func join(t *testing.T, i vm.Interface) *guest {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	ifr, err := unix.NewIfreq(i.TAP)
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		t.Fatal(err)
	}
	mac, err := net.ParseMAC(i.MAC)
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{t: t, i: i, mac: mac, tap: os.NewFile(uintptr(fd), i.TAP), got: make(chan []byte, 1000)}
	t.Cleanup(func() { _ = g.tap.Close() })
	go g.read()
	return g
}

func (g *guest) read() {
	b := make([]byte, 64<<10)
	for {
		n, err := g.tap.Read(b)
		if err != nil {
			return
		}
		if n < header+14 {
			continue
		}
		f := bytes.Clone(b[header:n])
		if answer := g.answer(f); answer != nil {
			g.send(answer)
			continue
		}
		select {
		case g.got <- f:
		default: // nobody looks
		}
	}
}

// answer is what a guest's kernel answers by itself: who has its addresses.
func (g *guest) answer(f []byte) []byte {
	switch binary.BigEndian.Uint16(f[12:]) {
	case unix.ETH_P_ARP:
		a := f[14:]
		if a[7] == 1 && bytes.Equal(a[24:28], g.i.IPv4.Addr().AsSlice()) {
			return g.arp(2, g.mac, g.i.IPv4.Addr(), net.HardwareAddr(a[8:14]), netip.AddrFrom4([4]byte(a[14:18])))
		}
	case unix.ETH_P_IPV6:
		p := f[14:]
		if p[6] == unix.IPPROTO_ICMPV6 && len(p) >= 64 && p[40] == 135 && bytes.Equal(p[48:64], g.i.IPv6.Addr().AsSlice()) {
			to := netip.AddrFrom16([16]byte(p[8:24]))
			return ether(net.HardwareAddr(f[6:12]), g.mac, unix.ETH_P_IPV6, advertise(g.i.IPv6.Addr(), to, g.i.IPv6.Addr(), g.mac))
		}
	}
	return nil
}

func (g *guest) send(f []byte) {
	if _, err := g.tap.Write(append(make([]byte, header), f...)); err != nil {
		g.t.Errorf("%s: %v", g.i.TAP, err)
	}
}

// sees waits for a frame with the text.
func (g *guest) sees(text string) []byte {
	g.t.Helper()
	f := g.wait(text, 5*time.Second)
	if f == nil {
		g.t.Errorf("%s: %q did not arrive", g.i.TAP, text)
	}
	return f
}

func (g *guest) wait(text string, bound time.Duration) []byte {
	end := time.After(bound)
	for {
		select {
		case f := <-g.got:
			if bytes.Contains(f, []byte(text)) {
				return f
			}
		case <-end:
			return nil
		}
	}
}

// misses wants a frame with the text not to have arrived when one that was sent after it has.
func (g *guest) misses(text, after string) {
	g.t.Helper()
	end := time.After(5 * time.Second)
	for {
		select {
		case f := <-g.got:
			switch {
			case bytes.Contains(f, []byte(text)):
				g.t.Errorf("%s: %q arrived", g.i.TAP, text)
			case bytes.Contains(f, []byte(after)):
				return
			}
		case <-end:
			g.t.Errorf("%s: not even %q arrived", g.i.TAP, after)
			return
		}
	}
}

func ether(to, from net.HardwareAddr, kind uint16, payload []byte) []byte {
	f := append(append([]byte{}, to...), from...)
	return append(binary.BigEndian.AppendUint16(f, kind), payload...)
}

func (g *guest) arp(op byte, sender net.HardwareAddr, senderIP netip.Addr, target net.HardwareAddr, targetIP netip.Addr) []byte {
	a := []byte{0, 1, 8, 0, 6, 4, 0, op}
	a = append(append(a, sender...), senderIP.AsSlice()...)
	a = append(append(a, target...), targetIP.AsSlice()...)
	to := target
	if op == 1 {
		to = broadcastMAC
	}
	return ether(to, g.mac, unix.ETH_P_ARP, a)
}

var broadcastMAC = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// sum is the Internet checksum (RFC 1071).
func sum(parts ...[]byte) uint16 {
	var s uint32
	for _, p := range parts {
		if len(p)%2 == 1 {
			p = append(bytes.Clone(p), 0)
		}
		for i := 0; i < len(p); i += 2 {
			s += uint32(binary.BigEndian.Uint16(p[i:]))
		}
	}
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}

// transport is a UDP datagram or an empty TCP SYN with payload, and its protocol.
func transport(proto byte, from, to netip.Addr, port uint16, text string) []byte {
	const source = 4000
	p := binary.BigEndian.AppendUint16(nil, source)
	p = binary.BigEndian.AppendUint16(p, port)
	at := 6
	if proto == unix.IPPROTO_UDP {
		p = binary.BigEndian.AppendUint16(p, uint16(8+len(text)))
		p = append(p, 0, 0)
	} else {
		p = append(p, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0)
		at = 16
	}
	p = append(p, text...)
	pseudo := append(from.AsSlice(), to.AsSlice()...)
	pseudo = append(pseudo, 0, proto, byte(len(p)>>8), byte(len(p)))
	binary.BigEndian.PutUint16(p[at:], sum(pseudo, p))
	return p
}

// datagram is a UDP datagram as an IP packet of its addresses' family.
func datagram(from, to netip.Addr, port uint16, text string) []byte {
	return packet(from, to, unix.IPPROTO_UDP, transport(unix.IPPROTO_UDP, from, to, port, text))
}

func packet(from, to netip.Addr, proto byte, body []byte) []byte {
	if from.Is6() {
		p := []byte{0x60, 0, 0, 0, byte(len(body) >> 8), byte(len(body)), proto, 255}
		return append(append(append(p, from.AsSlice()...), to.AsSlice()...), body...)
	}
	n := 20 + len(body)
	p := []byte{0x45, 0, byte(n >> 8), byte(n), 0, 1, 0, 0, 64, proto, 0, 0}
	p = append(append(p, from.AsSlice()...), to.AsSlice()...)
	binary.BigEndian.PutUint16(p[10:], sum(p))
	return append(p, body...)
}

func icmp6(from, to netip.Addr, body []byte) []byte {
	pseudo := append(from.AsSlice(), to.AsSlice()...)
	pseudo = append(pseudo, 0, 0, byte(len(body)>>8), byte(len(body)), 0, 0, 0, unix.IPPROTO_ICMPV6)
	binary.BigEndian.PutUint16(body[2:], sum(pseudo, body))
	return packet(from, to, unix.IPPROTO_ICMPV6, body)
}

// advertise is a neighbour advertisement (RFC 4861 4.4): solicited, overriding. A text goes into an option
// that nobody knows (4.6): what follows the packet would be cut off on its way.
func advertise(from, to, target netip.Addr, mac net.HardwareAddr, text ...string) []byte {
	body := append([]byte{136, 0, 0, 0, 0x60, 0, 0, 0}, target.AsSlice()...)
	return icmp6(from, to, option(append(append(body, 2, 1), mac...), text...))
}

func option(body []byte, text ...string) []byte {
	for _, s := range text {
		n := (2 + len(s) + 7) / 8
		o := append([]byte{253, byte(n)}, s...)
		body = append(body, append(o, make([]byte, 8*n-len(o))...)...)
	}
	return body
}

// frame is a datagram to a station of the bridge.
func (g *guest) frame(to net.HardwareAddr, from, at netip.Addr, port uint16, text string) []byte {
	kind := uint16(unix.ETH_P_IP)
	if from.Is6() {
		kind = unix.ETH_P_IPV6
	}
	return ether(to, g.mac, kind, datagram(from, at, port, text))
}
