// Package agent owns the host's end of sessions with a guest's agent: a Session over a vmm.Link. What both ends share is
// internal/guest/wire, the guest's end internal/guest/agentd.
//
// The package never starts or stops a VM and never trusts the peer: lengths, times, streams and
// message sizes are bounded.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/yamux"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/api/banger/agent/v1/agentv1connect"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// Bounds of opening a session and a stream.
const (
	// A vsock of a guest that is still booting refuses, hangs, or closes without a byte: each try is bounded and repeated,
	// for the word that it listens (vmm.Link.Up) is missing where the VMM or the agent has none.
	tryTime  = time.Second
	tryPause = 100 * time.Millisecond
	upTime   = 3 * time.Second // the wait for that word
	// portTryTime is how long one connection to a port waits for the agent before it is given up for
	// a fresh one: a guest that missed that the host came anew sees it then.
	portTryTime = 20 * time.Second
	// answerTime bounds the answer to a header that does not wait, if the context does not.
	answerTime = 30 * time.Second
	// maxCalls bounds the calls under way at once, others wait for their connections: a handshake of each would keep a slow
	// guest for longer than the callers wait.
	maxCalls = 16
)

// Session is an authenticated way to one guest's agent. Safe for concurrent use. It holds no lock
// on the VM and ends by Close, or, on a Mux link, when the link breaks.
type Session struct {
	link   vmm.Link
	secret string
	mux    *yamux.Session // nil without Mux
	room   chan struct{}  // for streams of mux: taken by each until both of its ends are closed
	http   *http.Transport
	client agentv1connect.AgentServiceClient

	closeOnce sync.Once
	done      chan struct{} // without Mux
}

// Open returns when the guest's agent has answered the handshake. It tries until ctx ends.
// fault.Timeout or Cancelled if ctx ends first, with the last try's error as cause;
// fault.Permission if a guest answered that does not know the secret: it is not this VM's.
func Open(ctx context.Context, link vmm.Link, secret string) (*Session, error) {
	if secret == "" {
		return nil, fault.New(fault.Internal, "agent", "a session needs the VM's secret")
	}
	if link.Up != nil {
		select {
		case <-link.Up:
		case <-ctx.Done():
		case <-time.After(upTime):
		}
	}
	var last error
	for {
		s, err := open(ctx, link, secret)
		switch {
		case err == nil:
			return s, nil
		case errors.Is(err, wire.ErrSecret):
			return nil, fault.Wrap(err, fault.Permission, "agent", "another guest answered in this VM's place")
		case ctx.Err() == nil || last == nil:
			last = err
		}
		select {
		case <-ctx.Done():
			return nil, fault.Wrap(errors.Join(ctx.Err(), last), fault.CodeOf(ctx.Err()), "agent", "the guest's agent did not answer").
				WithHint("the VM's console log says how far it booted")
		case <-time.After(tryPause):
		}
	}
}

func open(ctx context.Context, link vmm.Link, secret string) (*Session, error) {
	s := &Session{link: link, secret: secret, room: make(chan struct{}, wire.MaxStreams), done: make(chan struct{})}
	conn, err := s.shake(ctx)
	if err != nil {
		return nil, err
	}
	if link.Mux {
		// The guest is told to open no streams, and yamux resets those it opens all the same.
		s.mux, err = wire.DialMux(conn)
		if err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		if err := s.mux.GoAway(); err != nil {
			return nil, errors.Join(err, s.mux.Close())
		}
	} else if err := conn.Close(); err != nil {
		return nil, err
	}
	s.http = &http.Transport{
		// The transport dials on when the call that it was for is over (net/http, Transport.DialContext).
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, answerTime)
			defer cancel()
			return s.stream(ctx, wire.Header{Kind: wire.KindHTTP})
		},
		DisableCompression:     true,
		MaxConnsPerHost:        maxCalls,
		MaxIdleConnsPerHost:    2,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 16 << 10,
	}
	s.client = agentv1connect.NewAgentServiceClient(&http.Client{Transport: s.http}, "http://agent",
		connect.WithReadMaxBytes(wire.MaxMessage), connect.WithAcceptCompression("gzip", nil, nil))
	return s, nil
}

// shake dials the link and passes the handshake, within ctx and the bound of one try.
func (s *Session) shake(ctx context.Context) (net.Conn, error) {
	bound := tryTime
	if s.link.Mux {
		bound = portTryTime
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	conn, err := s.link.Dial(ctx)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	// A cancelled ctx must end the handshake's read as well.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	err = wire.HostHandshake(conn, s.link.Mux, s.secret, deadline)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = conn.Close() // closed by the AfterFunc perhaps; the handshake's error is the one that matters
		return nil, err
	}
	return conn, nil
}

