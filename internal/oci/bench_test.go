package oci

import (
	"archive/tar"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	ocilayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// gibibyte writes an image of 1 GiB as a layout and to a registry: four layers of 5,000 files of 52 KiB, of which
// half compresses well, the least that a distribution's does.
func gibibyte(b *testing.B, h *hub) (layout, ref string) {
	b.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img = withConfig(b, img, func(*v1.ConfigFile) {})
	for l := range 4 {
		file := filepath.Join(b.TempDir(), "layer.tar")
		f, err := os.Create(file)
		if err != nil {
			b.Fatal(err)
		}
		w := tar.NewWriter(f)
		for i := range 5000 {
			content := noise(byte(l*50+i%50), 26<<10) + strings.Repeat("abcdefgh 1234567", 26<<10/16)
			if i%50 == 0 {
				if err := w.WriteHeader(m(fmt.Sprintf("usr/l%d-%d/", l, i), "").h); err != nil {
					b.Fatal(err)
				}
			}
			x := m(fmt.Sprintf("usr/l%d-%d/file-%d", l, i/50*50, i), content)
			if err := w.WriteHeader(x.h); err != nil {
				b.Fatal(err)
			}
			if _, err := io.WriteString(w, content); err != nil {
				b.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			b.Fatal(err)
		}
		if err := f.Close(); err != nil {
			b.Fatal(err)
		}
		layer, err := tarball.LayerFromFile(file, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.DefaultCompression))
		if err != nil {
			b.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			b.Fatal(err)
		}
	}
	at, err := ocilayout.Write(filepath.Join(b.TempDir(), "layout"), empty.Index)
	if err != nil {
		b.Fatal(err)
	}
	if err := at.AppendImage(img, ocilayout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "x"})); err != nil {
		b.Fatal(err)
	}
	r, err := name.ParseReference(h.host + "/big:1")
	if err != nil {
		b.Fatal(err)
	}
	if err := remote.Write(r, img); err != nil {
		b.Fatal(err)
	}
	return string(at), r.String()
}

// BenchmarkGibibyte is to be run as root, with -benchtime 1x: what a pull from a registry on this machine and the
// flattening take, with and without a cache, and what umoci takes to unpack the same image from a directory.
func BenchmarkGibibyte(b *testing.B) {
	h := newHub(b)
	layout, ref := gibibyte(b, h)
	tool := mkfs(b)
	flatten := func(b *testing.B, p *Puller, ref string) {
		img, err := p.Pull(b.Context(), ref)
		if err != nil {
			b.Fatal(err)
		}
		defer img.Close()
		dir := b.TempDir()
		if _, err := img.Flatten(b.Context(), tool, filepath.Join(dir, "rootfs"), filepath.Join(dir, "seed"), nil); err != nil {
			b.Fatal(err)
		}
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	b.Run("banger/registry", func(b *testing.B) {
		for b.Loop() {
			flatten(b, &Puller{Cache: b.TempDir(), Transport: transport}, ref)
		}
	})
	cached := &Puller{Cache: b.TempDir(), Transport: transport}
	flatten(b, cached, ref)
	b.Run("banger/cached", func(b *testing.B) {
		for b.Loop() {
			flatten(b, cached, ref)
		}
	})
	b.Run("banger/layout", func(b *testing.B) {
		for b.Loop() {
			flatten(b, cached, layout)
		}
	})
	b.Run("umoci/layout", func(b *testing.B) {
		if os.Geteuid() != 0 {
			b.Skip("umoci unpacks with owners as root only")
		}
		for b.Loop() {
			if out, err := exec.Command(umoci(b), "unpack", "--image", layout+":x", filepath.Join(b.TempDir(), "bundle")).CombinedOutput(); err != nil {
				b.Fatalf("%v\n%s", err, out)
			}
		}
	})
}
