// Package agentd owns the guest's end of agent sessions: it lets in who knows the VM's secret,
// serves the API of api/banger/agent/v1, runs commands, takes and gives files, and forwards TCP to the guest's loopback.
//
// The server touches the machine it runs on only through a Guest, so that the in-memory VMM runs
// the very same server inside a test. What a real guest does is in Run (live.go). It never writes
// to a disk of its own accord, and keeps no ticker running but where the kernel tells of no listeners: an idle guest stays idle.
package agentd

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/yamux"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/exec"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
)

// Guest is what the server knows of its machine and can do to it. Functions may be called
// concurrently; a nil one is answered as unimplemented.
type Guest struct {
	Version string
	Stages  *Stages
	// Answered is told of each handshake that a host passed.
	Answered func(wire.Opened)
	// Facts must answer at once.
	Facts func() Facts
	// Shutdown asks for an orderly power-off, or a reboot, and returns once it is asked.
	Shutdown func(ctx context.Context, reboot bool) error
	Sync     func(ctx context.Context) error
	Grow     func(ctx context.Context) ([]Grown, error)
	// Stats measures the guest.
	Stats func(ctx context.Context) (*agentv1.StatsResponse, error)
	// Ports lists who listens.
	Ports func(ctx context.Context) (*agentv1.PortsResponse, error)
	// FollowPorts calls send with the TCP ports that others may connect to, at once and whenever they change, until ctx ends
	// or send fails. One call at a time.
	FollowPorts func(ctx context.Context, send func([]uint16) error) error
	// Trim discards what its filesystems do not use.
	Trim func(ctx context.Context) (*agentv1.TrimResponse, error)
	// Now and SetNow are its clock. SetNow steps it.
	Now    func() time.Time
	SetNow func(time.Time) error
	// Idle is called once when no stream has been open for idleTime after there was one: what was needed to
	// serve them can be given back.
	Idle func()
	// DialTCP connects to a port of the guest's loopback; a refused connection is ECONNREFUSED.
	DialTCP func(ctx context.Context, port int) (net.Conn, error)
	// DialAddress connects to a port at another of its addresses.
	DialAddress func(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	// Exec starts a command. An error that is fs.ErrNotExist says that there is no such program.
	Exec func(exec.Request) (*Process, error)
	// Files says where a path of the guest is on this machine; copies go there.
	Files func(path string) string
}

// features names what this guest can do beyond the API's first calls.
func (g *Guest) features() []string {
	var names []string
	if g.DialTCP != nil {
		names = append(names, string(wire.KindForward))
	}
	if g.Exec != nil {
		names = append(names, string(wire.KindExec))
	}
	if g.Files != nil {
		names = append(names, string(wire.KindCopy))
	}
	if g.FollowPorts != nil {
		names = append(names, string(wire.KindPorts))
	}
	return names
}

// Facts are what Health reports beside the stages.
type Facts struct {
	BootID      string
	Uptime      time.Duration // CLOCK_BOOTTIME
	Userspace   string        // "starting", "running", "degraded", "unknown"
	FailedUnits []string
	RSS         int64 // bytes of the agent
	Restarts    int   // of the agent
}

// Grown is a filesystem that was enlarged, in bytes.
type Grown struct {
	Target        string
	Before, After int64
}

const (
	// headerTime bounds the wait for a stream's header.
	headerTime = 10 * time.Second
	// idleTime is how long nobody must have asked for anything until the guest counts as idle.
	idleTime = 5 * time.Second
)

// Server serves sessions of one guest. Make it with NewServer; safe for concurrent use.
type Server struct {
	secret  string
	guest   *Guest
	methods map[string]method
	slots   chan struct{} // one per stream being served
	tcp     chan struct{} // one per connection being forwarded
	use     use
	ports   follower

	calls    context.Context // ends with Close
	endCalls context.CancelFunc
}

// NewServer makes a server, to be ended by Close.
func NewServer(secret string, g *Guest) *Server {
	s := &Server{secret: secret, guest: g, methods: methods(service{g, &clockOrder{}}), slots: make(chan struct{}, wire.MaxStreams), tcp: make(chan struct{}, wire.MaxForwards)}
	s.calls, s.endCalls = context.WithCancel(context.Background())
	return s
}

// Close ends the API's connections. Forwarded ones end with the context they were served under.
func (s *Server) Close() error {
	s.use.end()
	s.endCalls()
	return nil
}

// ServeConn serves one connection with a server of its own: the handshake, then one stream, or with
// mux many. It returns when the connection has ended or ctx has.
func ServeConn(ctx context.Context, conn net.Conn, mux bool, secret string, g *Guest) error {
	s := NewServer(secret, g)
	return errors.Join(s.Serve(ctx, conn, mux), s.Close())
}

// Serve serves one connection and closes it. Without mux it returns when its one stream has ended.
// A peer that fails the handshake is an error; a session that ended is not.
func (s *Server) Serve(ctx context.Context, conn net.Conn, mux bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	opened, err := wire.GuestHandshake(conn, mux, s.secret)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	if s.guest.Answered != nil {
		s.guest.Answered(opened)
	}
	if !mux {
		s.stream(ctx, conn, nil)
		return nil
	}
	session, err := wire.ServeMux(conn)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	cuts := &cutter{cancels: map[uint32]context.CancelFunc{}}
	var serving sync.WaitGroup
	defer serving.Wait()
	defer cancel()
	defer session.Close()
	for {
		stream, err := session.AcceptStream()
		if err != nil {
			return nil
		}
		serving.Go(func() { s.stream(ctx, &muxStream{Stream: stream}, cuts) })
	}
}

// stream serves one stream to its end.
func (s *Server) stream(ctx context.Context, conn net.Conn, cuts *cutter) {
	defer conn.Close()
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		return // the host has as many streams open as it may
	}
	s.use.enter()
	defer s.use.leave(s.guest.Idle)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if m, ok := conn.(*muxStream); ok {
		defer cuts.register(m.StreamID(), cancel)()
	}
	if conn.SetReadDeadline(time.Now().Add(headerTime)) != nil {
		return
	}
	header, err := wire.ReadHeader(conn)
	if err != nil || conn.SetReadDeadline(time.Time{}) != nil {
		return
	}
	switch header.Kind {
	case wire.KindHTTP:
		stop := context.AfterFunc(s.calls, cancel)
		defer stop()
		s.serveHTTP(ctx, conn)
	case wire.KindTCP, wire.KindForward:
		s.forward(ctx, conn, header)
	case wire.KindExec:
		s.exec(ctx, conn)
	case wire.KindCopy:
		s.copy(ctx, conn)
	case wire.KindPorts:
		// It is open for as long as a daemon runs: the guest is idle all the same.
		s.use.leave(s.guest.Idle)
		s.followPorts(ctx, conn)
		s.use.enter()
	case wire.KindCut:
		if cuts != nil {
			cuts.cut(header.Stream)
		}
	}
}

