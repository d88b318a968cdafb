package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// built is the options of a bundle that was made.
func built(t *testing.T) options {
	t.Helper()
	o := warmCache(t, "git\n")
	if err := makeRuntime(t.Context(), quiet(), o, false); err != nil {
		t.Fatal(err)
	}
	return o
}

// shipped packs a bundle and gives the archive's file and checksum.
func shipped(t *testing.T, o options) (file, sum string) {
	t.Helper()
	o.to = filepath.Join(t.TempDir(), "bundle.tar.gz")
	if err := pack(t.Context(), quiet(), o); err != nil {
		t.Fatal(err)
	}
	return o.to, sumOf(t, o.to)
}

func sumOf(t *testing.T, file string) string {
	t.Helper()
	a, err := bundle.Describe(t.Context(), filepath.Dir(file), filepath.Base(file))
	if err != nil {
		t.Fatal(err)
	}
	return a.SHA256
}

// whole loads a bundle, all of which must be as bundle.json says.
func whole(t *testing.T, dir string) *bundle.Bundle {
	t.Helper()
	b, err := bundle.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	return b
}

func read(t *testing.T, file string) string {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func keyOf(t *testing.T, dir string) string {
	t.Helper()
	file := filepath.Join(dir, bundle.FileName(bundle.SSHKey))
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key is %v, %v", info, err)
	}
	return read(t, file)
}

// nothingBeside fails if a directory holds anything but the names given.
func nothingBeside(t *testing.T, dir string, names ...string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var got []string
	for _, e := range list {
		got = append(got, e.Name())
	}
	if d := cmp.Diff(names, got); d != "" {
		t.Errorf("%s holds (-wanted +got):\n%s", dir, d)
	}
}

// into gives the options of a fetch into a new directory.
func into(t *testing.T, o options, url, sum string) options {
	t.Helper()
	dir := t.TempDir()
	o.runtime = filepath.Join(dir, "lib", "runtime")
	o.manifest = write(t, filepath.Join(dir, "manifest.toml"), fmt.Sprintf("url = %q\nsha256 = %q\n", url, sum))
	return o
}

