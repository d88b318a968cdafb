package usernet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
)

const (
	dnsPort    = 53
	dnsTime    = 5 * time.Second // resolv.conf(5)'s default timeout
	maxQueries = 256             // under way
)

// serveDNS answers the guest's queries at the gateway's addresses by asking the host's resolvers, whether or not NAT
// is on. Names under .vm do not exist here: no guest of a user network gets to another.
func (n *Network) serveDNS() error {
	handler := dns.HandlerFunc(n.resolve(make(chan struct{}, maxQueries)))
	serve := func(s *dns.Server) {
		began := make(chan struct{})
		s.NotifyStartedFunc = func() { close(began) }
		n.dns = append(n.dns, s)
		n.tasks.Go(func() {
			if err := s.ActivateAndServe(); err != nil && n.ctx.Err() == nil {
				n.log.Error("DNS for the guest ended", "err", err)
			}
		})
		<-began // it cannot be told to end before
	}
	for _, a := range []struct {
		gateway  netip.Addr
		protocol tcpip.NetworkProtocolNumber
	}{{n.cfg.Gateway4, ipv4.ProtocolNumber}, {n.cfg.Gateway6, ipv6.ProtocolNumber}} {
		if !a.gateway.IsValid() {
			continue
		}
		at := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(a.gateway.AsSlice()), Port: dnsPort}
		udp, err := gonet.DialUDP(n.stack, &at, nil, a.protocol)
		if err != nil {
			return fmt.Errorf("DNS for the guest at %s: %w", a.gateway, err)
		}
		serve(&dns.Server{PacketConn: udp, Handler: handler, UDPSize: dns.MaxMsgSize})
		tcp, err := gonet.ListenTCP(n.stack, at, a.protocol)
		if err != nil {
			return fmt.Errorf("DNS for the guest at %s over TCP: %w", a.gateway, err)
		}
		serve(&dns.Server{Listener: tcp, Handler: handler, ReadTimeout: dnsTime, WriteTimeout: dnsTime,
			IdleTimeout: func() time.Duration { return dnsTime }, MaxTCPQueries: maxQueries})
	}
	return nil
}

func (n *Network) resolve(underway chan struct{}) func(dns.ResponseWriter, *dns.Msg) {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		fail := func(code int) { _ = w.WriteMsg(new(dns.Msg).SetRcode(q, code)) } // who asked asks again
		select {
		case underway <- struct{}{}:
			defer func() { <-underway }()
		default:
			fail(dns.RcodeServerFailure)
			return
		}
		if name := strings.ToLower(q.Question[0].Name); name == "vm." || strings.HasSuffix(name, ".vm.") {
			fail(dns.RcodeNameError)
			return
		}
		network := w.LocalAddr().Network() // "udp" or "tcp": a long answer is asked for again by the guest itself
		servers, err := n.outside.Resolvers()
		if err != nil {
			n.log.Warn("the host's resolvers are not known", "err", err)
		}
		ctx, cancel := context.WithTimeout(n.ctx, 2*dnsTime)
		defer cancel()
		for _, server := range servers {
			c := dns.Client{Net: network, Timeout: dnsTime, UDPSize: dns.MaxMsgSize}
			reply, _, err := c.ExchangeContext(ctx, q, server)
			if err != nil || reply.Rcode == dns.RcodeServerFailure && len(servers) > 1 {
				n.log.Debug("a resolver of the host's does not answer", "server", server, "err", err)
				continue
			}
			_ = w.WriteMsg(reply)
			return
		}
		fail(dns.RcodeServerFailure)
	}
}

// hostResolvers reads /etc/resolv.conf (resolv.conf(5)), each time: it changes as the host moves between networks. Without
// any the local one is meant.
func hostResolvers() ([]string, error) {
	c, err := dns.ClientConfigFromFile("/etc/resolv.conf")
	if err != nil {
		return nil, err
	}
	if len(c.Servers) == 0 {
		c.Servers = []string{"127.0.0.1"}
	}
	out := make([]string, len(c.Servers))
	for i, s := range c.Servers {
		out[i] = net.JoinHostPort(s, c.Port)
	}
	return out, nil
}
