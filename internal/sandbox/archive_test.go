package sandbox

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// TestArchivesThatLie: an archive that unpacks to more or less than it says, or to more than any disk, is refused and leaves nothing. One
// that says truly that it is large is TestImagesOnAFullDisk's.
func TestArchivesThatLie(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	root := r.read(r.rootFile("root.ext4", "x"))
	sum := sha256.Sum256([]byte(root))
	id, size := hex.EncodeToString(sum[:]), int64(len(root))
	// Zeroes that it does not tell of: 256 MiB of memory and time, if they were taken.
	more := io.LimitReader(zeroes{}, 256<<20)
	for name, c := range map[string]struct {
		says    int64     // size of the one file, by the manifest
		has     int64     // by the header in the archive
		content io.Reader // and what there is
		pad     int       // bytes more in the manifest
		window  int       // of zstd
		code    fault.Code
	}{
		"more than it says":         {says: size, has: size + 256<<20, content: io.MultiReader(strings.NewReader(root), more), code: fault.Corrupt},
		"less than it says":         {says: size + 1, has: size, content: strings.NewReader(root), code: fault.Corrupt},
		"its end is missing":        {says: size + 1, has: size + 1, content: strings.NewReader(root), code: fault.Corrupt},
		"a byte that is another":    {says: size, has: size, content: strings.NewReader("!" + root[1:]), code: fault.Corrupt},
		"more than any disk":        {says: maxArchived + 1, has: maxArchived + 1, content: strings.NewReader(root), code: fault.Corrupt},
		"less than nothing":         {says: -1, has: size, content: strings.NewReader(root), code: fault.Corrupt},
		"a manifest without an end": {says: size, has: size, content: strings.NewReader(root), pad: maxManifest, code: fault.Invalid},
		"a window as large as one":  {says: size, has: size, content: strings.NewReader(root), window: 512 << 20, code: fault.Invalid},
		"the truth":                 {says: size, has: size, content: strings.NewReader(root), window: 32 << 20},
	} {
		path := filepath.Join(r.dir, "liar.tar.zst")
		doc, err := json.Marshal(archive{Version: archiveVersion, Image: image.Image{Name: "liar", Base: id}, Files: []archiveFile{{ID: id, Size: c.says}}})
		if err != nil {
			t.Fatal(err)
		}
		lie(t, path, c.window, string(doc)+strings.Repeat(" ", c.pad), id, c.has, c.content)
		if fi, err := os.Stat(path); err != nil || fi.Size() > vm.MiB {
			t.Fatalf("%s: %v, %v", name, fi, err)
		}
		op, err := r.s.ImportImage(r.ctx(), path, "")
		if err == nil {
			op = r.wait(op, nil)
			if op.Fault != nil {
				err = op.Fault
			}
		}
		switch {
		case c.code == "":
			if err != nil || op.State != operation.Succeeded {
				t.Errorf("%s: %s, %v", name, op.State, err)
			}
			if _, err := r.s.DeleteImage(r.ctx(), "liar"); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case !fault.Is(err, c.code) || !strings.Contains(err.Error(), path):
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
		r.onlyImages("default")
		for _, left := range r.list(r.paths.Images()) {
			if strings.HasPrefix(left, ".") {
				t.Errorf("%s: left %s", name, left)
			}
		}
	}
}

// zeroes never end.
type zeroes struct{}

func (zeroes) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// lie writes an archive as it is told to, whether that fits together or not.
func lie(t *testing.T, path string, window int, manifest, id string, has int64, content io.Reader) {
	t.Helper()
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	options := []zstd.EOption{zstd.WithEncoderLevel(zstd.SpeedFastest)}
	if window != 0 {
		options = append(options, zstd.WithWindowSize(window))
	}
	z, err := zstd.NewWriter(out, options...)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	put := func(name string, size int64, r io.Reader) {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: size, Format: tar.FormatPAX}); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(w, r) // what does not fit is the lie
	}
	put(archiveManifest, int64(len(manifest)), strings.NewReader(manifest))
	put(id, has, content)
	_ = w.Flush() // likewise
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
}
