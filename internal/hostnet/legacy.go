package hostnet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unsafe"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// The firewall from before nftables, which some distributions' iptables still makes rules in (iptables --version says
// "legacy"). It speaks no netlink and knows no changes, only whole tables, so it is read and never written.
//
// Layouts are those of linux/netfilter_ipv4/ip_tables.h and linux/netfilter_ipv6/ip6_tables.h, with the machine's byte order.

// legacyFamily is where the two differ.
type legacyFamily struct {
	names    string // the file with the tables that there are in the namespace of this thread
	program  string
	domain   int
	level    int
	v6       bool
	inDevice int // offsets in an entry of the devices' names and masks; zero before: the rule is for all addresses
	proto    int
	inverse  int
	target   int // offset of the offsets of its target and of the next entry
	entry    int // its size without matches and target
}

var legacyFamilies = []legacyFamily{
	{names: "/proc/thread-self/net/ip_tables_names", program: "iptables-legacy", domain: unix.AF_INET, level: unix.SOL_IP, inDevice: 16, proto: 80, inverse: 83, target: 88, entry: 112},
	{names: "/proc/thread-self/net/ip6_tables_names", program: "ip6tables-legacy", domain: unix.AF_INET6, level: unix.SOL_IPV6, v6: true, inDevice: 64, proto: 128, inverse: 132, target: 140, entry: 168},
}

const (
	legacyInfo     = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	legacyEntries  = 65 // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES
	legacyInfoSize = 84 // name, valid hooks, five entries, five underflows, their number, their size
	legacyHeader   = 40 // of the entries: name and size, padded
	legacyMost     = 64 << 20

	legacyGoto      = 0x2 // IPT_F_GOTO, in the flags before the inverse ones
	legacyInvIn     = 0x1 // IPT_INV_VIA_IN and its like
	legacyInvOut    = 0x2
	legacyInvProto  = 0x40
	legacyTargetLen = 32 // of struct xt_entry_target

	legacyDrop   = -1 // -NF_DROP - 1
	legacyReturn = -5 // XT_RETURN: -NF_REPEAT - 1
)

var legacyHooks = map[string]int{"input": 1, "forward": 2} // NF_INET_LOCAL_IN, NF_INET_FORWARD

// legacyObstacles are those in the filter tables, if there are such: to ask for one would make it.
func legacyObstacles(bridge string, way6 func() bool) (out []Obstacle, err error) {
	for _, f := range legacyFamilies {
		if f.v6 && !way6() {
			continue
		}
		names, err := os.ReadFile(f.names)
		switch {
		case errors.Is(err, fs.ErrNotExist), err == nil && !slices.Contains(strings.Fields(string(names)), "filter"):
			continue
		case err != nil:
			return nil, failed(err, f.names, "it cannot be read")
		}
		t, err := f.read()
		if err != nil {
			return nil, failed(err, f.program, "the table filter cannot be read")
		}
		for _, q := range queries(bridge, f.v6) {
			v, err := t.judge(q)
			if err != nil {
				return nil, failed(err, f.program, "the table filter makes no sense")
			}
			if v == dropped {
				chain := strings.ToUpper(q.hook)
				out = append(out, Obstacle{Table: f.program + " filter", Chain: chain, Fix: t.fix(q, chain, bridge)})
			}
		}
	}
	return out, nil
}

// legacyTable is a table as the kernel gives it.
type legacyTable struct {
	f       legacyFamily
	first   [5]uint32 // of each hook's chain
	policy  [5]uint32 // each hook's last entry
	entries []byte
	docker  bool // Docker has its chain there
}

func (f legacyFamily) read() (*legacyTable, error) {
	fd, err := unix.Socket(f.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	ask := func(option int, b []byte) (int, error) {
		n := uint32(len(b))
		_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(f.level), uintptr(option), uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
		if e != 0 {
			return 0, os.NewSyscallError("getsockopt", e)
		}
		return int(n), nil
	}
	ne := binary.NativeEndian
	for range 10 { // EAGAIN: it was changed between the two questions
		info := make([]byte, legacyInfoSize)
		copy(info, "filter")
		if n, err := ask(legacyInfo, info); err != nil || n != legacyInfoSize {
			return nil, fmt.Errorf("%d bytes: %w", n, err)
		}
		size := ne.Uint32(info[80:])
		if size > legacyMost {
			return nil, fmt.Errorf("it has %d bytes", size)
		}
		b := make([]byte, legacyHeader+int(size))
		copy(b, "filter")
		ne.PutUint32(b[32:], size)
		_, err := ask(legacyEntries, b)
		if errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return nil, err
		}
		t := &legacyTable{f: f, entries: b[legacyHeader:]}
		for i := range t.first {
			t.first[i], t.policy[i] = ne.Uint32(info[36+4*i:]), ne.Uint32(info[56+4*i:])
		}
		t.docker = bytes.Contains(t.entries, append([]byte(dockerChain), 0))
		return t, nil
	}
	return nil, unix.EAGAIN
}

// judge follows a packet through the chain of its hook.
func (t *legacyTable) judge(q query) (verdict, error) {
	hook := legacyHooks[q.hook]
	v, err := judge(func(chain string) ([]step, error) { return t.steps(q, chain, t.policy[hook]) }, fmt.Sprint(t.first[hook]), 0)
	if err != nil || v != undecided {
		return v, err
	}
	end, err := t.steps(q, fmt.Sprint(t.policy[hook]), 0)
	if err == nil && len(end) > 0 && end[0].act == expr.VerdictDrop {
		v = dropped
	}
	return v, err
}

