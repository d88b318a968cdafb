package sandbox

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// resolve asks the daemon's own server for a name, as a resolver would.
func (r *rig) resolve(name string) ([]string, error) {
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, r.s.dns.Addr().String())
	}}
	return resolver.LookupHost(r.ctx(), name)
}

// TestNamesFollowVMs through a life, and over restarts of the daemon.
func TestNamesFollowVMs(t *testing.T) {
	r := newRig(t)
	r.cfg.DNSListenAddr = "127.0.0.1:0"
	r.start()
	wantName := func(when string, want ...string) {
		t.Helper()
		got, err := r.resolve("web.vm.")
		var de *net.DNSError
		switch {
		case len(want) == 0 && (!errors.As(err, &de) || !de.IsNotFound):
			t.Errorf("%s: %v, %v; want no such name", when, got, err)
		case len(want) > 0 && (err != nil || !slices.Equal(got, want)):
			t.Errorf("%s: %v, %v; want %v", when, got, err, want)
		}
	}
	wantName("before it is there")
	v := r.create("web")
	wantName("created", "10.77.0.2")
	r.create("other")
	wantName("with another one", "10.77.0.2")
	r.restart()
	wantName("after a restart of the daemon", "10.77.0.2")
	r.done(r.s.Stop(r.ctx(), v.ID, false))
	wantName("stopped")
	r.done(r.s.Start(r.ctx(), v.ID))
	wantName("started again", "10.77.0.2")
	r.done(r.s.Delete(r.ctx(), v.ID))
	wantName("deleted")
	if st, err := r.s.Status(r.ctx()); err != nil || st.DNS != r.s.dns.Addr().String() || len(st.Warnings) != 0 {
		t.Errorf("%+v, %v", st, err)
	}
}

// TestDNSPortTaken: the daemon goes on, and says so wherever one looks. What holds the port itself is no reason to warn.
func TestDNSPortTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	r := newRig(t)
	r.cfg.DNSListenAddr = taken.Addr().String()
	r.start()
	r.create("web")
	st, err := r.s.Status(r.ctx())
	if err != nil || st.DNS != "" || len(st.Warnings) != 1 || !strings.Contains(st.Warnings[0], taken.Addr().String()) {
		t.Errorf("%+v, %v", st, err)
	}
	find := func() doctor.Finding {
		t.Helper()
		for _, f := range r.findings() {
			if f.Code == "dns" {
				return f
			}
		}
		t.Fatal("doctor says nothing of DNS")
		return doctor.Finding{}
	}
	if f := find(); f.Severity != doctor.Warn || !strings.Contains(f.Detail, "another program") || !strings.Contains(f.Fix, "dns_listen_addr") {
		t.Errorf("%+v", f)
	}
	_ = taken.Close()
	r.restart()
	if f := find(); strings.Contains(f.Detail, "another program") || !strings.Contains(f.Detail, r.cfg.DNSListenAddr) {
		t.Errorf("with the port ours: %+v", f)
	}
	if st, err := r.s.Status(r.ctx()); err != nil || st.DNS != r.cfg.DNSListenAddr || len(st.Warnings) != 0 {
		t.Errorf("%+v, %v", st, err)
	}
	r.cfg.DNSListenAddr = ""
	r.restart()
	if f := find(); f.Severity != doctor.Pass {
		t.Errorf("with none wanted: %+v", f)
	}
}

// TestInterfaceReachesGuestAndVMM: what the network says is what the config drive and the VMM are told.
func TestInterfaceReachesGuestAndVMM(t *testing.T) {
	r := newRig(t).start()
	v := r.create("web")
	i := v.Interface
	if i == nil || i.IPv4.String() != "10.77.0.2/24" {
		t.Fatalf("interface %+v", i)
	}
	spec := r.machines()[0].Spec
	if len(spec.NICs) != 1 || spec.NICs[0].MAC != i.MAC || spec.NICs[0].TAP != i.TAP || spec.NICs[0].MTU != 1500 {
		t.Errorf("the VMM got %+v", spec.NICs)
	}
	if got, want := fmt.Sprintf("%+v", r.guestConfig(v).Network), fmt.Sprintf("&{MAC:%s MTU:1500 Addresses:[10.77.0.2/24] Routes:[{To:0.0.0.0/0 Via:10.77.0.1}] DNS:[10.77.0.1] Search:[] Tunnel:0}", i.MAC); got != want {
		t.Errorf("the guest got %s, want %s", got, want)
	}
}

