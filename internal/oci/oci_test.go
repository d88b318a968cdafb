package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	ocilayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func TestMain(m *testing.M) {
	// An ordinary user's PATH on Debian lacks the directory of mke2fs and e2fsck.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		panic(err)
	}
	firstPause = time.Millisecond
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"))
}

var quiet = log.New(io.Discard, "", 0)

var emptyIndex = empty.Index

// simple is an image of one layer with a file of incompressible size.
func simple(t testing.TB) v1.Image {
	return imageOf(t, tarOf(t, m("etc/", ""), m("etc/hostname", "x\n")))
}

// noise is content that does not compress: the same for the same seed.
func noise(seed byte, n int) string {
	b := make([]byte, n)
	x := uint32(seed) + 1
	for i := range b {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x)
	}
	return string(b)
}

func pull(t testing.TB, p *Puller, ref string) *Image {
	t.Helper()
	img, err := p.Pull(t.Context(), ref)
	if err != nil {
		t.Fatalf("%s: %v (%s)", ref, err, fault.HintOf(err))
	}
	t.Cleanup(img.Close)
	return img
}

// cached lists the layers of a cache, whole or not.
func cached(t testing.TB, p *Puller) []string {
	t.Helper()
	entries, err := os.ReadDir(p.Cache)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if e.Name() != cacheLock {
			names = append(names, e.Name())
		}
	}
	return names
}

// TestSources reads one image from everywhere that images can be.
func TestSources(t *testing.T) {
	layers := [][]byte{tarOf(t, m("a", "1"), m("b", "1")), tarOf(t, m(".wh.a", ""), m("c", "2"))}
	img := imageOf(t, layers...)
	want := "/ dir\n/b 1 bytes of layer 0\n/c 1 bytes of layer 1\n"
	h, dir := newHub(t), t.TempDir()
	ref := h.push(t, "team/app:1", img)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	arm := withConfig(t, img, func(c *v1.ConfigFile) { c.Architecture = "arm64" })
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}},
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}})
	nested := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: index})
	at, err := ocilayout.Write(filepath.Join(dir, "layout"), index)
	if err != nil {
		t.Fatal(err)
	}
	tagged, err := ocilayout.Write(filepath.Join(dir, "tagged:dir"), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for _, tag := range []string{"one", "two"} {
		if err := tagged.AppendImage(img, ocilayout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": tag})); err != nil {
			t.Fatal(err)
		}
	}
	archive := filepath.Join(dir, "saved.tar")
	tag, err := name.NewTag("alpine:3")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(archive, tag, img); err != nil {
		t.Fatal(err)
	}
	p := newPuller(t)
	for _, c := range []struct{ ref, name string }{
		{ref, ref},
		{h.host + "/team/app@" + digest.String(), ""},
		{h.pushIndex(t, "team/many:1", index), ""},
		{h.pushIndex(t, "team/nested:1", nested), ""},
		{"oci:" + string(at), string(at)},
		{string(at), string(at)},
		{"oci:" + string(tagged) + ":two", string(tagged) + ":two"},
		{"docker-archive:" + archive, "index.docker.io/library/alpine:3 of " + archive},
		{"docker-archive:" + archive + ":alpine:3", ""},
		{"docker-archive:" + archive + ":docker.io/library/alpine:3", ""},
		{archive, ""},
	} {
		got := pull(t, p, c.ref)
		if diff := cmp.Diff(want, shown(t, got)); diff != "" {
			t.Errorf("%s:\n%s", c.ref, diff)
		}
		if c.name != "" && got.Reference != c.name && got.Reference != strings.TrimPrefix(c.name, "index.docker.io/library/") {
			t.Errorf("%s: is called %s, want %s", c.ref, got.Reference, c.name)
		}
		if !strings.Contains(c.ref, archive) && got.Digest != digest.String() {
			t.Errorf("%s: digest %s, want %s", c.ref, got.Digest, digest)
		}
	}
	if n := len(cached(t, p)); n != 2 {
		t.Errorf("the cache holds %v, want two layers", cached(t, p))
	}
	for ref, code := range map[string]fault.Code{
		"oci:" + string(tagged) + ":three":                          fault.NotFound,
		"oci:" + filepath.Join(dir, "none"):                         fault.NotFound,
		"oci:" + dir:                                                fault.Invalid,
		"docker-archive:" + archive + ":busybox":                    fault.NotFound,
		"docker-archive:" + dir:                                     fault.Invalid,
		filepath.Join(dir, "none.tar"):                              fault.NotFound,
		"docker-archive:" + filepath.Join(string(at), "index.json"): fault.Corrupt,
		"": fault.Invalid, "UPPER/case": fault.Invalid, "a b": fault.Invalid, "x@sha256:123": fault.Invalid,
	} {
		if _, err := p.Pull(t.Context(), ref); !fault.Is(err, code) {
			t.Errorf("%q: %v, want %s", ref, err, code)
		}
	}
}

