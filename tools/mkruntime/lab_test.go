package main

import (
	"os"
	"path/filepath"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// TestLabIsBuiltOnce: the same packages and the same customize.sh are one host, which is built once. mmdebstrap is not there, so what would
// be built fails, and leaves the link to the last one.
func TestLabIsBuiltOnce(t *testing.T) {
	o := warmCache(t, "git\n")
	t.Chdir(t.TempDir())
	const script = "#!/bin/sh\n"
	write(t, labPackages, "procps # ps\n")
	write(t, labCustomize, script)
	c, err := openCache(t.Context(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	built, _, err := c.get(t.Context(), "lab", labKey([]string{"procps", labHostKernel}, script), false, func(dir string) ([]string, error) {
		write(t, filepath.Join(dir, labKernel), "a kernel")
		return []string{labKernel}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	o.to = filepath.Join(t.TempDir(), "dist/host")
	leads := func(when string) {
		t.Helper()
		if at, err := os.Readlink(o.to); err != nil || at != built {
			t.Errorf("%s: the link leads to %q, %v; want %s", when, at, err, built)
		}
	}
	for range 2 {
		if err := makeLab(t.Context(), quiet(), o); err != nil {
			t.Fatal(err)
		}
		leads("the same recipe")
	}
	write(t, labPackages, "# another comment\nprocps\n")
	if err := makeLab(t.Context(), quiet(), o); err != nil {
		t.Errorf("a comment: %v", err)
	}
	for name, change := range map[string][2]string{
		"a package": {labPackages, "procps\nstrace\n"},
		"a line":    {labCustomize, script + "true\n"},
	} {
		before, err := os.ReadFile(change[0])
		if err != nil {
			t.Fatal(err)
		}
		write(t, change[0], change[1])
		if err := makeLab(t.Context(), quiet(), o); !fault.Is(err, fault.Unavailable) {
			t.Errorf("%s: %v, want that it would be built", name, err)
		}
		leads(name)
		write(t, change[0], string(before))
	}
	if err := makeLab(t.Context(), quiet(), o); err != nil {
		t.Errorf("as before: %v", err)
	}
	o.to = ""
	if err := makeLab(t.Context(), quiet(), o); !fault.Is(err, fault.Invalid) {
		t.Errorf("without -to: %v", err)
	}
}
