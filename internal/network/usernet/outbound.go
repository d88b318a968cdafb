package usernet

import (
	"context"
	"net"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// outboundTCP makes the guest's connection once the host's is made: a guest sees a refusal as what it is. The stack calls
// it in a goroutine of its own.
func (n *Network) outboundTCP(r *tcp.ForwarderRequest) {
	id := r.ID()
	to := netip.AddrPortFrom(addrOf(id.LocalAddress), id.LocalPort)
	if err := n.permits(to.Addr()); err != nil {
		n.log.Debug("a connection is refused", "to", to, "err", err)
		r.Complete(true)
		return
	}
	ctx, cancel := context.WithTimeout(n.ctx, dialTime)
	defer cancel()
	out, err := n.outside.Dial(ctx, "tcp", to)
	if err != nil {
		n.log.Debug("a connection cannot be made", "to", to, "err", err)
		r.Complete(true)
		return
	}
	peer, ok := out.(halves)
	if !ok { // of *net.TCPConn it is so
		_ = out.Close()
		r.Complete(true)
		return
	}
	var wq waiter.Queue
	ep, e := r.CreateEndpoint(&wq)
	if e != nil { // the guest gave up
		_ = out.Close()
		r.Complete(true)
		return
	}
	r.Complete(false)
	keepAlive(ep)
	guest := gonet.NewTCPConn(&wq, ep)
	f := &flow{}
	f.ends[0], f.ends[1] = guest, out
	if !n.tcp.add(f) {
		n.log.Warn("the guest has too many connections", "limit", maxTCP)
		ep.Abort()
		f.close()
		return
	}
	// It may have been turned off since it was looked at; closeAll has not seen this one then.
	if n.permits(to.Addr()) != nil {
		n.tcp.end(f)
		return
	}
	n.tasks.Go(func() {
		defer n.tcp.end(f)
		f.join(guest, peer)
	})
}

// keepAlive finds out about a guest that went without a word, such as one that was reset.
func keepAlive(ep tcpip.Endpoint) {
	idle, interval := tcpip.KeepaliveIdleOption(time.Minute), tcpip.KeepaliveIntervalOption(30*time.Second)
	for _, o := range []tcpip.SettableSocketOption{&idle, &interval} {
		_ = ep.SetSockOpt(o) // of TCP both are always taken
	}
	ep.SocketOptions().SetKeepAlive(true)
}

// outboundUDP is called for a packet that belongs to no flow, in the course of reading frames: it must not wait.
func (n *Network) outboundUDP(r *udp.ForwarderRequest) {
	id := r.ID()
	to := netip.AddrPortFrom(addrOf(id.LocalAddress), id.LocalPort)
	ctx, cancel := context.WithTimeout(n.ctx, dialTime)
	defer cancel()
	out, err := n.outside.Dial(ctx, "udp", to) // sends nothing
	if err != nil {
		n.log.Debug("a packet cannot be sent", "to", to, "err", err)
		return
	}
	var wq waiter.Queue
	ep, e := r.CreateEndpoint(&wq)
	if e != nil {
		_ = out.Close()
		return
	}
	guest := gonet.NewUDPConn(&wq, ep)
	f := &flow{}
	f.ends[0], f.ends[1] = guest, out
	f.used.Store(time.Now().UnixNano())
	n.udp.addOver(f)
	if n.permits(to.Addr()) != nil { // as in outboundTCP
		n.udp.end(f)
		return
	}
	n.tasks.Go(func() { n.carry(f, out, guest) })
	n.tasks.Go(func() { n.carry(f, guest, out) })
}

// carry moves packets one way until the flow has been silent both ways for long enough, or ends.
func (n *Network) carry(f *flow, to, from net.Conn) {
	defer n.udp.end(f)
	buf := pumpBuffers.Get().(*[]byte)
	defer pumpBuffers.Put(buf)
	for {
		_ = from.SetReadDeadline(time.Unix(0, f.used.Load()).Add(udpIdle)) // a closed one says so below
		size, err := from.Read(*buf)
		if err != nil {
			if ne, ok := err.(net.Error); ok && ne.Timeout() && time.Since(time.Unix(0, f.used.Load())) < udpIdle { //nolint:errorlint // from the connection itself
				continue // the other way was busy
			}
			return // silent, ended, or the host was told that nobody is there
		}
		f.used.Store(time.Now().UnixNano())
		if _, err := to.Write((*buf)[:size]); err != nil {
			return
		}
	}
}
