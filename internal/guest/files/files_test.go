package files

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/frame"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is a stream, with the guest's end served at root.
func pair(t *testing.T, root string) net.Conn {
	t.Helper()
	host, guest := ends(t)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = Serve(guest, func(p string) string { return root + "/" + p })
		buffer := make([]byte, 1<<16)
		for { // as the agent does
			if _, err := guest.Read(buffer); err != nil {
				break
			}
		}
		guest.Close()
	}()
	t.Cleanup(func() { host.Close(); <-served })
	return host
}

func ends(t *testing.T) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if out[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return out[0], out[1]
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// list describes a tree: kind, mode, time, size and content or target of each thing in it.
func list(t *testing.T, root string) []string {
	t.Helper()
	var out []string
	must(t, filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, p)
		switch {
		case d.Type() == fs.ModeSymlink:
			link, err := os.Readlink(p)
			out = append(out, fmt.Sprintf("%s -> %s", name, link))
			return err
		case d.IsDir():
			out = append(out, fmt.Sprintf("%s %v %d", name, info.Mode(), info.ModTime().Unix()))
			return nil
		}
		b, err := os.ReadFile(p)
		out = append(out, fmt.Sprintf("%s %v %d %d %.20q", name, info.Mode(), info.ModTime().Unix(), len(b), b))
		return err
	}))
	return out
}

func tree(t *testing.T) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "tree")
	old := time.Unix(1_000_000_000, 0)
	must(t, os.MkdirAll(root+"/sub/empty", 0o700), os.WriteFile(root+"/a", []byte("content"), 0o640), os.WriteFile(root+"/none", nil, 0o600),
		os.WriteFile(root+"/sub/new\nline", bytes.Repeat([]byte("0123456789"), 100_000), 0o444), os.WriteFile(root+"/run", []byte("#!"), 0o755),
		os.Symlink("../outside", root+"/sub/link"), os.Symlink("/absolute", root+"/absolute"), os.Chmod(root+"/sub", 0o751), os.Chmod(root+"/run", 0o755))
	for _, p := range []string{"a", "none", "sub/new\nline", "run", "sub/empty", "sub", ""} {
		must(t, os.Chtimes(filepath.Join(root, p), old, old))
	}
	return root
}

// TestDirectories copies a tree both ways, by each way of naming the destination.
func TestDirectories(t *testing.T) {
	source := tree(t)
	want := list(t, source)
	for _, c := range []struct{ source, target, at string }{
		{source, "there/", "there/tree"}, {source, "new", "new"}, {source + "/.", "there", "there"}, {source + "/.", "new", "new"}, {source + "/", "there", "there/tree"},
	} {
		for _, put := range []bool{true, false} {
			dst := t.TempDir()
			must(t, os.Mkdir(dst+"/there", 0o755))
			var r Result
			var err error
			if put {
				r, err = Put(t.Context(), pair(t, dst), c.source, c.target, Options{})
			} else {
				r, err = Get(t.Context(), pair(t, ""), c.source, dst+"/"+c.target, Options{})
			}
			if err != nil || r.Left != 0 || r.Bytes != 1_000_009 {
				t.Errorf("%+v put %v: %+v, %v", c, put, r, err)
			}
			got := list(t, filepath.Join(dst, c.at))
			if c.at == "there" { // it was there: its own mode and time stay
				got[0], want[0] = ".", "."
			} else {
				want[0] = list(t, source)[0]
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%+v put %v:\n%s", c, put, diff)
			}
		}
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/f", []byte("new"), 0o600), os.Mkdir(dir+"/d", 0o755), os.Mkdir(dir+"/d2", 0o755))
	for _, c := range []struct{ target, at, fails string }{
		{"g", "g", ""}, {"d", "d/f", ""}, {"d/", "d/f", ""}, {"d/g", "d/g", ""},
		{"x/", "", "no such directory"}, {"x/y", "", "no such file"}, {"/dev/null", "", "neither a file nor a directory"},
	} {
		target := c.target
		if !filepath.IsAbs(target) {
			target = dir + "/" + target
		}
		_, err := Get(t.Context(), pair(t, dir), "f", target, Options{})
		if c.fails != "" {
			if err == nil || !strings.Contains(err.Error(), c.fails) {
				t.Errorf("%s: %v", c.target, err)
			}
			continue
		}
		if b, _ := os.ReadFile(filepath.Join(dir, c.at)); err != nil || string(b) != "new" {
			t.Errorf("%s: %v, %q", c.target, err, b)
		}
	}
	if st, err := os.Stat("/dev/null"); err != nil || st.Mode().IsRegular() {
		t.Fatalf("/dev/null: %v, %v", st, err)
	}
	for source, fails := range map[string]string{"nothing": "no such file", "d2/fifo": "neither a file nor a directory"} {
		must(t, unix.Mkfifo(dir+"/d2/fifo", 0o600))
		_, err := Get(t.Context(), pair(t, dir), source, dir+"/z", Options{})
		var f *Error
		if !errors.As(err, &f) || !f.Guest || !strings.Contains(err.Error(), fails) {
			t.Errorf("get %s: %v", source, err)
		}
		if _, err := Put(t.Context(), pair(t, dir), dir+"/"+source, "z", Options{}); !errors.As(err, &f) || f.Guest || !strings.Contains(err.Error(), fails) {
			t.Errorf("put %s: %v", source, err)
		}
		must(t, os.Remove(dir+"/d2/fifo"))
	}
	// What cannot be copied is left out, and said.
	must(t, unix.Mkfifo(dir+"/d2/fifo", 0o600), os.WriteFile(dir+"/d2/after", nil, 0o600))
	r, err := Get(t.Context(), pair(t, dir), "d2", dir+"/d3", Options{})
	if err != nil || r.Left != 1 || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "d2/fifo: is neither") {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := os.Stat(dir + "/d3/after"); err != nil {
		t.Error(err)
	}
	// A full guest, told while the host still sends.
	must(t, os.WriteFile(dir+"/big", make([]byte, 8<<20), 0o600))
	var f *Error
	if _, err := Put(t.Context(), pair(t, dir), dir+"/big", "nowhere/at/all", Options{}); !errors.As(err, &f) || !f.Guest || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("got %v", err)
	}
}

