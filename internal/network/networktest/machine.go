package networktest

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Machine is a guest whose kernel is this one, in a network namespace of its own, with a device of its own; what moves frames
// between that and the VM's interface is what a VMM does: it copies them, and on a TAP it leaves segments and checksums
// to the other side's kernel. It is for measuring: a Guest's stack would be what is measured.
type Machine struct {
	dial chan func()
}

// offloads are those that VMMs ask of a TAP for guests that have them, which Linux guests do (TUNSETOFFLOAD, tun.rst of the
// kernel's documentation).
const offloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN

// Boot is a Machine at a VM's interface, as Join.
func Boot(t testing.TB, i vm.Interface, socket string) *Machine {
	t.Helper()
	m := &Machine{dial: make(chan func())}
	ready := make(chan error, 1)
	var inside *os.File
	go func() {
		runtime.LockOSThread() // never unlocked: the namespace goes with the thread
		var err error
		inside, err = eth0(i)
		ready <- err
		for f := range m.dial {
			f()
		}
	}()
	err := <-ready
	var outside wire
	if err == nil {
		if i.TAP != "" {
			outside, err = openTAP(i.TAP)
		} else {
			outside, err = dialSocket(socket, nil)
		}
	}
	if err == nil && i.TAP != "" {
		err = errors.Join(unix.IoctlSetInt(fdOf(inside), unix.TUNSETOFFLOAD, offloads), unix.IoctlSetInt(fdOf(outside.(*tapWire).File), unix.TUNSETOFFLOAD, offloads))
	}
	if err != nil {
		t.Fatalf("a machine boots: %v", err)
	}
	var done sync.WaitGroup
	if tap, ok := outside.(*tapWire); ok {
		done.Go(func() { carry(inside, tap.File) })
		done.Go(func() { carry(tap.File, inside) })
	} else {
		own := &tapWire{inside, make([]byte, 1<<17)}
		done.Go(func() { carryFrames(own, outside) })
		done.Go(func() { carryFrames(outside, own) })
	}
	t.Cleanup(func() {
		_, _ = inside.Close(), outside.Close()
		done.Wait()
		close(m.dial)
	})
	return m
}

// fdOf is the descriptor of a file, which stays as it is: Fd would make it block.
func fdOf(f *os.File) (fd int) {
	c, err := f.SyscallConn()
	if err == nil {
		err = c.Control(func(n uintptr) { fd = int(n) })
	}
	if err != nil {
		return -1
	}
	return fd
}

// carry moves packets as they are, headers for the other kernel included.
func carry(to, from *os.File) {
	buf := make([]byte, 1<<17)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if _, err := to.Write(buf[:n]); errors.Is(err, os.ErrClosed) {
			return
		}
	}
}

func carryFrames(from, to wire) {
	for {
		frame, err := from.read()
		if err != nil {
			return
		}
		if err := to.write([][]byte{frame}, len(frame)); errors.Is(err, os.ErrClosed) {
			return
		}
	}
}

// eth0 makes the guest's device in a new namespace of this thread.
func eth0(i vm.Interface) (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	w, err := openTAP("eth0")
	if err != nil {
		return nil, err
	}
	l, err := netlink.LinkByName("eth0")
	if err != nil {
		return nil, err
	}
	mac, err := net.ParseMAC(i.MAC)
	if err == nil {
		err = errors.Join(netlink.LinkSetHardwareAddr(l, mac), netlink.LinkSetMTU(l, i.MTU), up("eth0", i.IPv4.String()), up("lo"))
	}
	if err == nil {
		err = netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: i.Gateway4.AsSlice()})
	}
	return w.(*tapWire).File, err
}

// Dial connects over TCP.
func (m *Machine) Dial(to netip.AddrPort, bound time.Duration) (conn *net.TCPConn, err error) {
	done := make(chan struct{})
	m.dial <- func() {
		defer close(done)
		fd, e := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err = e; err != nil {
			return
		}
		f := os.NewFile(uintptr(fd), "socket")
		defer f.Close()
		tv := unix.NsecToTimeval(bound.Nanoseconds())
		err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv), // bounds connect (socket(7))
			unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}))
		if err != nil {
			return
		}
		c, e := net.FileConn(f)
		if err = e; err == nil {
			conn = c.(*net.TCPConn)
		}
	}
	<-done
	return conn, err
}
