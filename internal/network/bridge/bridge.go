// Package bridge owns which VMs are on the bridge network: it keeps the list, has TAPs ready before they
// are needed, and lets the host be as the list says.
//
// It never touches the host itself: what takes privileges is behind Host, in this process or in another.
package bridge

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Host is the privileged verbs (hostnet.Host's are the contract). Each can be repeated, and a context that
// ends stops it before the next thing that it would do.
type Host interface {
	// Check says whether Setup would work; it changes nothing.
	Check(ctx context.Context) error
	// Setup makes the bridge with addresses, or repairs it, and returns the network's MTU.
	Setup(ctx context.Context, addresses []netip.Prefix) (mtu int, err error)
	// AddTAP makes the TAP of a slot as a port of the bridge, or repairs it.
	AddTAP(ctx context.Context, slot int, isolated bool) error
	// DeleteTAPs removes TAPs; those that are not there are fine.
	DeleteTAPs(ctx context.Context, slots []int) error
	// TAPs returns the slots that have one.
	TAPs(ctx context.Context) ([]int, error)
	// Policy sets what may pass, whole.
	Policy(ctx context.Context, p network.Policy) error
	// Remove takes everything away.
	Remove(ctx context.Context) error
	// Watch calls changed after anybody changed the firewall, until ctx ends.
	Watch(ctx context.Context, changed func()) error
	// Obstacles looks for what others drop.
	Obstacles() ([]hostnet.Obstacle, error)
	// Close releases the connection to the host; the network stays.
	Close()
}

// hostTime bounds one turn at the host: some requests to the kernel, of which each answers at once.
const hostTime = 30 * time.Second

// Options are what a Network is made of.
type Options struct {
	Plan   network.Plan
	Bridge string // name of the bridge
	Pool   int    // TAPs to have ready
	// HostPorts are of TCP: guests reach them on the host, at its addresses on the bridge.
	HostPorts []uint16
	// Free returns the slots that the next n VMs will have. It is called from another goroutine.
	Free func(n int) []int
	Log  *slog.Logger
	// Up is told the host's addresses on the bridge when a VM has come to it or it was taken in: it may be another bridge than before.
	// Down is told once, before the bridge goes or is left to the next daemon.
	Up   func(addresses []netip.Addr)
	Down func()
}

// Network is the bridge network of one installation. Safe for concurrent use.
type Network struct {
	o    Options
	host Host

	working sync.Mutex // one turn at the host at a time

	mu       sync.Mutex
	attached map[vm.ID]attachment
	byAddr   map[netip.Addr]vm.ID // of those that are attached
	hosts    []netip.Addr         // the host's own, when the bridge was last set up
	next     *turn                // the one that has not begun, which whoever comes joins
	up       bool                 // the bridge was there when it was last needed
	mtu      int
	warm     map[int]bool // slots with a TAP that no VM has

	poke    chan struct{} // the pool may need filling
	life    context.Context
	stop    context.CancelFunc
	workers sync.WaitGroup // fill and guard
	guarded sync.Once
}

// attachment is a VM on the bridge.
type attachment struct {
	i     vm.Interface
	nat   bool
	group string
}

// turn is one change of the host that any number of callers wait for: a hundred VMs that stop at once cost
// the kernel's wait for one.
type turn struct {
	remove []int // slots whose TAPs go
	done   chan struct{}
	err    error
}

// New returns a Network over host, which Close closes.
func New(host Host, o Options) *Network {
	ctx, stop := context.WithCancel(context.Background())
	n := &Network{o: o, host: host, attached: map[vm.ID]attachment{}, byAddr: map[netip.Addr]vm.ID{}, warm: map[int]bool{}, poke: make(chan struct{}, 1), life: ctx, stop: stop}
	n.workers.Go(func() { n.fill(ctx) })
	return n
}

// settled is how long the firewall has to be left alone before it is looked at: who loads it again does so in
// steps.
const settled = 100 * time.Millisecond

// guard sets the policy again when somebody else changed the firewall. Without it a flushed one would stay
// so until a VM comes or goes.
func (n *Network) guard(ctx context.Context) {
	changed := make(chan struct{}, 1)
	n.workers.Go(func() {
		err := n.host.Watch(ctx, func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		})
		if err != nil && ctx.Err() == nil {
			n.o.Log.Warn("nobody will notice when the firewall is flushed", "err", err)
		}
	})
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(settled):
		}
		n.mu.Lock()
		idle := len(n.attached) == 0
		n.mu.Unlock()
		if idle {
			continue
		}
		if err := n.commit(ctx); err != nil && ctx.Err() == nil {
			n.o.Log.Error("the firewall was changed, and the rules for VMs could not be looked after", "err", err)
		}
	}
}

