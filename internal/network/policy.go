package network

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"maps"
	"net"
	"net/netip"
	"slices"
)

// Guest is a VM whose interface is on the bridge.
type Guest struct {
	TAP   string
	MAC   string
	IPv4  netip.Addr
	IPv6  netip.Addr // zero: none
	NAT   bool
	Group string // "" for none
}

// Policy is everything that decides what may pass.
type Policy struct {
	Installation string
	Bridge       string
	TAPPrefix    string       // begins the names of the guests' ports, and of no other device
	Hosts        []netip.Addr // the host's on the bridge, where its DNS server answers guests
	HostPorts    []uint16     // of TCP, which guests reach at Hosts as well
	NAT6         bool         // the host has a way out by IPv6
	Guests       []Guest
}

// MaxHostPorts bounds Policy.HostPorts: each costs the firewall a rule for each of Hosts.
const MaxHostPorts = 64

// passed is the mark that a packet between two guests of a group gets in the bridge's table, in place of
// the group's number: so the inet table, through which the kernel takes bridged packets as well if it has
// br_netfilter, knows what was decided.
const passed = 0x62677200

// TableName is the name of an installation's tables, of both families.
func TableName(installation string) string { return "banger_" + installation }

// The priorities of base chains. Bridge tables have a numbering of their own (NF_BR_PRI_FILTER_BRIDGED
// of linux/netfilter_bridge.h is -200); in the inet table -10 comes before the filters of others, so
// that what they accept was not dropped here is never asked, and what is dropped here costs them nothing.
const (
	bridgePriority = -200
	filterPriority = -10
	sourceNAT      = 100 // NF_IP_PRI_NAT_SRC of linux/netfilter_ipv4.h
)

// Ruleset says it to the kernel: a table bridge, which sees what passes between ports and what the
// guests' frames are made of, and a table inet for what passes the host. Guests are elements of sets: the
// rules are the same for none and for a thousand, and each packet is looked up, not compared.
//
//   - A guest sends with its own MAC and addresses alone, by frames, ARP and neighbour discovery, and
//     claims no other's address. No other kind of frame leaves it, and no router's message.
//   - A guest reaches another only if both are of one group.
//   - Of the host, a guest reaches the DNS server on the bridge's own addresses, and HostPorts there; what the host
//     asks of it, it answers.
//   - A guest with NAT reaches beyond the host, and is answered; the others do not.
func (p Policy) Ruleset() Ruleset { return p.ruleset(slices.Clone(p.Guests), groupNumbers(p.Guests)) }

func (p Policy) ruleset(guests []Guest, numbers map[string]uint32) Ruleset {
	slices.SortFunc(guests, func(a, b Guest) int { return cmp.Compare(a.TAP, b.TAP) })
	return Ruleset{Tables: []Table{p.bridgeTable(guests, numbers), p.inetTable(guests)}}
}

// Since tells what to take away and what to add, of the sets' elements, where the policy was from. Only guests that differ
// are in it: with a thousand of them, most of a change would be to say again what is. ok is false if more than
// elements differs.
func (p Policy) Since(from Policy) (gone, come Ruleset, ok bool) {
	if p.Installation != from.Installation || p.Bridge != from.Bridge || p.TAPPrefix != from.TAPPrefix || p.NAT6 != from.NAT6 || !slices.Equal(p.Hosts, from.Hosts) ||
		!slices.Equal(p.HostPorts, from.HostPorts) {
		return gone, come, false
	}
	before, now := groupNumbers(from.Guests), groupNumbers(p.Guests)
	for group, n := range before {
		if m, there := now[group]; there && m != n { // it had the same hash as one that came or went
			return gone, come, false
		}
	}
	had := make(map[string]Guest, len(from.Guests))
	for _, g := range from.Guests {
		had[g.TAP] = g
	}
	var old, fresh []Guest
	for _, g := range p.Guests {
		if h, there := had[g.TAP]; !there || h != g {
			fresh = append(fresh, g)
			if there {
				old = append(old, h)
			}
		}
		delete(had, g.TAP)
	}
	for _, g := range had {
		old = append(old, g)
	}
	return from.ruleset(old, before), p.ruleset(fresh, now), true
}

