package ext4

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// An ordinary user's PATH on Debian lacks the directories of debugfs and its kin.
func TestMain(m *testing.M) {
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

func tool(t testing.TB) Tool {
	t.Helper()
	tl, err := FindTool(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return tl
}

func make1(t testing.TB, f Format) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "fs.ext4")
	if err := tool(t).Make(context.Background(), p, f); err != nil {
		t.Fatal(err)
	}
	return p
}

func read(t testing.TB, path string) Superblock {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := ReadSuperblock(f, path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func fsck(t testing.TB, path string) {
	t.Helper()
	if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
}

func TestMakeGivesAGrowableCleanFilesystemOfTheAskedSize(t *testing.T) {
	for _, size := range []int64{MinGrowBytes, 1 << 30, 16 << 30} {
		p := make1(t, Format{Size: size, Label: "banger-work", Kind: Growing})
		s := read(t, p)
		if s.Bytes() != size || !s.Clean() || s.Label != "banger-work" || !s.Journal || s.BlockSize != BlockSize {
			t.Errorf("size %d: got %+v", size, s)
		}
		if s.GrowLimit < MaxGrowBytes {
			t.Errorf("size %d: grows to %d, promised %d", size, s.GrowLimit, MaxGrowBytes)
		}
		fsck(t, p)
		fi, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != 0o600 || fi.Size() != size {
			t.Errorf("file is %v, %d bytes", fi.Mode(), fi.Size())
		}
		if got := fi.Sys().(*syscall.Stat_t).Blocks * 512; got > 2<<20 {
			t.Errorf("size %d: %d bytes are allocated; every clone on a host without reflinks writes them", size, got)
		}
	}
}

// The superblock fields must agree with those that e2fsprogs reads.
func TestSuperblockAgreesWithDumpe2fs(t *testing.T) {
	p := make1(t, Format{Size: 1 << 30, Label: "x", Kind: Growing})
	s := read(t, p)
	out, err := exec.Command("dumpe2fs", "-h", p).Output()
	if err != nil {
		t.Fatal(err)
	}
	for field, want := range map[string]int64{"Block count": s.Blocks, "Free blocks": s.FreeBlocks, "Inode count": s.Inodes,
		"Free inodes": s.FreeInodes, "Block size": s.BlockSize} {
		if !fieldIs(string(out), field, want) {
			t.Errorf("%s: ours is %d, dumpe2fs says otherwise:\n%s", field, want, out)
		}
	}
	if !strings.Contains(string(out), s.UUID) {
		t.Errorf("uuid %s is not dumpe2fs's", s.UUID)
	}
}

func fieldIs(out, field string, want int64) bool {
	for line := range strings.Lines(out) {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.TrimSpace(v) == strconv.FormatInt(want, 10)
		}
	}
	return false
}

func TestSameRecipeSameBytes(t *testing.T) {
	a := Format{Size: MinGrowBytes, Label: "a", Kind: Growing}
	b := Format{Size: MinGrowBytes, Label: "b", Kind: Growing}
	first := make1(t, a)
	if out, err := exec.Command("cmp", first, make1(t, a)).CombinedOutput(); err != nil {
		t.Errorf("two runs of one recipe differ: %v %s", err, out)
	}
	tl := tool(t)
	if exec.Command("cmp", "-s", first, make1(t, b)).Run() == nil || a.Key(tl) == b.Key(tl) || a.uuid() == b.uuid() {
		t.Error("two recipes give the same filesystem")
	}
}

func TestReadOnlyFilesystemWithContent(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "hello"), []byte("hi\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	p := make1(t, Format{Size: 32 << 20, Kind: ReadOnly, Label: "modules", Root: root})
	if s := read(t, p); s.Journal || s.GrowLimit != s.Bytes() {
		t.Errorf("a read-only filesystem has a journal or spare room: %+v", s)
	}
	out, err := exec.Command("debugfs", "-R", "cat /hello", p).Output()
	if err != nil || string(out) != "hi\n" {
		t.Errorf("content is %q, %v", out, err)
	}
	fsck(t, p)
}

// Flip what the kernel flips when it mounts, and repair the checksum as it does.
func TestStates(t *testing.T) {
	p := make1(t, Format{Size: MinGrowBytes, Label: "x", Kind: Growing})
	img, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	raw := make([]byte, 4096)
	if _, err := io.ReadFull(img, raw); err != nil {
		t.Fatal(err)
	}
	change := func(off int, bits uint32) []byte {
		b := bytes.Clone(raw)
		sb := b[1024:]
		binary.LittleEndian.PutUint32(sb[off:], binary.LittleEndian.Uint32(sb[off:])^bits)
		binary.LittleEndian.PutUint32(sb[0x3FC:], slowChecksum(sb))
		return b
	}
	for name, c := range map[string]struct {
		img  []byte
		want bool
	}{
		"as made":          {raw, true},
		"needs recovery":   {change(0x60, incompatRecover), false},
		"orphan inode":     {change(0xE8, 7), false},
		"valid bit absent": {change(0x38, stateValid<<16), false},
		"errors recorded":  {change(0x38, stateErrors<<16), false},
	} {
		s, err := ReadSuperblock(bytes.NewReader(c.img), "x")
		if err != nil || s.Clean() != c.want {
			t.Errorf("%s: %v, %v; want %v", name, s.Clean(), err, c.want)
		}
	}
	for name, img := range map[string][]byte{
		"short":      raw[:1500],
		"no magic":   make([]byte, 4096),
		"bad sum":    func() []byte { b := bytes.Clone(raw); b[1024]++; return b }(),
		"block size": change(0x18, 0xff),
		"huge":       change(0x150, 0xffffffff),
	} {
		if _, err := ReadSuperblock(bytes.NewReader(img), "x"); !fault.Is(err, fault.Corrupt) {
			t.Errorf("%s: %v, want corrupt", name, err)
		}
	}
}

func slowChecksum(sb []byte) uint32 {
	crc := uint32(0xffffffff) // bit by bit, so that the test does not share the table with the code
	for _, c := range sb[:0x3FC] {
		crc ^= uint32(c)
		for range 8 {
			if crc&1 != 0 {
				crc = crc>>1 ^ 0x82F63B78
			} else {
				crc >>= 1
			}
		}
	}
	return crc
}

func FuzzReadSuperblock(f *testing.F) {
	f.Add(make([]byte, 2048))
	seed := make([]byte, 2048)
	binary.LittleEndian.PutUint16(seed[1024+0x38:], 0xEF53)
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ReadSuperblock(bytes.NewReader(b), "x")
		if err == nil && (s.Bytes() < 0 || s.GrowLimit < s.Bytes()) {
			t.Errorf("impossible sizes: %+v", s)
		}
	})
}

