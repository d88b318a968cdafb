package usernet

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func TestOutboundTCP(t *testing.T) {
	r := newRig(t, Settings{NAT: true})
	port := server(t)
	for _, a := range []netip.Addr{world4, world6} {
		conn, err := r.guest.dial(netip.AddrPortFrom(a, port))
		if err != nil {
			t.Fatalf("%s: %v", a, err)
		}
		if err := talk(conn, "hello"); err != nil {
			t.Errorf("%s: %v", a, err)
		}
		// The end of one direction is passed on, and what is on its way back still comes.
		data := make([]byte, 3<<20)
		_, _ = rand.Read(data)
		var got []byte
		done := make(chan error, 1)
		go func() {
			var err error
			got, err = io.ReadAll(conn)
			done <- err
		}()
		if _, err := conn.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d of %d bytes came back: %v", a, len(got), len(data), err)
		}
		_ = conn.Close()
	}
	until(t, "the end of the connections", func() bool { return r.Status().TCP == 0 })
	// Nobody listens: that is a refusal, not silence.
	began := time.Now()
	if conn, err := r.guest.dial(netip.AddrPortFrom(world4, 1)); err == nil || time.Since(began) > patience/2 {
		t.Errorf("a port without a listener: %v, %v after %v", conn, err, time.Since(began))
	}
}

func TestOutboundUDP(t *testing.T) {
	r := newRig(t, Settings{NAT: true})
	port := serverUDP(t)
	for _, a := range []netip.Addr{world4, world6} {
		conn, err := r.guest.dialUDP(netip.AddrPortFrom(a, port))
		if err != nil {
			t.Fatal(err)
		}
		for _, size := range []int{1, 1400, 9000} {
			if err := talk(conn, strings.Repeat("x", size)); err != nil {
				t.Errorf("%s, %d bytes: %v", a, size, err)
			}
		}
		_ = conn.Close()
	}
	if n := r.Status().UDP; n != 2 {
		t.Errorf("%d flows, want 2", n)
	}
}

// TestNATOff wants nothing to leave, and what was open to end when it is turned off.
func TestNATOff(t *testing.T) {
	r := newRig(t, Settings{})
	port, portUDP := server(t), serverUDP(t)
	refused := func(when string) {
		t.Helper()
		before := len(r.outside.dials())
		if conn, err := r.guest.dial(netip.AddrPortFrom(world4, port)); err == nil {
			t.Errorf("%s: a connection was made: %v", when, conn.RemoteAddr())
		}
		conn, err := r.guest.dialUDP(netip.AddrPortFrom(world4, portUDP))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		// The guest is told by an ICMP message, which this stack shows at the next call.
		until(t, "port unreachable", func() bool {
			_, err := conn.Write([]byte("x"))
			return err != nil && strings.Contains(err.Error(), "refused")
		})
		if after := r.outside.dials(); len(after) != before {
			t.Errorf("%s: the host dialled %v", when, after[before:])
		}
	}
	refused("off from the start")
	r.Set(Settings{NAT: true})
	conn, err := r.guest.dial(netip.AddrPortFrom(world4, port))
	if err != nil {
		t.Fatalf("turned on: %v", err)
	}
	defer conn.Close()
	if err := talk(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	r.Set(Settings{})
	if err := talk(conn, "hello"); err == nil {
		t.Error("a connection outlives NAT")
	}
	refused("turned off")
	if s := r.Status(); s.TCP != 0 || s.UDP != 0 || s.NAT {
		t.Errorf("%+v", s)
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// TestHostIsOutOfReach goes for everything that is the host's, with a listener there on all addresses, NAT being on and off.
func TestHostIsOutOfReach(t *testing.T) {
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var reached sync.WaitGroup
	got := make(chan string, 100)
	reached.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			got <- conn.LocalAddr().String()
			_ = conn.Close()
		}
	})
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	targets := []string{"127.0.0.1", "127.0.0.53", "127.200.3.4", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "::127.0.0.1", "64:ff9b::127.0.0.1", "2002:7f00:1::1",
		"169.254.169.254", "fe80::1", "224.0.0.1", "ff02::1", "255.255.255.255", "10.77.0.1", "10.77.0.9", "10.77.0.255", "fd77::1", "fd77::9"}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		targets = append(targets, a.(*net.IPNet).IP.String())
	}
	t.Logf("targets: %v", targets)
	for _, nat := range []bool{true, false} {
		r := newRig(t, Settings{NAT: nat})
		looked := 0
		for _, target := range targets {
			a := netip.MustParseAddr(target)
			if err := r.permits(a); err == nil {
				t.Errorf("NAT %v: %s is permitted", nat, a)
			}
			// And by packets, as a guest's kernel that is not ours may send them: to any address at all.
			frame := syn(guest4.Addr(), guest6.Addr(), a, port)
			if r.admit(frame) {
				looked++
			}
			if _, err := r.guest.conn.Write(framed(frame)); err != nil {
				t.Fatal(err)
			}
		}
		until(t, "a look at each of them", func() bool { return r.refused() == looked })
		if d := r.outside.dials(); len(d) != 0 {
			t.Errorf("NAT %v: the host dialled %v", nat, d)
		}
	}
	_ = l.Close()
	reached.Wait()
	close(got)
	for at := range got {
		t.Errorf("the guest reached %s", at)
	}
}

