package helper

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/network/bridge"
	"git.thaloco.com/thaloco/banger/internal/network/networktest"
)

// as runs f with the rights of a user: the kernel notes who connects by the thread that does.
func as[T any](uid int, f func() (T, error)) (T, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	become := func(uid int) error {
		// Of this thread alone: the C library's, and Go's, are of the process.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
			return errno
		}
		return nil
	}
	if err := become(uid); err != nil {
		var zero T
		return zero, err
	}
	out, err := f()
	return out, errors.Join(err, become(0))
}

func do(uid int, f func() error) error {
	_, err := as(uid, func() (struct{}, error) { return struct{}{}, f() })
	return err
}

// user is a Client of an ordinary user's.
type user struct {
	*Client
	uid int
}

func (u user) Setup(ctx context.Context, a []netip.Prefix) (int, error) {
	return as(u.uid, func() (int, error) { return u.Client.Setup(ctx, a) })
}

func (u user) TAPs(ctx context.Context) ([]int, error) {
	return as(u.uid, func() ([]int, error) { return u.Client.TAPs(ctx) })
}

func (u user) Obstacles() ([]hostnet.Obstacle, error) { return as(u.uid, u.Client.Obstacles) }

func (u user) AddTAP(ctx context.Context, slot int, isolated bool) error {
	return do(u.uid, func() error { return u.Client.AddTAP(ctx, slot, isolated) })
}

func (u user) DeleteTAPs(ctx context.Context, slots []int) error {
	return do(u.uid, func() error { return u.Client.DeleteTAPs(ctx, slots) })
}

func (u user) Policy(ctx context.Context, p network.Policy) error {
	return do(u.uid, func() error { return u.Client.Policy(ctx, p) })
}

func (u user) Remove(ctx context.Context) error {
	return do(u.uid, func() error { return u.Client.Remove(ctx) })
}

func (u user) Watch(ctx context.Context, changed func()) error {
	return do(u.uid, func() error { return u.Client.Watch(ctx, changed) })
}

// Check of a helper's client looks at /dev/net/tun as well, which some machines let root alone open.
func (u user) Check(ctx context.Context) error {
	err := do(u.uid, func() error { return u.Client.Check(ctx) })
	if fault.Is(err, fault.Permission) && strings.Contains(err.Error(), "/dev/net/tun") {
		return nil
	}
	return err
}

func realHost(s hostnet.Settings) (Host, error) { return hostnet.Open(s) }