// muxStream is a stream of a port as its guest end. Close gives it up: what the host still sends is
// discarded until it closes its end as well, so that it never blocks on a stream nobody reads.
type muxStream struct {
	*yamux.Stream
	once sync.Once
	// reading is held by who reads. Two at once lock each other out for ever in yamux 0.1.2, whose Stream.Read takes the stream's
	// two locks in both orders when the peer has closed its end, and its session waits with them.
	reading sync.Mutex
}

// Read implements net.Conn.
func (m *muxStream) Read(b []byte) (int, error) {
	m.reading.Lock()
	defer m.reading.Unlock()
	return m.Stream.Read(b)
}

func (m *muxStream) CloseWrite() error { return m.Stream.Close() }

func (m *muxStream) Close() error {
	m.once.Do(func() {
		_ = m.Stream.Close() // fails only with the session
		_ = m.SetReadDeadline(time.Time{})
		go func() { _, _ = io.Copy(io.Discard, m) }()
	})
	return nil
}

// cutter ends streams of one session by their number.
type cutter struct {
	mu      sync.Mutex
	cancels map[uint32]context.CancelFunc
}

func (c *cutter) register(id uint32, cancel context.CancelFunc) (forget func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cancels[id] = cancel
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.cancels, id)
	}
}

func (c *cutter) cut(id uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cancel := c.cancels[id]; cancel != nil {
		cancel()
	}
}

// use counts the streams that are open, and tells when none has been for a while. A timer runs only then.
type use struct {
	mu    sync.Mutex
	open  int
	ended bool
	timer *time.Timer
}

func (u *use) enter() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.open++
	if u.timer != nil {
		u.timer.Stop()
	}
}

// leave calls idle, which may be nil, after idleTime unless somebody enters meanwhile.
func (u *use) leave(idle func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.open--; u.open == 0 && idle != nil && !u.ended {
		u.timer = time.AfterFunc(idleTime, idle)
	}
}

// end calls nothing any more.
func (u *use) end() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.ended = true
	if u.timer != nil {
		u.timer.Stop()
	}
}
