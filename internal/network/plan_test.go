package network

import (
	"encoding/json"
	"net"
	"net/netip"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

func samplePlan() Plan {
	return Plan{Installation: "a1b2c3d4e5f6", IPv4: netip.MustParsePrefix("172.16.88.0/24"), IPv6: UniqueLocal("a1b2c3d4e5f6")}
}

func TestInterface(t *testing.T) {
	p := samplePlan()
	for slot, want := range map[int]string{
		0:   `{"kind":"bridge","mac":"02:a1:b2:c3:00:00","ipv4":"172.16.88.2/24","ipv6":"fda1:b2c3:d4e5::2/64","gateway4":"172.16.88.1","gateway6":"fda1:b2c3:d4e5::1","mtu":1500,"tap":"bgra1b2c3-0"}`,
		252: `{"kind":"bridge","mac":"02:a1:b2:c3:00:fc","ipv4":"172.16.88.254/24","ipv6":"fda1:b2c3:d4e5::fe/64","gateway4":"172.16.88.1","gateway6":"fda1:b2c3:d4e5::1","mtu":1500,"tap":"bgra1b2c3-252"}`,
	} {
		i, err := p.Interface(slot, 1500)
		if err != nil {
			t.Fatal(err)
		}
		got, err := json.Marshal(i)
		if err != nil || string(got) != want {
			t.Errorf("slot %d:\n%s, %v\nwant\n%s", slot, got, err, want)
		}
	}
	for _, slot := range []int{-1, 253} {
		if _, err := p.Interface(slot, 1500); !fault.Is(err, fault.Exhausted) || !strings.Contains(fault.HintOf(err), `cidr = "172.16.88.0/22"`) {
			t.Errorf("slot %d: %v, hint %q", slot, err, fault.HintOf(err))
		}
	}
	p.IPv6 = netip.Prefix{}
	i, err := p.Interface(0, 1500)
	if err != nil || i.IPv6.IsValid() || i.Gateway6.IsValid() {
		t.Errorf("without IPv6: %+v, %v", i, err)
	}
}

// Every slot of the largest range has addresses and names of its own, in the range, that fit.
func TestEverySlotIsItsOwn(t *testing.T) {
	p := samplePlan()
	p.IPv4 = netip.MustParsePrefix("10.9.0.0/16")
	seen := map[string]bool{p.Host4().Addr().String(): true, "10.9.0.0": true, "10.9.255.255": true}
	for slot := range p.Slots() {
		i, err := p.Interface(slot, 1500)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []string{i.IPv4.Addr().String(), i.IPv6.Addr().String(), i.MAC, i.TAP} {
			if seen[s] {
				t.Fatalf("slot %d: %s is another's", slot, s)
			}
			seen[s] = true
		}
		mac, err := net.ParseMAC(i.MAC)
		if err != nil || mac[0]&3 != 2 || len(i.TAP) > 15 || !p.IPv4.Contains(i.IPv4.Addr()) || !p.IPv6.Contains(i.IPv6.Addr()) || i.Kind != vm.BridgeNetwork {
			t.Fatalf("slot %d: %+v (%v)", slot, i, err)
		}
	}
	if len(seen) < 4*65533 {
		t.Errorf("only %d names", len(seen))
	}
}
