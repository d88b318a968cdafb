package rundir

import (
	"os"
	"path/filepath"
	"testing"
)

// A directory is cleaned when no process of the VMM's is left in it, and need not be there.
func TestCleanAfter(t *testing.T) {
	dir := t.TempDir()
	cleaned := 0
	clean := func(d *Dir) error { cleaned++; return d.Remove("socket", "pid") }
	if err := CleanAfter(t.Context(), filepath.Join(dir, "gone"), "pid", "marker", clean); err != nil || cleaned != 0 {
		t.Errorf("a directory that is not there: %v, cleaned %d times", err, cleaned)
	}
	must(t, os.WriteFile(filepath.Join(dir, "socket"), nil, 0o600))
	if err := CleanAfter(t.Context(), dir, "pid", "marker", clean); err != nil || cleaned != 1 {
		t.Errorf("a directory without a process: %v, cleaned %d times", err, cleaned)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
