package filelock

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func opened(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// TestWait: one that is held is waited for, a shared one is not held against another, and a wait that is given up
// leaves nothing that holds the lock once its file is closed.
func TestWait(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	first := opened(t, path)
	if err := Wait(t.Context(), first, unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	second := opened(t, path)
	if err := Wait(ctx, second, unix.LOCK_EX); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("with the lock held: %v", err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}

	third, got := opened(t, path), make(chan error, 1)
	go func() { got <- Wait(t.Context(), third, unix.LOCK_SH) }()
	select {
	case err := <-got:
		t.Fatalf("while another has it: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	fourth := opened(t, path)
	if err := Wait(t.Context(), fourth, unix.LOCK_SH); err != nil {
		t.Error(err)
	}
}
