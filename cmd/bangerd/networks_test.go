package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	"git.thaloco.com/thaloco/banger/internal/config"
	banger "git.thaloco.com/thaloco/banger/internal/dns"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/helper"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/network/networktest"
	"git.thaloco.com/thaloco/banger/internal/network/usernet"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
	"git.thaloco.com/thaloco/banger/test/fakebundle"
	"git.thaloco.com/thaloco/banger/test/fakeguest"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 0 && os.Args[0] == usernet.Program { // the daemon starts its own executable as that
		os.Exit(usernet.Main(os.Args))
	}
	os.Exit(m.Run())
}

// installation is a daemon in this process, on the namespace that stands for a host: everything of it is real but the machines,
// whose interfaces are left to guests that the test lets join.
type installation struct {
	t      *testing.T
	cfg    config.Config
	paths  config.Paths
	driver func() vmm.Driver
	uid    int        // of the daemon, as it believes
	root   rootHelper // what it has of it
	s      *sandbox.Service
	guests map[vm.ID]*networktest.Guest
}

func install(t *testing.T, change func(*config.Config)) *installation {
	t.Helper()
	return installFor(t, os.Geteuid(), rootHelper{}, false, change)
}

func installFor(t *testing.T, uid int, root rootHelper, agents bool, change func(*config.Config)) *installation {
	t.Helper()
	dir := t.TempDir()
	if err := fakebundle.Make(filepath.Join(dir, "bundle")); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"BANGER_STATE_DIR": filepath.Join(dir, "state"), "XDG_CACHE_HOME": filepath.Join(dir, "cache"), "XDG_RUNTIME_DIR": dir}
	paths, err := config.ResolvePaths(config.Environment{Getenv: func(k string) string { return env[k] }, Home: dir, UID: os.Geteuid(), Tmp: dir})
	if err != nil {
		t.Fatal(err)
	}
	world, err := fakevmm.Open(filepath.Join(dir, "world"))
	if err != nil {
		t.Fatal(err)
	}
	in := &installation{t: t, paths: paths, uid: uid, root: root, cfg: config.Defaults(vm.Host{CPUs: 4, MemoryMiB: 8192}), guests: map[vm.ID]*networktest.Guest{},
		driver: func() vmm.Driver {
			d := fakevmm.New(world, fakeguest.Agent(nil))
			if agents {
				return byAgent{d}
			}
			return d
		}}
	in.cfg.RuntimeDir = filepath.Join(dir, "bundle")
	in.cfg.DefaultDiskSize, in.cfg.DefaultSystemSize = vm.MinDiskBytes, vm.MinDiskBytes
	change(&in.cfg)
	for _, ensure := range []func() error{paths.EnsureState, paths.EnsureCache} {
		if err := ensure(); err != nil {
			t.Fatal(err)
		}
	}
	in.open()
	t.Cleanup(in.close)
	return in
}

func (in *installation) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 3*networktest.Patience)
	in.t.Cleanup(cancel)
	return ctx
}