// TestNames knows short names of Docker Hub.
func TestNames(t *testing.T) {
	for in, want := range map[string]string{"alpine": "docker.io/library/alpine:latest", "debian:13": "docker.io/library/debian:13",
		"grafana/loki": "docker.io/grafana/loki:latest", "ghcr.io/a/b:c": "ghcr.io/a/b:c", "localhost:5000/x": "localhost:5000/x:latest"} {
		ref, err := name.ParseReference(in)
		if err != nil || display(ref) != want {
			t.Errorf("%s: %v, %v", in, display(ref), err)
		}
	}
}

// TestRefusals: what a registry does not give, or gives of the wrong kind.
func TestRefusals(t *testing.T) {
	h, p := newHub(t), newPuller(t)
	arm := withConfig(t, simple(t), func(c *v1.ConfigFile) { c.Architecture = "arm64" })
	windows := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}}},
		mutate.IndexAddendum{Add: simple(t), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "windows", Architecture: "amd64"}}})
	artifact := mutate.ConfigMediaType(simple(t), "application/vnd.cncf.helm.config.v1+json")
	odd, err := mutate.Append(simple(t), mutate.Addendum{Layer: rawLayer([]byte("x")), MediaType: "application/vnd.oci.image.layer.v1.tar+encrypted"})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		ref  string
		code fault.Code
		says string
	}{
		{h.push(t, "arm:1", arm), fault.Unsupported, "linux/arm64"},
		{h.pushIndex(t, "windows:1", windows), fault.Unsupported, "linux/arm64/v8, windows/amd64"},
		{h.push(t, "chart:1", artifact), fault.Unsupported, "helm"},
		{h.push(t, "encrypted:1", odd), fault.Unsupported, "encrypted"},
		{h.host + "/none:1", fault.NotFound, "no such image"},
		{h.host + "/arm:none", fault.NotFound, "no such image"},
		{"127.0.0.1:1/x:1", fault.Unavailable, "cannot be reached"},
	} {
		_, err := p.Pull(t.Context(), c.ref)
		if !fault.Is(err, c.code) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %s with %q", c.ref, err, c.code, c.says)
		}
	}
	if left := cached(t, p); len(left) != 0 {
		t.Errorf("left in the cache: %v", left)
	}
}

// keychain gives the same credentials everywhere.
type keychain struct{ authn.Authenticator }

func (k keychain) Resolve(authn.Resource) (authn.Authenticator, error) { return k.Authenticator, nil }