// Two runs, and a run on a copy with other times and modes, make the same archive.
func TestArchiveIsReproducible(t *testing.T) {
	o := built(t)
	file, first := shipped(t, o)
	if _, again := shipped(t, o); again != first {
		t.Error("two runs make two archives")
	}
	o.to = filepath.Join(t.TempDir(), "copy")
	if err := install(t.Context(), quiet(), o); err != nil {
		t.Fatal(err)
	}
	for role := range whole(t, o.to).Artifacts {
		name := filepath.Join(o.to, bundle.FileName(role))
		if err := os.Chtimes(name, time.Unix(1, 0), time.Unix(2, 0)); err != nil {
			t.Fatal(err)
		}
		if role != bundle.SSHKey {
			if err := os.Chmod(name, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	o.runtime = o.to
	if _, copied := shipped(t, o); copied != first {
		t.Error("a copy of the bundle makes another archive")
	}
	if names := namesIn(t, file); strings.Contains(names, "id_ed25519") {
		t.Errorf("the archive holds a key: %s", names)
	}
	nothingBeside(t, filepath.Dir(file), "bundle.tar.gz")
}

func namesIn(t *testing.T, file string) string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	gz, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for tr := tar.NewReader(gz); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return strings.Join(names, " ")
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
}

// An archive comes by a path relative to the manifest, an absolute one, file:// and http://, and is the same bundle with
// another key.
func TestFetchByEveryKindOfURL(t *testing.T) {
	o := built(t)
	file, sum := shipped(t, o)
	here := whole(t, o.runtime)
	server := httptest.NewServer(http.FileServer(http.Dir(filepath.Dir(file))))
	defer server.Close()
	for kind, url := range map[string]string{
		"relative": "../banger/bundle.tar.gz", "absolute": file, "file": "file://" + file, "http": server.URL + "/bundle.tar.gz",
	} {
		t.Run(kind, func(t *testing.T) {
			there := into(t, o, url, strings.ToUpper(sum)) // as some tools print it
			if kind == "relative" {
				dir := filepath.Dir(filepath.Dir(there.manifest))
				if err := os.Mkdir(filepath.Join(dir, "banger"), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
					t.Fatal(err)
				}
				write(t, filepath.Join(dir, "banger", "bundle.tar.gz"), read(t, file))
			}
			if err := fetch(t.Context(), quiet(), there); err != nil {
				t.Fatal(err)
			}
			got := whole(t, there.runtime)
			if d := cmp.Diff(here.Artifacts, got.Artifacts); d != "" {
				t.Error(d)
			}
			if keyOf(t, there.runtime) == keyOf(t, o.runtime) {
				t.Error("the private key travelled in the archive")
			}
			if stamp := read(t, got.Path(bundle.RootFS)+stampSuffix); stamp != got.Artifacts[bundle.Packages].SHA256+"\n" {
				t.Errorf("the stamp is %q", stamp)
			}
			nothingBeside(t, filepath.Dir(there.runtime), "runtime")

			// An upgrade keeps the key and what somebody put there.
			key := keyOf(t, there.runtime)
			write(t, filepath.Join(there.runtime, "rootfs-void.ext4"), "mine")
			write(t, filepath.Join(there.runtime, "notes", "deep", "file"), "mine as well")
			write(t, got.Path(bundle.Kernel), "damaged")
			if err := fetch(t.Context(), quiet(), there); err != nil {
				t.Fatal(err)
			}
			whole(t, there.runtime)
			if keyOf(t, there.runtime) != key {
				t.Error("an upgrade replaced the key")
			}
			if read(t, filepath.Join(there.runtime, "rootfs-void.ext4")) != "mine" || read(t, filepath.Join(there.runtime, "notes/deep/file")) != "mine as well" {
				t.Error("an upgrade lost somebody's files")
			}
			nothingBeside(t, filepath.Dir(there.runtime), "runtime")
		})
	}
}

// A key goes into an archive when it is asked for, and is taken where there is none.
func TestKeyInAnArchive(t *testing.T) {
	o := built(t)
	o.withKey = true
	file, sum := shipped(t, o)
	if names := namesIn(t, file); !strings.Contains(names, "id_ed25519") {
		t.Fatalf("the archive holds %s", names)
	}
	var said bytes.Buffer
	p := &progress{w: &said, now: time.Now}
	there := into(t, o, file, sum)
	if err := fetch(t.Context(), p, there); err != nil {
		t.Fatal(err)
	}
	p.end()
	if keyOf(t, there.runtime) != keyOf(t, o.runtime) {
		t.Error("the archive's key was not taken")
	}
	if !strings.Contains(said.String(), "whoever has that archive") {
		t.Errorf("nothing was said of the key:\n%s", said.String())
	}
	if _, err := os.Stat(filepath.Join(there.runtime, "id_ed25519.pub")); err != nil {
		t.Error(err)
	}

	own := into(t, o, file, sum)
	if err := os.MkdirAll(own.runtime, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := bundle.EnsureSSHKey(own.runtime); err != nil {
		t.Fatal(err)
	}
	key := keyOf(t, own.runtime)
	if err := fetch(t.Context(), quiet(), own); err != nil {
		t.Fatal(err)
	}
	whole(t, own.runtime)
	if keyOf(t, own.runtime) != key {
		t.Error("the archive's key replaced the installation's")
	}
}

// archiveOf packs entries as they are given, for archives that pack would not make.
func archiveOf(t *testing.T, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	gz := gzip.NewWriter(&b)
	w := tar.NewWriter(gz)
	for _, h := range entries {
		body := h.PAXRecords["BANGER.body"]
		h.PAXRecords = nil
		if h.Typeflag == tar.TypeReg && h.Size == 0 {
			h.Size = int64(len(body))
		}
		h.Mode = 0o644
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	_ = w.Flush() // not Close: a header may announce more than there is
	if err := gz.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func regular(name, body string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, PAXRecords: map[string]string{"BANGER.body": body}}
}

// What is no archive of a bundle changes nothing, neither the bundle that is there nor anything around it, and the error says
// why.
func TestHostileArchives(t *testing.T) {
	o := built(t)
	good, _ := shipped(t, o)
	whole := []byte(read(t, good))
	noise := make([]byte, 4096)
	_, _ = rand.Read(noise)
	flipped := bytes.Clone(whole)
	flipped[len(flipped)/2] ^= 0x40
	outside := filepath.Join(t.TempDir(), "outside")
	for name, c := range map[string]struct {
		raw  []byte
		sum  string // "" for the right one
		code fault.Code
		word string
	}{
		"wrong checksum":        {whole, strings.Repeat("0", 64), fault.Corrupt, "has SHA256"},
		"checksum of no form":   {whole, "abc", fault.Invalid, "64 hexadecimal"},
		"truncated":             {whole[:len(whole)/2], "", fault.Corrupt, "unexpected EOF"},
		"empty":                 {nil, "", fault.Corrupt, "EOF"},
		"no gzip":               {noise, "", fault.Corrupt, "invalid header"},
		"damaged in the middle": {flipped, "", fault.Corrupt, "archive"},
		"no bundle.json":        {archiveOf(t, regular("vmlinux", "x")), "", fault.NotFound, "no runtime bundle"},
		"up and out":            {archiveOf(t, regular("../outside", "x")), "", fault.Corrupt, "does not belong"},
		"absolute":              {archiveOf(t, regular(outside, "x")), "", fault.Corrupt, "does not belong"},
		"below a directory":     {archiveOf(t, regular("vmlinux/x", "x")), "", fault.Corrupt, "does not belong"},
		"symbolic link":         {archiveOf(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "vmlinux", Linkname: outside}, regular("vmlinux", "x")), "", fault.Corrupt, "does not belong"},
		"hard link":             {archiveOf(t, tar.Header{Typeflag: tar.TypeLink, Name: "vmlinux", Linkname: "/etc/passwd"}), "", fault.Corrupt, "does not belong"},
		"device":                {archiveOf(t, tar.Header{Typeflag: tar.TypeChar, Name: "vmlinux", Devmajor: 1, Devminor: 3}), "", fault.Corrupt, "does not belong"},
		"another file":          {archiveOf(t, regular(".profile", "x")), "", fault.Corrupt, "does not belong"},
		"the archive's name":    {archiveOf(t, regular(archiveName, "x")), "", fault.Corrupt, "does not belong"},
		"the same twice":        {archiveOf(t, regular("vmlinux", "x"), regular("./vmlinux", "y")), "", fault.Corrupt, "exists"},
		"bundle.json of size":   {archiveOf(t, regular(bundle.ManifestName, strings.Repeat(" ", maxText+1))), "", fault.Corrupt, "more than it can have"},
		"bomb":                  {archiveOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "rootfs-docker.ext4", Size: maxImage + 1, Format: tar.FormatPAX}), "", fault.Corrupt, "more than it can have"},
		"announced, not there":  {archiveOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "vmlinux", Size: 1 << 20}), "", fault.Corrupt, "EOF"},
		"artifact elsewhere": {archiveOf(t, regular(bundle.ManifestName, strings.Replace(read(t, filepath.Join(o.runtime, bundle.ManifestName)),
			`"path": "vmlinux"`, `"path": "../vmlinux"`, 1))), "", fault.Corrupt, "outside of the bundle"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := write(t, filepath.Join(dir, "in", "a.tar.gz"), string(c.raw))
			sum := c.sum
			if sum == "" {
				h := sha256.Sum256(c.raw)
				sum = hex.EncodeToString(h[:])
			}
			to := into(t, o, file, sum)
			to.runtime = filepath.Join(dir, "lib", "runtime")
			refused := func() {
				t.Helper()
				err := fetch(t.Context(), quiet(), to)
				if !fault.Is(err, c.code) || !strings.Contains(err.Error()+fault.HintOf(err), c.word) {
					t.Errorf("fetch = %v (%s)", err, fault.HintOf(err))
				}
				if fileExists(outside) || fileExists(filepath.Join(dir, "lib", "outside")) {
					t.Error("something was written outside")
				}
			}
			refused()
			nothingBeside(t, filepath.Join(dir, "lib"))

			// And where there is a bundle it stays, to the last byte.
			good := o
			good.to = to.runtime
			if err := install(t.Context(), quiet(), good); err != nil {
				t.Fatal(err)
			}
			before := read(t, filepath.Join(to.runtime, bundle.ManifestName))
			refused()
			if read(t, filepath.Join(to.runtime, bundle.ManifestName)) != before {
				t.Error("the bundle that was there has changed")
			}
			if b, err := bundle.Load(to.runtime); err != nil || b.Verify(t.Context()) != nil {
				t.Error("the bundle that was there is damaged")
			}
			nothingBeside(t, filepath.Join(dir, "lib"), "runtime")
		})
	}
}

