package sandbox

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/dns"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Link is a device of the host by which it reaches VMs, and they the host.
type Link struct {
	Name      string
	Addresses []netip.Addr                        // the host's own there
	Guest     func(from netip.Addr) (vm.ID, bool) // which VM has an address
	// Listen opens port 53 of an address, and Keep has the host's resolver ask at addr for names under .vm until ctx ends, or returns
	// why it does not. nil: this process may do that itself.
	Listen func(ctx context.Context, at netip.Addr) (tcp net.Listener, udp net.PacketConn, err error)
	Keep   func(ctx context.Context, addr netip.AddrPort) error
}

// listen opens the sockets of a server for guests.
func (l Link) listen(ctx context.Context, at netip.Addr) (net.Listener, net.PacketConn, error) {
	if l.Listen != nil {
		return l.Listen(ctx, at)
	}
	return dns.ListenForGuests(at)
}

// linkNames has names answered on a link while it is up: to guests, by a server at each of the host's addresses, and
// to the host, by telling systemd-resolved of the server for .vm.
type linkNames struct {
	service *Service

	mu      sync.Mutex
	servers map[netip.Addr]*dns.Server
	faults  map[netip.Addr]error
	index   int    // of the device that systemd-resolved is told of
	stop    func() // takes it back
}

// up serves on a link that has come, or has changed. What cannot be served is said by check, and tried again the next time.
func (l *linkNames) up(link Link) {
	s := l.service
	l.mu.Lock()
	defer l.mu.Unlock()
	l.close(func(a netip.Addr) bool { return !slices.Contains(link.Addresses, a) })
	l.faults = map[netip.Addr]error{}
	var guests *dns.Guests
	for _, a := range link.Addresses {
		if l.servers[a] != nil {
			continue
		}
		if guests == nil {
			guests = dns.NewGuests(func(from netip.Addr) (dns.Guest, bool) { return s.guest(link, from) }, dns.HostResolvers, s.log)
		}
		tcp, udp, err := link.listen(s.bg, a)
		switch {
		case a.Is6() && errors.Is(err, unix.EADDRNOTAVAIL): // a host without IPv6
		case err != nil:
			l.faults[a] = err
			s.log.Warn("guests are not answered DNS", "addr", a, "err", err)
		default:
			if l.servers == nil {
				l.servers = map[netip.Addr]*dns.Server{}
			}
			l.servers[a] = dns.ServeGuests(tcp, udp, guests)
		}
	}
	l.tell(link)
}

// close ends servers. Called with mu locked.
func (l *linkNames) close(which func(netip.Addr) bool) {
	for a, server := range l.servers {
		if !which(a) {
			continue
		}
		if err := server.Close(); err != nil {
			l.service.log.Warn("a DNS server for guests did not end well", "addr", a, "err", err)
		}
		delete(l.servers, a)
	}
}

// down takes everything back.
func (l *linkNames) down() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.close(func(netip.Addr) bool { return true })
	l.faults = nil
	if l.stop != nil {
		l.stop()
		l.stop, l.index = nil, 0
	}
}

// tell has systemd-resolved told, if there is one, that names under .vm are asked by way of a link, again whenever it starts.
// Called with mu locked; it waits for no bus.
func (l *linkNames) tell(link Link) {
	s := l.service
	if s.dns == nil {
		return
	}
	i, err := net.InterfaceByName(link.Name)
	if err != nil || i.Index == l.index { // one that is gone again takes its settings with it
		return
	}
	if l.stop != nil {
		l.stop()
	}
	ctx, cancel := context.WithCancel(s.bg)
	done := make(chan struct{})
	l.index, l.stop = i.Index, func() { cancel(); <-done }
	s.watchers.Go(func() {
		var err error
		if link.Keep != nil {
			err = link.Keep(ctx, s.dns.Addr())
		} else {
			err = dns.Keep(ctx, i.Index, s.dns.Addr(), s.log)
		}
		close(done)
		if err == nil {
			return
		}
		s.log.Info("systemd-resolved is not told of names under .vm", "err", err)
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.index == i.Index { // the next VM that comes tries again
			l.index = 0
		}
	})
}

// guest is what one that asks on a link is told: its own name and those of its group's VMs on the same link, and with NAT
// what the host can resolve.
func (s *Service) guest(link Link, from netip.Addr) (dns.Guest, bool) {
	id, ok := link.Guest(from)
	if !ok {
		return dns.Guest{}, false
	}
	v, ok := s.store.VM(id)
	if !ok || v.Interface == nil {
		return dns.Guest{}, false
	}
	return dns.Guest{Forward: v.Spec.NAT, Lookup: func(name string) []netip.Addr {
		if name == v.Name {
			return ownAddresses(v)
		}
		other, ok := s.store.VMByName(name)
		if !ok || other.State != vm.Running || other.Interface == nil || other.Interface.Kind != v.Interface.Kind ||
			v.Spec.NetworkGroup == "" || v.Spec.NetworkGroup != other.Spec.NetworkGroup {
			return nil
		}
		return ownAddresses(other)
	}}, true
}

// ownAddresses are those that a VM has itself.
func ownAddresses(v vm.VM) []netip.Addr {
	own := []netip.Addr{v.Interface.IPv4.Addr()}
	if v.Interface.IPv6.IsValid() {
		own = append(own, v.Interface.IPv6.Addr())
	}
	return own
}

// told says whether the host's resolver is told, or is being told.
func (l *linkNames) told() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.index != 0
}

// check says which guests are not answered.
func (l *linkNames) check() []doctor.Finding {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []doctor.Finding
	for a, err := range l.faults {
		out = append(out, doctor.Finding{Code: "guest dns", Severity: doctor.Warn, Title: "DNS for guests",
			Detail: "not answered at " + a.String() + ": " + err.Error(),
			Fix:    doctor.FixOf(err, doctor.ShowLog)})
	}
	slices.SortFunc(out, func(a, b doctor.Finding) int { return strings.Compare(a.Detail, b.Detail) })
	return out
}
