package usernet

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"

	"git.thaloco.com/thaloco/banger/internal/dns"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Socket is the name of the socket for a VM's VMM, in the VM's run directory.
const Socket = "net.sock"

// Options say where VMs' networks are.
type Options struct {
	Dir    string       // for programs' files; made when it is needed
	Plan   network.Plan // addresses; on a network of its own each guest could have the same, but people compare them
	Ports  []uint16     // published of each VM; nil: those that its guest listens on, of which Publish is told
	RunDir func(vm.ID) string
	// Confine puts the program of a VM into a control group of its own; nil: the daemon's.
	Confine func(v vm.VM) process.Cgroup
	// Tunnel: VMs that start reach their network by the agent in them, which connects to the socket and shows Key. Their
	// programs are started again when they end.
	Tunnel bool
	Key    func(v vm.VM) []byte
	Log    *slog.Logger
}

// Attacher puts VMs on the user network, each on one of its own. Safe for concurrent use, with one call a VM
// at a time.
type Attacher struct {
	o      Options
	host   *Host
	keeper keeper

	mu    sync.Mutex
	ports map[vm.ID][]uint16 // that Publish was told of last
}

// NewAttacher returns the user network of an installation.
func NewAttacher(o Options) *Attacher {
	a := &Attacher{o: o, host: NewHost(o.Dir, o.Plan.Installation), ports: map[vm.ID][]uint16{}}
	a.keeper = keeper{host: a.host, start: a.start, log: o.Log, kept: map[vm.ID]*kept{}}
	return a
}

// Kind is vm.UserNetwork.
func (a *Attacher) Kind() string { return vm.UserNetwork }

// Restore ends the programs of VMs that are not in the database. Those of VMs that are go on.
func (a *Attacher) Restore(ctx context.Context, vms []vm.VM) error {
	known := make(map[string]bool, len(vms))
	for _, v := range vms {
		known[string(v.ID)] = true
	}
	_, err := a.host.Sweep(ctx, func(id string) bool { return known[id] })
	return err
}

// Attach makes the VM's network, or changes how it is if it is there, and tells what its interface has. It takes the socket
// for the VMM with it: its run directory must be there. fault.Exhausted if the plan has no address for it.
func (a *Attacher) Attach(ctx context.Context, v vm.VM) (vm.Interface, error) {
	i, err := a.o.Plan.Interface(v.Lease.Slot, MTU)
	if err != nil {
		return vm.Interface{}, err
	}
	i.Kind, i.TAP, i.Tunnel = vm.UserNetwork, "", a.o.Tunnel
	v.Interface = &i
	a.keeper.forget(v.ID)
	a.forgetPorts(v.ID)
	if err := a.start(ctx, v); err != nil {
		return i, err
	}
	if i.Tunnel {
		a.keeper.keep(v)
	}
	return i, nil
}

// start starts the program of a VM whose interface is known.
func (a *Attacher) start(ctx context.Context, v vm.VM) error {
	i := v.Interface
	mac := a.o.Plan.MAC(v.Lease.Slot)
	mac[0] ^= 4 // another one, of the same kind
	c := Config{Name: v.Name, MAC: mac.String(), Guest4: i.IPv4, Gateway4: i.Gateway4, Guest6: i.IPv6, Gateway6: i.Gateway6, MTU: i.MTU,
		Publish: PublishAddr(a.o.Plan.Installation, v.Lease.Slot)}
	if i.Tunnel {
		hash := sha256.Sum256(a.o.Key(v))
		c.KeyHash = hex.EncodeToString(hash[:])
	}
	s := Settings{NAT: v.Spec.NAT, Ports: a.o.Ports}
	if a.Publishes() {
		a.mu.Lock()
		s.Ports = a.ports[v.ID]
		a.mu.Unlock()
	}
	var cgroup process.Cgroup
	if a.o.Confine != nil {
		cgroup = a.o.Confine(v)
	}
	return a.host.Start(ctx, string(v.ID), filepath.Join(a.o.RunDir(v.ID), Socket), c, s, cgroup)
}

// Apply changes the settings of a VM that runs. A program that has ended is started again where the VM's agent connects to it;
// fault.Unavailable otherwise: nothing but a start of the VM brings another one, since QEMU does not connect again.
func (a *Attacher) Apply(ctx context.Context, v vm.VM) error {
	if v.Interface != nil && v.Interface.Tunnel {
		if err := a.keeper.revive(ctx, v); err != nil {
			return err
		}
	}
	_, err := a.host.Set(ctx, string(v.ID), Settings{NAT: v.Spec.NAT, Ports: a.o.Ports})
	return err
}

// Publishes says whether ports are published as guests listen on them, of which Publish has to be told then.
func (a *Attacher) Publishes() bool { return a.o.Ports == nil }

// Publish publishes what the guest of a VM listens on now, and nothing else. A program that does not run is started with them if it is
// started again: fault.Unavailable. It may be called while other calls for the VM are under way.
func (a *Attacher) Publish(ctx context.Context, v vm.VM, ports []uint16) error {
	a.mu.Lock()
	a.ports[v.ID] = ports
	a.mu.Unlock()
	_, err := a.host.Publish(ctx, string(v.ID), ports)
	return err
}

// Published are the ports that the host has of a VM now. fault.Unavailable if its program does not answer.
func (a *Attacher) Published(ctx context.Context, v vm.VM) ([]uint16, error) {
	s, err := a.host.Status(ctx, string(v.ID))
	return s.Ports, err
}

func (a *Attacher) forgetPorts(id vm.ID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.ports, id)
}

// Detach takes the VM's network away. Fine if there is none.
func (a *Attacher) Detach(ctx context.Context, v vm.VM) error {
	a.keeper.forget(v.ID)
	a.forgetPorts(v.ID)
	return a.host.Stop(ctx, string(v.ID))
}

// Addresses are those by which the host reaches the VM.
func (a *Attacher) Addresses(v vm.VM) []netip.Addr {
	return []netip.Addr{PublishAddr(a.o.Plan.Installation, v.Lease.Slot)}
}

// Check looks at what the network needs from the host.
func (a *Attacher) Check(context.Context) []doctor.Finding {
	f := doctor.Finding{Code: "network", Severity: doctor.Pass, Title: "Network of VMs",
		Detail: "without privilege: out through the daemon's user, in by " + loopbackOf(a.o.Plan.Installation).String()}
	if _, err := dns.HostResolvers(); err != nil {
		f = doctor.FromError("network", f.Title, fault.Wrap(err, fault.Unavailable, "/etc/resolv.conf", "guests would resolve no names"),
			"see it: cat /etc/resolv.conf")
	}
	return []doctor.Finding{f}
}

// Close lets go of the programs, which run on.
func (a *Attacher) Close(context.Context) error {
	a.keeper.close()
	return nil
}