// Kind is vm.BridgeNetwork.
func (n *Network) Kind() string { return vm.BridgeNetwork }

// Restore takes in the VMs that a former daemon attached, some of which may run, and removes what belongs to none of
// them. It comes before everything else, and no packet of theirs is lost by it.
func (n *Network) Restore(ctx context.Context, attached []vm.VM) error {
	keep := map[int]bool{}
	n.mu.Lock()
	for _, v := range attached {
		keep[v.Lease.Slot] = true
		if v.Interface != nil && v.Interface.Kind == vm.BridgeNetwork {
			n.take(v, *v.Interface)
		}
	}
	n.mu.Unlock()
	n.working.Lock()
	defer n.working.Unlock()
	if len(attached) == 0 {
		return n.host.Remove(ctx)
	}
	if err := n.setUp(ctx); err != nil {
		return err
	}
	if err := n.host.Policy(ctx, n.policy()); err != nil {
		return err
	}
	slots, err := n.host.TAPs(ctx)
	if err != nil {
		return err
	}
	if err := n.host.DeleteTAPs(ctx, slices.DeleteFunc(slots, func(s int) bool { return keep[s] })); err != nil {
		return err
	}
	n.refill()
	n.tellUp()
	return nil
}

// take puts a VM on the list. Called with mu locked.
func (n *Network) take(v vm.VM, i vm.Interface) {
	n.attached[v.ID] = attachment{i, v.Spec.NAT, v.Spec.NetworkGroup}
	n.byAddr[i.IPv4.Addr()] = v.ID
	if i.IPv6.IsValid() {
		n.byAddr[i.IPv6.Addr()] = v.ID
	}
}

// Guest tells which VM has an address.
func (n *Network) Guest(a netip.Addr) (vm.ID, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	id, ok := n.byAddr[a]
	return id, ok
}

// tellUp tells of the bridge's addresses.
func (n *Network) tellUp() {
	n.mu.Lock()
	hosts := n.hosts
	n.mu.Unlock()
	if n.o.Up != nil {
		n.o.Up(hosts)
	}
}

// setUp has the bridge made or repaired. Called with working locked.
func (n *Network) setUp(ctx context.Context) error {
	n.mu.Lock()
	// VMs that were started before the ranges were changed still know the host by its former addresses.
	addresses := []netip.Prefix{n.o.Plan.Host4()}
	if n.o.Plan.IPv6.IsValid() {
		addresses = append(addresses, n.o.Plan.Host6())
	}
	for _, a := range n.attached {
		addresses = append(addresses, netip.PrefixFrom(a.i.Gateway4, a.i.IPv4.Bits()))
		if a.i.Gateway6.IsValid() {
			addresses = append(addresses, netip.PrefixFrom(a.i.Gateway6, a.i.IPv6.Bits()))
		}
	}
	n.mu.Unlock()
	slices.SortFunc(addresses, netip.Prefix.Compare)
	addresses = slices.Compact(addresses)
	mtu, err := n.host.Setup(ctx, addresses)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.up = err == nil; n.up {
		n.hosts = nil
		for _, a := range addresses {
			n.hosts = append(n.hosts, a.Addr())
		}
		n.mtu = mtu
		n.guarded.Do(func() { n.workers.Go(func() { n.guard(n.life) }) })
	}
	return err
}

// policy is what the list of VMs comes to.
func (n *Network) policy() network.Policy {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := network.Policy{Installation: n.o.Plan.Installation, Bridge: n.o.Bridge, TAPPrefix: n.o.Plan.TAPPrefix(), Hosts: []netip.Addr{n.o.Plan.Host4().Addr()},
		HostPorts: n.o.HostPorts}
	if n.o.Plan.IPv6.IsValid() {
		p.Hosts = append(p.Hosts, n.o.Plan.Host6().Addr())
	}
	p.Guests = make([]network.Guest, 0, len(n.attached))
	for _, a := range n.attached {
		p.Guests = append(p.Guests, network.Guest{TAP: a.i.TAP, MAC: a.i.MAC, IPv4: a.i.IPv4.Addr(), IPv6: a.i.IPv6.Addr(), NAT: a.nat, Group: a.group})
		for _, gw := range []netip.Addr{a.i.Gateway4, a.i.Gateway6} {
			if gw.IsValid() && !slices.Contains(p.Hosts, gw) {
				p.Hosts = append(p.Hosts, gw)
			}
		}
	}
	slices.SortFunc(p.Hosts, netip.Addr.Compare)
	return p
}

