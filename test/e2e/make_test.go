//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// source is a checkout of its own, in which make is run as a user does.
type source struct {
	t   *testing.T
	dir string
	env []string
}

// newSource copies what belongs to the source, committed or not, and nothing that was built.
func newSource(t *testing.T, dir string, env []string) source {
	t.Helper()
	list := exec.Command("git", "-C", checkout, "ls-files", "-co", "--exclude-standard", "-z")
	out, err := list.Output()
	if err != nil { // an unpacked archive, without git
		out = []byte(run(t, "find", checkout, "(", "-path", checkout+"/dist", "-o", "-path", checkout+"/runtime", ")", "-prune", "-o", "-type", "f", "-printf", `%P\0`))
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(out), "\x00"), "\x00") {
		from, to := filepath.Join(checkout, name), filepath.Join(dir, name)
		content, err := os.ReadFile(from)
		if errors.Is(err, fs.ErrNotExist) { // removed, and not yet committed
			continue
		}
		must(0, errors.Join(err, os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, content, must(os.Stat(from)).Mode().Perm())))
	}
	return source{t, dir, env}
}

// try runs a program in the checkout.
func (s source) try(program string, args ...string) result {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), buildTime)
	defer cancel()
	cmd := command(ctx, program, args...)
	var stdout, stderr bytes.Buffer
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = s.dir, s.env, &stdout, &stderr, 5*time.Second
	began := time.Now()
	err := cmd.Run()
	r := result{program + " " + strings.Join(args, " "), stdout.String(), stderr.String(), cmd.ProcessState.ExitCode(), time.Since(began)}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		s.t.Fatalf("%s: %v", r, errors.Join(err, ctx.Err()))
	}
	s.t.Logf("%5.1fs  %s", r.took.Seconds(), r.command)
	return r
}

// do is try for what must succeed.
func (s source) do(program string, args ...string) result {
	s.t.Helper()
	r := s.try(program, args...)
	if r.code != 0 {
		s.t.Fatal(r)
	}
	return r
}

func (s source) make(args ...string) result { s.t.Helper(); return s.do("make", args...) }

// refused runs make, which must fail and say each of the words.
func (s source) refused(args []string, words ...string) {
	s.t.Helper()
	r := s.try("make", args...)
	for _, w := range words {
		if r.code == 0 || !strings.Contains(r.stderr, w) {
			s.t.Errorf("%s\nwant a failure that says %q", r, w)
		}
	}
}

func (s source) path(name string) string { return filepath.Join(s.dir, name) }

func (s source) read(name string) string {
	s.t.Helper()
	content, err := os.ReadFile(s.path(name))
	if err != nil {
		s.t.Fatal(err)
	}
	return string(content)
}

// write replaces a file as an editor does.
func (s source) write(name, text string) {
	s.t.Helper()
	must(0, os.WriteFile(s.path(name), []byte(text), 0o644))
}

// bundle checks every file of ./runtime against bundle.json, and returns their checksums by file name.
func (s source) bundle() map[string]string {
	s.t.Helper()
	var b struct {
		Artifacts map[string]struct {
			Path, SHA256 string
			Size         int64
		}
	}
	if err := json.Unmarshal([]byte(s.read("runtime/bundle.json")), &b); err != nil {
		s.t.Fatal(err)
	}
	if len(b.Artifacts) < 8 {
		s.t.Errorf("bundle.json names %v", b.Artifacts)
	}
	sums := map[string]string{}
	for role, a := range b.Artifacts {
		if role == "ssh_key" { // a bundle's own, and not of what was built
			continue
		}
		sums[a.Path] = s.sum("runtime/" + a.Path)
		if sums[a.Path] != a.SHA256 {
			s.t.Errorf("%s has SHA256 %s, and bundle.json says %s", a.Path, sums[a.Path], a.SHA256)
		}
	}
	return sums
}

// sum is a file's SHA256, in the digits that sha256sum prints.
func (s source) sum(name string) string {
	s.t.Helper()
	f, err := os.Open(s.path(name))
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	must(io.Copy(h, f))
	return hex.EncodeToString(h.Sum(nil))
}

// stat gives the state of a file by which one sees that it was written anew.
func (s source) stat(name string) os.FileInfo {
	s.t.Helper()
	info, err := os.Stat(s.path(name))
	if err != nil {
		s.t.Fatal(err)
	}
	return info
}

