package oci

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	ocilayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/ext4"
)

func mkfs(t testing.TB) ext4.Tool {
	t.Helper()
	tool, err := ext4.FindTool(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return tool
}

// umoci is the reference unpacker.
func umoci(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("umoci")
	if err != nil {
		t.Fatal("umoci, the reference that images are compared with, is not installed: scripts/deps.sh test")
	}
	return path
}

// unpackByReference unpacks an image with umoci and returns the root.
func unpackByReference(t testing.TB, img v1.Image) string {
	t.Helper()
	dir := t.TempDir()
	at, err := ocilayout.Write(filepath.Join(dir, "layout"), emptyIndex)
	if err != nil {
		t.Fatal(err)
	}
	if err := at.AppendImage(img, ocilayout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "x"})); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(umoci(t), "unpack", "--image", filepath.Join(dir, "layout")+":x", filepath.Join(dir, "bundle"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("umoci: %v\n%s", err, out)
	}
	return filepath.Join(dir, "bundle", "rootfs")
}

// mounted mounts an image, in a mount namespace that is this test's thread's own.
func mounted(t testing.TB, image string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "ext4", "-o", "loop,ro,noload", image, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// ownMounts gives the test a mount namespace. Its thread is not used again.
func ownMounts(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("takes root, to unpack with owners and devices and to mount what was made")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Skip("may not make a mount namespace: ", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
}

// seen is all that a file is, as a line of text.
func seen(t testing.TB, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	first := map[uint64]string{}
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		if name == "." {
			name = ""
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("mode %o owner %d:%d", st.Mode, st.Uid, st.Gid)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(content)
			line += fmt.Sprintf(" size %d sha256 %s", st.Size, hex.EncodeToString(sum[:6]))
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" to %q", target)
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" device %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			line += fmt.Sprintf(" links %d", st.Nlink)
			if f, ok := first[st.Ino]; ok {
				line += fmt.Sprintf(" same as %q", f)
			} else {
				first[st.Ino] = name
			}
		}
		buffer := make([]byte, 64<<10)
		n, err := unix.Llistxattr(p, buffer)
		if err != nil {
			return err
		}
		attributes := strings.Split(strings.TrimSuffix(string(buffer[:n]), "\x00"), "\x00")
		slices.Sort(attributes)
		for _, a := range attributes {
			if a == "" {
				continue
			}
			value := make([]byte, 64<<10)
			n, err := unix.Lgetxattr(p, a, value)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %s=%q", a, value[:n])
		}
		out[name] = line + fmt.Sprintf(" time %d", st.Mtim.Sec)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// except drops what is known to differ: all of a file whose reason is not its time, else the time.
func except(files map[string]string, but map[string]string) {
	for name, line := range files {
		for prefix, why := range but {
			if name != prefix && (prefix == "" || !strings.HasPrefix(name, prefix+"/")) {
				continue
			}
			if strings.Contains(why, "time") {
				line, _, _ = strings.Cut(line, " time ")
				files[name] = line
			} else {
				delete(files, name)
			}
		}
	}
}

// TestCorpusIsWhatTheReferenceUnpacks pulls each odd image from a registry, flattens it, and compares what the
// kernel sees in the filesystem with what umoci unpacked.
func TestCorpusIsWhatTheReferenceUnpacks(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("takes root, to unpack with owners and devices and to mount what was made")
	}
	h, tool := newHub(t), mkfs(t)
	puller := newPuller(t)
	for i, c := range corpus() {
		t.Run(c.name, func(t *testing.T) {
			ownMounts(t)
			var layers [][]byte
			for _, l := range c.layers {
				layers = append(layers, tarOf(t, l...))
			}
			img := imageOf(t, layers...)
			ref := h.push(t, fmt.Sprintf("corpus/%d:x", i), img)
			pulled, err := puller.Pull(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			defer pulled.Close()
			file := filepath.Join(t.TempDir(), "rootfs.ext4")
			if _, err := pulled.Flatten(t.Context(), tool, file, file+".seed", nil); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("e2fsck", "-fn", file).CombinedOutput(); err != nil {
				t.Errorf("e2fsck: %v\n%s", err, out)
			}
			want, got := seen(t, unpackByReference(t, img)), seen(t, mounted(t, file))
			if len(c.layers[0]) == 0 || c.layers[0][0].h.Name != "./" {
				// What no layer says of the root directory is nobody's to compare.
				except(want, map[string]string{"": "its time"})
				except(got, map[string]string{"": "its time"})
			}
			except(want, c.but)
			except(got, c.but)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("what was flattened (+) is not what umoci unpacks (-):\n%s", diff)
			}
		})
	}
}

func debugfs(t testing.TB, image, command string) string {
	t.Helper()
	out, err := exec.Command("debugfs", "-R", command, image).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}
