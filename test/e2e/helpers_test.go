//go:build e2e

package e2e

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// helper runs one of the shell scripts at the checkout's top, in the environment of the host's installation.
func (h *host) helper(name string, env []string, args ...string) result {
	h.t.Helper()
	cmd := command(h.t.Context(), filepath.Join(checkout, name), args...)
	cmd.Env, cmd.Dir = append(append([]string{}, h.env...), env...), filepath.Dir(h.state)
	out, err := cmd.CombinedOutput()
	r := result{command: name, stdout: string(out)}
	if err != nil {
		r.code = cmd.ProcessState.ExitCode()
	}
	return r
}

// TestHelpersRefuse: what is typed wrong is said before anything begins, with a status of 1 and a hint.
func TestHelpersRefuse(t *testing.T) {
	h := newHost(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "base.ext4")
	must(0, os.WriteFile(file, []byte("no filesystem"), 0o644))
	bad := filepath.Join(dir, "packages")
	must(0, os.WriteFile(bad, []byte("git\n--force-yes\n"), 0o644))
	for _, c := range []struct {
		word string
		args []string
	}{
		{"are to be named", []string{"customize.sh"}},
		{"are to be named", []string{"customize.sh", file}},
		{"unknown argument", []string{"customize.sh", "--nonsense", file, file}},
		{"needs a value", []string{"customize.sh", "--script"}},
		{"does not exist", []string{"customize.sh", file + "-", filepath.Join(dir, "x.ext4")}},
		{"does not end in .ext4", []string{"customize.sh", file, filepath.Join(dir, "x.img")}},
		{"does not exist", []string{"customize.sh", file, filepath.Join(dir, "none", "x.ext4")}},
		{"is no package name", []string{"customize.sh", "--packages", bad, file, filepath.Join(dir, "x.ext4")}},
		{"cannot be read", []string{"customize.sh", "--script", filepath.Join(dir, "none"), file, filepath.Join(dir, "x.ext4")}},
		{"there is no terminal", []string{"interactive.sh", file, filepath.Join(dir, "x.ext4")}},
		{"too many", []string{"interactive.sh", "a", "b", "c"}},
		{"unknown argument", []string{"interactive.sh", "--x"}},
		{"unknown argument", []string{"make-rootfs.sh", "--base"}},
		{"needs a value", []string{"make-rootfs.sh", "--base-rootfs"}},
		{"unknown argument", []string{"verify.sh", "--all"}},
	} {
		if got := h.helper(c.args[0], nil, c.args[1:]...); got.code != 1 || !strings.Contains(got.stdout, c.word) {
			t.Errorf("%q: status %d\n%s", c.args, got.code, got.stdout)
		}
	}
	for _, name := range []string{"customize.sh", "interactive.sh", "make-rootfs.sh", "verify.sh"} {
		if got := h.helper(name, nil, "--help"); got.code != 0 || !strings.Contains(got.stdout, "./"+name) || strings.Contains(got.stdout, "#") {
			t.Errorf("%s --help: status %d\n%s", name, got.code, got.stdout)
		}
	}
	if left := must(os.ReadDir(dir)); len(left) != 2 {
		t.Errorf("they left %v", left)
	}
}

// TestHelpers runs the helpers for what they are there for, and boots what they make.
func TestHelpers(t *testing.T) {
	slow(t)
	h := newHost(t)
	dir := filepath.Dir(h.state)
	if got := h.helper("verify.sh", nil, "--nat"); got.code != 0 || !strings.Contains(got.stdout, "banger works here") {
		t.Fatalf("verify.sh --nat: status %d\n%s", got.code, got.stdout)
	}
	if all := h.list(); len(all) != 0 {
		t.Errorf("the scripts left %v", all)
	}

	// A package, a script, a file of one's own in /root, one that is someone else's.
	packages, script := filepath.Join(dir, "packages"), filepath.Join(dir, "script")
	must(0, os.WriteFile(packages, []byte("hello # one\nhello\n"), 0o644))
	must(0, os.WriteFile(script, []byte("#!/bin/sh\nset -e\necho mine >/root/note\ninstall -o nobody -m 4711 /bin/true /srv/odd\necho the script ran\n"), 0o644))
	made := filepath.Join(dir, "made.ext4")
	got := h.helper("customize.sh", nil, "--packages", packages, "--script", script, bundleFile("rootfs-docker.ext4"), made)
	if got.code != 0 || !strings.Contains(got.stdout, "the script ran") {
		t.Fatalf("customize.sh: status %d\n%s", got.code, got.stdout)
	}
	if left := must(filepath.Glob(filepath.Join(h.state, "customize-*"))); len(left) > 0 {
		t.Errorf("customize.sh left %v", left)
	}
	boots := newHostIn(t, t.TempDir(), `default_rootfs = "`+made+`"`, `default_work_seed = "`+filepath.Join(dir, "made.work-seed.ext4")+`"`)
	boots.create("made")
	if got := boots.in("made", "hello; cat /root/note; stat -c '%U %a' /srv/odd; systemctl is-system-running --wait; hostname; stat -c %a /root"); got != "Hello, world!\nmine\nnobody 4711\nrunning\nmade\n700" {
		t.Errorf("got %q", got)
	}
	boots.do("vm", "delete", "made")

	// A script that fails leaves nothing but the log.
	must(0, os.WriteFile(script, []byte("#!/bin/sh\necho it breaks here; exit 3\n"), 0o644))
	broken := filepath.Join(dir, "broken.ext4")
	got = h.helper("customize.sh", nil, "--script", script, made, broken)
	if got.code != 1 || !strings.Contains(got.stdout, "it breaks here") || !strings.Contains(got.stdout, "its log: ") {
		t.Errorf("a broken script: status %d\n%s", got.code, got.stdout)
	}
	if left := must(filepath.Glob(filepath.Join(h.state, "customize-*"))); len(left) > 0 {
		t.Errorf("customize.sh left %v", left)
	}
	if _, err := os.Stat(broken); err == nil {
		t.Error("a broken script made an image")
	}
	if logs := must(filepath.Glob(filepath.Join(h.state, "image-build", "customize-*.log"))); len(logs) != 1 {
		t.Errorf("logs: %v", logs)
	}
}