// Attach puts a VM on the bridge, or changes how it is there, and tells what its interface has. A VM that
// runs keeps what it has. fault.Exhausted if there is no address for it.
func (n *Network) Attach(ctx context.Context, v vm.VM) (vm.Interface, error) {
	ctx, cancel := context.WithTimeout(ctx, hostTime)
	defer cancel()
	n.mu.Lock()
	have, there := n.attached[v.ID]
	// The first one to come finds the uplink as it is now.
	up := n.up && len(n.attached) > 0
	n.mu.Unlock()
	if !up {
		if err := n.bringUp(ctx); err != nil {
			return vm.Interface{}, err
		}
	}
	i := have.i
	if !there {
		var err error
		n.mu.Lock()
		mtu := n.mtu
		n.mu.Unlock()
		if i, err = n.o.Plan.Interface(v.Lease.Slot, mtu); err != nil {
			return i, err
		}
	}
	isolated := v.Spec.NetworkGroup == ""
	if err := n.host.AddTAP(ctx, v.Lease.Slot, isolated); err != nil {
		// Somebody may have removed the bridge since it was made.
		if again := n.bringUp(ctx); again != nil {
			return vm.Interface{}, errors.Join(again, err)
		}
		if err := n.host.AddTAP(ctx, v.Lease.Slot, isolated); err != nil {
			return vm.Interface{}, err
		}
	}
	n.mu.Lock()
	n.take(v, i)
	delete(n.warm, v.Lease.Slot)
	n.mu.Unlock()
	if err := n.commit(ctx); err != nil {
		return vm.Interface{}, err
	}
	n.refill()
	if !there {
		n.tellUp()
	}
	return i, nil
}

// Apply puts the NAT and the group of a VM that runs in force.
func (n *Network) Apply(ctx context.Context, v vm.VM) error {
	_, err := n.Attach(ctx, v)
	return err
}

// Addresses are the VM's own: the host has a route to them.
func (n *Network) Addresses(v vm.VM) []netip.Addr {
	out := []netip.Addr{v.Interface.IPv4.Addr()}
	if v.Interface.IPv6.IsValid() {
		out = append(out, v.Interface.IPv6.Addr())
	}
	return out
}

func (n *Network) bringUp(ctx context.Context) error {
	n.working.Lock()
	defer n.working.Unlock()
	return n.setUp(ctx)
}

// Detach takes a VM off the bridge. Fine if it is not there.
func (n *Network) Detach(ctx context.Context, v vm.VM) error {
	ctx, cancel := context.WithTimeout(ctx, hostTime)
	defer cancel()
	n.mu.Lock()
	was, there := n.attached[v.ID]
	up := n.up
	delete(n.attached, v.ID)
	for _, a := range []netip.Addr{was.i.IPv4.Addr(), was.i.IPv6.Addr()} {
		if n.byAddr[a] == v.ID {
			delete(n.byAddr, a)
		}
	}
	n.mu.Unlock()
	if !there && !up { // nothing was made since the host booted: nothing is, for a VM that goes
		n.working.Lock()
		defer n.working.Unlock()
		return n.host.DeleteTAPs(ctx, []int{v.Lease.Slot})
	}
	if err := n.commit(ctx, v.Lease.Slot); err != nil {
		return err
	}
	n.refill()
	return nil
}

// commit has the policy set, and TAPs removed, in the next turn at the host, and waits for it.
func (n *Network) commit(ctx context.Context, remove ...int) error {
	n.mu.Lock()
	t := n.next
	if t == nil {
		t = &turn{done: make(chan struct{})}
		n.next = t
		go n.turn(t)
	}
	t.remove = append(t.remove, remove...)
	n.mu.Unlock()
	select {
	case <-t.done:
		return t.err
	case <-ctx.Done():
		return fault.Wrap(ctx.Err(), fault.CodeOf(ctx.Err()), n.o.Bridge, "the host's network was not changed in time").WithOp("network")
	}
}