// TestLinksAreNotWrittenThrough replaces links, and what they lead to stays as it is.
func TestLinksAreNotWrittenThrough(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(dir+"/src/sub", 0o755), os.WriteFile(dir+"/src/f", []byte("new"), 0o600), os.WriteFile(dir+"/src/sub/g", []byte("new"), 0o600),
		os.MkdirAll(dir+"/dst", 0o755), os.WriteFile(dir+"/victim", []byte("old"), 0o600), os.Mkdir(dir+"/outside", 0o755),
		os.Symlink("../victim", dir+"/dst/f"), os.Symlink("../outside", dir+"/dst/sub"))
	_, err := Get(t.Context(), pair(t, dir), "src/.", dir+"/dst", Options{})
	if err == nil || !strings.Contains(err.Error(), "sub: exists and is no directory") {
		t.Errorf("got %v", err)
	}
	must(t, os.Remove(dir+"/dst/sub"))
	if _, err = Get(t.Context(), pair(t, dir), "src/.", dir+"/dst", Options{}); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(dir + "/victim"); err != nil || string(b) != "old" {
		t.Errorf("what the link led to: %q, %v", b, err)
	}
	if got := list(t, dir+"/outside"); len(got) != 1 {
		t.Errorf("outside: %q", got)
	}
	if st, err := os.Lstat(dir + "/dst/f"); err != nil || !st.Mode().IsRegular() {
		t.Errorf("%v, %v", st, err)
	}
}

func TestSparse(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(dir + "/sparse")
	must(t, err)
	const size = 64 << 20
	_, err1 := f.WriteAt([]byte("begin"), 1<<20)
	_, err2 := f.WriteAt([]byte("middle"), 40<<20)
	must(t, err1, err2, f.Truncate(size), f.Close())
	for _, get := range []bool{true, false} {
		if get {
			_, err = Get(t.Context(), pair(t, dir), "sparse", dir+"/copy", Options{})
		} else {
			_, err = Put(t.Context(), pair(t, dir), dir+"/sparse", "copy", Options{})
		}
		must(t, err)
		var st unix.Stat_t
		must(t, unix.Stat(dir+"/copy", &st))
		if st.Size != size || st.Blocks*512 > 1<<20 {
			t.Errorf("%d bytes, of which %d are on the disk", st.Size, st.Blocks*512)
		}
		a, err1 := os.ReadFile(dir + "/sparse")
		b, err2 := os.ReadFile(dir + "/copy")
		must(t, err1, err2, os.Remove(dir+"/copy"))
		if !bytes.Equal(a, b) {
			t.Error("the copy differs")
		}
	}
}

