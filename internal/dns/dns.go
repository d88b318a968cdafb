// Package dns owns the names of VMs: the authoritative server for .vm, the one that guests ask, the host
// resolvers that are told of the first, and what to type where that cannot be done.
//
// It keeps no records and caches nothing: it asks for the addresses of a name at each query. Other names it
// resolves for guests alone, by asking the host's resolvers.
package dns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Domain is the zone, without dots. It is no top-level domain of the internet's root.
const Domain = "vm"

// probe is a name that no VM can have. Its TXT record holds the installation's id, by which a resolver
// shows that it asks this server.
const probe = "_banger"

const (
	// ttl of what is there, and of what is not (RFC 2308 5), in seconds. A resolver that caches may keep the
	// address of a VM that was deleted that long.
	ttl = 1

	// udpSize is what a reply may have over UDP if the query allows it: the size that DNS Flag Day 2020 settled on.
	udpSize = 1232

	maxConns    = 64               // over TCP at a time; further ones wait in the kernel's queue
	connIdle    = 10 * time.Second // between queries over one TCP connection (RFC 7766 6.2.3: "order of a few seconds")
	ioTimeout   = 2 * time.Second
	maxPerConn  = 10_000 // queries
	portTries   = 16
	closeBounds = 2 * time.Second
)

// Lookup gives the addresses of a VM by its name in lower case, without a dot. None means that there is no
// such name. It is called for each query, from several goroutines, and must not block.
type Lookup func(name string) []netip.Addr

// Server answers over UDP and TCP at one address. Safe for concurrent use.
type Server struct {
	addr     netip.AddrPort
	udp, tcp *dns.Server
	done     chan error // of both
}

// Listen starts a server. addr is an IP address and a port, over which both protocols are served; port 0 is one that
// is free. id is what the probe is answered with. fault.Unavailable if the address is taken or not this host's, fault.Permission
// if this user may not have the port.
func Listen(addr, id string, lookup Lookup) (*Server, error) {
	tcp, udp, err := listenHinting(addr)
	if err != nil {
		return nil, err
	}
	return newServer(tcp, udp, &authority{lookup: lookup, id: id}), nil
}

func listenHinting(addr string) (net.Listener, net.PacketConn, error) {
	tcp, udp, err := listen(addr)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return nil, nil, fault.Wrap(err, fault.Unavailable, addr, "another program answers there, perhaps another banger").
			WithHint("see who: ss -lnutp 'sport = :%s'; or set dns_listen_addr in config.toml; then banger daemon stop", port(addr))
	case errors.Is(err, unix.EACCES):
		return nil, nil, fault.Wrap(err, fault.Permission, addr, "this user may not listen there").
			WithHint("set dns_listen_addr to a port of 1024 or higher in config.toml, then banger daemon stop")
	case err != nil:
		return nil, nil, fault.Wrap(err, fault.Unavailable, addr, "cannot listen there").
			WithHint("set dns_listen_addr in config.toml to an address of this host, then banger daemon stop")
	}
	return tcp, udp, nil
}

func newServer(tcp net.Listener, udp net.PacketConn, h dns.Handler) *Server {
	s := &Server{done: make(chan error, 2)}
	s.addr = tcp.Addr().(*net.TCPAddr).AddrPort()
	s.udp = &dns.Server{PacketConn: udp, Handler: h, UDPSize: udpSize, ReadTimeout: ioTimeout, WriteTimeout: ioTimeout, MsgAcceptFunc: Accept}
	s.tcp = &dns.Server{Listener: netutil.LimitListener(tcp, maxConns), Handler: h, ReadTimeout: ioTimeout, WriteTimeout: ioTimeout,
		IdleTimeout: func() time.Duration { return connIdle }, MaxTCPQueries: maxPerConn, MsgAcceptFunc: Accept}
	for _, srv := range []*dns.Server{s.udp, s.tcp} {
		began := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(began) }
		go func() { s.done <- srv.ActivateAndServe() }()
		<-began // Shutdown fails before
	}
	return s
}

// listen binds both. A port that is free for the one may be taken for the other: with port 0, others are tried.
func listen(addr string) (tcp net.Listener, udp net.PacketConn, err error) {
	var c net.ListenConfig
	ctx := context.Background()
	for try := 1; ; try++ {
		if tcp, err = c.Listen(ctx, "tcp", addr); err != nil {
			return nil, nil, err
		}
		udp, err = c.ListenPacket(ctx, "udp", tcp.Addr().String())
		if err == nil {
			return tcp, udp, nil
		}
		err = errors.Join(err, tcp.Close())
		if port(addr) != "0" || try == portTries {
			return nil, nil, err
		}
	}
}

func port(addr string) string {
	_, p, err := net.SplitHostPort(addr)
	if err != nil {
		return "" // Listen says what is wrong
	}
	return p
}

// Addr is where the server answers.
func (s *Server) Addr() netip.AddrPort { return s.addr }

