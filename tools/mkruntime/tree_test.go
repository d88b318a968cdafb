package main

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// What is no root filesystem is refused, and an image that is there stays.
func TestTreeThatIsNone(t *testing.T) {
	o := warmCache(t, "git\n")
	dir := t.TempDir()
	o.to = write(t, filepath.Join(dir, "rootfs-void.ext4"), "what was there")
	write(t, filepath.Join(dir, stagingPrefix(o.to)+"killed", "x"), "left by a killed build")
	tree, err := io.ReadAll(packagesTar(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		in   string
		to   string
		size string
		code fault.Code
		word string
	}{
		"no tar":       {in: strings.Repeat("no tar", 1000), code: fault.Corrupt, word: "no whole tar"},
		"truncated":    {in: string(tree[:1000]), code: fault.Corrupt, word: "no whole tar"},
		"empty":        {in: "", code: fault.Invalid, word: "no root filesystem"},
		"another name": {in: string(tree), to: filepath.Join(dir, "rootfs.img"), code: fault.Invalid, word: ".ext4"},
		"no size":      {in: string(tree), size: "large", code: fault.Invalid, word: "large"},
		// The cache of this test has no tools, which is as far as a good tree comes.
		"no tools": {in: string(tree), code: fault.Corrupt, word: "mke2fs"},
		"too much": {in: string(tree), size: "1G", code: fault.Exhausted, word: "1G"},
	} {
		t.Run(name, func(t *testing.T) {
			o := o
			o.size = c.size
			if c.to != "" {
				o.to = c.to
			}
			err := makeTree(t.Context(), quiet(), o, strings.NewReader(c.in))
			if !fault.Is(err, c.code) || !strings.Contains(err.Error(), c.word) {
				t.Errorf("makeTree = %v", err)
			}
			if got := read(t, filepath.Join(dir, "rootfs-void.ext4")); got != "what was there" {
				t.Errorf("the image that was there is %q", got)
			}
			if name == "another name" || name == "no size" {
				return
			}
			nothingBeside(t, dir, "rootfs-void.ext4")
		})
	}
	if _, err := os.Stat(filepath.Join(dir, "rootfs-void.work-seed.ext4")); err == nil {
		t.Error("a seed was left")
	}
}

// A directory on which a filesystem is mounted comes twice in a tar of several trees, and is one directory in the image.
func TestMountedDirectoryComesOnce(t *testing.T) {
	var b, image, seed bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{
		{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./root/", Typeflag: tar.TypeDir, Mode: 0o700},
		{Name: "./etc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "./etc/machine-id", Typeflag: tar.TypeReg, Mode: 0o444},
		{Name: "./root/", Typeflag: tar.TypeDir, Mode: 0o700},
		{Name: "./root/note", Typeflag: tar.TypeReg, Mode: 0o600},
	} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := rewriteTar(t.Context(), &b, &image, &seed, droppedFromGuests, nil, addition{}, time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, names := members(t, &image); !slices.Equal(names, []string{"./", "./root/", "./etc/", "./root/note"}) { // fails as well if one comes twice
		t.Errorf("the image holds %q", names)
	}
	if _, names := members(t, &seed); !slices.Equal(names, []string{"./", "./note"}) {
		t.Errorf("the seed holds %q", names)
	}
}

// An image that was made by hand becomes the bundle's default one, with its list and stamp; the rest, the key too, stays.
func TestAdopt(t *testing.T) {
	o := built(t)
	key, before := keyOf(t, o.runtime), whole(t, o.runtime)
	o.to = filepath.Join(t.TempDir(), "mine.ext4")
	if err := adopt(t.Context(), quiet(), o); !fault.Is(err, fault.NotFound) {
		t.Errorf("no image: %v", err)
	}
	tool, err := ext4.FindTool(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{o.to, strings.TrimSuffix(o.to, ".ext4") + ".work-seed.ext4"} {
		write(t, o.to, "no filesystem")
		if err := adopt(t.Context(), quiet(), o); err == nil {
			t.Error("an image that is none was taken")
		}
		if err := os.RemoveAll(o.to); err != nil {
			t.Fatal(err)
		}
		if err := tool.Make(t.Context(), file, ext4.Format{Kind: ext4.Growing, Size: 256 << 20, Label: "x"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := tool.Make(t.Context(), o.to, ext4.Format{Kind: ext4.Growing, Size: 256 << 20, Label: "y"}); err != nil {
		t.Fatal(err)
	}
	write(t, o.packages, "git\nsl\n")
	if err := adopt(t.Context(), quiet(), o); err != nil {
		t.Fatal(err)
	}
	after := whole(t, o.runtime)
	for _, r := range bundle.Required() {
		changed := r == bundle.RootFS || r == bundle.WorkSeed || r == bundle.Packages
		if (after.Artifacts[r] != before.Artifacts[r]) != changed {
			t.Errorf("%s: %+v, before %+v", r, after.Artifacts[r], before.Artifacts[r])
		}
	}
	if keyOf(t, o.runtime) != key {
		t.Error("the key was replaced")
	}
	if err := makeRootfs(t.Context(), quiet(), o); err != nil { // a build would fail here
		t.Errorf("the stamp does not fit: %v", err)
	}
}
