package usernet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// guestTime is how long a guest may take to accept a connection.
const guestTime = 5 * time.Second

// publisher listens on the host for the guest's ports.
type publisher struct {
	network *Network
	inbound chan struct{} // one token for each connection

	mu     sync.Mutex
	open   map[uint16]net.Listener
	failed map[uint16]string
	told   map[uint16]bool // of which it was logged that they failed: once, since guests may have them fail again and again
}

// set makes the ports that are published those that are wanted. What stays is not touched; what failed is tried again.
func (p *publisher) set(ports []uint16) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for port, l := range p.open {
		if !slices.Contains(ports, port) {
			_ = l.Close() // connections that it accepted go on
			delete(p.open, port)
		}
	}
	p.failed = map[uint16]string{}
	for _, port := range ports {
		if p.open[port] != nil || p.network.ctx.Err() != nil {
			continue
		}
		var c net.ListenConfig
		l, err := c.Listen(p.network.ctx, "tcp4", netip.AddrPortFrom(p.network.cfg.Publish, port).String())
		if err != nil {
			p.failed[port] = err.Error()
			if !p.told[port] {
				p.told[port] = true
				p.network.log.Warn("a port is not published", "port", port, "err", err)
			}
			continue
		}
		p.open[port] = l
		p.network.tasks.Go(func() { p.accept(l, port) })
	}
}

func (p *publisher) state() (ports []uint16, failed map[uint16]string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Sorted(maps.Keys(p.open)), maps.Clone(p.failed)
}

func (p *publisher) accept(l net.Listener, port uint16) {
	for {
		conn, err := l.Accept()
		if err != nil {
			if ne, ok := err.(net.Error); ok && ne.Timeout() { //nolint:errorlint // from the listener itself
				continue
			}
			if p.network.ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				// Out of descriptors, most likely: those that are open will end.
				p.network.log.Warn("a connection to a published port was lost", "port", port, "err", err)
				select {
				case <-time.After(100 * time.Millisecond):
					continue
				case <-p.network.ctx.Done():
				}
			}
			return
		}
		p.network.tasks.Go(func() {
			if err := p.connect(conn.(*net.TCPConn), port); err != nil {
				p.network.log.Debug("a published port does not answer", "port", port, "err", err)
			}
		})
	}
}

// connect joins a connection of the host's with one to the guest. A guest that refuses is seen as a reset.
func (p *publisher) connect(conn *net.TCPConn, port uint16) error {
	n := p.network
	f := &flow{}
	f.ends[0] = conn
	select {
	case p.inbound <- struct{}{}:
		defer func() { <-p.inbound }()
	default:
		return errors.Join(fmt.Errorf("there are %d connections already", maxInbound), conn.SetLinger(0), conn.Close())
	}
	ctx, cancel := context.WithTimeout(n.ctx, guestTime)
	defer cancel()
	from := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(n.cfg.Gateway4.AsSlice())}
	to := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(n.cfg.Guest4.Addr().AsSlice()), Port: port}
	guest, err := gonet.DialTCPWithBind(ctx, n.stack, from, to, ipv4.ProtocolNumber)
	if err != nil { // a reset, not an orderly end
		return errors.Join(err, conn.SetLinger(0), conn.Close())
	}
	f.ends[1] = guest
	defer f.close()
	stop := context.AfterFunc(n.ctx, f.close)
	defer stop()
	f.join(guest, conn)
	return nil
}
