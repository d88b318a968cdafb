//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// newOrdinaryUser is an installation in the home of a user who is in no special group, and that user.
func newOrdinaryUser(t *testing.T, settings ...string) (*host, *user.User) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can make a user; every test here runs as an ordinary user already")
	}
	name := fmt.Sprintf("banger-e2e-%d", os.Getpid())
	dir, err := os.MkdirTemp("", "u")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	home := filepath.Join(dir, "home")
	run(t, "useradd", "--home-dir", home, "--create-home", "--shell", "/bin/sh", "--user-group", name)
	t.Cleanup(func() { run(t, "userdel", "--force", name) })
	u, err := user.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}

	// The checkout may lie where only root gets to: programs and bundle are installed for the user.
	prefix := filepath.Join(home, ".local")
	for _, program := range []string{"banger", "bangerd"} {
		run(t, "install", "-D", "-m", "755", filepath.Join(checkout, program), filepath.Join(prefix, "bin", program))
	}
	run(t, filepath.Join(checkout, "dist/mkruntime"), "-runtime", filepath.Join(checkout, "runtime"), "-to", filepath.Join(prefix, "lib/banger"), "install")
	run(t, "chown", "-R", fmt.Sprintf("%d:%d", uid, gid), home)

	if cover := os.Getenv("GOCOVERDIR"); cover != "" { // what the user's programs ran counts as well
		if err := os.Chmod(cover, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = os.RemoveAll(fmt.Sprintf("/tmp/banger-%d", uid)) }) // after the host's end, which makes it again
	t.Setenv("BANGER_E2E_CAPTURED", "")                                        // content that is this user's is nobody else's
	h := newHostIn(t, filepath.Join(home, "e2e"), settings...)
	run(t, "chown", "-R", fmt.Sprintf("%d:%d", uid, gid), filepath.Join(home, "e2e"))
	h.program = filepath.Join(prefix, "bin/banger")
	credential := &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	if underFirecracker() { // which takes KVM, and that a group on most hosts
		if kvm, err := user.LookupGroup("kvm"); err == nil {
			id, _ := strconv.Atoi(kvm.Gid)
			credential.Groups = []uint32{uint32(id)}
		}
	}
	h.sys = &syscall.SysProcAttr{Credential: credential}
	h.env = []string{"HOME=" + home, "PATH=/usr/bin:/bin", "USER=" + name, "BANGER_STATE_DIR=" + h.state, "BANGER_CONFIG=" + filepath.Join(home, "e2e", "config.toml"),
		"BANGER_TEST_RUN=" + os.Getenv("BANGER_TEST_RUN"), "GOCOVERDIR=" + os.Getenv("GOCOVERDIR")} // no XDG_RUNTIME_DIR: as after su

	return h, u
}

// TestOrdinaryUser is the life of a VM for a user in no special group, without sudo.
func TestOrdinaryUser(t *testing.T) {
	h, u := newOrdinaryUser(t)
	uid, _ := strconv.Atoi(u.Uid)
	socket := strings.TrimSpace(h.do("daemon", "socket"))
	if want := fmt.Sprintf("/tmp/banger-%d/", uid); !strings.HasPrefix(socket, want) {
		t.Errorf("the socket is %s, want it under %s", socket, want)
	}
	h.create("own")
	if got := h.in("own", "id -un; stat -c '%U %a' /root; echo mine > file; cat file"); got != "root\nroot 700\nmine" {
		t.Errorf("got %q", got)
	}
	var owners []string
	for pid := range h.processes() {
		info, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
		if err != nil {
			continue
		}
		owners = append(owners, strconv.Itoa(int(info.Sys().(*syscall.Stat_t).Uid)))
	}
	if len(owners) < 2 || strings.Trim(strings.Join(owners, ""), u.Uid) != "" {
		t.Errorf("processes belong to users %v, want all to %s", owners, u.Uid)
	}
	if info, err := os.Stat(h.state); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the state directory is %v, %v", info.Mode(), err)
	}
	h.do("vm", "stop", "own")
	h.disksAreClean(h.show("own"))
	h.do("vm", "start", "own")
	if got := h.in("own", "cat file"); got != "mine" {
		t.Errorf("got %q", got)
	}
	h.do("vm", "delete", "own")
}

// run runs a tool of the host, which must succeed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := command(t.Context(), name, args...)
	if t.Context().Err() != nil { // in a clean-up
		cmd = exec.Command(cmd.Path, args...)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}
