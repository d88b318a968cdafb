package cachedir

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/test/ownmounts"
)

// TestKeep: what was used last stays, as does what is young; directories go with what is in them, and other files are left alone.
func TestKeep(t *testing.T) {
	dir := t.TempDir()
	now := time.Now()
	for i := range 6 {
		path := filepath.Join(dir, "made-"+strconv.Itoa(i))
		if err := errors.Join(os.MkdirAll(filepath.Join(path, "deep"), 0o755), os.Chtimes(path, now, now.Add(time.Duration(i-10)*time.Hour))); err != nil {
			t.Fatal(err)
		}
	}
	other := filepath.Join(dir, "lock")
	if err := errors.Join(os.WriteFile(other, nil, 0o644), os.Chtimes(other, now, now.Add(-1000*time.Hour))); err != nil {
		t.Fatal(err)
	}
	if there, err := Use(t.Context(), filepath.Join(dir, "made-1")); !there || err != nil {
		t.Fatal(there, err)
	}
	if there, err := Use(t.Context(), filepath.Join(dir, "made-9")); there || err != nil {
		t.Fatal("one that is not there:", there, err)
	}
	ours := func(name string) bool { return strings.HasPrefix(name, "made-") }
	expect := func(n int, young time.Duration, want ...string) {
		t.Helper()
		if err := Keep(t.Context(), dir, n, young, ours); err != nil {
			t.Fatal(err)
		}
		list, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		var have []string
		for _, e := range list {
			have = append(have, e.Name())
		}
		if want = append([]string{"lock"}, want...); !slices.Equal(have, want) {
			t.Errorf("%d, %s: %v, not %v", n, young, have, want)
		}
	}
	expect(5, 0, "made-1", "made-2", "made-3", "made-4", "made-5")
	expect(1, 390*time.Minute, "made-1", "made-4", "made-5")
	expect(2, 0, "made-1", "made-5")
	expect(0, time.Minute, "made-1")
	expect(0, 0)
}

// TestUseAndKeepAtOnce: an entry of which Use has said that it is there is not taken away.
func TestUseAndKeepAtOnce(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "entry")
	old := time.Now().Add(-time.Hour)
	for range 1000 {
		if err := errors.Join(os.WriteFile(path, nil, 0o644), os.Chtimes(path, old, old)); err != nil {
			t.Fatal(err)
		}
		kept := make(chan error)
		go func() {
			kept <- Keep(context.Background(), dir, 0, time.Minute, nil)
		}()
		there, err := Use(t.Context(), path)
		if err := errors.Join(err, <-kept); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(path); there != (err == nil) {
			t.Fatalf("Use said %v, and then: %v", there, err)
		}
	}
}

// TestGivenUp: a wait for whoever has the directory ends with its context.
func TestGivenUp(t *testing.T) {
	dir := t.TempDir()
	held, err := lock(t.Context(), dir, unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Use(ctx, filepath.Join(dir, "entry")); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if err := Keep(ctx, filepath.Join(dir, "none"), 0, 0, nil); err != nil {
		t.Errorf("a directory that is not there: %v", err)
	}
}

// TestReadOnly: what is there is used also where no time can be noted.
func TestReadOnly(t *testing.T) {
	if !ownmounts.Inside(t) {
		return
	}
	dir := t.TempDir()
	if err := errors.Join(unix.Mount("tmpfs", dir, "tmpfs", 0, ""), os.WriteFile(filepath.Join(dir, "entry"), nil, 0o644),
		unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"entry": true, "none": false} {
		if there, err := Use(t.Context(), filepath.Join(dir, name)); there != want || err != nil {
			t.Errorf("%s: %v, %v", name, there, err)
		}
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
}
