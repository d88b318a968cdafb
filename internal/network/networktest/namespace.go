// Package networktest owns what tests of networks have in common: a network namespace in place of the host, a world beyond
// it, guests with a TCP/IP stack of their own, and what every network is held to.
//
// It never touches the network of the host that tests run on, and knows no network's inside.
package networktest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// insideEnv has the name of the test that is to run inside.
const insideEnv = "BANGER_NETWORK_TEST"

// The addresses of the host that a namespace is, of the world's only other host, and of a name that its resolver knows.
var (
	HostAddr  = netip.MustParseAddr("10.99.0.1")
	WorldAddr = netip.MustParseAddr("10.99.0.2")
	WorldName = "server.example."
)

// Ports of the world's servers: one echoes, after a line with the address that the connection came from; one takes what comes; one
// sends without end.
const (
	EchoPort    = 7
	DiscardPort = 9
	SourcePort  = 19
)

// Inside runs the test or benchmark in a process, and in network and mount namespaces, of its own. It returns false in the
// process that is outside, where there is nothing more to do. More are flags of that process, e.g. -test.timeout.
func Inside(t testing.TB, more ...string) bool {
	t.Helper()
	if os.Getenv(insideEnv) == t.Name() {
		if err := up("lo"); err != nil {
			t.Fatal(err)
		}
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("takes root, to make a network namespace")
	}
	run := []string{"-test.run", "^" + t.Name() + "$"}
	if b, ok := t.(*testing.B); ok {
		run = []string{"-test.run", "^$", "-test.bench", "^" + b.Name() + "$"}
	}
	cmd := exec.Command(os.Args[0], append(append(run, "-test.v", "-test.timeout=4m"), more...)...)
	cmd.Env = append(os.Environ(), insideEnv+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) {
		t.Skip("may not make a network namespace: ", err)
	}
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
	return false
}

// up brings a link of this thread's namespace up, with addresses that are usable at once.
func up(name string, addresses ...string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, s := range addresses {
		a, err := netlink.ParseAddr(s)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(l)
}

// World wires the namespace that this process is in to another one: the host's uplink, its default route, its resolver, and
// a server for guests to get to. The link is named uplink and has the MTU. Call it once, inside.
func World(t testing.TB, mtu int) {
	t.Helper()
	ours, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	ready := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread stays in the world, and ends with the process
		err := beyond(int(ours.Fd()), mtu)
		ready <- err
		if err == nil {
			select {}
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("the world: %v", err)
	}
	err = up("uplink", HostAddr.String()+"/24")
	if err == nil {
		uplink, e := netlink.LinkByName("uplink")
		if err = e; err == nil {
			err = netlink.RouteAdd(&netlink.Route{LinkIndex: uplink.Attrs().Index, Gw: WorldAddr.AsSlice()})
		}
	}
	// Mounts of the process are its own, once they are not shared.
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	if err == nil {
		err = os.WriteFile(resolv, []byte("nameserver "+WorldAddr.String()+"\n"), 0o600)
	}
	if err == nil {
		err = unix.Mount(resolv, "/etc/resolv.conf", "", unix.MS_BIND, "")
	}
	if err != nil {
		t.Fatalf("the way to the world: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount("/etc/resolv.conf", unix.MNT_DETACH) })
}

// beyond makes the world in a namespace of this thread.
func beyond(host, mtu int) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "world", mtu
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "uplink", PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(host)}); err != nil {
		return err
	}
	if err := errors.Join(up("lo"), up("world", WorldAddr.String()+"/24")); err != nil {
		return err
	}
	// It knows its way to whoever asks, also to addresses that should not get here.
	world, err := netlink.LinkByName("world")
	if err == nil {
		err = netlink.RouteAdd(&netlink.Route{LinkIndex: world.Attrs().Index, Gw: HostAddr.AsSlice()})
	}
	if err != nil {
		return err
	}
	echo, err := net.Listen("tcp", netip.AddrPortFrom(WorldAddr, EchoPort).String())
	if err != nil {
		return err
	}
	discard, err := net.Listen("tcp", netip.AddrPortFrom(WorldAddr, DiscardPort).String())
	if err != nil {
		return err
	}
	source, err := net.Listen("tcp", netip.AddrPortFrom(WorldAddr, SourcePort).String())
	if err != nil {
		return err
	}
	datagrams, err := net.ListenPacket("udp", netip.AddrPortFrom(WorldAddr, EchoPort).String())
	if err != nil {
		return err
	}
	names, err := net.ListenPacket("udp", netip.AddrPortFrom(WorldAddr, 53).String())
	if err != nil {
		return err
	}
	go Echo(echo)
	go serve(discard, func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) })
	go serve(source, func(conn net.Conn) {
		for data := make([]byte, 1<<20); ; {
			if _, err := conn.Write(data); err != nil {
				return
			}
		}
	})
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := datagrams.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = datagrams.WriteTo(buf[:n], from)
		}
	}()
	go func() {
		_ = dns.ActivateAndServe(nil, names, dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			m := new(dns.Msg).SetReply(q)
			if q.Question[0].Name == WorldName && q.Question[0].Qtype == dns.TypeA {
				rr, _ := dns.NewRR(WorldName + " 60 IN A " + WorldAddr.String())
				m.Answer = append(m.Answer, rr)
			}
			_ = w.WriteMsg(m)
		}))
	}()
	return nil
}

// Echo serves connections until the listener ends: a line with the peer's address, then what comes, back.
func Echo(l net.Listener) {
	serve(l, func(conn net.Conn) {
		host, _, _ := net.SplitHostPort(conn.RemoteAddr().String())
		if _, err := fmt.Fprintln(conn, host); err == nil {
			_, _ = io.Copy(conn, conn)
		}
	})
}

func serve(l net.Listener, one func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			one(conn)
		}()
	}
}
