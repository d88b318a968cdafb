package usernet

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

const installation = "0123456789ab"

// dialVMM connects as a VMM would.
func dialVMM(t *testing.T, socket string) net.Conn {
	t.Helper()
	dir, err := rundir.Open(filepath.Dir(socket))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	conn, err := dir.Dial(t.Context(), filepath.Base(socket))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// TestProgram follows a program through the life of a VM: it outlives the daemon, which finds it again, takes settings, and ends.
func TestProgram(t *testing.T) {
	top := t.TempDir()
	socket := filepath.Join(top, "run", "net.sock")
	if err := os.Mkdir(filepath.Dir(socket), 0o700); err != nil {
		t.Fatal(err)
	}
	h := NewHost(filepath.Join(top, "net"), installation)
	ctx := t.Context()
	if up, err := h.Running(ctx, "a"); up || err != nil {
		t.Fatalf("before the start: %v, %v", up, err)
	}
	if _, err := h.Status(ctx, "a"); !fault.Is(err, fault.Unavailable) || fault.HintOf(err) == "" {
		t.Errorf("before the start: %v", err)
	}
	c := config(t)
	if err := h.Start(ctx, "a", socket, c, Settings{}, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Stop(context.Background(), "a") })
	g := guestOn(t, dialVMM(t, socket))
	g.listen(t, 3000)

	h = NewHost(filepath.Join(top, "net"), installation) // the next daemon
	if up, err := h.Running(ctx, "a"); !up || err != nil {
		t.Fatalf("after the daemon's end: %v, %v", up, err)
	}
	s, err := h.Set(ctx, "a", Settings{NAT: true, Ports: []uint16{3000}})
	if err != nil || !s.NAT || !slices.Equal(s.Ports, []uint16{3000}) {
		t.Fatalf("%+v, %v", s, err)
	}
	other := freePort(t, c.Publish)
	for _, ports := range [][]uint16{{}, {other}, {3000}} { // and nothing else is touched
		if s, err = h.Publish(ctx, "a", ports); err != nil || !s.NAT || !slices.Equal(s.Ports, ports) {
			t.Fatalf("%v: %+v, %v", ports, s, err)
		}
	}
	if s, err = h.Set(ctx, "a", Settings{NAT: true}); err != nil || !slices.Equal(s.Ports, []uint16{3000}) {
		t.Fatalf("%+v, %v", s, err)
	}
	conn, err := net.Dial("tcp", netip.AddrPortFrom(c.Publish, 3000).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := talk(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	if s, err = h.Status(ctx, "a"); err != nil || !s.Attached || s.TCP != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	h = NewHost(filepath.Join(top, "net"), installation)
	if err := talk(conn, "still here"); err != nil {
		t.Errorf("the connection did not outlive the daemon: %v", err)
	}
	// Another start begins anew, with nothing left of before.
	if err := h.Start(ctx, "a", socket, c, Settings{NAT: true}, nil); err != nil {
		t.Fatal(err)
	}
	if err := talk(conn, "x"); err == nil {
		t.Error("the former program runs on")
	}
	if s, err = h.Status(ctx, "a"); err != nil || s.Attached || !s.NAT || len(s.Ports) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	for range 2 { // stopping what is stopped is fine
		if err := h.Stop(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
	if up, err := h.Running(ctx, "a"); up || err != nil {
		t.Errorf("after its end: %v, %v", up, err)
	}
	if _, err := os.Stat(filepath.Join(top, "net", "a")); !os.IsNotExist(err) {
		t.Errorf("its directory is left: %v", err)
	}
}

// TestGarbageOnTheControlSocket must not end the program.
func TestGarbageOnTheControlSocket(t *testing.T) {
	top := t.TempDir()
	h := NewHost(filepath.Join(top, "net"), installation)
	if err := h.Start(t.Context(), "a", filepath.Join(top, "net.sock"), config(t), Settings{}, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Stop(context.Background(), "a") })
	for _, garbage := range []string{"", "\n", "{", "[]", `{"set":{"ports":[70000]}}`, `{"set":{"nat":"yes"}}`, "\x00\xff"} {
		conn := dialVMM(t, filepath.Join(top, "net", "a", controlSocket))
		_, _ = conn.Write([]byte(garbage))
		_ = conn.(*net.UnixConn).CloseWrite()
		_ = conn.Close()
	}
	if s, err := h.Status(t.Context(), "a"); err != nil || s.NAT || len(s.Ports) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestSweep(t *testing.T) {
	top := t.TempDir()
	h := NewHost(filepath.Join(top, "net"), installation)
	for _, id := range []string{"known", "lost"} {
		if err := h.Start(t.Context(), id, filepath.Join(top, id+".sock"), config(t), Settings{}, nil); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = h.Stop(context.Background(), id) })
	}
	if err := os.Mkdir(filepath.Join(top, "net", "rest"), 0o700); err != nil {
		t.Fatal(err)
	}
	// A program says who it is with its arguments, which exec(2) sets: it must have come so far.
	until(t, "the program", func() bool {
		s, err := h.Status(t.Context(), "lost")
		return err == nil && s.Ports == nil
	})
	ended, err := h.Sweep(t.Context(), func(id string) bool { return id == "known" })
	if err != nil || !slices.Equal(ended, []string{"lost"}) {
		t.Errorf("%v, %v", ended, err)
	}
	if up, err := h.Running(t.Context(), "known"); !up || err != nil {
		t.Errorf("a known one was ended: %v, %v", up, err)
	}
	if up, err := h.Running(t.Context(), "lost"); up || err != nil {
		t.Errorf("it runs on: %v, %v", up, err)
	}
	left, err := os.ReadDir(filepath.Join(top, "net"))
	if err != nil || len(left) != 1 || left[0].Name() != "known" {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestStartFails(t *testing.T) {
	top := t.TempDir()
	h := NewHost(filepath.Join(top, "net"), installation)
	if err := h.Start(t.Context(), "a", filepath.Join(top, "missing", "net.sock"), config(t), Settings{}, nil); !fault.Is(err, fault.Internal) {
		t.Errorf("no directory for the socket: %v", err)
	}
	if err := h.Start(t.Context(), "a", filepath.Join(top, "net.sock"), Config{}, Settings{}, nil); !fault.Is(err, fault.Invalid) {
		t.Errorf("no configuration: %v", err)
	}
	if left, err := os.ReadDir(filepath.Join(top, "net")); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestAlone wants a program that no VMM comes to, or whose VMM went, to end by itself.
func TestAlone(t *testing.T) {
	n, err := New(config(t), TheHost(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() { done <- serveVMMs(t.Context(), n, l, 200*time.Millisecond) }()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the VMM", n.attached.Load)
	select {
	case err := <-done:
		t.Fatalf("it ended with a VMM there: %v", err)
	case <-time.After(400 * time.Millisecond):
	}
	_ = conn.Close()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("it stays though its VMM went")
	}
}
