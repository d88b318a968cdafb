package dns

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Port is where guests ask (RFC 1035 4.2).
const Port = 53

const (
	upstreamTime = 5 * time.Second // for one resolver to answer: resolv.conf(5)'s default
	forwardTime  = 2 * upstreamTime

	// What of guests' queries is under way at the host's resolvers: of one guest, so that none takes the others' turn, and of all.
	maxOfGuest = 64
	maxForward = 512
)

// Guest is what one guest is told.
type Guest struct {
	// Lookup finds the names under .vm that it may know; for it the others do not exist.
	Lookup Lookup
	// Forward has the host's resolvers asked for all other names. Without it they are refused: a guest that may not
	// go out could otherwise send what it likes in names, to whoever owns their zone.
	Forward bool
}

// Guests answers guests. Safe for concurrent use.
type Guests struct {
	of        func(from netip.Addr) (Guest, bool)
	resolvers func() ([]string, error)
	log       *slog.Logger

	mu       sync.Mutex
	underway map[netip.Addr]int
	total    int
}

// NewGuests returns what answers guests. of tells who asks by the address that a query comes from, at each query, and must
// not block; whom it does not know is refused. resolvers are where other names are asked (see HostResolvers).
func NewGuests(of func(from netip.Addr) (Guest, bool), resolvers func() ([]string, error), log *slog.Logger) *Guests {
	return &Guests{of: of, resolvers: resolvers, log: log, underway: map[netip.Addr]int{}}
}

// ListenForGuests opens port 53 of an address of this host, over TCP and UDP, for ServeGuests. Faults are Listen's.
func ListenForGuests(addr netip.Addr) (tcp net.Listener, udp net.PacketConn, err error) {
	return listenHinting(netip.AddrPortFrom(addr, Port).String())
}

// ServeGuests starts a server on what was opened, by this process or by one that may.
func ServeGuests(tcp net.Listener, udp net.PacketConn, g *Guests) *Server {
	return newServer(tcp, udp, g)
}

// ServeDNS answers one query.
func (g *Guests) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	if !asks(w, q) {
		return
	}
	// The address alone: guests are known by it, whatever port or zone.
	at, err := netip.ParseAddrPort(w.RemoteAddr().String())
	from := at.Addr().Unmap().WithZone("")
	guest, known := Guest{}, false
	if err == nil {
		guest, known = g.of(from)
	}
	switch {
	case !known:
		write(w, q, new(dns.Msg).SetRcode(q, dns.RcodeRefused))
	case under(q.Question[0].Name):
		m := (&authority{lookup: guest.Lookup}).answer(q)
		m.RecursionAvailable = true
		write(w, q, m)
	case !guest.Forward:
		write(w, q, new(dns.Msg).SetRcode(q, dns.RcodeRefused))
	case !g.take(from):
		write(w, q, new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)) // it asks again
	default:
		defer g.give(from)
		write(w, q, g.forward(w.LocalAddr().Network(), q))
	}
}

func (g *Guests) take(from netip.Addr) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.total >= maxForward || g.underway[from] >= maxOfGuest {
		return false
	}
	g.total++
	g.underway[from]++
	return true
}

func (g *Guests) give(from netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.total--
	if g.underway[from]--; g.underway[from] == 0 {
		delete(g.underway, from)
	}
}

// forward asks the host's resolvers, one after the other, by the protocol that the guest chose: an answer that is too long for
// UDP is asked for again by the guest itself.
func (g *Guests) forward(network string, q *dns.Msg) *dns.Msg {
	servers, err := g.resolvers()
	if err != nil {
		g.log.Warn("the host's resolvers are not known", "err", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), forwardTime)
	defer cancel()
	ask := q.Copy()
	ask.Id = dns.Id() // not the guest's to choose: it is half of what keeps forged answers out
	for i, server := range servers {
		c := dns.Client{Net: network, Timeout: upstreamTime, UDPSize: dns.MaxMsgSize}
		reply, _, err := c.ExchangeContext(ctx, ask, server)
		if err != nil || reply.Rcode == dns.RcodeServerFailure && i < len(servers)-1 {
			g.log.Debug("a resolver of the host's does not answer", "server", server, "err", err)
			continue
		}
		reply.Id = q.Id
		return reply
	}
	return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
}

// under says whether a name is .vm or below it.
func under(name string) bool {
	labels := dns.SplitDomainName(name)
	return len(labels) > 0 && strings.EqualFold(labels[len(labels)-1], Domain)
}

// HostResolvers reads /etc/resolv.conf (resolv.conf(5)), each time: it changes as the host moves between networks. Without
// any the local one is meant. They are addresses with ports.
func HostResolvers() ([]string, error) {
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
