package hostnet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/network"
)

// sendBuffer is room for a transaction that sets everything of a thousand VMs at once, in bytes: the kernel
// takes a transaction in one piece or not at all.
const sendBuffer = 8 << 20

// rules is what the kernel's firewall was given, so that a change is sent alone: the cost of a VM more does
// not grow with those that are there.
type rules struct {
	bridge string

	mu sync.Mutex
	// last is nil if it is not known what the kernel has. It is what the kernel had at generation, which the
	// kernel counts up with every change of anyone.
	last       *network.Policy
	generation uint32
}

var families = map[string]nftables.TableFamily{"bridge": nftables.TableFamilyBridge, "inet": nftables.TableFamilyINet}

// hooks: the numbers are the same for both families (linux/netfilter.h, linux/netfilter_bridge.h).
var hooks = map[string]*nftables.ChainHook{
	"prerouting": nftables.ChainHookPrerouting, "input": nftables.ChainHookInput,
	"forward": nftables.ChainHookForward, "postrouting": nftables.ChainHookPostrouting,
}

func dialRules() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		// What is over the system's limit is refused to whoever is not root in the first namespace.
		_ = c.SetWriteBuffer(sendBuffer)
		return c.SetReadBuffer(sendBuffer)
	}))
}

// set makes the kernel have exactly the rules of p, in one transaction.
func (s *rules) set(p network.Policy) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, err := dialRules()
	if err != nil {
		return failed(err, "nftables", "the firewall cannot be reached")
	}
	now, err := generation()
	if err != nil {
		return failed(err, "nftables", "the firewall cannot be reached").WithHint("the kernel needs nf_tables: sudo modprobe nf_tables")
	}
	if s.last == nil || now != s.generation {
		if err := s.acceptInDocker(c, p.Installation); err != nil {
			return err
		}
		if s.last != nil && !intact(c, *s.last) {
			s.last = nil // somebody flushed it, as a firewall does that is loaded again
		}
		if now, err = generation(); err != nil {
			return failed(err, "nftables", "the firewall cannot be reached")
		}
	}
	if s.last != nil {
		if gone, come, ok := p.Since(*s.last); ok {
			changed, err := sendDifference(c, gone, come)
			if err == nil && !changed {
				return s.remember(p, now, 0)
			}
			if err == nil {
				err = c.Flush()
			}
			if err == nil {
				return s.remember(p, now, 1)
			}
			// It has not what it was thought to have: all is said anew.
			if c, err = dialRules(); err != nil {
				return failed(err, "nftables", "the firewall cannot be reached")
			}
		}
	}
	s.last = nil
	if err := sendWhole(c, p.Ruleset()); err != nil {
		return failed(err, "nftables", "the rules for VMs cannot be made")
	}
	if err := c.Flush(); err != nil {
		return failed(err, "nftables", "the kernel refuses the rules for VMs")
	}
	return s.remember(p, now, 1)
}

// remember notes what the kernel has. If its generation is not the one that our own changes have led to,
// somebody else made one in between, and the next set looks.
func (s *rules) remember(p network.Policy, before, own uint32) error {
	after, err := generation()
	if err != nil {
		return failed(err, "nftables", "the firewall cannot be reached")
	}
	p.Guests, p.Hosts, p.HostPorts = slices.Clone(p.Guests), slices.Clone(p.Hosts), slices.Clone(p.HostPorts)
	s.last, s.generation = &p, after
	if after != before+own {
		s.generation = before // never again the kernel's: the next set looks
	}
	return nil
}

// generation is the kernel's count of changes in this network namespace.
func generation() (uint32, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	answers, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN), Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0}, // struct nfgenmsg of linux/netfilter/nfnetlink.h
	})
	if err != nil {
		return 0, err
	}
	for _, m := range answers {
		if len(m.Data) < 4 {
			continue
		}
		d, err := netlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			return 0, err
		}
		d.ByteOrder = binary.BigEndian
		for d.Next() {
			if d.Type() == unix.NFTA_GEN_ID {
				return d.Uint32(), nil
			}
		}
	}
	return 0, errors.New("the kernel does not say which generation its rules are")
}

// intact says whether the kernel still has the chains and rules of p.
func intact(c *nftables.Conn, p network.Policy) bool {
	p.Guests = nil // they are in no rule
	for _, t := range p.Ruleset().Tables {
		table := &nftables.Table{Name: t.Name, Family: families[t.Family]}
		for _, chain := range t.Chains {
			have, err := c.GetRules(table, &nftables.Chain{Name: chain.Name, Table: table})
			if err != nil || len(have) != len(chain.Rules) {
				return false
			}
		}
	}
	return true
}

