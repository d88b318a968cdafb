//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// Void's mirror is out of reach of the machines that test this. What stands for it serves an archive of tools in the
// layout of the static XBPS ones, whose xbps-install is this script: it notes what it was asked for and unpacks what the mirror has
// for packages. The rest is the real script, and its effects on the disk are what counts.
const standInInstaller = `#!/bin/sh
set -eu
asked="$XBPS_ARCH $*" root='' repo=''
while [ $# -gt 0 ]; do
    case $1 in
        -r) root=$2; shift ;;
        -R) repo=$2; shift ;;
        -c) shift ;;
    esac
    shift
done
echo "$asked" >"$root/asked"
ls "$root/var/db/xbps/keys" >"$root/keys"
echo x >/dev/null
for tree in tree.tar extra.tar; do
    curl -fsS "$repo/$tree" | tar -xp --numeric-owner --exclude=./dev/* -C "$root"
done
`

// mirror is the stand-in, and what the archive of its tools hashes to.
type mirror struct {
	url, sum string
}

// newMirror serves trees, each a tar, as the mirror's packages.
func newMirror(t *testing.T, trees map[string]string) mirror {
	t.Helper()
	dir := t.TempDir()
	var tools bytes.Buffer
	w := tar.NewWriter(&tools)
	for name, content := range map[string]string{
		"./usr/bin/xbps-install.static":     standInInstaller,
		"./var/db/xbps/keys/3d:b9:c0.plist": "a key",
	} {
		put(t, w, tar.Header{Name: name, Mode: 0o755}, content)
	}
	must(0, w.Close())
	archive := filepath.Join(dir, "static/xbps-static-latest.x86_64-musl.tar.xz")
	for _, d := range []string{"static", "current"} {
		must(0, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	xz := exec.Command("xz", "-c")
	xz.Stdin = &tools
	raw := must(xz.Output())
	must(0, os.WriteFile(archive, raw, 0o644))
	for name, file := range trees {
		must(0, os.Symlink(file, filepath.Join(dir, "current", name)))
	}
	server := httptest.NewServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(server.Close)
	sum := sha256.Sum256(raw)
	return mirror{server.URL, hex.EncodeToString(sum[:])}
}

func put(t *testing.T, w *tar.Writer, h tar.Header, content string) {
	t.Helper()
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
	}
	h.Size = int64(len(content))
	must(0, w.WriteHeader(&h))
	must(io.WriteString(w, content))
}

// voidTree is as much of a Void as the script looks at.
func voidTree(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "tree.tar")
	f := must(os.Create(file))
	w := tar.NewWriter(f)
	for _, d := range []string{"usr", "usr/bin", "etc", "etc/ssh", "etc/sv", "etc/sv/sshd", "etc/sv/docker", "etc/runit", "etc/runit/runsvdir", "etc/runit/runsvdir/default", "var", "var/cache", "var/cache/xbps"} {
		put(t, w, tar.Header{Typeflag: tar.TypeDir, Name: "./" + d, Mode: 0o755}, "")
	}
	put(t, w, tar.Header{Typeflag: tar.TypeSymlink, Name: "./bin", Linkname: "usr/bin", Mode: 0o777}, "")
	put(t, w, tar.Header{Typeflag: tar.TypeSymlink, Name: "./etc/runit/runsvdir/default/agetty-tty1", Linkname: "/etc/sv/agetty-tty1", Mode: 0o777}, "")
	for name, c := range map[string]struct {
		mode    int64
		uid     int
		content string
	}{
		"usr/bin/bash": {0o755, 0, "bash"}, "usr/bin/sh": {0o755, 0, "dash"}, "usr/bin/su": {0o4755, 0, "su"}, "etc/owned": {0o640, 42, "x"},
		"etc/passwd": {0o644, 0, "root:x:0:0::/root:/bin/sh\nd:x:1:1:::/bin/sh\n"}, "etc/shadow": {0o640, 0, "root:!:1::::::\n"},
		"etc/ssh/sshd_config": {0o644, 0, "Port 22\n"}, "etc/ssh/ssh_host_ed25519_key": {0o600, 0, "a key of the build"},
		"etc/sv/sshd/run": {0o755, 0, "#!/bin/sh\n"}, "etc/sv/docker/run": {0o755, 0, "#!/bin/sh\n"},
		"etc/resolv.conf": {0o644, 0, "nameserver 192.0.2.1\n"}, "var/cache/xbps/p.xbps": {0o644, 0, "a package"},
	} {
		put(t, w, tar.Header{Name: "./" + name, Mode: c.mode, Uid: c.uid, Gid: c.uid}, c.content)
	}
	must(0, w.Close())
	must(0, f.Close())
	return file
}

