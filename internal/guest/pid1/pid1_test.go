package pid1

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/vmm"
)

func put(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFindDrives(t *testing.T) {
	bySerial, byOrder := t.TempDir(), t.TempDir()
	for name, serial := range map[string]string{"vda": "config\n", "vdb": "base", "vdc": "system", "loop0": ""} {
		put(t, filepath.Join(bySerial, name, "serial"), serial)
	}
	got, err := findDrives(bySerial)
	want := drives{vmm.RoleConfig: "/dev/vda", vmm.RoleBase: "/dev/vdb", vmm.RoleSystem: "/dev/vdc"}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("by serial: %v\n%s", err, diff)
	}
	for _, name := range []string{"vda", "vdb", "vdc", "vdd", "vde", "vdf", "sr0"} {
		put(t, filepath.Join(byOrder, name, "serial"), "6502412345"+name[2:]) // Firecracker: of its file's device and inode
	}
	got, err = findDrives(byOrder)
	want = drives{vmm.RoleBase: "/dev/vda", vmm.RoleSystem: "/dev/vdb", vmm.RoleWork: "/dev/vdc",
		vmm.RoleModules: "/dev/vdd", vmm.RoleConfig: "/dev/vde"}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("by order: %v\n%s", err, diff)
	}
}

// TestModulesOfAbsentDevicesAreLeft: a guest loads the drivers of what it has, and all of them while
// its bus is not there yet.
func TestModulesOfAbsentDevicesAreLeft(t *testing.T) {
	pci := t.TempDir()
	put(t, filepath.Join(pci, "virtio0/device"), "0x0002\n")
	put(t, filepath.Join(pci, "virtio1/device"), "0x0004\n")
	for _, test := range []struct {
		file    string
		devices string
		want    bool
	}{
		{"virtio_blk.ko", pci, true}, {"virtio-rng.ko", pci, true}, {"overlay.ko", pci, true}, {"virtio_pci.ko", pci, true},
		{"virtio_net.ko", pci, false}, {"failover.ko", pci, false}, {"vsock.ko", pci, false}, {"virtio_mmio.ko", pci, false},
		{"virtio_mmio.ko", t.TempDir(), true}, {"vsock.ko", t.TempDir(), true},
		{"tun.ko", pci, false}, {"tun.ko", t.TempDir(), false},
	} {
		if got := wanted(test.file, test.devices); got != test.want {
			t.Errorf("%s: %v, want %v", test.file, got, test.want)
		}
	}
	put(t, filepath.Join(pci, "virtio2/device"), vsockDevice+"\n")
	if !wanted("vmw_vsock_virtio_transport_common.ko", pci) || !hasDevice(pci, vsockDevice) {
		t.Error("a machine with vsock does not get its modules")
	}
}

