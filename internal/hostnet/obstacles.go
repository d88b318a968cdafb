package hostnet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/network"
)

// Obstacle is something of another program that drops what guests send, or what they are answered.
type Obstacle struct {
	Table, Chain string
	Fix          string // what to type
}

// query is a packet that the rules of others are asked about. What is not known of it is left empty.
type query struct {
	hook    string // as hooks has it
	in, out string // devices
	proto   byte   // unix.IPPROTO_*
	port    uint16 // that it is for
	v6      bool
	state   uint32 // a bit of conntrack's: ctNew or ctEstablished
}

// Bits of a connection's state (NF_CT_STATE_BIT of linux/netfilter/nf_conntrack_common.h).
const (
	ctEstablished = 1 << 1
	ctNew         = 1 << 3
)

// queries are those that have to pass: a guest's first one out, its answer, and a question to the DNS server.
func queries(bridge string, v6 bool) []query {
	return []query{
		{hook: "forward", in: bridge, v6: v6, state: ctNew},
		{hook: "forward", out: bridge, v6: v6, state: ctEstablished},
		{hook: "input", in: bridge, v6: v6, state: ctNew, proto: unix.IPPROTO_UDP, port: 53},
	}
}

// verdict is what becomes of a packet in a chain.
type verdict int

const (
	undecided verdict = iota
	accepted
	dropped
)

// step is a rule, as it looks to one packet.
type step struct {
	applies bool // for certain
	act     expr.VerdictKind
	chain   string // that VerdictJump and VerdictGoto go to
}

// judge follows a packet through a chain. What is not known to apply does not: most rules let something more pass.
func judge(steps func(chain string) ([]step, error), chain string, depth int) (verdict, error) {
	const deepest = 64 // the kernel allows 16
	if depth > deepest {
		return undecided, nil
	}
	list, err := steps(chain)
	if err != nil {
		return undecided, err
	}
	for _, s := range list {
		if !s.applies {
			continue
		}
		switch s.act {
		case expr.VerdictAccept, expr.VerdictQueue, expr.VerdictStolen, expr.VerdictStop:
			return accepted, nil
		case expr.VerdictDrop:
			return dropped, nil
		case expr.VerdictReturn:
			return undecided, nil
		case expr.VerdictGoto:
			return judge(steps, s.chain, depth+1)
		case expr.VerdictJump:
			if v, err := judge(steps, s.chain, depth+1); err != nil || v != undecided {
				return v, err
			}
		case expr.VerdictContinue, expr.VerdictBreak, expr.VerdictRepeat:
		}
	}
	return undecided, nil
}

// table is one of nftables', read as it is needed.
type table struct {
	c      *nftables.Conn
	t      *nftables.Table
	chains map[string]*nftables.Chain
	rules  map[string][]*nftables.Rule
	sets   map[string][]nftables.SetElement
}

func (t *table) steps(q query) func(chain string) ([]step, error) {
	return func(chain string) ([]step, error) {
		rules, known := t.rules[chain]
		if !known {
			c := t.chains[chain]
			if c == nil { // it has just gone
				return nil, nil
			}
			var err error
			if rules, err = t.c.GetRules(t.t, c); err != nil {
				return nil, failed(err, "nftables", "the firewall's rules cannot be read")
			}
			t.rules[chain] = rules
		}
		out := make([]step, len(rules))
		for i, r := range rules {
			out[i] = t.step(q, r.Exprs)
		}
		return out, nil
	}
}

// elements are a set's, of one whose keys are no ranges; nil for others.
func (t *table) elements(name string) []nftables.SetElement {
	e, known := t.sets[name]
	if !known {
		if set, err := t.c.GetSetByName(t.t, name); err == nil && !set.Interval && !set.Concatenation {
			e, _ = t.c.GetSetElements(set) // what cannot be read is not known
		}
		t.sets[name] = e
	}
	return e
}

