package helper

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/record"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/network/bridge"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Host is what the verbs act on; hostnet.Host is one.
type Host interface {
	bridge.Host
	// Present says whether anything of the installation's is there.
	Present(ctx context.Context) (bool, error)
	// Taken returns what the host uses apart from the installation's bridge.
	Taken() ([]network.Used, error)
}

// What one user may have at most. Nobody needs more, and without a bound the host's devices, routes and memory are
// anyone's to use up.
const (
	maxSlots         = 4096 // TAPs of one installation
	maxInstallations = 8
	maxAddresses     = 16     // of a bridge: the ranges that were in the settings while VMs ran on
	minBits, maxBits = 20, 29 // of an IPv4 range
)

// bridgeName is what bridges of ours may be called: names that no other program's rules, and no other program,
// have a meaning for.
var bridgeName = regexp.MustCompile(`^(banger[a-z0-9]{0,9}|bgr[0-9a-f]{6})$`)

// cached is an installation's host, and what it was last made for.
type cached struct {
	settings hostnet.Settings
	host     Host
	ready    bool // Setup was called on it
}

func refuse(subject, format string, args ...any) *fault.Error {
	return fault.New(fault.Permission, subject, format, args...).WithOp("root helper")
}

func invalid(format string, args ...any) *fault.Error {
	return fault.New(fault.Invalid, "root helper", format, args...).WithOp("root helper")
}

// checkNetwork looks at what can be said of a network without the host.
func (s *Server) checkNetwork(n wire.Network) error {
	switch {
	case !record.ID.MatchString(n.Installation):
		return invalid("%.40q is no installation's id", n.Installation)
	case !bridgeName.MatchString(n.Bridge):
		return refuse(fmt.Sprintf("%.40q", n.Bridge), "the root helper makes bridges whose names begin with banger, and go on in a-z and 0-9, alone").
			WithHint("set bridge_name = \"banger0\" in config.toml, then `banger daemon stop`")
	case n.IPv6.IsValid() && !uniqueLocal(n.IPv6):
		return invalid("%s is no unique local range of 64 bits", n.IPv6)
	}
	return s.checkRange(n.IPv4)
}

// checkRange refuses IPv4 ranges that are not among those that root gave away: whoever may choose any range
// could have this host's traffic for it.
func (s *Server) checkRange(p netip.Prefix) error {
	if !p.IsValid() || !p.Addr().Is4() || p != p.Masked() {
		return invalid("%s is no IPv4 range", p)
	}
	within := slices.ContainsFunc(s.o.Ranges, func(r netip.Prefix) bool { return r.Bits() <= p.Bits() && r.Contains(p.Addr()) })
	if !within || p.Bits() < minBits || p.Bits() > maxBits {
		return refuse(p.String(), "the root helper makes networks of %d to %d bits in %v alone", minBits, maxBits, s.o.Ranges).
			WithHint("set cidr to such a range in config.toml, then `banger daemon stop`; or have root allow it: %s --range %s", wire.InstallCommand(), p)
	}
	return nil
}

func uniqueLocal(p netip.Prefix) bool {
	return p.Addr().Is6() && p.Addr().Zone() == "" && !p.Addr().Is4In6() && p.Bits() == 64 && p == p.Masked() && p.Addr().IsPrivate()
}

// own returns the caller's record of an installation; nil if there is none. What another user has is refused.
func (s *Server) own(installation string) (*record.Record, error) {
	c, err := s.records.Get(installation)
	if err != nil || c == nil {
		return nil, err
	}
	if c.UID != s.o.UID {
		return nil, refuse(installation, "this installation's network is another user's")
	}
	return c, nil
}

// host returns the host of an installation. It is the turn's. Bridge is the recorded one: what the caller calls it now is not what is there.
func (s *Server) host(n wire.Network, bridge string) (*cached, error) {
	settings := hostnet.Settings{Plan: network.Plan{Installation: n.Installation, IPv4: n.IPv4, IPv6: n.IPv6}, Bridge: bridge, Owner: s.o.UID}
	c := s.hosts[n.Installation]
	if c != nil && c.settings == settings {
		return c, nil
	}
	if c != nil || len(s.hosts) >= maxInstallations { // as many as there are ids that a caller makes up
		s.closeHosts()
	}
	h, err := s.o.Open(settings)
	if err != nil {
		return nil, err
	}
	c = &cached{settings: settings, host: h}
	s.hosts[n.Installation] = c
	return c, nil
}

// verbs are those that do performs.
var verbs = []wire.Verb{wire.Check, wire.Setup, wire.AddTAP, wire.DeleteTAPs, wire.TAPs, wire.Policy, wire.Remove, wire.Obstacles}