func TestCredentials(t *testing.T) {
	h := newHub(t)
	ref := h.push(t, "private:1", simple(t))
	h.front = func(w http.ResponseWriter, r *http.Request, inner http.Handler) {
		if user, password, _ := r.BasicAuth(); user != "me" || password != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}
	p := newPuller(t)
	p.Keychain = keychain{authn.Anonymous}
	if _, err := p.Pull(t.Context(), ref); !fault.Is(err, fault.Permission) || !strings.Contains(fault.HintOf(err), "docker login "+h.host) {
		t.Errorf("without credentials: %v, hint %q", err, fault.HintOf(err))
	}
	p.Keychain = keychain{&authn.Basic{Username: "me", Password: "wrong"}}
	if _, err := p.Pull(t.Context(), ref); !fault.Is(err, fault.Permission) {
		t.Errorf("with wrong ones: %v", err)
	}
	// Docker's own store: what docker login writes without a helper.
	config := t.TempDir()
	auth := base64.StdEncoding.EncodeToString([]byte("me:secret"))
	if err := os.WriteFile(filepath.Join(config, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, h.host, auth), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", config)
	p.Keychain = nil
	pull(t, p, ref)
}

// TestResume: a connection that breaks is taken up where it broke, within one pull and over two.
func TestResume(t *testing.T) {
	h := newHub(t)
	size := 3 << 20
	ref := h.push(t, "big:1", imageOf(t, tarOf(t, m("noise", noise(1, size)))))
	var asked []string
	var sent, budget atomic.Int64
	var mu sync.Mutex
	h.front = func(w http.ResponseWriter, r *http.Request, inner http.Handler) {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			inner.ServeHTTP(w, r)
			return
		}
		mu.Lock()
		asked = append(asked, r.Header.Get("Range"))
		mu.Unlock()
		ranged(&breaking{ResponseWriter: w, left: budget.Load(), sent: &sent}, r, inner)
	}
	p := newPuller(t)
	budget.Store(1 << 20)
	pull(t, p, ref)
	if got := sent.Load(); got < int64(size) || got > int64(size)+64<<10 {
		t.Errorf("%d bytes were sent for %d", got, size)
	}
	if len(asked) < 4 || !strings.HasPrefix(asked[len(asked)-1], "bytes=") {
		t.Errorf("asked for %q", asked)
	}

	// A pull that is called off leaves its part, and the next goes on from there.
	p = newPuller(t)
	budget.Store(1 << 40)
	ctx, cancel := context.WithCancel(t.Context())
	p.Progress = func(pr Progress) {
		if pr.Stage == StageFetch && pr.Done > 0 {
			cancel()
		}
	}
	budget.Store(2 << 20)
	front := h.front
	h.front = func(w http.ResponseWriter, r *http.Request, inner http.Handler) {
		front(w, r, inner)
		if strings.Contains(r.URL.Path, "/blobs/") && r.Header.Get("Range") != "" {
			<-r.Context().Done()
		}
	}
	if _, err := p.Pull(ctx, ref); !errors.Is(err, context.Canceled) {
		t.Fatalf("called off: %v", err)
	}
	if left := cached(t, p); len(left) != 1 || !strings.HasSuffix(left[0], partSuffix) {
		t.Fatalf("left: %v", left)
	}
	part, err := os.Stat(filepath.Join(p.Cache, cached(t, p)[0]))
	if err != nil || part.Size() == 0 {
		t.Fatal(part, err)
	}
	h.front, p.Progress = front, nil
	budget.Store(1 << 40)
	sent.Store(0)
	pull(t, p, ref)
	if got, most := sent.Load(), int64(size)+64<<10-part.Size(); got > most {
		t.Errorf("%d bytes came again, though %d were here", got, part.Size())
	}
	sent.Store(0)
	pull(t, p, ref)
	if got := sent.Load(); got > 4096 {
		t.Errorf("%d bytes came although the layer is cached", got)
	}
}

// breaking cuts the answer off after some bytes of a large one.
type breaking struct {
	http.ResponseWriter
	left int64
	sent *atomic.Int64
}

func (b *breaking) Write(p []byte) (int, error) {
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.ResponseWriter.Write(p)
	b.sent.Add(int64(n))
	if b.left -= int64(n); b.left <= 0 && err == nil {
		if f, ok := b.ResponseWriter.(http.Flusher); ok {
			f.Flush()
		}
		panic(http.ErrAbortHandler)
	}
	return n, err
}