// step looks at a rule's expressions one after another, as the kernel does, with registers of what is known.
func (t *table) step(q query, exprs []expr.Any) step {
	s := step{applies: true, act: expr.VerdictContinue}
	known := map[uint32][]byte{}
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Meta:
			if !e.SourceRegister {
				known[e.Register] = q.meta(e.Key)
			}
		case *expr.Ct:
			if known[e.Register] = nil; e.Key == expr.CtKeySTATE {
				known[e.Register] = binary.NativeEndian.AppendUint32(nil, q.state)
			}
		case *expr.Fib:
			if known[e.Register] = nil; q.local() && e.ResultADDRTYPE && e.FlagDADDR {
				known[e.Register] = binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)
			}
		case *expr.Payload:
			if e.OperationType == expr.PayloadLoad {
				known[e.DestRegister] = q.payload(e)
			}
		case *expr.Bitwise:
			known[e.DestRegister] = masked(known[e.SourceRegister], e)
		case *expr.Cmp:
			have := known[e.Register]
			equal := len(have) >= len(e.Data) && bytes.Equal(have[:len(e.Data)], e.Data)
			s.applies = have != nil && (e.Op == expr.CmpOpEq && equal || e.Op == expr.CmpOpNeq && !equal)
		case *expr.Lookup:
			have, elements := known[e.SourceRegister], t.elements(e.SetName)
			i := slices.IndexFunc(elements, func(el nftables.SetElement) bool { return bytes.Equal(el.Key, have) })
			switch {
			case have == nil || elements == nil:
				s.applies = false
			case e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT && i >= 0:
				// What a map has for it is not decoded. Who names the bridge there lets it pass.
				s.act = expr.VerdictAccept
				return s
			case e.IsDestRegSet:
				s.applies = false
			default:
				s.applies = i >= 0 != e.Invert
			}
		case *expr.Match:
			s.applies = q.matches(e)
		case *expr.Verdict:
			s.act, s.chain = e.Kind, e.Chain
			return s
		case *expr.Reject:
			s.act = expr.VerdictDrop
			return s
		case *expr.Target: // of iptables
			if e.Name == "REJECT" {
				s.act = expr.VerdictDrop
				return s
			}
		case *expr.Counter, *expr.Log, *expr.Notrack, *expr.Immediate, *expr.Masq, *expr.NAT:
		default:
			s.applies = false
		}
		if !s.applies {
			return s
		}
	}
	return s
}

func masked(b []byte, e *expr.Bitwise) []byte {
	if len(b) != len(e.Mask) || len(b) != len(e.Xor) {
		return nil
	}
	out := make([]byte, len(b))
	for i := range b {
		out[i] = b[i]&e.Mask[i] ^ e.Xor[i]
	}
	return out
}

// meta is what a register has of the packet; nil if that is not known.
func (q query) meta(key expr.MetaKey) []byte {
	name := func(s string) []byte {
		if s == "" {
			return nil
		}
		return append([]byte(s), make([]byte, unix.IFNAMSIZ-len(s))...)
	}
	switch {
	case key == expr.MetaKeyIIFNAME:
		return name(q.in)
	case key == expr.MetaKeyOIFNAME:
		return name(q.out)
	case key == expr.MetaKeyL4PROTO && q.proto != 0:
		return []byte{q.proto}
	case key == expr.MetaKeyNFPROTO && q.v6:
		return []byte{unix.NFPROTO_IPV6}
	case key == expr.MetaKeyNFPROTO:
		return []byte{unix.NFPROTO_IPV4}
	}
	return nil
}

// local says whether it is for the host itself.
func (q query) local() bool { return q.hook == "input" }

func (q query) payload(e *expr.Payload) []byte {
	switch {
	case q.port != 0 && e.Base == expr.PayloadBaseTransportHeader && e.Offset == 2 && e.Len == 2: // both TCP's and UDP's
		return binary.BigEndian.AppendUint16(nil, q.port)
	case q.proto != 0 && !q.v6 && e.Base == expr.PayloadBaseNetworkHeader && e.Offset == 9 && e.Len == 1: // RFC 791 3.1
		return []byte{q.proto}
	}
	return nil
}

// Flags of a match on conntrack (linux/netfilter/xt_conntrack.h).
const (
	xtState = 1 << 0
	xtAlias = 1 << 13 // it was written as a match on state
)

// matches says whether a match of iptables is known to.
func (q query) matches(e *expr.Match) bool {
	state := func(i xt.ConntrackMtinfoBase, mask uint32) bool {
		return i.MatchFlags&^xtAlias == xtState && i.InvertFlags == 0 && mask&q.state != 0
	}
	within := func(proto byte, source, target [2]uint16) bool {
		return q.proto == proto && source == [2]uint16{0, 65535} && target[0] <= q.port && q.port <= target[1]
	}
	switch info := e.Info.(type) {
	case *xt.ConntrackMtinfo1:
		return state(info.ConntrackMtinfoBase, uint32(info.StateMask))
	case *xt.ConntrackMtinfo2:
		return state(info.ConntrackMtinfoBase, uint32(info.StateMask))
	case *xt.ConntrackMtinfo3:
		return state(info.ConntrackMtinfoBase, uint32(info.StateMask))
	case *xt.AddrType:
		return q.local() && info.Dest == uint16(xt.AddrTypeLocal) && info.Source == 0 && !info.InvertDest
	case *xt.AddrTypeV1:
		return q.local() && info.Dest == uint16(xt.AddrTypeLocal) && info.Source == 0 && info.Flags == 0
	case *xt.Udp:
		return within(unix.IPPROTO_UDP, info.SrcPorts, info.DstPorts) && info.InvFlags == 0
	case *xt.Tcp:
		return within(unix.IPPROTO_TCP, info.SrcPorts, info.DstPorts) && info.InvFlags == 0
	}
	return e.Name == "comment"
}

