package helper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/dns"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/network/networktest"
)

// descriptors are how many this process has open.
func descriptors(t *testing.T) int {
	t.Helper()
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(open)
}

// TestNames: an ordinary user's daemon answers guests at port 53, and has the resolver told for as long as it wants.
func TestNames(t *testing.T) {
	if !networktest.Inside(t) {
		return
	}
	const uid = 1000
	ctx, p := t.Context(), sample(installation)
	type call struct {
		link int
		addr netip.AddrPort
	}
	told, untold := make(chan call, 1), make(chan struct{}, 1)
	refuse := make(chan error, 1)
	o := Options{UID: uid, Records: t.TempDir(), Open: realHost, ListenDNS: dns.ListenForGuests,
		KeepNames: func(ctx context.Context, link int, addr netip.AddrPort) error {
			select {
			case err := <-refuse:
				return err
			default:
			}
			told <- call{link, addr}
			<-ctx.Done()
			untold <- struct{}{}
			return nil
		}}
	c := user{NewClient(serveFor(t, o), p, "banger0"), uid}
	if _, err := c.Setup(ctx, addresses(p)); err != nil {
		t.Fatal(err)
	}

	type sockets struct {
		tcp net.Listener
		udp net.PacketConn
	}
	listen := func() (sockets, error) {
		return as(uid, func() (s sockets, err error) {
			s.tcp, s.udp, err = c.ListenDNS(ctx, p.Host4().Addr())
			return s, err
		})
	}
	s, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	at := net.JoinHostPort(p.Host4().Addr().String(), "53")
	go func() {
		if conn, err := s.tcp.Accept(); err == nil {
			_, _ = fmt.Fprint(conn, "hello")
			_ = conn.Close()
		}
	}()
	conn, err := net.DialTimeout("tcp", at, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 10)
	if n, err := conn.Read(b); err != nil || string(b[:n]) != "hello" {
		t.Errorf("%q, %v", b[:n], err)
	}
	_ = conn.Close()
	asker, err := net.Dial("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer asker.Close()
	if _, err := asker.Write([]byte("who?")); err != nil {
		t.Fatal(err)
	}
	_ = s.udp.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, _, err := s.udp.ReadFrom(b); err != nil || string(b[:n]) != "who?" {
		t.Errorf("%q, %v", b[:n], err)
	}
	// Nobody else has the port meanwhile, and the helper does not when the daemon has let go.
	if _, err := listen(); !fault.Is(err, fault.Unavailable) {
		t.Errorf("%v", err)
	}
	before := descriptors(t)
	for range 20 {
		_, _ = listen()
	}
	if err := errors.Join(s.tcp.Close(), s.udp.Close()); err != nil {
		t.Error(err)
	}
	if s, err = listen(); err != nil {
		t.Fatal(err)
	}
	if now := descriptors(t); now > before+10 { // some of a call may still be closing; each that leaked would have two
		t.Errorf("%d descriptors are open, and were %d", now, before)
	}
	_ = errors.Join(s.tcp.Close(), s.udp.Close())

	// The resolver.
	server := netip.MustParseAddrPort("127.0.0.1:42069")
	keeping, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- do(uid, func() error { return c.KeepNames(keeping, server) }) }()
	link, err := net.InterfaceByName("banger0")
	if err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-told:
		if got != (call{link.Index, server}) {
			t.Errorf("%+v", got)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the resolver is not told")
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	select {
	case <-untold:
	case <-time.After(10 * time.Second):
		t.Error("the resolver is told for ever")
	}
	refuse <- fault.New(fault.Unavailable, "systemd-resolved", "there is none")
	if err := do(uid, func() error { return c.KeepNames(ctx, server) }); !fault.Is(err, fault.Unavailable) || err.Error() != "systemd-resolved: there is none" {
		t.Errorf("%v", err)
	}
}

// TestDescriptorsOfAnError: an answer that is a fault brings none, and what one that has too few brings is closed.
func TestDescriptorsOfAnError(t *testing.T) {
	_, o, _ := fakeService(t)
	o.ListenDNS = func(netip.Addr) (net.Listener, net.PacketConn, error) {
		return nil, nil, fault.Wrap(unix.EADDRNOTAVAIL, fault.Unavailable, "172.16.88.1:53", "cannot listen there").WithHint("sudo ss -lunp")
	}
	p := sample(installation)
	c := NewClient(serveFor(t, o), p, "banger0")
	if _, err := c.Setup(t.Context(), addresses(p)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.ListenDNS(t.Context(), p.Host4().Addr()); !fault.Is(err, fault.Unavailable) || fault.HintOf(err) != "sudo ss -lunp" || !errors.Is(err, unix.EADDRNOTAVAIL) || err.Error() != "172.16.88.1:53: cannot listen there: cannot assign requested address" {
		t.Errorf("%v", err)
	}
	before := descriptors(t)
	for range 5 {
		if _, files, err := wire.CallFiles(t.Context(), c.socket, c.request(wire.TAPs), nil, 2); err == nil || len(files) != 0 {
			t.Errorf("%v, %v", files, err)
		}
	}
	if now := descriptors(t); now > before+1 {
		t.Errorf("%d descriptors are open, and were %d", now, before)
	}
}
