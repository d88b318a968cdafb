package usernet

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// admit looks at a frame from the guest before the stack does, and says whether the stack is to have it. The stack takes
// and answers whatever it gets for any address, so what it must not answer ends here: ARP and ND for
// addresses that are not the gateway's (the guest's own among them), and echo requests to others, which would be
// answered though nobody was asked. A guest speaks with its own addresses only.
func (n *Network) admit(frame []byte) bool {
	if len(frame) < header.EthernetMinimumSize {
		return false
	}
	packet := frame[header.EthernetMinimumSize:]
	switch header.Ethernet(frame).Type() {
	case header.ARPProtocolNumber:
		return n.admitARP(header.ARP(packet))
	case header.IPv4ProtocolNumber:
		return n.admitIPv4(frame, header.IPv4(packet))
	case header.IPv6ProtocolNumber:
		return n.cfg.Guest6.IsValid() && n.admitIPv6(frame, header.IPv6(packet))
	}
	return false
}

func (n *Network) admitARP(a header.ARP) bool {
	if !a.IsValid() {
		return false
	}
	sender, _ := netip.AddrFromSlice(a.ProtocolAddressSender())
	target, _ := netip.AddrFromSlice(a.ProtocolAddressTarget())
	return sender == n.cfg.Guest4.Addr() && target == n.cfg.Gateway4
}

func (n *Network) admitIPv4(frame []byte, h header.IPv4) bool {
	if !h.IsValid(len(h)) || addrOf(h.SourceAddress()) != n.cfg.Guest4.Addr() {
		return false
	}
	to := addrOf(h.DestinationAddress())
	switch {
	case to == n.cfg.Gateway4:
		return true
	case !to.IsGlobalUnicast(), n.cfg.Guest4.Contains(to):
		return false
	}
	switch h.TransportProtocol() {
	case header.TCPProtocolNumber, header.UDPProtocolNumber:
		return true
	case header.ICMPv4ProtocolNumber:
		m := header.ICMPv4(h.Payload())
		if !h.More() && h.FragmentOffset() == 0 && len(m) >= header.ICMPv4MinimumSize && m.Type() == header.ICMPv4Echo {
			n.echo(frame, to, m.Ident(), m.Sequence(), m.Payload())
		}
	}
	return false
}

func (n *Network) admitIPv6(frame []byte, h header.IPv6) bool {
	if !h.IsValid(len(h)) {
		return false
	}
	from, to := addrOf(h.SourceAddress()), addrOf(h.DestinationAddress())
	if from != n.cfg.Guest6.Addr() && !from.IsLinkLocalUnicast() {
		return false // the unspecified one as well: it looks for duplicates of its address, and there is none
	}
	next := tcpip.TransportProtocolNumber(h.NextHeader())
	if next == header.ICMPv6ProtocolNumber {
		m := header.ICMPv6(h.Payload())
		if len(m) < header.ICMPv6MinimumSize {
			return false
		}
		switch m.Type() {
		case header.ICMPv6NeighborSolicit:
			return len(m) >= header.ICMPv6NeighborSolicitMinimumSize &&
				addrOf(header.NDPNeighborSolicit(m.MessageBody()).TargetAddress()) == n.cfg.Gateway6
		case header.ICMPv6NeighborAdvert:
			return true
		case header.ICMPv6EchoRequest:
			if to == n.cfg.Gateway6 {
				return true
			}
			if len(m) >= header.ICMPv6EchoMinimumSize && from == n.cfg.Guest6.Addr() && to.IsGlobalUnicast() && !n.cfg.Guest6.Contains(to) {
				n.echo(frame, to, m.Ident(), m.Sequence(), m.Payload())
			}
		}
		return false
	}
	if from != n.cfg.Guest6.Addr() || to != n.cfg.Gateway6 && (!to.IsGlobalUnicast() || n.cfg.Guest6.Contains(to)) {
		return false
	}
	if next == header.IPv6FragmentHeader {
		if p := h.Payload(); len(p) >= header.IPv6FragmentHeaderSize {
			next = tcpip.TransportProtocolNumber(p[0])
		}
	}
	return next == header.TCPProtocolNumber || next == header.UDPProtocolNumber
}
