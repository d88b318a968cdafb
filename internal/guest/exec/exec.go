// Package exec owns what the two ends of an exec stream say to each other, and the host's end of it:
// a command that runs in a guest with its input, output, signals and terminal.
//
// It runs no program: internal/guest/agentd does, in the guest. It never trusts the peer: frames, what
// is buffered and what a status says are bounded on both ends.
//
// # The stream
//
// After the header and the agent's "ok" both sides send frames (package frame). The host begins with a
// request. Then come, in any order:
//
//	host  -> guest   input, its end, signal, size of the terminal, credit for output and errors
//	guest -> host    output, errors, credit for input; the last frame is the status
//
// Each of input, output and errors has a window of its own: a side sends no more than Window bytes that
// the other has not given credit for, and the other gives it as they are consumed. So no side ever
// stops reading, and a signal is never stuck behind input that nobody takes. A stream that ends without
// a status was cut; a guest whose host is gone hangs the command up.
package exec

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/frame"
)

// The kinds of frames.
const (
	KindRequest = 'R' // Request in JSON
	KindInput   = 'i' // empty: no more comes
	KindOutput  = 'o'
	KindErrors  = 'e'
	KindCredit  = 'c' // kind of the data, number of bytes (32 bits)
	KindSignal  = 's' // number (8 bits)
	KindSize    = 'w' // rows, columns (16 bits each)
	KindStatus  = 'x' // Status in JSON
)

// Bounds of a stream.
const (
	// Window is how many bytes of one direction may be under way, hence in the memory of either side.
	Window = 512 << 10
	// chunk is the most data in a frame.
	chunk = 32 << 10
	// maxStatus bounds a status frame in bytes.
	maxStatus = 8 << 10
)

// Request is what is to be run. Relative paths and names are the guest's.
type Request struct {
	Args []string `json:"args"`           // the program, looked up in PATH if it has no slash, and its arguments
	Env  []string `json:"env,omitempty"`  // KEY=VALUE, over those of a log-in
	Dir  string   `json:"dir,omitempty"`  // working directory; empty: the user's home
	User string   `json:"user,omitempty"` // name or number, :group may follow; empty: root
	TTY  bool     `json:"tty,omitempty"`  // a terminal of its own; errors come with the output
	Rows uint16   `json:"rows,omitempty"`
	Cols uint16   `json:"cols,omitempty"`
}

// Encode renders and checks the request.
func (r Request) Encode() ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	b, err := json.Marshal(r)
	if err == nil && len(b) > frame.Max {
		err = fmt.Errorf("the command and its environment have %d bytes, at most %d can be sent", len(b), frame.Max)
	}
	return b, err
}

// ParseRequest reads what Encode rendered.
func ParseRequest(b []byte) (Request, error) {
	var r Request
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("the request is not JSON: %w", err)
	}
	return r, r.check()
}

func (r Request) check() error {
	if len(r.Args) == 0 || r.Args[0] == "" {
		return errors.New("there is no command to run")
	}
	for _, s := range append(append([]string{r.Dir, r.User}, r.Args...), r.Env...) {
		if strings.ContainsRune(s, 0) { // execve(2) would end it there
			return fmt.Errorf("%q has a zero byte in it", s)
		}
	}
	for _, e := range r.Env {
		if key, _, ok := strings.Cut(e, "="); !ok || key == "" {
			return fmt.Errorf("%q is no variable: write NAME=VALUE", e)
		}
	}
	return nil
}

// Codes of a command that did not run, as shells and docker exec have them.
const (
	CodeCannotRun = 126
	CodeNotFound  = 127
)

// Status is how a command ended. Of Failed, Signal and Code the first that is set counts.
type Status struct {
	Failed string `json:"failed,omitempty"` // why it did not run; Code is CodeCannotRun or CodeNotFound
	Signal int    `json:"signal,omitempty"` // what killed it
	Code   int    `json:"code"`             // 0 to 255
}

// Exit is the exit code that a shell would have for it: 128 and the signal for what was killed.
func (s Status) Exit() int {
	if s.Failed == "" && s.Signal != 0 {
		return 128 + s.Signal
	}
	return s.Code
}

// Encode renders the status.
func (s Status) Encode() []byte {
	s.Failed = boot.Printable(s.Failed)
	b, err := json.Marshal(s)
	if err != nil { // of two numbers and a string there is none
		return []byte("{}")
	}
	return b
}

// ParseStatus reads a status that a guest sent: what it says is in its bounds and can be shown.
func ParseStatus(b []byte) (Status, error) {
	var s Status
	if len(b) > maxStatus {
		return s, fmt.Errorf("a status of %d bytes", len(b))
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("the status is not JSON: %w", err)
	}
	if s.Signal < 0 || s.Signal > 64 || s.Code < 0 || s.Code > 255 || s.Failed != "" && s.Code == 0 {
		return s, fmt.Errorf("no command ends with code %d and signal %d", s.Code, s.Signal)
	}
	s.Failed = boot.Printable(s.Failed)
	return s, nil
}

// Size is a terminal's size in characters.
type Size struct{ Rows, Cols uint16 }

func (s Size) encode() []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, s.Rows), s.Cols)
}

// ParseSize reads the payload of a size frame.
func ParseSize(b []byte) (Size, error) {
	if len(b) != 4 {
		return Size{}, fmt.Errorf("a terminal's size of %d bytes", len(b))
	}
	return Size{Rows: binary.BigEndian.Uint16(b), Cols: binary.BigEndian.Uint16(b[2:])}, nil
}

// ParseSignal reads the payload of a signal frame.
func ParseSignal(b []byte) (int, error) {
	if len(b) != 1 || b[0] == 0 || b[0] > 64 {
		return 0, fmt.Errorf("%x is no signal", b)
	}
	return int(b[0]), nil
}
