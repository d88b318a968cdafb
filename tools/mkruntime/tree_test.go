package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
