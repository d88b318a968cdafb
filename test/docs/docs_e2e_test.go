//go:build e2e

package docs

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// What pages say of the inside of a VM is so: their blocks marked real, in one real VM, which the session in README.md
// makes. It needs what `make build` and `make runtime` make.
func TestReal(t *testing.T) {
	checkout, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(checkout, "banger")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v: make build runtime", err)
	}
	work := t.TempDir()
	// Root's VM would be on a bridge: a link and rules of this machine's own, which tests leave alone.
	config := filepath.Join(work, "config.toml")
	if err := os.WriteFile(config, []byte("network = \"user\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{"BANGERD=", "BANGER_CONFIG=" + config, "BANGER_STATE_DIR=" + filepath.Join(work, "state"), "XDG_CACHE_HOME=" + filepath.Join(work, "cache")}
	for _, name := range []string{"bin", "project"} {
		if err := os.Mkdir(filepath.Join(work, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// A link, and not the checkout's directory in PATH: there are other programs in it.
	if err := os.Symlink(program, filepath.Join(work, "bin", "banger")); err != nil {
		t.Fatal(err)
	}
	env = append(os.Environ(), append(env, "PATH="+filepath.Join(work, "bin")+":"+os.Getenv("PATH"))...)
	banger := func(args ...string) ([]byte, error) {
		cmd := exec.Command(program, args...)
		cmd.Env = env
		return cmd.CombinedOutput()
	}
	t.Cleanup(func() {
		for _, args := range [][]string{{"vm", "delete", "calm-otter"}, {"daemon", "stop"}} {
			if out, err := banger(args...); err != nil {
				t.Errorf("banger %v: %v\n%s", args, err, out)
			}
		}
	})
	s, err := startShell(filepath.Join(work, "project"), env, 3*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	all := pages(t)
	first := slices.IndexFunc(all, func(p page) bool { return p.name == "README.md" })
	readme := all[first]
	all = slices.Insert(slices.Delete(all, first, first+1), 0, readme)
	ran := 0
	for _, p := range all {
		for _, b := range p.blocks {
			if !b.real {
				continue
			}
			ran++
			if err := s.runBlock(b); err != nil && p.name == "README.md" {
				t.Fatal(err) // without its VM nothing else works
			} else if err != nil {
				t.Error(err)
			}
		}
	}
	if err := s.close(); err != nil {
		t.Error(err)
	}
	if ran < 3 {
		t.Errorf("only %d blocks were run", ran)
	}
}
