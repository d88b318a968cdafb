package hostnet

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/network"
)

// dataTypes are nftables' types by their names.
var dataTypes = map[network.Type]nftables.SetDatatype{
	network.TypeIfname: nftables.TypeIFName, network.TypeEther: nftables.TypeEtherAddr,
	network.TypeIPv4: nftables.TypeIPAddr, network.TypeIPv6: nftables.TypeIP6Addr, network.TypeMark: nftables.TypeMark,
}

// words are the values that nft(8) has a word for.
var words = map[network.Type]map[string][]byte{
	network.TypeProto:   {"ip": {0x08, 0x00}, "arp": {0x08, 0x06}, "ip6": {0x86, 0xdd}},                                               // linux/if_ether.h
	network.TypeARPOp:   {"request": {0, 1}, "reply": {0, 2}},                                                                         // linux/if_arp.h
	network.TypeL4:      {"tcp": {unix.IPPROTO_TCP}, "udp": {unix.IPPROTO_UDP}, "ipv6-icmp": {unix.IPPROTO_ICMPV6}},                   //
	network.TypeICMPv6:  {"nd-router-advert": {134}, "nd-neighbor-solicit": {135}, "nd-neighbor-advert": {136}, "nd-redirect": {137}}, // RFC 4861
	network.TypeNFProto: {"ipv4": {unix.NFPROTO_IPV4}, "ipv6": {unix.NFPROTO_IPV6}},
}

// encode makes the kernel's form of a value: of network byte order, but for marks.
func encode(t network.Type, s string) ([]byte, error) {
	bad := fmt.Errorf("%q is no value of type %s", s, t)
	switch t {
	case network.TypeIfname:
		if len(s) == 0 || len(s) >= unix.IFNAMSIZ {
			return nil, bad
		}
		b := make([]byte, unix.IFNAMSIZ)
		copy(b, s)
		return b, nil
	case network.TypeEther:
		mac, err := net.ParseMAC(s)
		if err != nil || len(mac) != 6 {
			return nil, bad
		}
		return mac, nil
	case network.TypeIPv4, network.TypeIPv6:
		a, err := netip.ParseAddr(s)
		if err != nil || a.Is4() != (t == network.TypeIPv4) || a.Zone() != "" {
			return nil, bad
		}
		return a.AsSlice(), nil
	case network.TypeMark:
		n, err := strconv.ParseUint(s, 0, 32)
		if err != nil {
			return nil, bad
		}
		return binary.NativeEndian.AppendUint32(nil, uint32(n)), nil
	case network.TypePort:
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil {
			return nil, bad
		}
		return binary.BigEndian.AppendUint16(nil, uint16(n)), nil
	}
	if b, ok := words[t][s]; ok {
		return b, nil
	}
	return nil, bad
}

// encodeKey concatenates, each part padded to whole registers of four bytes.
func encodeKey(types []network.Type, parts []string) ([]byte, error) {
	if len(types) != len(parts) {
		return nil, fmt.Errorf("a key of %d parts, want %d", len(parts), len(types))
	}
	var key []byte
	for i, t := range types {
		b, err := encode(t, parts[i])
		if err != nil {
			return nil, err
		}
		key = append(key, b...)
		for len(types) > 1 && len(key)%4 != 0 {
			key = append(key, 0)
		}
	}
	return key, nil
}

