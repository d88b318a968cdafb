// Package fault owns the one error type that crosses package borders: a code, the operation,
// what it was done to, the cause, and a hint that says what to type next.
//
// It imports nothing of ours, never logs, and never decides an HTTP status or an exit code:
// internal/server and internal/cli each map codes in one place.
package fault

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Code classifies a fault for programs. Codes are stable: they appear in JSON output.
type Code string

// The codes. A new one needs its mapping in internal/server and internal/cli.
const (
	Invalid      Code = "invalid"        // the input itself is wrong; trying again cannot help
	NotFound     Code = "not_found"      // the named thing does not exist
	Exists       Code = "already_exists" // the name is taken
	Ambiguous    Code = "ambiguous"      // a reference matches more than one thing
	Precondition Code = "precondition"   // right request, wrong state (start it first, stop it first)
	Busy         Code = "busy"           // another operation holds the thing
	Exhausted    Code = "exhausted"      // disk, memory, addresses are used up
	Permission   Code = "permission"     // the system refuses this user
	Unavailable  Code = "unavailable"    // the daemon, the guest or a tool cannot be reached
	Timeout      Code = "timeout"        // a bounded wait ran out; the fault names the stage
	Cancelled    Code = "cancelled"      // the caller or an operator cancelled it
	Corrupt      Code = "corrupt"        // an artifact or a record is damaged
	Unsupported  Code = "unsupported"    // this host or version cannot do it
	VersionSkew  Code = "version_skew"   // client and daemon, or daemon and database, do not fit
	Failed       Code = "failed"         // what the user wanted run was run, and failed by itself: a step of an image build
	Internal     Code = "internal"       // a defect of ours
)

// Error is the fault itself. Op and Subject are short ("vm create", "calm-otter"); Message is one
// sentence for people without a trailing period; Hint, if set, is what to type or do next and is
// printed on a line of its own; Cause is for the log and for --output json, and may be nil.
type Error struct {
	Code    Code
	Op      string
	Subject string
	Message string
	Hint    string
	Cause   error
}

// Error renders "subject: message: cause" for logs and wrapping; the hint is not part of it.
func (e *Error) Error() string {
	var parts []string
	if e.Subject != "" {
		parts = append(parts, e.Subject)
	}
	if e.Message != "" {
		parts = append(parts, e.Message)
	}
	if e.Cause != nil {
		parts = append(parts, e.Cause.Error())
	}
	if len(parts) == 0 {
		return string(e.Code)
	}
	return strings.Join(parts, ": ")
}

// Unwrap gives the cause to errors.Is and errors.As.
func (e *Error) Unwrap() error { return e.Cause }

// New makes a fault without a cause.
func New(code Code, subject, format string, args ...any) *Error {
	return &Error{Code: code, Subject: subject, Message: fmt.Sprintf(format, args...)}
}

// Wrap makes a fault around cause. A nil cause gives a fault without one.
func Wrap(cause error, code Code, subject, format string, args ...any) *Error {
	return &Error{Code: code, Subject: subject, Message: fmt.Sprintf(format, args...), Cause: cause}
}

// WithHint sets the hint and returns the same fault, for use in a return statement.
func (e *Error) WithHint(format string, args ...any) *Error {
	e.Hint = fmt.Sprintf(format, args...)
	return e
}

// WithOp sets the operation and returns the same fault.
func (e *Error) WithOp(op string) *Error {
	e.Op = op
	return e
}

// CodeOf returns the code of the outermost fault in err's chain; context errors count as
// Cancelled and Timeout, anything else as Internal. CodeOf(nil) is "".
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	var f *Error
	switch {
	case errors.As(err, &f):
		return f.Code
	case errors.Is(err, context.Canceled):
		return Cancelled
	case errors.Is(err, context.DeadlineExceeded):
		return Timeout
	}
	return Internal
}

// Is reports whether err's outermost fault carries code.
func Is(err error, code Code) bool { return err != nil && CodeOf(err) == code }

// HintOf returns the first non-empty hint in err's tree, depth first, as errors.As walks it.
func HintOf(err error) string {
	if f, ok := err.(*Error); ok && f.Hint != "" { //nolint:errorlint // this is the walk itself
		return f.Hint
	}
	switch u := err.(type) { //nolint:errorlint // likewise
	case interface{ Unwrap() error }:
		if next := u.Unwrap(); next != nil {
			return HintOf(next)
		}
	case interface{ Unwrap() []error }:
		for _, next := range u.Unwrap() {
			if hint := HintOf(next); hint != "" {
				return hint
			}
		}
	}
	return ""
}