// TestBits: a guest cannot leave programs with its receiver's power on the host; the host's own bits
// arrive in the guest, and owners only if asked for.
func TestBits(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/s", nil, 0o700), os.Chmod(dir+"/s", 0o755|fs.ModeSetuid|fs.ModeSetgid))
	root := os.Getuid() == 0
	if root {
		must(t, os.Chown(dir+"/s", 4242, 4343), os.Chmod(dir+"/s", 0o755|fs.ModeSetuid|fs.ModeSetgid))
	}
	check := func(name string, mode fs.FileMode, uid uint32) {
		t.Helper()
		st, err := os.Stat(dir + "/" + name)
		must(t, err)
		if st.Mode() != mode || root && st.Sys().(*syscall.Stat_t).Uid != uid {
			t.Errorf("%s: %v, user %d", name, st.Mode(), st.Sys().(*syscall.Stat_t).Uid)
		}
	}
	_, err1 := Get(t.Context(), pair(t, dir), "s", dir+"/got", Options{})
	_, err2 := Put(t.Context(), pair(t, dir), dir+"/s", "put", Options{})
	must(t, err1, err2)
	check("got", 0o755, 0)
	check("put", 0o755|fs.ModeSetuid|fs.ModeSetgid, 0)
	if root {
		_, err := Put(t.Context(), pair(t, dir), dir+"/s", "kept", Options{Owners: true})
		must(t, err)
		check("kept", 0o755|fs.ModeSetuid|fs.ModeSetgid, 4242)
	}
}

// TestHostileGuest: whatever a guest sends, nothing is written outside of the target, and it is cut off.
func TestHostileGuest(t *testing.T) {
	f := func(name string, size int64) []byte {
		return entry{kind: file, name: name, mode: 0o644, size: size}.append(nil)
	}
	d := func(name string) []byte { return entry{kind: directory, name: name, mode: 0o755}.append(nil) }
	l := func(name, to string) []byte { return entry{kind: symlink, name: name, link: to}.append(nil) }
	type fr struct {
		kind    byte
		payload []byte
	}
	deep := []fr{}
	for range maxDepth + 2 {
		deep = append(deep, fr{kindEntry, d("d")})
	}
	for name, frames := range map[string][]fr{
		"name with a slash":               {{kindEntry, d("d")}, {kindEntry, f("../../victim", 0)}},
		"absolute name":                   {{kindEntry, d("d")}, {kindEntry, f("/victim", 0)}},
		"dots":                            {{kindEntry, d("d")}, {kindEntry, d("..")}, {kindEntry, f("victim", 0)}},
		"through a link":                  {{kindEntry, d("d")}, {kindEntry, l("out", "../..")}, {kindEntry, d("out")}, {kindEntry, f("victim", 0)}},
		"over a link":                     {{kindEntry, d("d")}, {kindEntry, l("v", "../../victim")}, {kindEntry, f("v", 3)}, {kindData, []byte("bad")}, {kindUp, nil}, {kindUp, nil}},
		"up too often":                    {{kindEntry, d("d")}, {kindUp, nil}, {kindUp, nil}, {kindEntry, f("victim", 0)}},
		"a second thing":                  {{kindEntry, d("d")}, {kindUp, nil}, {kindEntry, d("e")}},
		"too much data":                   {{kindEntry, f("f", 2)}, {kindData, []byte("bad")}},
		"too much hole":                   {{kindEntry, f("f", 2)}, {kindHole, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}},
		"nothing for ever":                {{kindEntry, f("f", 2)}, {kindData, nil}},
		"not complete":                    {{kindEntry, f("f", 2)}, {kindEnd, nil}},
		"cut":                             {{kindEntry, f("f", 2)}},
		"nothing at all":                  {{kindEnd, nil}},
		"mode":                            {{kindEntry, entry{kind: file, name: "f", mode: 1 << 20}.append(nil)}},
		"unknown":                         {{'?', nil}},
		"a result":                        {{kindResult, []byte(`{"files":-1}`)}},
		"too deep":                        deep,
		"another name of what never came": {{kindEntry, d("d")}, {kindEntry, entry{kind: hardlink, name: "h", link: "1"}.append(nil)}},
		"another name of a path":          {{kindEntry, d("d")}, {kindEntry, entry{kind: hardlink, name: "h", link: "../victim"}.append(nil)}},
		"another name at the top":         {{kindEntry, entry{kind: hardlink, name: "h", link: "1"}.append(nil)}},
		"a number that is too long":       {{kindEntry, entry{kind: file, name: "f", link: strings.Repeat("1", maxNumber+1)}.append(nil)}},
		"an attribute of the system's":    {{kindAttribute, attribute{"security.selinux", []byte("x")}.append(nil)}},
		"an attribute without a name":     {{kindAttribute, []byte{0}}},
		"too many attributes":             {{kindAttribute, attribute{"user.a", make([]byte, 40000)}.append(nil)}, {kindAttribute, attribute{"user.b", make([]byte, 40000)}.append(nil)}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			must(t, os.MkdirAll(dir+"/a/target", 0o755), os.WriteFile(dir+"/victim", []byte("old"), 0o600), os.WriteFile(dir+"/a/victim", []byte("old"), 0o600))
			host, guest := ends(t)
			done := make(chan struct{})
			go func() {
				defer close(done)
				defer guest.Close()
				r, w := frame.NewReader(guest), frame.NewWriter(guest)
				_, _, _ = r.Next()
				for _, f := range frames {
					if w.Write(f.kind, f.payload) != nil {
						return
					}
				}
			}()
			if r, err := Get(t.Context(), host, "source", dir+"/a/target", Options{}); err == nil {
				t.Errorf("%+v and no error", r)
			}
			<-done
			for _, v := range []string{dir + "/victim", dir + "/a/victim"} {
				if b, err := os.ReadFile(v); err != nil || string(b) != "old" {
					t.Errorf("%s: %q, %v", v, b, err)
				}
			}
			outside := slices.DeleteFunc(list(t, dir), func(s string) bool { return strings.HasPrefix(s, "a/target") })
			if len(outside) != 4 { // the two directories and the two files
				t.Errorf("outside of the target: %q", outside)
			}
			if left, _ := filepath.Glob(dir + "/a/target/source"); name == "cut" && len(left) > 0 {
				t.Error("a file that is not complete was left behind")
			}
		})
	}
}

