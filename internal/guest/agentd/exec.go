package agentd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"sync"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/exec"
	"git.thaloco.com/thaloco/banger/internal/guest/frame"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
)

// Bounds of a command's end.
const (
	// hangUpTime is what a command whose host is gone has to end by itself, from SIGHUP to SIGKILL.
	hangUpTime = 5 * time.Second
	// afterKill is how long the stream waits for a command that was killed: one that waits for a broken
	// device ends with the device.
	afterKill = 5 * time.Second
	// partTime is what the host has to take the status before the stream is closed.
	partTime = 5 * time.Second
)

// Process is a command that runs. Functions may be called concurrently.
type Process struct {
	Stdin io.WriteCloser
	// Stdout and Stderr end once the command has ended and what it wrote until then is read, also if
	// programs that it left behind could still write. Stderr is nil with a terminal.
	Stdout, Stderr io.Reader
	// Signal sends a signal to the command, on a terminal to the job in the foreground.
	Signal func(number int) error
	// Resize sets the terminal's size.
	Resize func(exec.Size) error
	// Wait returns when the command has ended.
	Wait func() exec.Status
	// HangUp ends the command and what else is of its session, by force if need be, and returns when
	// that is done or no more can be done.
	HangUp func()
	// Close lets go of what belongs to the command here. Called once, last.
	Close func()
}

// exec runs one command for the host.
func (s *Server) exec(ctx context.Context, stream net.Conn) {
	if s.guest.Exec == nil {
		_ = wire.WriteAnswer(stream, errors.New("this guest runs no commands"))
		return
	}
	if wire.WriteAnswer(stream, nil) != nil || stream.SetReadDeadline(time.Now().Add(headerTime)) != nil {
		return
	}
	r, w := frame.NewReader(stream), frame.NewWriter(stream)
	kind, payload, err := r.Next()
	if err != nil || kind != exec.KindRequest || stream.SetReadDeadline(time.Time{}) != nil {
		return
	}
	stop := context.AfterFunc(ctx, func() { _ = stream.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	request, err := exec.ParseRequest(payload)
	var p *Process
	if err == nil {
		p, err = s.guest.Exec(request)
	}
	if err != nil {
		status := exec.Status{Failed: err.Error(), Code: exec.CodeCannotRun}
		if errors.Is(err, fs.ErrNotExist) {
			status.Code = exec.CodeNotFound
		}
		if w.Write(exec.KindStatus, status.Encode()) == nil {
			part(stream, r)
		}
		return
	}
	defer p.Close()
	serveProcess(stream, r, w, p)
}

// part waits until the host closes its end: what was sent last must not be lost in ours being closed.
func part(stream net.Conn, r *frame.Reader) {
	if stream.SetReadDeadline(time.Now().Add(partTime)) != nil {
		return
	}
	for {
		if _, _, err := r.Next(); err != nil {
			return
		}
	}
}

func serveProcess(stream net.Conn, r *frame.Reader, w *frame.Writer, p *Process) {
	input := exec.NewInlet(w, exec.KindInput, p.Stdin)
	outlets := map[byte]*exec.Outlet{exec.KindOutput: exec.NewOutlet(w, exec.KindOutput)}
	sources := map[byte]io.Reader{exec.KindOutput: p.Stdout}
	if p.Stderr != nil {
		outlets[exec.KindErrors] = exec.NewOutlet(w, exec.KindErrors)
		sources[exec.KindErrors] = p.Stderr
	}
	var pumps sync.WaitGroup
	for kind, outlet := range outlets {
		pumps.Go(func() { _ = outlet.Pump(sources[kind]) }) // the reader of the stream sees that it broke
	}
	hostGone, ended, sent := make(chan struct{}), make(chan exec.Status, 1), make(chan struct{})
	go func() {
		defer close(hostGone)
		_ = control(r, input, outlets, p)
		for _, outlet := range outlets {
			outlet.Close()
		}
	}()
	go func() { ended <- p.Wait() }()
	defer func() {
		input.Abort()
		_ = p.Stdin.Close() // a write that nobody takes ends with it
		_ = input.Wait()
		_ = stream.SetReadDeadline(time.Unix(1, 0))
		<-hostGone
	}()

	var status exec.Status
	select {
	case status = <-ended:
	case <-hostGone:
		p.HangUp()
		select {
		case <-ended:
		case <-time.After(afterKill):
		}
		return
	}
	go func() {
		pumps.Wait()
		close(sent)
	}()
	select {
	case <-sent:
	case <-hostGone:
		return
	}
	if w.Write(exec.KindStatus, status.Encode()) == nil {
		select { // as in part
		case <-hostGone:
		case <-time.After(partTime):
		}
	}
}

// control takes what the host sends until the stream ends.
func control(r *frame.Reader, input *exec.Inlet, outlets map[byte]*exec.Outlet, p *Process) error {
	for {
		kind, payload, err := r.Next()
		if err != nil {
			return err
		}
		switch kind {
		case exec.KindInput:
			if len(payload) == 0 {
				input.End()
				continue
			}
			err = input.Push(payload)
		case exec.KindCredit:
			of, n, bad := exec.ParseCredit(payload)
			switch outlet := outlets[of]; {
			case bad != nil:
				err = bad
			case outlet == nil:
				err = fmt.Errorf("credit for %q", of)
			default:
				err = outlet.Give(n)
			}
		case exec.KindSignal:
			var number int
			if number, err = exec.ParseSignal(payload); err == nil {
				_ = p.Signal(number) // it has ended just now: fine
			}
		case exec.KindSize:
			var size exec.Size
			if size, err = exec.ParseSize(payload); err == nil && p.Resize != nil {
				_ = p.Resize(size) // likewise
			}
		default:
			err = fmt.Errorf("a frame of unknown kind %q", kind)
		}
		if err != nil {
			return err
		}
	}
}
