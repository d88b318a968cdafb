package usernet

import (
	"errors"
	"net/netip"
	"os"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNamespaces runs f on a thread in a network namespace of its own, wired to another one: 10.99.0.1 and fd99::1 are its
// own, 10.99.0.2 and fd99::2 the other's.
func inNamespaces(t *testing.T, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine, and the namespace with it
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			peer := make(chan int, 1)
			hold := make(chan struct{})
			defer close(hold)
			go func() {
				runtime.LockOSThread()
				if unix.Unshare(unix.CLONE_NEWNET) != nil {
					peer <- -1
					return
				}
				fd, _ := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
				peer <- fd
				<-hold
			}()
			fd := <-peer
			if fd < 0 {
				return errors.New("no second namespace")
			}
			defer unix.Close(fd)
			veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "here"}, PeerName: "there", PeerNamespace: netlink.NsFd(fd)}
			if err := netlink.LinkAdd(veth); err != nil {
				return err
			}
			own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(own)
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return err
			}
			err = errors.Join(up("there", "10.99.0.2/24", "fd99::2/64"), up("lo"))
			if err := errors.Join(err, unix.Setns(own, unix.CLONE_NEWNET)); err != nil {
				return err
			}
			if err := errors.Join(up("here", "10.99.0.1/24", "fd99::1/64"), up("lo")); err != nil {
				return err
			}
			return f()
		}()
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// up brings a link of this thread's namespace up with addresses that are usable at once.
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
		a.Flags = unix.IFA_F_NODAD
		if a.IP.To4() != nil {
			a.Flags = 0
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(l)
}

// TestReach asks the kernel of a network namespace of its own.
func TestReach(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root makes network namespaces")
	}
	inNamespaces(t, func() error {
		// The kernel takes its time over IPv6 when a link comes up.
		until(t, "the route of fd99::1", func() bool { return errors.Is(hostReach(netip.MustParseAddr("fd99::1")), errHost) })
		for addr, want := range map[string]bool{
			"10.99.0.2": true, "fd99::2": true, "10.99.0.77": true,
			"10.99.0.1": false, "fd99::1": false, "::ffff:10.99.0.1": false, "10.99.0.255": false, "127.0.0.1": false, "127.9.9.9": false, "::1": false,
			"64:ff9b::10.99.0.1": false, "203.0.113.1": false, // no route leads there
		} {
			if err := hostReach(netip.MustParseAddr(addr)); (err == nil) != want {
				t.Errorf("%s: %v, want reached %v", addr, err, want)
			}
		}
		// An address that comes later, and one that only a route makes the host's own, count at once.
		l, err := netlink.LinkByName("here")
		if err != nil {
			return err
		}
		if err := up("here", "10.99.0.77/24"); err != nil {
			return err
		}
		dst, err := netlink.ParseIPNet("10.99.1.0/24")
		if err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}); err != nil {
			return err
		}
		for _, addr := range []string{"10.99.0.77", "10.99.1.5"} {
			if err := hostReach(netip.MustParseAddr(addr)); !errors.Is(err, errHost) {
				t.Errorf("%s: %v, want %v", addr, err, errHost)
			}
		}
		return nil
	})
}

// TestPing sends a real one, as a user may who is in net.ipv4.ping_group_range, a setting of the namespace's.
func TestPing(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root makes network namespaces")
	}
	r := newRig(t, Settings{NAT: true})
	inNamespaces(t, func() error {
		// Under /proc/sys/net a thread sees its own namespace's.
		if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0); err != nil {
			return err
		}
		for _, a := range []string{"10.99.0.2", "fd99::2"} {
			if err := r.ask(netip.MustParseAddr(a), 7, []byte("payload")); err != nil {
				t.Errorf("%s: %v", a, err)
			}
		}
		return nil
	})
}
