package client

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/frame"
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
			defer conn.Close() // after the reason is told: whoever sees the one may ask for the other
			if err := c.forward(ctx, conn, vmID, port); err != nil && ctx.Err() == nil {
				failed(err)
			}
		})
	}
}

func (c *Client) forward(ctx context.Context, conn net.Conn, vmID string, port int) error {
	f, err := c.polled(c.dialStream(ctx, bangerv1.DialRequest{VMID: vmID, Service: bangerv1.DialForward, Port: port}))
	if err != nil {
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // whoever connected is to see a connection that was refused, not one that ended
		}
		return err
	}
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close(); _ = f.Close() })
	defer stop()
	guest := frame.NewDuplex(f)
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
	for _, end := range []io.Closer{dst, src} {
		if tcp, ok := end.(*net.TCPConn); ok && err != nil {
			_ = tcp.SetLinger(0) // what broke is not to be taken for the end of what was sent
		}
		_ = end.Close()
	}
}