// stream opens a stream and sends its header.
func (s *Session) stream(ctx context.Context, h wire.Header) (net.Conn, error) {
	select {
	case <-s.Done():
		return nil, net.ErrClosed
	default:
	}
	if s.mux != nil {
		return s.muxStream(ctx, h)
	}
	for {
		conn, err := s.shake(ctx)
		if err == nil {
			if _, err = io.WriteString(conn, h.String()); err != nil {
				return nil, errors.Join(err, conn.Close())
			}
			return conn, nil
		}
		if errors.Is(err, wire.ErrSecret) {
			return nil, err
		}
		// The agent is being restarted by its supervisor, or has all its streams in use.
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), err)
		case <-s.done:
			return nil, net.ErrClosed
		case <-time.After(tryPause):
		}
	}
}

// muxStream opens a stream of a port, and sends its header. What yamux does meanwhile waits for the guest to read, and
// knows no ctx: it is left to end behind the caller's back, with the guest's reading or the session.
func (s *Session) muxStream(ctx context.Context, h wire.Header) (net.Conn, error) {
	select {
	case s.room <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-s.Done():
		return nil, net.ErrClosed
	}
	opened, failed := make(chan net.Conn), make(chan error, 1)
	go func() {
		stream, err := s.mux.OpenStream()
		if err != nil {
			<-s.room
			failed <- err
			return
		}
		conn := &muxConn{Stream: stream, session: s, closed: make(chan struct{}), reading: make(chan struct{}, 1)}
		if _, err := io.WriteString(conn, h.String()); err != nil {
			failed <- errors.Join(err, conn.Close())
			return
		}
		select {
		case opened <- conn:
		case <-ctx.Done():
			_ = conn.Close()
		}
	}()
	select {
	case conn := <-opened:
		return conn, nil
	case err := <-failed:
		return nil, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Client is the agent's API over the session's streams.
func (s *Session) Client() agentv1connect.AgentServiceClient { return s.client }

// DialTCP opens a TCP connection to a port on the guest's loopback. With wait the agent waits until
// something listens there: until ctx ends or two minutes have passed. The connection has a
// CloseWrite; without Mux it is the very connection that the link dialled.
// fault.Unavailable with what the guest said if it refused, fault.Timeout or Cancelled if ctx ended.
func (s *Session) DialTCP(ctx context.Context, port int, wait bool) (net.Conn, error) {
	subject := fmt.Sprintf("guest port %d", port)
	if port < 1 || port > 65535 {
		return nil, fault.New(fault.Invalid, subject, "a port is a number from 1 to 65535")
	}
	if !wait {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, answerTime)
		defer cancel()
	}
	return s.dial(ctx, subject, wire.Header{Kind: wire.KindTCP, Port: port, Wait: wait})
}

// DialAddress is DialTCP without wait, to another address of the guest's. An agent of an older version refuses that as one that
// cannot be reached.
func (s *Session) DialAddress(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	bounded, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	return s.dial(bounded, "guest address "+to.String(), wire.Header{Kind: wire.KindTCP, Port: int(to.Port()), Address: to.Addr()})
}

// DialStream opens a stream of another kind that the agent answers: wire.KindExec or wire.KindCopy. As with
// DialTCP it has a CloseWrite, and without Mux it is the very connection that the link dialled.
// fault.VersionSkew, with what is missing, if the agent is of a version that does not know the kind.
func (s *Session) DialStream(ctx context.Context, kind wire.Kind) (net.Conn, error) {
	return s.dialKind(ctx, "guest agent", wire.Header{Kind: kind})
}

// DialForward opens a TCP connection to a port on the guest's loopback, where something listens now. The stream carries the
// frames of frame.Duplex, and is the link's own connection as with DialTCP. Errors are DialTCP's and DialStream's.
func (s *Session) DialForward(ctx context.Context, port int) (net.Conn, error) {
	subject := fmt.Sprintf("guest port %d", port)
	if port < 1 || port > 65535 {
		return nil, fault.New(fault.Invalid, subject, "a port is a number from 1 to 65535")
	}
	return s.dialKind(ctx, subject, wire.Header{Kind: wire.KindForward, Port: port})
}

// dialKind opens a stream of a kind that an agent of another version may not know.
func (s *Session) dialKind(ctx context.Context, subject string, header wire.Header) (net.Conn, error) {
	kind := header.Kind
	bounded, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	conn, err := s.dial(bounded, subject, header)
	if err == nil || ctx.Err() != nil {
		return conn, err
	}
	// An agent that does not know a header closes the stream without a word.
	h, unwell := s.client.Health(bounded, &agentv1.HealthRequest{})
	if unwell == nil && !slices.Contains(h.GetFeatures(), string(kind)) {
		return nil, fault.Wrap(err, fault.VersionSkew, "guest agent", "the VM was started by another version of banger (%s), whose agent lacks the feature %q", boot.Printable(h.GetAgentVersion()), kind)
	}
	return nil, err
}

// dial opens a stream that the guest answers, and waits for the answer until ctx ends.
func (s *Session) dial(ctx context.Context, subject string, h wire.Header) (net.Conn, error) {
	conn, err := s.stream(ctx, h)
	if err == nil {
		// A deadline in the past ends the read of either kind of stream; a stream's Close would not.
		stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
		err = wire.ReadAnswer(conn)
		if !stop() && err == nil {
			err = ctx.Err()
		}
		if err != nil {
			_ = conn.Close() // the answer's error is the one that matters
		}
	}
	var refused *wire.RefusedError
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() != nil:
		return nil, fault.Wrap(errors.Join(ctx.Err(), err), fault.CodeOf(ctx.Err()), subject, "nothing answered")
	case errors.As(err, &refused):
		return nil, fault.Wrap(err, fault.Unavailable, subject, "the guest refused the connection")
	default:
		return nil, fault.Wrap(err, fault.Unavailable, subject, "the guest's agent cannot be reached")
	}
}

