package sandbox

import (
	"context"
	"net/netip"
	"os"
	"slices"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/dns"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// openDNS starts the server for .vm. Without it VMs have no names, and all else works.
func (s *Service) openDNS() {
	if s.cfg.DNSListenAddr == "" {
		return
	}
	s.dns, s.dnsFault = dns.Listen(s.cfg.DNSListenAddr, s.store.InstallationID(), s.addresses)
	if s.dnsFault != nil {
		s.log.Warn("names under .vm are not answered", "err", s.dnsFault)
		return
	}
	s.log.Info("names under .vm are answered", "addr", s.dns.Addr())
}

// addresses are what the name of a VM stands for: those by which the host reaches it, while it runs. It reads the
// records at each query, so an answer is as new as they are.
func (s *Service) addresses(name string) []netip.Addr {
	v, ok := s.store.VMByName(name)
	if !ok || v.State != vm.Running {
		return nil
	}
	if n := s.network.of(&v); n != nil {
		return n.Addresses(v)
	}
	return nil
}

// dnsWarnings are lines for the daemon's status.
func (s *Service) dnsWarnings() (out []string) {
	if s.dnsFault != nil {
		out = append(out, "names under .vm are not answered: "+s.dnsFault.Error())
	}
	for _, f := range s.links.check() {
		out = append(out, f.Title+" is "+f.Detail)
	}
	return out
}

// checkDNS says whether names are answered, and whether this host's programs get the answers.
func (s *Service) checkDNS(ctx context.Context) doctor.Finding {
	f := doctor.Finding{Code: "dns", Severity: doctor.Pass, Title: "Names of VMs"}
	switch {
	case s.dnsFault != nil:
		f.Severity, f.Detail, f.Fix = doctor.Warn, s.dnsFault.Error(), doctor.FixOf(s.dnsFault, doctor.ShowLog)
		return f
	case s.dns == nil:
		f.Detail = "none: dns_listen_addr is empty"
		return f
	}
	addr := s.dns.Addr()
	err := dns.Routed(ctx, s.store.InstallationID())
	if err == nil {
		f.Detail = "answered at " + addr.String() + ", where this host's resolver asks"
		return f
	}
	f.Severity = doctor.Warn
	f.Detail = "answered at " + addr.String() + ", but this host's resolver does not ask there: " + guestText(err.Error())
	running := dns.Running("/")
	if slices.Contains(running, dns.SystemdResolved) && os.Geteuid() == 0 && len(s.networks) > 0 && s.networks[0].Kind() == vm.BridgeNetwork && !s.links.told() {
		f.Severity, f.Detail = doctor.Pass, "answered at "+addr.String()+"; systemd-resolved is told to ask there when a VM runs"
		return f
	}
	if len(running) > 0 {
		f.Fix = dns.Advise(running[0], addr)
		return f
	}
	var all []string
	for _, r := range []dns.Resolver{dns.SystemdResolved, dns.Dnsmasq, dns.Unbound, dns.NetworkManager} {
		all = append(all, "with "+string(r)+": "+dns.Advise(r, addr))
	}
	f.Fix = strings.Join(all, "\n")
	return f
}
