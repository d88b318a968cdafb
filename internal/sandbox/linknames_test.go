package sandbox

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/vm"
)

// TestNamesThatGuestsFind are their own and their group's; the world's with NAT. It is looked at for each query, so
// settings hold at once.
func TestNamesThatGuestsFind(t *testing.T) {
	r := newRig(t).start()
	vms := map[string]vm.VM{}
	link := Link{Name: "none", Guest: func(from netip.Addr) (vm.ID, bool) {
		for _, v := range vms {
			if v.Interface.IPv4.Addr() == from {
				return v.ID, true
			}
		}
		return "", false
	}}
	group, alone, nat := "store", "", true
	for name, g := range map[string]*string{"shop": &group, "db": &group, "spy": &alone} {
		op := r.done(r.s.Create(r.ctx(), CreateRequest{Name: name, NetworkGroup: g}))
		vms[name] = r.vm(vm.ID(op.VMID))
	}
	finds := func(name string) string {
		t.Helper()
		g, ok := r.s.guest(link, vms[name].Interface.IPv4.Addr())
		if !ok {
			t.Fatalf("nobody knows %s", name)
		}
		var out []string
		for other, v := range vms {
			if a := g.Lookup(other); len(a) == 1 && a[0] == v.Interface.IPv4.Addr() {
				out = append(out, other)
			} else if len(a) != 0 {
				t.Errorf("%s has %v", other, a)
			}
		}
		slices.Sort(out)
		return fmt.Sprint(out, g.Forward)
	}
	wants := func(when string, want map[string]string) {
		t.Helper()
		for name, w := range want {
			if got := finds(name); got != w {
				t.Errorf("%s, %s finds %s, want %s", when, name, got, w)
			}
		}
	}
	wants("at first", map[string]string{"shop": "[db shop] false", "db": "[db shop] false", "spy": "[spy] false"})
	r.done(r.set(vms["spy"].ID, vm.Change{Group: &group, NAT: &nat}, false))
	r.done(r.set(vms["shop"].ID, vm.Change{Group: &alone}, false))
	wants("after a change", map[string]string{"shop": "[shop] false", "db": "[db spy] false", "spy": "[db spy] true"})
	r.done(r.s.Stop(r.ctx(), vms["db"].ID, false))
	wants("with db stopped", map[string]string{"spy": "[spy] true"})
	if _, ok := r.s.guest(link, netip.MustParseAddr("192.0.2.1")); ok {
		t.Error("an address that no VM has is known")
	}
}

// TestLinkWhosePortIsTaken is said, and no reason for anything else to fail.
func TestLinkWhosePortIsTaken(t *testing.T) {
	r := newRig(t)
	r.cfg.DNSListenAddr = "127.0.0.1:0"
	r.start()
	// An address that is not this host's stands for a port that cannot be had.
	r.s.links.up(Link{Name: "none", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}})
	st, err := r.s.Status(r.ctx())
	if err != nil || len(st.Warnings) != 1 || !strings.HasPrefix(st.Warnings[0], "DNS for guests is not answered at 192.0.2.1: ") {
		t.Errorf("%q, %v", st.Warnings, err)
	}
	found := false
	for _, f := range r.findings() {
		found = found || f.Code == "guest dns" && strings.Contains(f.Detail, "192.0.2.1")
	}
	if !found {
		t.Error("doctor says nothing of it")
	}
	r.create("web")
	r.s.links.down()
	if st, err := r.s.Status(r.ctx()); err != nil || len(st.Warnings) != 0 {
		t.Errorf("with the link gone: %q, %v", st.Warnings, err)
	}
}

// TestResolverThatCannotBeTold does not keep a VM from its network, and is tried again with the next one.
func TestResolverThatCannotBeTold(t *testing.T) {
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+t.TempDir()+"/none")
	r := newRig(t)
	r.cfg.DNSListenAddr = "127.0.0.1:0"
	r.start()
	for range 2 {
		r.s.links.up(Link{Name: loopbackName(t)})
		r.s.links.mu.Lock()
		stop := r.s.links.stop
		r.s.links.mu.Unlock()
		if stop == nil {
			t.Fatal("it is not tried")
		}
		stop()
	}
	r.s.links.down()
}

func loopbackName(t *testing.T) string {
	t.Helper()
	all, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		if i.Flags&net.FlagLoopback != 0 {
			return i.Name
		}
	}
	t.Fatal("there is no loopback")
	return ""
}
