package disk

import (
	"os"
	"path/filepath"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func TestFilesystemOf(t *testing.T) {
	dir := t.TempDir()
	f, err := FilesystemOf(dir)
	if err != nil || f.Name == "" || f.Free <= 0 || f.Total < f.Free {
		t.Fatalf("%+v, %v", f, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
	if _, err := FilesystemOf(filepath.Join(dir, "none")); !fault.Is(err, fault.NotFound) {
		t.Errorf("a directory that is not there: %v", err)
	}
	const shm = "/dev/shm"
	if f, err := FilesystemOf(shm); err != nil || f.Name == "tmpfs" && (f.Doubt == "" || f.Clones) {
		t.Errorf("%s: %+v, %v", shm, f, err)
	}
}
