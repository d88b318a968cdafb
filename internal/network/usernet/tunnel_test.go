package usernet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// tunnelRig is a network whose guest connects by itself.
type tunnelRig struct {
	*Network
	socket string
	key    []byte
	over   chan error
}

func newTunnelRig(t *testing.T, patience time.Duration) *tunnelRig {
	t.Helper()
	r := &tunnelRig{key: boot.TunnelKey("a secret of a test's VM"), socket: filepath.Join(t.TempDir(), "s"), over: make(chan error, 1)}
	c := config(t)
	hash := sha256.Sum256(r.key)
	c.KeyHash = hex.EncodeToString(hash[:])
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	var err error
	if r.Network, err = New(c, (&outside{}).Outside(), slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	r.Set(Settings{NAT: true})
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.over <- serveGuests(ctx, r.Network, l, patience)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		_ = l.Close()
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *tunnelRig) dial(t *testing.T, first []byte) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if len(first) == 0 { // the other end may have closed it already, which even an empty write tells
		return conn
	}
	if _, err := conn.Write(first); err != nil {
		t.Fatal(err)
	}
	return conn
}

// wantEnd waits for a connection to be closed by the other end, with nothing said.
func wantEnd(t *testing.T, what string, conn net.Conn) {
	t.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	if n, err := io.Copy(io.Discard, conn); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: %d bytes, %v; want the end", what, n, err)
	}
}

