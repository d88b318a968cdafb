package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/kernel"
)

func write(t *testing.T, file, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// noTools is the part of a manifest by which nothing is fetched for the image.
const noTools = "[tools]\nmise_source = \"none\"\nopencode_source = \"none\"\ntmux_resurrect_source = \"none\"\ntmux_continuum_source = \"none\"\n"

func TestPackagesFile(t *testing.T) {
	file := write(t, filepath.Join(t.TempDir(), "packages.apt"), "# a comment\n\n git \ncurl # why\ngit\nlibstdc++6\n")
	got, err := readPackages(file)
	if d := cmp.Diff([]string{"git", "curl", "libstdc++6"}, got); d != "" || err != nil {
		t.Error(d, err)
	}
	for _, bad := range []string{"git curl", "--hook=x", "Git", "a;b", "x,y"} {
		write(t, file, "git\n"+bad+"\n")
		if _, err := readPackages(file); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "packages.apt:2") {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := readPackages(file + "-"); !fault.Is(err, fault.NotFound) {
		t.Errorf("missing: %v", err)
	}
}

// Editing packages.apt alone changes the image: its key, and what mmdebstrap is told.
func TestPackagesDecideTheImage(t *testing.T) {
	dir := t.TempDir()
	keyAndArgs := func(content string) (string, []string) {
		packages, err := readPackages(write(t, filepath.Join(dir, "packages.apt"), content))
		if err != nil {
			t.Fatal(err)
		}
		key, err := imageKey(packages, "")
		if err != nil {
			t.Fatal(err)
		}
		return key, debootstrapArgs("root", "minbase", suite, packages)
	}
	key, args := keyAndArgs("git\n")
	moreKey, moreArgs := keyAndArgs("git\nsl\n")
	commentKey, _ := keyAndArgs("# only a comment more\ngit\n")
	if key == moreKey {
		t.Error("one more package has the same key")
	}
	if key != commentKey {
		t.Error("a comment changes the key")
	}
	if !slices.Contains(args, "--include=git") || !slices.Contains(moreArgs, "--include=git,sl") {
		t.Errorf("arguments: %q, then %q", args, moreArgs)
	}
	for _, a := range moreArgs {
		if strings.Contains(a, "://") {
			t.Errorf("a mirror is named: %s", a)
		}
	}
	if got := moreArgs[len(moreArgs)-2:]; !slices.Equal(got, []string{"trixie", "-"}) {
		t.Errorf("suite and target are %q", got)
	}
}

func TestDefaultPackages(t *testing.T) {
	got, err := readPackages("../../packages.apt")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"systemd", "systemd-sysv", "openssh-server", "sudo", "git", "curl", "tmux", "vim", "jq", "rsync", "build-essential", "python3", "docker.io", "iproute2"} {
		if !slices.Contains(got, p) {
			t.Errorf("the default image lacks %s", p)
		}
	}
}

func TestSubordinateIDs(t *testing.T) {
	const file = "alice:100000:65536\nbob:165536:1000\n1002:200000:65536\nbroken\n"
	for _, c := range []struct {
		name, uid string
		ok        bool
	}{{"alice", "1000", true}, {"bob", "1001", false}, {"carol", "1002", true}, {"dave", "1003", false}} {
		ok, free := subordinate(file, c.name, c.uid)
		if ok != c.ok || free != 265536 {
			t.Errorf("%s: %v, free from %d", c.name, ok, free)
		}
	}
	if ok, free := subordinate("", "x", "1"); ok || free != 100000 {
		t.Errorf("an empty file: %v, %d", ok, free)
	}
}

// packagesTar is a tar as mmdebstrap makes it, with all that must be kept and all that must go.
func packagesTar(t *testing.T) io.Reader {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{
		{Name: "./dev/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./dev/null", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3},
		{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./bin", Typeflag: tar.TypeSymlink, Linkname: "usr/bin"},
		{Name: "./etc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./etc/hostname", Typeflag: tar.TypeReg, Mode: 0o644},
		{Name: "./etc/machine-id", Typeflag: tar.TypeReg, Mode: 0o444},
		{Name: "./etc/resolv.conf", Typeflag: tar.TypeReg, Mode: 0o644},
		{Name: "./etc/shadow", Typeflag: tar.TypeReg, Mode: 0o640, Gid: 42},
		{Name: "./etc/ssh/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./etc/ssh/ssh_host_rsa_key", Typeflag: tar.TypeReg, Mode: 0o600},
		{Name: "./root/", Typeflag: tar.TypeDir, Mode: 0o700},
		{Name: "./root/.ssh/", Typeflag: tar.TypeDir, Mode: 0o700},
		{Name: "./usr/bin/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./usr/bin/sudo", Typeflag: tar.TypeReg, Mode: 0o4755},
		{Name: "./usr/bin/sudoedit", Typeflag: tar.TypeLink, Linkname: "./usr/bin/sudo"},
		{Name: "./usr/bin/ping", Typeflag: tar.TypeReg, Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20"}},
	} {
		body := ""
		if h.Typeflag == tar.TypeReg {
			body = "content of " + h.Name
		}
		h.Size = int64(len(body))
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

type member struct {
	h    *tar.Header
	body string
}

func members(t *testing.T, r io.Reader) (map[string]member, []string) {
	t.Helper()
	out := map[string]member{}
	var order []string
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out, order
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := out[h.Name]; twice {
			t.Errorf("%s comes twice", h.Name)
		}
		out[h.Name] = member{h, string(body)}
		order = append(order, h.Name)
	}
}

func TestImageIsPackagesPlusRecipe(t *testing.T) {
	var image, seed bytes.Buffer
	now := time.Unix(1_800_000_000, 0)
	repl, err := replacements()
	if err != nil {
		t.Fatal(err)
	}
	size, seedSize, err := rewriteTar(t.Context(), packagesTar(t), &image, &seed, dropped, repl, addition{}, now)
	if err != nil {
		t.Fatal(err)
	}
	got, order := members(t, &image)
	for _, gone := range []string{"./dev/null", "./etc/hostname", "./etc/resolv.conf", "./etc/ssh/ssh_host_rsa_key"} {
		if _, ok := got[gone]; ok {
			t.Errorf("%s is in the image", gone)
		}
	}
	if _, ok := got["./dev/"]; !ok {
		t.Error("/dev, which the kernel mounts on, is missing")
	}
	if m := got["./usr/bin/sudo"]; m.h.Mode != 0o4755 || m.body != "content of ./usr/bin/sudo" {
		t.Errorf("sudo: mode %o, %q", m.h.Mode, m.body)
	}
	if m := got["./usr/bin/sudoedit"]; m.h.Typeflag != tar.TypeLink || m.h.Linkname != "./usr/bin/sudo" {
		t.Errorf("a hard link became %c to %q", m.h.Typeflag, m.h.Linkname)
	}
	if m := got["./etc/shadow"]; m.h.Gid != 42 || m.h.Mode != 0o640 {
		t.Errorf("shadow: group %d, mode %o", m.h.Gid, m.h.Mode)
	}
	if m := got["./usr/bin/ping"]; m.h.PAXRecords["SCHILY.xattr.security.capability"] != "\x01\x00\x00\x02\x00\x20" {
		t.Errorf("ping's capability: %q", m.h.PAXRecords)
	}
	if m := got["./etc/machine-id"]; m.h == nil || m.body != "" {
		t.Errorf("machine-id is %q", m.body)
	}
	if m := got["./etc/systemd/system/ldconfig.service"]; m.h == nil || m.h.Linkname != "/dev/null" {
		t.Error("a unit is not masked")
	}
	if m := got["./etc/.updated"]; m.h == nil || !m.h.ModTime.Equal(now) {
		t.Error("/etc/.updated does not carry the time of the build")
	}
	// Parents come before what they hold, so that no reader makes them up.
	seen := map[string]bool{}
	for _, name := range order {
		if p := filepath.Dir(filepath.Clean(name)); p != "." && p != "usr" && !seen[p] {
			t.Errorf("%s comes before its directory", name)
		}
		seen[filepath.Clean(name)] = true
	}
	if int(size.inodes) != len(order)-1 {
		t.Errorf("%d inodes counted of %d entries with one hard link", size.inodes, len(order))
	}

	home, homeOrder := members(t, &seed)
	if home["./"].h == nil || home["./"].h.Mode != 0o700 || home["./.hushlogin"].h == nil || home["./.ssh/"].h == nil {
		t.Errorf("the work seed holds %q", homeOrder)
	}
	for _, name := range homeOrder {
		if strings.HasPrefix(name, "./root") {
			t.Errorf("the work seed's files lie under %s", name)
		}
	}
	if int(seedSize.inodes) != len(homeOrder) {
		t.Errorf("%d inodes counted of %d entries in the seed", seedSize.inodes, len(homeOrder))
	}
}

func TestDropsOnlyWhatIsMeant(t *testing.T) {
	for name, want := range map[string]bool{
		"dev/pts":    true,
		"dev":        false,
		"etc/passwd": false, "etc/passwd-": true,
		"var/log/apt/history.log": true, "var/log/journal": false,
		"etc/systemd/system/multi-user.target.wants/ssh.service":    false,
		"etc/systemd/system/multi-user.target.wants/docker.service": true,
		"etc/systemd/system/sockets.target.wants/docker.socket":     false,
		"home/run/x": false,
	} {
		if got := isDropped(dropped, name); got != want {
			t.Errorf("isDropped(%q) = %v", name, got)
		}
	}
}

// warmCache puts entries where a build would look for them, so that nothing is built.
func warmCache(t *testing.T, packages string) options {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", filepath.Join(dir, "cache"))
	t.Setenv("PATH", "/nonexistent") // mmdebstrap must not be asked for
	c, err := openCache(t.Context(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	modules := filepath.Join(dir, "modules")
	write(t, filepath.Join(modules, "modules.dep"), "kernel/virtio_blk.ko:\n")
	write(t, filepath.Join(modules, "modules.builtin"), "kernel/ext4.ko\nkernel/overlay.ko\n")
	write(t, filepath.Join(modules, "kernel/virtio_blk.ko"), "module")
	tree, err := kernel.OpenTree(modules)
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := kernel.BuildInitrd(nil, tree)
	if err != nil {
		t.Fatal(err)
	}
	put := func(kind, key string, files map[string]string) {
		_, _, err := c.get(t.Context(), kind, key, false, func(d string) (names []string, err error) {
			for name, content := range files {
				write(t, filepath.Join(d, name), content)
				names = append(names, name)
			}
			return names, nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	put("kernel", kernelKey(), map[string]string{fileVmlinux: "vmlinux", fileModules: "modules", fileInitrd: string(initrd), fileVersion: "6.12.9"})
	o := options{runtime: filepath.Join(dir, "runtime"), packages: write(t, filepath.Join(dir, "packages.apt"), packages),
		agent: write(t, filepath.Join(dir, "agent"), "agent"), version: "test",
		manifest: write(t, filepath.Join(dir, "runtime-bundle.toml"), "url = \"\"\nsha256 = \"\"\n[firecracker]\nurl = \"\"\nsha256 = \"\"\n"+noTools),
		patience: usualPatience, origin: origin{version: "1.12.1", releases: "http://127.0.0.1:1", pkg: published.pkg}}
	list, err := readPackages(o.packages)
	if err != nil {
		t.Fatal(err)
	}
	key, err := imageKey(list, "")
	if err != nil {
		t.Fatal(err)
	}
	put("image", key, map[string]string{fileImage: "image", fileSeed: "seed" + strings.Repeat("\x00", 300<<10)})
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	return o
}

func quiet() *progress {
	return &progress{w: io.Discard, now: time.Now}
}

func TestWarmCacheMakesAWholeBundle(t *testing.T) {
	o := warmCache(t, "git\n")
	if err := makeRuntime(t.Context(), quiet(), o, false); err != nil {
		t.Fatal(err)
	}
	b, err := bundle.Load(o.runtime)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	if b.KernelVersion != "6.12.9" || b.CreatedBy != "test" || b.Arch != runtime.GOARCH {
		t.Errorf("%+v", b)
	}
	initrd, err := os.ReadFile(b.Path(bundle.Initrd))
	if err != nil || !bytes.Contains(initrd, []byte("agent")) || !kernel.IsOwn(initrd) {
		t.Errorf("the initrd does not hold the guest program (%v)", err)
	}
	key, err := os.ReadFile(b.Path(bundle.SSHKey))
	if err != nil {
		t.Fatal(err)
	}

	// What is damaged is repaired, what somebody added is kept and described, the key stays.
	write(t, b.Path(bundle.RootFS), "IMAGE")
	if err := os.Remove(b.Path(bundle.Kernel)); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(o.runtime, "rootfs.ext4"), "a base of the user's own")
	write(t, filepath.Join(filepath.Dir(o.runtime), stagingPrefix(o.runtime)+"killed", "x"), "left by a killed build")
	if err := makeRuntime(t.Context(), quiet(), o, false); err != nil {
		t.Fatal(err)
	}
	if b, err = bundle.Load(o.runtime); err != nil {
		t.Fatal(err)
	}
	if err := b.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	if b.Base() != filepath.Join(o.runtime, "rootfs.ext4") {
		t.Errorf("Base() = %s", b.Base())
	}
	if again, err := os.ReadFile(b.Path(bundle.SSHKey)); err != nil || string(again) != string(key) {
		t.Errorf("the key changed (%v)", err)
	}
	for _, dir := range []string{o.runtime, filepath.Dir(o.runtime)} {
		left, err := filepath.Glob(filepath.Join(dir, ".*"))
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}

	// A new guest program alone.
	write(t, o.agent, "another")
	if err := refreshAgent(t.Context(), quiet(), o); err != nil {
		t.Fatal(err)
	}
	if b, err = bundle.Load(o.runtime); err != nil {
		t.Fatal(err)
	}
	if err := b.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	if initrd, _ = os.ReadFile(b.Path(bundle.Initrd)); !bytes.Contains(initrd, []byte("another")) {
		t.Error("the initrd still holds the old guest program")
	}
}

func TestDamagedCacheIsNoticed(t *testing.T) {
	o := warmCache(t, "git\n")
	found, err := filepath.Glob(filepath.Join(os.Getenv("XDG_CACHE_HOME"), "banger/build/image-*", fileImage))
	if err != nil || len(found) != 1 {
		t.Fatal(found, err)
	}
	write(t, found[0], "IMAGE") // as long as before
	err = makeRuntime(t.Context(), quiet(), o, false)
	if !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), found[0]) {
		t.Errorf("makeRuntime = %v", err)
	}
	if fileExists(filepath.Dir(found[0])) {
		t.Error("the damaged entry is still in the cache")
	}
	if fileExists(filepath.Join(o.runtime, bundle.ManifestName)) {
		t.Error("a bundle was described that is not whole")
	}
}

func TestCachePrunesAndCleansUp(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	c, err := openCache(t.Context(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer c.close() // its lock is a file's, which the garbage collector would close
	for i, key := range []string{"a", "b", "c"} {
		dir, _, err := c.get(t.Context(), "image", key, false, func(string) ([]string, error) { return nil, nil })
		if err != nil {
			t.Fatal(err)
		}
		at := time.Unix(int64(1000+i), 0)
		if err := os.Chtimes(dir, at, at); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := c.get(t.Context(), "image", "a", false, nil); err != nil { // used again: now the newest
		t.Fatal(err)
	}
	if err := c.prune(t.Context(), "image"); err != nil {
		t.Fatal(err)
	}
	left, _ := filepath.Glob(filepath.Join(c.dir, "image-*"))
	if want := []string{filepath.Join(c.dir, "image-a"), filepath.Join(c.dir, "image-c")}; !slices.Equal(left, want) {
		t.Errorf("left %q", left)
	}
	failed := errors.New("no network")
	if _, _, err := c.get(t.Context(), "image", "d", false, func(string) ([]string, error) { return nil, failed }); !errors.Is(err, failed) {
		t.Errorf("get = %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(c.dir, ".tmp-*")); len(left) > 0 {
		t.Errorf("a failed build left %q", left)
	}
	// A second build waits for the first, and stops waiting when it is interrupted.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	p := quiet()
	defer p.end()
	if _, err := openCache(ctx, p); !fault.Is(err, fault.Timeout) {
		t.Errorf("a second build did not wait: %v", err)
	}
}

func TestSparseCopyKeepsContentAndHoles(t *testing.T) {
	dir := t.TempDir()
	content := strings.Repeat("\x00", 3<<20) + "data" + strings.Repeat("\x00", 1<<20)
	src := write(t, filepath.Join(dir, "src"), content)
	got, err := placeFile(t.Context(), src, filepath.Join(dir, "dst"), 0o644)
	if err != nil {
		t.Fatal(err)
	}
	want, err := bundle.Describe(t.Context(), dir, "src")
	if err != nil {
		t.Fatal(err)
	}
	if got.Size != want.Size || got.SHA256 != want.SHA256 {
		t.Errorf("got %+v, want %+v", got, want)
	}
	copied, err := os.ReadFile(filepath.Join(dir, "dst"))
	if err != nil || string(copied) != content {
		t.Errorf("the copy differs (%v)", err)
	}
}

func TestProgressWithoutTerminal(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(0, 0)
	p := &progress{w: &out, now: func() time.Time { return now }}
	p.begin("building")
	if out.String() != "  building\n" {
		t.Errorf("not shown at once: %q", out.String())
	}
	p.note("unpacking")
	now = now.Add(34 * time.Second)
	p.mu.Lock()
	p.show()
	p.mu.Unlock()
	p.begin("writing")
	p.end()
	want := "  building\n  building (unpacking), 34s so far\n  building: done in 34s\n  writing\n"
	if d := cmp.Diff(want, out.String()); d != "" {
		t.Error(d)
	}
}