// steps are those of the chain that begins at an offset, which is its name here, up to the one that ends it.
func (t *legacyTable) steps(q query, chain string, policy uint32) (out []step, err error) {
	var at uint32
	if _, err := fmt.Sscan(chain, &at); err != nil {
		return nil, err
	}
	ne, f := binary.NativeEndian, t.f
	for {
		if int(at)+f.entry+legacyTargetLen > len(t.entries) {
			return nil, fmt.Errorf("a chain that does not end, at %d of %d", at, len(t.entries))
		}
		e := t.entries[at:]
		target, next := int(ne.Uint16(e[f.target:])), int(ne.Uint16(e[f.target+2:]))
		if next < f.entry+legacyTargetLen || next > len(e) || target < f.entry || target+legacyTargetLen > next {
			return nil, fmt.Errorf("an entry of %d bytes with a target at %d", next, target)
		}
		s := step{applies: f.applies(q, e[:next], target), act: expr.VerdictContinue}
		name, _, _ := bytes.Cut(e[target+2:target+legacyTargetLen-1], []byte{0})
		switch string(name) {
		case "": // the standard one
			if target+legacyTargetLen+4 > next {
				return nil, errors.New("a verdict that is cut")
			}
			switch v := int32(ne.Uint32(e[target+legacyTargetLen:])); {
			case v >= 0 && e[f.inverse-1]&legacyGoto != 0:
				s.act, s.chain = expr.VerdictGoto, fmt.Sprint(v)
			case v >= 0:
				s.act, s.chain = expr.VerdictJump, fmt.Sprint(v)
			case v == legacyDrop:
				s.act = expr.VerdictDrop
			case v == legacyReturn:
				s.act = expr.VerdictReturn
			default:
				s.act = expr.VerdictAccept
			}
		case "REJECT":
			s.act = expr.VerdictDrop
		case "ERROR": // the next chain's name, or the table's end
			return out, nil
		}
		if at == policy && policy != 0 {
			return out, nil
		}
		out = append(out, s)
		if policy == 0 { // it was the policy that was asked for
			return out, nil
		}
		at += uint32(next)
	}
}

// applies says whether an entry is known to apply.
func (f legacyFamily) applies(q query, e []byte, target int) bool {
	const device = unix.IFNAMSIZ
	if bytes.ContainsFunc(e[f.inDevice/2:f.inDevice], func(r rune) bool { return r != 0 }) { // the masks of its addresses
		return false
	}
	inverse := e[f.inverse]
	through := func(at int, have string, invert bool) bool {
		name, mask := e[at:at+device], e[at+2*device:at+3*device]
		if mask[0] == 0 {
			return true
		}
		same := true
		padded := append([]byte(have), make([]byte, device)...)
		for i := range device {
			same = same && (padded[i]^name[i])&mask[i] == 0
		}
		return have != "" && same != invert
	}
	proto := binary.NativeEndian.Uint16(e[f.proto:])
	if !through(f.inDevice, q.in, inverse&legacyInvIn != 0) || !through(f.inDevice+device, q.out, inverse&legacyInvOut != 0) ||
		proto != 0 && (q.proto == 0 || (proto == uint16(q.proto)) == (inverse&legacyInvProto != 0)) {
		return false
	}
	for m := e[f.entry:target]; len(m) >= legacyTargetLen; { // struct xt_entry_match: size, name, revision
		size := int(binary.NativeEndian.Uint16(m))
		if size < legacyTargetLen || size > len(m) || !q.matchesLegacy(m[:size]) {
			return false
		}
		m = m[size:]
	}
	return true
}

// matchesLegacy says whether a match is known to.
func (q query) matchesLegacy(m []byte) bool {
	name, _, _ := bytes.Cut(m[2:legacyTargetLen-1], []byte{0})
	ne, info := binary.NativeEndian, m[legacyTargetLen:]
	switch string(name) {
	case "comment":
		return true
	case "udp":
		return q.proto == unix.IPPROTO_UDP && len(info) >= 9 && ne.Uint32(info) == 0xffff0000 && ne.Uint16(info[4:]) <= q.port && q.port <= ne.Uint16(info[6:]) && info[8] == 0
	case "conntrack": // struct xt_conntrack_mtinfo3: sixteen addresses and masks, expiry, ports, flags, states
		const flags = 8*16 + 2*4 + 5*2
		return len(info) >= flags+6 && ne.Uint16(info[flags:])&^xtAlias == xtState && ne.Uint16(info[flags+2:]) == 0 && uint32(ne.Uint16(info[flags+4:]))&q.state != 0
	case "addrtype": // struct xt_addrtype_info_v1: source, target, flags
		return q.local() && len(info) >= 8 && ne.Uint32(info) == uint32(xt.AddrTypeLocal)<<16 && ne.Uint32(info[4:]) == 0
	case "state": // struct xt_state_info
		return len(info) >= 4 && ne.Uint32(info)&q.state != 0
	}
	return false
}

// fix lets a packet pass, before others have their say: in Docker's chain for that, if there is one.
func (t *legacyTable) fix(q query, chain, bridge string) string {
	if q.hook == "input" {
		return fmt.Sprintf("sudo %[1]s -I %[2]s -i %[3]s -p udp --dport 53 -j ACCEPT; sudo %[1]s -I %[2]s -i %[3]s -p tcp --dport 53 -j ACCEPT", t.f.program, chain, bridge)
	}
	if t.docker {
		chain = dockerChain
	}
	return fmt.Sprintf("sudo %[1]s -I %[2]s -i %[3]s -j ACCEPT; sudo %[1]s -I %[2]s -o %[3]s -j ACCEPT", t.f.program, chain, bridge)
}
