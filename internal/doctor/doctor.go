// Package doctor owns the form of a finding and how a list of checks is run. What is checked
// belongs to each capability: doctor runs the same checks as the commands do, so it cannot drift.
package doctor

import "git.thaloco.com/thaloco/banger/internal/fault"

// Severity of a finding.
type Severity string

// The severities. Only Fail makes `banger doctor` exit non-zero.
const (
	Pass Severity = "pass"
	Warn Severity = "warn"
	Fail Severity = "fail"
)

// Finding is the result of one check. Code is stable, Fix says what to type.
type Finding struct {
	Code     string
	Severity Severity
	Title    string
	Detail   string
	Fix      string
}

// FromError makes a failing finding of a fault: its text and its hint.
func FromError(code, title string, err error) Finding {
	return Finding{Code: code, Severity: Fail, Title: title, Detail: err.Error(), Fix: fault.HintOf(err)}
}
