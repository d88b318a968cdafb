package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/test/ownmounts"
)

// An ordinary user's PATH on Debian lacks the directories of debugfs and its kin.
func TestMain(m *testing.M) {
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

var ctx = context.Background()

// withFiclone replaces the ioctl for one test.
func withFiclone(t testing.TB, f func(dst, src int) error) {
	old := ficlone
	ficlone = f
	t.Cleanup(func() { ficlone = old })
}

func noReflink(int, int) error { return unix.EOPNOTSUPP }

// sparse makes a file of size bytes with some data in it and returns its whole content.
func sparse(t testing.TB, path string, size int64, seed uint64) []byte {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	content := make([]byte, size)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for range 1 + r.IntN(6) {
		offset := r.Int64N(size)
		length := min(size-offset, 1+r.Int64N(70_000))
		for i := range length {
			content[offset+i] = byte(r.Uint32())
		}
		if _, err := f.WriteAt(content[offset:offset+length], offset); err != nil {
			t.Fatal(err)
		}
	}
	return content
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func names(t testing.TB, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var n []string
	for _, e := range entries {
		n = append(n, e.Name())
	}
	return strings.Join(n, " ")
}

func allocated(t testing.TB, path string) int64 {
	t.Helper()
	n, err := Allocated(path)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestCopyKeepsContentAndHoles(t *testing.T) {
	withFiclone(t, noReflink)
	for seed := range uint64(30) {
		dir := t.TempDir()
		src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
		size := 1 + rand.New(rand.NewPCG(seed, 2)).Int64N(9<<20) // not only whole blocks
		want := sparse(t, src, size, seed)
		c, err := Clone(ctx, src, dst)
		if err != nil || c.Way != Copy {
			t.Fatal(c, err)
		}
		got, err := os.ReadFile(dst)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("seed %d: content differs, %v", seed, err)
		}
		if a, b := allocated(t, src), allocated(t, dst); b > a+8192 || c.Bytes > a {
			t.Errorf("seed %d: source takes %d, copy %d, %d bytes were written", seed, a, b, c.Bytes)
		}
		if fi, _ := os.Stat(dst); fi.Mode().Perm() != 0o600 {
			t.Errorf("mode is %v", fi.Mode())
		}
		if n := names(t, dir); n != "dst src" {
			t.Errorf("left behind: %s", n)
		}
	}
}

func TestCopyWithoutCopyFileRange(t *testing.T) {
	// /proc answers copy_file_range with 0 bytes or EINVAL, and knows no holes: the plain path.
	withFiclone(t, noReflink)
	in, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if n, err := sparseCopy(ctx, in, out, 100, func(int64) {}); err != nil || n != 100 {
		t.Fatal(n, err)
	}
	if b, _ := os.ReadFile(out.Name()); len(b) != 100 || !bytes.HasPrefix(b, []byte("Name:")) {
		t.Errorf("%q", b)
	}
	if _, err := sparseCopy(ctx, in, out, 1<<20, func(int64) {}); !fault.Is(err, fault.Busy) {
		t.Errorf("a source that is shorter than it said: %v", err)
	}
}

func TestReflinkIsPreferredAndFallsBack(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	write(t, src, "hello")
	withFiclone(t, func(dst, _ int) error { _, err := unix.Pwrite(dst, []byte("hello"), 0); return err })
	if c, err := Clone(ctx, src, filepath.Join(dir, "a")); err != nil || c != (Copied{Way: Reflink}) {
		t.Errorf("%+v, %v", c, err)
	}
	for _, e := range []error{unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL, unix.ENOTTY, unix.ENOSYS, unix.EPERM} {
		ficlone = func(int, int) error { return e }
		dst := filepath.Join(dir, "b")
		if c, err := Clone(ctx, src, dst); err != nil || c != (Copied{Copy, 5}) {
			t.Errorf("%v: %+v, %v", e, c, err)
		}
		if err := Remove(dst); err != nil {
			t.Error(err)
		}
	}
	ficlone = func(int, int) error { return unix.EIO }
	if _, err := Clone(ctx, src, filepath.Join(dir, "c")); !errors.Is(err, unix.EIO) {
		t.Errorf("a real error was hidden: %v", err)
	}
	ficlone = func(int, int) error { return unix.ENOSPC }
	if _, err := Clone(ctx, src, filepath.Join(dir, "c")); !fault.Is(err, fault.Exhausted) {
		t.Errorf("full: %v", err)
	}
	if n := names(t, dir); n != "a src" {
		t.Errorf("left behind: %s", n)
	}
}

func TestCloneRefuses(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	if _, err := Clone(ctx, src, dst); !fault.Is(err, fault.NotFound) {
		t.Errorf("no source: %v", err)
	}
	if _, err := Clone(ctx, dir, dst); !fault.Is(err, fault.Precondition) {
		t.Errorf("a directory: %v", err)
	}
	write(t, src, "new")
	write(t, dst, "precious")
	if _, err := Clone(ctx, src, dst); !fault.Is(err, fault.Exists) {
		t.Errorf("existing target: %v", err)
	}
	if b, _ := os.ReadFile(dst); string(b) != "precious" {
		t.Errorf("an existing disk was changed: %q", b)
	}
	if _, err := Clone(ctx, src, filepath.Join(dir, "no", "dst")); !fault.Is(err, fault.NotFound) {
		t.Errorf("no directory: %v", err)
	}
	if n := names(t, dir); n != "dst src" {
		t.Errorf("left behind: %s", n)
	}
}

// A target that appears during the copy is not replaced either.
func TestPublishNeverReplaces(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	write(t, src, "new")
	withFiclone(t, func(int, int) error { write(t, dst, "precious"); return unix.EOPNOTSUPP })
	if _, err := Clone(ctx, src, dst); !fault.Is(err, fault.Exists) {
		t.Errorf("%v", err)
	}
	if b, _ := os.ReadFile(dst); string(b) != "precious" || names(t, dir) != "dst src" {
		t.Errorf("%q, %s", b, names(t, dir))
	}
}

func TestCancelledCloneLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	sparse(t, src, 1<<20, 1)
	c, cancel := context.WithCancelCause(ctx)
	why := errors.New("the user went away")
	withFiclone(t, func(int, int) error { cancel(why); return unix.EOPNOTSUPP })
	if _, err := Clone(c, src, filepath.Join(dir, "dst")); !errors.Is(err, why) {
		t.Errorf("%v", err)
	}
	if n := names(t, dir); n != "src" {
		t.Errorf("left behind: %s", n)
	}
}

func TestSourceThatChangesIsNoticed(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	write(t, src, strings.Repeat("old", 10_000))
	withFiclone(t, func(int, int) error {
		f, err := os.OpenFile(src, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte("new"), 0); err != nil {
			return err
		}
		return unix.EOPNOTSUPP
	})
	if _, err := Capture(ctx, src, filepath.Join(dir, "images"), ""); !fault.Is(err, fault.Busy) || !strings.Contains(err.Error(), src) {
		t.Errorf("%v", err)
	}
	if n := names(t, filepath.Join(dir, "images")); n != "" {
		t.Errorf("left behind: %s", n)
	}
}

func TestSourceThatShrinksIsNoticed(t *testing.T) {
	withFiclone(t, noReflink)
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	write(t, src, strings.Repeat("x", 100_000))
	shrink := func() {
		if err := os.Truncate(src, 10); err != nil {
			t.Error(err)
		}
	}
	if _, err := Clone(actingContext{ctx, shrink}, src, filepath.Join(dir, "dst")); !fault.Is(err, fault.Busy) {
		t.Errorf("%v", err)
	}
	if n := names(t, dir); n != "src" {
		t.Errorf("left behind: %s", n)
	}
}

func TestCapture(t *testing.T) {
	dir := t.TempDir()
	src, images := filepath.Join(dir, "src"), filepath.Join(dir, "state", "images")
	sum := sha256.Sum256(sparse(t, src, 5<<20+123, 7))
	id := hex.EncodeToString(sum[:])
	c, err := Capture(ctx, src, images, id)
	if err != nil || c.ID != id || c.Path != filepath.Join(images, id) || c.Size != 5<<20+123 || c.Way == Present {
		t.Fatalf("%+v, %v", c, err)
	}
	if fi, err := os.Stat(c.Path); err != nil || fi.Mode().Perm() != 0o400 {
		t.Errorf("%v, %v", fi, err)
	}
	if got, err := ContentID(ctx, c.Path); err != nil || got != id {
		t.Errorf("captured as %s, %v", got, err)
	}
	for _, want := range []string{"", id} {
		if again, err := Capture(ctx, src, images, want); err != nil || again.Way != Present || again.ID != id || again.Path != c.Path {
			t.Errorf("again: %+v, %v", again, err)
		}
	}
	// The source is overwritten, as a rebuilt bundle does: what was captured stays.
	write(t, src, "something else")
	if got, err := ContentID(ctx, c.Path); err != nil || got != id {
		t.Errorf("the captured file changed with its source: %s, %v", got, err)
	}
	_, err = Capture(ctx, src, images, id)
	if !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), src) || !strings.Contains(fault.HintOf(err), "make runtime") {
		t.Errorf("damaged source: %v", err)
	}
	if n := names(t, images); n != id {
		t.Errorf("there is %s", n)
	}
}

