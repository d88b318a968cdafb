package agentd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/frame"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
)

// Bounds of a forwarded connection's beginning.
const (
	waitTime    = 2 * time.Minute
	dialTime    = 10 * time.Second
	firstRetry  = 20 * time.Millisecond
	slowestTry  = 250 * time.Millisecond
	lingerAfter = 0 // a cut connection is reset, not left half open
)

// forward connects a stream with a port of the guest's loopback and copies until both directions
// have ended, or ctx ends.
func (s *Server) forward(ctx context.Context, stream net.Conn, h wire.Header) {
	select {
	case s.tcp <- struct{}{}:
		defer func() { <-s.tcp }()
	default:
		_ = wire.WriteAnswer(stream, fmt.Errorf("the guest forwards %d connections, which is as many as it may", wire.MaxForwards)) // a host that is gone needs none
		return
	}
	tcp, err := s.dial(ctx, stream, h)
	if err == nil {
		defer tcp.Close()
	}
	if wire.WriteAnswer(stream, err) != nil || err != nil {
		return
	}
	stop := context.AfterFunc(ctx, func() {
		reset(tcp)
		_ = stream.Close() // ends the read: the host has closed its end, or the session is over
	})
	defer stop()
	other := io.ReadWriteCloser(stream)
	if h.Kind == wire.KindForward {
		other = frame.NewDuplex(stream)
	}
	var both sync.WaitGroup
	both.Go(func() { pump(other, tcp) })
	both.Go(func() { pump(tcp, other) })
	both.Wait()
	if h.Kind == wire.KindForward && stream.SetReadDeadline(time.Now().Add(partTime)) == nil {
		_, _ = io.Copy(io.Discard, stream) // until the host closes its end: what was sent last must not be lost in ours being closed
	}
}

// reset closes a connection so that its other side does not take that for the end of what was sent.
func reset(conn io.Closer) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(lingerAfter)
	}
	_ = conn.Close()
}

// pump copies src to dst and passes the end on. An end is a half-close; a failure ends both, since
// neither side could be told of it otherwise.
func pump(dst, src io.ReadWriteCloser) {
	_, err := io.Copy(dst, src)
	if err != nil {
		reset(dst)
		reset(src)
		return
	}
	if half, ok := dst.(interface{ CloseWrite() error }); !ok || half.CloseWrite() != nil {
		_ = dst.Close()
	}
}

// dial connects to the port, waiting for a listener if h says so, until the host closes the stream.
func (s *Server) dial(ctx context.Context, stream net.Conn, h wire.Header) (net.Conn, error) {
	dial := s.guest.DialTCP
	if h.Address.IsValid() && s.guest.DialAddress != nil {
		dial = func(ctx context.Context, port int) (net.Conn, error) {
			return s.guest.DialAddress(ctx, netip.AddrPortFrom(h.Address, uint16(port)))
		}
	} else if h.Address.IsValid() {
		dial = nil
	}
	if dial == nil {
		return nil, errors.New("this guest forwards no connections")
	}
	if !h.Wait {
		ctx, cancel := context.WithTimeout(ctx, dialTime)
		defer cancel()
		return dial(ctx, h.Port)
	}
	ctx, cancel := context.WithTimeout(ctx, waitTime)
	defer cancel()
	// The host says nothing before the answer, so a read that returns means it is gone.
	watched := make(chan error, 1)
	go func() {
		_, err := stream.Read(make([]byte, 1))
		watched <- err
		cancel()
	}()
	tcp, err := dialWaiting(ctx, dial, h.Port)
	if deadlineErr := stream.SetReadDeadline(time.Unix(1, 0)); deadlineErr != nil {
		err = errors.Join(err, deadlineErr)
	}
	readErr := <-watched
	var timeout net.Error
	if !errors.As(readErr, &timeout) || !timeout.Timeout() {
		err = errors.Join(err, errors.New("the host did not wait for the answer"))
	}
	err = errors.Join(err, stream.SetReadDeadline(time.Time{}))
	if err != nil && tcp != nil {
		return nil, errors.Join(err, tcp.Close())
	}
	return tcp, err
}

// dialWaiting tries again while nobody listens. The kernel announces no listener to anyone, hence
// the bounded retry: a refused connection on loopback costs microseconds.
func dialWaiting(ctx context.Context, dial func(context.Context, int) (net.Conn, error), port int) (net.Conn, error) {
	for pause := firstRetry; ; pause = min(2*pause, slowestTry) {
		tcp, err := dial(ctx, port)
		if err == nil || !notYet(err) {
			return tcp, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("nothing listens on port %d", port)
		case <-time.After(pause):
		}
	}
}

// notYet says that a port may answer later: nobody listens, or the system has not configured its
// loopback so far.
func notYet(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.EADDRNOTAVAIL)
}

// DialAddress is a Guest's DialAddress.
func DialAddress(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", to.String())
}

// DialLoopback is a Guest's DialTCP: 127.0.0.1 first, then ::1.
func DialLoopback(ctx context.Context, port int) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err == nil || !notYet(err) {
		return conn, err
	}
	conn, err6 := d.DialContext(ctx, "tcp", net.JoinHostPort("::1", strconv.Itoa(port)))
	if err6 == nil {
		return conn, nil
	}
	return nil, err // a guest without IPv6 says something else than "refused" on ::1
}
