package helper

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/record"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/network"
)

const installation = "a1b2c3d4e5f6"

var ranges = []netip.Prefix{netip.MustParsePrefix("172.16.0.0/16")}

func sample(installation string) network.Plan {
	return network.Plan{Installation: installation, IPv4: netip.MustParsePrefix("172.16.88.0/24"), IPv6: network.UniqueLocal(installation)}
}

func addresses(p network.Plan) []netip.Prefix { return []netip.Prefix{p.Host4(), p.Host6()} }

func policyOf(p network.Plan, bridge string, slots ...int) network.Policy {
	out := network.Policy{Installation: p.Installation, Bridge: bridge, TAPPrefix: p.TAPPrefix(), Hosts: []netip.Addr{p.Host4().Addr(), p.Host6().Addr()}}
	for _, slot := range slots {
		i, err := p.Interface(slot, 1500)
		if err != nil {
			panic(err)
		}
		out.Guests = append(out.Guests, network.Guest{TAP: i.TAP, MAC: i.MAC, IPv4: i.IPv4.Addr(), IPv6: i.IPv6.Addr(), NAT: slot%2 == 1, Group: fmt.Sprint("g", slot/2)})
	}
	return out
}

// fakeHost is a host that keeps what it was told, and complains of what no user may have done.
type fakeHost struct {
	t    testing.TB
	s    hostnet.Settings
	fake *fakeHosts
}

// fakeHosts is what all of them act on.
type fakeHosts struct {
	uid     int
	mu      sync.Mutex
	calls   []string
	present map[string]bool // installations
	taps    map[string]bool
	last    network.Policy
	fail    error
	hold    chan struct{} // Setup waits for it
}

func newFakeHosts(uid int) *fakeHosts {
	return &fakeHosts{uid: uid, present: map[string]bool{}, taps: map[string]bool{}}
}

func (f *fakeHosts) open(t testing.TB) func(hostnet.Settings) (Host, error) {
	return func(s hostnet.Settings) (Host, error) { return &fakeHost{t, s, f}, nil }
}

// act notes a call that changes the host.
func (h *fakeHost) act(verb string) {
	h.fake.calls = append(h.fake.calls, verb)
	if h.s.Owner != h.fake.uid || !bridgeName.MatchString(h.s.Bridge) || !record.ID.MatchString(h.s.Plan.Installation) {
		h.t.Errorf("%s for %+v", verb, h.s)
	}
	if h.s.Plan.Installation == foreign {
		h.t.Errorf("%s on another user's network", verb)
	}
}

func (h *fakeHost) slot(slot int) {
	if slot < 0 || slot >= maxSlots {
		h.t.Errorf("slot %d", slot)
	}
}

func (h *fakeHost) Check(context.Context) error { return h.fake.fail }

func (h *fakeHost) Setup(_ context.Context, addresses []netip.Prefix) (int, error) {
	if h.fake.hold != nil {
		<-h.fake.hold
	}
	h.fake.mu.Lock()
	defer h.fake.mu.Unlock()
	h.act("setup")
	for _, a := range addresses {
		if !a.Addr().IsPrivate() || a.Addr().Is4() && !ranges[0].Contains(a.Addr()) {
			h.t.Errorf("the bridge gets %s", a)
		}
	}
	if h.fake.fail == nil {
		h.fake.present[h.s.Plan.Installation] = true
	}
	return 1420, h.fake.fail
}

func (h *fakeHost) AddTAP(_ context.Context, slot int, _ bool) error {
	h.fake.mu.Lock()
	defer h.fake.mu.Unlock()
	h.act("add")
	h.slot(slot)
	if h.fake.last.Bridge != h.s.Bridge {
		h.t.Errorf("a TAP on %s without rules", h.s.Bridge)
	}
	h.fake.taps[h.s.Plan.TAP(slot)] = true
	return nil
}

func (h *fakeHost) DeleteTAPs(_ context.Context, slots []int) error {
	h.fake.mu.Lock()
	defer h.fake.mu.Unlock()
	h.act("delete")
	for _, slot := range slots {
		h.slot(slot)
		delete(h.fake.taps, h.s.Plan.TAP(slot))
	}
	return nil
}

func (h *fakeHost) TAPs(context.Context) ([]int, error) {
	h.act("taps")
	return []int{3, 7}, nil
}

