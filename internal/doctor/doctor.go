// Package doctor owns the form of a finding and how a list of checks is run. What is checked
// belongs to each capability: doctor runs the same checks as the commands do, so it cannot drift.
package doctor

import (
	"context"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Severity of a finding.
type Severity string

// The severities. Only Fail makes `banger doctor` exit non-zero.
const (
	Pass Severity = "pass"
	Warn Severity = "warn"
	Fail Severity = "fail"
)

// Finding is the result of one check. Code is stable. Fix says what to type; whatever does not pass has one.
type Finding struct {
	Code     string
	Severity Severity
	Title    string
	Detail   string
	Fix      string
	// Repair does what Fix says. It is there only where that loses nothing and asks nobody, and may be called again.
	Repair func(context.Context) error
	Fixed  bool // it was repaired, and passes now
}

// Firewall is the code of findings about rules of the host's that keep VMs from what they were given.
const Firewall = "firewall"

// Check looks at something, and changes nothing.
type Check func(context.Context) []Finding

// Run runs checks in order. With fix it repairs what can be, then looks again: a finding is what was seen last.
func Run(ctx context.Context, checks []Check, fix bool) []Finding {
	var out []Finding
	for _, check := range checks {
		found := check(ctx)
		if !fix {
			out = append(out, found...)
			continue
		}
		failed, tried := map[string]error{}, map[string]bool{}
		for _, f := range found {
			if f.Severity != Pass && f.Repair != nil {
				tried[f.Code] = true
				if err := f.Repair(ctx); err != nil {
					failed[f.Code] = err
				}
			}
		}
		if len(tried) > 0 {
			found = check(ctx)
		}
		for _, f := range found {
			f.Fixed = tried[f.Code] && f.Severity == Pass
			if err := failed[f.Code]; err != nil && !f.Fixed {
				f.Detail += "; it could not be repaired: " + err.Error()
			}
			out = append(out, f)
		}
	}
	return out
}

// FromError makes a failing finding of an error: its text and its hint, or otherwise if it has none.
func FromError(code, title string, err error, otherwise string) Finding {
	return Finding{Code: code, Severity: Fail, Title: title, Detail: err.Error(), Fix: FixOf(err, otherwise)}
}

// FixOf is the hint of an error, or otherwise if it has none: whatever does not pass comes with something to type.
func FixOf(err error, otherwise string) string {
	if hint := fault.HintOf(err); hint != "" {
		return hint
	}
	return otherwise
}

// ShowLog shows what the daemon did before: the fix of what nobody has foreseen.
const ShowLog = "banger daemon logs"