// A server that sends without end is given up at the bound, and one that breaks off changes nothing.
func TestEndlessAndBrokenDownloads(t *testing.T) {
	b := &bounded{r: zeros{}, left: 1 << 20, what: "it"}
	if n, err := io.Copy(io.Discard, b); !fault.Is(err, fault.Exhausted) || n > 1<<20+1 {
		t.Errorf("%d bytes, %v", n, err)
	}
	exact := &bounded{r: strings.NewReader("12345"), left: 5, what: "it"}
	if raw, err := io.ReadAll(exact); string(raw) != "12345" || err != nil {
		t.Errorf("%q, %v", raw, err)
	}

	o := built(t)
	file, sum := shipped(t, o)
	raw := []byte(read(t, file))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(raw)))
		_, _ = w.Write(raw[:len(raw)/2])
		panic(http.ErrAbortHandler)
	}))
	defer server.Close()
	to := into(t, o, server.URL, sum)
	if err := fetch(t.Context(), quiet(), to); !fault.Is(err, fault.Unavailable) {
		t.Errorf("fetch = %v", err)
	}
	nothingBeside(t, filepath.Dir(to.runtime))
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// Whoever reads while the bundle is replaced sees the one or the other, never a mixture; and several at once take turns.
func TestSwapIsAtomic(t *testing.T) {
	o := built(t)
	other := o
	other.agent = write(t, filepath.Join(t.TempDir(), "agent"), "another, longer agent")
	other.runtime = filepath.Join(t.TempDir(), "other")
	if err := makeRuntime(t.Context(), quiet(), other, false); err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(t.TempDir(), "lib", "banger")
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	o.to, other.to = target, target
	if err := install(t.Context(), quiet(), o); err != nil {
		t.Fatal(err)
	}
	other.to = link
	key := keyOf(t, target)

	var writers, reader sync.WaitGroup
	stop := make(chan struct{})
	reader.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			// One directory, as a reader that opened it has it.
			root, err := os.OpenRoot(target)
			if err != nil {
				t.Errorf("for a moment there was no bundle: %v", err)
				return
			}
			manifest, err := root.ReadFile(bundle.ManifestName)
			if errors.Is(err, os.ErrNotExist) { // it was replaced and removed in between
				root.Close()
				continue
			}
			agent, err2 := root.ReadFile("banger-vsock-agent")
			root.Close()
			if errors.Is(err2, os.ErrNotExist) {
				continue
			}
			h := sha256.Sum256(agent)
			if err != nil || err2 != nil || !strings.Contains(string(manifest), hex.EncodeToString(h[:])) {
				t.Errorf("a mixture of two bundles (%v, %v)", err, err2)
				return
			}
		}
	})
	for _, w := range []options{o, other} {
		writers.Go(func() {
			for range 10 {
				if err := install(t.Context(), quiet(), w); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	reader.Wait()
	whole(t, target)
	if keyOf(t, target) != key {
		t.Error("the key was replaced")
	}
	if got, err := os.Readlink(link); err != nil || got != target {
		t.Errorf("the link is %q, %v", got, err)
	}
	nothingBeside(t, filepath.Dir(target), "banger")
}

// Installing keeps a key that is there, and takes the source's along where there is none, so that VMs of the
// checkout can be entered.
func TestInstallKeepsTheKey(t *testing.T) {
	o := built(t)
	o.to = filepath.Join(t.TempDir(), "lib/banger")
	if err := install(t.Context(), quiet(), o); err != nil {
		t.Fatal(err)
	}
	whole(t, o.to)
	if keyOf(t, o.to) != keyOf(t, o.runtime) {
		t.Error("the first installation has another key")
	}
	file, sum := shipped(t, o)
	another := into(t, o, file, sum)
	if err := fetch(t.Context(), quiet(), another); err != nil {
		t.Fatal(err)
	}
	another.to = o.to
	if err := install(t.Context(), quiet(), another); err != nil {
		t.Fatal(err)
	}
	if keyOf(t, o.to) != keyOf(t, o.runtime) {
		t.Error("a second installation replaced the key")
	}
}

// make rootfs builds the image and the seed again when packages.apt is another one, when the image is missing and when the stamp is,
// and else does nothing.
func TestRootfsFollowsThePackages(t *testing.T) {
	o := built(t)
	image := filepath.Join(o.runtime, bundle.FileName(bundle.RootFS))
	// mmdebstrap is not there (warmCache), so that a build shows itself by its failure.
	wanted := func(why string, build bool) {
		t.Helper()
		err := makeRootfs(t.Context(), quiet(), o)
		if builds := fault.Is(err, fault.Unavailable); builds != build || err != nil && !builds {
			t.Errorf("%s: %v", why, err)
		}
	}
	wanted("nothing has changed", false)
	sum := sha256.Sum256([]byte("git\n"))
	if got := read(t, image+stampSuffix); got != hex.EncodeToString(sum[:])+"\n" {
		t.Errorf("the stamp is %q", got)
	}
	write(t, o.packages, "git\nsl\n")
	wanted("one more package", true)
	write(t, o.packages, "git\n")
	wanted("as before", false)
	if err := os.Remove(image + stampSuffix); err != nil {
		t.Fatal(err)
	}
	wanted("no stamp", true)
	if err := makeRuntime(t.Context(), quiet(), o, false); err != nil { // writes it again
		t.Fatal(err)
	}
	wanted("the stamp is back", false)
	if err := os.Remove(image); err != nil {
		t.Fatal(err)
	}
	wanted("no image", true)
	if err := os.Remove(o.packages); err != nil {
		t.Fatal(err)
	}
	if err := makeRootfs(t.Context(), quiet(), o); !fault.Is(err, fault.NotFound) {
		t.Errorf("no packages.apt: %v", err)
	}
}

// uninstall takes away what install put there, and nothing else.
func TestUninstall(t *testing.T) {
	o := built(t)
	o.to = filepath.Join(t.TempDir(), "lib/banger")
	if err := uninstall(t.Context(), quiet(), o); err != nil {
		t.Errorf("nothing is installed: %v", err)
	}
	nothingBeside(t, filepath.Dir(filepath.Dir(o.to)))
	if err := install(t.Context(), quiet(), o); err != nil {
		t.Fatal(err)
	}
	key := keyOf(t, o.to)
	write(t, filepath.Join(o.to, "rootfs-void.ext4"), "mine")
	if err := uninstall(t.Context(), quiet(), o); err != nil {
		t.Fatal(err)
	}
	nothingBeside(t, o.to, "id_ed25519", "id_ed25519.pub", "rootfs-void.ext4")
	nothingBeside(t, filepath.Dir(o.to), "banger")
	if err := install(t.Context(), quiet(), o); err != nil {
		t.Fatal(err)
	}
	if keyOf(t, o.to) != key {
		t.Error("another installation has another key")
	}

	// What is for all users has no key, and goes entirely.
	o.shared, o.to = true, filepath.Join(t.TempDir(), "usr/lib/banger")
	if err := install(t.Context(), quiet(), o); err != nil {
		t.Fatal(err)
	}
	b := whole(t, o.to)
	if _, ok := b.Artifacts[bundle.SSHKey]; ok || fileExists(filepath.Join(o.to, "id_ed25519")) {
		t.Error("a bundle for all users has a key")
	}
	if err := uninstall(t.Context(), quiet(), o); err != nil {
		t.Fatal(err)
	}
	nothingBeside(t, filepath.Dir(o.to))
}

// The template's bundle_metadata is what bundles are, and its url and sha256 are empty.
func TestTheTemplateIsTrue(t *testing.T) {
	m, err := readRuntimeManifest("../../runtime-bundle.toml")
	if err != nil {
		t.Fatal(err)
	}
	if m.URL != "" || m.SHA256 != "" || m.Firecracker.URL != "" || m.Firecracker.SHA256 != "" {
		t.Errorf("the template names an archive: %+v", m)
	}
	want := map[bundle.Role]string{}
	for _, r := range append(bundle.Required(), bundle.Optional()...) {
		want[r] = bundle.FileName(r)
	}
	if d := cmp.Diff(want, m.Metadata.Artifacts); d != "" || m.Metadata.Format != bundle.Format || m.Metadata.Arch != "amd64" {
		t.Errorf("bundle_metadata (-is +says): %s, format %d, arch %s", d, m.Metadata.Format, m.Metadata.Arch)
	}
	if err := m.checkMetadata("m.toml"); err != nil {
		t.Error(err)
	}
}

// What cannot fit is refused before anything is fetched: the address is none.
func TestMetadataThatDoesNotFit(t *testing.T) {
	for text, code := range map[string]fault.Code{
		"[bundle_metadata]\nformat = 99\n":                           fault.VersionSkew,
		"[bundle_metadata]\narch = \"riscv64\"\n":                    fault.Unsupported,
		"[bundle_metadata.artifacts]\nkernel = \"bzImage\"\n":        fault.Invalid,
		"[bundle_metadata.artifacts]\nwarp_drive = \"warp-drive\"\n": fault.Invalid,
	} {
		dir := t.TempDir()
		o := options{runtime: filepath.Join(dir, "runtime"), patience: usualPatience,
			manifest: write(t, filepath.Join(dir, "m.toml"), fmt.Sprintf("url = \"/nowhere\"\nsha256 = %q\n", strings.Repeat("0", 64))+text)}
		if err := fetch(t.Context(), quiet(), o); !fault.Is(err, code) || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", text, err)
		}
	}
}
