package agentd_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/frame"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	secret = "0123456789abcdef"
	bound  = 10 * time.Second
)

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	t.Cleanup(cancel)
	return ctx
}

// links runs a test over both kinds of link to a server for g.
func links(t *testing.T, g *agentd.Guest, test func(t *testing.T, link vmm.Link)) {
	t.Run("vsock", func(t *testing.T) { test(t, streamLink(t, g)) })
	t.Run("port", func(t *testing.T) { test(t, newPort(t, g).link()) })
}

// streamLink stands for vsock: each dial is a fresh stream, over a unix socket.
func streamLink(t testing.TB, g *agentd.Guest) vmm.Link {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := agentd.NewServer(secret, g)
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { _ = server.Serve(ctx, conn, false) })
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		server.Close()
		serving.Wait()
	})
	return vmm.Link{Dial: func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}
}

// port stands for a virtio-serial port: one client at a time, and what an earlier client and its
// guest sent and did not read comes first.
type port struct {
	t     testing.TB
	guest *agentd.Guest
	ctx   context.Context
	done  sync.WaitGroup
	stale func() (toHost, toGuest []byte)

	mu       sync.Mutex
	last     net.Conn
	toHost   *tail
	toGuest  *tail
	sessions atomic.Int32
}

func newPort(t testing.TB, g *agentd.Guest) *port {
	ctx, cancel := context.WithCancel(context.Background())
	p := &port{t: t, guest: g, ctx: ctx, stale: func() (a, b []byte) { return nil, nil }}
	t.Cleanup(func() {
		cancel()
		p.done.Wait()
	})
	return p
}

func (p *port) link() vmm.Link { return vmm.Link{Mux: true, Dial: p.dial} }

func (p *port) dial(context.Context) (net.Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done.Wait() // the guest has noticed that the earlier client went
	oldToHost, oldToGuest := p.stale()
	host, guest := socketPair(p.t) // a port has buffers, net.Pipe has none
	p.toHost, p.toGuest = &tail{}, &tail{}
	p.done.Go(func() {
		_ = agentd.ServeConn(p.ctx, &staleConn{Conn: guest, first: bytes.NewReader(oldToGuest), sent: p.toHost}, true, secret, p.guest)
	})
	p.last = host
	p.sessions.Add(1)
	return &staleConn{Conn: host, first: bytes.NewReader(oldToHost), sent: p.toGuest}, nil
}

func socketPair(t testing.TB) (a, b net.Conn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return ends[0], ends[1]
}

// tail keeps the latest bytes that went through.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (l *tail) add(b []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, b...)
	l.b = l.b[max(0, len(l.b)-64<<10):]
}

func (l *tail) cut(n int) []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.b[max(0, len(l.b)-n):])
}

type staleConn struct {
	net.Conn
	first *bytes.Reader
	sent  *tail
}

func (c *staleConn) Read(b []byte) (int, error) {
	if c.first.Len() > 0 {
		return c.first.Read(b)
	}
	return c.Conn.Read(b)
}

func (c *staleConn) Write(b []byte) (int, error) {
	c.sent.add(b)
	return c.Conn.Write(b)
}