// do performs a verb. One user's are one at a time, but for watching.
func (s *Server) do(ctx context.Context, r wire.Request) (wire.Answer, error) {
	var a wire.Answer
	if !slices.Contains(verbs, r.Verb) {
		return a, invalid("there is no verb %.40q", r.Verb)
	}
	if err := s.checkNetwork(r.Network); err != nil {
		return a, err
	}
	release, err := s.turn(ctx)
	if err != nil {
		return a, err
	}
	defer release()
	mine, err := s.own(r.Network.Installation)
	if err != nil {
		return a, err
	}
	switch r.Verb {
	case wire.Check:
		return a, s.check(ctx, r.Network, mine)
	case wire.Setup:
		a.MTU, err = s.setup(ctx, r.Network, r.Addresses)
		return a, err
	}
	if mine == nil { // nothing is there that this caller may see or touch
		if r.Verb == wire.AddTAP || r.Verb == wire.Policy {
			return a, fault.New(fault.Precondition, r.Network.Bridge, "there is no bridge of this installation").WithOp("root helper")
		}
		if r.Verb != wire.Obstacles {
			return a, nil
		}
		mine = &record.Record{Bridge: r.Network.Bridge}
	}
	c, err := s.host(r.Network, mine.Bridge)
	if err != nil {
		return a, err
	}
	switch r.Verb {
	case wire.AddTAP:
		return a, s.addTAP(ctx, c, mine, r)
	case wire.DeleteTAPs:
		if err := checkSlots(r.Slots); err != nil {
			return a, err
		}
		return a, c.host.DeleteTAPs(ctx, r.Slots)
	case wire.TAPs:
		a.Slots, err = c.host.TAPs(ctx)
	case wire.Policy:
		return a, s.policy(ctx, c, mine, r)
	case wire.Remove:
		// If this is not finished, there is to be no TAP before there are rules again.
		mine.Guarded = false
		if err := s.note(ctx, *mine); err != nil {
			return a, err
		}
		if err := c.host.Remove(ctx); err != nil {
			return a, err
		}
		return a, s.forget(ctx, r.Network.Installation)
	case wire.Obstacles:
		var all []hostnet.Obstacle
		all, err = c.host.Obstacles()
		for _, o := range all {
			a.Obstacles = append(a.Obstacles, wire.Obstacle(o))
		}
	}
	return a, err
}

func checkSlots(slots []int) error {
	if len(slots) > maxSlots {
		return invalid("%d slots are more than %d", len(slots), maxSlots)
	}
	for _, slot := range slots {
		if slot < 0 || slot >= maxSlots {
			return invalid("there is no slot %d: they go from 0 to %d", slot, maxSlots-1)
		}
	}
	return nil
}

// check says whether setup would work.
func (s *Server) check(ctx context.Context, n wire.Network, mine *record.Record) error {
	plan := network.Plan{IPv4: n.IPv4, IPv6: n.IPv6}
	want := record.Record{UID: s.o.UID, Installation: n.Installation, Bridge: n.Bridge, Addresses: []netip.Prefix{plan.Host4()}}
	if n.IPv6.IsValid() {
		want.Addresses = append(want.Addresses, plan.Host6())
	}
	if err := s.free(ctx, want, mine); err != nil {
		return err
	}
	c, err := s.host(n, n.Bridge)
	if err != nil {
		return err
	}
	return c.host.Check(ctx)
}

// free says whether the caller may have a network: its name, ids and ranges are nobody else's. mine is the
// record that there is.
func (s *Server) free(ctx context.Context, want record.Record, mine *record.Record) error {
	all, err := s.records.All()
	if err != nil {
		return err
	}
	count := 0
	for _, other := range all {
		if other.Installation == want.Installation {
			continue
		}
		if other.UID == s.o.UID {
			if count++; count >= maxInstallations {
				return fault.New(fault.Exhausted, "root helper", "user %d has %d networks already", s.o.UID, count).WithOp("root helper").
					WithHint("stop the VMs of another installation, and its daemon")
			}
		}
	}
	if mine != nil && mine.Bridge != want.Bridge {
		return fault.New(fault.Precondition, want.Bridge, "this installation's VMs are on the bridge %s", mine.Bridge).WithOp("root helper").
			WithHint("stop all VMs, then `banger daemon stop`, before bridge_name is changed")
	}
	h, err := s.o.Open(hostnet.Settings{Plan: network.Plan{Installation: want.Installation}, Bridge: want.Bridge, Owner: s.o.UID})
	if err != nil {
		return err
	}
	defer h.Close()
	if mine == nil {
		// root's daemons keep no records here: what is there and on none is root's.
		switch present, err := h.Present(ctx); {
		case err != nil:
			return err
		case present:
			return refuse(want.Installation, "this installation's network was made by root, without the helper")
		}
	}
	used, err := h.Taken()
	if err != nil {
		return err
	}
	for _, other := range all {
		if other.Installation == want.Installation {
			continue
		}
		for _, a := range other.Addresses { // whose bridge may not be there yet
			used = append(used, network.Used{Range: a.Masked(), By: other.Bridge})
		}
	}
	for _, other := range all {
		if other.Installation != want.Installation {
			if err := apart(want, other, used); err != nil {
				return err
			}
		}
	}
	for _, a := range want.Addresses {
		plan := network.Plan{IPv4: a.Masked()}
		if a.Addr().Is6() {
			plan = network.Plan{IPv6: a.Masked()}
		}
		if err := network.Conflict(plan, used); err != nil {
			return err
		}
	}
	return nil
}

