package hostnet

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/network/networktest"
)

// TestObstacles follows guests' packets through rules that people write. What Docker and firewalld make is looked at beside them
// (TestBesideDocker and TestBesideFirewalld of cmd/bangerd).
func TestObstacles(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	h := open(t, sample())
	drop, accept := nftables.ChainPolicyDrop, nftables.ChainPolicyAccept
	pad := func(s string) []byte { return append([]byte(s), make([]byte, unix.IFNAMSIZ-len(s))...) }
	device := func(key expr.MetaKey, op expr.CmpOp, name []byte, kind expr.VerdictKind) []expr.Any {
		return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: name}, &expr.Counter{}, &expr.Verdict{Kind: kind}}
	}
	in, out := expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME
	established := []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, ctEstablished), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
	dns := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 53}},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
	reject := []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
	other := []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: "other"}}
	always := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	const insert = "sudo nft insert rule inet people "
	for _, c := range []struct {
		name   string
		hook   *nftables.ChainHook
		policy nftables.ChainPolicy
		rules  [][]expr.Any
		other  [][]expr.Any // of a chain that is jumped to
		fix    string       // "" for no obstacle
	}{
		{name: "drops all", hook: nftables.ChainHookForward, policy: drop, fix: insert + "base iifname banger0 accept; " + insert + "base oifname banger0 accept"},
		{name: "as the fix has it", hook: nftables.ChainHookForward, policy: drop,
			rules: [][]expr.Any{device(in, expr.CmpOpEq, pad("banger0"), expr.VerdictAccept), device(out, expr.CmpOpEq, pad("banger0"), expr.VerdictAccept)}},
		{name: "answers alone", hook: nftables.ChainHookForward, policy: drop, rules: [][]expr.Any{established}, fix: insert},
		{name: "out, and answers", hook: nftables.ChainHookForward, policy: drop, rules: [][]expr.Any{established, device(in, expr.CmpOpEq, []byte("bang"), expr.VerdictAccept)}},
		{name: "another device", hook: nftables.ChainHookForward, policy: drop, rules: [][]expr.Any{established, device(in, expr.CmpOpEq, pad("banger01"), expr.VerdictAccept)}, fix: insert},
		{name: "all but another device", hook: nftables.ChainHookForward, policy: drop, rules: [][]expr.Any{established, device(in, expr.CmpOpNeq, pad("eth0"), expr.VerdictAccept)}},
		{name: "drops ours", hook: nftables.ChainHookForward, policy: accept, rules: [][]expr.Any{device(in, expr.CmpOpEq, pad("banger0"), expr.VerdictDrop)}, fix: insert},
		{name: "a last rule that rejects", hook: nftables.ChainHookForward, policy: accept, rules: [][]expr.Any{established, reject}, fix: insert},
		{name: "a chain that accepts", hook: nftables.ChainHookForward, policy: drop, rules: [][]expr.Any{other}, other: [][]expr.Any{always}},
		{name: "a chain that returns", hook: nftables.ChainHookForward, policy: drop, rules: [][]expr.Any{other},
			other: [][]expr.Any{{&expr.Verdict{Kind: expr.VerdictReturn}}, always}, fix: insert},
		{name: "no DNS", hook: nftables.ChainHookInput, policy: drop, rules: [][]expr.Any{established},
			fix: insert + "base iifname banger0 udp dport 53 accept; " + insert + "base iifname banger0 tcp dport 53 accept"},
		{name: "DNS", hook: nftables.ChainHookInput, policy: drop, rules: [][]expr.Any{dns}},
		{name: "of the output it says nothing", hook: nftables.ChainHookOutput, policy: drop},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, err := nftables.New()
			if err != nil {
				t.Fatal(err)
			}
			table := conn.AddTable(&nftables.Table{Name: "people", Family: nftables.TableFamilyINet})
			aside := conn.AddChain(&nftables.Chain{Name: "other", Table: table})
			base := conn.AddChain(&nftables.Chain{Name: "base", Table: table, Type: nftables.ChainTypeFilter, Hooknum: c.hook, Priority: nftables.ChainPriorityFilter, Policy: &c.policy})
			for _, r := range c.other {
				conn.AddRule(&nftables.Rule{Table: table, Chain: aside, Exprs: r})
			}
			for _, r := range c.rules {
				conn.AddRule(&nftables.Rule{Table: table, Chain: base, Exprs: r})
			}
			if err := conn.Flush(); err != nil {
				t.Fatal(err)
			}
			found, err := h.Obstacles()
			if err != nil {
				t.Fatal(err)
			}
			if c.fix == "" && len(found) > 0 || c.fix != "" && (len(found) != 1 || !strings.HasPrefix(found[0].Fix, c.fix) || found[0].Table != "inet people" || found[0].Chain != "base") {
				t.Errorf("found %+v", found)
			}
			conn.DelTable(table)
			if err := conn.Flush(); err != nil {
				t.Fatal(err)
			}
		})
	}
	// By names, as people and programs write it: a set, and a map of verdicts.
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	table := conn.AddTable(&nftables.Table{Name: "people", Family: nftables.TableFamilyINet})
	base := conn.AddChain(&nftables.Chain{Name: "base", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop})
	states := &nftables.Set{Table: table, Anonymous: true, Constant: true, KeyType: nftables.TypeCTState}
	devices := &nftables.Set{Table: table, Anonymous: true, Constant: true, IsMap: true, KeyType: nftables.TypeIFName, DataType: nftables.TypeVerdict}
	for set, elements := range map[*nftables.Set][]nftables.SetElement{
		states:  {{Key: binary.NativeEndian.AppendUint32(nil, ctEstablished)}, {Key: binary.NativeEndian.AppendUint32(nil, 1<<2)}},
		devices: {{Key: pad("eth9"), VerdictData: &expr.Verdict{Kind: expr.VerdictDrop}}, {Key: pad("banger0"), VerdictData: &expr.Verdict{Kind: expr.VerdictAccept}}},
	} {
		if err := conn.AddSet(set, elements); err != nil {
			t.Fatal(err)
		}
	}
	conn.AddRule(&nftables.Rule{Table: table, Chain: base, Exprs: []expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: states.Name, SetID: states.ID}, &expr.Verdict{Kind: expr.VerdictAccept}}})
	conn.AddRule(&nftables.Rule{Table: table, Chain: base, Exprs: []expr.Any{&expr.Meta{Key: in, Register: 1},
		&expr.Lookup{SourceRegister: 1, DestRegister: 0, IsDestRegSet: true, SetName: devices.Name, SetID: devices.ID}}})
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	if found, err := h.Obstacles(); err != nil || len(found) > 0 {
		t.Errorf("with sets: %+v, %v", found, err)
	}
}
