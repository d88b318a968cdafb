package sandbox

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// findings is what doctor says. Whatever does not pass comes with something to type.
func (r *rig) findings() []doctor.Finding {
	r.t.Helper()
	found := r.s.Doctor(r.ctx(), false)
	for _, f := range found {
		if f.Severity != doctor.Pass && strings.TrimSpace(f.Fix) == "" {
			r.t.Errorf("no fix of %s %s: %s: %s", f.Severity, f.Code, f.Title, f.Detail)
		}
	}
	return found
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// notPassing are the findings of a code that do not pass.
func (r *rig) notPassing(code string) (out []doctor.Finding) {
	r.t.Helper()
	for _, f := range r.findings() {
		if f.Code == code && f.Severity != doctor.Pass {
			out = append(out, f)
		}
	}
	return out
}

// uncheckedDriver cannot be checked, for a reason without a hint, and knows jails that cannot be checked either.
type uncheckedDriver struct{ vmm.Driver }

func (uncheckedDriver) Check(context.Context) error { return errors.New("nobody knows why") }

func (uncheckedDriver) CheckJail(context.Context, string) (bool, string, error) {
	return false, "nobody knows why", errors.New("nobody knows why")
}

func (uncheckedDriver) NoJail() string { return "nobody knows why" }

// TestEveryFindingHasAFix: hosts that are broken, each in a way that is found, also by errors that were given no hint.
func TestEveryFindingHasAFix(t *testing.T) {
	remove := func(path func(r *rig) string) func(r *rig) {
		return func(r *rig) {
			if err := os.RemoveAll(path(r)); err != nil {
				r.t.Fatal(err)
			}
		}
	}
	stray := func(r *rig) string { return r.paths.VM("0123456789abcdef0123456789abcdef") }
	key := func(r *rig) string { return filepath.Join(r.bundle, bundle.FileName(bundle.SSHKey)) }
	for name, c := range map[string]struct {
		before, during func(r *rig) // the daemon's start
		codes          []string
		fix            string // of the first of codes: a part of it
	}{
		"no bundle":         {during: remove(func(r *rig) string { return r.bundle }), codes: []string{"bundle", "ssh-key"}, fix: "make install"},
		"no key":            {during: remove(key), codes: []string{"ssh-key", "bundle"}, fix: "make install"},
		"half a key":        {during: remove(func(r *rig) string { return key(r) + ".pub" }), codes: []string{"ssh-key"}, fix: "make install"},
		"no state":          {during: remove(func(r *rig) string { return r.paths.State }), codes: []string{"disk"}, fix: "ls -ld "},
		"an open state":     {during: func(r *rig) { r.must(os.Chmod(r.paths.State, 0o755)) }, codes: []string{"state-mode"}, fix: "chmod 700 "},
		"an unknown source": {before: func(r *rig) { r.cfg.MiseSource = "nonsense" }, codes: []string{"image-build"}, fix: "in config.toml"},
		"no templates": {
			before: func(r *rig) { r.paths.Cache = filepath.Join(r.dir, "cache") },
			during: func(r *rig) {
				r.must(os.RemoveAll(r.paths.Templates()))
				r.must(os.WriteFile(r.paths.Templates(), nil, 0o600))
			},
			codes: []string{"mke2fs"}, fix: "/cache/",
		},
		"a driver": {before: func(r *rig) { r.driver = func(d vmm.Driver) vmm.Driver { return uncheckedDriver{d} } },
			codes: []string{"vmm", "jail"}, fix: "banger daemon logs"},
		"a port in use": {before: func(r *rig) {
			taken, err := net.Listen("tcp", "127.0.0.1:0")
			r.must(err)
			r.t.Cleanup(func() { _ = taken.Close() })
			r.cfg.DNSListenAddr = taken.Addr().String()
		}, codes: []string{"dns"}, fix: "dns_listen_addr"},
		"an address that is not ours": {during: func(r *rig) {
			r.s.links.up(Link{Name: "none", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}})
		}, codes: []string{"guest dns"}, fix: "dns_listen_addr"},
		"an older guest": {during: func(r *rig) { r.create("calm-otter") }, codes: []string{"agents"}, fix: "banger vm restart calm-otter"},
		"a silent guest": {during: func(r *rig) { r.create("calm-otter"); r.faults("* freeze") }, codes: []string{"agents"}, fix: "banger vm show calm-otter"},
		"a disk of nobody": {before: func(r *rig) { r.must(os.MkdirAll(stray(r), 0o700)) },
			codes: []string{"state"}, fix: "mv "},
		"a network that is a mess": {before: func(r *rig) { r.must(os.WriteFile(filepath.Join(r.dir, "network"), nil, 0o600)) },
			codes: []string{"state"}, fix: "banger daemon restart"},
		"a network that is lost": {during: func(r *rig) {
			r.create("calm-otter")
			r.stop()
			r.must(os.RemoveAll(filepath.Join(r.dir, "network")))
			r.start()
		}, codes: []string{"state"}, fix: "banger vm restart calm-otter"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.ownBundle()
			if c.before != nil {
				c.before(r)
			}
			r.start()
			if c.during != nil {
				c.during(r)
			}
			for i, code := range c.codes {
				found := r.notPassing(code)
				if len(found) == 0 {
					t.Fatalf("doctor finds nothing wrong with %s: %+v", code, r.findings())
				}
				if i == 0 && !slices.ContainsFunc(found, func(f doctor.Finding) bool { return strings.Contains(f.Fix, c.fix) }) {
					t.Errorf("want %q of the fix: %+v", c.fix, found)
				}
			}
		})
	}
}

// TestFixOfAStrayDirectory is what to type: the disk is kept, and is reported no more.
func TestFixOfAStrayDirectory(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	stray := r.paths.VM("0123456789abcdef0123456789abcdef")
	r.must(os.MkdirAll(stray, 0o700))
	r.must(os.WriteFile(filepath.Join(stray, "work.ext4"), []byte("precious"), 0o600))
	r.start()
	found := r.notPassing("state")
	if len(found) != 1 {
		t.Fatalf("%+v", found)
	}
	command, rest, ok := strings.Cut(found[0].Fix, ", then ")
	if !ok || rest != "banger daemon restart" {
		t.Fatalf("%q", found[0].Fix)
	}
	if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	r.restart()
	if found := r.notPassing("state"); len(found) != 0 {
		t.Errorf("afterwards: %+v", found)
	}
	kept := filepath.Join(r.paths.State, "kept", filepath.Base(stray), "work.ext4")
	if b, err := os.ReadFile(kept); err != nil || string(b) != "precious" {
		t.Errorf("%s: %q, %v", kept, b, err)
	}
}
