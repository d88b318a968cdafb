package client

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Forward connects whoever connects to l with a TCP port on a guest's loopback, until ctx ends or l
// fails; connections that are open then are closed. failed is told why a connection did not come about,
// and may be called concurrently. l is closed. Ending by ctx is no error.
func (c *Client) Forward(ctx context.Context, l net.Listener, vmID string, port int, failed func(error)) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var open sync.WaitGroup
	defer open.Wait()
	for {
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fault.Wrap(errors.Join(err, l.Close()), fault.Internal, l.Addr().String(), "no more connections can be taken: %v", err)
		}
		open.Go(func() {
			if err := c.forward(ctx, conn, vmID, port); err != nil && ctx.Err() == nil {
				failed(err)
			}
		})
	}
}

func (c *Client) forward(ctx context.Context, conn net.Conn, vmID string, port int) error {
	defer conn.Close()
	f, err := c.polled(c.dialStream(ctx, bangerv1.DialRequest{VMID: vmID, Port: port}))
	if err != nil {
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // whoever connected is to see a connection that was refused, not one that ended
		}
		return err
	}
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close(); _ = f.Close() })
	defer stop()
	guest := guestStream{f}
	var both sync.WaitGroup
	both.Go(func() { pump(guest, conn) })
	both.Go(func() { pump(conn, guest) })
	both.Wait()
	return nil
}

// pump copies until src ends and passes the end on; a failure ends both.
func pump(dst, src io.ReadWriteCloser) {
	// Without what io.Copy would try with files: these are sockets.
	_, err := io.Copy(struct{ io.Writer }{dst}, struct{ io.Reader }{src})
	if half, ok := dst.(interface{ CloseWrite() error }); ok && err == nil && half.CloseWrite() == nil {
		return
	}
	_, _ = dst.Close(), src.Close()
}

// guestStream is a stream with an end for each direction.
type guestStream struct{ *os.File }

// CloseWrite says that no more comes.
func (s guestStream) CloseWrite() error {
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	var shut error
	err = raw.Control(func(fd uintptr) { shut = unix.Shutdown(int(fd), syscall.SHUT_WR) })
	return errors.Join(err, shut)
}
