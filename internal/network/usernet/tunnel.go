package usernet

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"time"
)

const (
	// keySize is how many bytes a guest's connection begins with.
	keySize = sha256.Size
	// keyTime bounds the wait for them: an agent sends them as soon as it is connected.
	keyTime = 2 * time.Second
	// maxKeyless is how many connections may not have shown a key yet; more are closed at once.
	maxKeyless = 64
)

// serveGuests serves the guest over one connection after another that it makes by itself, until none has been there for so long or
// ctx ends. A connection that shows the key takes the place of the one before, whose end may not have been noticed. Whoever
// does not show it gets nothing and ends nothing.
func serveGuests(ctx context.Context, n *Network, l *net.UnixListener, patience time.Duration) error {
	ctx, cancel := context.WithCancel(ctx)
	admitted, broken := make(chan net.Conn), make(chan error, 1)
	go func() { broken <- n.acceptGuests(ctx, l, admitted) }()
	end, over := func() {}, chan struct{}(nil) // of the connection that is served; nil: none is
	defer func() {
		cancel()
		_ = l.SetDeadline(time.Unix(1, 0))
		<-broken
		if over != nil {
			<-over
		}
	}()
	idle := time.NewTimer(patience) // runs while none is served
	defer idle.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-broken:
			broken <- nil
			return err
		case <-idle.C:
			n.log.Info("the guest does not come any more")
			return nil
		case <-over:
			over = nil
			idle.Reset(patience)
		case conn := <-admitted:
			idle.Stop()
			end()
			if over != nil {
				<-over
			}
			end = func() { _ = conn.Close() }
			over = make(chan struct{})
			go func(over chan struct{}) {
				defer close(over)
				n.log.Info("the guest is connected")
				err := n.Serve(ctx, conn)
				n.log.Info("the connection to the guest is over", "err", err)
			}(over)
		}
	}
}

// acceptGuests hands on connections that show the key, until ctx ends or the listener breaks.
func (n *Network) acceptGuests(ctx context.Context, l *net.UnixListener, admitted chan<- net.Conn) error {
	slots := make(chan struct{}, maxKeyless)
	for {
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = conn.Close()
			}
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case err != nil:
			return err
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		go func() {
			defer func() { <-slots }()
			if err := n.greet(conn); err != nil {
				n.log.Warn("a connection did not show the guest's key", "err", err)
				_ = conn.Close()
				return
			}
			select {
			case admitted <- conn:
			case <-ctx.Done():
				_ = conn.Close()
			}
		}()
	}
}

var errKey = errors.New("it is another one")

// greet reads the key.
func (n *Network) greet(conn net.Conn) error {
	if err := conn.SetReadDeadline(time.Now().Add(keyTime)); err != nil {
		return err
	}
	var key [keySize]byte
	if _, err := io.ReadFull(conn, key[:]); err != nil {
		return err
	}
	hash := sha256.Sum256(key[:])
	if subtle.ConstantTimeCompare([]byte(hex.EncodeToString(hash[:])), []byte(n.cfg.KeyHash)) != 1 {
		return errKey
	}
	return conn.SetReadDeadline(time.Time{})
}