func open(t testing.TB, link vmm.Link) *agent.Session {
	t.Helper()
	s, err := agent.Open(within(t), link, secret)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestAPI(t *testing.T) {
	var stages agentd.Stages
	stages.Reach(agentd.Stage{Name: boot.StageInit, At: 1500 * time.Microsecond})
	stopped := make(chan bool, 8)
	g := &agentd.Guest{
		Version: "v1", Stages: &stages,
		Facts: func() agentd.Facts {
			return agentd.Facts{BootID: "b", Uptime: time.Second, Userspace: "degraded", FailedUnits: []string{"x.service"}, RSS: 7, Restarts: 2}
		},
		Shutdown: func(_ context.Context, reboot bool) error { stopped <- reboot; return nil },
		Grow: func(context.Context) ([]agentd.Grown, error) {
			return []agentd.Grown{{Target: "/root", Before: 1, After: 2}}, nil
		},
	}
	links(t, g, func(t *testing.T, link vmm.Link) {
		ctx := within(t)
		c := open(t, link).Client()
		h, err := c.Health(ctx, &agentv1.HealthRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if h.AgentVersion != "v1" || h.BootId != "b" || h.UptimeMs != 1000 || h.Userspace != "degraded" || h.Restarts != 2 ||
			h.AgentRssBytes != 7 || len(h.FailedUnits) != 1 || len(h.Stages) == 0 || h.Stages[0].AtMs != 1.5 {
			t.Errorf("health: %v", h)
		}
		if _, err := c.Shutdown(ctx, &agentv1.ShutdownRequest{Reboot: true}); err != nil || !<-stopped {
			t.Errorf("shutdown: %v", err)
		}
		grown, err := c.GrowFilesystems(ctx, &agentv1.GrowFilesystemsRequest{})
		if err != nil || len(grown.Grown) != 1 || grown.Grown[0].AfterBytes != 2 {
			t.Errorf("grow: %v, %v", grown, err)
		}
		if _, err := c.Sync(ctx, &agentv1.SyncRequest{}); connect.CodeOf(err) != connect.CodeUnimplemented {
			t.Errorf("sync of a guest without: %v", err)
		}
	})
}

func TestWatchBootPushesStages(t *testing.T) {
	var stages agentd.Stages
	stages.Reach(agentd.Stage{Name: boot.StageInit})
	s := open(t, newPort(t, &agentd.Guest{Stages: &stages}).link())
	stream, err := s.Client().WatchBoot(within(t), &agentv1.WatchBootRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var got []string
	for _, next := range []string{boot.StageAgent, boot.StageSSH, boot.StageUserspace, ""} {
		if !stream.Receive() {
			t.Fatalf("the stream ended after %v: %v", got, stream.Err())
		}
		got = append(got, stream.Msg().Stage.Name)
		stages.Reach(agentd.Stage{Name: next}) // only once the earlier one has arrived
		stages.Reach(agentd.Stage{Name: next}) // reached is reached
	}
	if stream.Receive() || stream.Err() != nil {
		t.Errorf("after userspace: %v, %v", stream.Msg(), stream.Err())
	}
	if diff := cmp.Diff([]string{boot.StageInit, boot.StageAgent, boot.StageSSH, boot.StageUserspace}, got); diff != "" {
		t.Error(diff)
	}
}

func TestWrongSecret(t *testing.T) {
	answered := make(chan wire.Opened, 10)
	links(t, &agentd.Guest{Stages: &agentd.Stages{}, Answered: func(o wire.Opened) { answered <- o }}, func(t *testing.T, link vmm.Link) {
		if _, err := agent.Open(within(t), link, "another secret!!"); !fault.Is(err, fault.Permission) {
			t.Errorf("got %v, want a permission fault", err)
		}
		if len(answered) != 0 {
			t.Error("a host that does not know the secret counts as answered")
		}
		if s := open(t, link); s == nil {
			t.Error("the right secret no longer works")
		}
		if o := <-answered; o.Waited < 0 || time.Since(o.At) < 0 || time.Since(o.At) > time.Minute {
			t.Errorf("a session that opened at %v, after %v of waiting", o.At, o.Waited)
		}
	})
}

func TestOpenIsBounded(t *testing.T) {
	for name, link := range map[string]vmm.Link{
		"nobody": {Dial: func(context.Context) (net.Conn, error) { return nil, syscall.ECONNREFUSED }},
		"silent": {Mux: true, Dial: func(context.Context) (net.Conn, error) {
			host, guest := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, guest) }()
			return host, nil
		}},
		"babbling": {Mux: true, Dial: func(context.Context) (net.Conn, error) {
			host, guest := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, guest) }()
			go func() { _, _ = io.Copy(guest, rand.Reader) }()
			return host, nil
		}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			began := time.Now()
			if _, err := agent.Open(ctx, link, secret); !fault.Is(err, fault.Timeout) {
				t.Errorf("got %v, want a timeout", err)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
}

// TestOpenWaitsForTheGuestsWord: a link that tells when the guest listens is not dialled before, and without that word it is
// all the same.
func TestOpenWaitsForTheGuestsWord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, said := range []bool{true, false} {
			up, dialled := make(chan struct{}), make(chan time.Duration, 1)
			began := time.Now()
			ctx, cancel := context.WithCancel(t.Context())
			link := vmm.Link{Up: up, Dial: func(context.Context) (net.Conn, error) {
				select {
				case dialled <- time.Since(began):
				default:
				}
				return nil, syscall.ECONNREFUSED
			}}
			ended := make(chan error, 1)
			go func() {
				_, err := agent.Open(ctx, link, secret)
				ended <- err
			}()
			want := 3 * time.Second
			if said {
				want = 40 * time.Millisecond
				time.Sleep(want)
				close(up)
			}
			if at := <-dialled; at != want {
				t.Errorf("said %v: first dialled after %v, want %v", said, at, want)
			}
			cancel()
			if err := <-ended; !fault.Is(err, fault.Cancelled) {
				t.Errorf("said %v: %v", said, err)
			}
		}
	})
}

// loopback serves one TCP service for the guest to forward to, and returns its port.
func loopback(t *testing.T, serve func(*net.TCPConn)) int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				serve(conn.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
	return l.Addr().(*net.TCPAddr).Port
}

