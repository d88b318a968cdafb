//go:build e2e

package lab

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestVerdict gives these tests what a test program might say in the lab, in a process of its own, and looks at its verdict: that what fails
// there fails here, that a test which is not run any more is missed, and that no lab is a failure.
func TestVerdict(t *testing.T) {
	const said = "LAB_TEST_SAID"
	if text := os.Getenv(said); text != "" {
		var tests mirror
		for d := json.NewDecoder(strings.NewReader(text)); d.More(); {
			var e event
			if err := d.Decode(&e); err != nil {
				t.Fatal(err)
			}
			tests.events = append(tests.events, e)
		}
		tests.run(t, "")
		suite{Suite: Suite{Binary: "none.test"}, user: "user"}.judge(t, tests, 2)
		return
	}
	say := func(lines ...string) string {
		var out strings.Builder
		for _, line := range lines {
			action, rest, _ := strings.Cut(line, " ")
			name, output, _ := strings.Cut(rest, " ")
			if err := json.NewEncoder(&out).Encode(event{Action: action, Test: name, Output: output}); err != nil {
				t.Fatal(err)
			}
		}
		return out.String()
	}
	both := []string{"run TestA", "run TestA/b", "pass TestA/b", "pass TestA"}
	for _, c := range []struct {
		name   string
		events string
		lab    bool
		fails  string // "": it passes
	}{
		{"all pass", say(both...), true, ""},
		{"one fails", say(append(both, "run TestC", "output TestC     c_test.go:1: it broke\n", "fail TestC")...), true, "--- FAIL: TestVerdict/TestC "},
		{"one within another fails", say("run TestA", "pass TestA", "run TestB", "pass TestB", "run TestC", "run TestC/d", "fail TestC/d", "fail TestC"), true, "--- FAIL: TestVerdict/TestC/d "},
		{"it ends in the middle", say(append(both, "run TestC")...), true, "the test program ended in the middle of this test"},
		{"too few", say("run TestA", "pass TestA"), true, "only 1 tests passed, 2 did when this was written"},
		{"nothing at all", say("pass "), true, "only 0 tests passed, 2 did when this was written"},
		{"another is skipped", say(append(both, "run TestC", "output TestC     c_test.go:1: there is no such thing\n", "skip TestC")...), true, "TestC: there is no such thing"},
		{"no lab", say(both...), false, "no lab (make lab)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			checkout := t.TempDir()
			dir := filepath.Join(checkout, "test/lab")
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if c.lab {
				link := filepath.Join(checkout, HostDir)
				if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.Symlink(place.host, link); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestVerdict$", "-test.v")
			cmd.Dir, cmd.Env = dir, append(os.Environ(), said+"="+c.events)
			out, err := cmd.CombinedOutput()
			if (err == nil) != (c.fails == "") || !strings.Contains(string(out), c.fails) {
				t.Errorf("%v, want a failure with %q:\n%s", err, c.fails, out)
			}
		})
	}
}
