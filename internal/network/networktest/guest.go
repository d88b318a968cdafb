package networktest

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"git.thaloco.com/thaloco/banger/internal/vm"
)

const (
	// Patience bounds what is to happen.
	Patience = 20 * time.Second
	// Silence is how long one waits for what must not happen. What is dropped leaves no trace to wait for.
	Silence = 700 * time.Millisecond
)

const nic = tcpip.NICID(1)

// Guest is the kernel of a guest: a TCP/IP stack at the far end of a VM's interface. Safe for concurrent use.
type Guest struct {
	Interface vm.Interface

	stack *stack.Stack
	link  *channel.Endpoint
	wire  wire
	leave func()
}

// wire moves whole Ethernet frames.
type wire interface {
	read() ([]byte, error) // good until the next one
	write(frame [][]byte, size int) error
	io.Closer
}

// Join is a guest that boots: it takes the interface that the VM has, by its TAP, or by the socket that its VMM is
// to connect to. It leaves with the test, or before.
func Join(t testing.TB, i vm.Interface, socket string) *Guest {
	t.Helper()
	g := &Guest{Interface: i}
	var err error
	if i.TAP != "" {
		g.wire, err = openTAP(i.TAP)
	} else {
		g.wire, err = dialSocket(socket)
	}
	if err == nil {
		err = g.makeStack()
	}
	if err != nil {
		t.Fatalf("a guest joins: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(g.receive)
	done.Go(func() { g.send(ctx) })
	g.leave = sync.OnceFunc(func() {
		cancel()
		_ = g.wire.Close()
		done.Wait()
		g.stack.Close()
	})
	t.Cleanup(g.leave)
	return g
}

// Leave is a guest's end: its VMM lets go of the interface.
func (g *Guest) Leave() { g.leave() }

func (g *Guest) makeStack() error {
	mac, err := net.ParseMAC(g.Interface.MAC)
	if err != nil {
		return err
	}
	i := g.Interface
	g.link = channel.New(1024, uint32(i.MTU+header.EthernetMinimumSize), tcpip.LinkAddress(mac))
	g.stack = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{arp.NewProtocol, ipv4.NewProtocol,
			ipv6.NewProtocolWithOptions(ipv6.Options{DADConfigs: stack.DADConfigurations{}})},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	sack := tcpip.TCPSACKEnabled(true)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: 1 << 20, Max: 4 << 20}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: 1 << 20, Max: 4 << 20}
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &receive, &send} {
		if e := g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, o); e != nil {
			return errors.New(e.String())
		}
	}
	if e := g.stack.CreateNIC(nic, ethernet.New(g.link)); e != nil {
		return errors.New(e.String())
	}
	var routes []tcpip.Route
	for _, a := range []struct {
		p       tcpip.NetworkProtocolNumber
		own     netip.Prefix
		gateway netip.Addr
		all     tcpip.Subnet
	}{{ipv4.ProtocolNumber, i.IPv4, i.Gateway4, header.IPv4EmptySubnet}, {ipv6.ProtocolNumber, i.IPv6, i.Gateway6, header.IPv6EmptySubnet}} {
		if !a.own.IsValid() {
			continue
		}
		at := tcpip.AddressWithPrefix{Address: address(a.own.Addr()), PrefixLen: a.own.Bits()}
		if e := g.stack.AddProtocolAddress(nic, tcpip.ProtocolAddress{Protocol: a.p, AddressWithPrefix: at}, stack.AddressProperties{}); e != nil {
			return errors.New(e.String())
		}
		routes = append(routes, tcpip.Route{Destination: at.Subnet(), NIC: nic}, tcpip.Route{Destination: a.all, Gateway: address(a.gateway), NIC: nic})
	}
	g.stack.SetRouteTable(routes)
	return nil
}

