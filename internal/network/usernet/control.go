package usernet

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"time"
)

// A program takes one request a connection on its control socket, and answers with its Status as it is then. Both are
// one JSON value.
type request struct {
	Set     *Settings `json:"set,omitempty"`
	Publish []uint16  `json:"publish"` // nil: those that are
}

const (
	controlTime = 5 * time.Second
	maxRequest  = 1 << 20 // bytes; all 65535 ports have less
)

// serveControl answers until the listener is closed.
func (n *Network) serveControl(l net.Listener) error {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := n.control(conn); err != nil {
			n.log.Warn("a request on the control socket failed", "err", err)
		}
	}
}

func (n *Network) control(conn net.Conn) error {
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(controlTime)); err != nil {
		return err
	}
	var r request
	if err := json.NewDecoder(io.LimitReader(conn, maxRequest)).Decode(&r); err != nil {
		return err
	}
	if r.Set != nil {
		n.Set(*r.Set)
		n.log.Info("settings", "nat", r.Set.NAT, "ports", len(r.Set.Ports))
	}
	if r.Publish != nil { // by what the guest does: not to be logged
		n.Publish(r.Publish)
	}
	return json.NewEncoder(conn).Encode(n.Status())
}

// exchange sends one request to a program.
func exchange(ctx context.Context, conn net.Conn, r request) (s Status, err error) {
	deadline := time.Now().Add(controlTime)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := conn.SetDeadline(deadline); err != nil {
		return s, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		return s, err
	}
	return s, json.NewDecoder(conn).Decode(&s)
}