// Done is closed when the Mux session broke, or by Close.
func (s *Session) Done() <-chan struct{} {
	if s.mux != nil {
		return s.mux.CloseChan()
	}
	return s.done
}

// Close ends the session and, on a Mux link, its streams. Without Mux, connections that DialTCP
// returned live on.
func (s *Session) Close() error {
	var err error
	s.closeOnce.Do(func() {
		s.http.CloseIdleConnections()
		if s.mux != nil {
			err = s.mux.Close()
		}
		close(s.done)
	})
	return err
}

// muxConn is a stream of a port. yamux's Close closes the sending side only; CloseWrite is that,
// and Close ends the stream on both ends.
type muxConn struct {
	*yamux.Stream
	session *Session
	once    sync.Once
	closed  chan struct{} // closed by Close
	reading chan struct{} // has one while somebody reads
}

// given says whether it was given up.
func (c *muxConn) given() bool {
	select {
	case <-c.closed:
		return true
	default:
		return false
	}
}

// Read implements net.Conn. It ends with Close.
func (c *muxConn) Read(b []byte) (int, error) {
	select {
	case c.reading <- struct{}{}:
		defer func() { <-c.reading }()
	case <-c.closed: // who winds it up reads for as long as the guest does not close its end
	}
	if c.given() {
		return 0, net.ErrClosed
	}
	n, err := c.Stream.Read(b)
	if err != nil && c.given() {
		err = net.ErrClosed
	}
	return n, err
}

// Write implements net.Conn. It ends with Close, where yamux waits for a port that takes nothing for as long as its own bound, whatever
// the deadline: that is left to end behind the caller's back, with a copy of what was to be written.
func (c *muxConn) Write(b []byte) (int, error) {
	type result struct {
		n   int
		err error
	}
	done := make(chan result, 1)
	own := slices.Clone(b)
	go func() {
		n, err := c.Stream.Write(own)
		done <- result{n, err}
	}()
	select {
	case r := <-done:
		return r.n, r.err
	case <-c.closed:
		return 0, net.ErrClosed
	}
}

// CloseWrite says that no more comes; reading goes on.
func (c *muxConn) CloseWrite() error { return c.Stream.Close() }

// Close gives the stream up: the guest closes its end too, and what it still sent is discarded. It does not wait for
// the guest, nor for its port to take what was sent before.
func (c *muxConn) Close() error {
	c.once.Do(func() {
		close(c.closed)
		_ = c.SetDeadline(time.Unix(1, 0)) // ends a read, and a write that waits for the guest to read
		go c.abandon()
	})
	return nil
}

// abandon runs until the guest's end is closed, at the latest until the session ends. A stream that
// the guest has closed already needs no cut: reading it to its end finds that out at once.
func (c *muxConn) abandon() {
	defer func() { <-c.session.room }()
	_ = c.Stream.Close() // fails only with the session, which ends the stream as well
	c.reading <- struct{}{}
	defer func() { <-c.reading }()
	_ = c.SetReadDeadline(time.Time{})
	if cut, err := c.session.mux.OpenStream(); err == nil {
		_, _ = io.WriteString(cut, wire.Header{Kind: wire.KindCut, Stream: c.StreamID()}.String())
		_ = cut.Close()
		_, _ = io.Copy(io.Discard, cut)
	}
	_, _ = io.Copy(io.Discard, c.Stream)
}

// LocalAddr implements net.Conn: a port has no addresses.
func (c *muxConn) LocalAddr() net.Addr { return portAddr{} }

// RemoteAddr implements net.Conn: a port has no addresses.
func (c *muxConn) RemoteAddr() net.Addr { return portAddr{} }

type portAddr struct{}

func (portAddr) Network() string { return "virtio-serial" }
func (portAddr) String() string  { return vmm.AgentPortName }
