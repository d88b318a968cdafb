package server

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

const (
	dialRequestTimeout = 5 * time.Second // a client writes its line at once
	dialDefaultWait    = 2 * time.Minute // for a port that nothing listens on yet
	dialNoWait         = 5 * time.Second
	dialMaxWait        = 10 * time.Minute
	// dialService is longer than an agent takes that has to be reached anew, over a port.
	dialService = 30 * time.Second
)

// ServeDial answers on the dial socket until ctx ends or l is closed, then waits for the streams
// that it copies itself; those end when ctx ends.
func ServeDial(ctx context.Context, l *net.UnixListener, guests Dialer, log *slog.Logger) error {
	var streams sync.WaitGroup
	defer streams.Wait()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		streams.Go(func() {
			defer conn.Close()
			stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
			defer stop()
			if err := serveDial(ctx, conn, guests, log); err != nil && ctx.Err() == nil {
				log.Debug("guest stream ended", "error", err)
			}
		})
	}
}

func serveDial(ctx context.Context, conn *net.UnixConn, guests Dialer, log *slog.Logger) error {
	_ = conn.SetReadDeadline(time.Now().Add(dialRequestTimeout))
	reader := bufio.NewReaderSize(conn, bangerv1.MaxDialLine)
	line, err := reader.ReadSlice('\n')
	if err != nil {
		return answer(conn, bangerv1.DialAnswer{Fault: FaultMessage(fault.Wrap(err, fault.Invalid, "", "the dial request is not one line of at most %d bytes", bangerv1.MaxDialLine))}, -1)
	}
	var req bangerv1.DialRequest
	if err := json.Unmarshal(line, &req); err != nil {
		return answer(conn, bangerv1.DialAnswer{Fault: FaultMessage(fault.Wrap(err, fault.Invalid, "", "the dial request is not JSON"))}, -1)
	}
	dial, err := dialed(guests, req)
	if err != nil {
		return answer(conn, bangerv1.DialAnswer{Fault: FaultMessage(err)}, -1)
	}
	_ = conn.SetReadDeadline(time.Time{})

	wait := dialNoWait
	if req.Service != "" {
		wait = dialService
	}
	if req.Wait {
		wait = dialDefaultWait
		if req.WaitMS > 0 {
			wait = min(time.Duration(req.WaitMS)*time.Millisecond, dialMaxWait)
		}
	}
	dialCtx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	gone := hangUp(conn, cancel)
	guest, err := dial(dialCtx)
	gone()
	if err != nil {
		log.Debug("no guest stream", "vm", req.VMID, "port", req.Port, "service", req.Service, "error", err)
		return answer(conn, bangerv1.DialAnswer{Fault: FaultMessage(err)}, -1)
	}
	defer guest.Close()
	log.Debug("guest stream", "vm", req.VMID, "port", req.Port, "service", req.Service)

	if sc, ok := guest.(syscall.Conn); ok {
		raw, err := sc.SyscallConn()
		if err == nil {
			var sent error
			if err := raw.Control(func(fd uintptr) {
				sent = answer(conn, bangerv1.DialAnswer{Descriptor: true}, int(fd))
			}); err != nil {
				return err
			}
			return sent
		}
		// No descriptor after all (net.Pipe and the like say so here): copy.
	}
	if err := answer(conn, bangerv1.DialAnswer{}, -1); err != nil {
		return err
	}
	// What the client sent after its line is in reader.
	return splice(conn, reader, guest)
}

// dialed finds what a request asks for.
func dialed(guests Dialer, req bangerv1.DialRequest) (func(context.Context) (net.Conn, error), error) {
	id := vm.ID(req.VMID)
	switch req.Service {
	case "":
		if req.Port < 1 || req.Port > 65535 {
			return nil, fault.New(fault.Invalid, "", "%d is not a TCP port", req.Port)
		}
		return func(ctx context.Context) (net.Conn, error) { return guests.DialGuest(ctx, id, req.Port, req.Wait) }, nil
	case bangerv1.DialForward:
		if req.Port < 1 || req.Port > 65535 {
			return nil, fault.New(fault.Invalid, "", "%d is not a TCP port", req.Port)
		}
		return func(ctx context.Context) (net.Conn, error) { return guests.DialForward(ctx, id, req.Port) }, nil
	case bangerv1.DialExec:
		return func(ctx context.Context) (net.Conn, error) { return guests.DialAgent(ctx, id, wire.KindExec) }, nil
	case bangerv1.DialCopy:
		return func(ctx context.Context) (net.Conn, error) { return guests.DialAgent(ctx, id, wire.KindCopy) }, nil
	}
	return nil, fault.New(fault.Invalid, "", "guests have no service %q", req.Service)
}

// answer sends the answer line, with a descriptor if fd is not negative.
func answer(conn *net.UnixConn, a bangerv1.DialAnswer, fd int) error {
	line, err := json.Marshal(a)
	if err != nil {
		return err
	}
	if len(line) >= bangerv1.MaxDialLine {
		a.Fault = &bangerv1.Fault{Code: a.Fault.GetCode(), Message: "the reason is too long for this answer; it is in the daemon's log"}
		if line, err = json.Marshal(a); err != nil {
			return err
		}
	}
	line = append(line, '\n')
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	_ = conn.SetWriteDeadline(time.Now().Add(dialRequestTimeout))
	defer func() { _ = conn.SetWriteDeadline(time.Time{}) }()
	n, _, err := conn.WriteMsgUnix(line, oob, nil)
	if err == nil && n < len(line) {
		_, err = conn.Write(line[n:])
	}
	return err
}

// hangUp calls gone when the peer closes conn, until the returned function is called. It reads
// nothing from conn: poll(2) tells a hang-up apart from data.
func hangUp(conn *net.UnixConn, gone func()) (stop func()) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return func() {}
	}
	done, finished := make(chan struct{}), make(chan struct{})
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return func() {}
	}
	var fd int
	if err := raw.Control(func(f uintptr) { fd, err = unix.FcntlInt(f, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || fd < 0 {
		_ = unix.Close(wake)
		return func() {}
	}
	go func() {
		defer close(finished)
		defer unix.Close(fd)
		// POLLRDHUP: the peer shut down its sending side or is gone.
		set := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}, {Fd: int32(wake), Events: unix.POLLIN}}
		for {
			_, err := unix.Poll(set, -1)
			if err == unix.EINTR {
				continue
			}
			select {
			case <-done:
			default:
				gone()
			}
			return
		}
	}()
	return func() {
		close(done)
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		<-finished
		_ = unix.Close(wake)
	}
}

// splice copies both ways until both sides are done; the end of one direction is passed on as a
// half-close where the connection has one.
func splice(client *net.UnixConn, fromClient io.Reader, guest net.Conn) error {
	var group sync.WaitGroup
	var up error
	group.Go(func() {
		_, up = io.Copy(guest, fromClient)
		closeWrite(guest)
	})
	_, down := io.Copy(client, guest)
	closeWrite(client)
	if down != nil {
		_ = client.Close()
	}
	group.Wait()
	return errors.Join(up, down)
}

func closeWrite(c net.Conn) {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
		return
	}
	_ = c.Close()
}
