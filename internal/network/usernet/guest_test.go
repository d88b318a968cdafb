package usernet

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
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
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// patience bounds every wait of a test. Nothing waits that long unless something is broken.
const patience = 30 * time.Second

var (
	guest4, guest6 = netip.MustParsePrefix("10.77.0.5/24"), netip.MustParsePrefix("fd77::5/64")
	// world stands for what is outside: addresses for documentation (RFC 5737, RFC 3849) that the tests' Outside takes to
	// servers of theirs.
	world4, world6 = netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8::7")
)

func config(t testing.TB) Config {
	t.Helper()
	return Config{Name: "web", MAC: "02:00:00:00:00:01", Guest4: guest4, Gateway4: netip.MustParseAddr("10.77.0.1"),
		Guest6: guest6, Gateway6: netip.MustParseAddr("fd77::1"), MTU: MTU, Publish: netip.AddrFrom4([4]byte{127, 201, byte(os.Getpid() >> 8), byte(os.Getpid())})}
}

// outside takes the world's addresses to this host's loopback, the port being the same, and counts.
type outside struct {
	mu        sync.Mutex
	dialled   []string
	resolvers []string
}

func (o *outside) Outside() Outside {
	return Outside{
		Reach: func(a netip.Addr) error {
			if a == world4 || a == world6 {
				return nil
			}
			return hostReach(a)
		},
		Dial: func(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
			o.mu.Lock()
			o.dialled = append(o.dialled, network+" "+to.String())
			o.mu.Unlock()
			if a := to.Addr(); a != world4 && a != world6 {
				return dialHost(ctx, network, to)
			}
			var d net.Dialer
			return d.DialContext(ctx, network, fmt.Sprintf("127.0.0.1:%d", to.Port()))
		},
		Resolvers: func() ([]string, error) {
			o.mu.Lock()
			defer o.mu.Unlock()
			return o.resolvers, nil
		},
	}
}

func (o *outside) dials() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]string(nil), o.dialled...)
}

// guestMAC is the guest's hardware address.
const guestMAC = tcpip.LinkAddress("\x02\x00\x00\x00\x00\x05")

// messages counts what a network logs.
type messages struct {
	mu  sync.Mutex
	all []string
}

func (m *messages) Write(line []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all = append(m.all, string(line))
	return len(line), nil
}

// refused is how many connections of the guest's were refused so far.
func (r *rig) refused() (n int) {
	r.messages.mu.Lock()
	defer r.messages.mu.Unlock()
	for _, l := range r.messages.all {
		if strings.Contains(l, "a connection is refused") {
			n++
		}
	}
	return n
}

// rig is a network with a guest on it.
type rig struct {
	*Network
	outside  *outside
	guest    *guest
	messages *messages
}

func newRig(t testing.TB, s Settings) *rig {
	t.Helper()
	r := &rig{outside: &outside{}, messages: &messages{}}
	var err error
	if r.Network, err = New(config(t), r.outside.Outside(), slog.New(slog.NewTextHandler(r.messages, &slog.HandlerOptions{Level: slog.LevelDebug}))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	r.Set(s)
	r.guest = newGuest(t, r.Network)
	return r
}

// guest is the far end of the wire: another stack of the same kind, as a guest's kernel would be.
type guest struct {
	stack *stack.Stack
	link  *channel.Endpoint
	conn  net.Conn // to the network, as a VMM has it
	cut   func()   // ends what moves frames
}

// wire connects a VMM's stream to a network, by a real socket.
func wire(t testing.TB, n *Network) net.Conn {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "wire")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
	}
	served := make(chan struct{})
	go func() { defer close(served); _ = n.Serve(context.Background(), ends[0]) }()
	t.Cleanup(func() { _ = ends[1].Close(); <-served })
	return ends[1]
}

func newGuest(t testing.TB, n *Network) *guest {
	t.Helper()
	return guestOn(t, wire(t, n))
}

