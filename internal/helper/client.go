package helper

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/network"
)

// Client has the helper perform the verbs of bridge.Host, whose contract it keeps. Each call is a connection of its own, so
// that nothing is held open between them and a helper that was restarted is not noticed. Safe for concurrent use.
type Client struct {
	socket string
	plan   network.Plan
	bridge string
}

// NewClient returns a Client that speaks to the helper at a socket. It does not connect.
func NewClient(socket string, plan network.Plan, bridge string) *Client {
	return &Client{socket: socket, plan: plan, bridge: bridge}
}

func (c *Client) request(verb wire.Verb) wire.Request {
	return wire.Request{Verb: verb, Network: wire.Network{Installation: c.plan.Installation, Bridge: c.bridge, IPv4: c.plan.IPv4, IPv6: c.plan.IPv6}}
}

// Check says whether Setup would work, and whether this user can open TAPs.
func (c *Client) Check(ctx context.Context) error {
	if _, err := wire.Call(ctx, c.socket, c.request(wire.Check)); err != nil {
		return err
	}
	const device = "/dev/net/tun"
	if err := unix.Access(device, unix.R_OK|unix.W_OK); err != nil {
		return fault.Wrap(&os.PathError{Op: "open", Path: device, Err: err}, fault.Permission, device, "VMs are attached to their TAP devices by it, and this user may not use it").
			WithOp("host network").WithHint("sudo modprobe tun && sudo chmod 0666 %s", device)
	}
	return nil
}

// Setup makes the bridge, or repairs it.
func (c *Client) Setup(ctx context.Context, addresses []netip.Prefix) (mtu int, err error) {
	r := c.request(wire.Setup)
	r.Addresses = addresses
	a, err := wire.Call(ctx, c.socket, r)
	return a.MTU, err
}

// AddTAP makes the TAP of a slot, or repairs it. It is this user's.
func (c *Client) AddTAP(ctx context.Context, slot int, isolated bool) error {
	r := c.request(wire.AddTAP)
	r.Slots, r.Isolated = []int{slot}, isolated
	_, err := wire.Call(ctx, c.socket, r)
	return err
}

// DeleteTAPs removes TAPs.
func (c *Client) DeleteTAPs(ctx context.Context, slots []int) error {
	if len(slots) == 0 {
		return nil
	}
	r := c.request(wire.DeleteTAPs)
	r.Slots = slots
	_, err := wire.Call(ctx, c.socket, r)
	return err
}

// TAPs returns the slots that have a TAP.
func (c *Client) TAPs(ctx context.Context) ([]int, error) {
	a, err := wire.Call(ctx, c.socket, c.request(wire.TAPs))
	return a.Slots, err
}

// Policy sets what may pass. Of a policy the helper gets what is not its own to know.
func (c *Client) Policy(ctx context.Context, p network.Policy) error {
	r := c.request(wire.Policy)
	r.Hosts, r.HostPorts = p.Hosts, p.HostPorts
	r.Guests = make([]wire.Guest, len(p.Guests))
	for i, g := range p.Guests {
		slot, err := strconv.Atoi(strings.TrimPrefix(g.TAP, c.plan.TAPPrefix()))
		if err != nil || c.plan.TAP(slot) != g.TAP || c.plan.MAC(slot).String() != g.MAC {
			return fault.New(fault.Internal, g.TAP, "the device or the hardware address %s is not of this installation", g.MAC).WithOp("host network")
		}
		r.Guests[i] = wire.Guest{Slot: slot, IPv4: g.IPv4, IPv6: g.IPv6, NAT: g.NAT, Group: g.Group}
	}
	_, err := wire.Call(ctx, c.socket, r)
	return err
}

// Remove takes everything of this installation's away.
func (c *Client) Remove(ctx context.Context) error {
	_, err := wire.Call(ctx, c.socket, c.request(wire.Remove))
	return err
}

// Watch calls changed after anybody changed the firewall. It outlives the helper: what one that is replaced did not
// tell counts as a change.
func (c *Client) Watch(ctx context.Context, changed func()) error {
	return c.keep(ctx, c.request(wire.Watch), changed, changed)
}

// keep has a request that lasts answered until ctx ends, by one helper after the other: again is called when there may be
// another. It returns what a helper refuses.
func (c *Client) keep(ctx context.Context, r wire.Request, each, again func()) error {
	const soonest, latest = time.Second, time.Minute
	pause := soonest
	for {
		began := time.Now()
		err := wire.Stream(ctx, c.socket, r, each)
		if ctx.Err() != nil {
			return nil
		}
		var f *fault.Error
		if !errors.As(err, &f) || f.Code != fault.Unavailable || f.Subject != wire.Subject { // it is there, and has said why
			return err
		}
		if time.Since(began) > latest {
			pause = soonest
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, latest)
		again()
	}
}

// Obstacles looks for what others drop. The caller has no context: the helper's bound is the only one.
func (c *Client) Obstacles() ([]hostnet.Obstacle, error) {
	a, err := wire.Call(context.Background(), c.socket, c.request(wire.Obstacles))
	out := make([]hostnet.Obstacle, len(a.Obstacles))
	for i, o := range a.Obstacles {
		out[i] = hostnet.Obstacle(o)
	}
	return out, err
}

// Close has nothing to release.
func (c *Client) Close() {}