// apart says whether two networks can be on one host, apart from their ranges. used is what the host uses: who has to choose another
// name is told of a range, too, if that is taken as well.
func apart(want, other record.Record, used []network.Used) error {
	taken := func(subject, what string) *fault.Error {
		return fault.New(fault.Exists, subject, "another installation of banger on this host has this %s", what).WithOp("root helper")
	}
	mine, theirs := network.Plan{Installation: want.Installation}, network.Plan{Installation: other.Installation}
	if mine.TAPPrefix() == theirs.TAPPrefix() {
		return taken(want.Installation, "id, or one that begins likewise").WithHint("use another state directory: BANGER_STATE_DIR")
	}
	if want.Bridge == other.Bridge {
		set := fmt.Sprintf("bridge_name = \"bgr%.6s\"", want.Installation)
		if p := want.Addresses[0].Masked(); p.Addr().Is4() && network.Conflict(network.Plan{IPv4: p}, used) != nil {
			if free := network.Free(p.Bits(), used); free.IsValid() {
				set += fmt.Sprintf(" and cidr = \"%s\"", free)
			}
		}
		return taken(want.Bridge, "name of a bridge").WithHint("choose others in config.toml, as %s, then `banger daemon stop`", set)
	}
	return nil
}

// setup has the bridge made. It looks at the records itself, for no other helper may change them meanwhile.
func (s *Server) setup(ctx context.Context, n wire.Network, addresses []netip.Prefix) (mtu int, err error) {
	if len(addresses) == 0 || len(addresses) > maxAddresses {
		return 0, invalid("a bridge has 1 to %d addresses, not %d", maxAddresses, len(addresses))
	}
	for _, a := range addresses {
		if !a.IsValid() || a.Addr() != a.Masked().Addr().Next() {
			return 0, invalid("%s is not the first address of a range", a)
		}
		if a.Addr().Is6() {
			if !uniqueLocal(a.Masked()) {
				return 0, invalid("%s is in no unique local range of 64 bits", a)
			}
		} else if err := s.checkRange(a.Masked()); err != nil {
			return 0, err
		}
	}
	release, err := s.records.Lock(ctx)
	if err != nil {
		return 0, err
	}
	defer release()
	mine, err := s.own(n.Installation)
	if err != nil {
		return 0, err
	}
	want := record.Record{UID: s.o.UID, Installation: n.Installation, Bridge: n.Bridge, Addresses: addresses, Guarded: mine != nil && mine.Guarded}
	if mine == nil || !slices.Equal(mine.Addresses, addresses) || mine.Bridge != n.Bridge {
		if err := s.free(ctx, want, mine); err != nil {
			return 0, err
		}
		if err := s.records.Put(want); err != nil {
			return 0, err
		}
	}
	c, err := s.host(n, n.Bridge)
	if err != nil {
		return 0, err
	}
	mtu, err = c.host.Setup(ctx, addresses)
	if err == nil && !want.Guarded {
		// A TAP of which there are no rules would let its owner send as anybody.
		if err = c.host.Policy(ctx, s.policyOf(n, want.Bridge, hostsOf(addresses), nil)); err == nil {
			want.Guarded = true
			err = s.records.Put(want)
		}
	}
	if err != nil {
		// What was refused before anything was made is nobody's.
		if present, lookErr := c.host.Present(ctx); mine == nil && lookErr == nil && !present {
			err = errors.Join(err, s.records.Drop(n.Installation))
		}
		return 0, err
	}
	c.ready = true
	return mtu, nil
}

