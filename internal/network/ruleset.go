package network

import (
	"fmt"
	"strings"
)

// Ruleset is what a Policy comes to, in nftables' terms but as plain values, so that it can be shown
// and compared. internal/hostnet gives it to the kernel.
type Ruleset struct{ Tables []Table }

// Table is a table of nftables.
type Table struct {
	Family string // bridge or inet
	Name   string
	Sets   []Set
	Chains []Chain
}

// Set is a set, or a map if Value is not "". The key of an element has one part for each type in Key.
type Set struct {
	Name     string
	Key      []Type
	Value    Type
	Elements []Element
}

// Element is one element of a Set.
type Element struct {
	Key   []string
	Value string // of a map
}

// Type is a data type of nftables, by its name there.
type Type string

// The types that are used. Values are written as nft(8) writes them.
const (
	TypeIfname  Type = "ifname"
	TypeEther   Type = "ether_addr"
	TypeIPv4    Type = "ipv4_addr"
	TypeIPv6    Type = "ipv6_addr"
	TypeMark    Type = "mark"
	TypeProto   Type = "ether_type"
	TypeARPOp   Type = "arp_op"
	TypeL4      Type = "inet_proto"
	TypePort    Type = "inet_service"
	TypeICMPv6  Type = "icmpv6_type"
	TypeNFProto Type = "nf_proto"
)

// Field is what a rule looks at, in nft(8)'s words. What it means is known only where a term before it
// has said that the packet has such a header.
type Field string

// The fields that are used.
const (
	Iifname      Field = "iifname"
	Oifname      Field = "oifname"
	EtherSource  Field = "ether saddr"
	EtherType    Field = "ether type"
	ARPOperation Field = "arp operation"
	ARPEther     Field = "arp saddr ether"
	ARPIP        Field = "arp saddr ip"
	Family       Field = "meta nfproto"
	IPSource     Field = "ip saddr"
	IPTarget     Field = "ip daddr"
	IP6Source    Field = "ip6 saddr"
	IP6Target    Field = "ip6 daddr"
	L4Protocol   Field = "meta l4proto"
	TargetPort   Field = "th dport"
	ICMPv6Type   Field = "icmpv6 type"
	NDTarget     Field = "icmpv6 taddr"
	Mark         Field = "meta mark"
)

// TypeOf says which type a field has.
func TypeOf(f Field) Type {
	return map[Field]Type{
		Iifname: TypeIfname, Oifname: TypeIfname, EtherSource: TypeEther, EtherType: TypeProto,
		ARPOperation: TypeARPOp, ARPEther: TypeEther, ARPIP: TypeIPv4, Family: TypeNFProto,
		IPSource: TypeIPv4, IPTarget: TypeIPv4, IP6Source: TypeIPv6, IP6Target: TypeIPv6,
		L4Protocol: TypeL4, TargetPort: TypePort, ICMPv6Type: TypeICMPv6, NDTarget: TypeIPv6, Mark: TypeMark,
	}[f]
}

// Chain is a base chain that accepts what no rule of it decides about.
type Chain struct {
	Name     string
	Type     string // filter or nat
	Hook     string
	Priority int
	Rules    []Rule
}

// Verdict ends a chain.
type Verdict string

// The verdicts that are used.
const (
	Accept     Verdict = "accept"
	Drop       Verdict = "drop"
	Masquerade Verdict = "masquerade"
	Continue   Verdict = "" // none: the next rule
)

// Rule is terms that are looked at in order, and what happens if all of them hold.
type Rule struct {
	Terms   []Term
	Verdict Verdict
}

// Term is one of Is, Begins, In, Established, MarkFrom and MarkAs.
type Term interface{ text() string }

// Is compares a field with a value.
type Is struct {
	Field Field
	Not   bool
	Value string
}

// Begins looks at the beginning of a name.
type Begins struct {
	Field  Field
	Not    bool
	Prefix string
}

// In looks fields up in a set, whose key has the types of the fields.
type In struct {
	Fields []Field
	Not    bool
	Set    string
}

// Established holds for packets of connections that the other side has answered to, and for errors about
// such (ct state established, related).
type Established struct{}

// MarkFrom marks the packet with what a map has for a field; it fails if the map has nothing.
type MarkFrom struct {
	Field Field
	Map   string
}

// MarkAs marks the packet.
type MarkAs struct{ Mark uint32 }

func not(n bool) string {
	if n {
		return "!= "
	}
	return ""
}

func (t Is) text() string {
	if TypeOf(t.Field) == TypeIfname {
		return fmt.Sprintf("%s %s%q", t.Field, not(t.Not), t.Value)
	}
	return fmt.Sprintf("%s %s%s", t.Field, not(t.Not), t.Value)
}

func (t Begins) text() string { return fmt.Sprintf("%s %s%q", t.Field, not(t.Not), t.Prefix+"*") }

func (t In) text() string {
	fields := make([]string, len(t.Fields))
	for i, f := range t.Fields {
		fields[i] = string(f)
	}
	return fmt.Sprintf("%s %s@%s", strings.Join(fields, " . "), not(t.Not), t.Set)
}

func (Established) text() string { return "ct state established,related" }

func (t MarkFrom) text() string { return fmt.Sprintf("meta mark set %s map @%s", t.Field, t.Map) }

func (t MarkAs) text() string { return fmt.Sprintf("meta mark set %#x", t.Mark) }

// String renders the ruleset as nft(8) lists one.
func (r Ruleset) String() string {
	var b strings.Builder
	for _, t := range r.Tables {
		fmt.Fprintf(&b, "table %s %s {\n", t.Family, t.Name)
		for _, s := range t.Sets {
			s.write(&b)
		}
		for _, c := range t.Chains {
			fmt.Fprintf(&b, "\tchain %s {\n\t\ttype %s hook %s priority %d; policy accept;\n", c.Name, c.Type, c.Hook, c.Priority)
			for _, rule := range c.Rules {
				words := make([]string, 0, len(rule.Terms)+1)
				for _, term := range rule.Terms {
					words = append(words, term.text())
				}
				if rule.Verdict != Continue {
					words = append(words, string(rule.Verdict))
				}
				fmt.Fprintf(&b, "\t\t%s\n", strings.Join(words, " "))
			}
			b.WriteString("\t}\n")
		}
		b.WriteString("}\n")
	}
	return b.String()
}

func (s Set) write(b *strings.Builder) {
	kind, types := "set", make([]string, len(s.Key))
	for i, t := range s.Key {
		types[i] = string(t)
	}
	key := strings.Join(types, " . ")
	if s.Value != "" {
		kind, key = "map", key+" : "+string(s.Value)
	}
	fmt.Fprintf(b, "\t%s %s {\n\t\ttype %s\n", kind, s.Name, key)
	for _, e := range s.Elements {
		parts := make([]string, len(e.Key))
		for i, k := range e.Key {
			if parts[i] = k; s.Key[i] == TypeIfname {
				parts[i] = fmt.Sprintf("%q", k)
			}
		}
		line := strings.Join(parts, " . ")
		if s.Value != "" {
			line += " : " + e.Value
		}
		fmt.Fprintf(b, "\t\t%s\n", line)
	}
	b.WriteString("\t}\n")
}