// debugfs asks an image without mounting it.
func debugfs(t *testing.T, image, request string) string {
	t.Helper()
	out, err := command(t.Context(), "debugfs", "-R", request, image).CombinedOutput()
	if err != nil {
		t.Fatalf("debugfs -R %q %s: %v\n%s", request, image, err, out)
	}
	_, text, _ := strings.Cut(string(out), "\n") // its version
	return text
}

// voidImage checks what the script made of voidTree.
func voidImage(t *testing.T, image string) {
	t.Helper()
	for file, want := range map[string]string{
		"/etc/passwd":                      "root:x:0:0::/root:/bin/bash\nd:x:1:1:::/bin/sh\n",
		"/etc/shadow":                      "root:*:1::::::\n",
		"/usr/bin/sh":                      "dash",
		"/etc/ssh/sshd_config":             "Include /etc/ssh/sshd_config.d/*.conf\nPort 22\n",
		"/var/db/xbps/keys/3d:b9:c0.plist": "a key",
		"/keys":                            "3d:b9:c0.plist\n",
		"/usr/local/bin/mise":              "#!/bin/sh\necho mise\n",
		"/usr/local/share/mise/installs/opencode/local/opencode": "#!/bin/sh\necho opencode\n",
		"/etc/mise/config.toml":                                  "# Written by banger.\n[tools]\nopencode = \"local\"\n",
	} {
		if got := debugfs(t, image, "cat "+file); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
	if got := debugfs(t, image, "cat /etc/sysctl.d/90-docker.conf"); !strings.Contains(got, "net.ipv4.ip_forward=1\n") {
		t.Errorf("docker's sysctls are %q", got)
	}
	for file, want := range map[string]string{
		"/etc/runit/runsvdir/default/sshd":        `Fast link dest: "/etc/sv/sshd"`,
		"/etc/runit/runsvdir/default/docker":      `Fast link dest: "/etc/sv/docker"`,
		"/usr/bin/su":                             "Mode:  04755",
		"/etc/owned":                              "User:    42   Group:    42",
		"/root":                                   "Mode:  0700",
		"/root/.bashrc":                           "User:     0   Group:     0",
		"/etc/runit/runsvdir/default/agetty-tty1": "File not found",
		"/etc/ssh/ssh_host_ed25519_key":           "File not found",
		"/etc/resolv.conf":                        "File not found",
		"/etc/profile.d/banger-mise.sh":           "Mode:  0644",
		"/root/.tmux":                             "File not found", // the plugins are the default image's alone
		"/var/cache/xbps/p.xbps":                  "File not found",
		"/dev/null":                               "File not found",
		"/proc/self":                              "File not found",
	} {
		if got := debugfs(t, image, "stat "+file); !strings.Contains(got, want) {
			t.Errorf("%s: no %q in\n%s", file, want, got)
		}
	}
	asked := debugfs(t, image, "cat /asked")
	for _, word := range []string{"x86_64 -y -S ", "/current ", " bash ", " openssh ", " docker ", " runit-void "} {
		if !strings.Contains(asked, word) {
			t.Errorf("XBPS was not asked for %q: %s", word, asked)
		}
	}
	seed := strings.TrimSuffix(image, ".ext4") + ".work-seed.ext4"
	if got := debugfs(t, seed, "ls -p /"); !strings.Contains(got, "/.bashrc/") || strings.Contains(got, "lost+found") {
		t.Errorf("the work seed holds\n%s", got)
	}
	for _, file := range []string{image, seed} {
		if out, err := command(t.Context(), "e2fsck", "-fn", file).CombinedOutput(); err != nil {
			t.Errorf("e2fsck %s: %v\n%s", file, err, out)
		}
	}
}

// toolsManifest names programs that stand for mise and opencode.
func toolsManifest(t *testing.T, dir string) string {
	t.Helper()
	text := "[tools]\n"
	for _, name := range []string{"mise", "opencode"} {
		program := filepath.Join(dir, name)
		must(0, os.WriteFile(program, []byte("#!/bin/sh\necho "+name+"\n"), 0o755))
		text += fmt.Sprintf("%s_source = %q\n", name, program)
	}
	manifest := filepath.Join(dir, "runtime-bundle.local.toml")
	must(0, os.WriteFile(manifest, []byte(text), 0o644))
	return manifest
}

// TestVoidScript runs the whole script against the stand-in, and boots nothing.
func TestVoidScript(t *testing.T) {
	script := filepath.Join(checkout, "make-rootfs-void.sh")
	m := newMirror(t, map[string]string{"tree.tar": voidTree(t), "extra.tar": voidTree(t)})
	empty := newMirror(t, nil)
	tmp, dir := t.TempDir(), t.TempDir()
	out := filepath.Join(dir, "rootfs-void.ext4")
	manifest := toolsManifest(t, t.TempDir())
	try := func(args ...string) (string, error) {
		cmd := command(t.Context(), script, args...)
		cmd.Env = append(cmd.Environ(), "TMPDIR="+tmp, "RUNTIME_MANIFEST="+manifest)
		text, err := cmd.CombinedOutput()
		return string(text), err
	}
	nothingLeft := func() {
		t.Helper()
		if left := must(os.ReadDir(tmp)); len(left) > 0 {
			t.Errorf("left in TMPDIR: %v", left)
		}
		if mounts := must(os.ReadFile("/proc/self/mountinfo")); strings.Contains(string(mounts), tmp) {
			t.Error("something is still mounted")
		}
	}
	zero := strings.Repeat("0", 64)
	for _, c := range []struct {
		word string
		args []string
	}{
		{"unknown argument", []string{"--mirrors", "x"}},
		{"--mirror needs a value", []string{"--mirror"}},
		{"--size needs a value", []string{"--size", ""}},
		{"is no size", []string{"--size", "2 G", "--output", out}},
		{"does not end in .ext4", []string{"--output", filepath.Join(dir, "x.img")}},
		{"does not exist", []string{"--output", filepath.Join(dir, "none", "x.ext4")}},
		{"is no http or https URL", []string{"--mirror", "ftp://x", "--output", out}},
		{"is no http or https URL", []string{"--mirror", "https://", "--output", out}},
		{"is not https", []string{"--mirror", m.url, "--output", out}},
		{"is no SHA256", []string{"--mirror", m.url, "--tools-sha256", "abc", "--output", out}},
		{"has SHA256 " + m.sum, []string{"--mirror", m.url, "--tools-sha256", zero, "--output", out}},
		{"cannot be fetched", []string{"--mirror", m.url + "/none", "--tools-sha256", zero, "--output", out}},
		{"packages cannot be installed", []string{"--mirror", empty.url, "--tools-sha256", empty.sum, "--output", out}},
		{"has no unit", []string{"--mirror", m.url, "--tools-sha256", m.sum, "--size", "300", "--output", out}},
	} {
		text, err := try(c.args...)
		if err == nil || !strings.Contains(text, c.word) {
			t.Errorf("%q: %v\n%s", c.args, err, text)
		}
		nothingLeft()
	}
	if left := must(os.ReadDir(dir)); len(left) > 0 {
		t.Errorf("a refused build left %v", left)
	}
	if text, err := try("--help"); err != nil || !strings.Contains(text, "--mirror URL") || strings.Contains(text, "set -e") {
		t.Errorf("--help: %v\n%s", err, text)
	}

	for _, args := range [][]string{nil, {"--size", "300M"}} { // the second replaces the first
		text, err := try(append(args, "--mirror", m.url+"/", "--tools-sha256", strings.ToUpper(m.sum), "--output", out)...)
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		voidImage(t, out)
		nothingLeft()
	}
	if info := must(os.Stat(out)); info.Size() != 300<<20 {
		t.Errorf("the image has %d bytes", info.Size())
	}
	if left := must(os.ReadDir(dir)); len(left) != 2 {
		t.Errorf("the directory holds %v", left)
	}
}

// TestVoidScriptAsAnOrdinaryUser: the same image, with the same owners, without root.
func TestVoidScriptAsAnOrdinaryUser(t *testing.T) {
	h, u := newOrdinaryUser(t)
	uid, gid := must(strconv.Atoi(u.Uid)), must(strconv.Atoi(u.Gid))
	// A checkout where the user gets to, as far as the script needs one.
	dir := filepath.Join(u.HomeDir, "banger")
	for _, name := range []string{"make-rootfs-void.sh", "packages.sh", "packages.void", "dist/mkruntime", "tools/mkruntime/overlay/root/.bashrc"} {
		run(t, "install", "-D", filepath.Join(checkout, name), filepath.Join(dir, name))
	}
	cache := must(os.UserCacheDir())
	kernels := must(filepath.Glob(filepath.Join(cache, "banger/build/kernel-*")))
	to := filepath.Join(u.HomeDir, ".cache/banger/build/")
	must(0, os.MkdirAll(to, 0o755))
	for _, k := range kernels {
		run(t, "cp", "-a", k, to)
	}
	manifest := toolsManifest(t, u.HomeDir)
	run(t, "chown", "-R", fmt.Sprintf("%d:%d", uid, gid), u.HomeDir)
	m := newMirror(t, map[string]string{"tree.tar": voidTree(t), "extra.tar": voidTree(t)})
	tmp := filepath.Join(u.HomeDir, "tmp")
	must(0, os.Mkdir(tmp, 0o700))
	must(0, os.Chown(tmp, uid, gid))
	out := filepath.Join(u.HomeDir, "void.ext4")
	cmd := command(t.Context(), filepath.Join(dir, "make-rootfs-void.sh"), "--mirror", m.url, "--tools-sha256", m.sum, "--output", out)
	cmd.Env, cmd.Dir = append(slices.Clone(h.env), "TMPDIR="+tmp, "RUNTIME_MANIFEST="+manifest), u.HomeDir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: h.sys.Credential}
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	voidImage(t, out)
	if left := must(os.ReadDir(tmp)); len(left) > 0 {
		t.Errorf("left in TMPDIR: %v", left)
	}
}

