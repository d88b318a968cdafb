package oci

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/ext4"
)

// somebody is a user id that nobody has.
const somebody = 54321

// TestNothingOfAPullTakesRoot: an ordinary user's filesystem has the owners, modes, devices and attributes that the image says, and is the
// one that root's would be, to the byte. What it takes is compared with another unpacker in TestCorpusIsWhatTheReferenceUnpacks.
func TestNothingOfAPullTakesRoot(t *testing.T) {
	const inside = "BANGER_TEST_ORDINARY"
	if os.Getenv(inside) != "" || os.Geteuid() != 0 {
		asSomebody(t)
		return
	}
	dir, err := os.MkdirTemp("", "banger-ordinary-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chown(dir, somebody, somebody); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestNothingOfAPullTakesRoot$", "-test.v")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), inside+"=1", "TMPDIR="+dir, "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: &syscall.Credential{Uid: somebody, Gid: somebody}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var theirs []string
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, sumOfImage) {
			theirs = append(theirs, strings.TrimSpace(line))
		}
	}
	if diff := cmp.Diff(privileged(t), theirs); diff != "" {
		t.Errorf("root's filesystems (-) are not an ordinary user's (+):\n%s\n%s", diff, out)
	}
}

const sumOfImage = "filesystem of "

// privileged makes filesystems of those images of the corpus whose files only root could make, and tells what is in them.
func privileged(t *testing.T, look ...func(image, rootfs string)) (sums []string) {
	t.Helper()
	h, p, tool := newHub(t), newPuller(t), mkfs(t)
	for i, c := range corpus() {
		if !slices.Contains([]string{"owners and modes", "devices", "attributes", "hard link to a device", "home"}, c.name) {
			continue
		}
		var layers [][]byte
		for _, l := range c.layers {
			layers = append(layers, tarOf(t, l...))
		}
		img := pull(t, p, h.push(t, fmt.Sprintf("corpus/%d:x", i), imageOf(t, layers...)))
		rootfs := filepath.Join(t.TempDir(), "rootfs")
		made, err := img.Flatten(t.Context(), tool, rootfs, rootfs+".seed", nil)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		sums = append(sums, fmt.Sprintf("%s%s: %x", sumOfImage, c.name, blocksOf(t, rootfs)))
		if made.Seed {
			sums = append(sums, fmt.Sprintf("%s%s, its work seed: %x", sumOfImage, c.name, blocksOf(t, rootfs+".seed")))
		}
		for _, look := range look {
			look(c.name, rootfs)
		}
	}
	if len(sums) != 6 {
		t.Errorf("%d filesystems were made: %q", len(sums), sums)
	}
	return sums
}

// blocksOf is a checksum of the blocks of a file that are not zero.
func blocksOf(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := sha256.New()
	block := make([]byte, ext4.BlockSize)
	for at := int64(0); ; at += ext4.BlockSize {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return sum.Sum(nil) // holes to the end
		}
		if err != nil {
			t.Fatal(err)
		}
		at = data / ext4.BlockSize * ext4.BlockSize
		if _, err := f.ReadAt(block, at); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if !bytes.Equal(block, make([]byte, ext4.BlockSize)) {
			_ = binary.Write(sum, binary.BigEndian, at) // a hash takes all
			sum.Write(block)
		}
	}
}

// asSomebody is the test as it runs without privileges.
func asSomebody(t *testing.T) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil || !strings.Contains(string(status), "\nCapEff:\t0000000000000000\n") {
		t.Fatalf("this process has privileges: %v\n%s", err, status)
	}
	stated := regexp.MustCompile(`Type: (\w[\w ]*?) +Mode: +(\d+)[\s\S]*User: +(\d+) +Group: +(\d+)`)
	number := regexp.MustCompile(`Device major/minor number: (\S+)`)
	want := map[string]map[string]string{
		"owners and modes": {"a": "regular 0640 1000:1001", "su": "regular 04755 0:0", "sg": "regular 02755 0:42", "d": "directory 02770 7:8"},
		"devices":          {"dev/null": "character special 0666 0:0 01:03", "dev/sda": "block special 0660 0:6 08:00", "dev/pipe": "FIFO 0622 0:0"},
		"home":             {"root": "directory 0700 0:0"},
	}
	looked := 0
	sums := privileged(t, func(image, rootfs string) {
		if fi, err := os.Stat(rootfs); err != nil || fi.Sys().(*syscall.Stat_t).Uid != uint32(os.Getuid()) {
			t.Errorf("%s is not this user's: %v, %v", rootfs, fi, err)
		}
		for name, want := range want[image] {
			looked++
			text := debugfs(t, rootfs, "stat /"+name)
			m := stated.FindStringSubmatch(text)
			if m == nil {
				t.Errorf("%s of %s: %s", name, image, text)
				continue
			}
			got := fmt.Sprintf("%s %s %s:%s", m[1], m[2], m[3], m[4])
			if n := number.FindStringSubmatch(text); n != nil {
				got += " " + n[1]
			}
			if got != want {
				t.Errorf("%s of %s is %q, want %q\n%s", name, image, got, want, text)
			}
		}
		if image == "attributes" {
			looked++
			if text := debugfs(t, rootfs, "ea_list /ping"); !strings.Contains(text, "security.capability") {
				t.Errorf("ping has the attributes %s", text)
			}
		}
	})
	if looked != 9 {
		t.Errorf("%d files were looked at", looked)
	}
	for _, line := range sums {
		fmt.Println(line)
	}
}
