package files

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// both copies a tree in both directions, and gives each copy to check.
func both(t *testing.T, source string, check func(t *testing.T, at string, r Result)) {
	t.Helper()
	for _, put := range []bool{true, false} {
		t.Run(fmt.Sprint("put ", put), func(t *testing.T) {
			dst := t.TempDir()
			for range 2 { // the second time everything is replaced
				var r Result
				var err error
				p := &Progress{}
				if put {
					r, err = Put(t.Context(), pair(t, dst), source+"/.", "copy", Options{Progress: p})
				} else {
					r, err = Get(t.Context(), pair(t, ""), source+"/.", dst+"/copy", Options{Progress: p})
				}
				must(t, err)
				// What a directory holds that was there before counts, and it does not.
				if n := p.Files.Load(); p.Bytes.Load() != r.Bytes || n != r.Files && n != r.Files+1 {
					t.Errorf("progress said %d files, %d bytes; the result %+v", n, p.Bytes.Load(), r)
				}
				check(t, dst+"/copy", r)
			}
		})
	}
}

// TestHardLinks stay links inside of a tree, in whatever directory they are, and nothing is left beside them.
func TestHardLinks(t *testing.T) {
	source := t.TempDir()
	must(t, os.MkdirAll(source+"/a/b", 0o755), os.WriteFile(source+"/one", []byte("content"), 0o640), os.Link(source+"/one", source+"/a/two"),
		os.Link(source+"/one", source+"/a/b/three"), os.WriteFile(source+"/a/empty", nil, 0o600), os.Link(source+"/a/empty", source+"/none"),
		os.WriteFile(source+"/outside", []byte("x"), 0o600), os.Link(source+"/outside", filepath.Join(t.TempDir(), "elsewhere")))
	now := time.Now()
	level := func(root string) { // the time of a directory that was there before is that of what was put into it
		for _, dir := range []string{"a/b", "a"} {
			must(t, os.Chtimes(filepath.Join(root, dir), now, now))
		}
	}
	level(source)
	want := list(t, source)
	both(t, source, func(t *testing.T, at string, r Result) {
		if r.Bytes != 8 || r.Left != 0 {
			t.Errorf("%+v: the content of a file with three names is sent once", r)
		}
		level(at)
		got := list(t, at)
		got[0] = want[0] // its time is its own
		if !slices.Equal(got, want) {
			t.Errorf("got  %q\nwant %q", got, want)
		}
		for _, names := range [][]string{{"one", "a/two", "a/b/three"}, {"a/empty", "none"}, {"outside"}} {
			var first unix.Stat_t
			must(t, unix.Stat(filepath.Join(at, names[0]), &first))
			if int(first.Nlink) != len(names) {
				t.Errorf("%s has %d names, want %d", names[0], first.Nlink, len(names))
			}
			for _, name := range names[1:] {
				var st unix.Stat_t
				must(t, unix.Stat(filepath.Join(at, name), &st))
				if st.Ino != first.Ino {
					t.Errorf("%s is another file than %s", name, names[0])
				}
			}
		}
	})
}

// TestLinkWhereThereAreNone: a filesystem that refuses a link gets a copy.
func TestLinkWhereThereAreNone(t *testing.T) {
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	must(t, err)
	defer root.Close()
	must(t, os.WriteFile(dir+"/one", []byte("content"), 0o600))
	in := &receiver{dirs: []*level{{root: root}}}
	must(t, in.copyOf(root, "one", root, "two", entry{mode: 0o640}))
	if b, err := os.ReadFile(dir + "/two"); err != nil || string(b) != "content" {
		t.Errorf("%q, %v", b, err)
	}
	must(t, os.Symlink("one", dir+"/link"))
	if err := in.copyOf(root, "link", root, "three", entry{}); err == nil {
		t.Error("a link was followed")
	}
}

// TestAttributes of users go both ways, capabilities into a guest alone, and others not at all.
func TestAttributes(t *testing.T) {
	source := t.TempDir()
	must(t, os.Mkdir(source+"/d", 0o755), os.WriteFile(source+"/f", []byte("x"), 0o644), os.WriteFile(source+"/empty", nil, 0o644))
	if err := unix.Setxattr(source+"/f", "user.note", []byte("a\x00b"), 0); errors.Is(err, unix.ENOTSUP) {
		t.Skip("this filesystem has no extended attributes")
	}
	large := bytes.Repeat([]byte("v"), 2000)
	must(t, unix.Setxattr(source+"/f", "user.note", []byte("a\x00b"), 0), unix.Setxattr(source+"/f", "user.large", large, 0),
		unix.Setxattr(source+"/empty", "user.none", nil, 0), unix.Setxattr(source+"/d", "user.dir", []byte("d"), 0))
	// struct vfs_cap_data of linux/capability.h, revision 2: cap_net_raw, effective.
	raw := []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	root := os.Geteuid() == 0
	if root {
		must(t, unix.Setxattr(source+"/f", capabilities, raw, 0), unix.Setxattr(source+"/f", "trusted.x", []byte("x"), 0))
	}
	get := func(path, name string) string {
		value := make([]byte, 4096)
		n, err := unix.Getxattr(path, name, value)
		if err != nil {
			return err.Error()
		}
		return string(value[:n])
	}
	both(t, source, func(t *testing.T, at string, r Result) {
		if r.Left != 0 {
			t.Errorf("%+v", r)
		}
		for file, want := range map[string]map[string]string{
			"/f": {"user.note": "a\x00b", "user.large": string(large)}, "/empty": {"user.none": ""}, "/d": {"user.dir": "d"},
		} {
			for name, value := range want {
				if got := get(at+file, name); got != value {
					t.Errorf("%s %s: %q, want %q", file, name, got, value)
				}
			}
		}
		if got := get(at+"/f", "trusted.x"); root && got != unix.ENODATA.Error() {
			t.Errorf("an attribute of the system's was copied: %q", got)
		}
		into := t.Name() == "TestAttributes/put_true"
		if got := get(at+"/f", capabilities); root && (got == string(raw)) != into {
			t.Errorf("capabilities, into a guest %v: %q", into, got)
		}
	})
}