func (in *installation) open() {
	in.t.Helper()
	d := in.driver()
	s, err := sandbox.Open(in.ctx(), sandbox.Options{Driver: d, Networks: networks(in.paths, in.cfg, d, in.uid, in.root),
		Config: in.cfg, Paths: in.paths, Host: vm.Host{CPUs: 4, MemoryMiB: 8192}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		in.t.Fatal(err)
	}
	in.s = s
}

func (in *installation) close() {
	in.t.Helper()
	if in.s == nil {
		return
	}
	if err := in.s.Close(in.ctx()); err != nil {
		in.t.Errorf("the daemon does not end: %v", err)
	}
	in.s = nil
}

func (in *installation) done(op operation.Operation, err error) vm.ID {
	in.t.Helper()
	if err == nil {
		err = in.s.WatchOperation(in.ctx(), op.ID, func(o operation.Operation) error { op = o; return nil })
	}
	if err == nil && op.State != operation.Succeeded {
		err = fmt.Errorf("%s: %w", op.State, op.Fault)
	}
	if err != nil {
		in.t.Fatalf("%s of %s: %v", op.Kind, op.VMName, err)
	}
	return vm.ID(op.VMID)
}

// vm looks at a VM, and has its guest join if it runs and has not.
func (in *installation) vm(id vm.ID) sandbox.Detail {
	in.t.Helper()
	d, err := in.s.Show(in.ctx(), string(id))
	if err != nil {
		in.t.Fatal(err)
	}
	if d.VM.State == vm.Running && in.guests[id] == nil {
		var key []byte
		if d.VM.Interface.Tunnel {
			key = boot.TunnelKey(d.VM.Secrets.Agent)
		}
		in.guests[id] = networktest.Join(in.t, *d.VM.Interface, filepath.Join(in.paths.Run(id.Short()), usernet.Socket), key...)
	}
	return d
}

func (in *installation) create(name, group string, nat bool) (vm.ID, *networktest.Guest) {
	in.t.Helper()
	id := in.done(in.s.Create(in.ctx(), sandbox.CreateRequest{Name: name, NAT: &nat, NetworkGroup: &group}))
	in.vm(id)
	return id, in.guests[id]
}

func (in *installation) set(id vm.ID, c vm.Change) {
	in.t.Helper()
	in.done(in.s.Set(in.ctx(), id, sandbox.SetRequest{Change: c}))
}

func (in *installation) stop(id vm.ID) {
	in.t.Helper()
	if g := in.guests[id]; g != nil {
		g.Leave()
		delete(in.guests, id)
	}
	in.done(in.s.Stop(in.ctx(), id, true))
}

// listens has the agent of a VM tell that its guest listens on ports, and no others.
func (in *installation) listens(id vm.ID, ports ...uint16) {
	in.t.Helper()
	if err := fakeguest.Listen(in.paths.Run(id.Short()), ports...); err != nil {
		in.t.Fatal(err)
	}
}

// follows wants a port at a VM's address to come and go with its listener, the port 3000 and NAT to stay, and all of it again
// after a daemon's end.
func (in *installation) follows(id vm.ID, at netip.Addr) {
	in.t.Helper()
	there := func(when string, port uint16, want bool) {
		in.t.Helper()
		for end := time.Now().Add(networktest.Patience); ; time.Sleep(10 * time.Millisecond) {
			conn, err := net.Dial("tcp", netip.AddrPortFrom(at, port).String())
			if err == nil {
				_ = conn.Close()
			}
			if (err == nil) == want {
				return
			}
			if time.Now().After(end) {
				in.t.Fatalf("%s, port %d: %v", when, port, err)
			}
		}
	}
	there("before it listens", 3001, false)
	in.listens(id, 3000, 3001)
	there("listening", 3001, true)
	in.close()
	there("without a daemon", 3001, true)
	in.listens(id, 3000, 3002)
	in.open()
	there("with the next daemon", 3002, true)
	there("with the next daemon", 3001, false)
	yes := true
	was := in.vm(id).VM.Spec.NAT
	in.set(id, vm.Change{NAT: &yes}) // which leaves ports alone
	in.listens(id, 3000)
	there("not listening any more", 3002, false)
	there("still listening", 3000, true)
	if got := world(in.t, in.guests[id], networktest.Patience); got != networktest.HostAddr.String() {
		in.t.Errorf("a change of ports has taken NAT: the world sees %q", got)
	}
	in.set(id, vm.Change{NAT: &was})
}

// talk wants text echoed over a connection, after the line that the server says first, which it returns.
func talk(conn net.Conn, text string) (first string, err error) {
	if err := conn.SetDeadline(time.Now().Add(networktest.Patience)); err != nil {
		return "", err
	}
	in := bufio.NewReader(conn)
	if first, err = in.ReadString('\n'); err != nil {
		return "", err
	}
	return strings.TrimSpace(first), echo(conn, in, text)
}

func echo(conn net.Conn, in *bufio.Reader, text string) error {
	if _, err := fmt.Fprintln(conn, text); err != nil {
		return err
	}
	back, err := in.ReadString('\n')
	if err == nil && back != text+"\n" {
		err = fmt.Errorf("%q came back as %q", text, back)
	}
	return err
}

// world is what the world sees of a guest that connects to it, "" if it does not get there in time.
func world(t *testing.T, g *networktest.Guest, bound time.Duration) string {
	t.Helper()
	conn, err := g.Dial(netip.AddrPortFrom(networktest.WorldAddr, networktest.EchoPort), bound)
	if err != nil {
		return ""
	}
	defer conn.Close()
	from, err := talk(conn, "hello")
	if err != nil {
		t.Errorf("a connection to the world: %v", err)
	}
	return from
}

// resolves is the address that a guest finds for a name, else the code of the answer.
func resolves(t *testing.T, g *networktest.Guest, name string) string {
	t.Helper()
	out := ""
	for _, network := range []string{"udp", "tcp"} {
		var got string
		m, err := g.Ask(network, name, dns.TypeA, networktest.Patience)
		switch {
		case err != nil:
			got = err.Error()
		case len(m.Answer) == 1:
			got = m.Answer[0].(*dns.A).A.String()
		default:
			got = dns.RcodeToString[m.Rcode]
		}
		if out != "" && got != out {
			t.Errorf("%s is %s over UDP and %s over TCP", name, out, got)
		}
		if out == "" {
			out = got
		}
		if name == networktest.WorldName {
			break // the world's resolver speaks UDP alone
		}
	}
	return out
}

// TestNetworks holds both networks to what they have in common, with guests that have a TCP/IP stack of their own and a world
// beyond the host. Where they differ, it says how.
func TestNetworks(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	networktest.World(t, 1400)
	for _, kind := range []string{vm.BridgeNetwork, vm.UserNetwork} {
		t.Run(kind, func(t *testing.T) { conforms(t, kind, os.Geteuid(), rootHelper{}, false) })
	}
	t.Run("bridge by the root helper", func(t *testing.T) { conforms(t, vm.BridgeNetwork, 1000, serving(t), false) })
	t.Run(vm.UserNetwork+" by the guest's agent", func(t *testing.T) { conforms(t, vm.UserNetwork, os.Geteuid(), rootHelper{}, true) })
}

// serving is a root helper in this process, which is root and stands for the user as well.
func serving(t *testing.T) rootHelper {
	t.Helper()
	dir, err := os.MkdirTemp("", "helper")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	s := helper.NewServer(helper.Options{
		UID: os.Geteuid(), Ranges: []netip.Prefix{netip.MustParsePrefix("172.16.0.0/16")}, Records: filepath.Join(dir, "records"), Log: log,
		Open:      func(s hostnet.Settings) (helper.Host, error) { return hostnet.Open(s) },
		ListenDNS: banger.ListenForGuests,
		KeepNames: func(ctx context.Context, link int, addr netip.AddrPort) error {
			return banger.Keep(ctx, link, addr, log)
		},
	})
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-ended, l.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	return rootHelper{socket: l.Addr().String()}
}

// byAgent is a VMM whose guests reach their network by themselves.
type byAgent struct{ *fakevmm.Driver }

func (d byAgent) Features() vmm.Features {
	f := d.Driver.Features()
	f.NICVsock = true
	return f
}

func (d byAgent) Start(ctx context.Context, spec vmm.Spec) (vmm.Machine, error) {
	spec.NICs = nil // no device for it
	return d.Driver.Start(ctx, spec)
}

func conforms(t *testing.T, kind string, uid int, root rootHelper, agents bool) {
	before := devices(t)
	in := installFor(t, uid, root, agents, func(c *config.Config) { c.Network, c.HostPorts = kind, config.Ports{4712} })
	yes, no := true, false
	shop, shopGuest := in.create("shop", "", false)
	spy, spyGuest := in.create("spy", "", true)
	own := in.vm(shop).VM.Interface.IPv4.Addr()

	if st, err := in.s.Status(in.ctx()); err != nil || len(st.Warnings) > 0 {
		t.Errorf("the daemon warns: %q, %v", st.Warnings, err)
	}
	if kind == vm.BridgeNetwork && shopGuest.Interface.MTU != 1400 {
		t.Errorf("the guest's MTU is %d, the uplink's 1400", shopGuest.Interface.MTU)
	}

	// The host reaches a guest, by an address of its own.
	l, err := shopGuest.Listen(3000)
	if err != nil {
		t.Fatal(err)
	}
	go networktest.Echo(l)
	in.listens(shop, 3000)
	addresses := in.vm(shop).Addresses
	if len(addresses) == 0 {
		t.Fatal("the host has no address for it")
	}
	at := netip.AddrPortFrom(addresses[0], 3000).String()
	inward, err := net.DialTimeout("tcp", at, networktest.Patience)
	// The user network's program may not listen yet: no guest boots as fast as this one.
	for end := time.Now().Add(networktest.Patience); err != nil && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		inward, err = net.DialTimeout("tcp", at, networktest.Patience)
	}
	if err != nil {
		t.Fatalf("the host does not reach the guest: %v", err)
	}
	defer inward.Close()
	if kind == vm.UserNetwork { // what its guest does not listen on is not there
		in.follows(shop, addresses[0])
	}
	if from, err := talk(inward, "hello"); err != nil || from != shopGuest.Interface.Gateway4.String() {
		t.Errorf("the guest sees %s, %v", from, err)
	}

	// Out with NAT alone, by the host's address, live; and what names there are goes with it.
	if from := world(t, spyGuest, networktest.Patience); from != networktest.HostAddr.String() {
		t.Errorf("with NAT the world sees %q", from)
	}
	if from := world(t, shopGuest, networktest.Silence); from != "" {
		t.Errorf("without NAT the world sees %q", from)
	}
	for g, want := range map[*networktest.Guest]string{spyGuest: networktest.WorldAddr.String(), shopGuest: "REFUSED"} {
		if got := resolves(t, g, networktest.WorldName); got != want {
			t.Errorf("%s finds %s for a name of the world, want %s", g.Interface.IPv4, got, want)
		}
	}
	in.set(shop, vm.Change{NAT: &yes})
	if from := world(t, shopGuest, networktest.Patience); from != networktest.HostAddr.String() {
		t.Errorf("with NAT of late the world sees %q", from)
	}
	in.set(spy, vm.Change{NAT: &no})
	if from := world(t, spyGuest, networktest.Silence); from != "" {
		t.Errorf("with NAT gone the world sees %q", from)
	}

	// Of the host a guest reaches nothing but DNS, and what the bridge's settings allow at the bridge's address.
	server, err := net.Listen("tcp", "0.0.0.0:4711")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go networktest.Echo(server)
	for _, a := range []netip.Addr{networktest.HostAddr, shopGuest.Interface.Gateway4, netip.MustParseAddr("127.0.0.1")} {
		if conn, err := shopGuest.Dial(netip.AddrPortFrom(a, 4711), networktest.Silence); err == nil {
			t.Errorf("a guest reaches the host at %s", a)
			_ = conn.Close()
		}
	}

	allowed, err := net.Listen("tcp", "0.0.0.0:4712")
	if err != nil {
		t.Fatal(err)
	}
	defer allowed.Close()
	go networktest.Echo(allowed)
	for _, a := range []netip.Addr{networktest.HostAddr, shopGuest.Interface.Gateway4} {
		want := kind == vm.BridgeNetwork && a == shopGuest.Interface.Gateway4
		conn, err := shopGuest.Dial(netip.AddrPortFrom(a, 4712), networktest.Silence)
		if err == nil {
			_ = conn.Close()
		}
		if (err == nil) != want {
			t.Errorf("a port of the host's that is allowed, at %s: %v", a, err)
		}
	}

	// Guests, their names, and groups.
	nobody := func(when string) {
		t.Helper()
		if conn, err := spyGuest.Dial(netip.AddrPortFrom(own, 3000), networktest.Silence); err == nil {
			t.Errorf("%s, a guest reaches another", when)
			_ = conn.Close()
		}
		if got := resolves(t, spyGuest, "shop.vm."); got != "NXDOMAIN" {
			t.Errorf("%s, another guest's name is %s", when, got)
		}
	}
	nobody("without groups")
	if got := resolves(t, spyGuest, "spy.vm."); got != spyGuest.Interface.IPv4.Addr().String() {
		t.Errorf("a guest's own name is %s", got)
	}
	store, none := "store", ""
	in.set(shop, vm.Change{Group: &store})
	nobody("with one of them in a group")
	in.set(spy, vm.Change{Group: &store})
	if kind == vm.UserNetwork { // each guest has a network of its own
		nobody("in a group")
	} else {
		if got := resolves(t, spyGuest, "Shop.vm."); got != own.String() {
			t.Errorf("the name of a VM of the same group is %s", got)
		}
		conn, err := spyGuest.Dial(netip.AddrPortFrom(own, 3000), networktest.Patience)
		if err != nil {
			t.Errorf("VMs of a group do not reach each other: %v", err)
		} else if from, err := talk(conn, "hello"); err != nil || from != spyGuest.Interface.IPv4.Addr().String() {
			t.Errorf("shop sees %s, %v", from, err)
		}
		in.set(spy, vm.Change{Group: &none})
		nobody("out of the group again")
	}

	// Nobody is somebody else.
	in.set(spy, vm.Change{NAT: &yes})
	if !datagram(t, spyGuest, netip.Addr{}, networktest.Patience) {
		t.Error("a datagram to the world is not answered")
	}
	if datagram(t, spyGuest, own, networktest.Silence) {
		t.Error("one with another guest's address is")
	}

	// A daemon that ends and another that takes over disturb nothing.
	outward, err := shopGuest.Dial(netip.AddrPortFrom(networktest.WorldAddr, networktest.EchoPort), networktest.Patience)
	if err != nil {
		t.Fatal(err)
	}
	defer outward.Close()
	if _, err := talk(outward, "hello"); err != nil {
		t.Fatal(err)
	}
	stopped := under(t, outward, inward)
	for range 3 {
		in.close()
		in.open()
	}
	if sent := stopped(); sent < 3 {
		t.Errorf("only %d words went to and fro meanwhile", sent)
	}
	if got := resolves(t, shopGuest, networktest.WorldName); got != networktest.WorldAddr.String() {
		t.Errorf("after that, a name of the world is %s", got)
	}

	// Addresses are for life.
	was := *in.vm(spy).VM.Interface
	in.stop(spy)
	if in.vm(spy).Addresses != nil {
		t.Error("a VM that does not run has addresses")
	}
	in.done(in.s.Start(in.ctx(), spy))
	now := *in.vm(spy).VM.Interface
	if now.IPv4 != was.IPv4 || now.IPv6 != was.IPv6 || now.MAC != was.MAC {
		t.Errorf("it had %+v, and has %+v", was, now)
	}
	if from := world(t, in.guests[spy], networktest.Patience); from != networktest.HostAddr.String() {
		t.Errorf("started again, the world sees %q", from)
	}

	for id, g := range in.guests {
		g.Leave()
		in.done(in.s.Delete(in.ctx(), id))
	}
	in.close()
	if after := devices(t); !slices.Equal(after, before) {
		t.Errorf("devices were %q, and are %q", before, after)
	}
}