func framed(frame []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)
}

// syn makes the frame of a TCP segment with SYN.
func syn(from4, from6, to netip.Addr, port uint16) []byte {
	segment := make([]byte, header.TCPMinimumSize)
	header.TCP(segment).Encode(&header.TCPFields{SrcPort: 40000 + port%1000, DstPort: port, SeqNum: 1, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn, WindowSize: 65535})
	return ip(from4, from6, to, header.TCPProtocolNumber, segment)
}

func TestDNS(t *testing.T) {
	var asked []string
	var mu sync.Mutex
	upstream := func(network string) string {
		s := &dns.Server{Net: network, Addr: "127.0.0.1:0", Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			mu.Lock()
			asked = append(asked, network+" "+q.Question[0].Name)
			mu.Unlock()
			m := new(dns.Msg).SetReply(q)
			if network == "udp" && strings.HasPrefix(q.Question[0].Name, "long.") {
				m.Truncated = true
			}
			rr, _ := dns.NewRR(q.Question[0].Name + " 60 IN A 192.0.2.9")
			m.Answer = append(m.Answer, rr)
			_ = w.WriteMsg(m)
		})}
		began := make(chan struct{})
		s.NotifyStartedFunc = func() { close(began) }
		go func() { _ = s.ListenAndServe() }()
		<-began
		t.Cleanup(func() { _ = s.Shutdown() })
		if network == "tcp" {
			return s.Listener.Addr().String()
		}
		return s.PacketConn.LocalAddr().String()
	}
	for _, nat := range []bool{false, true} {
		r := newRig(t, Settings{NAT: nat})
		for _, network := range []string{"udp", "tcp"} {
			at := upstream(network)
			r.outside.mu.Lock()
			r.outside.resolvers = []string{"127.0.0.1:1", at} // the first one does not answer
			r.outside.mu.Unlock()
			for _, gateway := range []netip.Addr{config(t).Gateway4, config(t).Gateway6} {
				ask := func(name string) *dns.Msg {
					t.Helper()
					var conn net.Conn
					var err error
					if network == "tcp" {
						conn, err = r.guest.dial(netip.AddrPortFrom(gateway, dnsPort))
					} else {
						conn, err = r.guest.dialUDP(netip.AddrPortFrom(gateway, dnsPort))
					}
					if err != nil {
						t.Fatalf("%s %s: %v", network, gateway, err)
					}
					defer conn.Close()
					c := dns.Client{Net: network, Timeout: patience}
					m, _, err := c.ExchangeWithConn(new(dns.Msg).SetQuestion(name, dns.TypeA), &dns.Conn{Conn: conn})
					if err != nil {
						t.Fatalf("%s %s %s: %v", network, gateway, name, err)
					}
					return m
				}
				if m := ask("example.com."); nat && (len(m.Answer) != 1 || !strings.Contains(m.Answer[0].String(), "192.0.2.9")) || !nat && m.Rcode != dns.RcodeRefused {
					t.Errorf("NAT %v, %s %s: %v", nat, network, gateway, m)
				}
				if m := ask("long.example.com."); m.Truncated != (nat && network == "udp") {
					t.Errorf("%s: truncated %v", network, m.Truncated)
				}
				if m := ask("Web.vm."); len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != guest4.Addr().String() {
					t.Errorf("%s %s: its own name: %v", network, gateway, m)
				}
				if m := ask("Other.VM."); m.Rcode != dns.RcodeNameError {
					t.Errorf("%s %s: other.vm: %v", network, gateway, m)
				}
			}
		}
	}
	if i := slices.IndexFunc(asked, func(s string) bool { return strings.Contains(strings.ToLower(s), ".vm.") }); i >= 0 {
		t.Errorf("the host's resolver was asked for %s", asked[i])
	}
}