// TestTunnelWantsTheKey: other programs of a guest can connect, and get and end nothing.
func TestTunnelWantsTheKey(t *testing.T) {
	r := newTunnelRig(t, time.Minute)
	port := server(t)
	g := guestOn(t, r.dial(t, r.key))
	conn, err := g.dial(netip.AddrPortFrom(world4, port))
	if err != nil {
		t.Fatal(err)
	}
	if err := talk(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	wrong := bytes.Clone(r.key)
	wrong[31] ^= 1
	wantEnd(t, "another key", r.dial(t, wrong))
	wantEnd(t, "frames without a key", r.dial(t, make([]byte, 64)))
	wantEnd(t, "silence", r.dial(t, nil))
	short := r.dial(t, r.key[:31])
	_ = short.(*net.UnixConn).CloseWrite()
	wantEnd(t, "a cut key", short)
	for range 3 * maxKeyless { // more than are waited for at a time
		r.dial(t, nil)
	}
	if err := talk(conn, "still here"); err != nil {
		t.Errorf("others ended the guest's connection: %v", err)
	}
}

// TestTunnelReconnects: what the guest has open lives over a new connection to its network, which takes the place of one whose
// end nobody noticed.
func TestTunnelReconnects(t *testing.T) {
	r := newTunnelRig(t, time.Minute)
	port := server(t)
	first := r.dial(t, r.key)
	g := guestOn(t, first)
	conn, err := g.dial(netip.AddrPortFrom(world4, port))
	if err != nil {
		t.Fatal(err)
	}
	if err := talk(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	second := r.dial(t, r.key)
	wantEnd(t, "the connection before", first)
	until(t, "the second one", r.attached.Load)
	g.rewire(t, second)
	if err := talk(conn, "still here"); err != nil {
		t.Errorf("after another connection: %v", err)
	}
	_ = second.Close()
	until(t, "its end", func() bool { return !r.attached.Load() })
	g.rewire(t, r.dial(t, r.key))
	if err := talk(conn, "and again"); err != nil {
		t.Errorf("after an end and another connection: %v", err)
	}
}

// TestTunnelAlone wants a program whose guest does not come to end, and not before.
func TestTunnelAlone(t *testing.T) {
	r := newTunnelRig(t, 200*time.Millisecond)
	conn := r.dial(t, r.key)
	until(t, "the guest", r.attached.Load)
	select {
	case err := <-r.over:
		t.Fatalf("it ended with its guest there: %v", err)
	case <-time.After(400 * time.Millisecond):
	}
	_ = conn.Close()
	select {
	case err := <-r.over:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("it stays though its guest went")
	}
}

// attacher is that of one daemon.
func attacher(t *testing.T, top string, log io.Writer) *Attacher {
	t.Helper()
	a := NewAttacher(Options{
		Dir: filepath.Join(top, "net"), Plan: network.Plan{Installation: installation, IPv4: netip.MustParsePrefix("10.77.0.0/24")},
		RunDir: func(vm.ID) string { return filepath.Join(top, "run") },
		Tunnel: true, Key: func(v vm.VM) []byte { return boot.TunnelKey(v.Secrets.Agent) }, Log: slog.New(slog.NewTextHandler(log, nil)),
	})
	t.Cleanup(func() { _ = a.Close(context.Background()) })
	return a
}

// TestProgramIsStartedAgain when it was killed, by the daemon that runs or by the next one, with what was set meanwhile; and not
// after the VM was taken off.
func TestProgramIsStartedAgain(t *testing.T) {
	top := t.TempDir()
	if err := os.Mkdir(filepath.Join(top, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	v := vm.VM{ID: "0123456789abcdef0123456789abcdef", Secrets: vm.Secrets{Agent: "a secret of a test's VM"}}
	log := &messages{}
	a := attacher(t, top, log)
	i, err := a.Attach(t.Context(), v)
	if err != nil || !i.Tunnel {
		t.Fatalf("%+v, %v", i, err)
	}
	t.Cleanup(func() { _ = a.host.Stop(context.Background(), string(v.ID)) })
	v.Interface = &i
	kill := func() {
		t.Helper()
		p, err := a.host.find(t.Context(), string(v.ID))
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		_ = p.Close()
	}
	// connected asks for a word of the network's: only the right program answers for it.
	connected := func(when string) {
		t.Helper()
		conn := dialVMM(t, filepath.Join(top, "run", Socket))
		defer conn.Close()
		if _, err := conn.Write(boot.TunnelKey(v.Secrets.Agent)); err != nil {
			t.Fatal(err)
		}
		until(t, when, func() bool { s, err := a.host.Status(t.Context(), string(v.ID)); return err == nil && s.Attached })
	}
	connected("the first connection")
	v.Spec.NAT = true
	if err := a.Apply(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	kill()
	until(t, "the program after its end", func() bool { s, err := a.host.Status(t.Context(), string(v.ID)); return err == nil && s.NAT })
	connected("the connection after its end")
	log.mu.Lock()
	if all := strings.Join(log.all, ""); !strings.Contains(all, "is started again") || !strings.Contains(all, "ready") {
		t.Errorf("the daemon's log has no last words of it:\n%s", all)
	}
	log.mu.Unlock()

	_ = a.Close(t.Context()) // the daemon ends, and the program meanwhile
	kill()
	a = attacher(t, top, log)
	if err := a.Restore(t.Context(), []vm.VM{v}); err != nil {
		t.Fatal(err)
	}
	if err := a.Apply(t.Context(), v); err != nil {
		t.Fatalf("the next daemon: %v", err)
	}
	connected("the connection to the next daemon's")
	kill()
	until(t, "the program after another end", func() bool { _, err := a.host.Status(t.Context(), string(v.ID)); return err == nil })

	if err := a.Detach(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * firstRevival)
	if up, err := a.host.Running(t.Context(), string(v.ID)); up || err != nil {
		t.Errorf("after its end: %v, %v", up, err)
	}
}

// FuzzGuestFrames: whatever comes from a guest after its key, reading it ends, and the network lives on.
func FuzzGuestFrames(f *testing.F) {
	frame := func(b ...byte) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...) }
	f.Add(frame())
	f.Add(frame(make([]byte, 14)...))
	f.Add(append(frame(1, 2, 3), 0xff, 0xff, 0xff, 0xff))
	f.Add([]byte{0, 0, 0, 60, 1, 2})
	arp := append([]byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 5, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 5}, 10, 77, 0, 5, 0, 0, 0, 0, 0, 0, 10, 77, 0, 1)
	f.Add(frame(arp...))
	n, err := New(Config{MAC: "02:00:00:00:00:01", Guest4: guest4, Gateway4: netip.MustParseAddr("10.77.0.1"), MTU: MTU, Publish: netip.MustParseAddr("127.201.0.1")},
		Outside{Reach: func(netip.Addr) error { return errHost }, Dial: nil, Resolvers: func() ([]string, error) { return nil, nil }}, slog.New(slog.DiscardHandler))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = n.Close() })
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := n.readFrames(bytes.NewReader(data)); err == nil {
			t.Error("the end of a stream is no end")
		}
		n.link.Drain()
	})
}
