//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// names lists a directory.
func names(dir string) (out []string) {
	for _, e := range must(os.ReadDir(dir)) {
		out = append(out, e.Name())
	}
	return out
}

// TestInstall uses what make install put somewhere, upgrades it under a VM, and removes it.
func TestInstall(t *testing.T) {
	slow(t)
	h := newHost(t)
	prefix := filepath.Join(filepath.Dir(h.state), "prefix")
	// -o: what was built is what is tested.
	install := func() { run(t, "make", "-C", checkout, "-o", "build", "install", "PREFIX="+prefix) }
	install()
	h.program = filepath.Join(prefix, "bin/banger")
	h.env = slices.DeleteFunc(h.env, func(kv string) bool { return strings.HasPrefix(kv, "BANGER_RUNTIME_DIR=") })
	h.create("installed")
	if got := h.in("installed", "echo kept >/root/file; id -u"); got != "0" {
		t.Errorf("got %q", got)
	}
	var status struct {
		RuntimeDir string `json:"runtime_dir"`
	}
	h.json(&status, "daemon", "status")
	if status.RuntimeDir != filepath.Join(prefix, "lib/banger") {
		t.Errorf("the bundle is %s", status.RuntimeDir)
	}
	key := filepath.Join(prefix, "lib/banger/id_ed25519")
	before := must(os.ReadFile(key))
	install()
	if after := must(os.ReadFile(key)); string(after) != string(before) {
		t.Error("an upgrade replaced the key")
	}
	if got := h.in("installed", "cat /root/file"); got != "kept" {
		t.Errorf("after an upgrade: %q", got)
	}
	h.do("vm", "delete", "installed")
	for range 2 { // the second time there is nothing to do
		cmd := command(t.Context(), "make", "-C", checkout, "uninstall", "PREFIX="+prefix)
		cmd.Env = h.env
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if got := names(filepath.Join(prefix, "bin")); len(got) > 0 {
			t.Errorf("left in bin: %v", got)
		}
		if left := run(t, "find", filepath.Join(prefix, "share"), "-type", "f"); left != "" {
			t.Errorf("left in share: %s", left)
		}
		if got := names(filepath.Join(prefix, "lib/banger")); !slices.Equal(got, []string{"id_ed25519", "id_ed25519.pub"}) {
			t.Errorf("left in lib: %v", got)
		}
	}
	h.program = filepath.Join(checkout, "banger") // for the end of the test
}

// TestDebianPackages builds the packages twice, unpacks them into a root of their own and uses them from there as an ordinary user, who has
// a key of their own.
func TestDebianPackages(t *testing.T) {
	slow(t)
	h, _ := newOrdinaryUser(t)
	build := func() string {
		out := run(t, "make", "-s", "-C", checkout, "-o", "build", "deb")
		var sums []string
		for _, line := range strings.Split(out, "\n") {
			if strings.HasSuffix(line, ".deb") {
				sums = append(sums, line)
			}
		}
		return strings.Join(sums, "\n")
	}
	sums := build()
	if again := build(); again != sums {
		t.Errorf("two builds differ:\n%s\n%s", sums, again)
	}
	root := filepath.Join(filepath.Dir(filepath.Dir(h.state)), "root")
	files := strings.Fields(sums)
	if len(files) != 4 {
		t.Fatalf("built %q", sums)
	}
	for _, deb := range []string{files[1], files[3]} {
		deb = filepath.Join(checkout, deb)
		run(t, "dpkg-deb", "-x", deb, root)
		listing := run(t, "dpkg-deb", "-c", deb)
		if strings.Contains(listing, "id_ed25519") {
			t.Errorf("%s holds a key", deb)
		}
		for _, line := range strings.Split(strings.TrimSpace(listing), "\n") {
			if f := strings.Fields(line); f[1] != "root/root" || strings.Contains(f[0][5:9], "w") {
				t.Errorf("%s: %s", deb, line)
			}
		}
		// What policy asks of every package, as far as dpkg tells.
		name := strings.TrimSpace(run(t, "dpkg-deb", "-f", deb, "Package"))
		want := []string{"doc/" + name + "/copyright", "doc/" + name + "/changelog.gz"}
		if name == "banger" {
			want = append(want, "man/man1/banger.1.gz", "bash-completion/completions/banger", "zsh/vendor-completions/_banger", "fish/vendor_completions.d/banger.fish")
			for _, unit := range []string{"bangerd.socket", "bangerd.service", "banger-guests.service"} {
				want = append(want, "../lib/systemd/user/"+unit)
			}
		}
		for _, file := range want {
			if !strings.Contains(listing, " ."+filepath.Join("/usr/share", file)+"\n") {
				t.Errorf("%s lacks %s", name, file)
			}
		}
		dir := t.TempDir()
		run(t, "dpkg-deb", "-e", deb, dir)
		cmd := command(t.Context(), "md5sum", "--quiet", "-c", filepath.Join(dir, "md5sums"))
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("md5sums of %s: %v\n%s", name, err, out)
		}
	}
	h.program = filepath.Join(root, "usr/bin/banger")
	h.create("packaged")
	if got := h.in("packaged", "id -u"); got != "0" {
		t.Errorf("got %q", got)
	}
	if info, err := os.Stat(filepath.Join(h.state, "id_ed25519")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the user's own key: %v, %v", info, err)
	}
	h.do("vm", "delete", "packaged")
}
