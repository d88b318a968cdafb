package main

import (
	"net/netip"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/network/bridge"
	"git.thaloco.com/thaloco/banger/internal/network/usernet"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// networks says which networks VMs may be on, by the setting network, by what the VMM can do and by who runs the daemon, and why
// there is none though one was asked for. The first is for VMs that start; VMs that were started on another are taken off it.
func networks(p config.Paths, c config.Config, d vmm.Driver, uid int) (open func(sandbox.NetworkHost) []sandbox.Network, notice string) {
	switch {
	case c.Network == config.NetworkNone:
		return nil, ""
	case c.Network == config.NetworkBridge && uid != 0:
		return nil, "none: the daemon is not root, and a bridge takes root"
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
		all := []sandbox.Network{usernet.NewAttacher(usernet.Options{
			Dir: p.Networks(), Plan: plan, Ports: c.PublishedPorts, RunDir: h.RunDir, Confine: h.Confine,
			Tunnel: d.Features().NICVsock, Key: func(v vm.VM) []byte { return boot.TunnelKey(v.Secrets.Agent) }, Log: h.Log,
		})}
		if c.Network == config.NetworkBridge {
			host, err := hostnet.Open(hostnet.Settings{Plan: plan, Bridge: c.BridgeName, Owner: uid})
			if err != nil { // no netlink at all: whatever VMs start on says it again
				h.Log.Error("the bridge network cannot be used", "err", err)
				return nil
			}
			options := bridge.Options{Plan: plan, Bridge: c.BridgeName, Pool: c.TapPoolSize, Free: h.FreeSlots, Log: h.Log}
			all = append([]sandbox.Network{bridge.New(host, options)}, all...)
		}
		return all
	}, ""
}
