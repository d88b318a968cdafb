package disk

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

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
