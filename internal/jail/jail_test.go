package jail

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

var update = flag.Bool("update", false, "write testdata/plan.golden")

var (
	aName    = Name{Installation: "a1b2c3d4e5f6", VM: "0123456789abcdef0123456789abcdef", Place: "ab12"}
	aRequest = Request{Name: aName, VCPU: 2, MemoryMiB: 1024, TAPs: []string{"bgra1b2c3-0"},
		Drives: []Drive{{"base", true}, {"system", false}, {"work", false}, {"modules", true}, {"config", true}}}
)

// TestPlan compares what a jail is made of, and how the jailer is called, with a golden file.
func TestPlan(t *testing.T) {
	p := Programs{Firecracker: "/usr/local/libexec/banger/firecracker", Jailer: "/usr/local/libexec/banger/jailer"}
	const base = "/run/banger/jails/root"
	var out strings.Builder
	fmt.Fprintln(&out, p.Jailer)
	for _, a := range arguments(p, base, aName.Marker(), FirstUID+7) {
		fmt.Fprintln(&out, " ", a)
	}
	fmt.Fprintln(&out, "\ntmpfs", base, rootSize)
	for _, m := range aRequest.mounts(true) {
		kind, mode := "file", "rw"
		if m.dir {
			kind = "directory"
		}
		if m.readOnly {
			mode = "ro"
		}
		fmt.Fprintln(&out, filepath.Join(rootOf(p, base, aName.Marker()), m.at), kind, mode)
	}
	const path = "testdata/plan.golden"
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(path, []byte(out.String()), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), out.String()); diff != "" {
		t.Errorf("%s (-want +got), -update writes it:\n%s", path, diff)
	}
}

func TestValidate(t *testing.T) {
	if err := aRequest.Validate(); err != nil {
		t.Error(err)
	}
	for what, change := range map[string]func(r *Request){
		"no installation":        func(r *Request) { r.Installation = "" },
		"a path for one":         func(r *Request) { r.Installation = "../../etc" },
		"a long one":             func(r *Request) { r.Installation = strings.Repeat("a", 25) },
		"a path for a VM":        func(r *Request) { r.VM = "a/b" },
		"a VM with a dash":       func(r *Request) { r.VM = "a-b" },
		"an argument for a VM":   func(r *Request) { r.VM = "--uid" },
		"a path for a place":     func(r *Request) { r.Place = ".." },
		"no place":               func(r *Request) { r.Place = "" },
		"no CPU":                 func(r *Request) { r.VCPU = 0 },
		"many CPUs":              func(r *Request) { r.VCPU = 1 << 30 },
		"no memory":              func(r *Request) { r.MemoryMiB = 0 },
		"memory that overflows":  func(r *Request) { r.MemoryMiB = 1 << 62 },
		"a path for a role":      func(r *Request) { r.Drives = []Drive{{"../kernel", false}} },
		"a drive twice":          func(r *Request) { r.Drives = []Drive{{"base", false}, {"base", true}} },
		"many drives":            func(r *Request) { r.Drives = make([]Drive, maxDrives+1) },
		"many devices":           func(r *Request) { r.TAPs = make([]string, maxTAPs+1) },
		"a role that is nothing": func(r *Request) { r.Drives = []Drive{{}} },
	} {
		r := aRequest
		if change(&r); !fault.Is(r.Validate(), fault.Invalid) {
			t.Errorf("%s: %v", what, r.Validate())
		}
	}
}