func TestPublish(t *testing.T) {
	r := newRig(t, Settings{})
	r.guest.listen(t, 3000)
	other := freePort(t, r.cfg.Publish)
	r.Set(Settings{Ports: []uint16{3000, other, 3000, 0}})
	if s := r.Status(); !slices.Equal(s.Ports, sorted(3000, other)) || len(s.Failed) != 0 {
		t.Fatalf("%+v", s)
	}
	at := netip.AddrPortFrom(r.cfg.Publish, 3000).String()
	conn, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := talk(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	// Nobody listens in the guest: the connection is reset, not left hanging.
	dead, err := net.Dial("tcp", netip.AddrPortFrom(r.cfg.Publish, other).String())
	if err == nil {
		defer dead.Close()
		err = talk(dead, "hello")
	}
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.EOF) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("a port that nobody listens on: %v", err)
	}
	// A port that is not published any more: what is open goes on.
	r.Set(Settings{Ports: []uint16{other}})
	if c, err := net.Dial("tcp", at); err == nil {
		_ = c.Close()
		t.Error("the port still is published")
	}
	if err := talk(conn, "still here"); err != nil {
		t.Error(err)
	}
	// One that is taken is said to be, and is tried again.
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	r.Set(Settings{Ports: []uint16{3000}})
	if s := r.Status(); len(s.Ports) != 0 || !strings.Contains(s.Failed[3000], "in use") {
		t.Errorf("%+v", s)
	}
	_ = l.Close()
	r.Set(Settings{NAT: true}) // which says nothing of ports
	if s := r.Status(); len(s.Ports) != 0 || !s.NAT {
		t.Errorf("%+v", s)
	}
	r.Publish([]uint16{3000})
	if s := r.Status(); !s.NAT || !slices.Equal(s.Ports, []uint16{3000}) || len(s.Failed) != 0 {
		t.Errorf("%+v", s)
	}
}

func sorted(ports ...uint16) []uint16 { slices.Sort(ports); return ports }

func freePort(t *testing.T, at netip.Addr) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(at, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// TestPings are answered by whom they were for, if at all: never by the stack in another's name.
func TestPings(t *testing.T) {
	r := newRig(t, Settings{})
	_ = r.guest.conn.Close() // one reads what the stack sends
	until(t, "the end of the first VMM", func() bool { return !r.attached.Load() })
	conn := wire(t, r.Network)
	ping := func(to netip.Addr) bool {
		t.Helper()
		if _, err := conn.Write(framed(echoRequest(to))); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		for {
			frame, err := readFrame(conn)
			if err != nil {
				return false
			}
			if isEchoReply(frame, to) {
				return true
			}
		}
	}
	r.Set(Settings{NAT: true})
	for _, a := range []string{"198.51.100.99", "127.0.0.1", "10.77.0.9", "fd77::9", "2001:db8::99"} {
		if ping(netip.MustParseAddr(a)) {
			t.Errorf("%s answers, and nobody is there", a)
		}
	}
}

// TestEchoReply wants the guest to be told what it asked for. TestPing asks.
func TestEchoReply(t *testing.T) {
	r := newRig(t, Settings{NAT: true})
	for _, to := range []netip.Addr{world4, world6} {
		frame := r.echoReply("\x02\x00\x00\x00\x00\x05", to, 0x1234, 7, []byte("payload"))
		if !isEchoReply(frame, to) {
			t.Errorf("%x is no answer of %s", frame, to)
		}
		if to.Is4() {
			h := header.IPv4(frame[header.EthernetMinimumSize:])
			if !h.IsValid(len(h)) || !h.IsChecksumValid() {
				t.Errorf("%x has a wrong header", frame)
			}
		}
	}
}

// TestFrames wants a stream that makes no sense to end, and one whose frames make none to go on.
func TestFrames(t *testing.T) {
	r := newRig(t, Settings{NAT: true})
	_ = r.guest.conn.Close()
	until(t, "the end of the first VMM", func() bool { return !r.attached.Load() })
	for name, bytes := range map[string][]byte{
		"a length beyond the MTU": {0, 2, 0, 0},
		"a length of 4 GiB":       {0xff, 0xff, 0xff, 0xff},
		"half a length":           {0, 0},
		"half a frame":            {0, 0, 0, 60, 1, 2, 3},
	} {
		conn := wire(t, r.Network)
		if _, err := conn.Write(bytes); err != nil {
			t.Fatal(err)
		}
		_ = conn.(*net.UnixConn).CloseWrite()
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, conn); err != nil && isTimeout(err) {
			t.Errorf("%s: the stream stays open", name)
		}
		until(t, name, func() bool { return !r.attached.Load() })
	}
	g := newGuest(t, r.Network)
	for _, frame := range [][]byte{{}, {1}, make([]byte, 14), make([]byte, 60), ip(guest4.Addr(), guest6.Addr(), world4, header.TCPProtocolNumber, nil)} {
		if _, err := g.conn.Write(framed(frame)); err != nil {
			t.Fatal(err)
		}
	}
	port := server(t)
	conn, err := g.dial(netip.AddrPortFrom(world4, port))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := talk(conn, "hello"); err != nil {
		t.Error(err)
	}
}

