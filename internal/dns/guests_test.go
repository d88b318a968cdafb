package dns

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// upstream plays a resolver of the host's, over both protocols, and counts what it was asked. Names that begin with hold are
// answered when release is closed.
type upstream struct {
	mu      sync.Mutex
	asked   []string
	ids     map[uint16]bool
	release chan struct{}
	held    chan struct{}
}

func (u *upstream) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	name := q.Question[0].Name
	u.mu.Lock()
	u.asked = append(u.asked, w.LocalAddr().Network()+" "+name)
	u.ids[q.Id] = true
	u.mu.Unlock()
	if strings.HasPrefix(name, "hold") {
		u.held <- struct{}{}
		<-u.release
	}
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable = true
	n := 1
	if strings.HasPrefix(name, "long") {
		n = 40
	}
	for i := range n {
		rr, _ := dns.NewRR(fmt.Sprintf("%s 60 IN A 192.0.2.%d", name, i+1))
		m.Answer = append(m.Answer, rr)
	}
	_ = w.WriteMsg(m)
}

func (u *upstream) all() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return strings.Join(u.asked, "\n")
}

// start serves on loopback until the test ends, and says where.
func start(t testing.TB, h dns.Handler) string {
	t.Helper()
	tcp, udp, err := listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(tcp, udp, h)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s.Addr().String()
}

// guests is a server for guests that stand for VMs by loopback addresses: shop and db are of a group, spy is of none, only shop has NAT.
func guests(t *testing.T) (at string, u *upstream) {
	t.Helper()
	u = &upstream{ids: map[uint16]bool{}, release: make(chan struct{}), held: make(chan struct{}, 1000)}
	resolver := start(t, u)
	shop, db, spy := netip.MustParseAddr("127.0.9.1"), netip.MustParseAddr("127.0.9.2"), netip.MustParseAddr("127.0.9.3")
	all := map[string]netip.Addr{"shop": shop, "db": db, "spy": spy}
	of := func(from netip.Addr) (Guest, bool) {
		see := map[netip.Addr][]string{shop: {"shop", "db"}, db: {"shop", "db"}, spy: {"spy"}}[from]
		return Guest{Forward: from == shop, Lookup: func(name string) []netip.Addr {
			for _, n := range see {
				if n == name {
					return []netip.Addr{all[name]}
				}
			}
			return nil
		}}, len(see) > 0
	}
	g := NewGuests(of, func() ([]string, error) { return []string{"127.0.0.1:1", resolver}, nil }, slog.New(slog.DiscardHandler))
	return start(t, g), u
}

// guestAsks is a query from an address that stands for a guest's.
func guestAsks(t *testing.T, from, network, server, name string, kind uint16) *dns.Msg {
	t.Helper()
	m, err := guestQuery(from, network, server, name, kind)
	if err != nil {
		t.Fatalf("%s asks for %s over %s: %v", from, name, network, err)
	}
	return m
}

func guestQuery(from, network, server, name string, kind uint16) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var local net.Addr = &net.UDPAddr{IP: net.ParseIP(from)}
	if network == "tcp" {
		local = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	c := dns.Client{Net: network, Dialer: &net.Dialer{LocalAddr: local}, Timeout: 10 * time.Second}
	m, _, err := c.ExchangeContext(ctx, new(dns.Msg).SetQuestion(name, kind), server)
	return m, err
}

func TestGuests(t *testing.T) {
	at, u := guests(t)
	for _, network := range []string{"udp", "tcp"} {
		for _, c := range []struct{ from, name, want string }{
			{"127.0.9.1", "shop.vm.", "127.0.9.1"},
			{"127.0.9.1", "DB.vm.", "127.0.9.2"},
			{"127.0.9.2", "shop.VM.", "127.0.9.1"},
			{"127.0.9.1", "spy.vm.", "NXDOMAIN"},
			{"127.0.9.3", "spy.vm.", "127.0.9.3"},
			{"127.0.9.3", "shop.vm.", "NXDOMAIN"},
			{"127.0.9.3", "_banger.vm.", "NXDOMAIN"},
			{"127.0.9.3", "example.com.", "REFUSED"},
			{"127.0.9.2", "example.com.", "REFUSED"},
			{"127.0.9.1", "example.com.", "192.0.2.1"},
			{"127.0.9.9", "shop.vm.", "REFUSED"},
			{"127.0.9.9", "example.com.", "REFUSED"},
		} {
			m := guestAsks(t, c.from, network, at, c.name, dns.TypeA)
			got := dns.RcodeToString[m.Rcode]
			if len(m.Answer) == 1 {
				got = m.Answer[0].(*dns.A).A.String()
			}
			if got != c.want {
				t.Errorf("%s asks for %s over %s: %s, want %s", c.from, c.name, network, got, c.want)
			}
		}
		if m := guestAsks(t, "127.0.9.1", network, at, "long.example.com.", dns.TypeA); m.Truncated != (network == "udp") || network == "tcp" && len(m.Answer) != 40 {
			t.Errorf("a long answer over %s: truncated %v, %d records", network, m.Truncated, len(m.Answer))
		}
	}
	if strings.Contains(strings.ToLower(u.all()), ".vm.") {
		t.Errorf("the host's resolver was asked for a VM: %s", u.all())
	}
}

// TestGuestsFlood: one guest that asks without end is refused at some point, and takes nothing from others.
func TestGuestsFlood(t *testing.T) {
	at, u := guests(t)
	done := make(chan error, maxOfGuest)
	for i := range maxOfGuest {
		go func() {
			_, err := guestQuery("127.0.9.1", "udp", at, fmt.Sprintf("hold%d.example.com.", i), dns.TypeA)
			done <- err
		}()
	}
	for range maxOfGuest {
		select {
		case <-u.held:
		case <-time.After(10 * time.Second):
			t.Fatal("queries do not reach the resolver")
		}
	}
	if m := guestAsks(t, "127.0.9.1", "udp", at, "more.example.com.", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("one too many: %v", m)
	}
	for _, from := range []string{"127.0.9.1", "127.0.9.3"} { // what needs no other is answered all the time
		if m := guestAsks(t, from, "udp", at, "spy.vm.", dns.TypeA); m.Rcode == dns.RcodeServerFailure {
			t.Errorf("%s: %v", from, m)
		}
	}
	close(u.release)
	for range maxOfGuest {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if m := guestAsks(t, "127.0.9.1", "udp", at, "after.example.com.", dns.TypeA); m.Rcode != dns.RcodeSuccess {
		t.Errorf("after the flood: %v", m)
	}
}

// TestResolversThatFail: all of them, or that they are not known, is an answer too.
func TestResolversThatFail(t *testing.T) {
	for name, resolvers := range map[string]func() ([]string, error){
		"dead":    func() ([]string, error) { return []string{"127.0.0.1:1"}, nil },
		"unknown": func() ([]string, error) { return nil, fault.New(fault.NotFound, "/etc/resolv.conf", "is not there") },
	} {
		tcp, udp, err := listen("127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := newServer(tcp, udp, NewGuests(func(netip.Addr) (Guest, bool) { return Guest{Forward: true}, true }, resolvers, slog.New(slog.DiscardHandler)))
		if m := guestAsks(t, "127.0.0.1", "udp", s.Addr().String(), "example.com.", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
			t.Errorf("%s: %v", name, m)
		}
		if m := guestAsks(t, "127.0.0.1", "udp", s.Addr().String(), "any.vm.", dns.TypeA); m.Rcode != dns.RcodeNameError {
			t.Errorf("%s: a VM's name: %v", name, m)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}
