package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func dir(names ...Name) *Node { return &Node{Mode: unix.S_IFDIR | 0o755, Names: names} }
func reg(size int64) *Node    { return &Node{Mode: unix.S_IFREG | 0o644, Size: size} }

// populated makes a filesystem of a tree.
func populated(t testing.TB, size int64, root *Node) (*os.File, error) {
	t.Helper()
	p := filepath.Join(t.TempDir(), "fs.ext4")
	if err := tool(t).Make(t.Context(), p, Format{Kind: Base, Size: size, Label: "x"}); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(p, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, Populate(f, root)
}

func debugfs(t testing.TB, image, command string) string {
	t.Helper()
	out, err := exec.Command("debugfs", "-R", command, image).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// TestPopulate is judged by e2fsck, which knows every checksum and count, and by what debugfs finds.
func TestPopulate(t *testing.T) {
	big, small, twice := reg(1<<30+5), reg(7), reg(3)
	acl := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
	small.Xattrs = map[string]string{"user.a": "value", "security.capability": "\x01\x00\x00\x02\x00\x20", "system.posix_acl_access": acl, "trusted.x": ""}
	small.Time = time.Unix(1<<33, 123456789)
	many := dir()
	for i := range 20_000 {
		many.Names = append(many.Names, Name{fmt.Sprintf("file-%05d", i), reg(0)})
	}
	root := dir(Name{"big", big}, Name{"small", small}, Name{"d", dir(Name{"twice", twice}, Name{"again", twice})}, Name{"many", many},
		Name{"s", &Node{Mode: unix.S_IFLNK | 0o777, Target: "short"}}, Name{"l", &Node{Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("x/", 500)}},
		Name{"c", &Node{Mode: unix.S_IFCHR | 0o600, Major: 1, Minor: 3}}, Name{"b", &Node{Mode: unix.S_IFBLK | 0o600, Major: 300, Minor: 70000}},
		Name{"p", &Node{Mode: unix.S_IFIFO | 0o600, UID: 1 << 31, GID: 70000}}, Name{"no\xfftext\n", reg(0)})
	f, err := populated(t, 3<<30, root)
	if err != nil {
		t.Fatal(err)
	}
	for file, content := range map[*Node]io.Reader{big: io.MultiReader(strings.NewReader("begin"), io.LimitReader(zeros{}, 1<<30-3), strings.NewReader("end")), small: strings.NewReader("content"), twice: strings.NewReader("two")} {
		if _, err := file.WriteContent(f, content); err != nil {
			t.Fatal(err)
		}
	}
	fsck(t, f.Name())
	if len(big.extents) <= inlineLeaves {
		t.Errorf("the large file has %d extents: too few to need a tree", len(big.extents))
	}
	head, tail := make([]byte, 5), make([]byte, 3)
	content := big.Content(f)
	if _, err := io.ReadFull(content, head); err != nil {
		t.Fatal(err)
	}
	if n, err := io.CopyN(io.Discard, content, 1<<30-3); err != nil || n != 1<<30-3 {
		t.Fatal(n, err)
	}
	if _, err := io.ReadFull(content, tail); err != nil || string(head)+string(tail) != "beginend" {
		t.Errorf("%q %q, %v", head, tail, err)
	}
	if n, _ := content.Read(tail); n != 0 {
		t.Error("the content goes on after its end")
	}
	for command, want := range map[string]string{
		"cat /small": "content", "cat /d/again": "two", "stat /d/again": "Links: 2", "stat /c": "Device major/minor number: 01:03",
		"stat /p": "Group: 70000", "ea_get /small user.a": "value", "stat /l": "Size: 1000",
	} {
		if got := debugfs(t, f.Name(), command); !strings.Contains(strings.Join(strings.Fields(got), " "), want) {
			t.Errorf("%s: %s, want %q in it", command, got, want)
		}
	}
	if allocated := allocatedBytes(t, f); allocated > 16<<20 {
		t.Errorf("a file of zeros takes %d bytes of the host", allocated)
	}
}

func allocatedBytes(t testing.TB, f *os.File) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestPopulateEmpty(t *testing.T) {
	f, err := populated(t, MinGrowBytes, dir())
	if err != nil {
		t.Fatal(err)
	}
	fsck(t, f.Name())
	if s := read(t, f.Name()); s.Inodes-s.FreeInodes != firstInode-1 || !s.Clean() {
		t.Errorf("%+v", s)
	}
	if err := Populate(f, dir()); !fault.Is(err, fault.Corrupt) {
		t.Errorf("a filesystem that is filled was filled again: %v", err)
	}
}

func TestPopulateRefuses(t *testing.T) {
	d := dir()
	for name, c := range map[string]struct {
		root *Node
		code fault.Code
	}{
		"too much":            {dir(Name{"a", reg(300 << 20)}), fault.Exhausted},
		"dots":                {dir(Name{"..", reg(0)}), fault.Invalid},
		"slash":               {dir(Name{"a/b", reg(0)}), fault.Invalid},
		"long":                {dir(Name{strings.Repeat("x", 256), reg(0)}), fault.Invalid},
		"twice":               {dir(Name{"a", reg(0)}, Name{"a", reg(0)}), fault.Invalid},
		"directory twice":     {dir(Name{"a", d}, Name{"b", d}), fault.Invalid},
		"empty target":        {dir(Name{"a", &Node{Mode: unix.S_IFLNK | 0o777}}), fault.Invalid},
		"attribute's name":    {dir(Name{"a", &Node{Mode: unix.S_IFREG, Xattrs: map[string]string{"odd": "x"}}}), fault.Invalid},
		"attributes' size":    {dir(Name{"a", &Node{Mode: unix.S_IFREG, Xattrs: map[string]string{"user.x": strings.Repeat("x", 4096)}}}), fault.Invalid},
		"access control list": {dir(Name{"a", &Node{Mode: unix.S_IFREG, Xattrs: map[string]string{"system.posix_acl_access": "x"}}}), fault.Invalid},
	} {
		if _, err := populated(t, MinGrowBytes, c.root); !fault.Is(err, c.code) {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	if err := Populate(mustTemp(t, bytes.Repeat([]byte{0}, 8192)), dir()); !fault.Is(err, fault.Corrupt) {
		t.Errorf("no filesystem: %v", err)
	}
	file := reg(10)
	f, err := populated(t, MinGrowBytes, dir(Name{"a", file}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.WriteContent(f, strings.NewReader("short")); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("content that is too short: %v", err)
	}
}

func mustTemp(t testing.TB, content []byte) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	return f
}