func TestMakeRefusesAndLeavesNothing(t *testing.T) {
	ctx := context.Background()
	tl := tool(t)
	dir := t.TempDir()
	p := filepath.Join(dir, "x")
	for _, f := range []Format{{}, {Size: 5000}, {Size: 1 << 20, Kind: Growing}, {Size: MaxGrowBytes * 2, Kind: Growing}, {Kind: ReadOnly, Size: 1 << 25, Label: "seventeen bytes.."}} {
		if err := tl.Make(ctx, p, f); !fault.Is(err, fault.Invalid) {
			t.Errorf("%+v: %v", f, err)
		}
	}
	if err := tl.Make(ctx, p, Format{Kind: ReadOnly, Size: 1 << 25, Root: "/nonexistent"}); err == nil {
		t.Error("a root that does not exist was accepted")
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := os.WriteFile(p, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := tl.Make(ctx, p, Format{Kind: ReadOnly, Size: 1 << 25}); err == nil {
		t.Error("an existing file was overwritten")
	}
	if b, _ := os.ReadFile(p); string(b) != "data" {
		t.Errorf("an existing file was changed: %q", b)
	}
}

func TestProbeTool(t *testing.T) {
	ctx := context.Background()
	if _, err := ProbeTool(ctx, "/bin/echo"); !fault.Is(err, fault.Unavailable) {
		t.Errorf("echo passed as mke2fs: %v", err)
	}
	if !(Version{1, 47, 1}).AtLeast(prezeroed) || (Version{1, 46, 6}).AtLeast(prezeroed) || !(Version{2, 0, 0}).AtLeast(prezeroed) {
		t.Error("versions compare wrongly")
	}
}