// TestSpoofing: a guest speaks with its own addresses only.
func TestSpoofing(t *testing.T) {
	r := newRig(t, Settings{NAT: true})
	for _, frame := range [][]byte{
		syn(netip.MustParseAddr("10.77.0.6"), guest6.Addr(), world4, 80),
		syn(netip.MustParseAddr("198.51.100.1"), guest6.Addr(), world4, 80),
		syn(guest4.Addr(), netip.MustParseAddr("fd77::6"), world6, 80),
		syn(guest4.Addr(), netip.MustParseAddr("fe80::5"), world6, 80),
	} {
		if r.admit(frame) {
			t.Errorf("%x is let in", frame)
		}
	}
	if !r.admit(syn(guest4.Addr(), guest6.Addr(), world4, 80)) || !r.admit(syn(guest4.Addr(), guest6.Addr(), world6, 80)) {
		t.Error("the guest's own are not let in")
	}
}

// FuzzAdmit throws frames at a whole network: none may end it.
func FuzzAdmit(f *testing.F) {
	f.Add(syn(guest4.Addr(), guest6.Addr(), world4, 80))
	f.Add(syn(guest4.Addr(), guest6.Addr(), world6, 80))
	f.Add(echoRequest(world4))
	f.Add(echoRequest(world6))
	f.Add(echoRequest(netip.MustParseAddr("fd77::1")))
	r := newRig(f, Settings{})
	f.Fuzz(func(t *testing.T, frame []byte) {
		_ = r.admit(slices.Clone(frame))
		if _, err := r.guest.conn.Write(framed(frame[:min(len(frame), MTU)])); err != nil {
			t.Fatal(err)
		}
	})
}