// TestHalfClose sends everything, says so, and still receives: what ssh and rsync rely on.
func TestHalfClose(t *testing.T) {
	echoAfterEnd := loopback(t, func(c *net.TCPConn) {
		all, err := io.ReadAll(c)
		if err == nil {
			_, _ = c.Write(all)
		}
	})
	sent := make([]byte, 3<<20) // several yamux windows
	rand.Read(sent)
	links(t, &agentd.Guest{Stages: &agentd.Stages{}, DialTCP: agentd.DialLoopback}, func(t *testing.T, link vmm.Link) {
		s := open(t, link)
		conn, err := s.DialTCP(within(t), echoAfterEnd, false)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write(sent); err != nil {
			t.Fatal(err)
		}
		if err := conn.(wire.CloseWriter).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(conn)
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("got %d of %d bytes back, %v", len(got), len(sent), err)
		}
	})
}

// TestDialAddress reaches what is bound to one address that loopback does not lead to.
func TestDialAddress(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.77:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "here")
			_ = c.Close()
		}
	}()
	at := netip.MustParseAddrPort(l.Addr().String())
	links(t, &agentd.Guest{Stages: &agentd.Stages{}, DialTCP: agentd.DialLoopback, DialAddress: agentd.DialAddress}, func(t *testing.T, link vmm.Link) {
		s := open(t, link)
		if _, err := s.DialTCP(within(t), int(at.Port()), false); !fault.Is(err, fault.Unavailable) {
			t.Errorf("by loopback: %v", err)
		}
		conn, err := s.DialAddress(within(t), at)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got, err := io.ReadAll(conn); err != nil || string(got) != "here" {
			t.Errorf("%q, %v", got, err)
		}
	})
}

// TestCloseReachesTheService closes a connection whose service never stops sending.
func TestCloseReachesTheService(t *testing.T) {
	ended := make(chan struct{}, 1)
	zeros := loopback(t, func(c *net.TCPConn) {
		buffer := make([]byte, 32<<10)
		for {
			if _, err := c.Write(buffer); err != nil {
				ended <- struct{}{}
				return
			}
		}
	})
	links(t, &agentd.Guest{Stages: &agentd.Stages{}, DialTCP: agentd.DialLoopback}, func(t *testing.T, link vmm.Link) {
		s := open(t, link)
		for range 3 {
			conn, err := s.DialTCP(within(t), zeros, false)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.CopyN(io.Discard, conn, 1<<20); err != nil {
				t.Fatal(err)
			}
			conn.Close()
			select {
			case <-ended:
			case <-time.After(bound):
				t.Fatal("the service in the guest never learned that its client went")
			}
		}
	})
}

// TestServiceEnds reads to the end of a service that says something and goes, while the host writes.
func TestServiceEnds(t *testing.T) {
	bye := loopback(t, func(c *net.TCPConn) { _, _ = io.WriteString(c, "bye") })
	links(t, &agentd.Guest{Stages: &agentd.Stages{}, DialTCP: agentd.DialLoopback}, func(t *testing.T, link vmm.Link) {
		conn, err := open(t, link).DialTCP(within(t), bye, false)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		got, err := io.ReadAll(conn)
		if err != nil || string(got) != "bye" {
			t.Errorf("got %q, %v", got, err)
		}
	})
}