// where says where in a packet a field is, for those that are not metadata.
var where = map[network.Field]expr.Payload{
	network.EtherSource:  {Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6},
	network.EtherType:    {Base: expr.PayloadBaseLLHeader, Offset: 12, Len: 2},
	network.ARPOperation: {Base: expr.PayloadBaseNetworkHeader, Offset: 6, Len: 2}, // RFC 826
	network.ARPEther:     {Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 6},
	network.ARPIP:        {Base: expr.PayloadBaseNetworkHeader, Offset: 14, Len: 4},
	network.IPSource:     {Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
	network.IPTarget:     {Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
	network.IP6Source:    {Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 16},
	network.IP6Target:    {Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 16},
	network.TargetPort:   {Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	network.ICMPv6Type:   {Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
	network.NDTarget:     {Base: expr.PayloadBaseTransportHeader, Offset: 8, Len: 16},
}

var metadata = map[network.Field]expr.MetaKey{
	network.Iifname: expr.MetaKeyIIFNAME, network.Oifname: expr.MetaKeyOIFNAME, network.Mark: expr.MetaKeyMARK,
	network.L4Protocol: expr.MetaKeyL4PROTO, network.Family: expr.MetaKeyNFPROTO,
}

// load puts a field into a register.
func load(f network.Field, register uint32) (expr.Any, error) {
	if key, ok := metadata[f]; ok {
		return &expr.Meta{Key: key, Register: register}, nil
	}
	if p, ok := where[f]; ok {
		p.DestRegister = register
		return &p, nil
	}
	return nil, fmt.Errorf("there is no field %q", f)
}

func comparison(not bool) expr.CmpOp {
	if not {
		return expr.CmpOpNeq
	}
	return expr.CmpOpEq
}

// first is a register of 16 bytes, and the same bytes are the four registers from narrow on
// (linux/netfilter/nf_tables.h, enum nft_registers).
const (
	first  = unix.NFT_REG_1
	narrow = unix.NFT_REG32_00
)

// expressions are the kernel's form of a term.
func expressions(term network.Term, sets map[string]network.Set) ([]expr.Any, error) {
	switch t := term.(type) {
	case network.Is:
		value, err := encode(network.TypeOf(t.Field), t.Value)
		if err != nil {
			return nil, err
		}
		get, err := load(t.Field, first)
		return []expr.Any{get, &expr.Cmp{Op: comparison(t.Not), Register: first, Data: value}}, err
	case network.Begins: // compared for the length of the prefix alone
		get, err := load(t.Field, first)
		return []expr.Any{get, &expr.Cmp{Op: comparison(t.Not), Register: first, Data: []byte(t.Prefix)}}, err
	case network.In:
		set, ok := sets[t.Set]
		if !ok {
			return nil, fmt.Errorf("there is no set %q", t.Set)
		}
		if len(t.Fields) != len(set.Key) {
			return nil, fmt.Errorf("set %s has keys of %d parts, not %d", t.Set, len(set.Key), len(t.Fields))
		}
		var out []expr.Any
		register := uint32(narrow)
		for i, f := range t.Fields {
			if network.TypeOf(f) != set.Key[i] {
				return nil, fmt.Errorf("%s is no %s, as the keys of set %s have", f, set.Key[i], t.Set)
			}
			get, err := load(f, register)
			if err != nil {
				return nil, err
			}
			out = append(out, get)
			register += (dataTypes[set.Key[i]].Bytes + 3) / 4
		}
		return append(out, &expr.Lookup{SourceRegister: narrow, SetName: t.Set, Invert: t.Not}), nil
	case network.Established:
		states := expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED
		return []expr.Any{
			&expr.Ct{Key: expr.CtKeySTATE, Register: first},
			&expr.Bitwise{SourceRegister: first, DestRegister: first, Len: 4,
				Mask: binary.NativeEndian.AppendUint32(nil, states), Xor: []byte{0, 0, 0, 0}},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: first, Data: []byte{0, 0, 0, 0}},
		}, nil
	case network.MarkFrom:
		get, err := load(t.Field, first)
		return []expr.Any{get,
			&expr.Lookup{SourceRegister: first, DestRegister: first, IsDestRegSet: true, SetName: t.Map},
			&expr.Meta{Key: expr.MetaKeyMARK, Register: first, SourceRegister: true}}, err
	case network.MarkAs:
		return []expr.Any{
			&expr.Immediate{Register: first, Data: binary.NativeEndian.AppendUint32(nil, t.Mark)},
			&expr.Meta{Key: expr.MetaKeyMARK, Register: first, SourceRegister: true}}, nil
	}
	return nil, fmt.Errorf("there is no term %T", term)
}

// ruleExpressions are the kernel's form of a rule.
func ruleExpressions(r network.Rule, sets map[string]network.Set) ([]expr.Any, error) {
	var out []expr.Any
	for _, t := range r.Terms {
		e, err := expressions(t, sets)
		if err != nil {
			return nil, err
		}
		out = append(out, e...)
	}
	switch r.Verdict {
	case network.Accept:
		out = append(out, &expr.Verdict{Kind: expr.VerdictAccept})
	case network.Drop:
		out = append(out, &expr.Verdict{Kind: expr.VerdictDrop})
	case network.Masquerade:
		out = append(out, &expr.Masq{})
	case network.Continue:
	default:
		return nil, fmt.Errorf("there is no verdict %q", r.Verdict)
	}
	return out, nil
}