// TestFlowsAreBounded opens more than there may be.
func TestFlowsAreBounded(t *testing.T) {
	r := newRig(t, Settings{NAT: true})
	port := serverUDP(t)
	last := make([]net.Conn, 0, 8)
	for i := range maxUDP + 200 {
		conn, err := r.guest.dialUDP(netip.AddrPortFrom(world4, port))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if i%256 == 0 { // the wire's queue is bounded as well
			if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		if i >= maxUDP+192 {
			last = append(last, conn)
		}
	}
	for _, conn := range last { // the newest live
		buf := make([]byte, 1)
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := conn.Read(buf); err != nil {
			t.Error(err)
		}
	}
	if n := r.Status().UDP; n > maxUDP {
		t.Errorf("%d flows, where %d are the most", n, maxUDP)
	}
}

func TestTooManyConnections(t *testing.T) {
	r := newRig(t, Settings{NAT: true})
	r.tcp.limit = 16
	port := server(t)
	var open []net.Conn
	for i := range 40 {
		conn, err := r.guest.dial(netip.AddrPortFrom(world4, port))
		if err == nil {
			err = talk(conn, "hello")
			open = append(open, conn)
		}
		if (err == nil) != (i < 16) {
			t.Errorf("connection %d: %v", i, err)
		}
	}
	if n := r.Status().TCP; n != 16 {
		t.Errorf("%d connections are open, want 16", n)
	}
	for _, c := range open {
		_ = c.Close()
	}
	until(t, "room", func() bool { return r.Status().TCP == 0 })
	conn, err := r.guest.dial(netip.AddrPortFrom(world4, port))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := talk(conn, "hello"); err != nil {
		t.Error(err)
	}
}

func TestPublishAddr(t *testing.T) {
	seen := map[netip.Addr]bool{}
	for slot := range 70000 {
		a := PublishAddr("0123456789ab", slot)
		if seen[a] && slot < 65535 {
			t.Fatalf("slot %d has another's address %s", slot, a)
		}
		seen[a] = true
		b := a.As4()
		if b[0] != 127 || b[1] == 0 || b[1] == 255 || slot < 65535 && b[2] == 0 && b[3] == 0 {
			t.Fatalf("slot %d has %s", slot, a)
		}
	}
	if PublishAddr("0123456789ab", 0) == PublishAddr("ba9876543210", 0) {
		t.Error("two installations have the same addresses")
	}
}

func TestValidate(t *testing.T) {
	good := config(t)
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"no MAC":              func(c *Config) { c.MAC = "" },
		"a group's MAC":       func(c *Config) { c.MAC = "01:00:00:00:00:01" },
		"no guest":            func(c *Config) { c.Guest4 = netip.Prefix{} },
		"a gateway elsewhere": func(c *Config) { c.Gateway4 = netip.MustParseAddr("10.78.0.1") },
		"one address":         func(c *Config) { c.Gateway4 = c.Guest4.Addr() },
		"a gateway6 nowhere":  func(c *Config) { c.Gateway6 = netip.Addr{} },
		"a small MTU":         func(c *Config) { c.MTU = 576 },
		"a large MTU":         func(c *Config) { c.MTU = 65521 },
		"ports for all":       func(c *Config) { c.Publish = netip.MustParseAddr("0.0.0.0") },
	} {
		c := good
		change(&c)
		if err := c.Validate(); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// ip makes a frame with a packet to an address, from one of two.
func ip(from4, from6, to netip.Addr, protocol tcpip.TransportProtocolNumber, payload []byte) []byte {
	frame := make([]byte, header.EthernetMinimumSize, 128)
	kind, head := header.IPv4ProtocolNumber, make([]byte, header.IPv4MinimumSize)
	if to.Is4() {
		h := header.IPv4(head)
		h.Encode(&header.IPv4Fields{TotalLength: uint16(len(head) + len(payload)), TTL: 64, Protocol: uint8(protocol),
			SrcAddr: tcpip.AddrFromSlice(from4.AsSlice()), DstAddr: tcpip.AddrFromSlice(to.AsSlice())})
		h.SetChecksum(^h.CalculateChecksum())
	} else {
		kind, head = header.IPv6ProtocolNumber, make([]byte, header.IPv6MinimumSize)
		header.IPv6(head).Encode(&header.IPv6Fields{PayloadLength: uint16(len(payload)), HopLimit: 64, TransportProtocol: protocol,
			SrcAddr: tcpip.AddrFromSlice(from6.AsSlice()), DstAddr: tcpip.AddrFromSlice(to.AsSlice())})
	}
	header.Ethernet(frame).Encode(&header.EthernetFields{SrcAddr: guestMAC, DstAddr: "\x02\x00\x00\x00\x00\x01", Type: kind})
	return append(append(frame, head...), payload...)
}

func echoRequest(to netip.Addr) []byte {
	if to.Is4() {
		m := header.ICMPv4(make([]byte, header.ICMPv4MinimumSize+8))
		m.SetType(header.ICMPv4Echo)
		m.SetSequence(7)
		m.SetChecksum(^checksum.Checksum(m, 0))
		return ip(guest4.Addr(), guest6.Addr(), to, header.ICMPv4ProtocolNumber, m)
	}
	m := header.ICMPv6(make([]byte, header.ICMPv6EchoMinimumSize+8))
	m.SetType(header.ICMPv6EchoRequest)
	m.SetSequence(7)
	m.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: m,
		Src: tcpip.AddrFromSlice(guest6.Addr().AsSlice()), Dst: tcpip.AddrFromSlice(to.AsSlice())}))
	return ip(guest4.Addr(), guest6.Addr(), to, header.ICMPv6ProtocolNumber, m)
}

