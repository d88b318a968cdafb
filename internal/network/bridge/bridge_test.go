package bridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// host is a host that keeps notes.
type host struct {
	mu        sync.Mutex
	addresses []netip.Prefix // of the bridge; nil: there is none
	taps      map[int]bool   // isolated
	policy    *network.Policy
	calls     []string
	policies  int
	deletes   [][]int
	fail      func(verb string) error
	hold      chan struct{} // Policy waits for it
	obstacles []hostnet.Obstacle
	changed   chan struct{}
	firewall  chan struct{} // somebody changes it
}

func newHost() *host {
	return &host{taps: map[int]bool{}, changed: make(chan struct{}, 1), firewall: make(chan struct{})}
}

func (h *host) begin(verb string) (func(), error) {
	h.mu.Lock()
	h.calls = append(h.calls, verb)
	var err error
	if h.fail != nil {
		err = h.fail(verb)
	}
	return func() {
		h.mu.Unlock()
		select {
		case h.changed <- struct{}{}:
		default:
		}
	}, err
}

func (h *host) Check(context.Context) error { end, err := h.begin("check"); end(); return err }

func (h *host) Setup(_ context.Context, addresses []netip.Prefix) (int, error) {
	end, err := h.begin("setup")
	defer end()
	if err == nil {
		h.addresses = addresses
	}
	return 1420, err
}

func (h *host) AddTAP(_ context.Context, slot int, isolated bool) error {
	end, err := h.begin("add")
	defer end()
	if err == nil && h.addresses == nil {
		err = errors.New("there is no bridge")
	}
	if err == nil {
		h.taps[slot] = isolated
	}
	return err
}

func (h *host) DeleteTAPs(_ context.Context, slots []int) error {
	end, err := h.begin("delete")
	defer end()
	if err == nil && len(slots) > 0 {
		h.deletes = append(h.deletes, slots)
		for _, s := range slots {
			delete(h.taps, s)
		}
	}
	return err
}

func (h *host) TAPs(context.Context) ([]int, error) {
	end, err := h.begin("taps")
	defer end()
	var out []int
	for s := range h.taps {
		out = append(out, s)
	}
	slices.Sort(out)
	return out, err
}

func (h *host) Policy(_ context.Context, p network.Policy) error {
	if h.hold != nil {
		<-h.hold
	}
	end, err := h.begin("policy")
	defer end()
	if err == nil {
		h.policy = &p
		h.policies++
	}
	return err
}

func (h *host) Remove(context.Context) error {
	end, err := h.begin("remove")
	defer end()
	if err == nil {
		h.addresses, h.policy, h.taps = nil, nil, map[int]bool{}
	}
	return err
}

func (h *host) Watch(ctx context.Context, changed func()) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.firewall:
			changed()
		}
	}
}

func (h *host) Obstacles() ([]hostnet.Obstacle, error) { return h.obstacles, nil }
func (h *host) Close()                                 {}

// state is the host in words.
func (h *host) state() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var guests, taps []string
	if h.policy != nil {
		for _, g := range h.policy.Guests {
			guests = append(guests, fmt.Sprintf("%s nat=%v group=%s", g.TAP, g.NAT, g.Group))
		}
	}
	for s, isolated := range h.taps {
		taps = append(taps, fmt.Sprintf("%d isolated=%v", s, isolated))
	}
	slices.Sort(guests)
	slices.Sort(taps)
	return fmt.Sprintf("bridge %v; taps %v; guests %v", h.addresses, taps, guests)
}

// until waits for the pool to have brought the host there.
func (h *host) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for {
		h.mu.Lock()
		there := ok()
		h.mu.Unlock()
		if there {
			return
		}
		select {
		case <-h.changed:
		case <-t.Context().Done():
			t.Fatalf("%s: %s", what, h.state())
		}
	}
}

func options(pool int, free func(int) []int) Options {
	return Options{Plan: network.Plan{Installation: "a1b2c3d4e5f6", IPv4: netip.MustParsePrefix("172.16.88.0/24"), IPv6: network.UniqueLocal("a1b2c3d4e5f6")},
		Bridge: "banger0", Pool: pool, Free: free, Log: slog.New(slog.DiscardHandler)}
}

func machine(slot int, spec vm.Spec) vm.VM {
	return vm.VM{ID: vm.ID(fmt.Sprintf("%032x", slot)), Name: fmt.Sprint("vm-", slot), Lease: vm.Lease{Slot: slot}, Spec: spec}
}

