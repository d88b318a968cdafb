package agentd

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/wire"
)

// listTime bounds the sending of one list of ports.
const listTime = 30 * time.Second

// follower is who is told of the guest's ports: the daemon that asked last. The one before may be gone without a word.
type follower struct {
	mu   sync.Mutex
	end  context.CancelFunc // of the one that is served; nil: none was
	done chan struct{}
}

// take ends whoever is served, waits for that, and returns when it is ctx's turn. left is to be called at its end.
func (f *follower) take(ctx context.Context) (mine context.Context, left func(), err error) {
	mine, end := context.WithCancel(ctx)
	done := make(chan struct{})
	f.mu.Lock()
	before, over := f.end, f.done
	f.end, f.done = end, done
	f.mu.Unlock()
	left = func() {
		end()
		close(done)
	}
	if before == nil {
		return mine, left, nil
	}
	before()
	select {
	case <-over:
		return mine, left, nil
	case <-mine.Done(): // another one came meanwhile; it waits for this one
		<-over
		left()
		return nil, nil, mine.Err()
	}
}

// followPorts serves a stream that tells of the guest's ports, until the host or ctx ends it.
func (s *Server) followPorts(ctx context.Context, conn net.Conn) {
	if s.guest.FollowPorts == nil { // as an agent that does not know the kind
		return
	}
	if wire.WriteAnswer(conn, nil) != nil {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // the host says nothing more: a read that returns is its end
		_, _ = io.Copy(io.Discard, conn)
		cancel()
	}()
	mine, left, err := s.ports.take(ctx)
	if err != nil {
		return
	}
	defer left()
	stop := context.AfterFunc(mine, func() { _ = conn.Close() })
	defer stop()
	// However it ends, the host sees the stream's end, and asks again if it wants to.
	_ = s.guest.FollowPorts(mine, func(ports []uint16) error {
		return errors.Join(conn.SetWriteDeadline(time.Now().Add(listTime)), wire.WritePorts(conn, ports))
	})
}