func (h *fakeHost) Policy(_ context.Context, p network.Policy) error {
	h.fake.mu.Lock()
	defer h.fake.mu.Unlock()
	h.act("policy")
	if p.Installation != h.s.Plan.Installation || p.Bridge != h.s.Bridge || p.TAPPrefix != h.s.Plan.TAPPrefix() {
		h.t.Errorf("a policy of another network: %+v", p)
	}
	for _, g := range p.Guests {
		if !strings.HasPrefix(g.TAP, p.TAPPrefix) || !ranges[0].Contains(g.IPv4) || g.IPv6.IsValid() && !g.IPv6.IsPrivate() || slices.Contains(p.Hosts, g.IPv4) {
			h.t.Errorf("guest %+v", g)
		}
	}
	h.fake.last = p
	return nil
}

func (h *fakeHost) Remove(context.Context) error {
	h.fake.mu.Lock()
	defer h.fake.mu.Unlock()
	h.act("remove")
	h.fake.last = network.Policy{}
	if h.fake.fail == nil {
		delete(h.fake.present, h.s.Plan.Installation)
	}
	return h.fake.fail
}

func (h *fakeHost) Watch(ctx context.Context, changed func()) error {
	changed()
	changed()
	<-ctx.Done()
	return nil
}

func (h *fakeHost) Obstacles() ([]hostnet.Obstacle, error) {
	return []hostnet.Obstacle{{Table: "ip filter", Chain: "FORWARD", Fix: "sudo nft ..."}}, nil
}

func (h *fakeHost) Close() {}

func (h *fakeHost) Present(context.Context) (bool, error) {
	h.fake.mu.Lock()
	defer h.fake.mu.Unlock()
	return h.fake.present[h.s.Plan.Installation], nil
}

func (h *fakeHost) Taken() ([]network.Used, error) {
	return []network.Used{{Range: netip.MustParsePrefix("172.16.4.0/24"), By: "eth0"}}, nil
}

// foreign is an installation of another user's, which has a record.
const foreign = "0123456789ab"

// serveFor runs a helper for a user, and returns where.
func serveFor(t testing.TB, o Options) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "helper")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	// The tests have other users knock at it, too.
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(socket, 0o666)); err != nil {
		t.Fatal(err)
	}
	o.Log = slog.New(slog.DiscardHandler)
	if o.Ranges == nil {
		o.Ranges = ranges
	}
	s := NewServer(o)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		_ = l.Close()
	})
	return socket
}

// fakeService is a helper of this test's user over a fake host.
func fakeService(t testing.TB) (*fakeHosts, Options, string) {
	t.Helper()
	f := newFakeHosts(os.Getuid())
	o := Options{UID: f.uid, Records: t.TempDir(), Open: f.open(t)}
	other := record.Record{UID: f.uid + 1, Installation: foreign, Bridge: "banger7", Addresses: []netip.Prefix{netip.MustParsePrefix("172.16.99.1/24")}, Guarded: true}
	if err := record.Dir(o.Records).Put(other); err != nil {
		t.Fatal(err)
	}
	return f, o, serveFor(t, o)
}

