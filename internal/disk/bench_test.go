package disk

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// BenchmarkNewDisk makes a disk of 16 GiB from a template as a create does, durable on the disk.
// Compare with BenchmarkFloor, the bare system calls in the same run.
func BenchmarkNewDisk(b *testing.B) {
	tmpl := template(b, 2*vm.GiB)
	dir := b.TempDir()
	dst := filepath.Join(dir, "work.ext4")
	b.ReportAllocs()
	var c Copied
	for b.Loop() {
		var err error
		if c, err = NewFromTemplate(ctx, tmpl, dst, 16*vm.GiB); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := Remove(dst); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(c.Bytes), "written/op")
	b.Logf("way: %s", c.Way)
}

// BenchmarkFloor copies the same data with nothing around it; with and without fsync.
func BenchmarkFloor(b *testing.B) {
	tmpl := template(b, 2*vm.GiB)
	for name, durable := range map[string]bool{"copy": false, "copy+fsync": true} {
		b.Run(name, func(b *testing.B) {
			dst := filepath.Join(b.TempDir(), "dst")
			for b.Loop() {
				in, err := os.Open(tmpl)
				if err != nil {
					b.Fatal(err)
				}
				out, err := os.Create(dst)
				if err != nil {
					b.Fatal(err)
				}
				if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) != nil {
					err = extents(in, 2*vm.GiB, func(offset, length int64) error {
						to := offset
						_, err := unix.CopyFileRange(int(in.Fd()), &offset, int(out.Fd()), &to, int(length), 0)
						return err
					})
				}
				if err == nil && durable {
					err = out.Sync()
				}
				if err != nil {
					b.Fatal(err)
				}
				in.Close()
				out.Close()
				b.StopTimer()
				os.Remove(dst)
				b.StartTimer()
			}
		})
	}
}

// BenchmarkWorkDisk makes a work disk of 8 GiB whose /root holds 1,000 files, 32 MiB together: cloned from a work seed, and made
// anew as it would have to be without one; and an empty one, as a create without a seed makes it.
func BenchmarkWorkDisk(b *testing.B) {
	tool, err := ext4.FindTool(ctx)
	if err != nil {
		b.Fatal(err)
	}
	home := b.TempDir()
	for i := range 1000 {
		content := bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 16<<10)
		if err := os.WriteFile(filepath.Join(home, fmt.Sprintf("file-%d", i)), content, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	anew := func(path string, size int64) error {
		return tool.Make(ctx, path, ext4.Format{Kind: ext4.Growing, Size: size, Label: "work", Root: home})
	}
	seed := filepath.Join(b.TempDir(), "seed.ext4")
	if err := anew(seed, 256*vm.MiB); err != nil {
		b.Fatal(err)
	}
	empty := template(b, vm.GiB)
	for _, c := range []struct {
		name string
		make func(dst string) error
	}{
		{"of a seed", func(dst string) error { _, err := NewFromTemplate(ctx, seed, dst, 8*vm.GiB); return err }},
		{"made anew", func(dst string) error {
			if err := anew(dst, 8*vm.GiB); err != nil {
				return err
			}
			f, err := os.Open(dst)
			if err != nil {
				return err
			}
			return errors.Join(f.Sync(), f.Close()) // as NewFromTemplate leaves it
		}},
		{"empty", func(dst string) error { _, err := NewFromTemplate(ctx, empty, dst, 8*vm.GiB); return err }},
	} {
		b.Run(c.name, func(b *testing.B) {
			dst := filepath.Join(b.TempDir(), "work.ext4")
			for b.Loop() {
				if err := c.make(dst); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := Remove(dst); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkContentID hashes 1 GiB: nothing but a hole, and nothing but data in the page cache.
func BenchmarkContentID(b *testing.B) {
	for name, data := range map[string]bool{"hole": false, "data": true} {
		b.Run(name, func(b *testing.B) {
			f, err := os.Create(filepath.Join(b.TempDir(), "f"))
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(vm.GiB); err != nil {
				b.Fatal(err)
			}
			if data {
				block := make([]byte, vm.MiB)
				for i := range block {
					block[i] = byte(i * 7)
				}
				for i := range int64(1024) {
					if _, err := f.WriteAt(block, i*vm.MiB); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.SetBytes(vm.GiB)
			for b.Loop() {
				if _, err := ContentID(ctx, f.Name()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