// TestRootWrite follows the image's symlinks as the booted system would, and never out of the root.
func TestRootWrite(t *testing.T) {
	outside, tree := t.TempDir(), t.TempDir()
	for link, target := range map[string]string{
		"etc": "/real/etc", "up": "../../../../..", "out": outside, "nowhere": "/missing/dir",
	} {
		if err := os.Symlink(target, filepath.Join(tree, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(tree, "real/etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	victim := filepath.Join(outside, "victim")
	put(t, victim, "untouched")
	if err := os.Symlink(victim, filepath.Join(tree, "real/etc/resolv.conf")); err != nil {
		t.Fatal(err)
	}
	root, err := openRoot(tree)
	if err != nil {
		t.Fatal(err)
	}
	defer root.f.Close()
	uid, gid := os.Getuid(), os.Getgid()
	for p, at := range map[string]string{
		"/etc/resolv.conf":  "real/etc/resolv.conf", // a symlink itself is replaced, not followed
		"/etc/new/dir/file": "real/etc/new/dir/file",
		"/up/up/x":          "x",
	} {
		if err := root.write(p, []byte("content"), 0o640, uid, gid); err != nil {
			t.Errorf("%s: %v", p, err)
			continue
		}
		info, err := os.Lstat(filepath.Join(tree, at))
		if err != nil || info.Mode() != 0o640 {
			t.Errorf("%s: %v, %v, want a file with 0640 at %s", p, info, err, at)
		}
		if got, err := root.read(p); err != nil || string(got) != "content" {
			t.Errorf("%s: read %q, %v", p, got, err)
		}
	}
	if err := root.write("/out/file", nil, 0o600, uid, gid); err == nil {
		t.Error("a symlink to a missing directory was followed out of the root or made")
	}
	if err := root.write("/nowhere/file", nil, 0o600, uid, gid); err == nil {
		t.Error("a dangling symlink was written through")
	}
	if err := root.write("/real/etc", nil, 0o600, uid, gid); err == nil {
		t.Error("a directory was replaced by a file")
	}
	left, err := os.ReadDir(outside)
	if content, readErr := os.ReadFile(victim); err != nil || readErr != nil || len(left) != 1 || string(content) != "untouched" {
		t.Errorf("outside the root: %v, %q, %v, %v", left, content, err, readErr)
	}
}

// TestRootWriteLeavesSameAlone: a file that is right already must not be copied up on each boot.
func TestRootWriteLeavesSameAlone(t *testing.T) {
	tree := t.TempDir()
	root, err := openRoot(tree)
	if err != nil {
		t.Fatal(err)
	}
	defer root.f.Close()
	inode := func() uint64 {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(tree, "f"), &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	write := func(content string, mode os.FileMode) {
		t.Helper()
		// Held open, the old inode's number cannot be used again for the new file.
		if f, err := os.Open(filepath.Join(tree, "f")); err == nil {
			defer f.Close()
		}
		if err := root.write("/f", []byte(content), mode, os.Getuid(), os.Getgid()); err != nil {
			t.Fatal(err)
		}
	}
	write("a", 0o644)
	before := inode()
	if write("a", 0o644); inode() != before {
		t.Error("an unchanged file was rewritten")
	}
	if write("b", 0o644); inode() == before {
		t.Error("changed content was not written as a new file")
	}
	before = inode()
	if write("b", 0o600); inode() == before {
		t.Error("a changed mode was not written")
	}
}

// TestSeed copies a tree as it is, and starts over what a crash left.
func TestSeed(t *testing.T) {
	tree, store := t.TempDir(), t.TempDir()
	put(t, filepath.Join(tree, "dir/file"), "content")
	if err := os.Chmod(filepath.Join(tree, "dir/file"), 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(tree, 0o710); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(tree, "dir/file"), filepath.Join(tree, "linked")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/absolute", filepath.Join(tree, "link")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(tree, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	old := []unix.Timespec{{Sec: 1000}, {Sec: 2000}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(tree, "dir"), old, 0); err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(store, unitName("/var/lib/docker"))
	put(t, own+".part/half", "of an earlier try")
	from, err := os.OpenFile(tree, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	if err := seed(from, store, own); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(listing(t, tree), listing(t, own)); diff != "" {
		t.Errorf("the copy (+) differs:\n%s", diff)
	}
	var a, b unix.Stat_t
	if err := unix.Stat(filepath.Join(own, "linked"), &a); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(filepath.Join(own, "dir/file"), &b); err != nil || a.Ino != b.Ino {
		t.Errorf("a hard link became a copy (%v)", err)
	}
	if left, err := os.ReadDir(store); err != nil || len(left) != 1 {
		t.Errorf("left in the store: %v, %v", left, err)
	}
}

// TestFill copies into a filesystem that nobody has used, and goes on after a crash, wherever it was.
func TestFill(t *testing.T) {
	image := t.TempDir()
	put(t, filepath.Join(image, ".bashrc"), "alias")
	put(t, filepath.Join(image, "dir/file"), "content")
	if err := os.Chmod(image, 0o710); err != nil {
		t.Fatal(err)
	}
	from, err := os.OpenFile(image, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	filled := map[string]string{".bashrc": "alias", "dir/file": "content", "lost+found/": ""}
	for name, c := range map[string]struct{ before, after map[string]string }{
		"fresh":                       {map[string]string{"lost+found/": ""}, filled},
		"a copy that was not whole":   {map[string]string{"lost+found/": "", ".banger-seed.part/half": "x"}, filled},
		"a copy that was whole":       {map[string]string{"lost+found/": "", ".banger-seed/.bashrc": "alias", ".banger-seed/dir/file": "content"}, filled},
		"half of it moved":            {map[string]string{"lost+found/": "", ".bashrc": "alias", ".banger-seed/dir/file": "content"}, filled},
		"all of it moved":             {map[string]string{"lost+found/": "", ".bashrc": "alias", "dir/file": "content", ".banger-seed/": ""}, filled},
		"used":                        {map[string]string{"lost+found/": "", "mine": "x"}, map[string]string{"lost+found/": "", "mine": "x"}},
		"all was removed by its user": {map[string]string{}, map[string]string{}},
	} {
		t.Run(name, func(t *testing.T) {
			to := t.TempDir()
			for p, content := range c.before {
				if strings.HasSuffix(p, "/") {
					if err := os.MkdirAll(filepath.Join(to, p), 0o700); err != nil {
						t.Fatal(err)
					}
					continue
				}
				put(t, filepath.Join(to, p), content)
			}
			for range 2 { // the next boot changes nothing
				if err := fill(from, to); err != nil {
					t.Fatal(err)
				}
				got := map[string]string{}
				for p, l := range listing(t, to) {
					switch p = strings.TrimPrefix(p, "/"); {
					case p == "lost+found":
						got["lost+found/"] = ""
					case l.Mode&unix.S_IFMT == unix.S_IFREG:
						got[p] = l.Text
					}
				}
				if diff := cmp.Diff(c.after, got); diff != "" {
					t.Errorf("what is there (+) differs:\n%s", diff)
				}
			}
			if st, err := os.Stat(to); name == "fresh" && (err != nil || st.Mode().Perm() != 0o710) {
				t.Errorf("the directory itself: %v, %v", st, err)
			}
		})
	}
}

type listed struct {
	Mode, UID, GID, Links uint32
	Size, Mtime           int64
	Text                  string
}

func listing(t *testing.T, dir string) map[string]listed {
	t.Helper()
	found := map[string]listed{}
	err := filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		l := listed{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Links: uint32(st.Nlink), Mtime: st.Mtim.Sec}
		if e.Type().IsRegular() {
			content, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			l.Text, l.Size = string(content), st.Size
		} else if e.Type()&os.ModeSymlink != 0 {
			l.Text, _ = os.Readlink(p)
		}
		found[strings.TrimPrefix(p, dir)] = l
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestNativeDirsDoNotCollide(t *testing.T) {
	seen := map[string]string{}
	for _, p := range []string{"/var/lib/docker", "/var/lib-docker", "/var-lib/docker", "/var/lib/docker-x", "/var-2dlib/docker", "/var/2dlib/docker", `/var\x2dlib/docker`, `/var/x2dlib/docker`} {
		name := unitName(p)
		if strings.Contains(name, "/") || seen[name] != "" {
			t.Errorf("%s and %s are both %s", p, seen[name], name)
		}
		seen[name] = p
	}
}

func TestUnitName(t *testing.T) {
	got := unitName("/usr/lib/modules/6.12.117+deb13-cloud-amd64")
	if want := `usr-lib-modules-6.12.117\x2bdeb13\x2dcloud\x2damd64`; got != want {
		t.Errorf("got %s, want %s (systemd-escape --path)", got, want)
	}
}

func TestMergeEnvironment(t *testing.T) {
	got := mergeEnvironment("# note\nA=1\nexport B=2\nC=3", map[string]string{"B": "new", "D": "x y"}, []string{"B", "D"})
	if want := "# note\nA=1\nC=3\nB=new\nD=x y\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestMountOptions(t *testing.T) {
	flags, data := mountOptions("noatime,discard,ro,commit=30")
	if flags != unix.MS_NOATIME|unix.MS_RDONLY || data != "discard,commit=30" {
		t.Errorf("got %#x, %q", flags, data)
	}
	if flags, data = mountOptions(""); flags != 0 || data != "" {
		t.Errorf("none: got %#x, %q", flags, data)
	}
}

func TestFindInit(t *testing.T) {
	tree := t.TempDir()
	root, err := openRoot(tree)
	if err != nil {
		t.Fatal(err)
	}
	defer root.f.Close()
	if _, err := findInit(root); err == nil || !strings.Contains(err.Error(), "no init") {
		t.Errorf("empty root: %v", err)
	}
	put(t, filepath.Join(tree, "sbin/init"), "x")
	if _, err := findInit(root); err == nil || !strings.Contains(err.Error(), "not a program") {
		t.Errorf("an init without x: %v", err)
	}
}

// A step that ends after its time must not be followed by another.
func TestWithin(t *testing.T) {
	wrong := errors.New("wrong")
	if err := within(time.Minute, func() { t.Error("late") }, func() error { return wrong }); !errors.Is(err, wrong) {
		t.Errorf("a step's error is %v", err)
	}
	late, returned := make(chan struct{}), make(chan struct{})
	go func() {
		_ = within(time.Millisecond, func() { close(late) }, func() error { <-late; return nil })
		close(returned)
	}()
	<-late
	select {
	case <-returned:
		t.Error("the boot goes on after its limit")
	case <-time.After(50 * time.Millisecond):
	}
}
