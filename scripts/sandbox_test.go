package scripts_test

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestBundleKey: `make sandbox` makes the bundle again after a change of any package that makes it.
func TestBundleKey(t *testing.T) {
	script, err := os.ReadFile("sandbox.sh")
	if err != nil {
		t.Fatal(err)
	}
	looked := regexp.MustCompile(`(?s)bundle_key\(\) \{\n(.*?)\n\}`).FindSubmatch(script)
	if looked == nil {
		t.Fatal("sandbox.sh has no bundle_key")
	}
	words := strings.Fields(string(looked[1]))
	cmd := exec.Command("go", "list", "-deps", "-f", "{{if .Module}}{{.Module.Path}} {{.ImportPath}}{{end}}", "./tools/mkruntime")
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	const module = "git.thaloco.com/thaloco/banger"
	n := 0
	for line := range strings.Lines(string(out)) {
		if of, path, _ := strings.Cut(strings.TrimSpace(line), " "); of == module {
			n++
			if folder := strings.TrimPrefix(path, module+"/"); !slices.Contains(words, folder) {
				t.Errorf("bundle_key does not look at %s", folder)
			}
		}
	}
	if n < 5 {
		t.Errorf("only %d packages make the bundle: the test looks in the wrong place", n)
	}
}
