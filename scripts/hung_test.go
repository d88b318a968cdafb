package scripts_test

import (
	"os/exec"
	"strings"
	"testing"
)

// TestHung: a test of the lab is tried again if the lab's host failed under it, and none if any other has a verdict.
func TestHung(t *testing.T) {
	const said = `"this is no verdict about banger"`
	event := func(test, action, output string) string {
		if output == "" {
			output = `""`
		}
		return `{"Test":"` + test + `","Action":"` + action + `","Output":` + output + `}`
	}
	fails := func(test, output string) string { return event(test, "output", output) + event(test, "fail", "") }
	passed := event("TestA", "output", said) + event("TestA", "pass", "") + `{"Package":"p","Action":"fail"}`
	for name, c := range map[string]struct {
		events, want string
		verdict      bool
	}{
		"one":                   {passed + fails("TestB", said), "TestB\n", false},
		"of several, its parts": {passed + fails("TestC/x", said) + fails("TestC/y", said) + fails("TestC", "") + fails("TestB", said), "TestB\nTestC\n", false},
		"beside a verdict":      {fails("TestB", said) + fails("TestD", `"wrong"`), "", true},
		"within one":            {fails("TestC/x", said) + fails("TestC/y", `"wrong"`) + fails("TestC", said), "", true},
		"of no test":            {passed, "", true},
		"nothing at all":        {"", "", true},
	} {
		cmd := exec.Command("jq", "-rs", "-f", "hung.jq")
		cmd.Stdin = strings.NewReader(c.events)
		out, err := cmd.Output()
		if string(out) != c.want || (err != nil) != c.verdict {
			t.Errorf("%s: %q, %v", name, out, err)
		}
	}
}
