package agentd_test

import (
	"context"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// TestVerbs calls over both links what the daemon asks a running guest.
func TestVerbs(t *testing.T) {
	var off atomic.Int64
	off.Store(int64(time.Hour))
	g := &agentd.Guest{
		Stages: &agentd.Stages{},
		Stats:  func(context.Context) (*agentv1.StatsResponse, error) { return &agentv1.StatsResponse{Cpus: 3}, nil },
		Ports: func(context.Context) (*agentv1.PortsResponse, error) {
			return &agentv1.PortsResponse{Listeners: []*agentv1.Listener{{Protocol: "tcp", Port: 22}}}, nil
		},
		Trim: func(context.Context) (*agentv1.TrimResponse, error) {
			return &agentv1.TrimResponse{Trimmed: []*agentv1.Trimmed{{Target: "/", Bytes: 5}}}, nil
		},
		Now:    func() time.Time { return time.Now().Add(-time.Duration(off.Load())) },
		SetNow: func(to time.Time) error { off.Store(int64(time.Since(to))); return nil },
	}
	links(t, g, func(t *testing.T, link vmm.Link) {
		off.Store(int64(time.Hour))
		c := open(t, link).Client()
		ctx := within(t)
		if r, err := c.Stats(ctx, &agentv1.StatsRequest{}); err != nil || r.Cpus != 3 {
			t.Errorf("stats: %v, %v", r, err)
		}
		if r, err := c.Ports(ctx, &agentv1.PortsRequest{}); err != nil || len(r.Listeners) != 1 {
			t.Errorf("ports: %v, %v", r, err)
		}
		if r, err := c.Trim(ctx, &agentv1.TrimRequest{}); err != nil || len(r.Trimmed) != 1 {
			t.Errorf("trim: %v, %v", r, err)
		}
		for _, stepped := range []bool{true, false} { // an hour behind, then right
			r, err := c.SetClock(ctx, &agentv1.SetClockRequest{UnixMs: time.Now().UnixMilli()})
			if err != nil || r.Stepped != stepped || stepped != (r.OffMs > 3_000_000) {
				t.Errorf("clock: %v, %v; want stepped %v", r, err, stepped)
			}
		}
	})
	links(t, &agentd.Guest{Stages: &agentd.Stages{}}, func(t *testing.T, link vmm.Link) {
		c := open(t, link).Client()
		ctx := within(t)
		_, stats := c.Stats(ctx, &agentv1.StatsRequest{})
		_, ports := c.Ports(ctx, &agentv1.PortsRequest{})
		_, trim := c.Trim(ctx, &agentv1.TrimRequest{})
		_, clock := c.SetClock(ctx, &agentv1.SetClockRequest{})
		for _, err := range []error{stats, ports, trim, clock} {
			if connect.CodeOf(err) != connect.CodeUnimplemented {
				t.Errorf("a guest without: %v", err)
			}
		}
	})
}

// TestClockOfAnOldQuestion: a question of before the guest stood still, which it finds beside the one after, does not set its clock.
func TestClockOfAnOldQuestion(t *testing.T) {
	var set []time.Time
	now := time.Unix(1000, 0)
	g := &agentd.Guest{Stages: &agentd.Stages{}, Now: func() time.Time { return now }, SetNow: func(at time.Time) error {
		set, now = append(set, at), at
		return nil
	}}
	c := open(t, streamLink(t, g)).Client()
	for _, q := range []struct{ unix, sent int64 }{{5000, 200}, {4990, 190}, {3000, 300}, {6000, 0}} { // the host's clock may go back
		if _, err := c.SetClock(within(t), &agentv1.SetClockRequest{UnixMs: q.unix * 1000, SentBoottimeMs: q.sent}); err != nil {
			t.Fatal(err)
		}
	}
	if want := []time.Time{time.Unix(5000, 0), time.Unix(3000, 0), time.Unix(6000, 0)}; !slices.EqualFunc(set, want, time.Time.Equal) {
		t.Errorf("set to %v, want %v", set, want)
	}
}

// TestAHundredCallsAtOnce are all answered, over few connections: each costs the guest a handshake, and a slow one some 60 ms.
func TestAHundredCallsAtOnce(t *testing.T) {
	g := &agentd.Guest{Stages: &agentd.Stages{}, Stats: func(context.Context) (*agentv1.StatsResponse, error) {
		return &agentv1.StatsResponse{Cpus: 1}, nil
	}}
	links(t, g, func(t *testing.T, link vmm.Link) {
		var dialled atomic.Int32
		dial := link.Dial
		link.Dial = func(ctx context.Context) (net.Conn, error) {
			dialled.Add(1)
			return dial(ctx)
		}
		c := open(t, link).Client()
		ctx := within(t)
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				if _, err := c.Stats(ctx, &agentv1.StatsRequest{}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		// At most 16 at a time; one that nobody waits for when its call ends is closed, and made anew for the next.
		if n := dialled.Load(); n > 50 {
			t.Errorf("%d connections for a hundred calls", n)
		}
	})
}

// TestForwardsLeaveRoom: as many connections as a guest forwards keep nobody from asking it, and one more is told why it is refused.
func TestForwardsLeaveRoom(t *testing.T) {
	port := loopback(t, func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)) })
	// Over vsock: yamux takes up to a minute to end a session of a port that has as many streams just closing.
	s := open(t, streamLink(t, &agentd.Guest{Stages: &agentd.Stages{}, DialTCP: agentd.DialLoopback}))
	ctx := within(t)
	var conns []net.Conn
	for i := range wire.MaxForwards {
		c, err := s.DialTCP(ctx, port, false)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	if _, err := s.DialForward(ctx, port); err == nil || !strings.Contains(err.Error(), "as many as it may") {
		t.Errorf("one more: %v", err)
	}
	if _, err := s.Client().Health(ctx, &agentv1.HealthRequest{}); err != nil {
		t.Errorf("it cannot be asked: %v", err)
	}
	_ = conns[0].Close()
	for ctx.Err() == nil { // its end is seen when the guest sees it
		if c, err := s.DialForward(ctx, port); err == nil {
			_ = c.Close()
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Error("nothing is forwarded after one ended")
}

// TestIdle is told some time after the last stream, and not while one is open. A server of its own: the links
// above make one for each session.
func TestIdle(t *testing.T) {
	idle := make(chan time.Time, 4)
	s := open(t, streamLink(t, &agentd.Guest{Stages: &agentd.Stages{}, Idle: func() { idle <- time.Now() }}))
	if _, err := s.Client().Health(within(t), &agentv1.HealthRequest{}); err != nil {
		t.Fatal(err)
	}
	if len(idle) != 0 {
		t.Error("idle with a connection open")
	}
	closed := time.Now()
	if err := s.Close(); err != nil { // its idle connections with it
		t.Fatal(err)
	}
	select {
	case at := <-idle:
		if at.Sub(closed) < 4*time.Second {
			t.Errorf("idle after %s", at.Sub(closed))
		}
	case <-time.After(bound):
		t.Error("never idle")
	}
}
