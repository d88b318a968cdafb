package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"
)

// probeTimeout bounds the question whether the host's resolver asks us.
const probeTimeout = time.Second

// Routed says whether the host's own resolver brings names under .vm to the server whose probe is answered with id. It asks the way
// programs do, by /etc/resolv.conf. An error says what came instead.
func Routed(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	r := net.Resolver{PreferGo: true}
	got, err := r.LookupTXT(ctx, probe+"."+Domain+".")
	if err != nil {
		return err
	}
	if !slices.Contains(got, id) {
		return fmt.Errorf("names under .%s go to another server", Domain)
	}
	return nil
}

// Resolver is a program that answers the host's own queries.
type Resolver string

// The resolvers that Advise knows.
const (
	SystemdResolved Resolver = "systemd-resolved"
	NetworkManager  Resolver = "NetworkManager"
	Dnsmasq         Resolver = "dnsmasq"
	Unbound         Resolver = "unbound"
)

// Running says which of the resolvers the host has, by what each keeps under /run. root is "/" but in tests. NetworkManager
// counts only where none of the others does: then it writes /etc/resolv.conf, and can run a dnsmasq of its own.
func Running(root string) []Resolver {
	var out []Resolver
	for _, r := range []struct {
		name  Resolver
		marks []string
	}{
		{SystemdResolved, []string{"run/systemd/resolve/resolv.conf"}},
		{Dnsmasq, []string{"run/dnsmasq/dnsmasq.pid", "run/dnsmasq.pid"}},
		{Unbound, []string{"run/unbound.pid", "run/unbound/unbound.pid", "run/unbound.ctl"}},
	} {
		if slices.ContainsFunc(r.marks, func(m string) bool { return exists(root, m) }) {
			out = append(out, r.name)
		}
	}
	if len(out) == 0 && exists(root, "run/NetworkManager") {
		out = append(out, NetworkManager)
	}
	return out
}

func exists(root, path string) bool {
	_, err := os.Stat(root + "/" + path)
	return err == nil
}

// Advise gives the command that has a resolver ask the server at addr for names under .vm. It is one line,
// for a shell.
func Advise(r Resolver, addr netip.AddrPort) string {
	at := func(separator string) string { return fmt.Sprintf("%s%s%d", addr.Addr(), separator, addr.Port()) }
	switch r {
	case SystemdResolved: // resolved.conf(5); a port needs systemd 246
		return fmt.Sprintf(`sudo mkdir -p /etc/systemd/resolved.conf.d && printf '[Resolve]\nDNS=%s\nDomains=~%s\n' | sudo tee /etc/systemd/resolved.conf.d/banger.conf && sudo systemctl restart systemd-resolved`, addr, Domain)
	case NetworkManager: // NetworkManager.conf(5), dns=dnsmasq
		return fmt.Sprintf(`printf '[main]\ndns=dnsmasq\n' | sudo tee /etc/NetworkManager/conf.d/banger.conf && echo 'server=/%s/%s' | sudo tee /etc/NetworkManager/dnsmasq.d/banger.conf && sudo systemctl restart NetworkManager`, Domain, at("#"))
	case Dnsmasq: // dnsmasq(8), --server
		return fmt.Sprintf(`echo 'server=/%s/%s' | sudo tee /etc/dnsmasq.d/banger.conf && sudo systemctl restart dnsmasq`, Domain, at("#"))
	case Unbound: // unbound.conf(5); the root's signatures say that there is no .vm
		return fmt.Sprintf(`printf 'server:\n  do-not-query-localhost: no\n  domain-insecure: "%[1]s"\n  private-domain: "%[1]s"\nstub-zone:\n  name: "%[1]s"\n  stub-addr: %[2]s\n' | sudo tee /etc/unbound/unbound.conf.d/banger.conf && sudo systemctl restart unbound`, Domain, at("@"))
	}
	return ""
}
