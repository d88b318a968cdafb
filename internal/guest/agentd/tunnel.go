package agentd

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/mdlayher/vsock"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
	"git.thaloco.com/thaloco/banger/internal/guest/tap"
)

// Pauses between two connections to the host's end of the network. Nothing tells when that is there again.
const (
	firstReconnect = 50 * time.Millisecond
	mostReconnect  = 2 * time.Second
)

// keyTime bounds the sending of the key.
const keyTime = 10 * time.Second

// serveTunnel carries the frames of the network interface to the host for as long as ctx lasts, over one connection after another. A guest that has
// removed the interface goes without: that is no reason to end the agent.
func (l *live) serveTunnel(ctx context.Context) {
	t := l.state.Tunnel
	dial := func() (net.Conn, error) {
		conn, err := vsock.Dial(vsock.Host, t.Port, nil) // bounded by the kernel: two seconds
		if err != nil {
			return nil, err
		}
		return &packets{Conn: conn}, nil
	}
	if err := keepTunnel(ctx, t.Interface, boot.TunnelKey(l.state.Secret), dial); err != nil {
		l.stages.Reach(system.Now("network lost", err.Error()))
	}
}

// keepTunnel connects the interface with the host, and again whenever that ends, until ctx ends. An error is the interface's.
func keepTunnel(ctx context.Context, name string, key []byte, dial func() (net.Conn, error)) error {
	dev, err := tap.Open(name)
	if err != nil {
		return fmt.Errorf("take the frames of %s: %w", name, err)
	}
	defer dev.Close()
	for pause := firstReconnect; ; {
		began := time.Now()
		if conn, err := dial(); err == nil && showKey(conn, key) == nil {
			_ = tap.Carry(ctx, dev, conn) // over: whatever ended it, another connection is what helps
		}
		if ctx.Err() != nil {
			return nil
		}
		if _, err := net.InterfaceByName(name); err != nil {
			return fmt.Errorf("the interface %s is gone: %w", name, err)
		}
		if time.Since(began) > mostReconnect {
			pause = firstReconnect
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, mostReconnect)
	}
}

// showKey begins a connection; one on which that fails is closed.
func showKey(conn net.Conn, key []byte) error {
	err := conn.SetWriteDeadline(time.Now().Add(keyTime))
	if err == nil {
		_, err = conn.Write(key)
	}
	if err == nil {
		err = conn.SetWriteDeadline(time.Time{})
	}
	if err != nil {
		_ = conn.Close()
	}
	return err
}
