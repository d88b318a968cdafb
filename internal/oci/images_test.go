package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	hubserver "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// then is the time of every member that says nothing else.
var then = time.Unix(1_600_000_000, 0)

// m is a member of a layer, by its name: "d/" is a directory, the rest is a file with this content.
func m(name, content string, change ...func(*tar.Header)) file {
	h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content)), ModTime: then, Format: tar.FormatPAX}
	if strings.HasSuffix(name, "/") {
		h.Typeflag, h.Mode, h.Size = tar.TypeDir, 0o755, 0
	}
	for _, c := range change {
		c(h)
	}
	if h.Typeflag != tar.TypeReg {
		h.Size, content = 0, ""
	}
	return file{h, content}
}

type file struct {
	h       *tar.Header
	content string
}

func kind(k byte) func(*tar.Header) { return func(h *tar.Header) { h.Typeflag = k } }
func mode(v int64) func(*tar.Header) {
	return func(h *tar.Header) { h.Mode = v }
}
func owner(uid, gid int) func(*tar.Header) {
	return func(h *tar.Header) { h.Uid, h.Gid = uid, gid }
}
func device(major, minor int64) func(*tar.Header) {
	return func(h *tar.Header) { h.Devmajor, h.Devminor = major, minor }
}
func at(sec int64) func(*tar.Header) { return func(h *tar.Header) { h.ModTime = time.Unix(sec, 0) } }
func format(f tar.Format) func(*tar.Header) {
	return func(h *tar.Header) { h.Format = f }
}
func xattr(name, value string) func(*tar.Header) {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrRecord+name] = value
	}
}
func symlink(name, target string) file {
	return m(name, "", kind(tar.TypeSymlink), func(h *tar.Header) { h.Linkname = target; h.Mode = 0o777 })
}
func hardlink(name, target string) file {
	return m(name, "", kind(tar.TypeLink), func(h *tar.Header) { h.Linkname = target })
}

// tarOf writes a layer.
func tarOf(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := w.WriteHeader(f.h); err != nil {
			t.Fatalf("%s: %v", f.h.Name, err)
		}
		if _, err := io.WriteString(w, f.content); err != nil {
			t.Fatalf("%s: %v", f.h.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// imageOf makes an image of layers, each the bytes of a tar, for this platform.
func imageOf(t testing.TB, layers ...[]byte) v1.Image {
	t.Helper()
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	for _, l := range layers {
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(l)), nil },
			tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.BestSpeed))
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			t.Fatal(err)
		}
	}
	return withConfig(t, img, func(*v1.ConfigFile) {})
}

// withConfig changes an image's config.
func withConfig(t testing.TB, img v1.Image, change func(*v1.ConfigFile)) v1.Image {
	t.Helper()
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.OS, c.Architecture = platformOS, platformArch
	change(c)
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

// hub is a registry on loopback, with something in front of it that tests may replace.
type hub struct {
	host  string
	front func(w http.ResponseWriter, r *http.Request, inner http.Handler)
}

func newHub(t testing.TB) *hub {
	t.Helper()
	h := &hub{}
	inner := hubserver.New(hubserver.Logger(quiet))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if h.front != nil {
			h.front(w, r, inner)
			return
		}
		ranged(w, r, inner)
	}))
	t.Cleanup(s.Close)
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	h.host = u.Host
	return h
}

// ranged serves parts of blobs, which the library's registry does not do.
func ranged(w http.ResponseWriter, r *http.Request, inner http.Handler) {
	if r.Header.Get("Range") == "" {
		inner.ServeHTTP(w, r)
		return
	}
	all := httptest.NewRecorder()
	whole := r.Clone(r.Context())
	whole.Header.Del("Range")
	inner.ServeHTTP(all, whole)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(all.Body.Bytes()))
}

func (h *hub) push(t testing.TB, repo string, img v1.Image) string {
	t.Helper()
	ref, err := name.ParseReference(h.host + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

func (h *hub) pushIndex(t testing.TB, repo string, index v1.ImageIndex) string {
	t.Helper()
	ref, err := name.ParseReference(h.host + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, index); err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

func newPuller(t testing.TB) *Puller {
	t.Helper()
	return &Puller{Cache: filepath.Join(t.TempDir(), "layers"), Transport: http.DefaultTransport.(*http.Transport).Clone()}
}

// shown is a tree as text, a line for each file, for cases that are about the joining alone.
func shown(t testing.TB, img *Image) string {
	t.Helper()
	nodes, err := list(img.root)
	if err != nil {
		t.Fatal(err)
	}
	lines := map[string]string{}
	for _, n := range nodes {
		for i, name := range n.names {
			what := string(n.kind)
			switch {
			case i > 0:
				what = "= " + n.names[0]
			case n.kind == tar.TypeSymlink:
				what = "-> " + n.link
			case n.kind == tar.TypeReg:
				what = fmt.Sprintf("%d bytes of layer %d", n.size, n.layer)
			case n.isDir():
				what = "dir"
			}
			lines["/"+name] = what
		}
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(lines)) {
		fmt.Fprintf(&b, "%s %s\n", name, lines[name])
	}
	return b.String()
}

// rawLayer is a layer whose bytes are these, whatever they are.
func rawLayer(b []byte) v1.Layer { return static.NewLayer(b, types.OCILayer) }