// guestOn is a guest at the end of a VMM's stream.
func guestOn(t testing.TB, conn net.Conn) *guest {
	t.Helper()
	g := &guest{link: channel.New(1024, MTU+header.EthernetMinimumSize, guestMAC)}
	g.link.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	g.stack = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{arp.NewProtocol, ipv4.NewProtocol,
			ipv6.NewProtocolWithOptions(ipv6.Options{DADConfigs: stack.DADConfigurations{}})},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	sack := tcpip.TCPSACKEnabled(true)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: 1 << 20, Max: 4 << 20}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: 1 << 20, Max: 4 << 20}
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &receive, &send} {
		if e := g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, o); e != nil {
			t.Fatal(e)
		}
	}
	if e := g.stack.CreateNIC(nic, ethernet.New(g.link)); e != nil {
		t.Fatal(e)
	}
	for _, a := range []struct {
		protocol tcpip.NetworkProtocolNumber
		prefix   netip.Prefix
	}{{ipv4.ProtocolNumber, guest4}, {ipv6.ProtocolNumber, guest6}} {
		if e := g.stack.AddProtocolAddress(nic, tcpip.ProtocolAddress{Protocol: a.protocol, AddressWithPrefix: tcpip.AddressWithPrefix{
			Address: tcpip.AddrFromSlice(a.prefix.Addr().AsSlice()), PrefixLen: a.prefix.Bits()}}, stack.AddressProperties{}); e != nil {
			t.Fatal(e)
		}
	}
	c := config(t)
	four := tcpip.AddressWithPrefix{Address: tcpip.AddrFromSlice(guest4.Addr().AsSlice()), PrefixLen: 24}
	six := tcpip.AddressWithPrefix{Address: tcpip.AddrFromSlice(guest6.Addr().AsSlice()), PrefixLen: 64}
	g.stack.SetRouteTable([]tcpip.Route{{Destination: four.Subnet(), NIC: nic}, {Destination: six.Subnet(), NIC: nic},
		{Destination: header.IPv4EmptySubnet, Gateway: tcpip.AddrFromSlice(c.Gateway4.AsSlice()), NIC: nic},
		{Destination: header.IPv6EmptySubnet, Gateway: tcpip.AddrFromSlice(c.Gateway6.AsSlice()), NIC: nic}})
	g.rewire(t, conn)
	t.Cleanup(func() {
		g.cut()
		g.stack.Close()
	})
	return g
}

// rewire moves the guest's frames over conn from now on.
func (g *guest) rewire(t testing.TB, conn net.Conn) {
	t.Helper()
	if g.cut != nil {
		g.cut()
	}
	g.conn = conn
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		in := bufio.NewReaderSize(conn, 256<<10)
		for {
			frame, err := readFrame(in)
			if err != nil {
				return
			}
			pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
			g.link.InjectInbound(0, pkt)
			pkt.DecRef()
		}
	})
	done.Go(func() {
		for {
			pkt := g.link.ReadContext(ctx)
			if pkt == nil {
				return
			}
			out := net.Buffers(append([][]byte{binary.BigEndian.AppendUint32(nil, uint32(pkt.Size()))}, pkt.AsSlices()...))
			_, err := out.WriteTo(conn)
			pkt.DecRef()
			if err != nil {
				return
			}
		}
	})
	g.cut = func() {
		cancel()
		_ = conn.Close()
		done.Wait()
	}
}

func readFrame(in io.Reader) ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(in, length[:]); err != nil {
		return nil, err
	}
	frame := make([]byte, binary.BigEndian.Uint32(length[:]))
	_, err := io.ReadFull(in, frame)
	return frame, err
}

func full(to netip.AddrPort) (tcpip.FullAddress, tcpip.NetworkProtocolNumber) {
	protocol := ipv4.ProtocolNumber
	if to.Addr().Is6() {
		protocol = ipv6.ProtocolNumber
	}
	return tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(to.Addr().AsSlice()), Port: to.Port()}, protocol
}

// dial is the guest's connect(2).
func (g *guest) dial(to netip.AddrPort) (*gonet.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	at, protocol := full(to)
	return gonet.DialContextTCP(ctx, g.stack, at, protocol)
}

func (g *guest) dialUDP(to netip.AddrPort) (*gonet.UDPConn, error) {
	at, protocol := full(to)
	return gonet.DialUDP(g.stack, nil, &at, protocol)
}

// listen is the guest's listen(2), with an echoing server.
func (g *guest) listen(t testing.TB, port uint16) {
	t.Helper()
	l, err := gonet.ListenTCP(g.stack, tcpip.FullAddress{NIC: nic, Port: port}, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	echoing(t, l)
}

// echoing serves what it gets back, with the peer's address first.
func echoing(t testing.TB, l net.Listener) {
	t.Helper()
	var done sync.WaitGroup
	done.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			done.Go(func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			})
		}
	})
	t.Cleanup(func() { _ = l.Close() })
}

// server is one of the world's, over TCP, that echoes.
func server(t testing.TB) (port uint16) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	echoing(t, l)
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

func serverUDP(t testing.TB) (port uint16) {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 64<<10)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				if errors.Is(err, net.ErrClosed) {
					return
				}
				continue
			}
			_, _ = c.WriteTo(buf[:n], from)
		}
	}()
	t.Cleanup(func() { _ = c.Close(); <-done })
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// talk sends text and wants it back.
func talk(conn net.Conn, text string) error {
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte(text)); err != nil {
		return err
	}
	back := make([]byte, len(text))
	if _, err := io.ReadFull(conn, back); err != nil {
		return err
	}
	if string(back) != text {
		return fmt.Errorf("%q came back as %q", text, back)
	}
	return nil
}

// until waits for something that has no event.
func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s never came", what)
		}
	}
}

func TestMain(m *testing.M) {
	if len(os.Args) > 0 && os.Args[0] == Program { // Host.Start starts this test again as the program
		os.Exit(Main(os.Args))
	}
	if os.Getenv(probeEnv) != "" {
		probe()
	}
	goleak.VerifyTestMain(m,
		// The stack's clock and its TCP goroutines end a moment after Close.
		goleak.IgnoreAnyFunction("gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*processor).start"))
}
