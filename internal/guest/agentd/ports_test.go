package agentd_test

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// listener is a guest that gives each who follows its ports a channel of its own for the lists: the one before may still be
// there when the next is answered.
func listener(followers chan<- chan<- []uint16) *agentd.Guest {
	return &agentd.Guest{Stages: &agentd.Stages{}, FollowPorts: func(ctx context.Context, send func([]uint16) error) error {
		lists := make(chan []uint16)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case followers <- lists:
		}
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case l := <-lists:
				if l == nil {
					return errors.New("broken")
				}
				if err := send(l); err != nil {
					return err
				}
			}
		}
	}}
}

// followed asks for the guest's ports, and returns the stream and where the guest takes its lists from.
func followed(t *testing.T, s *agent.Session, followers <-chan chan<- []uint16) (conn net.Conn, lists chan<- []uint16) {
	t.Helper()
	conn, err := s.DialStream(within(t), wire.KindPorts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetReadDeadline(time.Now().Add(bound)); err != nil {
		t.Fatal(err)
	}
	select {
	case lists = <-followers:
	case <-time.After(bound):
		t.Fatal("nobody follows the guest's ports")
	}
	return conn, lists
}

// TestFollowPorts has lists come over a stream as they change, until the host ends it or the guest cannot go on.
func TestFollowPorts(t *testing.T) {
	followers := make(chan chan<- []uint16)
	links(t, listener(followers), func(t *testing.T, link vmm.Link) {
		s := open(t, link)
		for range 2 {
			conn, lists := followed(t, s, followers)
			for _, want := range [][]uint16{{22}, {}, {22, 3000}} {
				lists <- want
				if got, err := wire.ReadPorts(conn); err != nil || !slices.Equal(got, want) {
					t.Errorf("%v came as %v, %v", want, got, err)
				}
			}
			if _, err := s.Client().Health(within(t), &agentv1.HealthRequest{}); err != nil {
				t.Errorf("beside it, the agent says %v", err)
			}
			_ = conn.Close()
		}
		conn, lists := followed(t, s, followers)
		lists <- nil
		if got, err := wire.ReadPorts(conn); !errors.Is(err, io.EOF) {
			t.Errorf("a guest that cannot go on says %v, %v", got, err)
		}
	})
}

// TestFollowPortsAnew: whoever asks last is told, and the one before sees its stream end.
func TestFollowPortsAnew(t *testing.T) {
	followers := make(chan chan<- []uint16)
	s := open(t, streamLink(t, listener(followers)))
	old, lists := followed(t, s, followers)
	lists <- []uint16{1} // it is served
	if _, err := wire.ReadPorts(old); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		next, lists := followed(t, s, followers)
		if _, err := wire.ReadPorts(old); !errors.Is(err, io.EOF) {
			t.Errorf("the one before: %v", err)
		}
		lists <- []uint16{2}
		if got, err := wire.ReadPorts(next); err != nil || !slices.Equal(got, []uint16{2}) {
			t.Errorf("the next one is told %v, %v", got, err)
		}
		old = next
	}
}

// TestNoFollowPorts is an agent that cannot tell, or is of a version that does not know it.
func TestNoFollowPorts(t *testing.T) {
	s := open(t, streamLink(t, &agentd.Guest{Stages: &agentd.Stages{}}))
	if _, err := s.DialStream(within(t), wire.KindPorts); !fault.Is(err, fault.VersionSkew) {
		t.Errorf("%v", err)
	}
}

// TestIdleWhileFollowed: who is told of ports keeps the guest from nothing.
func TestIdleWhileFollowed(t *testing.T) {
	followers, idle := make(chan chan<- []uint16), make(chan struct{}, 4)
	g := listener(followers)
	g.Idle = func() { idle <- struct{}{} }
	conn, lists := followed(t, open(t, streamLink(t, g)), followers)
	select {
	case <-idle:
	case <-time.After(bound):
		t.Error("never idle")
	}
	lists <- []uint16{1}
	if _, err := wire.ReadPorts(conn); err != nil {
		t.Error(err)
	}
}
