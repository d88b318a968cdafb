package oci

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/test/ownmounts"
)

// TestFullDisk is about a tmpfs that has no room, or loses it.
func TestFullDisk(t *testing.T) {
	if !ownmounts.Inside(t) {
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	room := func(left uint64) {
		if err := ownmounts.Leave(dir, left); err != nil {
			t.Error(err) // not Fatal: a server calls it as well
		}
	}
	const plenty = 512 << 20
	cases := 0
	exhausted := func(what string, err error, says string) {
		t.Helper()
		cases++
		if !fault.Is(err, fault.Exhausted) || !strings.Contains(err.Error(), says) || !strings.Contains(fault.HintOf(err), "df -h "+dir) {
			t.Errorf("%s: %v (%s, hint %q)", what, err, fault.CodeOf(err), fault.HintOf(err))
		}
	}
	const size = 8 << 20
	h, p := newHub(t), newPuller(t)
	p.Cache = filepath.Join(dir, "layers")
	image := imageOf(t, tarOf(t, m("root/", ""), m("root/f", noise(1, size)), m("g", noise(2, size))))
	ref := h.push(t, "x:1", image)

	_, err := p.Pull(t.Context(), ref)
	exhausted("a pull, refused beforehand", err, "the disk is too full")
	for _, name := range cached(t, p) {
		if st, err := os.Stat(filepath.Join(p.Cache, name)); err != nil || st.Size() != 0 {
			t.Errorf("a pull that was refused left %v, %v", st, err)
		}
	}
	room(plenty)
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	h.front = func(w http.ResponseWriter, r *http.Request, inner http.Handler) {
		if strings.HasSuffix(r.URL.Path, "/"+digest.String()) {
			once.Do(func() { room(size) })
		}
		ranged(w, r, inner)
	}
	_, err = p.Pull(t.Context(), ref)
	exhausted("a pull while the disk fills", err, "the disk is full")
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("the cause is lost: %v", err)
	}
	room(plenty)
	var last Progress
	p.Progress = func(p Progress) { last = p }
	img := pull(t, p, ref)
	if last.Cached < size/2 {
		t.Errorf("of what was fetched before the disk was full, %d bytes were used", last.Cached)
	}

	out := filepath.Join(dir, "out")
	if err := os.Mkdir(out, 0o700); err != nil {
		t.Fatal(err)
	}
	flatten := func(what string, tool ext4.Tool, says string) {
		t.Helper()
		_, err := img.Flatten(t.Context(), tool, filepath.Join(out, "rootfs"), filepath.Join(out, "seed"), nil)
		exhausted(what, err, says)
		if left, err := os.ReadDir(out); err != nil || len(left) != 0 {
			t.Errorf("%s left %v, %v", what, left, err)
		}
	}
	mke2fs := mkfs(t)
	room(1 << 20)
	flatten("refused beforehand", mke2fs, "the disk is too full")
	// The disk fills after that was found good: what makes the filesystem leaves that much room, before or behind itself.
	filling := func(script string, left int) ext4.Tool {
		// With a source it takes no options of the mount as it is, some of which an ordinary user may not give.
		shrink := fmt.Sprintf(`mount -o remount,size=$(($(df --output=used -B1 %[1]s | tail -n 1) + %[2]d)) tmpfs %[1]s`, dir, left)
		return ext4.Tool{Argv: []string{"/bin/sh", "-ec", strings.ReplaceAll(script, "SHRINK", shrink), "mkfs", mke2fs.Argv[0]}, Version: mke2fs.Version}
	}
	for _, c := range []struct {
		what, script string
		left         int
		says         string
	}{
		{"no room for the filesystem", `SHRINK; exec "$@"`, 0, "No space left"},
		{"no room for the tree", `"$@"; SHRINK`, 0, "the disk is full"},
		{"no room for content", `"$@"; SHRINK`, size, "the disk is full"},
	} {
		room(plenty)
		flatten(c.what, filling(c.script, c.left), c.says)
	}
	room(plenty)
	if _, err := img.Flatten(t.Context(), mke2fs, filepath.Join(out, "rootfs"), filepath.Join(out, "seed"), nil); err != nil {
		t.Errorf("with room again: %v", err)
	}
	if cases != 6 {
		t.Errorf("full disk: %d cases", cases)
	}
}

// TestNeitherFilesystemIsKept that another one could not be made durable beside: the kernel may say so only then.
func TestNeitherFilesystemIsKept(t *testing.T) {
	for broken := range 2 {
		var targets []*target
		for i := range 2 {
			f, err := os.Create(filepath.Join(t.TempDir(), "file"))
			if err != nil {
				t.Fatal(err)
			}
			if i == broken {
				f.Close() // so that fsync fails
			}
			targets = append(targets, &target{file: f.Name(), f: f})
		}
		targets = append(targets, &target{file: filepath.Join(t.TempDir(), "never made")})
		if err := finish(targets, nil); !errors.Is(err, os.ErrClosed) {
			t.Errorf("file %d: %v", broken, err)
		}
		for i, target := range targets {
			if _, err := os.Stat(target.file); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("file %d could not be made durable, and file %d is kept: %v", broken, i, err)
			}
		}
	}
}