func TestDialRefusedAndWaited(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	var dials atomic.Int32
	g := &agentd.Guest{Stages: &agentd.Stages{}, DialTCP: func(ctx context.Context, port int) (net.Conn, error) {
		dials.Add(1)
		return agentd.DialLoopback(ctx, port)
	}}
	links(t, g, func(t *testing.T, link vmm.Link) {
		s := open(t, link)
		if _, err := s.DialTCP(within(t), port, false); !fault.Is(err, fault.Unavailable) {
			t.Errorf("nobody listens, no wait: %v, want unavailable", err)
		}
		if _, err := s.DialTCP(within(t), 65536, false); !fault.Is(err, fault.Invalid) {
			t.Errorf("port 65536: %v, want invalid", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := s.DialTCP(ctx, port, true); !fault.Is(err, fault.Timeout) {
			t.Errorf("nobody listens, wait: %v, want timeout", err)
		}
		// The guest stops trying when the host has given up: two trials are the last it may begin.
		time.Sleep(50 * time.Millisecond)
		before := dials.Load()
		time.Sleep(600 * time.Millisecond)
		if after := dials.Load(); after > before+1 {
			t.Errorf("the guest dialled %d times after the host gave up", after-before)
		}

		dials.Store(0)
		listening := make(chan net.Listener, 1)
		go func() {
			for dials.Load() < 3 { // it has waited indeed
				time.Sleep(time.Millisecond)
			}
			l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
			if err != nil {
				t.Error(err)
			}
			listening <- l
			if conn, err := l.Accept(); err == nil {
				_, _ = io.WriteString(conn, "SSH-2.0")
				conn.Close()
			}
		}()
		conn, err := s.DialTCP(within(t), port, true)
		defer (<-listening).Close()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got, err := io.ReadAll(conn); err != nil || string(got) != "SSH-2.0" {
			t.Errorf("got %q, %v: the first bytes must not be lost to the wait", got, err)
		}
	})
}

// TestHardCuts breaks a port 20 times in the middle of a transfer. Each next client, and the guest,
// first get what was on the way, and as much noise as a port was seen to hold.
func TestHardCuts(t *testing.T) {
	zeros := loopback(t, func(c *net.TCPConn) {
		for {
			if _, err := c.Write(make([]byte, 32<<10)); err != nil {
				return
			}
		}
	})
	p := newPort(t, &agentd.Guest{Version: "v1", Stages: &agentd.Stages{}, DialTCP: agentd.DialLoopback})
	for i := range 20 {
		s := open(t, p.link())
		if h, err := s.Client().Health(within(t), &agentv1.HealthRequest{}); err != nil || h.AgentVersion != "v1" {
			t.Fatalf("after %d cuts: %v, %v", i, h, err)
		}
		conn, err := s.DialTCP(within(t), zeros, false)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, conn, int64(50_000+i*3001)); err != nil {
			t.Fatal(err)
		}
		p.last.Close()
		select {
		case <-s.Done():
		case <-time.After(bound):
			t.Fatal("the session outlived its link")
		}
		toHost, toGuest := p.toHost, p.toGuest
		p.stale = func() ([]byte, []byte) {
			noise := make([]byte, i*3000)
			rand.Read(noise)
			// The cut goes through a frame of the handshake too, every few times.
			return slices.Concat(noise, toHost.cut(12+i*3139)), toGuest.cut(i * 57)
		}
	}
	if n := p.sessions.Load(); n != 20 {
		t.Errorf("%d connections for 20 sessions: a handshake failed and was repeated", n)
	}
}

func TestDialTCPAfterClose(t *testing.T) {
	links(t, &agentd.Guest{Stages: &agentd.Stages{}}, func(t *testing.T, link vmm.Link) {
		s := open(t, link)
		if err := errors.Join(s.Close(), s.Close()); err != nil {
			t.Error(err)
		}
		<-s.Done()
		if _, err := s.DialTCP(within(t), 22, true); !fault.Is(err, fault.Unavailable) {
			t.Errorf("got %v, want unavailable", err)
		}
	})
}

// TestForwardEnds: each direction of a forwarded connection ends by itself, without a half-close of the
// link, and what breaks is no end.
func TestForwardEnds(t *testing.T) {
	echoAfterEnd := loopback(t, func(c *net.TCPConn) {
		all, err := io.ReadAll(c)
		if err == nil {
			_, _ = c.Write(all)
		}
	})
	endsFirst := loopback(t, func(c *net.TCPConn) { // and takes what comes until it ends
		_, _ = c.Write([]byte("bye"))
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, c)
	})
	broken := make(chan error, 2)
	listens := loopback(t, func(c *net.TCPConn) {
		_, err := io.Copy(io.Discard, c)
		broken <- err
	})
	sent := make([]byte, 3<<20)
	rand.Read(sent)
	links(t, &agentd.Guest{Stages: &agentd.Stages{}, DialTCP: agentd.DialLoopback}, func(t *testing.T, link vmm.Link) {
		s := open(t, link)
		forward := func(port int) (net.Conn, *frame.Duplex) {
			t.Helper()
			conn, err := s.DialForward(within(t), port)
			if err != nil {
				t.Fatal(err)
			}
			return conn, frame.NewDuplex(conn)
		}
		_, ends := forward(echoAfterEnd)
		if _, err := ends.Write(sent); err != nil {
			t.Fatal(err)
		}
		if err := ends.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(ends)
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("got %d of %d bytes back, %v", len(got), len(sent), err)
		}
		_ = ends.Close()

		_, ends = forward(endsFirst)
		got, err = io.ReadAll(ends)
		if err != nil || string(got) != "bye" {
			t.Errorf("got %q, %v", got, err)
		}
		if _, err := ends.Write(sent); err != nil {
			t.Errorf("after the guest's end: %v", err)
		}
		_ = ends.Close()

		_, ends = forward(listens)
		if _, err := ends.Write([]byte("half of")); err != nil {
			t.Fatal(err)
		}
		_ = ends.Close()
		select {
		case err := <-broken:
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("a connection that broke on the way ended with %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("a connection that broke on the way stays open")
		}

		if _, err := s.DialForward(within(t), 1); !fault.Is(err, fault.Unavailable) {
			t.Errorf("a port where nobody listens: %v", err)
		}
		if _, err := s.DialForward(within(t), 0); !fault.Is(err, fault.Invalid) {
			t.Errorf("port 0: %v", err)
		}
	})
}
