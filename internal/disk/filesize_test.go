package disk

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// limitedEnv is set for the process of TestFileSizeLimit that has one.
const limitedEnv = "BANGER_TEST_FILE_SIZE_LIMIT"

// TestFileSizeLimit: a size that the filesystem lets no file be, as 16 TiB on ext4, is refused, nothing has changed and nothing is
// left. A process's own limit (setrlimit(2)) stands for the filesystem's: both are EFBIG, and the runtime ignores SIGXFSZ.
func TestFileSizeLimit(t *testing.T) {
	if os.Getenv(limitedEnv) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestFileSizeLimit$", "-test.v")
		cmd.Env = append(os.Environ(), limitedEnv+"=yes")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestFileSizeLimit") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	dir := t.TempDir()
	from := template(t, vm.GiB)
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "two")
	for _, path := range []string{one, two} {
		if _, err := NewFromTemplate(ctx, from, path, 4*vm.GiB); err != nil {
			t.Fatal(err)
		}
	}
	limit := unix.Rlimit{Cur: uint64(6 * vm.GiB), Max: uint64(6 * vm.GiB)}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	for what, try := range map[string]func() error{
		"grow":     func() error { return Grow(two, 10*vm.GiB) },
		"grow all": func() error { return GrowAll(Growth{one, 5 * vm.GiB}, Growth{two, 10 * vm.GiB}) },
		"new": func() error {
			_, err := NewFromTemplate(ctx, from, filepath.Join(dir, "three"), 10*vm.GiB)
			return err
		},
	} {
		err := try()
		if !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "is larger than this filesystem lets a file be") || fault.HintOf(err) != "choose a smaller size" {
			t.Errorf("%s: %v; hint %q", what, err, fault.HintOf(err))
		}
		for _, path := range []string{one, two} {
			if fi, err := os.Stat(path); err != nil || fi.Size() != 4*vm.GiB {
				t.Errorf("after %s: %s: %v, %v", what, path, fi, err)
			}
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
			t.Errorf("after %s: %v, %v", what, left, err)
		}
	}
	if err := Grow(one, 6*vm.GiB); err != nil {
		t.Errorf("up to the limit: %v", err)
	}
}
