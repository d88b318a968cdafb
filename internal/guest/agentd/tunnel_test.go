package agentd

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/tap"
	"git.thaloco.com/thaloco/banger/internal/network/usernet"
)

// tunnelHost is the host's end of a guest's network: the user network itself, with one server in the world.
type tunnelHost struct {
	network *usernet.Network
	key     []byte
	port    int           // of the server, which echoes
	ends    chan net.Conn // the guest's ends of connections, for the test to break
}

func newTunnelHost(t *testing.T) *tunnelHost {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(conn, conn); _ = conn.Close() }()
		}
	}()
	h := &tunnelHost{key: boot.TunnelKey("a secret of a test's VM"), port: l.Addr().(*net.TCPAddr).Port, ends: make(chan net.Conn, 8)}
	c := usernet.Config{MAC: "02:00:00:00:00:01", Guest4: netip.MustParsePrefix("10.77.0.5/24"), Gateway4: netip.MustParseAddr("10.77.0.1"),
		MTU: usernet.MTU, Publish: netip.MustParseAddr("127.203.0.1")}
	out := usernet.Outside{
		Reach: func(netip.Addr) error { return nil },
		Dial: func(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, fmt.Sprintf("127.0.0.1:%d", to.Port()))
		},
		Resolvers: func() ([]string, error) { return nil, nil },
	}
	if h.network, err = usernet.New(c, out, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	h.network.Set(usernet.Settings{NAT: true})
	t.Cleanup(func() {
		if err := h.network.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// dial is the guest's connect to the host's port.
func (h *tunnelHost) dial() (net.Conn, error) {
	guest, host := net.Pipe()
	go func() {
		key := make([]byte, len(h.key))
		if _, err := io.ReadFull(host, key); err != nil || !bytes.Equal(key, h.key) {
			_ = host.Close()
			return
		}
		_ = h.network.Serve(context.Background(), host)
	}()
	h.ends <- guest
	return guest, nil
}

// TestTunnel sends a kernel's own packets through the agent and the user network, in a network namespace of the test's own, and breaks the
// connection between them.
func TestTunnel(t *testing.T) {
	h := newTunnelHost(t)
	runtime.LockOSThread() // never unlocked: the thread ends with the test, and its namespace with it
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skip("needs to make a network namespace: ", err)
	}
	if !tap.Present() {
		t.Skip("this kernel has no TAP devices")
	}
	if err := tap.Make("eth0"); err != nil {
		t.Fatal(err)
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	gateway := net.IPv4(10, 77, 0, 1)
	for _, err := range []error{
		netlink.LinkSetMTU(link, usernet.MTU), netlink.LinkSetUp(link),
		netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 77, 0, 5), Mask: net.CIDRMask(24, 32)}}),
		netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	namespace, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(namespace)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	kept := make(chan error, 1)
	go func() {
		// The device is looked up in the namespace of the thread that asks.
		runtime.LockOSThread()
		if err := unix.Setns(namespace, unix.CLONE_NEWNET); err != nil {
			t.Error(err)
		}
		kept <- keepTunnel(ctx, "eth0", h.key, h.dial)
	}()
	first := <-h.ends

	conn, err := (&net.Dialer{Timeout: 20 * time.Second}).Dial("tcp4", fmt.Sprintf("198.51.100.7:%d", h.port))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	talk := func(size int) {
		t.Helper()
		text := bytes.Repeat([]byte("0123456789abcdef"), size/16)
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = conn.Write(text) }()
		back := make([]byte, len(text))
		if _, err := io.ReadFull(conn, back); err != nil || !bytes.Equal(back, text) {
			t.Fatalf("%d bytes did not come back: %v", size, err)
		}
	}
	talk(16)
	talk(4 << 20) // packets as large as there are
	_ = first.Close()
	select {
	case <-h.ends:
	case <-time.After(20 * time.Second):
		t.Fatal("no other connection was made")
	}
	talk(1 << 20) // the kernel's connection has lived on

	if err := netlink.LinkDel(link); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-kept:
		if err == nil {
			t.Error("an interface that is gone is no error")
		}
	case <-time.After(20 * time.Second):
		t.Error("it goes on without an interface")
	}
	cancel()
	if err := keepTunnel(t.Context(), "eth0", h.key, h.dial); err == nil {
		t.Error("an interface that was never there is no error")
	}
}