func TestVerbs(t *testing.T) {
	f, o, socket := fakeService(t)
	p := sample(installation)
	c := NewClient(socket, p, "banger0")
	ctx := t.Context()

	// Without a bridge nothing is there, and nothing is done.
	if slots, err := c.TAPs(ctx); err != nil || len(slots) != 0 {
		t.Errorf("%v, %v", slots, err)
	}
	if err := errors.Join(c.DeleteTAPs(ctx, []int{1}), c.Remove(ctx)); err != nil {
		t.Error(err)
	}
	for what, err := range map[string]error{"TAP": c.AddTAP(ctx, 0, true), "policy": c.Policy(ctx, policyOf(p, "banger0"))} {
		if !fault.Is(err, fault.Precondition) {
			t.Errorf("%s without a bridge: %v", what, err)
		}
	}
	if len(f.calls) != 0 {
		t.Errorf("the host was asked for %v", f.calls)
	}

	if mtu, err := c.Setup(ctx, addresses(p)); err != nil || mtu != 1420 {
		t.Fatal(mtu, err)
	}
	want := policyOf(p, "banger0", 0, 1, 2)
	want.HostPorts = []uint16{5432, 11434}
	err := errors.Join(c.AddTAP(ctx, 0, true), c.Policy(ctx, want), c.DeleteTAPs(ctx, []int{0, 5}), c.DeleteTAPs(ctx, nil))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(f.last, want) {
		t.Errorf("the policy arrived as\n%+v, not\n%+v", f.last, want)
	}
	if slots, err := c.TAPs(ctx); err != nil || !slices.Equal(slots, []int{3, 7}) {
		t.Errorf("%v, %v", slots, err)
	}
	if all, err := c.Obstacles(); err != nil || len(all) != 1 || all[0].Fix != "sudo nft ..." {
		t.Errorf("%v, %v", all, err)
	}
	if got := strings.Join(f.calls, " "); got != "setup policy add policy delete taps" {
		t.Errorf("the host was asked for %s", got)
	}

	// Another helper on the same records makes what there is sure of before it adds to it.
	f.calls = nil
	c = NewClient(serveFor(t, o), p, "banger0")
	if err := c.AddTAP(ctx, 1, true); err != nil {
		t.Fatal(err)
	}
	// Its bridge has another name in the settings now: what there is can be removed all the same.
	renamed := NewClient(serveFor(t, o), p, "banger1")
	if _, err := renamed.Setup(ctx, addresses(p)); !fault.Is(err, fault.Precondition) || fault.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
	if err := errors.Join(renamed.DeleteTAPs(ctx, []int{1}), renamed.Remove(ctx)); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(f.calls, " "); got != "setup add delete remove" {
		t.Errorf("the host was asked for %s", got)
	}
	if left, err := record.Dir(o.Records).All(); err != nil || len(left) != 1 {
		t.Errorf("%v, %v", left, err)
	}
}

// TestEveryFieldArrives fails when the policy has something new that the helper is not told.
func TestEveryFieldArrives(t *testing.T) {
	// NAT6 is found out by the host; what the helper knows by itself is compared by TestVerbs.
	if n := reflect.TypeFor[network.Policy]().NumField(); n != 7 {
		t.Errorf("network.Policy has %d fields: let wire.Request carry what is new, and raise wire.Revision", n)
	}
	if n := reflect.TypeFor[network.Guest]().NumField(); n != 6 {
		t.Errorf("network.Guest has %d fields: let wire.Guest carry what is new, and raise wire.Revision", n)
	}
}