func kernelSet(t *nftables.Table, s network.Set) (*nftables.Set, error) {
	types := make([]nftables.SetDatatype, len(s.Key))
	for i, k := range s.Key {
		types[i] = dataTypes[k]
	}
	// Marks are of the host's byte order, names read like it; for nft(8) alone, the kernel compares bytes.
	out := &nftables.Set{Table: t, Name: s.Name, KeyType: types[0], KeyByteOrder: binaryutil.BigEndian}
	if s.Key[0] == network.TypeIfname || s.Key[0] == network.TypeMark {
		out.KeyByteOrder = binaryutil.NativeEndian
	}
	if len(types) > 1 {
		concatenated, err := nftables.ConcatSetType(types...)
		if err != nil {
			return nil, err
		}
		out.KeyType, out.Concatenation = concatenated, true
	}
	if s.Value != "" {
		out.IsMap, out.DataType = true, dataTypes[s.Value]
	}
	return out, nil
}

func kernelElements(s network.Set, elements []network.Element) ([]nftables.SetElement, error) {
	out := make([]nftables.SetElement, len(elements))
	for i, e := range elements {
		key, err := encodeKey(s.Key, e.Key)
		if err != nil {
			return nil, fmt.Errorf("set %s: %w", s.Name, err)
		}
		out[i].Key = key
		if s.Value != "" {
			if out[i].Val, err = encode(s.Value, e.Value); err != nil {
				return nil, fmt.Errorf("map %s: %w", s.Name, err)
			}
		}
	}
	return out, nil
}

// portion is how many elements go into one message, whose list has a length of 16 bits.
const portion = 500

func portions(elements []nftables.SetElement, send func([]nftables.SetElement) error) error {
	for part := range slices.Chunk(elements, portion) {
		if err := send(part); err != nil {
			return err
		}
	}
	return nil
}

// sendWhole replaces the tables by r.
func sendWhole(c *nftables.Conn, r network.Ruleset) error {
	for _, t := range r.Tables {
		table := &nftables.Table{Name: t.Name, Family: families[t.Family]}
		c.AddTable(table) // so that there is one to delete
		c.DelTable(table)
		c.AddTable(table)
		byName := map[string]network.Set{}
		for _, s := range t.Sets {
			byName[s.Name] = s
			set, err := kernelSet(table, s)
			if err != nil {
				return err
			}
			if err := c.AddSet(set, nil); err != nil {
				return err
			}
			elements, err := kernelElements(s, s.Elements)
			if err != nil {
				return err
			}
			if err := portions(elements, func(part []nftables.SetElement) error { return c.SetAddElements(set, part) }); err != nil {
				return err
			}
		}
		for _, chain := range t.Chains {
			accept := nftables.ChainPolicyAccept
			made := c.AddChain(&nftables.Chain{Name: chain.Name, Table: table, Type: nftables.ChainType(chain.Type),
				Hooknum: hooks[chain.Hook], Priority: nftables.ChainPriorityRef(nftables.ChainPriority(chain.Priority)), Policy: &accept})
			for _, rule := range chain.Rules {
				e, err := ruleExpressions(rule, byName)
				if err != nil {
					return fmt.Errorf("chain %s: %w", chain.Name, err)
				}
				c.AddRule(&nftables.Rule{Table: table, Chain: made, Exprs: e})
			}
		}
	}
	return nil
}

// sendDifference sends the elements that come and go, and says whether there are any.
func sendDifference(c *nftables.Conn, from, to network.Ruleset) (changed bool, err error) {
	for i, t := range to.Tables {
		table := &nftables.Table{Name: t.Name, Family: families[t.Family]}
		for j, s := range t.Sets {
			gone, come := difference(from.Tables[i].Sets[j].Elements, s.Elements)
			if len(gone)+len(come) == 0 {
				continue
			}
			changed = true
			set, err := kernelSet(table, s)
			if err != nil {
				return false, err
			}
			old, err := kernelElements(s, gone)
			if err != nil {
				return false, err
			}
			fresh, err := kernelElements(s, come)
			if err != nil {
				return false, err
			}
			err = errors.Join(
				portions(old, func(part []nftables.SetElement) error { return c.SetDeleteElements(set, part) }),
				portions(fresh, func(part []nftables.SetElement) error { return c.SetAddElements(set, part) }))
			if err != nil {
				return false, err
			}
		}
	}
	return changed, nil
}