func same(a, b os.FileInfo) bool { return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) }

// Names in the bundle.
const (
	imageFile = "runtime/rootfs-docker.ext4"
	seedFile  = "runtime/rootfs-docker.work-seed.ext4"
	stampFile = imageFile + ".packages.sha256"
	keyFile   = "runtime/id_ed25519"
	archive   = "dist/banger-runtime.tar.gz"
	manifest  = "RUNTIME_MANIFEST=runtime-bundle.local.toml"
)

// TestMake types the make targets of the runtime bundle's life in checkouts of their own: built, rebuilt when its packages change, packed, fetched
// elsewhere by every kind of URL, refreshed, installed, and used without the checkout. The image that is built for it is a small
// one, of real packages of Debian.
func TestMake(t *testing.T) {
	h := newHost(t)
	dir := filepath.Dir(h.state)
	// A cache of its own, in which what this machine has built lies by links: builds of other images would push that out of the real one.
	cache := filepath.Join(dir, "cache")
	build := filepath.Join(cache, "banger/build")
	must(0, os.MkdirAll(build, 0o755))
	for _, kind := range []string{"kernel", "image", "firecracker"} {
		for _, entry := range must(filepath.Glob(filepath.Join(must(os.UserCacheDir()), "banger/build", kind+"-*"))) {
			must(0, os.Symlink(entry, filepath.Join(build, filepath.Base(entry))))
		}
	}
	h.env = slices.DeleteFunc(h.env, func(kv string) bool {
		return slices.ContainsFunc([]string{"BANGER_RUNTIME_DIR=", "XDG_CACHE_HOME=", "GOCACHE=", "MAKEFLAGS=", "MAKELEVEL=", "MFLAGS="}, func(p string) bool { return strings.HasPrefix(kv, p) })
	})
	h.setenv("GOCACHE", strings.TrimSpace(run(t, "go", "env", "GOCACHE")))
	h.setenv("XDG_CACHE_HOME", cache)
	one := newSource(t, filepath.Join(dir, "one"), h.env)

	built := "building the root filesystem"
	if r := one.make("runtime"); strings.Contains(r.stderr, built) {
		t.Fatalf("%s\nbuilds an image that this machine has", r)
	}
	one.bundle()
	image, seed, stamp := one.stat(imageFile), one.stat(seedFile), one.read(stampFile)
	if got := one.sum("packages.apt") + "\n"; stamp != got {
		t.Errorf("the stamp is %q, and packages.apt has %q", stamp, got)
	}
	if r := one.make("rootfs"); strings.Contains(r.stderr, built) || !strings.Contains(r.stderr, "today's packages.apt") {
		t.Errorf("%s\nwant nothing built", r)
	}
	if !same(image, one.stat(imageFile)) || !same(seed, one.stat(seedFile)) {
		t.Error("make rootfs wrote an image although its packages are the same")
	}

	// Another list. The plugins of tmux are the test's: their own repositories are out of reach of many machines.
	one.write("packages.apt", "systemd-sysv\nopenssh-server\ntmux\nhello # one that says so\n")
	one.write("runtime-bundle.local.toml", fmt.Sprintf("[tools]\nmise_source = \"none\"\nopencode_source = \"none\"\ntmux_resurrect_source = %q\ntmux_continuum_source = %q\n",
		pluginRepository(t, "resurrect"), pluginRepository(t, "continuum")))
	for i, why := range []string{"packages.apt has changed", "the image is missing"} {
		var r result
		if i == 0 {
			r = one.make("rootfs", manifest)
		} else {
			must(0, os.Remove(one.path(imageFile)))
			r = one.do("env", manifest, "./make-rootfs.sh") // the helper of the same name does the same
		}
		if !strings.Contains(r.stderr, built+" from 4 packages") {
			t.Errorf("%s, and %s", why, r)
		}
		if same(image, one.stat(imageFile)) || same(seed, one.stat(seedFile)) {
			t.Errorf("%s, and image or work seed are the old ones", why)
		}
		image, seed = one.stat(imageFile), one.stat(seedFile)
		if got := one.read(stampFile); got != one.sum("packages.apt")+"\n" || got == stamp {
			t.Errorf("%s, and the stamp is %q", why, got)
		}
		one.bundle()
		if got := debugfs(t, one.path(imageFile), "stat /usr/bin/hello"); !strings.Contains(got, "Mode:  0755") {
			t.Errorf("the image has no hello:\n%s", got)
		}
		if got := debugfs(t, one.path(seedFile), "cat /.tmux.conf"); !strings.Contains(got, "tmux-resurrect/resurrect.tmux") {
			t.Errorf("the work seed has no plugins:\n%s", got)
		}
	}

	pack := func(args ...string) (sum string) {
		t.Helper()
		r := one.make(append([]string{"runtime-package"}, args...)...)
		sum = one.sum(archive)
		if want := sum + "  " + one.path(archive) + "\n"; r.stdout != want {
			t.Errorf("%s\nwant %q printed", r, want)
		}
		return sum
	}
	key := one.read(keyFile)
	secret := strings.Split(key, "\n")[2]
	holds := func() (names []string, withKey bool) {
		t.Helper()
		names = strings.Fields(run(t, "tar", "-tzf", one.path(archive)))
		found := run(t, "sh", "-c", `tar -xzOf "$1" | grep -c -a -F -e "$2" || true`, "sh", one.path(archive), secret)
		return names, found != "0\n"
	}
	withKey := pack("WITH_KEY=1")
	if names, has := holds(); !slices.Contains(names, "id_ed25519") || !has {
		t.Errorf("asked for with its key, the archive holds %v", names)
	}
	sum := pack()
	if names, has := holds(); slices.Contains(names, "id_ed25519") || has || !slices.Contains(names, "bundle.json") {
		t.Errorf("the archive holds %v, the key itself: %v", names, has)
	}
	first := must(os.ReadFile(one.path(archive)))
	if again := pack(); again != sum || again == withKey || !bytes.Equal(first, must(os.ReadFile(one.path(archive)))) {
		t.Error("packed again it is another archive")
	}

	two := newSource(t, filepath.Join(dir, "two"), h.env)
	two.make("build")
	nothing := func() {
		t.Helper()
		if _, err := os.Stat(two.path("runtime")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("there is a runtime directory (%v)", err)
		}
	}
	nothing()
	two.refused([]string{"runtime-bundle"}, "runtime-bundle.toml", "no url", "make runtime-package", "make runtime")
	for _, target := range []string{"runtime-package", "install"} { // nothing is fetched or built for them
		two.refused([]string{target, "PREFIX=" + filepath.Join(dir, "none")}, "no runtime bundle", "make runtime")
	}
	nothing()
	if _, err := os.Stat(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an install that is refused leaves something (%v)", err)
	}
	template := two.read("runtime-bundle.toml")
	name := func(url, sum string) {
		text := strings.Replace(template, `url = ""`, fmt.Sprintf("url = %q", url), 1)
		two.write("runtime-bundle.local.toml", strings.Replace(text, `sha256 = ""`, fmt.Sprintf("sha256 = %q", sum), 1))
	}
	must(0, os.MkdirAll(two.path("dist"), 0o755))
	must(0, os.WriteFile(two.path(archive), first, 0o644))
	server := httptest.NewServer(http.FileServer(http.Dir(one.path("dist"))))
	defer server.Close()
	wrong := strings.Repeat("0", 64)
	name("./"+archive, wrong)
	two.refused([]string{"runtime-bundle", manifest}, "has SHA256 "+sum, wrong)
	nothing()
	want := one.bundle()
	var kept string
	for _, from := range []struct {
		kind, url string
		absent    bool
	}{
		{"a relative path", "./" + archive, true}, {"an absolute path", one.path(archive), false},
		{"file://", "file://" + one.path(archive), true}, {"http://", server.URL + "/" + filepath.Base(archive), false},
	} {
		if from.absent {
			must(0, os.RemoveAll(two.path("runtime")))
		} else { // damaged, to see that it is replaced
			two.write("runtime/vmlinux", "damaged")
		}
		name(from.url, sum)
		two.make("runtime-bundle", manifest)
		got := two.bundle()
		for file, sum := range want {
			if got[file] != sum {
				t.Errorf("%s: %s is another than it was packed", from.kind, file)
			}
		}
		if now := two.read(keyFile); now == key || !from.absent && now != kept {
			t.Errorf("%s: the key that travelled, or not the one that was here", from.kind)
		}
		kept = two.read(keyFile)
		if got := two.read(stampFile); got != one.read(stampFile) {
			t.Errorf("%s: the stamp is %q", from.kind, got)
		}
	}
	before := two.files("runtime")
	for _, url := range []string{"./" + archive, server.URL + "/" + filepath.Base(archive)} {
		name(url, wrong)
		two.refused([]string{"runtime-bundle", manifest}, "has SHA256 "+sum, wrong)
	}
	name(server.URL+"/none.tar.gz", sum)
	two.refused([]string{"runtime-bundle", manifest}, "404")
	if after := two.files("runtime"); !slices.Equal(before, after) {
		t.Errorf("a refused archive changed the bundle:\n%v\n%v", before, after)
	}

	// A change of the guest program's source is in ./runtime after make build, and the image is the one that it was.
	image = two.stat(imageFile)
	old := two.bundle()
	two.write("cmd/banger-vsock-agent/changed.go", "package main\n\nimport \"os\"\n\nfunc init() {\n\tif len(os.Args) == 2 && os.Args[1] == \"changed\" {\n\t\tos.Exit(42)\n\t}\n}\n")
	two.make("build")
	fresh := two.bundle()
	if fresh["banger-vsock-agent"] == old["banger-vsock-agent"] || fresh["initrd.img"] == old["initrd.img"] || !same(image, two.stat(imageFile)) {
		t.Errorf("after a change of the guest program: %v, before %v", fresh, old)
	}
	var exit *exec.ExitError
	if err := exec.Command(two.path("runtime/banger-vsock-agent"), "changed").Run(); !errors.As(err, &exit) || exit.ExitCode() != 42 {
		t.Errorf("the guest program in ./runtime ended with %v, and was changed to exit 42", err)
	}

	prefix := filepath.Join(dir, "prefix")
	if r := two.make("install", "PREFIX="+prefix); !strings.Contains(r.stdout, "installed in "+prefix+"/bin") {
		t.Error(r)
	}
	must(0, os.RemoveAll(two.dir))
	user, own := h, h.program
	if os.Geteuid() == 0 { // for an ordinary user, who gets a key of their own
		must(0, os.Chmod(dir, 0o755))
		user, _ = newOrdinaryUser(t)
		own = user.program
	}
	user.program = filepath.Join(prefix, "bin/banger")
	user.create("made")
	got := user.in("made", `hello; ls /usr/local/bin; tmux new-session -d -s s
for i in $(seq 100); do tmux show-environment -g LOADED_CONTINUUM >/dev/null 2>&1 && break; sleep 0.1; done # tmux runs plugins in the background
tmux show-environment -g LOADED_RESURRECT; tmux show-environment -g LOADED_CONTINUUM
tmux show-options -gqv @continuum-restore; tmux show-options -gqv @continuum-save-interval`)
	if got != "Hello, world!\nLOADED_RESURRECT=yes\nLOADED_CONTINUUM=yes\noff\n15" {
		t.Errorf("the VM says %q", got)
	}
	user.do("vm", "delete", "made")
	user.do("daemon", "stop")
	user.program = own // for the end of the test
	one.make("uninstall", "PREFIX="+prefix)
	if got := names(filepath.Join(prefix, "lib/banger")); !slices.Equal(got, []string{"id_ed25519", "id_ed25519.pub"}) || len(names(filepath.Join(prefix, "bin"))) > 0 {
		t.Errorf("left in lib: %v", got)
	}
	one.make("clean")
	if _, err := os.Stat(one.path("dist")); !errors.Is(err, fs.ErrNotExist) || one.read(keyFile) != key {
		t.Errorf("after make clean: dist is there (%v), or the key is another one", err)
	}
	one.bundle()
}

// files lists a directory: names, sizes, times, and which file each is.
func (s source) files(dir string) (out []string) {
	for _, e := range must(os.ReadDir(s.path(dir))) {
		info := must(e.Info())
		out = append(out, fmt.Sprintf("%s %d %s %d", e.Name(), info.Size(), info.ModTime(), info.Sys().(*syscall.Stat_t).Ino))
	}
	return out
}
