package dns

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRunning(t *testing.T) {
	for _, c := range []struct {
		marks []string
		want  []Resolver
	}{
		{nil, nil},
		{[]string{"run/systemd/resolve/resolv.conf", "run/NetworkManager/x"}, []Resolver{SystemdResolved}},
		{[]string{"run/NetworkManager/x"}, []Resolver{NetworkManager}},
		{[]string{"run/dnsmasq/dnsmasq.pid"}, []Resolver{Dnsmasq}},
		{[]string{"run/unbound.pid", "run/dnsmasq.pid"}, []Resolver{Dnsmasq, Unbound}},
	} {
		root := t.TempDir()
		for _, m := range c.marks {
			path := filepath.Join(root, m)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if diff := cmp.Diff(c.want, Running(root)); diff != "" {
			t.Errorf("%v (-want +got):\n%s", c.marks, diff)
		}
	}
}

// TestAdvice runs what is advised, with a sudo and a systemctl that do nothing and a tee that writes elsewhere,
// and compares the files that come of it.
func TestAdvice(t *testing.T) {
	const four, six = "127.0.0.1:42069", "[::1]:53"
	for _, c := range []struct {
		resolver Resolver
		addr     string
		want     map[string]string
	}{
		{SystemdResolved, four, map[string]string{"resolved.conf.d/banger.conf": "[Resolve]\nDNS=127.0.0.1:42069\nDomains=~vm\n"}},
		{SystemdResolved, six, map[string]string{"resolved.conf.d/banger.conf": "[Resolve]\nDNS=[::1]:53\nDomains=~vm\n"}},
		{Dnsmasq, four, map[string]string{"dnsmasq.d/banger.conf": "server=/vm/127.0.0.1#42069\n"}},
		{NetworkManager, six, map[string]string{"conf.d/banger.conf": "[main]\ndns=dnsmasq\n", "dnsmasq.d/banger.conf": "server=/vm/::1#53\n"}},
		{Unbound, four, map[string]string{"unbound.conf.d/banger.conf": `server:
  do-not-query-localhost: no
  domain-insecure: "vm"
  private-domain: "vm"
stub-zone:
  name: "vm"
  stub-addr: 127.0.0.1@42069
`}},
	} {
		t.Run(string(c.resolver)+" "+c.addr, func(t *testing.T) {
			bin, out := t.TempDir(), t.TempDir()
			for name, script := range map[string]string{
				"sudo": `[ "$1" != tee ] || { shift; f="$(basename "$(dirname "$1")")/$(basename "$1")"; mkdir -p "$OUT/$(dirname "$f")"; cat > "$OUT/$f"; }`,
			} {
				if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command("sh", "-ec", Advise(c.resolver, netip.MustParseAddrPort(c.addr)))
			cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "OUT="+out)
			if b, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, b)
			}
			got := map[string]string{}
			if err := filepath.WalkDir(out, func(path string, d os.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return err
				}
				b, err := os.ReadFile(path)
				rel, _ := filepath.Rel(out, path)
				got[rel] = string(b)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}