// Close stops answering. Call it once.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeBounds)
	defer cancel()
	err := errors.Join(s.udp.ShutdownContext(ctx), s.tcp.ShutdownContext(ctx))
	for range 2 {
		select {
		case served := <-s.done:
			err = errors.Join(err, served)
		case <-ctx.Done():
			return errors.Join(err, fault.Wrap(ctx.Err(), fault.Timeout, "DNS", "the server did not stop"))
		}
	}
	return err
}

// Accept looks at a header before the rest is unpacked, in each server of a Handler of this package. What is no query gets no
// answer: it might be one of a server like this, and the two would go on forever.
func Accept(h dns.Header) dns.MsgAcceptAction {
	const response, opcodeShift, opcodeMask = 1 << 15, 11, 0xf // RFC 1035 4.1.1
	switch {
	case h.Bits&response != 0:
		return dns.MsgIgnore
	case int(h.Bits>>opcodeShift)&opcodeMask != dns.OpcodeQuery:
		return dns.MsgRejectNotImplemented
	case h.Qdcount != 1, h.Ancount > 1, h.Nscount > 1, h.Arcount > 2: // as in miekg/dns's own
		return dns.MsgReject
	}
	return dns.MsgAccept
}

// authority answers for .vm, and refuses other names.
type authority struct {
	lookup Lookup
	id     string // "": it has no probe
}

// asks says whether a message has a question, and answers one that has none: of a header with nothing behind it the library makes
// such a message, whatever number of questions it promised to Accept.
func asks(w dns.ResponseWriter, q *dns.Msg) bool {
	if len(q.Question) == 1 {
		return true
	}
	write(w, q, new(dns.Msg).SetRcodeFormatError(q))
	return false
}

// ServeDNS answers one query.
func (a *authority) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	if asks(w, q) {
		write(w, q, a.answer(q))
	}
}

// write sends a reply to a query, as much of it as whoever asked takes.
func write(w dns.ResponseWriter, q, m *dns.Msg) {
	size := dns.MinMsgSize
	if w.LocalAddr().Network() == "tcp" {
		size = dns.MaxMsgSize
	} else if o := q.IsEdns0(); o != nil {
		size = min(max(int(o.UDPSize()), dns.MinMsgSize), udpSize)
	}
	m.Truncate(size)
	_ = w.WriteMsg(m) // whoever asked is gone, or asks again
}

// answer makes the reply to a query with one question.
func (a *authority) answer(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable = false
	if o := q.IsEdns0(); o != nil {
		m.SetEdns0(udpSize, false)
		if o.Version() != 0 { // RFC 6891 6.1.3
			m.Rcode = dns.RcodeBadVers
			return m
		}
	}
	question := q.Question[0]
	labels := dns.SplitDomainName(question.Name)
	if !under(question.Name) ||
		question.Qclass != dns.ClassINET && question.Qclass != dns.ClassANY {
		m.Rcode = dns.RcodeRefused
		return m
	}
	m.Authoritative = true
	switch len(labels) {
	case 1:
		if question.Qtype == dns.TypeSOA || question.Qtype == dns.TypeANY {
			m.Answer = append(m.Answer, soa())
		}
		if question.Qtype == dns.TypeNS || question.Qtype == dns.TypeANY {
			m.Answer = append(m.Answer, &dns.NS{Hdr: header(Domain+".", dns.TypeNS), Ns: nameserver})
		}
	case 2:
		m.Rcode = a.records(m, question, strings.ToLower(labels[0]))
	default:
		m.Rcode = dns.RcodeNameError
	}
	if len(m.Answer) == 0 {
		m.Ns = append(m.Ns, soa()) // RFC 2308 3: it says how long the answer "no" holds
	}
	return m
}

// records adds what there is of a name below .vm, and returns the code.
func (a *authority) records(m *dns.Msg, q dns.Question, name string) int {
	wants := func(t uint16) bool { return q.Qtype == t || q.Qtype == dns.TypeANY }
	if name == probe && a.id != "" {
		if wants(dns.TypeTXT) {
			m.Answer = append(m.Answer, &dns.TXT{Hdr: header(q.Name, dns.TypeTXT), Txt: []string{a.id}})
		}
		return dns.RcodeSuccess
	}
	var addrs []netip.Addr
	if a.lookup != nil {
		addrs = a.lookup(name)
	}
	if len(addrs) == 0 {
		return dns.RcodeNameError
	}
	for _, at := range addrs {
		switch at = at.Unmap(); {
		case at.Is4() && wants(dns.TypeA):
			m.Answer = append(m.Answer, &dns.A{Hdr: header(q.Name, dns.TypeA), A: at.AsSlice()})
		case at.Is6() && wants(dns.TypeAAAA):
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: header(q.Name, dns.TypeAAAA), AAAA: at.AsSlice()})
		}
	}
	return dns.RcodeSuccess
}

func header(name string, t uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: t, Class: dns.ClassINET, Ttl: ttl}
}

// nameserver is under .invalid (RFC 2606): nobody is to look for the server but by its address.
const nameserver = "banger.invalid."

func soa() *dns.SOA {
	return &dns.SOA{Hdr: header(Domain+".", dns.TypeSOA), Ns: nameserver, Mbox: nameserver,
		Serial: 1, Refresh: 3600, Retry: 3600, Expire: 3600, Minttl: ttl}
}