// conversation is a program in a terminal that is talked to.
type conversation struct {
	t     *testing.T
	input io.WriteCloser
	said  *bytes.Buffer
	mu    sync.Mutex
	more  chan struct{}
	ended chan error
}

func (c *conversation) Write(b []byte) (int, error) {
	c.mu.Lock()
	c.said.Write(b)
	c.mu.Unlock()
	select {
	case c.more <- struct{}{}:
	default:
	}
	return len(b), nil
}

// talk starts a program in a terminal of its own, by script(1).
func (h *host) talk(program string, args ...string) *conversation {
	h.t.Helper()
	c := &conversation{t: h.t, said: new(bytes.Buffer), more: make(chan struct{}, 1), ended: make(chan error, 1)}
	cmd := command(h.t.Context(), "script", "-qefc", program+" "+strings.Join(args, " "), "/dev/null")
	cmd.Env, cmd.Dir = append(slices.Clone(h.env), "TERM=dumb", "SHELL=/bin/sh"), filepath.Dir(h.state)
	cmd.Stdout, cmd.Stderr = c, c
	c.input = must(cmd.StdinPipe())
	must(0, cmd.Start())
	go func() { c.ended <- cmd.Wait() }()
	return c
}

// after waits until the program has said something since it was answered last, and answers it.
func (c *conversation) after(words, answer string) {
	c.t.Helper()
	bound := time.After(buildTime)
	for {
		c.mu.Lock()
		at := strings.Index(c.said.String(), words)
		if at >= 0 {
			c.said.Next(at + len(words))
		}
		c.mu.Unlock()
		if at >= 0 {
			must(io.WriteString(c.input, answer))
			return
		}
		select {
		case <-c.more:
		case err := <-c.ended:
			c.t.Fatalf("it ended (%v) and never said %q after\n%s", err, words, c.said)
		case <-bound:
			c.t.Fatalf("it did not say %q within %s, after\n%s", words, buildTime, c.said)
		}
	}
}

// TestImagesByHand changes a small Debian in a shell of a VM, makes the default image of the result by make-rootfs.sh, and boots
// VMs of both.
func TestImagesByHand(t *testing.T) {
	slow(t)
	h := newHost(t)
	dir := t.TempDir()
	base, byHand := filepath.Join(dir, "base.ext4"), filepath.Join(dir, "by-hand.ext4")
	tree := filepath.Join(dir, "tree.tar")
	run(t, "mmdebstrap", "--variant=minbase", "--format=tar", "--include=systemd-sysv,openssh-server", "trixie", tree)
	image := command(t.Context(), filepath.Join(checkout, "dist/mkruntime"), "-to", base, "image")
	image.Stdin = must(os.Open(tree))
	if out, err := image.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c := h.talk(filepath.Join(checkout, "interactive.sh"), base, byHand)
	c.after("you are in the VM", "")
	c.after("# ", "echo by hand >/root/note; echo a >/srv/b; exit\n")
	c.after("[y/N] ", "y\n")
	if err := <-c.ended; err != nil {
		t.Fatalf("interactive.sh: %v\n%s", err, c.said)
	}
	h.do("image", "register", "--name", "by-hand", "--rootfs", byHand, "--work-seed", filepath.Join(dir, "by-hand.work-seed.ext4"))
	h.create("hand", "--image", "by-hand")
	if got := h.in("hand", "cat /root/note /srv/b"); got != "by hand\na" {
		t.Errorf("the VM says %q", got)
	}
	h.do("vm", "delete", "hand")

	// A checkout of its own, whose bundle gets it.
	b := newBundle(t)
	own := filepath.Dir(b.dir)
	for _, name := range []string{"banger", "make-rootfs.sh", "customize.sh", "packages.sh", "dist"} {
		must(0, os.Symlink(filepath.Join(checkout, name), filepath.Join(own, name)))
	}
	must(0, os.WriteFile(filepath.Join(own, "packages.apt"), []byte("tree # one that the base has not\n"), 0o644))
	cmd := command(t.Context(), filepath.Join(own, "make-rootfs.sh"), "--base-rootfs", byHand)
	cmd.Env = append(slices.Clone(h.env), "BANGER_RUNTIME_DIR="+b.dir)
	out, err := cmd.CombinedOutput()
	t.Logf("make-rootfs.sh:\n%s", tail(out, 20))
	if err != nil {
		t.Fatalf("make-rootfs.sh: %v", err)
	}
	made := newHost(t)
	made.setenv("BANGER_RUNTIME_DIR", b.dir)
	made.create("made")
	if got := made.in("made", "cat /root/note /srv/b; tree -i --noreport /srv"); got != "by hand\na\n/srv\nb" {
		t.Errorf("the VM of the new default image says %q", got)
	}
}