func TestWatch(t *testing.T) {
	_, o, socket := fakeService(t)
	c := NewClient(socket, sample(installation), "banger0")
	ctx, cancel := context.WithCancel(t.Context())
	changed, ended := make(chan struct{}, 2), make(chan error, 1)
	go func() { ended <- c.Watch(ctx, func() { changed <- struct{}{} }) }()
	for range 2 {
		select {
		case <-changed:
		case <-time.After(20 * time.Second):
			t.Fatal("nobody says that something changed")
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	// What is refused is not asked for again.
	c = NewClient(serveFor(t, o), sample(installation), "docker0")
	if err := c.Watch(t.Context(), func() {}); !fault.Is(err, fault.Permission) {
		t.Errorf("%v", err)
	}
}

func TestRefusals(t *testing.T) {
	f, o, socket := fakeService(t)
	ctx := t.Context()
	p := sample(installation)
	if _, err := NewClient(socket, p, "banger0").Setup(ctx, addresses(p)); err != nil {
		t.Fatal(err)
	}
	f.present["ffffffffffff"] = true // made by root
	f.calls = nil
	with := func(change func(*wire.Request)) wire.Request {
		r := NewClient(socket, p, "banger0").request(wire.Setup)
		r.Addresses = addresses(p)
		change(&r)
		return r
	}
	elsewhere := func(r *wire.Request) { // another installation of this user
		q := network.Plan{Installation: "777777777777", IPv4: netip.MustParsePrefix("172.16.60.0/24")}
		r.Network, r.Addresses = wire.Network{Installation: q.Installation, Bridge: "banger1", IPv4: q.IPv4}, []netip.Prefix{q.Host4()}
	}
	guests := func(change func(*wire.Guest)) func(*wire.Request) {
		return func(r *wire.Request) {
			g := wire.Guest{Slot: 1, IPv4: netip.MustParseAddr("172.16.88.3")}
			change(&g)
			r.Verb, r.Addresses, r.Guests = wire.Policy, nil, []wire.Guest{{IPv4: netip.MustParseAddr("172.16.88.2")}, g}
		}
	}
	for _, c := range []struct {
		name string
		r    wire.Request
		code fault.Code
		says string
	}{
		{"another user's", with(func(r *wire.Request) { r.Network.Installation = foreign }), fault.Permission, "another user's"},
		{"removal of another user's", with(func(r *wire.Request) { r.Verb, r.Network.Installation = wire.Remove, foreign }), fault.Permission, "another user's"},
		{"root's", with(func(r *wire.Request) { elsewhere(r); r.Network.Installation = "ffffffffffff" }), fault.Permission, "by root"},
		{"an id like another's", with(func(r *wire.Request) { elsewhere(r); r.Network.Installation = "012345000000" }), fault.Exists, "id"},
		{"a bridge of another's", with(func(r *wire.Request) { elsewhere(r); r.Network.Bridge = "banger7" }), fault.Exists, "bridge_name = \"bgr777777\""},
		{"a range of another's", with(func(r *wire.Request) {
			elsewhere(r)
			r.Network.IPv4, r.Addresses = netip.MustParsePrefix("172.16.99.128/25"), []netip.Prefix{netip.MustParsePrefix("172.16.99.129/25")}
		}), fault.Exists, "banger7"},
		{"a range of the host's", with(func(r *wire.Request) { r.Addresses = append(r.Addresses, netip.MustParsePrefix("172.16.4.1/24")) }), fault.Exists, "eth0"},
		{"somebody's bridge", with(func(r *wire.Request) { r.Network.Bridge = "docker0" }), fault.Permission, "bridge_name"},
		{"a TAP's name", with(func(r *wire.Request) { r.Network.Bridge = "bgra1b2c3-7" }), fault.Permission, "bridge_name"},
		{"a path", with(func(r *wire.Request) { r.Network.Bridge = "../../etc" }), fault.Permission, "bridge_name"},
		{"an id that is a path", with(func(r *wire.Request) { r.Network.Installation = "../../shadow" }), fault.Invalid, "id"},
		{"a range that is not given away", with(func(r *wire.Request) { r.Network.IPv4 = netip.MustParsePrefix("10.0.0.0/24") }), fault.Permission, "--range 10.0.0.0/24"},
		{"too large a range", with(func(r *wire.Request) { r.Network.IPv4 = netip.MustParsePrefix("172.16.0.0/16") }), fault.Permission, "20 to 29"},
		{"no range", with(func(r *wire.Request) { r.Network.IPv4 = netip.Prefix{} }), fault.Invalid, "no IPv4 range"},
		{"the internet", with(func(r *wire.Request) { r.Addresses = []netip.Prefix{netip.MustParsePrefix("8.8.8.1/24")} }), fault.Permission, "alone"},
		{"everything of IPv6", with(func(r *wire.Request) { r.Addresses = []netip.Prefix{netip.MustParsePrefix("::1/0")} }), fault.Invalid, "unique local"},
		{"IPv6's internet", with(func(r *wire.Request) { r.Network.IPv6 = netip.MustParsePrefix("2001:db8::/64") }), fault.Invalid, "unique local"},
		{"another's address", with(func(r *wire.Request) { r.Addresses = []netip.Prefix{netip.MustParsePrefix("172.16.88.9/24")} }), fault.Invalid, "first address"},
		{"no address", with(func(r *wire.Request) { r.Addresses = nil }), fault.Invalid, "1 to 16"},
		{"a slot below", with(func(r *wire.Request) { r.Verb, r.Slots = wire.AddTAP, []int{-1} }), fault.Invalid, "no slot -1"},
		{"a slot above", with(func(r *wire.Request) { r.Verb, r.Slots = wire.DeleteTAPs, []int{maxSlots} }), fault.Invalid, "no slot"},
		{"two TAPs", with(func(r *wire.Request) { r.Verb, r.Slots = wire.AddTAP, []int{1, 2} }), fault.Invalid, "one slot"},
		{"a guest with the host's address", with(guests(func(g *wire.Guest) { g.IPv4 = p.Host4().Addr() })), fault.Invalid, "another use"},
		{"a guest with another's address", with(guests(func(g *wire.Guest) { g.IPv4 = netip.MustParseAddr("172.16.88.2") })), fault.Invalid, "another use"},
		{"a guest with an address of the internet", with(guests(func(g *wire.Guest) { g.IPv4 = netip.MustParseAddr("8.8.8.8") })), fault.Invalid, "outside"},
		{"a guest without an address", with(guests(func(g *wire.Guest) { g.IPv4 = netip.Addr{} })), fault.Invalid, "no address"},
		{"a guest twice", with(guests(func(g *wire.Guest) { g.Slot = 0 })), fault.Invalid, "twice"},
		{"a group that is none", with(guests(func(g *wire.Guest) { g.Group = "a\nb" })), fault.Invalid, "group"},
		{"a host's address that is not the bridge's", with(func(r *wire.Request) { r.Verb, r.Hosts = wire.Policy, []netip.Addr{netip.MustParseAddr("127.0.0.1")} }), fault.Invalid, "not the bridge's"},
		{"DNS at another address", with(func(r *wire.Request) { r.Verb, r.At = wire.ListenDNS, netip.MustParseAddr("0.0.0.0") }), fault.Invalid, "not the bridge's"},
		{"DNS on another user's bridge", with(func(r *wire.Request) {
			r.Verb, r.Network.Installation, r.At = wire.ListenDNS, foreign, netip.MustParseAddr("172.16.99.1")
		}), fault.Permission, "another user's"},
		{"DNS without a bridge", with(func(r *wire.Request) { elsewhere(r); r.Verb = wire.ListenDNS }), fault.Precondition, "no bridge"},
		{"names by a server elsewhere", with(func(r *wire.Request) { r.Verb, r.Server = wire.KeepNames, netip.MustParseAddrPort("8.8.8.8:53") }), fault.Invalid, "loopback"},
		{"names by no server", with(func(r *wire.Request) { r.Verb = wire.KeepNames }), fault.Invalid, "loopback"},
		{"names without a bridge", with(func(r *wire.Request) { elsewhere(r); r.Verb = wire.KeepNames }), fault.Precondition, "no bridge"},
		{"no verb", with(func(r *wire.Request) { r.Verb = "exec" }), fault.Invalid, "no verb"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := wire.Call(ctx, socket, c.r)
			if !fault.Is(err, c.code) || !strings.Contains(err.Error()+fault.HintOf(err), c.says) {
				t.Errorf("%v, hint %q; want %s with %q", err, fault.HintOf(err), c.code, c.says)
			}
		})
	}
	if len(f.calls) != 0 {
		t.Errorf("the host was asked for %v", f.calls)
	}

	// What fails before anything is made is not this user's afterwards.
	f.fail = fault.New(fault.Exists, "banger1", "it is another's").WithHint("choose another name")
	if _, err := wire.Call(ctx, socket, with(elsewhere)); !fault.Is(err, fault.Exists) || fault.HintOf(err) != "choose another name" {
		t.Errorf("%v", err)
	}
	if c, err := record.Dir(o.Records).Get("777777777777"); c != nil || err != nil {
		t.Errorf("%+v, %v", c, err)
	}
	// Where the rules may be gone, there is no TAP until there are rules again.
	c := NewClient(socket, p, "banger0")
	if err := c.Remove(ctx); !fault.Is(err, fault.Exists) {
		t.Errorf("%v", err)
	}
	f.fail = nil
	if err := c.AddTAP(ctx, 0, true); !fault.Is(err, fault.Precondition) {
		t.Errorf("%v", err)
	}
	if _, err := c.Setup(ctx, addresses(p)); err != nil {
		t.Error(err)
	}
	if err := c.AddTAP(ctx, 0, true); err != nil {
		t.Error(err)
	}
	// Nobody has more networks than a few.
	for i := range maxInstallations {
		r := with(func(r *wire.Request) {
			elsewhere(r)
			r.Network.Installation, r.Network.Bridge = fmt.Sprintf("%02dabcdefabcd", i), fmt.Sprint("banger2", i)
			r.Network.IPv4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(100 + i), 0}), 24)
			r.Addresses = []netip.Prefix{network.Plan{IPv4: r.Network.IPv4}.Host4()}
		})
		if _, err := wire.Call(ctx, socket, r); i < maxInstallations-1 && err != nil || i == maxInstallations-1 && !fault.Is(err, fault.Exhausted) {
			t.Errorf("network %d: %v", i, err)
		}
	}
}

