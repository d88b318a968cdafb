package agentd_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/exec"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// valve is what the guest's ends of a link go through. Closed, the guest stands still: it neither reads nor writes, and no
// connection ends.
type valve struct {
	mu     sync.Mutex
	left   int // bytes that still come out before it closes; negative: it is open
	closed chan struct{}
	opened chan struct{}
}

func newValve() *valve {
	return &valve{left: -1, closed: make(chan struct{}), opened: make(chan struct{})}
}

// after closes it once n more bytes came out.
func (v *valve) after(n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.left = n
	if n == 0 {
		close(v.closed)
	}
}

// pass takes room for n bytes, or less.
func (v *valve) pass(n int) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.left < 0 {
		return n
	}
	n = min(n, v.left)
	if n > 0 && n == v.left {
		close(v.closed)
	}
	v.left -= n
	return n
}

func (v *valve) wait() {
	select {
	case <-v.closed:
		<-v.opened
	default:
	}
}

type valved struct {
	net.Conn
	valve *valve
}

func (c valved) Read(b []byte) (int, error) {
	c.valve.wait()
	n, err := c.Conn.Read(b)
	c.valve.wait() // it was closed while this read waited
	return n, err
}

func (c valved) Write(b []byte) (int, error) {
	n := c.valve.pass(len(b))
	written, err := c.Conn.Write(b[:n])
	if err == nil && n < len(b) {
		c.valve.wait()
		rest, err := c.Conn.Write(b[n:])
		return written + rest, err
	}
	return written, err
}

// valvedLink is a link of either kind to a guest behind a valve, which opens for good when the test ends.
func valvedLink(t testing.TB, mux bool, g *agentd.Guest, v *valve) vmm.Link {
	server := agentd.NewServer(secret, g)
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	t.Cleanup(func() {
		close(v.opened)
		cancel()
		server.Close()
		serving.Wait()
	})
	return vmm.Link{Mux: mux, Dial: func(context.Context) (net.Conn, error) {
		host, guest := socketPair(t)
		serving.Go(func() { _ = server.Serve(ctx, valved{guest, v}, mux) })
		return host, nil
	}}
}

// TestStandstill: a guest whose CPUs stand still in the middle of any answer, at any byte, holds nobody for longer than the bound
// that was given, and not the end of its session either. The same where what was sent to it before fills its port.
func TestStandstill(t *testing.T) {
	const (
		patience = 150 * time.Millisecond
		grace    = 3 * time.Second // of a busy machine
	)
	port := loopback(t, func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)) })
	dir := t.TempDir()
	guest := func() *agentd.Guest {
		return &agentd.Guest{
			Version: "v1", Stages: &agentd.Stages{}, DialTCP: agentd.DialLoopback, Exec: agentd.StartProcess,
			Files: func(p string) string { return filepath.Join(dir, p) },
			Facts: func() agentd.Facts { return agentd.Facts{BootID: "b", Userspace: "running"} },
		}
	}
	stream := func(kind wire.Kind) func(context.Context, *agent.Session) {
		return func(ctx context.Context, s *agent.Session) {
			if c, err := s.DialStream(ctx, kind); err == nil {
				_ = c.Close()
			}
		}
	}
	verbs := map[string]func(context.Context, *agent.Session){
		"health": func(ctx context.Context, s *agent.Session) {
			_, _ = s.Client().Health(ctx, &agentv1.HealthRequest{})
		},
		"boot": func(ctx context.Context, s *agent.Session) {
			if stream, err := s.Client().WatchBoot(ctx, &agentv1.WatchBootRequest{}); err == nil {
				for stream.Receive() {
				}
				_ = stream.Close()
			}
		},
		"tcp": func(ctx context.Context, s *agent.Session) {
			if c, err := s.DialTCP(ctx, port, false); err == nil {
				_ = c.Close()
			}
		},
		"wait": func(ctx context.Context, s *agent.Session) {
			if c, err := s.DialTCP(ctx, port, true); err == nil {
				_ = c.Close()
			}
		},
		"forward": func(ctx context.Context, s *agent.Session) {
			if c, err := s.DialForward(ctx, port); err == nil {
				_ = c.Close()
			}
		},
		"exec": stream(wire.KindExec),
		"cp":   stream(wire.KindCopy),
		"run": func(ctx context.Context, s *agent.Session) {
			if c, err := s.DialStream(ctx, wire.KindExec); err == nil {
				_, _ = exec.Run(ctx, c, exec.Request{Args: []string{"true"}, Dir: "/"}, exec.Streams{Stdout: &counter{}, Stderr: &counter{}})
			}
		},
	}
	run := func(name string, mux bool, at int, fill bool) {
		what := fmt.Sprintf("%s, port %v, after %d bytes, full %v", name, mux, at, fill)
		v := newValve()
		ctx, done := context.WithTimeout(t.Context(), bound)
		defer done()
		s, err := agent.Open(ctx, valvedLink(t, mux, guest(), v), secret)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		if fill {
			c, err := s.DialTCP(ctx, port, false)
			if err != nil {
				t.Errorf("%s: %v", what, err)
				return
			}
			v.after(at)
			filled := make(chan struct{})
			go func() { // more than a port's buffers take
				defer close(filled)
				for range 64 {
					if _, err := c.Write(make([]byte, 64<<10)); err != nil {
						return
					}
				}
			}()
			time.Sleep(20 * time.Millisecond)
			defer func() { <-filled }()
		} else {
			v.after(at)
		}
		bounded, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		began := time.Now()
		verbs[name](bounded, s)
		if took := time.Since(began); took > patience+grace {
			t.Errorf("%s: it took %s of %s", what, took, patience)
		}
		began = time.Now()
		_ = s.Close()
		if took := time.Since(began); took > grace {
			t.Errorf("%s: the session's end took %s", what, took)
		}
	}
	var all sync.WaitGroup
	defer all.Wait()
	slots := make(chan struct{}, 64)
	start := func(name string, mux bool, at int, fill bool) {
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			run(name, mux, at, fill)
		})
	}
	for name := range verbs {
		for at := 0; at < 420; at += 29 {
			start(name, false, at, false)
			start(name, true, at, false)
		}
		start(name, true, 0, true)
	}
}