// TestNetworkThatFails: no VM without the network that it was to have, and nothing left; one that runs goes on.
func TestNetworkThatFails(t *testing.T) {
	r := newRig(t).start()
	web := r.create("web")
	broken := fault.New(fault.Exhausted, "10.77.0.0/24", "all addresses are taken").WithHint("delete a VM")
	var cause error = broken
	r.s.networks[0].(*fakeNetwork).broken = &cause
	op := r.wait(r.s.Create(r.ctx(), CreateRequest{Name: "other"}))
	ended(t, op, operation.Failed, fault.Exhausted, "all addresses are taken", "delete a VM")
	r.check()
	if ok, err := r.s.network.Observe(r.ctx(), &web); !ok || err != nil {
		t.Errorf("a running VM whose network is broken: %v, %v", ok, err)
	}
	st, err := r.s.Status(r.ctx())
	if err != nil || len(st.Warnings) != 1 || !strings.Contains(st.Warnings[0], "banger vm restart web") {
		t.Errorf("%+v, %v", st, err)
	}
	if got := r.vm(web.ID); got.State != vm.Running {
		t.Errorf("%+v", got)
	}
	cause = nil
	r.done(r.s.Restart(r.ctx(), web.ID))
	r.check()
}

// TestNoNetwork is a VM on a host that has none for it.
func TestNoNetwork(t *testing.T) {
	r := newRig(t)
	r.networks = func(NetworkHost) []Network { return nil }
	r.start()
	v := r.create("web")
	if v.Interface != nil || len(r.machines()[0].Spec.NICs) != 0 {
		t.Errorf("%+v, %+v", v.Interface, r.machines()[0].Spec.NICs)
	}
	if a := r.s.addresses("web"); a != nil {
		t.Errorf("it has addresses: %v", a)
	}
	r.done(r.s.Delete(r.ctx(), v.ID))
}

// TestNATOfARunningVM is on and off without a restart; a VM says at its birth that it is off.
func TestNATOfARunningVM(t *testing.T) {
	r := newRig(t)
	r.start()
	op := r.done(r.s.Create(r.ctx(), CreateRequest{Name: "web"}))
	if !slices.ContainsFunc(op.Notices, func(n string) bool { return strings.Contains(n, "banger vm set web --nat") }) {
		t.Errorf("notices: %q", op.Notices)
	}
	v := r.vm(vm.ID(op.VMID))
	for on, says := range map[bool]string{true: "nat on", false: "nat off"} {
		r.done(r.set(v.ID, vm.Change{NAT: &on}, false))
		after := r.vm(v.ID)
		allowed, err := os.ReadFile(filepath.Join(r.dir, "network", string(v.ID)))
		if err != nil || string(allowed) != says || after.Spec.NAT != on || after.PID != v.PID {
			t.Errorf("NAT %v: the network says %q, %v; the record %v", on, allowed, err, after.Spec.NAT)
		}
	}
	on := true
	op = r.done(r.s.Create(r.ctx(), CreateRequest{Name: "out", NAT: &on}))
	if !r.vm(vm.ID(op.VMID)).Spec.NAT || len(op.Notices) > 0 {
		t.Errorf("made with NAT: %v, %q", r.vm(vm.ID(op.VMID)).Spec.NAT, op.Notices)
	}
}

