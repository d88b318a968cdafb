package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/network/networktest"
	"git.thaloco.com/thaloco/banger/internal/network/usernet"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// TestNetworksCost measures what the networks cost: TCP between a guest and the world by a bare TAP, by the bridge and by the
// user network, in turn; and the deletion of many VMs at once, with the bridge and without a network. BANGER_BENCH=1 measures
// for docs/benchmarks.md; without it a little is moved, to see that it works.
//
// It is a test, not a benchmark of package testing: what is compared has to take turns, on a machine that is never quiet. The guest is
// this kernel in another namespace, and frames are copied as a VMM copies them.
func TestNetworksCost(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	networktest.World(t, 1500)
	rounds, amount, many := 1, int64(1<<20), 5
	if os.Getenv("BANGER_BENCH") != "" {
		rounds, amount, many = 9, 128<<20, 100
	}
	ways := []struct {
		name  string
		guest *networktest.Machine
	}{{"bare TAP", bareTAP(t)}}
	for _, kind := range []string{vm.BridgeNetwork, vm.UserNetwork} {
		in := install(t, func(c *config.Config) { c.Network, c.DNSListenAddr = kind, "" })
		yes := true
		id := in.done(in.s.Create(in.ctx(), sandbox.CreateRequest{Name: "web", NAT: &yes}))
		t.Cleanup(func() { in.stop(id) }) // the user network's program outlives the daemon, and the test
		ways = append(ways, struct {
			name  string
			guest *networktest.Machine
		}{kind, in.boot(id)})
	}
	for _, direction := range []struct {
		name string
		port uint16
		move func(conn *net.TCPConn) error
	}{
		{"guest to world", networktest.DiscardPort, func(conn *net.TCPConn) error {
			data := make([]byte, 1<<20)
			for sent := int64(0); sent < amount; sent += int64(len(data)) {
				if _, err := conn.Write(data); err != nil {
					return err
				}
			}
			if err := conn.CloseWrite(); err != nil {
				return err
			}
			_, err := conn.Read(data) // the end, once the world has taken all
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}},
		{"world to guest", networktest.SourcePort, func(conn *net.TCPConn) error { _, err := io.CopyN(io.Discard, conn, amount); return err }},
	} {
		rates := make([][]float64, len(ways))
		for range rounds {
			for i, w := range ways {
				conn, err := w.guest.Dial(netip.AddrPortFrom(networktest.WorldAddr, direction.port), networktest.Patience)
				if err != nil {
					t.Fatalf("%s: %v", w.name, err)
				}
				start := time.Now()
				if err := direction.move(conn); err != nil {
					t.Fatalf("%s: %v", w.name, err)
				}
				rates[i] = append(rates[i], float64(amount)/1e6/time.Since(start).Seconds())
				_ = conn.Close()
			}
		}
		for i, w := range ways {
			slices.Sort(rates[i])
			t.Logf("%s, %s: %.0f MB/s (from %.0f to %.0f)", direction.name, w.name, rates[i][rounds/2], rates[i][0], rates[i][rounds-1])
		}
	}
	for _, kind := range []string{config.NetworkNone, config.NetworkBridge} {
		t.Logf("%d VMs that are deleted at once, network %s: %v", many, kind, deletion(t, kind, many).Round(time.Millisecond))
	}
}

// boot is a guest whose kernel is this one, at a VM's interface.
func (in *installation) boot(id vm.ID) *networktest.Machine {
	in.t.Helper()
	d, err := in.s.Show(in.ctx(), string(id))
	if err != nil {
		in.t.Fatal(err)
	}
	return networktest.Boot(in.t, *d.VM.Interface, filepath.Join(in.paths.Run(id.Short()), usernet.Socket))
}

// bareTAP is a guest at a TAP that the host routes to, and nothing else.
func bareTAP(t *testing.T) *networktest.Machine {
	t.Helper()
	l := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "bare"}, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR}
	if err := netlink.LinkAdd(l); err != nil {
		t.Fatal(err)
	}
	a, err := netlink.ParseAddr("10.98.0.1/24")
	if err == nil {
		err = netlink.AddrAdd(l, a)
	}
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err == nil {
		err = os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	return networktest.Boot(t, vm.Interface{TAP: "bare", MAC: "02:00:00:00:00:05", MTU: 1500, IPv4: netip.MustParsePrefix("10.98.0.5/24"),
		Gateway4: netip.MustParseAddr("10.98.0.1")}, "")
}

// deletion is how long it takes until so many VMs that run are gone.
func deletion(t *testing.T, kind string, many int) time.Duration {
	t.Helper()
	in := install(t, func(c *config.Config) {
		c.Network, c.DNSListenAddr = kind, ""
		c.BridgeName, c.CIDR = "other0", netip.MustParsePrefix("172.16.92.0/24") // beside the one above
	})
	var ids []vm.ID
	for i := range many {
		ids = append(ids, in.done(in.s.Create(in.ctx(), sandbox.CreateRequest{Name: fmt.Sprintf("vm-%d", i)})))
	}
	start := time.Now()
	var ops []operation.Operation
	for _, id := range ids {
		op, err := in.s.Delete(in.ctx(), id)
		if err != nil {
			t.Fatal(err)
		}
		ops = append(ops, op)
	}
	for _, op := range ops {
		in.done(op, nil)
	}
	return time.Since(start)
}