func TestConcurrentCapturesAgree(t *testing.T) {
	dir := t.TempDir()
	src, images := filepath.Join(dir, "src"), filepath.Join(dir, "images")
	sparse(t, src, 1<<20, 3)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := Capture(ctx, src, images, ""); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := names(t, images); strings.Contains(n, " ") || n == "" {
		t.Errorf("there is %q", n)
	}
}

func TestFingerprintFollowsContent(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	write(t, src, "one")
	a, err := Fingerprint(src)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := Fingerprint(src); b != a {
		t.Errorf("%s, then %s", a, b)
	}
	if err := os.Rename(src, src+"2"); err != nil {
		t.Fatal(err)
	}
	write(t, src, "two") // same size
	if b, _ := Fingerprint(src); b == a {
		t.Error("another file has the same fingerprint")
	}
}

func TestSweepTakesOnlyWhatNobodyWorksOn(t *testing.T) {
	dir := t.TempDir()
	working, err := newTemp(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer working.discard()
	write(t, filepath.Join(dir, tempPrefix+"crashed"), "half")
	write(t, filepath.Join(dir, "work.ext4"), "precious")
	swept, err := Sweep(dir)
	if err != nil || len(swept) != 1 || filepath.Base(swept[0]) != tempPrefix+"crashed" {
		t.Errorf("%q, %v", swept, err)
	}
	if n := names(t, dir); n != filepath.Base(working.Name())+" work.ext4" {
		t.Errorf("there is %s", n)
	}
	if swept, err := Sweep(filepath.Join(dir, "absent")); err != nil || swept != nil {
		t.Errorf("absent directory: %q, %v", swept, err)
	}
}

func TestTemplates(t *testing.T) {
	ts := Templates{Dir: filepath.Join(t.TempDir(), "templates")}
	if _, err := ts.Best("banger-work", vm.GiB); !fault.Is(err, fault.NotFound) || fault.HintOf(err) == "" {
		t.Errorf("none yet: %v", err)
	}
	paths := make([]string, 6)
	var wg sync.WaitGroup
	for i := range paths {
		wg.Go(func() {
			var err error
			if paths[i], err = ts.Ensure(ctx, "banger-work", vm.GiB); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, p := range paths {
		if p != paths[0] {
			t.Errorf("%s and %s for one recipe", p, paths[0])
		}
	}
	small, err := ts.Ensure(ctx, "banger-work", vm.MinDiskBytes)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ts.Ensure(ctx, "banger-system", 4*vm.GiB); err != nil {
		t.Fatal(err)
	}
	for size, want := range map[int64]string{vm.MinDiskBytes: small, vm.GiB - vm.MiB: small, vm.GiB: paths[0], 8 * vm.GiB: paths[0]} {
		if got, err := ts.Best("banger-work", size); err != nil || got != want {
			t.Errorf("for %s: %s, %v", vm.FormatSize(size), got, err)
		}
	}
	if n := strings.Fields(names(t, ts.Dir)); len(n) != 3 {
		t.Errorf("there is %q", n)
	}
	// A damaged template is not used, and is made again.
	if err := os.Chmod(small, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(small, 1000); err != nil {
		t.Fatal(err)
	}
	if _, err := ts.Best("banger-work", vm.MinDiskBytes); !fault.Is(err, fault.NotFound) {
		t.Errorf("damaged: %v", err)
	}
	if again, err := ts.Ensure(ctx, "banger-work", vm.MinDiskBytes); err != nil || again != small || !sound(small, vm.MinDiskBytes) {
		t.Errorf("not made again: %s, %v", again, err)
	}
	for _, size := range []int64{0, -1, vm.MiB, vm.MaxDiskBytes + vm.MiB} {
		if _, err := ts.Ensure(ctx, "x", size); !fault.Is(err, fault.Invalid) {
			t.Errorf("%d: %v", size, err)
		}
	}
}

func TestLimitsAreTheFilesystems(t *testing.T) {
	if vm.MaxDiskBytes != ext4.MaxGrowBytes || vm.MinDiskBytes < ext4.MinGrowBytes {
		t.Errorf("vm says %d to %d, ext4 %d to %d", vm.MinDiskBytes, vm.MaxDiskBytes, ext4.MinGrowBytes, ext4.MaxGrowBytes)
	}
}

func template(t testing.TB, size int64) string {
	t.Helper()
	p, err := Templates{Dir: t.TempDir()}.Ensure(ctx, "banger-work", size)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestNewFromTemplate(t *testing.T) {
	tmpl := template(t, vm.GiB)
	dir := t.TempDir()
	dst := filepath.Join(dir, "work.ext4")
	if _, err := NewFromTemplate(ctx, tmpl, dst, vm.GiB-vm.MiB); !fault.Is(err, fault.Invalid) || !strings.Contains(fault.HintOf(err), "at least 1G") {
		t.Errorf("too small: %v, %s", err, fault.HintOf(err))
	}
	if _, err := NewFromTemplate(ctx, tmpl, dst, 3*vm.TiB); !fault.Is(err, fault.Invalid) {
		t.Errorf("too large: %v", err)
	}
	if n := names(t, dir); n != "" {
		t.Errorf("a refusal left %s", n)
	}
	c, err := NewFromTemplate(ctx, tmpl, dst, 64*vm.GiB)
	if err != nil || c.Way == Present {
		t.Fatal(c, err)
	}
	fi, err := os.Stat(dst)
	if err != nil || fi.Size() != 64*vm.GiB || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	if n := allocated(t, dst); n > 2<<20 {
		t.Errorf("a fresh disk takes %d bytes", n)
	}
	if s, err := Inspect(dst); err != nil || s.Bytes() != vm.GiB || !s.Clean() || s.GrowLimit < 64*vm.GiB {
		t.Errorf("%+v, %v", s, err)
	}
	// The user's data survives a repeated step, whatever is asked.
	f, err := os.OpenFile(dst, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("precious"), 5*vm.GiB); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	before, err := Fingerprint(dst)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := NewFromTemplate(ctx, tmpl, dst, 64*vm.GiB); err != nil || c.Way != Present {
		t.Errorf("again: %+v, %v", c, err)
	}
	if _, err := NewFromTemplate(ctx, tmpl, dst, 32*vm.GiB); !fault.Is(err, fault.Exists) {
		t.Errorf("another size: %v", err)
	}
	if after, _ := Fingerprint(dst); after != before {
		t.Error("the disk was touched")
	}
}

func TestNewFromBadTemplate(t *testing.T) {
	dir := t.TempDir()
	dst := filepath.Join(dir, "dst")
	garbage := filepath.Join(dir, "garbage")
	write(t, garbage, strings.Repeat("x", 5000))
	if _, err := NewFromTemplate(ctx, garbage, dst, vm.GiB); !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), garbage) {
		t.Errorf("no filesystem: %v", err)
	}
	if _, err := NewFromTemplate(ctx, filepath.Join(dir, "absent"), dst, vm.GiB); !fault.Is(err, fault.NotFound) {
		t.Errorf("absent: %v", err)
	}
	cut := filepath.Join(dir, "cut")
	if _, err := Clone(ctx, template(t, vm.GiB), cut); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(cut, 100<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := NewFromTemplate(ctx, cut, dst, vm.GiB); !fault.Is(err, fault.Corrupt) {
		t.Errorf("cut off: %v", err)
	}
}

func TestGrow(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if _, err := NewFromTemplate(ctx, template(t, vm.GiB), disk, 4*vm.GiB); err != nil {
		t.Fatal(err)
	}
	taken := allocated(t, disk)
	for _, size := range []int64{4 * vm.GiB, 10 * vm.GiB, 10 * vm.GiB} {
		if err := Grow(disk, size); err != nil {
			t.Fatal(err)
		}
		if fi, _ := os.Stat(disk); fi.Size() != size {
			t.Errorf("size is %d", fi.Size())
		}
	}
	if n := allocated(t, disk); n > taken+4096 {
		t.Errorf("growing took %d bytes", n-taken)
	}
	for size, code := range map[int64]fault.Code{4 * vm.GiB: fault.Invalid, 0: fault.Invalid, -1: fault.Invalid, 3 * vm.TiB: fault.Invalid} {
		err := Grow(disk, size)
		if !fault.Is(err, code) || fault.HintOf(err) == "" {
			t.Errorf("%d: %v", size, err)
		}
		if size == 4*vm.GiB && !strings.Contains(err.Error(), "is 10G already") {
			t.Errorf("the present size is not named: %v", err)
		}
	}
	if fi, _ := os.Stat(disk); fi.Size() != 10*vm.GiB {
		t.Errorf("a refusal changed the size to %d", fi.Size())
	}
	if err := Grow(filepath.Join(dir, "absent"), vm.GiB); !fault.Is(err, fault.NotFound) {
		t.Errorf("absent: %v", err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(disk, link); err != nil {
		t.Fatal(err)
	}
	if err := Grow(link, 20*vm.GiB); !fault.Is(err, fault.Precondition) {
		t.Errorf("link: %v", err)
	}
}

func TestGrowAll(t *testing.T) {
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "two")
	for _, path := range []string{one, two} {
		if _, err := NewFromTemplate(ctx, template(t, vm.GiB), path, 4*vm.GiB); err != nil {
			t.Fatal(err)
		}
	}
	sizes := func(a, b int64) {
		t.Helper()
		for path, want := range map[string]int64{one: a, two: b} {
			if fi, err := os.Stat(path); err != nil || fi.Size() != want {
				t.Errorf("%s: %v, %v, want %d", path, fi, err, want)
			}
		}
	}
	for path, size := range map[string]int64{two: 3 * vm.TiB, filepath.Join(dir, "absent"): vm.GiB} {
		if err := CheckGrow(path, size); err == nil {
			t.Errorf("%s could grow to %d", path, size)
		}
		if err := GrowAll(Growth{one, 8 * vm.GiB}, Growth{path, size}); err == nil {
			t.Errorf("%s grew to %d", path, size)
		}
		sizes(4*vm.GiB, 4*vm.GiB)
	}
	if err := GrowAll(Growth{one, 8 * vm.GiB}, Growth{two, 4 * vm.GiB}); err != nil {
		t.Error(err)
	}
	sizes(8*vm.GiB, 4*vm.GiB)
	if err := CheckGrow(one, 9*vm.GiB); err != nil {
		t.Error(err)
	}
	sizes(8*vm.GiB, 4*vm.GiB)
	if err := GrowAll(); err != nil {
		t.Error(err)
	}
}

// The states as a mount leaves them: debugfs sets what the kernel sets.
func TestFilesystemState(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if _, err := NewFromTemplate(ctx, template(t, vm.GiB), disk, vm.GiB); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		command string
		want    State
	}{{"", Clean}, {"feature needs_recovery", Dirty}, {"feature -needs_recovery", Clean}, {"ssv state 0", Dirty}, {"ssv state 3", Errored}} {
		if c.command != "" {
			if out, err := exec.Command("debugfs", "-w", "-R", c.command, disk).CombinedOutput(); err != nil {
				t.Fatalf("%v %s", err, out)
			}
		}
		if got, err := FilesystemState(disk); err != nil || got != c.want {
			t.Errorf("after %q: %s, %v; want %s", c.command, got, err, c.want)
		}
	}
	if _, err := FilesystemState("/dev/null"); !fault.Is(err, fault.Corrupt) {
		t.Errorf("no filesystem: %v", err)
	}
}

func TestRemoveAndRoom(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "disk")
	write(t, p, "x")
	for range 2 {
		if err := Remove(p); err != nil {
			t.Error(err)
		}
	}
	if err := Remove(dir); !fault.Is(err, fault.Precondition) {
		t.Errorf("a directory: %v", err)
	}
	free, err := Free(filepath.Join(dir, "not", "there"))
	if err != nil || free <= 0 {
		t.Fatal(free, err)
	}
	if err := CheckRoom(dir, 0); err != nil {
		t.Errorf("this machine's disk is full: %v", err)
	}
	err = CheckRoom(dir, free)
	if !fault.Is(err, fault.Exhausted) || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "are needed") || fault.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
}

// actingContext does something at the moment a copy begins.
type actingContext struct {
	context.Context
	act func()
}

func (c actingContext) Err() error { c.act(); return nil }

// TestFullDisk is about a small tmpfs that fills up.
func TestFullDisk(t *testing.T) {
	if !ownmounts.Inside(t) {
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	src := filepath.Join(t.TempDir(), "src")
	write(t, src, strings.Repeat("data", 2<<20)) // 8 MiB
	tmpl := template(t, vm.GiB)
	images := filepath.Join(dir, "images")
	fill := func() {
		err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 5<<20), 0o600)
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("the disk is not full: %v", err)
		}
	}
	cases := 0
	exhaustedAndClean := func(what string, err error, left string) {
		t.Helper()
		cases++
		if !fault.Is(err, fault.Exhausted) || !strings.Contains(err.Error(), dir) || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", what, err)
		}
		if n := names(t, dir); n != left {
			t.Errorf("%s left %s", what, n)
		}
	}
	_, err := Clone(ctx, src, filepath.Join(dir, "dst"))
	exhaustedAndClean("clone, refused beforehand", err, "")
	if errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "8M are needed, 4M are free") {
		t.Errorf("the disk was filled first: %v", err)
	}
	_, err = Capture(ctx, src, images, "")
	exhaustedAndClean("capture", err, "images")
	if n := names(t, images); n != "" {
		t.Errorf("capture left %s", n)
	}
	exhaustedAndClean("check", CheckRoom(dir, 0), "images") // 4 MiB are less than the reserve
	// Room that vanishes during the copy: the kernel says so.
	small := filepath.Join(t.TempDir(), "small")
	write(t, small, "x")
	_, err = Clone(actingContext{ctx, fill}, small, filepath.Join(dir, "dst"))
	exhaustedAndClean("clone while the disk fills", err, "filler images")
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("the cause is lost: %v", err)
	}
	_, err = NewFromTemplate(ctx, tmpl, filepath.Join(dir, "work.ext4"), 2*vm.GiB)
	exhaustedAndClean("new disk", err, "filler images")
	_, err = Templates{Dir: dir}.Ensure(ctx, "banger-work", vm.GiB)
	exhaustedAndClean("template", err, "filler images")
	if cases != 6 {
		t.Errorf("full disk: %d cases", cases)
	}
}

func TestErrorsKeepTheirCause(t *testing.T) {
	_, err := Allocated("/nonexistent")
	if !fault.Is(err, fault.NotFound) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}
