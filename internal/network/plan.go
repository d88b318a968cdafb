// Package network owns the pure part of the guests' networks: which addresses a slot has, and the
// policy, that is what may pass between guests, host and world.
//
// It touches no host: internal/hostnet makes what is decided here. Everything in it is a function of
// the settings and of the VMs.
package network

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Plan says which addresses the slots of one installation have. The first address of each range is
// the host's, slot 0 has the next one, and so on.
type Plan struct {
	Installation string       // its id: 12 hex digits
	IPv4         netip.Prefix // without host bits
	IPv6         netip.Prefix // of 64 bits, without host bits; zero: no IPv6
}

// UniqueLocal is the /64 of an installation that asked for none in particular: its random id in place of
// the global ID of RFC 4193 (40 bits), and subnet 0.
func UniqueLocal(installation string) netip.Prefix {
	a := [16]byte{0xfd}
	id, err := hex.DecodeString(installation)
	if err != nil || len(id) < 5 { // an id that is not ours: any constant range is as good
		id = []byte{0xba, 0x96, 0xe7, 0, 1}
	}
	copy(a[1:6], id)
	return netip.PrefixFrom(netip.AddrFrom16(a), 64)
}

// Slots is how many VMs the ranges have addresses for: all of IPv4's but the network's own, the host's
// and the broadcast address.
func (p Plan) Slots() int { return 1<<(32-p.IPv4.Bits()) - 3 }

// Host4 is the host's address on the guests' network, with the network's length.
func (p Plan) Host4() netip.Prefix {
	return netip.PrefixFrom(p.IPv4.Addr().Next(), p.IPv4.Bits())
}

// Host6 is likewise, zero without IPv6.
func (p Plan) Host6() netip.Prefix {
	if !p.IPv6.IsValid() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(p.IPv6.Addr().Next(), p.IPv6.Bits())
}

// Interface is what the VM of a slot gets. fault.Exhausted if the range has no address for it.
func (p Plan) Interface(slot int, mtu int) (vm.Interface, error) {
	if slot < 0 || slot >= p.Slots() {
		return vm.Interface{}, fault.New(fault.Exhausted, p.IPv4.String(), "the range has addresses for %d VMs, and all are taken", p.Slots()).
			WithHint("delete a VM, or set a larger range in config.toml, as cidr = \"%s\"", netip.PrefixFrom(p.IPv4.Addr(), max(16, p.IPv4.Bits()-2)).Masked())
	}
	a := p.IPv4.Addr().As4()
	binary.BigEndian.PutUint32(a[:], binary.BigEndian.Uint32(a[:])+2+uint32(slot))
	i := vm.Interface{
		Kind: vm.BridgeNetwork, MAC: p.MAC(slot).String(), MTU: mtu, TAP: p.TAP(slot),
		IPv4: netip.PrefixFrom(netip.AddrFrom4(a), p.IPv4.Bits()), Gateway4: p.Host4().Addr(),
	}
	if p.IPv6.IsValid() {
		b := p.IPv6.Addr().As16()
		binary.BigEndian.PutUint64(b[8:], 2+uint64(slot))
		i.IPv6, i.Gateway6 = netip.PrefixFrom(netip.AddrFrom16(b), 64), p.Host6().Addr()
	}
	return i, nil
}

// MAC is the hardware address of a slot: locally administered, of one station (IEEE 802, "U/L" and "I/G"),
// from the installation and the slot. With the slot, not the VM, it goes with the addresses: who remembers
// the hardware address of a VM that was deleted is right about the next one that has its address.
func (p Plan) MAC(slot int) net.HardwareAddr {
	mac := net.HardwareAddr{0x02, 0, 0, 0, 0, 0}
	id, err := hex.DecodeString(p.Installation)
	if err == nil && len(id) >= 3 {
		copy(mac[1:4], id)
	}
	binary.BigEndian.PutUint16(mac[4:], uint16(slot))
	return mac
}

// TAPPrefix begins the name of every TAP of this installation, and of nothing else.
func (p Plan) TAPPrefix() string { return "bgr" + p.Installation[:min(6, len(p.Installation))] + "-" }

// TAP is the name of a slot's device on the host: 15 characters at most, with a slot below 2^16.
func (p Plan) TAP(slot int) string { return fmt.Sprintf("%s%d", p.TAPPrefix(), slot) }