// TestRunitGuest boots what the script makes of a distribution whose init is runit: Debian's runit-init, laid out as Void lays its
// services out. So it is not Void's userspace, but its init, the services that the script enables, and how banger stops such a guest.
func TestRunitGuest(t *testing.T) {
	slow(t)
	dir := t.TempDir()
	tree, extra := filepath.Join(dir, "tree.tar"), filepath.Join(dir, "extra.tar")
	run(t, "mmdebstrap", "--variant=minbase", "--format=tar", "--include=runit-init,openssh-server,iproute2,procps,kmod", "trixie", tree)
	f := must(os.Create(extra))
	w := tar.NewWriter(f)
	for _, d := range []string{"etc/sv/sshd", "etc/sv/docker"} {
		put(t, w, tar.Header{Typeflag: tar.TypeDir, Name: "./" + d, Mode: 0o755}, "")
	}
	put(t, w, tar.Header{Name: "./etc/sv/sshd/run", Mode: 0o755}, "#!/bin/sh\nmkdir -p /run/sshd\nexec /usr/sbin/sshd -D -e\n")
	put(t, w, tar.Header{Name: "./etc/sv/docker/run", Mode: 0o755}, "#!/bin/sh\necho ran >>/run/docker-service\nexec sleep 100000\n")
	must(0, w.Close())
	must(0, f.Close())
	m := newMirror(t, map[string]string{"tree.tar": tree, "extra.tar": extra})
	// A checkout of its own, whose bundle gets the image as make does it.
	b := newBundle(t)
	own := filepath.Dir(b.dir)
	for _, name := range []string{"Makefile", "banger", "make-rootfs-void.sh", "verify.sh", "packages.sh", "packages.void", "runtime-bundle.toml", "dist", "tools", "cmd", "internal", "api", "go.sum"} {
		must(0, os.Symlink(filepath.Join(checkout, name), filepath.Join(own, name)))
	}
	h := newHost(t, `default_memory = "1G"`)
	h.setenv("BANGER_RUNTIME_DIR", b.dir)
	target := func(args ...string) string {
		t.Helper()
		cmd := command(t.Context(), "make", append([]string{"--no-print-directory", "-C", own}, args...)...)
		cmd.Env = h.env
		out, err := cmd.CombinedOutput()
		t.Logf("make %v\n%s", args, tail(out, 20))
		if err != nil {
			t.Fatalf("make %v: %v", args, err)
		}
		return string(out)
	}
	// mise and opencode are the real ones, of the npm registry.
	target("rootfs-void", "ARGS=--mirror "+m.url+" --tools-sha256 "+m.sum)
	target("void-register")
	target("void-vm", "VOID_VM_NAME=void")
	log := h.show("void").Log
	defer func() {
		if console, err := os.ReadFile(log); t.Failed() && err == nil {
			t.Logf("the console:\n%s", tail(console, 60))
		}
	}()
	if got := h.in("void", "cat /proc/1/comm; getent passwd root | cut -d: -f7; cat /run/docker-service; ls -A /root | grep -v -E 'ssh|local|cache'"); got != "runit\n/bin/bash\nran\n.bashrc\n.hushlogin\n.profile" {
		t.Errorf("got %q", got)
	}
	if got := h.in("void", "sv status /etc/service/sshd | cut -d: -f1"); got != "run" {
		t.Errorf("sshd's service is %q", got)
	}
	h.in("void", "echo kept >/root/file; echo kept >/etc/file")
	h.do("vm", "stop", "void")
	h.disksAreClean(h.show("void"))
	h.do("vm", "start", "void")
	if got := h.in("void", "cat /root/file /etc/file"); got != "kept\nkept" {
		t.Errorf("after a restart: %q", got)
	}
	// The guest's own power-off.
	_ = h.try("vm", "ssh", "void", "--", "poweroff")
	h.until("the guest has powered itself off", bootTime, func() bool { return h.show("void").State == "stopped" })
	h.disksAreClean(h.show("void"))
	h.do("vm", "delete", "void")
	// With the settings of the checked-in example it is what VMs are made of that name no image.
	example := string(must(os.ReadFile(filepath.Join(checkout, "examples/void-exp.config.toml"))))
	byDefault := newHost(t, strings.ReplaceAll(example, "/path/to/banger", own), `default_memory = "1G"`)
	byDefault.env = slices.DeleteFunc(byDefault.env, func(kv string) bool { return strings.HasPrefix(kv, "BANGER_RUNTIME_DIR=") }) // the example names it
	byDefault.create("void")
	if got := byDefault.in("void", "cat /proc/1/comm; ls -d /root/.hushlogin"); got != "runit\n/root/.hushlogin" {
		t.Errorf("by the example's settings: %q", got)
	}
	if got := byDefault.do("image", "show", "default"); !strings.Contains(got, filepath.Join(own, "packages.void")) {
		t.Errorf("the default image is not the example's:\n%s", got)
	}
	byDefault.do("vm", "delete", "void")
	if got := target("verify-void"); !strings.Contains(got, "ok: opencode is mise's") || !strings.Contains(got, "banger works here") {
		t.Errorf("verify-void says\n%s", got)
	}
	if left := h.list(); len(left) != 0 {
		t.Errorf("VMs are left: %+v", left)
	}
}

// must is for what only fails if the test itself is broken.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