func (p Policy) bridgeTable(guests []Guest, numbers map[string]uint32) Table {
	hardware := Set{Name: "hardware", Key: []Type{TypeIfname, TypeEther}}
	arp := Set{Name: "arp", Key: []Type{TypeIfname, TypeEther, TypeIPv4}}
	four := Set{Name: "addresses4", Key: []Type{TypeIfname, TypeIPv4}}
	six := Set{Name: "addresses6", Key: []Type{TypeIfname, TypeIPv6}}
	groups := Set{Name: "groups", Key: []Type{TypeIfname}, Value: TypeMark}
	members := Set{Name: "members", Key: []Type{TypeMark, TypeIfname}}
	for _, g := range guests {
		hardware.add(g.TAP, g.MAC)
		arp.add(g.TAP, g.MAC, g.IPv4.String())
		four.add(g.TAP, g.IPv4.String())
		if g.IPv6.IsValid() {
			six.add(g.TAP, g.IPv6.String())
			six.add(g.TAP, linkLocal(g.MAC).String())
		}
		if g.Group != "" {
			n := fmt.Sprintf("%#x", numbers[g.Group])
			groups.Elements = append(groups.Elements, Element{Key: []string{g.TAP}, Value: n})
			members.add(n, g.TAP)
		}
	}
	fromHost := Rule{[]Term{Begins{Field: Iifname, Not: true, Prefix: p.TAPPrefix}}, Accept}
	icmp6 := func(kind string, more ...Term) []Term {
		return append([]Term{Is{Field: EtherType, Value: "ip6"}, Is{Field: L4Protocol, Value: "ipv6-icmp"}, Is{Field: ICMPv6Type, Value: kind}}, more...)
	}
	ownSix := In{Fields: []Field{Iifname, IP6Source}, Set: six.Name}
	noAddress := Is{Field: IP6Source, Value: "::"} // it looks whether its address is free
	return Table{Family: "bridge", Name: TableName(p.Installation),
		Sets: []Set{hardware, arp, four, six, groups, members},
		Chains: []Chain{
			{Name: "from_guests", Type: "filter", Hook: "prerouting", Priority: bridgePriority, Rules: []Rule{
				fromHost,
				{[]Term{In{Fields: []Field{Iifname, EtherSource}, Not: true, Set: hardware.Name}}, Drop},
				{[]Term{Is{Field: EtherType, Value: "ip"}, In{Fields: []Field{Iifname, IPSource}, Set: four.Name}}, Accept},
				{[]Term{Is{Field: EtherType, Value: "arp"}, Is{Field: ARPOperation, Value: "request"}, In{Fields: []Field{Iifname, ARPEther, ARPIP}, Set: arp.Name}}, Accept},
				{[]Term{Is{Field: EtherType, Value: "arp"}, Is{Field: ARPOperation, Value: "reply"}, In{Fields: []Field{Iifname, ARPEther, ARPIP}, Set: arp.Name}}, Accept},
				{icmp6("nd-router-advert"), Drop},
				{icmp6("nd-redirect"), Drop},
				{icmp6("nd-neighbor-advert", In{Fields: []Field{Iifname, NDTarget}, Not: true, Set: six.Name}), Drop},
				{[]Term{Is{Field: EtherType, Value: "ip6"}, ownSix}, Accept},
				{icmp6("nd-neighbor-solicit", noAddress, In{Fields: []Field{Iifname, NDTarget}, Set: six.Name}), Accept},
				{nil, Drop},
			}},
			{Name: "between_guests", Type: "filter", Hook: "forward", Priority: bridgePriority, Rules: []Rule{
				fromHost,
				{[]Term{MarkFrom{Field: Iifname, Map: groups.Name}}, Continue},
				{[]Term{In{Fields: []Field{Mark, Oifname}, Set: members.Name}, MarkAs{passed}}, Accept},
				{nil, Drop},
			}},
		}}
}