func address(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

func (g *Guest) receive() {
	for {
		frame, err := g.wire.read()
		if err != nil {
			return
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
		g.link.InjectInbound(0, pkt)
		pkt.DecRef()
	}
}

func (g *Guest) send(ctx context.Context) {
	for {
		pkt := g.link.ReadContext(ctx)
		if pkt == nil {
			return
		}
		err := g.wire.write(pkt.AsSlices(), pkt.Size())
		pkt.DecRef()
		if err != nil {
			return
		}
	}
}

func full(to netip.AddrPort) (tcpip.FullAddress, tcpip.NetworkProtocolNumber) {
	if to.Addr().Is6() {
		return tcpip.FullAddress{NIC: nic, Addr: address(to.Addr()), Port: to.Port()}, ipv6.ProtocolNumber
	}
	return tcpip.FullAddress{NIC: nic, Addr: address(to.Addr()), Port: to.Port()}, ipv4.ProtocolNumber
}

// Dial connects over TCP, or says within the bound why not.
func (g *Guest) Dial(to netip.AddrPort, bound time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	defer cancel()
	at, protocol := full(to)
	return gonet.DialContextTCP(ctx, g.stack, at, protocol)
}

// Listen is a TCP server of the guest's, on all of its IPv4 addresses.
func (g *Guest) Listen(port uint16) (net.Listener, error) {
	return gonet.ListenTCP(g.stack, tcpip.FullAddress{NIC: nic, Port: port}, ipv4.ProtocolNumber)
}

// DialUDP returns a socket for datagrams to one address. With an address of its own that is not the guest's, it
// claims to be somebody else.
func (g *Guest) DialUDP(from netip.Addr, to netip.AddrPort) (net.Conn, error) {
	at, protocol := full(to)
	var local *tcpip.FullAddress
	if from.IsValid() {
		if e := g.stack.SetSpoofing(nic, true); e != nil {
			return nil, errors.New(e.String())
		}
		local = &tcpip.FullAddress{NIC: nic, Addr: address(from)}
	}
	return gonet.DialUDP(g.stack, local, &at, protocol)
}

// Ask is a DNS query to the guest's resolver, which is its gateway; network is "udp" or "tcp".
func (g *Guest) Ask(network, name string, kind uint16, bound time.Duration) (*dns.Msg, error) {
	at := netip.AddrPortFrom(g.Interface.Gateway4, 53)
	conn, err := g.DialUDP(netip.Addr{}, at)
	if network == "tcp" {
		conn, err = g.Dial(at, bound)
	}
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	c := dns.Client{Net: network, Timeout: bound}
	m, _, err := c.ExchangeWithConn(new(dns.Msg).SetQuestion(name, kind), &dns.Conn{Conn: conn})
	return m, err
}

// tapWire is a TAP as a VMM has it: a virtio header before each frame, which asks for nothing (tun.rst of the kernel's
// documentation; virtio 1.2, 5.1.6).
type tapWire struct {
	*os.File
	buf []byte
}

const vnetHeader = 10

func openTAP(name string) (wire, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &tapWire{os.NewFile(uintptr(fd), name), make([]byte, 1<<16)}, nil
}

func (w *tapWire) read() ([]byte, error) {
	n, err := w.Read(w.buf)
	if err != nil {
		return nil, err
	}
	return w.buf[min(vnetHeader, n):n], nil
}

func (w *tapWire) write(frame [][]byte, size int) error {
	out := make([]byte, vnetHeader, vnetHeader+size)
	for _, part := range frame {
		out = append(out, part...)
	}
	_, err := w.Write(out)
	return err
}

// socketWire is the stream of QEMU's stream netdev: each frame has its length before it (net/stream.c of QEMU).
type socketWire struct {
	net.Conn
	in  *bufio.Reader
	buf []byte
}

func dialSocket(path string) (wire, error) {
	// Its directory may be longer than a socket's address may be: by way of a descriptor, as VMMs' are.
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	conn, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), filepath.Base(path)))
	if err != nil {
		return nil, err
	}
	return &socketWire{Conn: conn, in: bufio.NewReaderSize(conn, 256<<10), buf: make([]byte, 1<<17)}, nil
}

func (w *socketWire) read() ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(w.in, length[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if int(n) > len(w.buf) {
		return nil, errors.New("a frame that is too long")
	}
	_, err := io.ReadFull(w.in, w.buf[:n])
	return w.buf[:n], err
}

func (w *socketWire) write(frame [][]byte, size int) error {
	out := net.Buffers(append([][]byte{binary.BigEndian.AppendUint32(nil, uint32(size))}, frame...))
	_, err := out.WriteTo(w.Conn)
	return err
}