// TestNoRanges: a registry that knows no ranges, and breaks off each time, does not keep a pull busy for ever.
func TestNoRanges(t *testing.T) {
	h, p := newHub(t), newPuller(t)
	ref := h.push(t, "big:1", imageOf(t, tarOf(t, m("noise", noise(1, 3<<20)))))
	cut := false
	var sent atomic.Int64
	var left int64 = 1 << 20
	h.front = func(w http.ResponseWriter, r *http.Request, inner http.Handler) {
		r.Header.Del("Range")
		if cut && strings.Contains(r.URL.Path, "/blobs/") {
			left -= 7
			w = &breaking{ResponseWriter: w, left: left, sent: &sent}
		}
		inner.ServeHTTP(w, r)
	}
	cut = true
	if _, err := p.Pull(t.Context(), ref); !fault.Is(err, fault.Unavailable) || !strings.Contains(fault.HintOf(err), "kept") {
		t.Errorf("%v", err)
	}
	cut = false
	pull(t, p, ref)
}

// TestPartOfSomethingElse: a part that does not belong is noticed by the digest, and the next pull is right.
func TestPartOfSomethingElse(t *testing.T) {
	h, p := newHub(t), newPuller(t)
	img := imageOf(t, tarOf(t, m("noise", noise(2, 100_000))))
	ref := h.push(t, "x:1", img)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(p.Cache, 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(p.Cache, "sha256-"+digest.Hex)
	if err := os.WriteFile(file+partSuffix, []byte(noise(3, 50_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Pull(t.Context(), ref); !fault.Is(err, fault.Corrupt) {
		t.Errorf("a foreign part: %v", err)
	}
	if left := cached(t, p); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	pull(t, p, ref)
	// A cache that was damaged later is not believed either.
	if err := os.WriteFile(file, []byte(noise(4, 100_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	size, err := layers[0].Size()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	pull(t, p, ref)
}

// TestTwoAtOnce: two pulls of one image fetch each layer once.
func TestTwoAtOnce(t *testing.T) {
	h := newHub(t)
	ref := h.push(t, "x:1", imageOf(t, tarOf(t, m("noise", noise(5, 2<<20)))))
	var sent atomic.Int64
	h.front = func(w http.ResponseWriter, r *http.Request, inner http.Handler) {
		inner.ServeHTTP(&breaking{ResponseWriter: w, left: 1 << 40, sent: &sent}, r)
	}
	p := newPuller(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := p.Pull(t.Context(), ref); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := sent.Load(); got > 2<<20+200_000 {
		t.Errorf("%d bytes came for 2 MiB", got)
	}
	if got := cached(t, p); len(got) != 1 {
		t.Errorf("the cache holds %v", got)
	}
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// madeOf is an image whose one layer is these bytes, with the diff id that the tar in it has.
func madeOf(t testing.TB, layer, content []byte) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), rawLayer(layer))
	if err != nil {
		t.Fatal(err)
	}
	id, _, err := v1.SHA256(bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	return withConfig(t, img, func(c *v1.ConfigFile) { c.RootFS = v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{id}} })
}

// TestCompression goes by what is there, not by the media type.
func TestCompression(t *testing.T) {
	h, p := newHub(t), newPuller(t)
	content := tarOf(t, m("a", "1"))
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	for what, layer := range map[string][]byte{"plain": content, "gzip": gzipped(t, content), "zstd": z.EncodeAll(content, nil),
		"two-streams": append(gzipped(t, content[:512]), gzipped(t, content[512:])...)} {
		if got := shown(t, pull(t, p, h.push(t, what+":1", madeOf(t, layer, content)))); got != "/ dir\n/a 1 bytes of layer 0\n" {
			t.Errorf("%s: %s", what, got)
		}
	}
}

// TestHostileLayers: each is refused with a reason, and leaves nothing.
func TestHostileLayers(t *testing.T) {
	h := newHub(t)
	content := tarOf(t, m("a", noise(6, 50_000)))
	packed := gzipped(t, content)
	wrong := bytes.Clone(packed)
	wrong[len(wrong)/2] ^= 1
	loop := tarOf(t, symlink("a", "b"), symlink("b", "a"), m("a/x", "1"))
	for name, c := range map[string]struct {
		img  v1.Image
		code fault.Code
		says string
	}{
		"truncated":                {madeOf(t, packed[:len(packed)/2], content), fault.Corrupt, "cut short"},
		"truncated tar":            {madeOf(t, gzipped(t, content[:20_000]), content[:20_000]), fault.Corrupt, "cut short"},
		"damaged":                  {madeOf(t, wrong, content), fault.Corrupt, "damaged"},
		"another content":          {madeOf(t, packed, []byte("other")), fault.Corrupt, "digest"},
		"no tar":                   {madeOf(t, []byte(noise(7, 2000)), []byte(noise(7, 2000))), fault.Corrupt, "damaged"},
		"empty":                    {madeOf(t, nil, nil), fault.Corrupt, "cut short"},
		"zip bomb":                 {madeOf(t, gzipped(t, make([]byte, 64<<20)), make([]byte, 64<<20)), fault.Exhausted, "when it is unpacked"},
		"many entries":             {imageOf(t, tarOf(t, many(5000)...)), fault.Exhausted, "files"},
		"much metadata":            {imageOf(t, tarOf(t, wordy(300)...)), fault.Exhausted, "names and attributes"},
		"hard link to nowhere":     {imageOf(t, tarOf(t, hardlink("a", "nowhere"))), fault.Corrupt, "not in the image"},
		"hard link outside":        {imageOf(t, tarOf(t, hardlink("a", "../../../../etc/passwd"))), fault.Corrupt, "not in the image"},
		"hard link to a directory": {imageOf(t, tarOf(t, m("d/", ""), hardlink("a", "d"))), fault.Corrupt, "directory"},
		"hard link to the root":    {imageOf(t, tarOf(t, hardlink("a", "/"))), fault.Corrupt, "not in the image"},
		"link loop":                {imageOf(t, loop), fault.Corrupt, "symbolic links"},
		"through a file":           {imageOf(t, tarOf(t, m("f", "x"), m("f/x", "y"))), fault.Corrupt, "no directory"},
		"root is a file":           {imageOf(t, tarOf(t, m("./x/..", "y"))), fault.Corrupt, "root directory"},
		"whiteout of dots":         {imageOf(t, tarOf(t, m("d/.wh...", ""))), fault.Corrupt, "whiteout"},
		"whiteout of nothing":      {imageOf(t, tarOf(t, m("d/.wh.", ""))), fault.Corrupt, "whiteout"},
		"long name":                {imageOf(t, tarOf(t, m(strings.Repeat("n", 256), "x"))), fault.Corrupt, "255"},
		"long target":              {imageOf(t, tarOf(t, symlink("l", strings.Repeat("t", 4096)))), fault.Corrupt, "4096"},
		"too deep":                 {imageOf(t, tarOf(t, m(strings.Repeat("d/", 3000)+"f", "x"))), fault.Corrupt, "deep"},
		"owner below zero":         {imageOf(t, tarOf(t, m("a", "x", owner(-1, 0)))), fault.Corrupt, "belongs to"},
		"large attribute":          {imageOf(t, tarOf(t, m("a", "x", xattr("user.a", strings.Repeat("v", 5000))))), fault.Unsupported, "attributes"},
		"unknown kind":             {imageOf(t, unknownKind(t)), fault.Unsupported, "kind"},
		"many layers":              {manyLayers(t, 30), fault.Exhausted, "layers"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPuller(t)
			p.Limits = Limits{Layers: 20, Entries: 4000, Bytes: 32 << 20, Metadata: 256 << 10}
			ref := h.push(t, strings.ReplaceAll(name, " ", "-")+":1", c.img)
			_, err := p.Pull(t.Context(), ref)
			if !fault.Is(err, c.code) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %s with %q", err, c.code, c.says)
			}
			if err != nil && !strings.Contains(err.Error(), h.host) {
				t.Errorf("%v does not say of which image", err)
			}
		})
	}
}

func wordy(n int) []file {
	var files []file
	for i := range n {
		files = append(files, m(fmt.Sprintf("f%d", i), "x", xattr("user.a", strings.Repeat("v", 3000))))
	}
	return files
}

func manyLayers(t testing.TB, n int) v1.Image {
	var layers [][]byte
	for i := range n {
		layers = append(layers, tarOf(t, m(fmt.Sprintf("f%d", i), "x")))
	}
	return imageOf(t, layers...)
}

// unknownKind is a tar with a member whose type flag nobody knows.
func unknownKind(t testing.TB) []byte {
	b := tarOf(t, m("a", "", format(tar.FormatUSTAR)))
	b[156] = 'Q'
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b[:512] {
		sum += int(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// TestWrongDigests: manifests and configs are held to their digests as well.
func TestWrongDigests(t *testing.T) {
	for _, what := range []string{"config", "manifest", "layer"} {
		at, err := ocilayout.Write(filepath.Join(t.TempDir(), "layout"), mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: simple(t)}))
		if err != nil {
			t.Fatal(err)
		}
		index, err := at.ImageIndex()
		if err != nil {
			t.Fatal(err)
		}
		list, err := index.IndexManifest()
		if err != nil {
			t.Fatal(err)
		}
		img, err := index.Image(list.Manifests[0].Digest)
		if err != nil {
			t.Fatal(err)
		}
		manifest, err := img.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		digest := map[string]v1.Hash{"config": manifest.Config.Digest, "manifest": list.Manifests[0].Digest, "layer": manifest.Layers[0].Digest}[what]
		file := filepath.Join(string(at), "blobs", "sha256", digest.Hex)
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, append(b, ' '), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := newPuller(t).Pull(t.Context(), string(at)); !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "digest") {
			t.Errorf("%s: %v", what, err)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if _, err := newPuller(t).Pull(t.Context(), string(at)); !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "not whole") {
			t.Errorf("%s is missing: %v", what, err)
		}
	}
}

// TestFlattenLeavesNothing when a layer has changed since it was checked, or it is called off. TestFullDisk is about room.
func TestFlattenLeavesNothing(t *testing.T) {
	h, p := newHub(t), newPuller(t)
	ref := h.push(t, "x:1", imageOf(t, tarOf(t, m("root/", ""), m("root/f", noise(8, 100_000)))))
	img := pull(t, p, ref)
	file := filepath.Join(p.Cache, cached(t, p)[0])
	if err := os.WriteFile(file, gzipped(t, tarOf(t, m("root/", ""), m("root/f", noise(9, 100_000)))), 0o600); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	if _, err := img.Flatten(t.Context(), mkfs(t), filepath.Join(out, "rootfs"), filepath.Join(out, "seed"), nil); !fault.Is(err, fault.Corrupt) {
		t.Errorf("a layer that changed: %v", err)
	}
	if left, err := os.ReadDir(out); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := img.Flatten(ctx, mkfs(t), filepath.Join(out, "rootfs"), filepath.Join(out, "seed"), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("called off: %v", err)
	}
	if left, err := os.ReadDir(out); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestSeed: /root becomes a filesystem of its own as well.
func TestSeed(t *testing.T) {
	h, p := newHub(t), newPuller(t)
	img := pull(t, p, h.push(t, "x:1", imageOf(t, tarOf(t, m("root/", "", mode(0o700)), m("root/.profile", "hello"), m("etc/", "")))))
	out := t.TempDir()
	rootfs, seed := filepath.Join(out, "rootfs"), filepath.Join(out, "seed")
	var last Progress
	made, err := img.Flatten(t.Context(), mkfs(t), rootfs, seed, func(p Progress) { last = p })
	if err != nil {
		t.Fatal(err)
	}
	if !made.Seed || made.Files != 4 || made.Content != 5 || last.Done != 5 || last.Total != 5 {
		t.Errorf("%+v, %+v", made, last)
	}
	for _, c := range []struct{ image, command, want string }{
		{rootfs, "cat /root/.profile", "hello"}, {seed, "cat /.profile", "hello"}, {seed, "stat /", "Mode:  0700"}, {seed, "ls -l /", ".profile"},
	} {
		if got := debugfs(t, c.image, c.command); !strings.Contains(got, c.want) {
			t.Errorf("%s of %s: %q", c.command, c.image, got)
		}
	}
	if strings.Contains(debugfs(t, seed, "ls -l /"), "lost+found") {
		t.Error("somebody's home has a lost+found")
	}
}
