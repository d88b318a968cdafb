package main

import (
	"net/netip"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/network/usernet"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// networks says which networks VMs may be on, by the setting network and by what the VMM can do, and why there is none
// though one was asked for.
func networks(p config.Paths, c config.Config, d vmm.Driver) (open func(sandbox.NetworkHost) []sandbox.Network, notice string) {
	switch {
	case c.Network == config.NetworkNone:
		return nil, ""
	case !d.Features().NICSockets:
		return nil, "none: " + d.Name() + " attaches a network only with root's help, which is not there yet; vm ssh works without one"
	}
	return func(h sandbox.NetworkHost) []sandbox.Network {
		plan := network.Plan{Installation: h.Installation, IPv4: c.CIDR}
		switch c.IPv6CIDR {
		case config.IPv6None:
		case config.IPv6Auto:
			plan.IPv6 = network.UniqueLocal(h.Installation)
		default:
			plan.IPv6 = netip.MustParsePrefix(c.IPv6CIDR) // as the setting was checked to be
		}
		return []sandbox.Network{usernet.NewAttacher(usernet.Options{
			Dir: p.Networks(), Plan: plan, Ports: c.PublishedPorts, RunDir: h.RunDir, Confine: h.Confine,
		})}
	}, ""
}
