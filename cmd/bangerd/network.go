package main

import (
	"net/netip"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/network/bridge"
	"git.thaloco.com/thaloco/banger/internal/network/usernet"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// networks says which networks VMs may be on, by the setting network, by what the VMM can do and by who runs the daemon, and why
// there is none though one was asked for, and what to do. The first is for VMs that start; VMs that were started on another are taken off it.
func networks(p config.Paths, c config.Config, d vmm.Driver, uid int, root rootHelper) (open func(sandbox.NetworkHost) []sandbox.Network, notice, fix string) {
	sockets := d.Features().NICSockets
	onBridge := c.Network == config.NetworkBridge || c.Network == config.NetworkAuto && root.usable()
	switch {
	case c.Network == config.NetworkNone:
		return nil, "", ""
	case c.Network == config.NetworkBridge && uid != 0 && !root.installed():
		return nil, "none: a bridge takes root, or its helper", fault.HintOf(root.err)
	case onBridge:
	case !sockets && uid == 0:
		return nil, "none: " + d.Name() + " has no user network", "set network = \"bridge\" in config.toml, then banger daemon stop"
	case !sockets:
		return nil, "none: " + d.Name() + " attaches a network only with root's help; vm ssh works without one", fault.HintOf(root.err)
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
		})}
		if onBridge {
			host, err := bridgeHost(plan, c.BridgeName, uid, root)
			if err != nil { // no netlink at all: whatever VMs start on says it again
				h.Log.Error("the bridge network cannot be used", "err", err)
				return nil
			}
			options := bridge.Options{Plan: plan, Bridge: c.BridgeName, Pool: c.TapPoolSize, Free: h.FreeSlots, Log: h.Log}
			all = append([]sandbox.Network{bridge.New(host, options)}, all...)
		}
		if uid != 0 {
			all[0] = advised{all[0], root}
		}
		return all
	}, "", ""
}

// bridgeHost is the host of the bridge network: in this process where it is root, else behind the root helper.
func bridgeHost(plan network.Plan, name string, uid int, root rootHelper) (bridge.Host, error) {
	if uid != 0 {
		return helper.NewClient(root.socket, plan, name), nil
	}
	return hostnet.Open(hostnet.Settings{Plan: plan, Bridge: name, Owner: uid})
}
