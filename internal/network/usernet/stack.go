package usernet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip"
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

	names "git.thaloco.com/thaloco/banger/internal/dns"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

const nic = tcpip.NICID(1)

// Outside is what a network knows of the host. Tests put their own in its place.
type Outside struct {
	// Reach returns an error if guests must not get to an address, whatever is set: see hostReach.
	Reach func(netip.Addr) error
	// Dial connects; network is "tcp" or "udp".
	Dial func(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error)
	// Resolvers are the host's own, asked for each query of a guest.
	Resolvers func() ([]string, error)
}

// TheHost is the real one.
func TheHost() Outside {
	return Outside{Reach: hostReach, Dial: dialHost, Resolvers: names.HostResolvers}
}

// Network is one guest's. Safe for concurrent use.
type Network struct {
	cfg     Config
	outside Outside
	log     *slog.Logger

	stack *stack.Stack
	link  *channel.Endpoint

	nat      atomic.Bool
	attached atomic.Bool
	tcp, udp *flows
	echoes   chan struct{} // one token for each echo that is under way

	publisher publisher

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	tasks  sync.WaitGroup
	dns    []*dns.Server
}

// New makes a network that nobody is connected to. It begins with nothing allowed and nothing published: Set.
func New(cfg Config, outside Outside, log *slog.Logger) (*Network, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	n := &Network{cfg: cfg, outside: outside, log: log, tcp: newFlows(maxTCP), udp: newFlows(maxUDP), echoes: make(chan struct{}, maxEchoes)}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.publisher = publisher{network: n, inbound: make(chan struct{}, maxInbound), open: map[uint16]net.Listener{}, told: map[uint16]bool{}}
	if err := n.makeStack(); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	if err := n.serveDNS(); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *Network) makeStack() error {
	mac, err := net.ParseMAC(n.cfg.MAC)
	if err != nil {
		return err
	}
	n.link = channel.New(queueLen, uint32(n.cfg.MTU+header.EthernetMinimumSize), tcpip.LinkAddress(mac))
	// What comes by a local socket was not damaged on the way; QEMU has no checksum offload on it, so they are right.
	n.link.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	n.stack = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{arp.NewProtocol, ipv4.NewProtocol,
			// Nobody else can have the gateway's address.
			ipv6.NewProtocolWithOptions(ipv6.Options{DADConfigs: stack.DADConfigurations{DupAddrDetectTransmits: 0}})},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	sack := tcpip.TCPSACKEnabled(true)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: 256 << 10, Max: 1 << 20}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: 256 << 10, Max: 1 << 20}
	for _, option := range []tcpip.SettableTransportProtocolOption{&sack, &receive, &send} {
		if e := n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, option); e != nil {
			return fmt.Errorf("set an option of TCP: %s", e)
		}
	}
	if e := n.stack.CreateNIC(nic, ethernet.New(n.link)); e != nil {
		return fmt.Errorf("make the stack's interface: %s", e)
	}
	var routes []tcpip.Route
	for _, a := range []struct {
		protocol tcpip.NetworkProtocolNumber
		gateway  netip.Addr
		guest    netip.Prefix
	}{{ipv4.ProtocolNumber, n.cfg.Gateway4, n.cfg.Guest4}, {ipv6.ProtocolNumber, n.cfg.Gateway6, n.cfg.Guest6}} {
		if !a.guest.IsValid() {
			continue
		}
		address := tcpip.AddressWithPrefix{Address: tcpip.AddrFromSlice(a.gateway.AsSlice()), PrefixLen: a.guest.Bits()}
		if e := n.stack.AddProtocolAddress(nic, tcpip.ProtocolAddress{Protocol: a.protocol, AddressWithPrefix: address}, stack.AddressProperties{}); e != nil {
			return fmt.Errorf("give the stack the address %s: %s", a.gateway, e)
		}
		routes = append(routes, tcpip.Route{Destination: address.Subnet(), NIC: nic})
	}
	n.stack.SetRouteTable(routes)
	// It takes packets for any address, and answers with that address.
	if e := n.stack.SetPromiscuousMode(nic, true); e != nil {
		return fmt.Errorf("take packets for others: %s", e)
	}
	if e := n.stack.SetSpoofing(nic, true); e != nil {
		return fmt.Errorf("answer for others: %s", e)
	}
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(n.stack, 0, maxDialing, n.outboundTCP).HandlePacket)
	out := udp.NewForwarder(n.stack, n.outboundUDP)
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, func(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
		if n.permits(addrOf(id.LocalAddress)) != nil {
			return false // the stack says so to the guest: port unreachable
		}
		return out.HandlePacket(id, pkt)
	})
	return nil
}

// addrOf is the other library's address.
func addrOf(a tcpip.Address) netip.Addr {
	addr, _ := netip.AddrFromSlice(a.AsSlice())
	return addr
}

// Serve carries the frames of a VMM that is connected by conn, which it closes, until that ends. One at a time.
func (n *Network) Serve(ctx context.Context, conn net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(n.ctx, cancel)
	defer stop()
	n.link.Drain() // what was for the last one
	n.attached.Store(true)
	defer n.attached.Store(false)
	err := n.serveVMM(ctx, conn)
	if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// Set puts settings in force. Connections that they do not allow any more are ended; others go on.
func (n *Network) Set(s Settings) {
	n.nat.Store(s.NAT)
	if !s.NAT {
		n.tcp.closeAll()
		n.udp.closeAll()
	}
	if s.Ports != nil {
		n.Publish(s.Ports)
	}
}

// Publish makes ports those that are published. Connections to others go on.
func (n *Network) Publish(ports []uint16) { n.publisher.set(clean(ports)) }

// Status says what is in force.
func (n *Network) Status() Status {
	s := Status{Settings: Settings{NAT: n.nat.Load()}, Attached: n.attached.Load(), TCP: n.tcp.len() + len(n.publisher.inbound), UDP: n.udp.len()}
	s.Ports, s.Failed = n.publisher.state()
	return s
}

// Close ends all connections and waits for what served them, for a few seconds at most.
func (n *Network) Close() error {
	n.cancel()
	n.publisher.set(nil)
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	for _, s := range n.dns {
		_ = s.ShutdownContext(ctx) // over a stack that ends as well
	}
	for _, f := range []*flows{n.tcp, n.udp} {
		f.closeAll()
	}
	done := make(chan struct{})
	go func() { n.tasks.Wait(); close(done) }()
	var err error
	select {
	case <-done:
	case <-ctx.Done():
		err = fault.New(fault.Timeout, "user network", "connections did not end within %v", closeTime)
	}
	if n.stack != nil {
		n.stack.Close()
		n.link.Close()
	}
	return err
}
