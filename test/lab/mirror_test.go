//go:build e2e

package lab

import (
	"regexp"
	"strings"
	"testing"
)

// event is a line of test2json (go doc test2json).
type event struct {
	Action string
	Test   string
	Output string
}

// shown is what people are shown of it.
func (e event) shown() string {
	if e.Action == "run" {
		return "- " + e.Test + "\n"
	}
	return e.Output
}

// said is all that was printed.
func said(events []event) string {
	var out strings.Builder
	for _, e := range events {
		out.WriteString(e.Output)
	}
	return out.String()
}

// mirror gives every test that a test program ran elsewhere a test here, with its verdict: it is counted and named like one of
// ours. What it printed was shown before.
type mirror struct {
	events []event // what is still to come
	// What became of the tests, by their names there; a skipped one with its reason.
	passed, skipped []string
}

var (
	// What the testing package says of its own, which is said here again.
	frame = regexp.MustCompile(`^\s*(=== (RUN|PAUSE|CONT|NAME)\s|--- (PASS|FAIL|SKIP|BENCH): )`)
	// Where a line was logged.
	origin = regexp.MustCompile(`^\s*[A-Za-z0-9_]+\.go:[0-9]+: `)
)

// run mirrors what follows under the test of that name there, "" for the program as a whole.
func (m *mirror) run(t *testing.T, name string) {
	said := ""
	for {
		if len(m.events) == 0 {
			if name != "" {
				t.Error("the test program ended in the middle of this test")
			}
			return
		}
		e := m.events[0]
		m.events = m.events[1:]
		switch {
		case e.Action == "run" && (name == "" || strings.HasPrefix(e.Test, name+"/")):
			child := strings.TrimPrefix(strings.TrimPrefix(e.Test, name), "/")
			t.Run(child, func(t *testing.T) { m.run(t, e.Test) })
		case e.Test != name && e.Action != "output":
			t.Errorf("%s of %q in the middle of %q: tests that run side by side cannot be mirrored", e.Action, e.Test, name)
		case e.Action == "output":
			if !frame.MatchString(e.Output) {
				said += e.Output
			}
		case e.Action == "skip":
			// The last that was said before is the reason.
			lines := strings.Split(strings.TrimSpace(said), "\n")
			reason := origin.ReplaceAllString(lines[len(lines)-1], "")
			m.skipped = append(m.skipped, name+": "+reason)
			t.Skip(reason)
		case e.Action == "fail":
			t.Fail()
			return
		case e.Action == "pass":
			if name != "" {
				m.passed = append(m.passed, name)
				return
			}
		}
	}
}
