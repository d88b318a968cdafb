package network

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

var update = flag.Bool("update", false, "write testdata/*.rules")

func samplePolicy(t *testing.T, guests ...Guest) Policy {
	t.Helper()
	plan := samplePlan()
	p := Policy{Installation: plan.Installation, Bridge: "banger0", TAPPrefix: plan.TAPPrefix(),
		Hosts: []netip.Addr{plan.Host4().Addr(), plan.Host6().Addr()}, NAT6: true}
	for slot, g := range guests {
		i, err := plan.Interface(slot, 1500)
		if err != nil {
			t.Fatal(err)
		}
		g.TAP, g.MAC, g.IPv4, g.IPv6 = i.TAP, i.MAC, i.IPv4.Addr(), i.IPv6.Addr()
		p.Guests = append(p.Guests, g)
	}
	return p
}

// TestRuleset compares the rules for some VMs with golden files.
func TestRuleset(t *testing.T) {
	open := samplePolicy(t, Guest{})
	open.HostPorts = []uint16{5432, 11434}
	for name, p := range map[string]Policy{
		"open": open,
		"none": samplePolicy(t),
		"some": samplePolicy(t, Guest{}, Guest{NAT: true}, Guest{Group: "web"}, Guest{NAT: true, Group: "web"}, Guest{Group: "db"}),
	} {
		t.Run(name, func(t *testing.T) {
			got := p.Ruleset().String()
			path := filepath.Join("testdata", name+".rules")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("%s (-want +got), -update writes it:\n%s", path, diff)
			}
			// It is a function of which VMs there are, not of their order.
			slices.Reverse(p.Guests)
			if again := p.Ruleset().String(); again != got {
				t.Error("the order of the VMs changes the rules")
			}
		})
	}
}

// A group keeps its number whoever comes and goes; a VM more changes nothing but its own elements.
func TestGroupsKeepTheirNumbers(t *testing.T) {
	two := samplePolicy(t, Guest{Group: "web"}, Guest{Group: "db"})
	one := two
	one.Guests = two.Guests[1:]
	line := func(p Policy) string {
		for l := range strings.Lines(p.Ruleset().String()) {
			if strings.Contains(l, two.Guests[1].TAP+`" : 0x`) {
				return l
			}
		}
		return ""
	}
	if a, b := line(two), line(one); a == "" || a != b {
		t.Errorf("%q became %q", a, b)
	}
	// Names with the same hash (FNV-1a of 32 bits) are still two groups.
	const a, b = "costarring", "liquid"
	if groupNumbers([]Guest{{Group: a}, {Group: b}})[a] == groupNumbers([]Guest{{Group: a}, {Group: b}})[b] {
		t.Error("two groups have one number")
	}
}

// What is gone and what has come lead from one set of elements to the other.
func TestSince(t *testing.T) {
	elements := func(r Ruleset) map[string]bool {
		out := map[string]bool{}
		for _, table := range r.Tables {
			for _, s := range table.Sets {
				for _, e := range s.Elements {
					out[fmt.Sprint(table.Family, s.Name, e.Key, e.Value)] = true
				}
			}
		}
		return out
	}
	policies := []Policy{
		samplePolicy(t),
		samplePolicy(t, Guest{}),
		samplePolicy(t, Guest{NAT: true}, Guest{Group: "web"}),
		samplePolicy(t, Guest{NAT: true, Group: "web"}, Guest{Group: "web"}, Guest{Group: "db"}),
		samplePolicy(t, Guest{}, Guest{NAT: true}, Guest{Group: "web"}, Guest{NAT: true, Group: "web"}, Guest{Group: "db"}),
	}
	for i, from := range policies {
		for j, to := range policies {
			gone, come, ok := to.Since(from)
			if !ok {
				t.Fatalf("%d to %d: not by elements alone", i, j)
			}
			have := elements(from.Ruleset())
			for e := range elements(gone) {
				if !have[e] {
					t.Errorf("%d to %d: %s is taken away and was not there", i, j, e)
				}
				delete(have, e)
			}
			for e := range elements(come) {
				have[e] = true
			}
			if diff := cmp.Diff(elements(to.Ruleset()), have); diff != "" {
				t.Errorf("%d to %d (-want +got):\n%s", i, j, diff)
			}
			if i == j && len(elements(come)) != 0 {
				t.Errorf("%d to itself: %v", i, elements(come))
			}
		}
	}
	// The last of two groups with one hash takes the other's number when that one goes.
	both := samplePolicy(t, Guest{Group: "costarring"}, Guest{Group: "liquid"})
	one := both
	one.Guests = both.Guests[1:]
	if _, _, ok := one.Since(both); ok {
		t.Error("a group changed its number, and it is not said")
	}
	hosts := policies[1]
	hosts.Hosts = hosts.Hosts[:1]
	if _, _, ok := hosts.Since(policies[1]); ok {
		t.Error("the rules differ, and it is not said")
	}
}

func TestConflict(t *testing.T) {
	p := samplePlan()
	used := func(list ...string) (out []Used) {
		for _, s := range list {
			out = append(out, Used{Range: netip.MustParsePrefix(s), By: "eth0"})
		}
		return out
	}
	for _, c := range []struct {
		name       string
		used       []Used
		says, hint string
	}{
		{"nothing", nil, "", ""},
		{"others", used("192.168.1.0/24", "172.17.0.0/16", "fd00::/64", "0.0.0.0/0", "::/0"), "", ""},
		{"a VPN that splits the default route", used("0.0.0.0/1", "128.0.0.0/1"), "", ""},
		{"the same", used("172.16.88.0/24"), "172.16.88.0/24 by eth0", `cidr = "172.16.0.0/24"`},
		{"a part", used("172.16.88.128/25", "172.16.0.0/23"), "172.16.88.128/25", `cidr = "172.16.2.0/24"`},
		{"around it", used("172.16.0.0/12"), "172.16.0.0/12", `cidr = "10.64.0.0/24"`},
		{"all that is private", used("172.16.0.0/12", "10.0.0.0/8", "192.168.0.0/16"), "172.16.0.0/12", "choose a range"},
		{"IPv6", used("fda1:b2c3:d4e5::/48"), "fda1:b2c3:d4e5::/48", "ipv6_cidr"},
	} {
		err := Conflict(p, c.used)
		switch {
		case c.says == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.says != "" && (!fault.Is(err, fault.Exists) || !strings.Contains(err.Error(), c.says) || !strings.Contains(fault.HintOf(err), c.hint)):
			t.Errorf("%s: %v, hint %q; want %q and %q", c.name, err, fault.HintOf(err), c.says, c.hint)
		}
	}
	if got := Free(16, used("172.16.0.0/16")); got.String() != "10.64.0.0/16" {
		t.Errorf("a large range: %s", got)
	}
}