// devices is what there is of a network, without what the kernel counts.
func devices(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Attrs().Name == "lo" {
			continue
		}
		fmt.Fprintf(&b, "%s %s mtu %d", l.Attrs().Name, l.Type(), l.Attrs().MTU)
		if tap, ok := l.(*netlink.Tuntap); ok {
			protinfo, err := netlink.LinkGetProtinfo(l)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&b, " owner %d isolated %v", tap.Owner, protinfo.Isolated)
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			if !a.IP.IsLinkLocalUnicast() {
				fmt.Fprint(&b, " ", a.IPNet)
			}
		}
		b.WriteByte('\n')
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := c.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		fmt.Fprintf(&b, "table %s", table.Name)
		sets, err := c.GetSets(table)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range sets {
			elements, err := c.GetSetElements(s)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&b, " %s %d", s.Name, len(elements))
		}
		b.WriteByte('\n')
	}
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// TestConformance: what bridge.Host says holds in process and over the socket.
func TestConformance(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	p := sample(installation)
	const name = "banger0"
	const uid = 1000
	socket := serveFor(t, Options{UID: uid, Records: t.TempDir(), Open: realHost})
	inProcess, err := hostnet.Open(hostnet.Settings{Plan: p, Bridge: name, Owner: uid})
	if err != nil {
		t.Fatal(err)
	}
	var reached []string
	for _, adapter := range []struct {
		name string
		host bridge.Host
	}{
		{"in process", inProcess},
		{"over the socket", user{NewClient(socket, p, name), uid}},
	} {
		t.Run(adapter.name, func(t *testing.T) {
			h, ctx := adapter.host, t.Context()
			defer h.Close()
			must := func(errs ...error) {
				t.Helper()
				if err := errors.Join(errs...); err != nil {
					t.Fatal(err)
				}
			}
			// Of nothing, nothing is left, and nothing is there.
			must(h.Check(ctx), h.DeleteTAPs(ctx, []int{0, 1}), h.Remove(ctx))
			if slots, err := h.TAPs(ctx); err != nil || len(slots) != 0 {
				t.Errorf("%v, %v", slots, err)
			}
			if err := h.AddTAP(ctx, 0, true); err == nil {
				t.Error("a TAP without a bridge")
			}
			must(h.DeleteTAPs(ctx, []int{0})) // the half of it that one host can make
			if now := devices(t); now != "" {
				t.Errorf("there is\n%s", now)
			}
			// Each verb twice is the same.
			for range 2 {
				mtu, err := h.Setup(ctx, addresses(p))
				must(err, h.AddTAP(ctx, 0, true), h.AddTAP(ctx, 1, false), h.Policy(ctx, policyOf(p, name, 0, 1)))
				if mtu != 1500 {
					t.Errorf("MTU %d", mtu)
				}
			}
			if slots, err := h.TAPs(ctx); err != nil || !slices.Equal(slots, []int{0, 1}) {
				t.Errorf("%v, %v", slots, err)
			}
			reached = append(reached, devices(t))
			if obstacles, err := h.Obstacles(); err != nil || len(obstacles) != 0 {
				t.Errorf("%v, %v", obstacles, err)
			}
			must(h.Check(ctx))

			// Somebody changes the firewall, until it is noticed.
			watching, stop := context.WithCancel(ctx)
			changed, ended := make(chan struct{}, 1), make(chan error, 1)
			go func() {
				ended <- h.Watch(watching, func() {
					select {
					case changed <- struct{}{}:
					default:
					}
				})
			}()
			noticed := false
			for i := 0; !noticed && i < 200; i++ {
				must(h.Policy(ctx, policyOf(p, name, 0, 1+i%2)))
				select {
				case <-changed:
					noticed = true
				case <-time.After(50 * time.Millisecond):
				}
			}
			stop()
			if err := <-ended; err != nil || !noticed {
				t.Errorf("noticed %v, %v", noticed, err)
			}

			cancelled, cancel := context.WithCancel(ctx)
			cancel()
			if err := h.AddTAP(cancelled, 2, true); !fault.Is(err, fault.Cancelled) {
				t.Errorf("%v", err)
			}
			must(h.DeleteTAPs(ctx, []int{0, 1, 5}))
			if now := devices(t); strings.Contains(now, "owner") {
				t.Errorf("there is\n%s", now)
			}
			must(h.Remove(ctx), h.Remove(ctx))
			if now := devices(t); now != "" {
				t.Errorf("there is\n%s", now)
			}
			// What the host uses is refused, with what is free.
			lo, err := netlink.LinkByName("lo")
			must(err)
			taken, err := netlink.ParseAddr("172.16.88.77/24")
			must(err, netlink.AddrAdd(lo, taken))
			_, err = h.Setup(ctx, addresses(p))
			if !fault.Is(err, fault.Exists) || !strings.Contains(fault.HintOf(err), `cidr = "172.16.0.0/24"`) || !fault.Is(h.Check(ctx), fault.Exists) {
				t.Errorf("%v, hint %q", err, fault.HintOf(err))
			}
			must(netlink.AddrDel(lo, taken))
			if now := devices(t); now != "" {
				t.Errorf("there is\n%s", now)
			}
		})
	}
	if len(reached) != 2 || reached[0] != reached[1] || !strings.Contains(reached[0], "owner 1000 isolated true") {
		t.Errorf("the two differ:\n%s", strings.Join(reached, "\nand\n"))
	}
}

