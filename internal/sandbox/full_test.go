package sandbox

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/test/ownmounts"
)

// leave changes a tmpfs to one on which so many bytes can still be written.
func leave(t *testing.T, dir string, bytes uint64) {
	t.Helper()
	if err := ownmounts.Leave(dir, bytes); err != nil {
		t.Fatal(err)
	}
}

// noise is what does not compress.
func noise(n int) string {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{}).Read(b) // never fails
	return string(b)
}

// saved is an image as docker save writes it, with one file besides an init.
func (r *rig) saved(name, content string) string {
	r.t.Helper()
	pack := func(files ...[2]string) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range files {
			if err := errors.Join(w.WriteHeader(&tar.Header{Name: f[0], Mode: 0o755, Size: int64(len(f[1]))}), second(io.WriteString(w, f[1]))); err != nil {
				r.t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			r.t.Fatal(err)
		}
		return b.Bytes()
	}
	layer := pack([2]string{"sbin/init", "#!/bin/sh\n"}, [2]string{"content", content})
	config := fmt.Sprintf(`{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, sha256.Sum256(layer))
	return r.file(name, string(pack([2]string{"config.json", config}, [2]string{"layer.tar", string(layer)},
		[2]string{"manifest.json", `[{"Config":"config.json","RepoTags":["mine:1"],"Layers":["layer.tar"]}]`})))
}

// packed writes an exported image whose root filesystem is this content, whether it is one or not.
func (r *rig) packed(name, content string) string {
	r.t.Helper()
	sum := sha256.Sum256([]byte(content))
	id := hex.EncodeToString(sum[:])
	out, err := os.Create(filepath.Join(r.dir, name))
	if err != nil {
		r.t.Fatal(err)
	}
	defer out.Close()
	a := archive{Version: archiveVersion, Image: image.Image{Name: "packed", Base: id}, Files: []archiveFile{{ID: id, Size: int64(len(content))}}}
	if err := a.write(r.ctx(), out, []string{r.file(name+".content", content)}, func(string, int64, int64) {}); err != nil {
		r.t.Fatal(err)
	}
	return out.Name()
}

// TestImagesOnAFullDisk: no way by which an image comes fills the disk up, and one that finds it full leaves nothing. An image
// still goes out to another disk.
func TestImagesOnAFullDisk(t *testing.T) {
	if !ownmounts.Inside(t) {
		return
	}
	r := newBuilder(t)
	r.register(RegisterRequest{Name: "large", Rootfs: r.rootFile("large.ext4", noise(1<<20)+"x")})
	exported := filepath.Join(r.dir, "base.tar.zst")
	r.done(r.s.ExportImage(r.ctx(), "base", exported))
	bomb := r.packed("bomb.tar.zst", strings.Repeat("bomb", 24<<20)) // 96 MiB
	if fi, err := os.Stat(bomb); err != nil || fi.Size() > vm.MiB {
		t.Fatalf("the bomb: %v, %v", fi, err)
	}
	root, container := r.rootFile("root.ext4", noise(1<<20)), r.saved("saved.tar", noise(1<<20))
	// The daemon of an installation whose state lies on a disk of its own.
	r.stop()
	if err := os.Rename(r.paths.State, r.paths.State+".moved"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(r.paths.State, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", r.paths.State, "tmpfs", 0, "size=1g,mode=0700"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(r.paths.State, unix.MNT_DETACH)
	if err := copyTree(r.paths.State+".moved", r.paths.State); err != nil {
		t.Fatal(err)
	}
	if err := r.open(); err != nil {
		t.Fatal(err)
	}
	defer r.stop()
	r.settled()

	const reserve = 256 << 20 // disk.ReserveBytes
	begin := map[string]func() (operation.Operation, error){
		"register": func() (operation.Operation, error) {
			return r.s.RegisterImage(r.ctx(), RegisterRequest{Name: "mine", Rootfs: root})
		},
		"import": func() (operation.Operation, error) { return r.s.ImportImage(r.ctx(), exported, "mine") },
		"pull": func() (operation.Operation, error) {
			return r.s.PullImage(r.ctx(), "docker-archive:"+container, "mine")
		},
		"build": func() (operation.Operation, error) {
			op, log, err := r.s.BuildImage(r.ctx(), BuildRequest{Name: "mine", From: "base"})
			if err != nil && log != "" {
				t.Errorf("a build that did not begin has the log %s", log)
			}
			return op, err
		},
	}
	clean := func(what string) {
		t.Helper()
		r.onlyImages("base", "default", "large")
		for _, name := range r.list(r.paths.Images()) {
			if strings.HasPrefix(name, ".") {
				t.Errorf("%s left %s", what, name)
			}
		}
		r.nothing()
	}
	leave(t, r.paths.State, reserve/2)
	for what, do := range begin {
		op, err := do()
		if what == "build" {
			wants(t, what, err, fault.Exhausted, r.paths.State, "df -h")
		} else {
			ended(t, r.wait(op, err), operation.Failed, fault.Exhausted, r.paths.State, "df -h")
		}
		clean(what)
	}
	// What is small as an archive is found out on the way.
	leave(t, r.paths.State, reserve+32<<20)
	op := r.wait(r.s.ImportImage(r.ctx(), bomb, "mine"))
	ended(t, op, operation.Failed, fault.Exhausted, r.paths.State, "df -h")
	clean("the bomb")

	// Others may be faster: the kernel has the last word.
	leave(t, r.paths.State, 0)
	sum := sha256.Sum256([]byte(noise(1 << 20)))
	err := unpackSparse(filepath.Join(r.paths.State, "unpacked"), strings.NewReader(noise(1<<20)), archiveFile{ID: hex.EncodeToString(sum[:]), Size: 1 << 20}, r.paths.State)
	wants(t, "unpack", err, fault.Exhausted, "the disk is full", "df -h "+r.paths.State)
	if err := os.Remove(filepath.Join(r.paths.State, "unpacked")); err != nil {
		t.Fatal(err)
	}
	leave(t, r.paths.State, 8<<20)

	out := filepath.Join(r.dir, "out")
	if err := errors.Join(os.Mkdir(out, 0o700), unix.Mount("tmpfs", out, "tmpfs", 0, "size=4k")); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(out, unix.MNT_DETACH)
	to := filepath.Join(out, "large.tar.zst")
	ended(t, r.wait(r.s.ExportImage(r.ctx(), "large", to)), operation.Failed, fault.Exhausted, to, "df -h "+out)
	if left := r.list(out); len(left) != 0 {
		t.Errorf("an export left %v", left)
	}
	leave(t, out, 16<<20)
	r.done(r.s.ExportImage(r.ctx(), "large", to))

	// With room all of them succeed.
	leave(t, r.paths.State, 900<<20)
	for what, do := range begin {
		r.done(do())
		r.onlyImages("base", "default", "large", "mine")
		if _, err := r.s.DeleteImage(r.ctx(), "mine"); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	clean("the end")
}
