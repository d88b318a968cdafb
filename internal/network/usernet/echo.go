package usernet

import (
	"bytes"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/net/icmp"
	xipv4 "golang.org/x/net/ipv4"
	xipv6 "golang.org/x/net/ipv6"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// echoTime is how long an answer is waited for.
const echoTime = 5 * time.Second

// echo asks for the guest, by a socket that needs no privilege where net.ipv4.ping_group_range has the user's group
// (icmp(7)); elsewhere a guest's pings go unanswered. frame is the reader's, and is not kept.
func (n *Network) echo(frame []byte, to netip.Addr, ident, sequence uint16, payload []byte) {
	if err := n.permits(to); err != nil {
		return
	}
	select {
	case n.echoes <- struct{}{}:
	default:
		return // as a busy router does
	}
	guestMAC := header.Ethernet(frame).SourceAddress()
	payload = slices.Clone(payload)
	n.tasks.Go(func() {
		defer func() { <-n.echoes }()
		if err := n.ask(to, sequence, payload); err != nil {
			n.log.Debug("an echo is not answered", "to", to, "err", err)
			return
		}
		n.inject(n.echoReply(guestMAC, to, ident, sequence, payload))
	})
}

// ask sends one echo request of the host's and waits for its reply. The kernel chooses the identifier.
func (n *Network) ask(to netip.Addr, sequence uint16, payload []byte) error {
	network, protocol := "udp4", 1
	var kind, reply icmp.Type = xipv4.ICMPTypeEcho, xipv4.ICMPTypeEchoReply
	if to.Is6() {
		network, protocol = "udp6", 58
		kind, reply = xipv6.ICMPTypeEchoRequest, xipv6.ICMPTypeEchoReply
	}
	conn, err := icmp.ListenPacket(network, "")
	if err != nil {
		return err
	}
	defer conn.Close()
	request, err := (&icmp.Message{Type: kind, Body: &icmp.Echo{Seq: int(sequence), Data: payload}}).Marshal(nil)
	if err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(echoTime)); err != nil {
		return err
	}
	if _, err := conn.WriteTo(request, &net.UDPAddr{IP: to.AsSlice()}); err != nil {
		return err
	}
	buf := make([]byte, pumpSize)
	for {
		size, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		m, err := icmp.ParseMessage(protocol, buf[:size])
		if err != nil || m.Type != reply {
			continue
		}
		e, ok := m.Body.(*icmp.Echo)
		if addr, isUDP := from.(*net.UDPAddr); ok && isUDP && addr.AddrPort().Addr().Unmap().WithZone("") == to &&
			e.Seq == int(sequence) && bytes.Equal(e.Data, payload) {
			return nil
		}
	}
}

// echoReply is the frame that answers the guest.
func (n *Network) echoReply(guestMAC tcpip.LinkAddress, from netip.Addr, ident, sequence uint16, payload []byte) []byte {
	if from.Is4() {
		const all = header.EthernetMinimumSize + header.IPv4MinimumSize + header.ICMPv4MinimumSize
		frame := make([]byte, all+len(payload))
		header.Ethernet(frame).Encode(&header.EthernetFields{SrcAddr: n.link.LinkAddress(), DstAddr: guestMAC, Type: header.IPv4ProtocolNumber})
		h := header.IPv4(frame[header.EthernetMinimumSize:])
		h.Encode(&header.IPv4Fields{TotalLength: uint16(len(h)), TTL: 64, Protocol: uint8(header.ICMPv4ProtocolNumber),
			SrcAddr: tcpip.AddrFromSlice(from.AsSlice()), DstAddr: tcpip.AddrFromSlice(n.cfg.Guest4.Addr().AsSlice())})
		h.SetChecksum(^h.CalculateChecksum())
		m := header.ICMPv4(h[header.IPv4MinimumSize:])
		m.SetType(header.ICMPv4EchoReply)
		m.SetIdent(ident)
		m.SetSequence(sequence)
		copy(m[header.ICMPv4MinimumSize:], payload)
		m.SetChecksum(^checksum.Checksum(m, 0))
		return frame
	}
	const all = header.EthernetMinimumSize + header.IPv6MinimumSize + header.ICMPv6EchoMinimumSize
	frame := make([]byte, all+len(payload))
	header.Ethernet(frame).Encode(&header.EthernetFields{SrcAddr: n.link.LinkAddress(), DstAddr: guestMAC, Type: header.IPv6ProtocolNumber})
	h := header.IPv6(frame[header.EthernetMinimumSize:])
	src, dst := tcpip.AddrFromSlice(from.AsSlice()), tcpip.AddrFromSlice(n.cfg.Guest6.Addr().AsSlice())
	h.Encode(&header.IPv6Fields{PayloadLength: uint16(len(h) - header.IPv6MinimumSize), HopLimit: 64, TransportProtocol: header.ICMPv6ProtocolNumber, SrcAddr: src, DstAddr: dst})
	m := header.ICMPv6(h[header.IPv6MinimumSize:])
	m.SetType(header.ICMPv6EchoReply)
	m.SetIdent(ident)
	m.SetSequence(sequence)
	copy(m[header.ICMPv6EchoMinimumSize:], payload)
	m.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: m, Src: src, Dst: dst}))
	return frame
}

// inject puts a whole frame into the queue to the guest.
func (n *Network) inject(frame []byte) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
	defer pkt.DecRef()
	var list stack.PacketBufferList
	list.PushBack(pkt)
	_, _ = n.link.WritePackets(list) // a full queue drops it
}