// TestUsersAreKeptApart: two users and root on one host.
func TestUsersAreKeptApart(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	ctx, dir := t.Context(), t.TempDir()
	const a, b = 1000, 1001
	socketOf := map[int]string{a: serveFor(t, Options{UID: a, Records: dir, Open: realHost}), b: serveFor(t, Options{UID: b, Records: dir, Open: realHost})}
	plan := sample(installation)
	alice := user{NewClient(socketOf[a], plan, "banger0"), a}
	if _, err := alice.Setup(ctx, addresses(plan)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(alice.AddTAP(ctx, 0, true), alice.Policy(ctx, policyOf(plan, "banger0", 0))); err != nil {
		t.Fatal(err)
	}
	rootPlan := network.Plan{Installation: "f00f00f00f00", IPv4: netip.MustParsePrefix("172.16.40.0/24"), IPv6: network.UniqueLocal("f00f00f00f00")}
	root, err := hostnet.Open(hostnet.Settings{Plan: rootPlan, Bridge: "banger9"})
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if _, err := root.Setup(ctx, addresses(rootPlan)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(root.AddTAP(ctx, 0, true), root.Policy(ctx, policyOf(rootPlan, "banger9", 0))); err != nil {
		t.Fatal(err)
	}
	before := devices(t)

	// A user at another's socket, were its mode not what it is.
	stranger := user{NewClient(socketOf[a], plan, "banger0"), b}
	if err := stranger.Remove(ctx); !fault.Is(err, fault.Permission) || !strings.Contains(err.Error(), "user 1001") {
		t.Errorf("%v", err)
	}
	// root, too: it has no need of it.
	if err := (user{alice.Client, 0}).Remove(ctx); !fault.Is(err, fault.Permission) {
		t.Errorf("%v", err)
	}
	// A user at its own helper, with another's names.
	bob := func(p network.Plan, name string) user { return user{NewClient(socketOf[b], p, name), b} }
	for what, err := range map[string]error{
		"remove": bob(plan, "banger0").Remove(ctx), "delete": bob(plan, "banger0").DeleteTAPs(ctx, []int{0}),
		"policy": bob(plan, "banger0").Policy(ctx, policyOf(plan, "banger0")), "check": bob(plan, "banger0").Check(ctx),
	} {
		if !fault.Is(err, fault.Permission) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := bob(rootPlan, "banger9").Setup(ctx, addresses(rootPlan)); !fault.Is(err, fault.Permission) || !strings.Contains(err.Error(), "root") {
		t.Errorf("%v", err)
	}
	if err := errors.Join(bob(rootPlan, "banger9").Remove(ctx), bob(rootPlan, "banger9").DeleteTAPs(ctx, []int{0})); err != nil {
		t.Errorf("%v", err)
	}
	own := network.Plan{Installation: "bbbbbbbbbbbb", IPv4: netip.MustParsePrefix("172.16.50.0/24"), IPv6: network.UniqueLocal("bbbbbbbbbbbb")}
	if _, err := bob(own, "banger0").Setup(ctx, addresses(own)); !fault.Is(err, fault.Exists) || !strings.Contains(fault.HintOf(err), "bgrbbbbbb") {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	if _, err := bob(own, "banger9").Setup(ctx, addresses(own)); !fault.Is(err, fault.Exists) { // root's, which is on no record
		t.Errorf("%v", err)
	}
	same := own
	same.IPv4 = plan.IPv4
	if _, err := bob(same, "banger1").Setup(ctx, addresses(same)); !fault.Is(err, fault.Exists) || !strings.Contains(fault.HintOf(err), "cidr = ") {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	if now := devices(t); now != before {
		t.Errorf("there is\n%s, and was\n%s", now, before)
	}

	// With names of its own it has a network, whose end leaves the other's alone.
	if _, err := bob(own, "banger1").Setup(ctx, addresses(own)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(bob(own, "banger1").AddTAP(ctx, 0, true), bob(own, "banger1").Policy(ctx, policyOf(own, "banger1", 0)), bob(own, "banger1").Remove(ctx)); err != nil {
		t.Fatal(err)
	}
	if now := devices(t); now != before {
		t.Errorf("there is\n%s, and was\n%s", now, before)
	}
}