// TestStandstillOfAKeptConnection: a call over a connection that was opened before the guest stood still, and a port that takes nothing any more,
// ends with its context all the same.
func TestStandstillOfAKeptConnection(t *testing.T) {
	port := loopback(t, func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)) })
	v := newValve()
	s, err := agent.Open(within(t), valvedLink(t, true, &agentd.Guest{Stages: &agentd.Stages{}, DialTCP: agentd.DialLoopback}, v), secret)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Client().Health(within(t), &agentv1.HealthRequest{}); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	defer all.Wait()
	defer s.Close()
	var conns []net.Conn
	for range 8 { // whose windows are more than the port's buffers take
		c, err := s.DialTCP(within(t), port, false)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	v.after(0)
	for _, c := range conns {
		all.Go(func() { _, _ = c.Write(make([]byte, 1<<20)) })
	}
	time.Sleep(50 * time.Millisecond)
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
		began := time.Now()
		_, err := s.Client().Health(ctx, &agentv1.HealthRequest{})
		cancel()
		if took := time.Since(began); err == nil || took > 5*time.Second {
			t.Errorf("%v after %s", err, took)
		}
	}
}

type counter struct{ n int }

func (c *counter) Write(b []byte) (int, error) {
	c.n += len(b)
	return len(b), nil
}

// TestStandstillAgain: a guest that stands still for long is asked again and again. Each question takes what the first one took, also when there are more
// streams that nobody took than a port has room for.
func TestStandstillAgain(t *testing.T) {
	v := newValve()
	s, err := agent.Open(within(t), valvedLink(t, true, &agentd.Guest{Stages: &agentd.Stages{}, DialTCP: agentd.DialLoopback}, v), secret)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	v.after(0)
	for i := range 2*wire.MaxStreams + 10 {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Millisecond)
		began := time.Now()
		if c, err := s.DialTCP(ctx, 1, false); err == nil {
			_ = c.Close()
		}
		cancel()
		if took := time.Since(began); took > 3*time.Second {
			t.Fatalf("question %d took %s", i, took)
		}
	}
}

// TestReadAfterClose: a read of a stream that was given up ends, also one that comes while the guest, which stands still, has not
// closed its end.
func TestReadAfterClose(t *testing.T) {
	port := loopback(t, func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)) })
	v := newValve()
	s, err := agent.Open(within(t), valvedLink(t, true, &agentd.Guest{Stages: &agentd.Stages{}, DialTCP: agentd.DialLoopback}, v), secret)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c, err := s.DialTCP(within(t), port, false)
	if err != nil {
		t.Fatal(err)
	}
	v.after(0)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		ended := make(chan error, 1)
		go func() {
			_, err := c.Read(make([]byte, 1))
			ended <- err
		}()
		select {
		case err := <-ended:
			if !errors.Is(err, net.ErrClosed) {
				t.Fatalf("a read after Close: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("a read after Close has not ended in 5 s")
		}
		time.Sleep(time.Millisecond) // the stream is wound up behind the caller's back
	}
}
