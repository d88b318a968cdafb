package sandbox

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"git.thaloco.com/thaloco/banger/internal/cgroup"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/network/usernet"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// Network is a kind of network that VMs can be on. Each call can be repeated, and finds what a crash left by
// the VM's id and lease alone.
type Network interface {
	// Kind is one of vm's kinds of network.
	Kind() string
	// Restore takes in what a former daemon left, given the VMs that may still be on the network, some of which may run, and
	// removes what belongs to none of them. It comes before everything else, and disturbs no VM that runs.
	Restore(ctx context.Context, attached []vm.VM) error
	// Attach puts a VM that does not run yet on the network, and tells what its interface has. Its run directory
	// is there. fault.Exhausted if there is no address for it.
	Attach(ctx context.Context, v vm.VM) (vm.Interface, error)
	// Apply puts the network's part of the VM's spec in force while it runs.
	Apply(ctx context.Context, v vm.VM) error
	// Detach takes a VM off. Fine if it is not on.
	Detach(ctx context.Context, v vm.VM) error
	// Addresses are those by which the host reaches a VM that is on the network.
	Addresses(v vm.VM) []netip.Addr
	// Check looks at what the network needs from the host.
	Check(ctx context.Context) []doctor.Finding
	// Close lets go of the host. VMs keep their network.
	Close(ctx context.Context) error
}

// NetworkHost is what a Network may need to know of the installation that it serves.
type NetworkHost struct {
	Installation string
	RunDir       func(vm.ID) string
	// FreeSlots are those of the leases that the next n VMs will get.
	FreeSlots func(n int) []int
	Log       *slog.Logger
	// Notice is called, at most once and while networks are made, if VMs are on another network than would be best, or on none. It
	// says why, and what to do about it.
	Notice func(why, fix string)
	// LinkUp is to be called when a link of the host with addresses that guests know has come or has changed, and LinkDown
	// before it goes: names are answered there.
	LinkUp   func(Link)
	LinkDown func()
	// Confine puts a program that serves a VM's network into a control group of its own.
	Confine func(v vm.VM) process.Cgroup
}

func (s *Service) networkHost() NetworkHost {
	return NetworkHost{Installation: s.store.InstallationID(), RunDir: s.runDir, FreeSlots: s.store.FreeSlots, Log: s.log,
		Notice: func(why, fix string) {
			s.networkNotice = &doctor.Finding{Code: "network", Severity: doctor.Warn, Title: "Network of VMs", Detail: why, Fix: fix}
		},
		LinkUp: s.links.up, LinkDown: s.links.down, Confine: func(v vm.VM) process.Cgroup {
			return func(ctx context.Context) func(context.Context, int) {
				return s.cgroups.Begin(ctx, networkGroup(v.ID), "network of banger VM "+v.Name, networkLimits)
			}
		}}
}

// networkLimits hold what serves one VM's network: a guest chooses how much it has to do.
var networkLimits = cgroup.Limits{Memory: 1 << 30, CPUs: 2, Tasks: 256}

// networkGroup names the control group of what serves a VM's network; the VMM's is named by the short id alone.
func networkGroup(id vm.ID) string { return id.Short() + "n" }

// restoreNetworks hands the networks the VMs that may still be on them, before anything is done to any.
func (s *Service) restoreNetworks(ctx context.Context, rebooted bool) {
	for _, n := range s.networks {
		var attached []vm.VM
		for _, v := range s.store.VMs() {
			if rebooted { // a host that was booted has nothing of what there was
				break
			}
			steps, err := s.store.Steps(ctx, v.ID)
			// One that was being attached has no record of it yet: whatever it has must not be taken for another's. One that was
			// ready without an interface is on none.
			state := steps[stepNetwork]
			if err != nil || state != "" && (v.Interface != nil && v.Interface.Kind == n.Kind() || v.Interface == nil && state != lifecycle.Ready) {
				attached = append(attached, v)
			}
		}
		if err := n.Restore(ctx, attached); err != nil { // VMs that run are no worse off than before
			s.warn(doctor.FixOf(err, "banger daemon restart"), "what is left of the %s network could not be taken in: %v", n.Kind(), err)
			s.log.Error("what is left of a network could not be taken in", "network", n.Kind(), "err", err)
		}
	}
}

// lookAtFirewall looks for what of the host's own rules is in the way of a VM that is given NAT. It reads all of them, so it goes on
// beside what the caller does; tell waits for it, and says what it found and what to type.
func (s *Service) lookAtFirewall(ctx context.Context, to vm.Spec) (tell func(*operation.Handle)) {
	if len(s.networks) == 0 || !to.NAT {
		return func(*operation.Handle) {}
	}
	found := make(chan []doctor.Finding, 1)
	go func() { found <- s.networks[0].Check(ctx) }()
	return func(h *operation.Handle) {
		for _, f := range <-found {
			if f.Code == doctor.Firewall && f.Severity != doctor.Pass {
				h.Notice("firewall: " + f.Detail + "; it does not with: " + f.Fix)
			}
		}
	}
}

// networkCapability owns a VM's place on the network.
type networkCapability struct{ service *Service }

func (c *networkCapability) Name() string { return stepNetwork }

// of is the network that a VM was put on, nil if on none or on one that this daemon does not know.
func (c *networkCapability) of(v *vm.VM) Network {
	if v.Interface == nil {
		return nil
	}
	for _, n := range c.service.networks {
		if n.Kind() == v.Interface.Kind {
			return n
		}
	}
	return nil
}