func hostsOf(addresses []netip.Prefix) []netip.Addr {
	out := make([]netip.Addr, len(addresses))
	for i, a := range addresses {
		out[i] = a.Addr()
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

func (s *Server) addTAP(ctx context.Context, c *cached, mine *record.Record, r wire.Request) error {
	if len(r.Slots) != 1 {
		return invalid("one slot at a time, not %d", len(r.Slots))
	}
	if err := checkSlots(r.Slots); err != nil {
		return err
	}
	if !mine.Guarded {
		return fault.New(fault.Precondition, mine.Bridge, "the bridge has no rules yet").WithOp("root helper")
	}
	if !c.ready { // this process has not seen the bridge
		if _, err := c.host.Setup(ctx, mine.Addresses); err != nil {
			return err
		}
		c.ready = true
	}
	return c.host.AddTAP(ctx, r.Slots[0], r.Isolated)
}

func (s *Server) policyOf(n wire.Network, bridge string, hosts []netip.Addr, guests []network.Guest) network.Policy {
	plan := network.Plan{Installation: n.Installation}
	return network.Policy{Installation: n.Installation, Bridge: bridge, TAPPrefix: plan.TAPPrefix(), Hosts: hosts, Guests: guests}
}

// policy lets guests have addresses of the recorded ranges alone, each its own.
func (s *Server) policy(ctx context.Context, c *cached, mine *record.Record, r wire.Request) error {
	if len(r.Guests) > maxSlots || len(r.Hosts) > maxAddresses || len(r.HostPorts) > network.MaxHostPorts {
		return invalid("%d guests, %d addresses and %d ports are more than %d, %d and %d", len(r.Guests), len(r.Hosts), len(r.HostPorts), maxSlots, maxAddresses, network.MaxHostPorts)
	}
	if slices.Contains(r.HostPorts, 0) {
		return invalid("0 is no port")
	}
	addresses := hostsOf(mine.Addresses)
	for _, h := range r.Hosts {
		if !slices.Contains(addresses, h) {
			return invalid("%s is not the bridge's", h)
		}
	}
	plan := network.Plan{Installation: r.Network.Installation}
	slots, taken := map[int]bool{}, map[netip.Addr]bool{}
	for _, a := range addresses {
		taken[a] = true
	}
	guests := make([]network.Guest, 0, len(r.Guests))
	for _, g := range r.Guests {
		if err := checkSlots([]int{g.Slot}); err != nil {
			return err
		}
		if slots[g.Slot] {
			return invalid("slot %d is there twice", g.Slot)
		}
		slots[g.Slot] = true
		if !g.IPv4.Is4() || g.IPv6.IsValid() && (!g.IPv6.Is6() || g.IPv6.Is4In6() || g.IPv6.Zone() != "") {
			return invalid("slot %d has no address, or not one of each family", g.Slot)
		}
		for _, a := range []netip.Addr{g.IPv4, g.IPv6} {
			if !a.IsValid() {
				continue
			}
			if !slices.ContainsFunc(mine.Addresses, func(p netip.Prefix) bool { return p.Contains(a) }) || taken[a] {
				return invalid("%s is outside of the bridge's ranges, or has another use", a)
			}
			taken[a] = true
		}
		if err := vm.ValidateNetworkGroup(g.Group); g.Group != "" && err != nil {
			return err
		}
		guests = append(guests, network.Guest{TAP: plan.TAP(g.Slot), MAC: plan.MAC(g.Slot).String(), IPv4: g.IPv4, IPv6: g.IPv6, NAT: g.NAT, Group: g.Group})
	}
	hosts := slices.Clone(r.Hosts)
	slices.SortFunc(hosts, netip.Addr.Compare)
	p := s.policyOf(r.Network, mine.Bridge, slices.Compact(hosts), guests)
	p.HostPorts = r.HostPorts
	return c.host.Policy(ctx, p)
}

func (s *Server) note(ctx context.Context, r record.Record) error {
	release, err := s.records.Lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	return s.records.Put(r)
}

func (s *Server) forget(ctx context.Context, installation string) error {
	release, err := s.records.Lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	return s.records.Drop(installation)
}

// watch is asked for outside of turns: it lasts.
func (s *Server) watch(ctx context.Context, r wire.Request, changed func()) error {
	if err := s.checkNetwork(r.Network); err != nil {
		return err
	}
	h, err := s.o.Open(hostnet.Settings{Plan: network.Plan{Installation: r.Network.Installation}, Bridge: r.Network.Bridge, Owner: s.o.UID})
	if err != nil {
		return err
	}
	defer h.Close()
	return h.Watch(ctx, changed)
}