// turn takes one. It is nobody's in particular, so no caller's context ends it.
func (n *Network) turn(t *turn) {
	defer close(t.done)
	n.working.Lock()
	defer n.working.Unlock()
	n.mu.Lock()
	n.next = nil // who comes from now on is too late for this one
	n.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), hostTime)
	defer cancel()
	if t.err = n.host.Policy(ctx, n.policy()); t.err == nil && len(t.remove) > 0 {
		t.err = n.host.DeleteTAPs(ctx, t.remove)
	}
}

// refill lets the pool be looked at.
func (n *Network) refill() {
	select {
	case n.poke <- struct{}{}:
	default:
	}
}

// fill keeps TAPs ready for the VMs to come, named by the slots that they will have.
func (n *Network) fill(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.poke:
		}
		if n.o.Pool == 0 {
			continue
		}
		if err := n.fillOnce(ctx, n.o.Free(n.o.Pool)); err != nil && ctx.Err() == nil {
			// Nothing is lost but time: who needs a TAP makes one, and says why it cannot.
			n.o.Log.Warn("TAP devices could not be made in advance", "err", err)
		}
	}
}

func (n *Network) fillOnce(ctx context.Context, free []int) error {
	for _, slot := range free {
		n.mu.Lock()
		skip := n.warm[slot] || !n.up || slot >= n.o.Plan.Slots() || len(n.attached) == 0
		n.mu.Unlock()
		if skip {
			continue
		}
		if err := n.host.AddTAP(ctx, slot, true); err != nil {
			return err
		}
		n.mu.Lock()
		n.warm[slot] = true
		n.mu.Unlock()
	}
	// Slots that became free below leave TAPs above that nobody will ask for soon.
	n.mu.Lock()
	var cold []int
	if len(n.warm) > 2*n.o.Pool {
		for slot := range n.warm {
			if !slices.Contains(free, slot) && !n.has(slot) {
				cold = append(cold, slot)
				delete(n.warm, slot)
			}
		}
	}
	n.mu.Unlock()
	return n.host.DeleteTAPs(ctx, cold)
}

// has says whether a VM has the slot's TAP. Called with mu locked.
func (n *Network) has(slot int) bool {
	name := n.o.Plan.TAP(slot)
	for _, a := range n.attached {
		if a.i.TAP == name {
			return true
		}
	}
	return false
}

// Check looks at what the network needs from the host.
func (n *Network) Check(ctx context.Context) []doctor.Finding {
	const title = "Network of VMs"
	if err := n.host.Check(ctx); err != nil {
		return []doctor.Finding{doctor.FromError("network", title, err, doctor.ShowLog)}
	}
	detail := n.o.Bridge + ", " + n.o.Plan.Host4().String()
	if n.o.Plan.IPv6.IsValid() {
		detail += ", " + n.o.Plan.Host6().String()
	}
	out := []doctor.Finding{{Code: "network", Severity: doctor.Pass, Title: title, Detail: detail}}
	obstacles, err := n.host.Obstacles()
	if err != nil {
		return append(out, doctor.FromError(doctor.Firewall, "Firewall of the host", err, "sudo nft list ruleset"))
	}
	for _, o := range obstacles {
		out = append(out, doctor.Finding{Code: doctor.Firewall, Severity: doctor.Warn, Title: "Firewall of the host",
			Detail: "chain " + o.Chain + " of table " + o.Table + " drops what VMs with NAT send or ask", Fix: o.Fix})
	}
	return out
}

// Close lets go of the host. Without a VM on the bridge nothing of the network is left; otherwise the VMs
// keep theirs.
func (n *Network) Close(ctx context.Context) error {
	n.stop()
	n.workers.Wait()
	defer n.host.Close()
	if n.o.Down != nil {
		n.o.Down()
	}
	n.working.Lock()
	defer n.working.Unlock()
	n.mu.Lock()
	left, up := len(n.attached), n.up
	warm := make([]int, 0, len(n.warm))
	for slot := range n.warm {
		if !n.has(slot) {
			warm = append(warm, slot)
		}
	}
	n.mu.Unlock()
	switch {
	case left > 0:
		return n.host.DeleteTAPs(ctx, warm)
	case up:
		return n.host.Remove(ctx)
	}
	return nil
}