func (p Policy) inetTable(guests []Guest) Table {
	four := Set{Name: "nat4", Key: []Type{TypeIPv4}}
	six := Set{Name: "nat6", Key: []Type{TypeIPv6}}
	for _, g := range guests {
		if !g.NAT {
			continue
		}
		four.add(g.IPv4.String())
		if g.IPv6.IsValid() && p.NAT6 {
			six.add(g.IPv6.String())
		}
	}
	in, out := Is{Field: Iifname, Value: p.Bridge}, Is{Field: Oifname, Value: p.Bridge}
	elsewhere := Is{Field: Oifname, Not: true, Value: p.Bridge}
	is4, is6 := Is{Field: Family, Value: "ipv4"}, Is{Field: Family, Value: "ipv6"}
	toHost := []Rule{
		{[]Term{Is{Field: Iifname, Not: true, Value: p.Bridge}}, Accept},
		{[]Term{Established{}}, Accept},
	}
	for _, h := range p.Hosts {
		family, field := is4, IPTarget
		if h.Is6() {
			family, field = is6, IP6Target
		}
		reached := func(l4 string, port uint16) {
			toHost = append(toHost, Rule{[]Term{family, Is{Field: field, Value: h.String()}, Is{Field: L4Protocol, Value: l4}, Is{Field: TargetPort, Value: fmt.Sprint(port)}}, Accept})
		}
		reached("udp", 53)
		reached("tcp", 53)
		for _, port := range p.HostPorts {
			reached("tcp", port)
		}
	}
	for _, kind := range []string{"nd-neighbor-solicit", "nd-neighbor-advert"} {
		toHost = append(toHost, Rule{[]Term{is6, Is{Field: L4Protocol, Value: "ipv6-icmp"}, Is{Field: ICMPv6Type, Value: kind}}, Accept})
	}
	toHost = append(toHost, Rule{nil, Drop})
	own := func(f Field) In {
		set := four.Name
		if TypeOf(f) == TypeIPv6 {
			set = six.Name
		}
		return In{Fields: []Field{f}, Set: set}
	}
	return Table{Family: "inet", Name: TableName(p.Installation), Sets: []Set{four, six},
		Chains: []Chain{
			{Name: "to_host", Type: "filter", Hook: "input", Priority: filterPriority, Rules: toHost},
			{Name: "through_host", Type: "filter", Hook: "forward", Priority: filterPriority, Rules: []Rule{
				{[]Term{in, out, Is{Field: Mark, Value: fmt.Sprintf("%#x", passed)}}, Accept},
				{[]Term{in, out}, Drop}, // a guest that takes the host for a router to another
				{[]Term{in, is4, own(IPSource)}, Accept},
				{[]Term{in, is6, own(IP6Source)}, Accept},
				{[]Term{in}, Drop},
				{[]Term{out, Established{}, is4, own(IPTarget)}, Accept},
				{[]Term{out, Established{}, is6, own(IP6Target)}, Accept},
				{[]Term{out}, Drop},
			}},
			{Name: "masquerade", Type: "nat", Hook: "postrouting", Priority: sourceNAT, Rules: []Rule{
				{[]Term{elsewhere, is4, own(IPSource)}, Masquerade},
				{[]Term{elsewhere, is6, own(IP6Source)}, Masquerade},
			}},
		}}
}

func (s *Set) add(key ...string) { s.Elements = append(s.Elements, Element{Key: key}) }

// groupNumbers numbers groups by a hash of their names, so that a group keeps its number whatever others
// come and go. Two groups never share one.
func groupNumbers(guests []Guest) map[string]uint32 {
	names := map[string]bool{}
	for _, g := range guests {
		if g.Group != "" {
			names[g.Group] = true
		}
	}
	numbers, taken := map[string]uint32{}, map[uint32]bool{0: true, passed: true}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		h := fnv.New32a()
		_, _ = h.Write([]byte(name)) // a hash takes everything
		n := h.Sum32()
		for taken[n] {
			n++
		}
		numbers[name], taken[n] = n, true
	}
	return numbers
}

// linkLocal is the address that Linux gives an interface by itself, from its MAC (RFC 4291, appendix A).
func linkLocal(mac string) netip.Addr {
	m, err := net.ParseMAC(mac)
	if err != nil || len(m) != 6 {
		return netip.IPv6LinkLocalAllNodes() // no address of a guest: it may use none
	}
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 0, 0, 0, 0, 0, 0, m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
}
