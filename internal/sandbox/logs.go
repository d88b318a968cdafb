package sandbox

import (
	"bytes"
	"context"
	"errors"
	"io/fs"

	"git.thaloco.com/thaloco/banger/internal/console"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// LogRequest is what is wanted of a VM's log.
type LogRequest struct {
	Lines  int  // from the end; negative: all
	Follow bool // go on with what is written
	VMM    bool // only what has the form of the VMM's and banger's own lines
	Plain  bool // without anything that a terminal acts upon
}

// ReadLog sends a VM's log, whole lines at a time if they are chosen or changed. With Follow it ends
// with the VM's deletion, which is no error, or with ctx. fault.Precondition if the VM was never started.
func (s *Service) ReadLog(ctx context.Context, id vm.ID, r LogRequest, send func([]byte) error) error {
	v, err := s.known(id)
	if err != nil {
		return err
	}
	lines := r.Lines
	pass := send
	rest := func() error { return nil }
	if r.VMM || r.Plain {
		l := newLogLines(r, send)
		pass, rest = l.take, l.rest
	}
	if r.VMM && lines >= 0 { // chosen from all: the VMM's last ones may be far from the end
		return s.lastOwn(ctx, v, r, send)
	}
	err = console.Read(ctx, s.logFile(id), lines, r.Follow, pass)
	if errors.Is(err, fs.ErrNotExist) {
		return neverStarted(v)
	}
	return errors.Join(err, rest())
}

func neverStarted(v vm.VM) error {
	return fault.New(fault.Precondition, v.Name, "has no log: it was never started").WithHint("banger vm start %s", v.Name)
}

// lastOwn sends the last lines of the VMM's own, then what is written.
func (s *Service) lastOwn(ctx context.Context, v vm.VM, r LogRequest, send func([]byte) error) error {
	log, err := console.Tail(s.logFile(v.ID), 2*console.Max)
	if errors.Is(err, fs.ErrNotExist) {
		return neverStarted(v)
	}
	if err != nil {
		return err
	}
	var chosen []byte
	l := newLogLines(r, func(b []byte) error { chosen = append(chosen, b...); return nil })
	if err := errors.Join(l.take(log), l.rest()); err != nil {
		return err
	}
	if chosen = console.LastLines(chosen, r.Lines); len(chosen) > 0 {
		if err := send(chosen); err != nil {
			return err
		}
	}
	if !r.Follow {
		return nil
	}
	r.Lines = 0
	l = newLogLines(r, send)
	return console.Read(ctx, s.logFile(v.ID), 0, true, l.take)
}

// logLines chooses and changes a log's lines.
type logLines struct {
	request LogRequest
	send    func([]byte) error
	cut     lines
}

func newLogLines(r LogRequest, send func([]byte) error) *logLines {
	return &logLines{request: r, send: send, cut: lines{ends: "\n"}}
}

func (l *logLines) take(b []byte) error {
	var out []byte
	l.cut.take(b, func(line []byte) { out = l.line(line, out) })
	if len(out) == 0 {
		return nil
	}
	return l.send(out)
}

// rest sends a last line that does not end.
func (l *logLines) rest() error {
	var out []byte
	l.cut.rest(func(line []byte) { out = l.line(line, out) })
	if len(out) == 0 {
		return nil
	}
	return l.send(out)
}

func (l *logLines) line(line, out []byte) []byte {
	line = bytes.TrimRight(line, "\r\n")
	if l.request.VMM && !console.Own(line) {
		return out
	}
	if l.request.Plain {
		line = []byte(boot.Visible(string(line)))
	}
	return append(append(out, line...), '\n')
}