func attach(t *testing.T, n *Network, v vm.VM) vm.Interface {
	t.Helper()
	i, err := n.Attach(t.Context(), v)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func TestLife(t *testing.T) {
	h := newHost()
	n := New(h, options(0, nil))
	if h.state() != "bridge []; taps []; guests []" {
		t.Errorf("something was made before a VM needs it: %s", h.state())
	}
	a, b := machine(0, vm.Spec{}), machine(1, vm.Spec{NAT: true, NetworkGroup: "web"})
	i := attach(t, n, a)
	if i.MTU != 1420 || i.IPv4.String() != "172.16.88.2/24" || i.TAP != "bgra1b2c3-0" {
		t.Errorf("%+v", i)
	}
	attach(t, n, b)
	want := "bridge [172.16.88.1/24 fda1:b2c3:d4e5::1/64]; taps [0 isolated=true 1 isolated=false]; guests [bgra1b2c3-0 nat=false group= bgra1b2c3-1 nat=true group=web]"
	if h.state() != want {
		t.Errorf("%s, want\n%s", h.state(), want)
	}
	// Settings of a VM that runs.
	a.Spec.NAT, b.Spec.NetworkGroup = true, ""
	attach(t, n, a)
	attach(t, n, b)
	if want := "taps [0 isolated=true 1 isolated=true]; guests [bgra1b2c3-0 nat=true group= bgra1b2c3-1 nat=true group=]"; !strings.Contains(h.state(), want) {
		t.Errorf("%s, want\n%s", h.state(), want)
	}
	for range 2 {
		if err := n.Detach(t.Context(), a); err != nil {
			t.Fatal(err)
		}
	}
	if want := "taps [1 isolated=true]; guests [bgra1b2c3-1 nat=true group=]"; !strings.Contains(h.state(), want) {
		t.Errorf("%s, want\n%s", h.state(), want)
	}
	if err := n.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(h.state(), "guests [bgra1b2c3-1") {
		t.Errorf("a VM lost its network with the daemon: %s", h.state())
	}

	// The next daemon, which may find other ranges in its settings.
	b.Interface = &vm.Interface{Kind: vm.BridgeNetwork, TAP: "bgra1b2c3-1", IPv4: netip.MustParsePrefix("10.9.9.3/24"), Gateway4: netip.MustParseAddr("10.9.9.1")}
	h.taps[7] = true // left by a crash
	n = New(h, options(0, nil))
	if err := n.Restore(t.Context(), []vm.VM{b}); err != nil {
		t.Fatal(err)
	}
	want = "bridge [10.9.9.1/24 172.16.88.1/24 fda1:b2c3:d4e5::1/64]; taps [1 isolated=true]; guests [bgra1b2c3-1 nat=true group=]"
	if h.state() != want || !slices.Contains(h.policy.Hosts, netip.MustParseAddr("10.9.9.1")) {
		t.Errorf("%s, want\n%s", h.state(), want)
	}
	if i := attach(t, n, b); i.IPv4.String() != "10.9.9.3/24" {
		t.Errorf("a VM that runs got another address: %+v", i)
	}
	if err := n.Detach(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if h.state() != "bridge []; taps []; guests []" {
		t.Errorf("something is left: %s", h.state())
	}
	// A VM that was there before the host booted.
	n = New(h, options(0, nil))
	if err := errors.Join(n.Detach(t.Context(), b), n.Close(t.Context())); err != nil || h.policy != nil || h.addresses != nil {
		t.Errorf("something was made for a VM that goes: %s, %v", h.state(), err)
	}
	// After a crash with nothing that runs, what is left goes at the start.
	h.addresses, h.taps[3] = []netip.Prefix{}, true
	n = New(h, options(0, nil))
	if err := errors.Join(n.Restore(t.Context(), nil), n.Close(t.Context())); err != nil || h.state() != "bridge []; taps []; guests []" {
		t.Errorf("something is left: %s, %v", h.state(), err)
	}
}

// A hundred VMs that go at once are a few turns at the host.
func TestBatch(t *testing.T) {
	h := newHost()
	n := New(h, options(0, nil))
	defer n.Close(context.Background())
	for slot := range 100 {
		attach(t, n, machine(slot, vm.Spec{}))
	}
	h.policies, h.hold = 0, make(chan struct{})
	var group sync.WaitGroup
	detach := func(slot int) {
		group.Go(func() {
			if err := n.Detach(t.Context(), machine(slot, vm.Spec{})); err != nil {
				t.Error(err)
			}
		})
	}
	// waiting says how many wait for the turn that has not begun.
	waiting := func() int {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.next == nil {
			return 0
		}
		return len(n.next.remove)
	}
	until := func(what string, ok func() bool) {
		for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal(what)
			}
		}
	}
	detach(0) // its turn is held at the host
	until("the first turn does not begin", func() bool { n.mu.Lock(); defer n.mu.Unlock(); return len(n.attached) == 99 && n.next == nil })
	for slot := 1; slot < 100; slot++ {
		detach(slot)
	}
	until("not all of them wait for one turn", func() bool { return waiting() == 99 })
	close(h.hold)
	group.Wait()
	if len(h.taps) != 0 || h.policies != 2 {
		t.Errorf("%d TAPs are left after %d policies and %d removals", len(h.taps), h.policies, len(h.deletes))
	}
}