// isEchoReply says whether a frame answers the guest's echo, as from an address.
func isEchoReply(frame []byte, from netip.Addr) bool {
	if len(frame) < header.EthernetMinimumSize+header.IPv4MinimumSize {
		return false
	}
	packet := frame[header.EthernetMinimumSize:]
	if from.Is4() {
		h := header.IPv4(packet)
		return header.Ethernet(frame).Type() == header.IPv4ProtocolNumber && addrOf(h.SourceAddress()) == from && h.Protocol() == 1 &&
			header.ICMPv4(h.Payload()).Type() == header.ICMPv4EchoReply && header.ICMPv4(h.Payload()).Sequence() == 7
	}
	if header.Ethernet(frame).Type() != header.IPv6ProtocolNumber || len(packet) < header.IPv6MinimumSize+header.ICMPv6EchoMinimumSize {
		return false
	}
	h := header.IPv6(packet)
	return addrOf(h.SourceAddress()) == from && h.NextHeader() == 58 &&
		header.ICMPv6(h.Payload()).Type() == header.ICMPv6EchoReply && header.ICMPv6(h.Payload()).Sequence() == 7
}

// upstream plays a resolver of the host's over UDP. wrong counts what is no query of a name that is not the host's to know.
func upstream(t testing.TB) (at string, wrong *atomic.Int32) {
	t.Helper()
	wrong = &atomic.Int32{}
	s := &dns.Server{Net: "udp", Addr: "127.0.0.1:0", MsgAcceptFunc: func(dns.Header) dns.MsgAcceptAction { return dns.MsgAccept },
		Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			if q.Opcode != dns.OpcodeQuery || len(q.Question) != 1 || strings.HasSuffix(strings.ToLower(q.Question[0].Name), ".vm.") {
				wrong.Add(1)
			}
			_ = w.WriteMsg(new(dns.Msg).SetReply(q))
		})}
	began := make(chan struct{})
	s.NotifyStartedFunc = func() { close(began) }
	go func() { _ = s.ListenAndServe() }()
	<-began
	t.Cleanup(func() { _ = s.Shutdown() })
	return s.PacketConn.LocalAddr().String(), wrong
}

// asking sends what a guest may send to the server at the gateway, and then asks it for the guest's own name.
func (r *rig) asking(t testing.TB, packet []byte) {
	t.Helper()
	at := netip.AddrPortFrom(r.cfg.Gateway4, dnsPort)
	udp, err := r.guest.dialUDP(at)
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	_, _ = udp.Write(packet[:min(len(packet), MTU-28)])
	tcp, err := r.guest.dial(at)
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	packet = packet[:min(len(packet), dns.MaxMsgSize)]
	_, _ = tcp.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(packet))), packet...))
	again, err := r.guest.dialUDP(at)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	c := dns.Client{Net: "udp", Timeout: patience}
	m, _, err := c.ExchangeWithConn(new(dns.Msg).SetQuestion("web.vm.", dns.TypeA), &dns.Conn{Conn: again})
	if err != nil || len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != guest4.Addr().String() {
		t.Errorf("after %x: %v, %v", packet, m, err)
	}
}

// queries are what a guest sends that means ill, and what one asks. FuzzGuests of package dns has more of them.
func queries(t testing.TB) (all [][]byte) {
	t.Helper()
	for _, name := range []string{"web.vm.", "other.vm.", "example.com."} {
		whole, err := new(dns.Msg).SetQuestion(name, dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		notify := slices.Clone(whole)
		notify[2] |= dns.OpcodeNotify << 3
		all = append(all, whole, whole[:12], whole[:len(whole)-3], notify, append(whole[:12:12], 0xc0, 12, 0, 1, 0, 1))
	}
	return append(all, nil)
}

// TestHostileQueries: no packet to its resolver ends the program that is a guest's network, and nothing but queries goes out.
func TestHostileQueries(t *testing.T) {
	r := newRig(t, Settings{NAT: true})
	at, wrong := upstream(t)
	r.outside.mu.Lock()
	r.outside.resolvers = []string{at}
	r.outside.mu.Unlock()
	for _, packet := range queries(t) {
		r.asking(t, packet)
		if wrong.Swap(0) != 0 {
			t.Errorf("the host's resolver was asked for what it is not to know after %x", packet)
		}
	}
}

// FuzzQueries is TestHostileQueries with whatever comes.
func FuzzQueries(f *testing.F) {
	for _, packet := range queries(f) {
		f.Add(packet)
	}
	r := newRig(f, Settings{NAT: true})
	at, wrong := upstream(f)
	r.outside.mu.Lock()
	r.outside.resolvers = []string{at}
	r.outside.mu.Unlock()
	f.Fuzz(func(t *testing.T, packet []byte) {
		r.asking(t, packet)
		if wrong.Swap(0) != 0 {
			t.Errorf("the host's resolver was asked for what it is not to know after %x", packet)
		}
	})
}