// TestFirewallIsNoticed: who gets NAT is told what of the host's is in its way, and nobody else.
func TestFirewallIsNoticed(t *testing.T) {
	r := newRig(t)
	r.start()
	if err := os.WriteFile(filepath.Join(r.dir, "network.firewall"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	told := func(op operation.Operation) bool {
		return slices.ContainsFunc(op.Notices, func(n string) bool { return strings.Contains(n, "it drops") && strings.Contains(n, "open it") })
	}
	on, off := true, false
	op := r.done(r.s.Create(r.ctx(), CreateRequest{Name: "in"}))
	if told(op) {
		t.Errorf("without NAT: %q", op.Notices)
	}
	id := vm.ID(op.VMID)
	for range 2 { // told once: the second time it has it
		was := r.vm(id).Spec.NAT
		if op := r.done(r.set(id, vm.Change{NAT: &on}, false)); told(op) == was {
			t.Errorf("NAT by a set, when it was %v: %q", was, op.Notices)
		}
	}
	if op := r.done(r.set(id, vm.Change{NAT: &off}, false)); told(op) {
		t.Errorf("NAT off: %q", op.Notices)
	}
	if op := r.done(r.s.Create(r.ctx(), CreateRequest{Name: "out", NAT: &on})); !told(op) {
		t.Errorf("with NAT: %q", op.Notices)
	}
}

// TestDefaultNetworkGroup is what a new VM is in.
func TestDefaultNetworkGroup(t *testing.T) {
	r := newRig(t)
	r.cfg.DefaultNetworkGroup = "team-web"
	r.start()
	v := r.create("web")
	if v.Spec.NetworkGroup != "team-web" {
		t.Errorf("a new VM is in the group %q", v.Spec.NetworkGroup)
	}
	none, other := "", "other"
	for _, group := range []string{none, other} {
		op := r.done(r.s.Create(r.ctx(), CreateRequest{NoStart: true, NetworkGroup: &group}))
		if got := r.vm(vm.ID(op.VMID)).Spec.NetworkGroup; got != group {
			t.Errorf("made with the group %q, it is in %q", group, got)
		}
	}
	for _, group := range []string{other, none} {
		r.done(r.set(v.ID, vm.Change{Group: &group}, false))
		says, err := os.ReadFile(filepath.Join(r.dir, "network", string(v.ID)))
		if got := r.vm(v.ID).Spec.NetworkGroup; err != nil || got != group || string(says) != strings.TrimSpace("nat off "+group) {
			t.Errorf("set to the group %q, it is in %q, and the network says %q, %v", group, got, says, err)
		}
	}
}

// TestVMFromBeforeNetworks: an older daemon's VM runs on, on no network, until it is started anew.
func TestVMFromBeforeNetworks(t *testing.T) {
	r := newRig(t)
	with := r.networks
	r.networks = nil
	r.start()
	v := r.create("web")
	r.stop()
	db, err := sql.Open("sqlite", r.paths.Database())
	if err == nil {
		_, err = db.ExecContext(r.ctx(), "DELETE FROM steps WHERE step = 'network'; PRAGMA user_version = 1")
	}
	if err == nil {
		err = db.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	r.networks = func(h NetworkHost) []Network { return []Network{&untouched{Network: with(h)[0], t: t}} }
	r.restart()
	if after := r.vm(v.ID); after.State != vm.Running || after.PID != v.PID || after.Interface != nil {
		t.Errorf("it is %s, process %d (was %d), on %+v", after.State, after.PID, v.PID, after.Interface)
	}
	r.networks = with
	r.restart()
	r.done(r.s.Restart(r.ctx(), v.ID))
	if after := r.vm(v.ID); after.Interface == nil {
		t.Error("started anew, it is on no network")
	}
	r.check()
}

// untouched is a network that no VM may be said to be on.
type untouched struct {
	Network
	t *testing.T
}

func (u *untouched) Restore(ctx context.Context, attached []vm.VM) error {
	if len(attached) > 0 {
		u.t.Errorf("%s is said to be on the network", attached[0].Name)
	}
	return u.Network.Restore(ctx, attached)
}
