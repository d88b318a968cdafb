//go:build e2e

package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

// mirror gives every test that a test program ran elsewhere a test here, with its output and verdict, while
// it runs: it is shown, counted and named like one of ours.
type mirror struct {
	events *json.Decoder
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
		var e event
		if err := m.events.Decode(&e); err != nil {
			if name != "" || !errors.Is(err, io.EOF) {
				t.Errorf("the test program ended in the middle of this test: %v", err)
			}
			return
		}
		switch {
		case e.Action == "run" && (name == "" || strings.HasPrefix(e.Test, name+"/")):
			child := strings.TrimPrefix(strings.TrimPrefix(e.Test, name), "/")
			t.Run(child, func(t *testing.T) { m.run(t, e.Test) })
		case e.Test != name && e.Action != "output":
			t.Errorf("%s of %q in the middle of %q: tests that run side by side cannot be mirrored", e.Action, e.Test, name)
		case e.Action == "output":
			if !frame.MatchString(e.Output) {
				fmt.Fprint(t.Output(), e.Output)
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
