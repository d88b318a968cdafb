package main

import (
	"context"
	"net/netip"
	"time"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/helper"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/network/bridge"
	"git.thaloco.com/thaloco/banger/internal/network/usernet"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// lookTime bounds the question whether the host can have a bridge network, some requests to the kernel.
const lookTime = 10 * time.Second

// networks makes the networks that VMs may be on, by the setting network, by what the VMM can do and by who runs the daemon. The
// first is for VMs that start; VMs that were started on another are taken off it.
//
// Of itself root gets the bridge, and so does who may use the root helper, unless something on the host is in its way: then the
// user network, as everybody else, with a notice. A bridge that was asked for by name is not replaced by anything: VMs do not start, and say why.
func networks(p config.Paths, c config.Config, d vmm.Driver, uid int, root rootHelper) func(sandbox.NetworkHost) []sandbox.Network {
	return func(h sandbox.NetworkHost) []sandbox.Network {
		if c.Network == config.NetworkNone {
			return nil
		}
		plan := network.Plan{Installation: h.Installation, IPv4: c.CIDR}
		switch c.IPv6CIDR {
		case config.IPv6None:
		case config.IPv6Auto:
			plan.IPv6 = network.UniqueLocal(h.Installation)
		default:
			plan.IPv6 = netip.MustParsePrefix(c.IPv6CIDR) // as the setting was checked to be
		}
		user := usernet.NewAttacher(usernet.Options{
			Dir: p.Networks(), Plan: plan, Ports: c.PublishedPorts, RunDir: h.RunDir, Confine: h.Confine,
			Tunnel: d.Features().NICVsock, Key: func(v vm.VM) []byte { return boot.TunnelKey(v.Secrets.Agent) }, Log: h.Log,
		})
		auto := c.Network == config.NetworkAuto
		switch {
		case c.Network == config.NetworkBridge && uid != 0 && !root.installed():
			h.Notice("none: the daemon is not root, and a bridge takes root or its helper", doctor.FixOf(root.err, doctor.ShowLog)+"; or set network = \"user\" in config.toml, which takes no privilege; then banger daemon stop")
			return nil
		case c.Network == config.NetworkBridge, auto && (uid == 0 || root.usable()):
			b, err := openBridge(plan, c, h, uid, root, auto)
			switch {
			case err == nil:
				return []sandbox.Network{root.advise(b), user}
			case !auto: // no netlink at all
				h.Notice("none: "+err.Error(), doctor.FixOf(err, doctor.ShowLog))
				return nil
			}
			h.Notice("the user network, since the bridge network cannot be used: "+err.Error(), doctor.FixOf(err, doctor.ShowLog))
		}
		return []sandbox.Network{root.advise(user)}
	}
}

// openBridge makes the bridge network; with check, only if the host can have it now.
func openBridge(plan network.Plan, c config.Config, h sandbox.NetworkHost, uid int, root rootHelper, check bool) (*bridge.Network, error) {
	link := sandbox.Link{Name: c.BridgeName}
	var host bridge.Host
	if uid == 0 {
		h, err := hostnet.Open(hostnet.Settings{Plan: plan, Bridge: c.BridgeName, Owner: uid})
		if err != nil {
			return nil, err
		}
		host = h
	} else {
		client := helper.NewClient(root.socket, plan, c.BridgeName)
		host, link.Listen, link.Keep = client, client.ListenDNS, client.KeepNames
	}
	if check {
		ctx, cancel := context.WithTimeout(context.Background(), lookTime)
		defer cancel()
		if err := host.Check(ctx); err != nil {
			host.Close()
			return nil, err
		}
	}
	var b *bridge.Network
	b = bridge.New(host, bridge.Options{
		Plan: plan, Bridge: c.BridgeName, Pool: c.TapPoolSize, HostPorts: c.HostPorts, Free: h.FreeSlots, Log: h.Log,
		Up: func(addresses []netip.Addr) {
			up := link
			up.Addresses, up.Guest = addresses, b.Guest
			h.LinkUp(up)
		},
		Down: h.LinkDown,
	})
	return b, nil
}
