package scripts_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// checkout is a directory with test.sh in it, whose stages but the counted one do nothing: gotestsum prints verdict, and ends
// with status. It returns what runs the script.
func checkout(t *testing.T, verdict, status string) func(args ...string) *exec.Cmd {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"test.sh", "stage.sh"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		program(t, filepath.Join(dir, "scripts", name), string(text))
	}
	bin := filepath.Join(dir, "bin")
	program(t, filepath.Join(dir, "scripts", "deps.sh"), "#!/bin/sh\n")
	program(t, filepath.Join(bin, "make"), "#!/bin/sh\n")
	// As gotestsum 1.13 ends its output; its file of events is read as well.
	program(t, filepath.Join(dir, "cache/banger/tools/gotestsum-v1.13.0/gotestsum"),
		"#!/bin/sh\nwhile [ \"$1\" != --jsonfile ]; do shift; done\n: >\"$2\"\necho '"+verdict+"'\nexit "+status+"\n")
	return func(args ...string) *exec.Cmd {
		cmd := exec.Command("bash", append([]string{filepath.Join(dir, "scripts", "test.sh")}, args...)...)
		cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "XDG_CACHE_HOME="+filepath.Join(dir, "cache"))
		return cmd
	}
}

func program(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
}

// TestBootsAreCounted: the summary of `make test-boots` tells what passed and what failed, not what was asked for.
func TestBootsAreCounted(t *testing.T) {
	for _, c := range []struct{ verdict, status, want, no string }{
		{"DONE 4 tests in 31.052s", "0", "4 tests passed, 0 failed, 0 skipped", "FAIL  boots"},
		{"DONE 4 tests, 2 failures in 31.052s", "1", "2 tests passed, 2 failed, 0 skipped", "pass  boots"},
	} {
		// The exit code is not looked at: what other tests put in /tmp meanwhile fails a stage of its own.
		out, _ := checkout(t, c.verdict, c.status)("boots", "3").CombinedOutput()
		if !strings.Contains(string(out), c.want) || strings.Contains(string(out), c.no) {
			t.Errorf("%s, exit %s: want %q and no %q in\n%s", c.verdict, c.status, c.want, c.no, out)
		}
	}
	for _, args := range [][]string{{"boots", "0"}, {"boots", "many"}, {"boots", "-1"}, {"boost"}} {
		cmd := checkout(t, "", "0")(args...)
		if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(out), "usage: ") {
			t.Errorf("%q: exit %d\n%s", args, cmd.ProcessState.ExitCode(), out)
		}
	}
}
