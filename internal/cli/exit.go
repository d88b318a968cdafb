package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/pflag"

	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

var errHelp = pflag.ErrHelp

// The exit codes; docs/cli.md lists them for users. `vm ssh` passes the remote's own through.
const (
	exitOK          = 0
	exitFailed      = 1
	exitInvalid     = 2
	exitNotFound    = 3
	exitState       = 4 // exists already, wrong state, busy
	exitExhausted   = 5
	exitTimeout     = 6
	exitUnavailable = 7
	exitInterrupted = 130 // 128 + SIGINT, as shells have it
)

// exitMeanings is what the exit codes say.
var exitMeanings = map[int]string{
	exitOK:          "done",
	exitFailed:      "failed",
	exitInvalid:     "wrong command line or input; trying again cannot help",
	exitNotFound:    "there is no such thing",
	exitState:       "it exists already, is in the wrong state, or is busy",
	exitExhausted:   "disk, memory or addresses are used up",
	exitTimeout:     "a bounded wait ran out",
	exitUnavailable: "the daemon, the guest or a tool cannot be reached, or versions do not fit",
	exitInterrupted: "Ctrl-C; what the daemon was doing goes on, and stderr says how to watch or cancel it",
}

// exitCodes is the one mapping of fault codes to exit codes.
var exitCodes = map[fault.Code]int{
	fault.Invalid:      exitInvalid,
	fault.NotFound:     exitNotFound,
	fault.Exists:       exitState,
	fault.Ambiguous:    exitInvalid,
	fault.Precondition: exitState,
	fault.Busy:         exitState,
	fault.Exhausted:    exitExhausted,
	fault.Permission:   exitFailed,
	fault.Unavailable:  exitUnavailable,
	fault.Timeout:      exitTimeout,
	fault.Cancelled:    exitFailed, // by an operator; a Ctrl-C here is errInterrupted
	fault.Corrupt:      exitFailed,
	fault.Unsupported:  exitFailed,
	fault.VersionSkew:  exitUnavailable,
	fault.Failed:       exitFailed,
	fault.Internal:     exitFailed,
}

// errInterrupted marks what ended because of Ctrl-C here.
var errInterrupted error = fault.New(fault.Cancelled, "", "interrupted")

// passed is another program's exit code that becomes ours. Everything was said already.
type passed int

func (p passed) Error() string { return fmt.Sprintf("exit status %d", int(p)) }

// reported is a failure whose errors were printed already, e.g. a batch's.
type reported struct{ code int }

func (reported) Error() string { return "failed" }

func exitCode(err error) int {
	var p passed
	var r reported
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &p):
		return int(p)
	case errors.As(err, &r):
		return r.code
	case errors.Is(err, errInterrupted), errors.Is(err, context.Canceled):
		return exitInterrupted
	}
	if code, ok := exitCodes[fault.CodeOf(err)]; ok {
		return code
	}
	return exitFailed
}

// errorView is an error under --output json.
type errorView struct {
	Code    string `json:"code"`
	Op      string `json:"op,omitempty"`
	Subject string `json:"subject,omitempty"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
	Cause   string `json:"cause,omitempty"`
}

func viewError(err error) *errorView {
	if err == nil {
		return nil
	}
	var f *fault.Error
	if !errors.As(err, &f) {
		return &errorView{Code: string(fault.CodeOf(err)), Message: err.Error()}
	}
	v := &errorView{Code: string(f.Code), Op: f.Op, Subject: f.Subject, Message: f.Message, Hint: fault.HintOf(f)}
	if f.Cause != nil {
		v.Cause = f.Cause.Error()
	}
	return v
}

// printError says on stderr what went wrong: in JSON, or as a sentence with the hint on a line of
// its own.
func (a *app) printError(err error) {
	var p passed
	var r reported
	if errors.As(err, &p) || errors.As(err, &r) {
		return
	}
	v := viewError(err)
	if a.json && a.output != outputName {
		enc := json.NewEncoder(a.stderr)
		enc.SetEscapeHTML(false)
		_ = enc.Encode(struct {
			Error *errorView `json:"error"`
		}{v})
		return
	}
	text := v.Message
	if text == "" {
		text = v.Cause
	}
	text = indent(text)
	if v.Subject != "" { // it may be what somebody typed, or a script was given
		text = client.Visible(v.Subject) + ": " + text
	}
	fmt.Fprintf(a.stderr, "%s %s\n", a.paintErr(red, "banger:"), text)
	if v.Cause != "" && !strings.Contains(text, v.Cause) {
		fmt.Fprintf(a.stderr, "  cause: %s\n", indent(without(v.Cause, v.Subject)))
	}
	if v.Hint != "" {
		fmt.Fprintf(a.stderr, "  hint: %s\n", v.Hint)
	}
}

// without leaves out a subject that the line above has named already. What ends in it, such as a path, is not it.
func without(cause, subject string) string {
	if subject == "" {
		return cause
	}
	prefix := subject + ": "
	for at := 0; ; at++ {
		i := strings.Index(cause[at:], prefix)
		if i < 0 {
			return cause
		}
		if at += i; at == 0 || strings.HasSuffix(cause[:at], ": ") || cause[at-1] == '\n' {
			return cause[:at] + cause[at+len(prefix):]
		}
	}
}

// indent puts the lines after the first one under it: causes have several when several things went
// wrong, or when a guest's console is quoted.
func indent(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i := range lines[1:] {
		lines[i+1] = "    " + strings.TrimSpace(lines[i+1])
	}
	return strings.Join(lines, "\n")
}