func TestVersions(t *testing.T) {
	_, _, socket := fakeService(t)
	a, err := wire.Call(t.Context(), socket, wire.Request{Verb: wire.Version})
	if err != nil || a.Revision != wire.Revision || a.Release == "" {
		t.Errorf("%+v, %v", a, err)
	}
	// A caller of another revision is told so before anything of its request is looked at.
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := wire.Write(conn, map[string]any{"revision": 99, "verb": "setup", "newfangled": true}); err != nil {
		t.Fatal(err)
	}
	if _, err := wire.ReadAnswer(conn); !fault.Is(err, fault.VersionSkew) {
		t.Errorf("%v", err)
	}

	// A helper of another revision, seen by this program.
	old := answering(t, map[string]any{"revision": 99, "release": "0.0.1", "fault": map[string]any{"code": "invalid", "message": "?"}})
	c := NewClient(old, sample(installation), "banger0")
	for what, err := range map[string]error{"check": c.Check(t.Context()), "remove": c.Remove(t.Context())} {
		if !fault.Is(err, fault.VersionSkew) || !strings.Contains(err.Error(), "0.0.1") || !strings.Contains(fault.HintOf(err), "system install") {
			t.Errorf("%s: %v, hint %q", what, err, fault.HintOf(err))
		}
	}
}