// A copy that is left leaves no half of a file, and ends at once.
func TestCancelled(t *testing.T) {
	dir := t.TempDir()
	host, guest := ends(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w := frame.NewWriter(guest)
		_, _, _ = frame.NewReader(guest).Next()
		_ = w.Write(kindEntry, entry{kind: file, name: "x", size: 100}.append(nil))
		_ = w.Write(kindData, []byte("half"))
		for range 500 {
			if found, _ := filepath.Glob(dir + "/f"); len(found) > 0 {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		cancel()
	}()
	if _, err := Get(ctx, host, "f", dir+"/f", Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	<-done
	guest.Close()
	if got := list(t, dir); len(got) != 1 {
		t.Errorf("left: %q", got)
	}
}

// FuzzReceive: no bytes of a guest's make the host write outside of the target.
func FuzzReceive(f *testing.F) {
	var b bytes.Buffer
	w := frame.NewWriter(&b)
	for _, e := range []struct {
		kind    byte
		payload []byte
	}{
		{kindEntry, entry{kind: directory, name: "d", mode: 0o755}.append(nil)}, {kindEntry, entry{kind: symlink, name: "l", link: "../.."}.append(nil)},
		{kindAttribute, attribute{"user.a", []byte("b")}.append(nil)},
		{kindEntry, entry{kind: file, name: "f", mode: 0o644, size: 5, link: "1"}.append(nil)}, {kindData, []byte("ab")}, {kindHole, []byte{0, 0, 0, 0, 0, 0, 0, 3}},
		{kindEntry, entry{kind: hardlink, name: "h", link: "1"}.append(nil)}, {kindEntry, entry{kind: symlink, name: "f", link: "h"}.append(nil)},
		{kindEntry, entry{kind: hardlink, name: "h", link: "1"}.append(nil)},
		{kindWarning, []byte("w")}, {kindUp, nil}, {kindEnd, nil},
	} {
		if err := w.Write(e.kind, e.payload); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(b.Bytes())
	base := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		dir, err := os.MkdirTemp(base, "")
		must(t, err)
		defer os.RemoveAll(dir)
		must(t, os.Mkdir(dir+"/target", 0o755))
		r, err := receive(frame.NewReader(bytes.NewReader(data)), dir+"/target", "source", Options{}, false)
		if r.Bytes > int64(len(data)) || err == nil && r.Files == 0 {
			t.Errorf("%+v from %d bytes, %v", r, len(data), err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("outside of the target: %v, %v", entries, err)
		}
	})
}

// Files of /proc and /sys say no size, or a wrong one; what a reader gets of them is copied.
func TestSizeless(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{"/proc/version", "/proc/self/limits", "/sys/devices/system/cpu/online"} {
		want, err := os.ReadFile(name)
		must(t, err)
		r, err := Put(t.Context(), pair(t, root), name, "copy", Options{})
		got, readErr := os.ReadFile(root + "/copy")
		must(t, err, readErr)
		if !bytes.Equal(got, want) || len(want) == 0 || r.Left != 0 || r.Bytes != int64(len(want)) {
			t.Errorf("%s: %+v, %q, want %q", name, r, got, want)
		}
		must(t, os.Remove(root+"/copy"))
	}
	// What is too much is said, and no empty file stands for it.
	host := t.TempDir()
	must(t, os.Symlink("/proc/kallsyms", root+"/symbols"))
	_, put := Put(t.Context(), pair(t, root), "/proc/kallsyms", "copy", Options{})
	_, get := Get(t.Context(), pair(t, root), "symbols", host+"/copy", Options{})
	for where, err := range map[string]error{root: put, host: get} {
		var f *Error
		if !errors.As(err, &f) || f.Guest != (where == host) || f.Lost || !strings.Contains(err.Error(), "it is more than 1048576 bytes") {
			t.Errorf("%v", err)
		}
		if _, err := os.Stat(where + "/copy"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("there is a copy: %v", err)
		}
	}
}