// Prepare puts the VM on the first network.
func (c *networkCapability) Prepare(ctx context.Context, v *vm.VM) error {
	s := c.service
	v.Interface = nil
	if len(s.networks) == 0 {
		return nil
	}
	if err := os.MkdirAll(s.runDir(v.ID), 0o700); err != nil {
		return fault.Wrap(err, fault.Internal, s.runDir(v.ID), "the run directory cannot be made")
	}
	i, err := s.networks[0].Attach(ctx, *v)
	if err != nil {
		return err
	}
	v.Interface = &i
	return nil
}

// Observe puts in force what may have been asked for while no daemon was there. A VM that runs is not ended because its
// network is broken; for one that does not, it is made anew.
func (c *networkCapability) Observe(ctx context.Context, v *vm.VM) (bool, error) {
	n := c.of(v)
	if n == nil {
		return true, nil
	}
	err := n.Apply(ctx, *v)
	if err == nil {
		return true, nil
	}
	runs, lookErr := c.service.machines.observe(ctx, v)
	if lookErr != nil {
		return false, lookErr
	}
	if runs {
		c.service.warn("banger vm restart "+v.Name, "the network of %s does not answer; `banger vm restart %s` makes it anew", v.Name, v.Name)
		c.service.log.Error("a VM's network does not answer", "vm", v.ID, "err", err)
	}
	return runs, nil
}

// ApplySettings puts NAT in force. A VM on no network has nothing to say about it.
func (c *networkCapability) ApplySettings(ctx context.Context, v *vm.VM) error {
	if n := c.of(v); n != nil {
		return n.Apply(ctx, *v)
	}
	return nil
}

// reached says of what listens in a VM that runs whether the host reaches it by one of the VM's addresses: what is bound to all of
// the guest's addresses or to its own, if the network brings that port to the host. nil if the VM has no address.
func (c *networkCapability) reached(ctx context.Context, v *vm.VM) func(*Port) bool {
	n := c.of(v)
	if n == nil || len(n.Addresses(*v)) == 0 {
		return nil
	}
	p, some := n.(Publisher)
	var published []uint16
	if some {
		var err error
		if published, err = p.Published(ctx, *v); err != nil { // then it brings none
			published = nil
			c.service.log.Warn("a VM's network does not say which ports are published", "vm", v.ID, "err", err)
		}
	}
	return func(p *Port) bool {
		if some && (p.Protocol != "tcp" || !slices.Contains(published, uint16(p.Port))) {
			return false
		}
		a, err := netip.ParseAddr(p.Address)
		return err == nil && (a.IsUnspecified() || a == v.Interface.IPv4.Addr() || a == v.Interface.IPv6.Addr())
	}
}

// Cleanup takes the VM off whatever network it may be on: what a crash left is on no record.
func (c *networkCapability) Cleanup(ctx context.Context, v *vm.VM, _ lifecycle.How) error {
	for _, n := range c.service.networks {
		if err := n.Detach(ctx, *v); err != nil {
			return err
		}
	}
	if err := c.service.cgroups.Remove(ctx, networkGroup(v.ID)); err != nil {
		return err
	}
	// The VMM's step removes it after a VMM ran; this one may have made it for one that never did.
	if err := os.RemoveAll(c.service.runDir(v.ID)); err != nil {
		return fault.Wrap(err, fault.Internal, c.service.runDir(v.ID), "the run directory cannot be removed")
	}
	return nil
}

// Check asks the network that VMs are put on.
func (c *networkCapability) Check(ctx context.Context) []doctor.Finding {
	s := c.service
	if len(s.networks) > 0 {
		out := s.networks[0].Check(ctx)
		if s.networkNotice != nil {
			out = append(out, *s.networkNotice)
		}
		return out
	}
	f := doctor.Finding{Code: "network", Severity: doctor.Pass, Title: "Network of VMs", Detail: "none; vm ssh works without one"}
	if s.networkNotice != nil {
		f = *s.networkNotice
	}
	return []doctor.Finding{f}
}

// GuestConfig is the interface as the guest is to configure it.
func (c *networkCapability) GuestConfig(v *vm.VM, config *boot.Config) error {
	i := v.Interface
	if i == nil {
		return nil
	}
	n := &boot.Network{MAC: i.MAC, MTU: i.MTU, Addresses: []netip.Prefix{i.IPv4}, DNS: []netip.Addr{i.Gateway4},
		Routes: []boot.Route{{To: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Via: i.Gateway4}}}
	if i.IPv6.IsValid() {
		n.Addresses = append(n.Addresses, i.IPv6)
		n.Routes = append(n.Routes, boot.Route{To: netip.PrefixFrom(netip.IPv6Unspecified(), 0), Via: i.Gateway6})
	}
	if i.Tunnel {
		n.Tunnel = vmm.NICPort
	}
	config.Network = n
	return nil
}

// Machine attaches the interface.
func (c *networkCapability) Machine(_ context.Context, v *vm.VM, spec *vmm.Spec) error {
	i := v.Interface
	if i == nil {
		return nil
	}
	n := vmm.NIC{MAC: i.MAC, MTU: i.MTU, TAP: i.TAP}
	if i.Kind == vm.UserNetwork {
		n.Socket = filepath.Join(spec.RunDir, usernet.Socket)
	}
	spec.NICs = append(spec.NICs, n)
	return nil
}