func TestPool(t *testing.T) {
	h := newHost()
	var mu sync.Mutex
	taken := map[int]bool{}
	free := func(count int) (out []int) {
		mu.Lock()
		defer mu.Unlock()
		for s := 0; len(out) < count; s++ {
			if !taken[s] {
				out = append(out, s)
			}
		}
		return out
	}
	take := func(slot int, is bool) { mu.Lock(); taken[slot] = is; mu.Unlock() }
	n := New(h, options(2, free))
	has := func(slots ...int) func() bool {
		return func() bool {
			for _, s := range slots {
				if isolated, ok := h.taps[s]; !ok || !isolated {
					return false
				}
			}
			return len(h.taps) == len(slots)
		}
	}
	take(0, true)
	attach(t, n, machine(0, vm.Spec{}))
	h.until(t, "two more", has(0, 1, 2))
	take(1, true)
	attach(t, n, machine(1, vm.Spec{}))
	h.until(t, "two more", has(0, 1, 2, 3))
	// What becomes free below is made anew, and TAPs that nobody will ask for go once there are too many.
	take(0, false)
	if err := n.Detach(t.Context(), machine(0, vm.Spec{})); err != nil {
		t.Fatal(err)
	}
	h.until(t, "the one that became free", has(0, 1, 2, 3))
	if err := n.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !has(1)() {
		t.Errorf("what no VM has is left: %s", h.state())
	}
}

// Whoever changes the firewall has the policy looked at.
func TestGuard(t *testing.T) {
	h := newHost()
	n := New(h, options(0, nil))
	attach(t, n, machine(0, vm.Spec{}))
	h.mu.Lock()
	before := h.policies
	h.mu.Unlock()
	h.firewall <- struct{}{}
	h.until(t, "the policy was not set again", func() bool { return h.policies == before+1 })
	if err := n.Detach(t.Context(), machine(0, vm.Spec{})); err != nil {
		t.Fatal(err)
	}
	h.firewall <- struct{}{} // of no interest any more
	if err := n.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestFailures(t *testing.T) {
	h := newHost()
	n := New(h, options(0, nil))
	defer n.Close(context.Background())
	taken := fault.New(fault.Exists, "banger0", "it is another's").WithHint("choose another name")
	h.fail = func(verb string) error {
		if verb == "setup" || verb == "check" {
			return taken
		}
		return nil
	}
	if _, err := n.Attach(t.Context(), machine(0, vm.Spec{})); !fault.Is(err, fault.Exists) || fault.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
	if f := n.Check(t.Context()); len(f) != 1 || f[0].Severity != doctor.Fail || f[0].Fix != "choose another name" {
		t.Errorf("%+v", f)
	}
	h.fail = nil
	attach(t, n, machine(0, vm.Spec{}))
	// Somebody removes the bridge: the next VM has it made again.
	h.mu.Lock()
	h.addresses = nil
	h.mu.Unlock()
	attach(t, n, machine(1, vm.Spec{}))
	if _, err := n.Attach(t.Context(), machine(253, vm.Spec{})); !fault.Is(err, fault.Exhausted) {
		t.Errorf("a slot without an address: %v", err)
	}
	h.obstacles = []hostnet.Obstacle{{Table: "ip filter", Chain: "FORWARD", Fix: "sudo nft ..."}}
	if f := n.Check(t.Context()); len(f) != 2 || f[0].Severity != doctor.Pass || f[1].Severity != doctor.Warn || f[1].Fix == "" {
		t.Errorf("%+v", f)
	}
	// A host that does not answer is waited for as long as the caller does.
	h.hold = make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.Detach(ctx, machine(1, vm.Spec{})); !fault.Is(err, fault.Cancelled) {
		t.Errorf("%v", err)
	}
	close(h.hold)
}