// under sends words over connections until it is told to stop; then it returns how many came back from the one that had the fewest.
func under(t *testing.T, conns ...net.Conn) (stop func() int) {
	t.Helper()
	end := make(chan struct{})
	counts := make(chan int, len(conns))
	for _, conn := range conns {
		go func() {
			in := bufio.NewReader(conn)
			n := 0
			for {
				select {
				case <-end:
					counts <- n
					return
				default:
				}
				_ = conn.SetDeadline(time.Now().Add(networktest.Patience))
				err := echo(conn, in, fmt.Sprintf("word %d", n))
				if err == nil {
					n++
					continue
				}
				t.Errorf("a connection was lost after %d words: %v", n, err)
				counts <- n
				return
			}
		}()
	}
	return func() int {
		close(end)
		least := <-counts
		for range len(conns) - 1 {
			least = min(least, <-counts)
		}
		return least
	}
}

// datagram says whether the world answers one from an address that a guest claims.
func datagram(t *testing.T, g *networktest.Guest, from netip.Addr, bound time.Duration) bool {
	t.Helper()
	conn, err := g.DialUDP(from, netip.AddrPortFrom(networktest.WorldAddr, networktest.EchoPort))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("who am I?")); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(bound))
	n, err := conn.Read(make([]byte, 64))
	return err == nil && n > 0
}

