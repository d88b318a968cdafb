package sshconfig

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func content(dir string, names ...string) Content {
	c := Content{Installation: "inst", Program: "/opt/it's 100%/banger", Env: []string{"A=b c"}, User: "root", IdentityFile: "/k e/%y", KnownHosts: filepath.Join(dir, "known")}
	for _, n := range names {
		c.Hosts = append(c.Hosts, Host{Name: n, ID: "id-" + n, Alias: n + ".banger", HostKey: "ssh-ed25519 AAAA"})
	}
	return c
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func no(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// What ssh itself makes of the file, odd paths included.
func TestSSHReadsIt(t *testing.T) {
	dir := t.TempDir()
	f := Files{Dir: dir}
	no(t, f.Write(content(dir, "b", "a")))
	out, err := exec.Command("ssh", "-G", "-F", f.Path(), "a.vm").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{
		"user root\n", "hostkeyalias a.banger\n", "identitiesonly yes\n", "proxyusefdpass yes\n", "stricthostkeychecking true\n",
		`proxycommand env 'A=b c' '/opt/it'\''s 100%%/banger' internal ssh-proxy id-a 22` + "\n", "identityfile /k e/%%y\n", "userknownhostsfile " + dir + "/known\n",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is not in what ssh understood:\n%s", want, out)
		}
	}
	if out, err := exec.Command("ssh", "-G", "-F", f.Path(), "other.vm").CombinedOutput(); err != nil || strings.Contains(string(out), "proxycommand") {
		t.Errorf("another host: %v\n%s", err, out)
	}
	if got := read(t, dir+"/known"); got != "b.banger ssh-ed25519 AAAA\na.banger ssh-ed25519 AAAA\n" {
		t.Errorf("known hosts: %q", got)
	}
	bad := content(dir, "a")
	bad.Program = "/x\ny"
	if err := f.Write(bad); !fault.Is(err, fault.Unsupported) {
		t.Errorf("a path of two lines: %v", err)
	}
}

// The user's own configuration keeps every byte, its mode, and a link its target.
func TestInclude(t *testing.T) {
	for _, own := range []string{"", "Host x\n  User y", "# c\n\nHost *\n"} {
		dir, elsewhere := t.TempDir(), t.TempDir()
		no(t, os.WriteFile(elsewhere+"/c", []byte(own), 0o640))
		no(t, os.Symlink(elsewhere+"/c", dir+"/config"))
		f := Files{Dir: dir}
		for range 2 { // once more changes nothing
			no(t, f.Include())
			if got := read(t, elsewhere+"/c"); got != includeLine+"\n"+own {
				t.Errorf("got %q", got)
			}
		}
		if on, err := f.Included(); !on || err != nil {
			t.Errorf("included: %v, %v", on, err)
		}
		st, err := os.Stat(elsewhere + "/c")
		no(t, err)
		if st.Mode().Perm() != 0o640 {
			t.Errorf("mode %v", st.Mode())
		}
		no(t, f.Remove())
		no(t, f.Remove())
		if got := read(t, elsewhere+"/c"); got != own {
			t.Errorf("after Remove: %q, want %q", got, own)
		}
		if link, err := os.Readlink(dir + "/config"); err != nil || link != elsewhere+"/c" {
			t.Errorf("the link: %q, %v", link, err)
		}
		left, err := os.ReadDir(dir)
		no(t, err)
		if len(left) != 1 {
			t.Errorf("left: %v", left)
		}
	}
}

func TestWhoseFile(t *testing.T) {
	dir := t.TempDir()
	f := Files{Dir: filepath.Join(dir, ".ssh")}
	if program, err := f.Installed("inst"); program != "" || err != nil {
		t.Errorf("of none: %q, %v", program, err)
	}
	no(t, f.Write(content(dir)))
	if program, err := f.Installed("inst"); program != "/opt/it's 100%/banger" || err != nil {
		t.Errorf("ours: %q, %v", program, err)
	}
	if _, err := f.Installed("another"); !fault.Is(err, fault.Exists) || !strings.Contains(err.Error(), "(inst)") {
		t.Errorf("another installation's: %v", err)
	}
	no(t, os.WriteFile(f.Path(), []byte("Host mine\n"), 0o600))
	if _, err := f.Installed("inst"); !fault.Is(err, fault.Exists) {
		t.Errorf("somebody's own: %v", err)
	}
	no(t, os.Remove(f.Path()))
	no(t, os.Symlink("/etc/passwd", f.Path()))
	if _, err := f.Installed("inst"); !fault.Is(err, fault.Exists) {
		t.Errorf("a link: %v", err)
	}
	for _, p := range []string{f.Dir, dir + "/known"} {
		st, err := os.Stat(p)
		no(t, err)
		if st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", p, st.Mode())
		}
	}
}
