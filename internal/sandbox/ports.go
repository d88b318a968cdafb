package sandbox

import (
	"context"
	"crypto/tls"
	"errors"
	"html"
	"io"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Ports are what listens in one guest.
type Ports struct {
	Ref   string
	VM    vm.VM
	Host  string // the guest's name on the network, "" if it has no address
	Ports []Port // may be other callers' as well, and must not be changed
	Err   error  // there is no such VM, or its guest did not tell
}

// Port is one listener. Its text came from the guest, and is printable.
type Port struct {
	Protocol string // tcp, udp
	Address  string // that it is bound to
	Port     int
	Loopback bool // it listens for the guest alone
	Reached  bool // the host reaches it by Ports.Host
	PID      int
	Process  string
	Command  string
	// What a TCP listener answered.
	Scheme string // https, http, "" for neither
	Status int    // 0: it takes https, and gave no page in time
	Title  string
}

const (
	// probeTime bounds one question to one listener, probesTime all those to one guest.
	probeTime  = 2 * time.Second
	probesTime = 8 * time.Second
	// probesAtOnce bounds the connections to one guest; it serves wire.MaxStreams.
	probesAtOnce = 16
	// maxProbes is how many listeners of a guest are asked.
	maxProbes = 128
	// maxPage is how much of a page is searched for its title, in bytes; maxTitle what is shown of that.
	maxPage  = 64 << 10
	maxTitle = 80
)

// Ports lists what listens in guests, one result per reference in the order given; without references of
// all VMs that run. TCP listeners are asked for HTTPS and HTTP, through the
// agent, so that no network is needed.
func (s *Service) Ports(ctx context.Context, refs []string) []Ports {
	var out []Ports
	s.each(ctx, refs, func(n int) { out = make([]Ports, n) }, func(i int, ref string, v vm.VM, err error) {
		out[i] = Ports{Ref: ref, VM: v, Err: err}
		if err != nil {
			return
		}
		m := s.machines.get(v.ID)
		if m == nil {
			out[i].Err = notRunning(v)
			return
		}
		got, err := m.ports.ask(ctx, v.Name, func(ctx context.Context) Ports {
			p := Ports{VM: v}
			s.listPorts(ctx, &p, nil)
			return p
		})
		if err != nil {
			got = Ports{Err: err}
		}
		out[i].Host, out[i].Ports, out[i].Err = got.Host, got.Ports, got.Err
	})
	return out
}

// listPorts lists what listens in a guest. Listeners that known has an answer of are not asked again; known
// may be nil.
func (s *Service) listPorts(ctx context.Context, p *Ports, known *answers) {
	var sess *agent.Session
	var answer *agentv1.PortsResponse
	p.Err = s.ask(ctx, &p.VM, "list of ports", func(ctx context.Context, opened *agent.Session) (err error) {
		sess = opened
		answer, err = sess.Client().Ports(ctx, &agentv1.PortsRequest{})
		return err
	})
	if p.Err != nil {
		return
	}
	p.Ports = tamePorts(answer)
	bounded, cancel := context.WithTimeout(ctx, probesTime)
	defer cancel()
	slots := make(chan struct{}, probesAtOnce)
	var all sync.WaitGroup
	probes := 0
	for i := range p.Ports {
		port := &p.Ports[i]
		at, asked := port.asked()
		if !asked || probes == maxProbes || known.fill(port) {
			continue
		}
		probes++
		slots <- struct{}{} // each probe is bounded
		all.Go(func() {
			defer func() { <-slots }()
			port.Scheme, port.Status, port.Title = probe(bounded, p.VM.Name+".vm", port.Port, func(ctx context.Context) (net.Conn, error) {
				if at.IsValid() {
					return sess.DialAddress(ctx, at)
				}
				return sess.DialTCP(ctx, port.Port, false)
			})
		})
	}
	all.Wait()
	known.keep(p.Ports)
	// Now: what began to listen a moment ago may have been published meanwhile.
	reached := s.network.reached(ctx, &p.VM)
	if reached == nil {
		return
	}
	p.Host = p.VM.Name + ".vm"
	for i := range p.Ports {
		p.Ports[i].Reached = reached(&p.Ports[i])
	}
}

// tamePorts makes what a guest said safe to show: what is no listener is left out, and one that listens on
// IPv4 and IPv6 is one.
func tamePorts(answer *agentv1.PortsResponse) []Port {
	type key struct {
		protocol       string
		port, pid      int
		loopback, wild bool
		address        netip.Addr // of what is neither
	}
	seen := map[key]bool{}
	out := []Port{}
	for _, l := range answer.GetListeners() {
		address, err := netip.ParseAddr(l.GetAddress())
		if err != nil || l.GetPort() < 1 || l.GetPort() > 65535 || l.GetProtocol() != "tcp" && l.GetProtocol() != "udp" {
			continue
		}
		address = address.WithZone("").Unmap()
		k := key{protocol: l.GetProtocol(), port: int(l.GetPort()), pid: int(max(l.GetPid(), 0)), loopback: address.IsLoopback(), wild: address.IsUnspecified()}
		if !k.wild {
			if address == netip.IPv6Loopback() || address == netip.AddrFrom4([4]byte{127, 0, 0, 1}) {
				address = netip.AddrFrom4([4]byte{127, 0, 0, 1})
			}
			k.address = address
		}
		if seen[k] {
			continue
		}
		seen[k] = true
		out = append(out, Port{Protocol: k.protocol, Address: address.String(), Port: k.port, Loopback: k.loopback, PID: k.pid,
			Process: guestText(l.GetProcess()), Command: guestText(l.GetCommand())})
	}
	return out
}

// asked says where the agent finds a listener that is asked for a page; invalid: by the guest's loopback, of either family. A link-local
// address is one with its interface only, which the guest does not tell.
func (p *Port) asked() (at netip.AddrPort, ok bool) {
	a, err := netip.ParseAddr(p.Address)
	switch {
	case err != nil || p.Protocol != "tcp" || a.IsLinkLocalUnicast():
		return at, false
	case a.IsUnspecified() || p.Address == "127.0.0.1":
		return at, true
	}
	return netip.AddrPortFrom(a, uint16(p.Port)), true
}

// page is what a web server answered.
type page struct {
	status     int
	title      string
	wantsHTTPS bool // it was asked by HTTP, and says that it takes HTTPS
}

// probe asks a listener for a page, by HTTPS and by HTTP at the same time: one that speaks neither may say
// nothing at all. A server of HTTPS tells those who come by HTTP so, by HTTP; in a guest that has much to do it says that
// long before it has shaken hands, and gets the time for it.
func probe(ctx context.Context, host string, port int, dial func(context.Context) (net.Conn, error)) (scheme string, status int, title string) {
	type got struct {
		page
		err error
	}
	bounded, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	ask := func(ctx context.Context, scheme string) <-chan got {
		answer := make(chan got, 1)
		go func() {
			p, err := get(ctx, scheme+"://"+net.JoinHostPort(host, strconv.Itoa(port))+"/", dial)
			answer <- got{p, err}
		}()
		return answer
	}
	secure, plain := ask(bounded, "https"), ask(bounded, "http")
	if p := <-secure; p.err == nil {
		return "https", p.status, p.title
	}
	p := <-plain
	switch {
	case p.err != nil:
		return "", 0, ""
	case p.wantsHTTPS:
		again := <-ask(ctx, "https") // nothing if it fails again
		return "https", again.status, again.title
	}
	return "http", p.status, p.title
}

// httpsForm is in the pages with which Go's server, nginx, Apache, lighttpd and Python's refuse who comes by HTTP.
var httpsForm = regexp.MustCompile(`(?i)\b(https|ssl|tls)\b`)

var titleForm = regexp.MustCompile(`(?is)<title[^>]*>(.*?)</title`)

// get fetches one page. The server is whoever listens: nothing that it says is
// trusted, its certificate is not looked at, and no redirect is followed.
func get(ctx context.Context, url string, dial func(context.Context) (net.Conn, error)) (page, error) {
	transport := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		TLSClientConfig:        &tls.Config{InsecureSkipVerify: true}, // whether it speaks TLS is all that is asked
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 16 << 10,
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return page{}, err
	}
	req.Header.Set("User-Agent", "banger")
	resp, err := client.Do(req)
	if err != nil {
		return page{}, err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(io.LimitReader(resp.Body, maxPage))
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && ctx.Err() == nil {
		return page{}, err
	}
	p := page{status: resp.StatusCode}
	p.wantsHTTPS = resp.TLS == nil && p.status == http.StatusBadRequest && httpsForm.Match(content)
	if m := titleForm.FindSubmatch(content); m != nil {
		title := strings.Join(strings.Fields(guestText(html.UnescapeString(string(m[1])))), " ")
		if r := []rune(title); len(r) > maxTitle {
			title = string(r[:maxTitle]) + "..."
		}
		p.title = title
	}
	return p, nil
}
