package oci

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// TestSweep: what was not used lately goes, then what was used longest ago until the rest is small enough. A file that is none
// of a cache's stays.
func TestSweep(t *testing.T) {
	now := time.Now()
	fill := func(t *testing.T) string {
		dir := t.TempDir()
		for name, age := range map[string]time.Duration{
			"sha256-" + strings.Repeat("a", 64):           time.Hour,
			"sha256-" + strings.Repeat("b", 64):           2 * time.Hour,
			"sha256-" + strings.Repeat("c", 64) + ".part": 3 * time.Hour,
			"sha256-" + strings.Repeat("d", 64):           50 * time.Hour,
			cacheLock:                                     0, "notes": 100 * time.Hour,
		} {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, make([]byte, 64<<10), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(path, now.Add(-age), now.Add(-age)); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	left := func(t *testing.T, dir string) (out string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if blob, ok := strings.CutPrefix(e.Name(), "sha256-"); ok {
				out += blob[:1]
			} else {
				out += "." // the lock, and what is not ours
			}
		}
		return out
	}
	all := Keep{Bytes: 1 << 30}
	for name, c := range map[string]struct {
		keep Keep
		left string
		gone int
	}{
		"all":      {Keep{}, "..", 4},
		"none":     {all, "..abcd", 0},
		"by age":   {Keep{Bytes: 1 << 30, Since: now.Add(-49 * time.Hour)}, "..abc", 1},
		"by size":  {Keep{Bytes: 150 << 10}, "..ab", 2},
		"by both":  {Keep{Bytes: 150 << 10, Since: now.Add(-90 * time.Minute)}, "..a", 3},
		"too much": {Keep{Bytes: 10 << 10}, "..", 4},
	} {
		t.Run(name, func(t *testing.T) {
			dir := fill(t)
			seen, err := Sweep(dir, c.keep, true)
			if err != nil || left(t, dir) != "..abcd" {
				t.Errorf("a dry run: %v, and leaves %s", err, left(t, dir))
			}
			swept, err := Sweep(dir, c.keep, false)
			if err != nil || swept != seen || swept.Layers != c.gone || swept.Bytes < int64(c.gone)*64<<10 || left(t, dir) != c.left {
				t.Errorf("%+v after %+v, %v, and leaves %s", swept, seen, err, left(t, dir))
			}
		})
	}
	if swept, err := Sweep(filepath.Join(t.TempDir(), "none"), Keep{}, false); err != nil || swept != (Swept{}) {
		t.Errorf("without a cache: %+v, %v", swept, err)
	}
}

// TestSweepWaitsForNobodyAndTakesNothingFromPulls: the layers of an image stay from its pull until it is closed, and a pull that
// failed holds nothing.
func TestSweepWaitsForNobodyAndTakesNothingFromPulls(t *testing.T) {
	h := newHub(t)
	ref := h.push(t, "x:1", imageOf(t, tarOf(t, m("a", "a")), tarOf(t, m("b", "b"))))
	p := newPuller(t)
	img := pull(t, p, ref)
	if swept, err := Sweep(p.Cache, Keep{}, false); err != nil || swept != (Swept{Busy: true}) {
		t.Errorf("beside a pull: %+v, %v", swept, err)
	}
	dir := t.TempDir()
	if _, err := img.Flatten(t.Context(), mkfs(t), filepath.Join(dir, "rootfs"), filepath.Join(dir, "seed"), nil); err != nil {
		t.Fatal(err)
	}
	img.Close()
	if _, err := p.Pull(t.Context(), strings.Replace(ref, "x:1", "x:none", 1)); !fault.Is(err, fault.NotFound) {
		t.Errorf("no such image: %v", err)
	}
	if swept, err := Sweep(p.Cache, Keep{}, false); err != nil || swept.Layers != 2 || swept.Busy || len(cached(t, p)) != 0 {
		t.Errorf("after it: %+v, %v, and %v are left", swept, err, cached(t, p))
	}
	// Pulled again, it is fetched again.
	pull(t, p, ref)
	if got := cached(t, p); len(got) != 2 {
		t.Errorf("the cache holds %v", got)
	}
}
