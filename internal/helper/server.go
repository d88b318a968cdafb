// Package helper owns what the root helper lets a user do to the host's network: the verbs of
// internal/hostnet, for that user's own bridge, TAPs and tables, and nothing else. Client is the daemon's end
// of it.
//
// It takes no path, no program and no name of a device from a caller, and never acts on what is on no record of
// its own. A helper serves one user, over a socket that this user alone can open, and looks at the peer's credentials besides.
package helper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/record"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/jail"
	"git.thaloco.com/thaloco/banger/internal/version"
)

// Bounds of one connection.
const (
	requestTime = 5 * time.Second  // for a caller to say what it wants, and to take an answer
	verbTime    = 30 * time.Second // for the host
	connections = 64               // at once; who comes then waits in the socket's queue
)

// Options are what a Server is made of.
type Options struct {
	UID     int                                  // of the user that is served
	Ranges  []netip.Prefix                       // IPv4: in which this user may have networks
	Records string                               // directory, of root alone
	Open    func(hostnet.Settings) (Host, error) // the host as it is for an installation
	// ListenDNS opens port 53 of an address; KeepNames has the host's resolver told of a server by way of a link, until ctx ends.
	ListenDNS func(at netip.Addr) (net.Listener, net.PacketConn, error)
	KeepNames func(ctx context.Context, link int, addr netip.AddrPort) error
	// Jails are for a helper that makes jails, and does nothing to networks then: none of the three above is called. Bound puts a process
	// that was just started into its control group.
	Jails jail.Maker
	Bound func(ctx context.Context, r jail.Request, pid int)
	Idle  time.Duration // without a connection for so long, Serve returns; 0: never
	Log   *slog.Logger
}

// Server is the helper of one user.
type Server struct {
	o       Options
	records record.Dir
	turns   chan struct{}      // has one, which whoever performs a verb holds
	hosts   map[string]*cached // by installation; the turn's
}

// NewServer makes a Server. It does nothing to the host.
func NewServer(o Options) *Server {
	s := &Server{o: o, records: record.Dir(o.Records), turns: make(chan struct{}, 1), hosts: map[string]*cached{}}
	s.turns <- struct{}{}
	return s
}

// turn waits until nobody else performs a verb.
func (s *Server) turn(ctx context.Context) (release func(), err error) {
	select {
	case <-s.turns:
		return func() { s.turns <- struct{}{} }, nil
	case <-ctx.Done():
		return nil, fault.Wrap(ctx.Err(), fault.CodeOf(ctx.Err()), "root helper", "others' requests were not done with in time")
	}
}

// closeHosts lets go of what is in memory. It is the turn's.
func (s *Server) closeHosts() {
	for id, c := range s.hosts {
		c.host.Close()
		delete(s.hosts, id)
	}
}

// Serve answers on l until ctx ends or nobody was connected for the idle time. What it had begun is
// finished first.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Accepting ends at once; it is what everything else waits for.
	defer context.AfterFunc(ctx, func() { _ = l.SetDeadline(time.Unix(1, 0)) })()
	room := make(chan struct{}, connections)
	var busy sync.WaitGroup
	defer busy.Wait()
	for {
		room <- struct{}{}
		if len(room) == 1 && s.o.Idle > 0 && ctx.Err() == nil {
			_ = l.SetDeadline(time.Now().Add(s.o.Idle))
		}
		conn, err := l.AcceptUnix()
		if err != nil {
			<-room
			var timeout net.Error
			switch {
			case ctx.Err() != nil:
				return nil
			case errors.As(err, &timeout) && timeout.Timeout():
				if len(room) > 0 { // somebody came while the time ran
					_ = l.SetDeadline(time.Now().Add(s.o.Idle))
					continue
				}
				// Whoever comes now waits in the queue, which systemd keeps, and is served by the next helper.
				return nil
			}
			return fmt.Errorf("no connection can be accepted: %w", err)
		}
		busy.Go(func() {
			defer func() { <-room }()
			defer conn.Close()
			s.serve(ctx, conn)
		})
	}
}

// serve answers one connection: one request.
func (s *Server) serve(ctx context.Context, conn *net.UnixConn) {
	var files []*os.File // that go with the answer
	reply := func(a wire.Answer, err error) error {
		a.Revision, a.Release, a.Fault = wire.Revision, version.String(), wire.FaultOf(err)
		_ = conn.SetWriteDeadline(time.Now().Add(requestTime))
		if len(files) > 0 {
			return wire.WriteFiles(conn, a, files...)
		}
		return wire.Write(conn, a)
	}
	uid, err := peer(conn)
	if err == nil && uid != s.o.UID {
		err = refuse("root helper", "this is the helper of user %d, not of user %d", s.o.UID, uid)
	}
	if err != nil {
		s.o.Log.Warn("a caller is refused", "uid", uid, "err", err)
		_ = reply(wire.Answer{}, err)
		return
	}
	_ = conn.SetReadDeadline(time.Now().Add(requestTime))
	r, came, err := wire.ReadRequestFiles(conn)
	defer func() { closeAll(came) }()
	if err != nil {
		s.o.Log.Warn("a request is refused", "err", err)
		_ = reply(wire.Answer{}, err)
		return
	}
	switch {
	case r.Verb == wire.Version:
		_ = reply(wire.Answer{}, nil)
		return
	case s.o.Jails != nil: // whatever it is
	case len(came) > 0:
		_ = reply(wire.Answer{}, invalid("nobody gives descriptors to this helper"))
		return
	case r.Verb == wire.Watch:
		lasting(ctx, conn, reply, func(ctx context.Context, changed func()) error { return s.watch(ctx, r, changed) })
		return
	case r.Verb == wire.KeepNames:
		lasting(ctx, conn, reply, func(ctx context.Context, _ func()) error { return s.keepNames(ctx, r) })
		return
	}
	// What was begun is finished, also if the helper is told to end or its caller hangs up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), verbTime)
	defer cancel()
	var a wire.Answer
	defer func() { closeAll(files) }()
	switch {
	case s.o.Jails != nil:
		a, files, err = s.doJail(ctx, r, came)
	case r.Verb == wire.ListenDNS:
		files, err = s.listenDNS(ctx, r)
	default:
		a, err = s.do(ctx, r)
	}
	if err != nil && !fault.Is(err, fault.NotFound) { // that a jail does not run is an answer as any other
		s.o.Log.Warn("a request failed", "verb", r.Verb, "installation", r.Network.Installation, "err", err)
	}
	_ = reply(a, err)
}

// lasting does something until the caller hangs up, and answers at each change and with what ends it.
func lasting(ctx context.Context, conn *net.UnixConn, reply func(wire.Answer, error) error, do func(ctx context.Context, changed func()) error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_ = conn.SetReadDeadline(time.Time{})
	var gone sync.WaitGroup
	defer gone.Wait()
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	defer cancel()
	gone.Go(func() {
		// Nothing more comes from a caller: whatever does, or its end, ends it.
		_, _ = conn.Read(make([]byte, 1))
		cancel()
	})
	err := do(ctx, func() {
		if err := reply(wire.Answer{}, nil); err != nil {
			cancel()
		}
	})
	if err != nil {
		_ = reply(wire.Answer{}, err)
	}
}

// peer is the user that connected.
func peer(conn *net.UnixConn) (uid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return -1, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return -1, err
	}
	if credErr != nil {
		return -1, credErr
	}
	return int(cred.Uid), nil
}