// answering is a socket whose every caller gets the same.
func answering(t *testing.T, answer any) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "helper")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if answer != nil {
				_ = wire.Write(conn, answer)
			}
			_ = conn.Close()
		}
	}()
	return filepath.Join(dir, "s")
}

func TestNobodyThere(t *testing.T) {
	silent := answering(t, nil)
	gone := filepath.Join(filepath.Dir(silent), "gone")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: gone, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	for socket, says := range map[string]string{gone + "x": "system install", gone: "systemctl restart banger-helper@", silent: "journalctl"} {
		err := NewClient(socket, sample(installation), "banger0").Check(t.Context())
		if !fault.Is(err, fault.Unavailable) || !strings.Contains(fault.HintOf(err), says) {
			t.Errorf("%v, hint %q, want %q", err, fault.HintOf(err), says)
		}
	}
}

// TestIdle: a helper that nobody asks ends, and one that works, or that a caller holds, does not.
func TestIdle(t *testing.T) {
	f := newFakeHosts(os.Getuid())
	f.hold = make(chan struct{})
	dir := t.TempDir()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := NewServer(Options{UID: f.uid, Ranges: ranges, Records: filepath.Join(dir, "records"), Open: f.open(t), Idle: 20 * time.Millisecond, Log: slog.New(slog.DiscardHandler)})
	ended := make(chan error, 1)
	called := make(chan error, 1)
	go func() {
		p := sample(installation)
		_, err := NewClient(l.Addr().String(), p, "banger0").Setup(t.Context(), addresses(p))
		called <- err
	}()
	go func() { ended <- s.Serve(t.Context(), l) }()
	select {
	case <-ended:
		t.Fatal("it ended while somebody waited for it")
	case <-time.After(200 * time.Millisecond):
	}
	close(f.hold)
	if err := <-called; err != nil {
		t.Error(err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Error("it does not end")
	}
}

// FuzzRequest throws bytes at a helper. The fake host complains of what no user may have done.
func FuzzRequest(f *testing.F) {
	p := sample(installation)
	c := NewClient("", p, "banger0")
	seed := func(change func(*wire.Request)) {
		r := c.request(wire.Setup)
		r.Revision, r.Addresses = wire.Revision, addresses(p)
		change(&r)
		b, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	for _, verb := range append([]wire.Verb{wire.Version, wire.Watch, wire.ListenDNS, wire.KeepNames}, verbs...) {
		seed(func(r *wire.Request) { r.Verb = verb })
		seed(func(r *wire.Request) {
			r.Verb, r.At, r.Server = verb, p.Host4().Addr(), netip.MustParseAddrPort("127.0.0.1:53")
		})
		seed(func(r *wire.Request) { r.Verb, r.Network.Installation = verb, foreign })
		seed(func(r *wire.Request) { r.Verb, r.Slots = verb, []int{0} })
		seed(func(r *wire.Request) { r.Verb, r.Slots, r.Isolated = verb, []int{-1, 1 << 30}, true })
		seed(func(r *wire.Request) {
			r.Verb, r.Hosts = verb, []netip.Addr{p.Host4().Addr()}
			r.Guests = []wire.Guest{{Slot: 1, IPv4: netip.MustParseAddr("172.16.88.3"), NAT: true, Group: "a"}}
		})
	}
	for _, s := range []string{"", "{}", "null", "[]", `{"revision":2}`, `{"revision":2,"verb":"setup","network":{"installation":"a1b2c3d4e5f6\n"}}`,
		`{"revision":2,"verb":"setup","path":"/etc/shadow"}`, `{"revision":2,"verb":"taps"}{}`, strings.Repeat("[", 10000), `{"revision":1e99}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		hosts := newFakeHosts(os.Getuid())
		o := Options{UID: hosts.uid, Ranges: ranges, Records: t.TempDir(), Open: hosts.open(t), Log: slog.New(slog.DiscardHandler)}
		for _, c := range []record.Record{
			{UID: hosts.uid + 1, Installation: foreign, Bridge: "banger7", Addresses: []netip.Prefix{netip.MustParsePrefix("172.16.99.1/24")}, Guarded: true},
			{UID: hosts.uid, Installation: installation, Bridge: "banger0", Addresses: addresses(p), Guarded: true},
		} {
			if err := record.Dir(o.Records).Put(c); err != nil {
				t.Fatal(err)
			}
		}
		hosts.present[installation], hosts.last = true, policyOf(p, "banger0")
		r, err := wire.ReadRequest(bytes.NewReader(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)))
		if err != nil {
			if !fault.Is(err, fault.Invalid) && !fault.Is(err, fault.VersionSkew) {
				t.Errorf("%v", err)
			}
			return
		}
		o.ListenDNS = func(at netip.Addr) (net.Listener, net.PacketConn, error) {
			if !slices.ContainsFunc(addresses(p), func(a netip.Prefix) bool { return a.Addr() == at }) {
				t.Errorf("port 53 of %s is opened", at)
			}
			return nil, nil, fault.New(fault.Unavailable, "port 53", "it is taken")
		}
		o.KeepNames = func(_ context.Context, _ int, addr netip.AddrPort) error {
			if !addr.Addr().IsLoopback() {
				t.Errorf("the resolver is told of %s", addr)
			}
			return nil
		}
		s := NewServer(o)
		switch r.Verb {
		case wire.Version, wire.Watch:
			return
		case wire.ListenDNS:
			_, err = s.listenDNS(t.Context(), r)
		case wire.KeepNames:
			err = s.keepNames(t.Context(), r)
		default:
			_, err = s.do(t.Context(), r)
		}
		if err != nil && fault.Is(err, fault.Internal) {
			t.Errorf("%s: %v", body, err)
		}
		b, err := os.ReadFile(filepath.Join(o.Records, foreign))
		if err != nil || !strings.Contains(string(b), fmt.Sprintf(`"uid":%d`, hosts.uid+1)) {
			t.Errorf("another user's record is %s, %v", b, err)
		}
	})
}

// TestHostileBytes: what is no request is answered or hung up on, and whoever comes next is served.
func TestHostileBytes(t *testing.T) {
	f, _, socket := fakeService(t)
	length := func(n uint32, rest string) []byte { return append(binary.BigEndian.AppendUint32(nil, n), rest...) }
	for what, sent := range map[string][]byte{
		"nothing": nil, "half a length": {0, 0}, "4 GiB": length(1<<32-1, "{}"), "less than announced": length(100, "{}"),
		"no length": []byte("GET / HTTP/1.1\r\n\r\n"), "no JSON": length(4, "\x00\xff\xfe{"), "deep": length(20000, strings.Repeat("[", 20000)),
		"another type": length(2, "[]"), "a revision that is none": length(16, `{"revision":"1"}`), "two at once": bytes.Repeat(length(2, "{}"), 2),
	} {
		t.Run(what, func(t *testing.T) {
			conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
			_, _ = conn.Write(sent)
			_ = conn.CloseWrite()
			if _, err := wire.ReadAnswer(conn); !fault.Is(err, fault.Invalid) && !fault.Is(err, fault.VersionSkew) {
				t.Errorf("%v", err)
			}
		})
	}
	if _, err := NewClient(socket, sample(installation), "banger0").TAPs(t.Context()); err != nil || len(f.calls) != 0 {
		t.Errorf("%v, %v", err, f.calls)
	}
}

// BenchmarkCall is what the way to a helper and back costs.
func BenchmarkCall(b *testing.B) {
	_, _, socket := fakeService(b)
	c := NewClient(socket, sample(installation), "banger0")
	for b.Loop() {
		if _, err := c.TAPs(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