func devices(t *testing.T) (names []string) {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	return names
}

// TestChoiceOfNetwork is what is chosen where, and what is said if it is not the best.
func TestChoiceOfNetwork(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	networktest.World(t, 1500)
	world, err := fakevmm.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	driver := fakevmm.New(world, fakeguest.Agent(nil))
	none := rootHelper{err: fault.New(fault.Unavailable, "root helper", "it is not installed").WithHint("sudo banger system install")}
	free, taken := netip.MustParsePrefix("172.16.88.0/24"), netip.MustParsePrefix("10.99.0.0/24") // the uplink's
	for _, c := range []struct {
		name, setting string
		uid           int
		cidr          netip.Prefix
		want          string // kinds
		why, fix      string
	}{
		{"root", config.NetworkAuto, 0, free, "bridge user", "", ""},
		{"root on a range that is taken", config.NetworkAuto, 0, taken, "user", "since the bridge network cannot be used", "cidr = "},
		{"a bridge whatever", config.NetworkBridge, 0, taken, "bridge user", "", ""},
		{"root wants the user network", config.NetworkUser, 0, free, "user", "", ""},
		{"a user", config.NetworkAuto, 1000, free, "user", "", ""},
		{"a user who wants a bridge", config.NetworkBridge, 1000, free, "", "takes root", `network = "user"`},
		{"none", config.NetworkNone, 0, free, "", "", ""},
	} {
		cfg := config.Defaults(vm.Host{CPUs: 1, MemoryMiB: 1024})
		cfg.Network, cfg.CIDR = c.setting, c.cidr
		var why, fix string
		host := sandbox.NetworkHost{Installation: "a1b2c3d4e5f6", RunDir: func(vm.ID) string { return t.TempDir() }, FreeSlots: func(int) []int { return nil },
			Log: slog.New(slog.DiscardHandler), Notice: func(w, f string) { why, fix = w, f }, LinkUp: func(sandbox.Link) {}, LinkDown: func() {}}
		var kinds []string
		for _, n := range networks(config.Paths{}, cfg, driver, c.uid, map[bool]rootHelper{true: {}, false: none}[c.uid == 0])(host) {
			kinds = append(kinds, n.Kind())
			if err := n.Close(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if got := strings.Join(kinds, " "); got != c.want || (why == "") != (c.why == "") || !strings.Contains(why, c.why) || !strings.Contains(fix, c.fix) {
			t.Errorf("%s: %q, because %q, fix %q", c.name, got, why, fix)
		}
	}
}

// TestWhyNotTheBridge is said by doctor and by the daemon's status.
func TestWhyNotTheBridge(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	networktest.World(t, 1500)
	in := install(t, func(c *config.Config) { c.CIDR = netip.MustParsePrefix("10.99.0.0/24") })
	st, err := in.s.Status(in.ctx())
	if err != nil || len(st.Warnings) != 1 || !strings.Contains(st.Warnings[0], "the user network, since the bridge network cannot be used: ") {
		t.Errorf("status warns %q, %v", st.Warnings, err)
	}
	found := false
	for _, f := range in.s.Doctor(in.ctx(), false) {
		found = found || f.Code == "network" && f.Severity == doctor.Warn && strings.Contains(f.Fix, "cidr = ")
	}
	if !found {
		t.Error("doctor does not say why")
	}
	id, _ := in.create("web", "", false)
	if k := in.vm(id).VM.Interface.Kind; k != vm.UserNetwork {
		t.Errorf("the VM is on the %s network", k)
	}
	in.stop(id)
}