func difference(from, to []network.Element) (gone, come []network.Element) {
	key := func(e network.Element) string { return strings.Join(e.Key, " ") + ":" + e.Value }
	have := make(map[string]bool, len(from))
	for _, e := range from {
		have[key(e)] = true
	}
	for _, e := range to {
		if k := key(e); have[k] {
			delete(have, k)
		} else {
			come = append(come, e)
		}
	}
	if len(have) == 0 {
		return nil, come
	}
	for _, e := range from {
		if have[key(e)] {
			gone = append(gone, e)
		}
	}
	return gone, come
}

// remove deletes the tables, and our rules of Docker's chain. Fine if there are none.
func (s *rules) remove(installation string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = nil
	c, err := dialRules()
	if err != nil {
		return failed(err, "nftables", "the firewall cannot be reached")
	}
	if _, err := generation(); err != nil {
		return nil // a kernel without nftables has no rules
	}
	for _, family := range families {
		tables, err := c.ListTablesOfFamily(family)
		if err != nil {
			return failed(err, "nftables", "the firewall's tables cannot be listed")
		}
		for _, t := range tables {
			if t.Name == network.TableName(installation) && t.Family == family {
				c.DelTable(t)
			}
		}
	}
	for _, family := range dockerFamilies {
		ours, err := dockerRules(c, family, installation)
		if err != nil {
			return err
		}
		for _, r := range ours {
			if err := c.DelRule(r); err != nil {
				return failed(err, "nftables", "a rule of ours in Docker's chain cannot be removed")
			}
		}
	}
	if err := c.Flush(); err != nil {
		return failed(err, "nftables", "the rules for VMs cannot be removed")
	}
	return nil
}

var dockerFamilies = []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6}

// dockerChain is where Docker lets others decide first (its docs, "Packet filtering and firewalls"). Docker
// drops what is forwarded and is not its own: an accept in a table of ours does not change that.
const dockerChain = "DOCKER-USER"

func dockerRules(c *nftables.Conn, family nftables.TableFamily, installation string) ([]*nftables.Rule, error) {
	table := &nftables.Table{Name: "filter", Family: family}
	all, err := c.GetRules(table, &nftables.Chain{Name: dockerChain, Table: table})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, failed(err, "nftables", "Docker's chain %s cannot be read", dockerChain)
	}
	mark := dockerMark(installation)
	return slices.DeleteFunc(all, func(r *nftables.Rule) bool { return !bytes.Equal(r.UserData, mark) }), nil
}

// dockerMark is the comment by which a rule in Docker's chain is known as ours.
func dockerMark(installation string) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, "banger "+installation)
}

// acceptInDocker puts two rules at the beginning of Docker's chain, of the form that iptables makes, so that
// iptables -L shows them: what comes from the bridge or goes to it is not Docker's to drop. What our own table
// drops stays dropped.
func (s *rules) acceptInDocker(c *nftables.Conn, installation string) error {
	for _, family := range dockerFamilies {
		table := &nftables.Table{Name: "filter", Family: family}
		if _, err := c.ListChain(table, dockerChain); err != nil {
			continue
		}
		have, err := dockerRules(c, family, installation)
		if err != nil {
			return err
		}
		if len(have) == 2 {
			continue
		}
		for _, r := range have {
			if err := c.DelRule(r); err != nil {
				return failed(err, "nftables", "a rule of ours in Docker's chain cannot be replaced")
			}
		}
		name, err := encode(network.TypeIfname, s.bridge)
		if err != nil {
			return failed(err, s.bridge, "it cannot name a device")
		}
		for _, key := range []expr.MetaKey{expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME} {
			c.InsertRule(&nftables.Rule{Table: table, Chain: &nftables.Chain{Name: dockerChain, Table: table},
				UserData: dockerMark(installation), Exprs: []expr.Any{
					&expr.Meta{Key: key, Register: first},
					&expr.Cmp{Op: expr.CmpOpEq, Register: first, Data: name[:len(s.bridge)+1]},
					&expr.Counter{},
					&expr.Verdict{Kind: expr.VerdictAccept},
				}})
		}
		if err := c.Flush(); err != nil {
			return failed(err, "nftables", "Docker's chain %s takes no rule of ours", dockerChain).
				WithHint("sudo iptables -I %s -i %s -j ACCEPT; sudo iptables -I %s -o %s -j ACCEPT", dockerChain, s.bridge, dockerChain, s.bridge)
		}
	}
	return nil
}
