package client

import (
	"os"
	"path/filepath"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// TestKeptHome: a root with the home of the user who called sudo makes nothing in it. Another root does.
func TestKeptHome(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("it takes root to be the root that sudo made")
	}
	home := t.TempDir()
	if err := os.Chown(home, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	c := New(Options{Socket: filepath.Join(t.TempDir(), "bangerd.sock"), StateDir: filepath.Join(home, ".local", "state", "banger"), Daemon: "/nowhere/bangerd"})
	t.Setenv("SUDO_UID", "12345")
	if err := c.start(t.Context()); !fault.Is(err, fault.Permission) || fault.HintOf(err) == "" {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	if left, err := os.ReadDir(home); err != nil || len(left) != 0 {
		t.Errorf("left there: %v, %v", left, err)
	}
	for _, uid := range []string{"", "0", "54321"} {
		t.Setenv("SUDO_UID", uid)
		if err := c.start(t.Context()); !fault.Is(err, fault.Unavailable) { // there is no such daemon
			t.Errorf("called by %q: %v", uid, err)
		}
	}
}