// TestFiles: what a user may give to a jail, and what not.
func TestFiles(t *testing.T) {
	dir, me := t.TempDir(), os.Getuid()
	open := func(name string, flags int, mode os.FileMode) *os.File {
		t.Helper()
		path := filepath.Join(dir, name)
		if strings.HasPrefix(name, "/") {
			path = name
		} else if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		} else if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	file := func(flags int) *os.File { return open("file", flags, 0o600) }
	shared := filepath.Join(dir, "shared")
	if err := errors.Join(os.Mkdir(shared, 0o700), os.Chmod(shared, 0o777), os.Chmod(dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name       string
		f          *os.File
		dir, write bool
		user       int
		ok         bool
	}{
		{"to read", file(os.O_RDONLY), false, false, me, true},
		{"to write", file(os.O_WRONLY), false, true, me, true},
		{"to read and write", file(os.O_RDWR), false, true, me, false},
		{"to read and write, for reading", file(os.O_RDWR), false, false, me, true},
		{"a directory", open(dir, os.O_RDONLY, 0), true, true, me, true},
		{"to read, for writing", file(os.O_RDONLY), false, true, me, false},
		{"to write, for reading", file(os.O_WRONLY), false, false, me, false},
		{"opened for nothing", file(unix.O_PATH), false, false, me, false},
		{"a directory opened for nothing", open(dir, unix.O_PATH, 0), true, false, me, false},
		{"another user's", file(os.O_WRONLY), false, true, me + 1, false},
		{"another user's directory", open(dir, os.O_RDONLY, 0), true, true, me + 1, false},
		{"a directory for a file", open(dir, os.O_RDONLY, 0), false, false, me, false},
		{"a file for a directory", file(os.O_RDONLY), true, false, me, false},
		{"a device", open("/dev/null", os.O_WRONLY, 0), false, true, me, false},
		{"setuid", open("setuid", os.O_WRONLY, 0o600|os.ModeSetuid), false, true, me, false},
		{"a directory of all", open(shared, os.O_RDONLY, 0), true, true, me, false},
	} {
		if _, err := check(c.f, c.user, "it", c.dir, c.write); (err == nil) != c.ok || err != nil && !fault.Is(err, fault.Permission) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	log := open("log", os.O_WRONLY|os.O_APPEND, 0o600)
	one := Request{Name: aName, VCPU: 1, MemoryMiB: 1, Drives: []Drive{{"system", false}}}
	good := Files{Log: log, Run: open(dir, os.O_RDONLY, 0), Kernel: file(os.O_RDONLY), Initrd: file(os.O_RDONLY), Drives: []*os.File{file(os.O_WRONLY)}}
	if gids, err := checkAll(one, good, me); err != nil || len(gids) != 4 || gids[0] != os.Getgid() {
		t.Errorf("%v, %v", gids, err)
	}
	for what, bad := range map[string]*os.File{"to write anywhere": open("log", os.O_WRONLY, 0o600), "to read": open("log", os.O_RDONLY|os.O_APPEND, 0o600), "a device": open("/dev/null", os.O_WRONLY|os.O_APPEND, 0)} {
		f := good
		f.Log = bad
		if _, err := checkAll(one, f, me); !fault.Is(err, fault.Permission) {
			t.Errorf("a log %s: %v", what, err)
		}
	}
	// And back and forth.
	for _, net := range []*os.File{nil, good.Run} {
		f := good
		f.Net = net
		again, err := Restore(one, f.All())
		if err != nil || again.Net != net || again.Log != f.Log || again.Drives[0] != f.Drives[0] || again.locked(one) != f.Drives[0] {
			t.Errorf("%+v, %v", again, err)
		}
	}
	for _, n := range []int{0, 4, 7} {
		if _, err := Restore(one, make([]*os.File, n)); !fault.Is(err, fault.Invalid) {
			t.Errorf("%d files: %v", n, err)
		}
	}
	if f := (Files{Drives: []*os.File{log}}).locked(Request{Drives: []Drive{{"base", true}}}); f != nil {
		t.Error("a drive that nobody writes is locked")
	}
}

// TestTaken: which ids belong to somebody.
func TestTaken(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"passwd": "root:x:0:0:root:/root:/bin/sh\nbroken\nfar:x:2100000001:2100000002::/:/bin/sh\n+::::::\n",
		"group":  "wheel:x:2100000003:\n", "subuid": "alice:2100000010:10\nbob:x:y\n", "subgid": "alice:2100000030:1\n",
	} {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	is, err := taken(root)
	if err != nil {
		t.Fatal(err)
	}
	var got []int
	for id := FirstUID; id < FirstUID+40; id++ {
		if is(id) {
			got = append(got, id-FirstUID)
		}
	}
	if want := []int{1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 30}; !cmp.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if is, err := taken(t.TempDir()); err != nil || is(FirstUID) {
		t.Errorf("without the files: %v", err)
	}
	if Inside(FirstUID-1) || !Inside(FirstUID) || !Inside(FirstUID+UIDs-1) || Inside(FirstUID+UIDs) {
		t.Error("the range has other bounds")
	}
}