var familyNames = map[nftables.TableFamily]string{nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet"}

// Obstacles follows what guests send through the rules of others: an accept of ours in one table does not undo a drop
// in another. What Docker drops by nftables is not among them: rules of ours see to it.
func (h *Host) Obstacles() ([]Obstacle, error) {
	c, err := dialRules()
	if err != nil {
		return nil, failed(err, "nftables", "the firewall cannot be reached")
	}
	tables, err := c.ListTables()
	if err != nil {
		return nil, failed(err, "nftables", "the firewall's tables cannot be listed")
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, failed(err, "nftables", "the firewall's chains cannot be listed")
	}
	var out []Obstacle
	add := func(o Obstacle) {
		if !slices.ContainsFunc(out, func(other Obstacle) bool { return other.Fix == o.Fix }) {
			out = append(out, o)
		}
	}
	for _, t := range tables {
		family, ok := familyNames[t.Family]
		if !ok || strings.HasPrefix(t.Name, network.TableName("")) || t.Family == nftables.TableFamilyIPv6 && !h.way6() {
			continue
		}
		read := &table{c: c, t: t, chains: map[string]*nftables.Chain{}, rules: map[string][]*nftables.Rule{}, sets: map[string][]nftables.SetElement{}}
		for _, chain := range chains {
			if chain.Table.Name == t.Name && chain.Table.Family == t.Family {
				read.chains[chain.Name] = chain
			}
		}
		for _, q := range queries(h.s.Bridge, t.Family == nftables.TableFamilyIPv6) {
			for _, chain := range read.base(q.hook) {
				v, err := judge(read.steps(q), chain.Name, 0)
				if err != nil {
					return nil, err
				}
				if v == undecided && chain.Policy != nil && *chain.Policy == nftables.ChainPolicyDrop {
					v = dropped
				}
				if v == dropped && (q.hook != "forward" || read.chains[dockerChain] == nil) {
					add(Obstacle{Table: family + " " + t.Name, Chain: chain.Name, Fix: read.fix(q, family, chain.Name, h.s.Bridge)})
				}
			}
		}
	}
	legacy, err := legacyObstacles(h.s.Bridge, h.way6)
	if err != nil {
		return nil, err
	}
	for _, o := range legacy {
		add(o)
	}
	return out, nil
}

// base are the chains of a hook that filter, by name.
func (t *table) base(hook string) (out []*nftables.Chain) {
	for _, c := range t.chains {
		if c.Hooknum != nil && *c.Hooknum == *hooks[hook] && c.Type == nftables.ChainTypeFilter {
			out = append(out, c)
		}
	}
	slices.SortFunc(out, func(a, b *nftables.Chain) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// fix is what lets a packet pass, in the words of the program that the table is.
func (t *table) fix(q query, family, chain, bridge string) string {
	rule := func(match string) string {
		return fmt.Sprintf("sudo nft insert rule %s %s %s %s accept", family, t.t.Name, chain, match)
	}
	ufw := t.chains["ufw-before-forward"] != nil || t.chains["ufw6-before-forward"] != nil
	switch {
	case t.t.Name == "firewalld":
		return fmt.Sprintf("sudo firewall-cmd --permanent --zone=trusted --add-interface=%s && sudo firewall-cmd --reload", bridge)
	case ufw && q.hook == "input":
		return fmt.Sprintf("sudo ufw allow in on %s to any port 53", bridge)
	case ufw:
		return fmt.Sprintf("sudo ufw route allow in on %s; sudo ufw route allow out on %s", bridge, bridge)
	case q.hook == "input":
		return rule("iifname "+bridge+" udp dport 53") + "; " + rule("iifname "+bridge+" tcp dport 53")
	}
	return rule("iifname "+bridge) + "; " + rule("oifname "+bridge)
}
