package usernet

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"

	names "git.thaloco.com/thaloco/banger/internal/dns"
)

const (
	dnsPort    = names.Port
	dnsTime    = 5 * time.Second
	maxQueries = 256 // over one connection
)

// serveDNS answers the guest's queries at the gateway's addresses.
func (n *Network) serveDNS() error {
	handler := names.NewGuests(n.guest, n.outside.Resolvers, n.log)
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
		serve(&dns.Server{PacketConn: udp, Handler: handler, UDPSize: dns.MaxMsgSize, MsgAcceptFunc: names.Accept})
		tcp, err := gonet.ListenTCP(n.stack, at, a.protocol)
		if err != nil {
			return fmt.Errorf("DNS for the guest at %s over TCP: %w", a.gateway, err)
		}
		serve(&dns.Server{Listener: tcp, Handler: handler, ReadTimeout: dnsTime, WriteTimeout: dnsTime,
			IdleTimeout: func() time.Duration { return dnsTime }, MaxTCPQueries: maxQueries, MsgAcceptFunc: names.Accept})
	}
	return nil
}

// guest is what the one guest here is told: its own name, and with NAT what the host's resolvers know. No other VM exists for
// it: no guest of a user network gets to another.
func (n *Network) guest(netip.Addr) (names.Guest, bool) {
	return names.Guest{Forward: n.nat.Load(), Lookup: func(name string) []netip.Addr {
		if n.cfg.Name == "" || name != n.cfg.Name {
			return nil
		}
		own := []netip.Addr{n.cfg.Guest4.Addr()}
		if n.cfg.Guest6.IsValid() {
			own = append(own, n.cfg.Guest6.Addr())
		}
		return own
	}}, true
}
