package exec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"git.thaloco.com/thaloco/banger/internal/guest/frame"
)

// Streams are what a command is connected to on the host.
type Streams struct {
	Stdin          io.Reader // nil: none
	Stdout, Stderr io.Writer
	Signals        <-chan int  // numbers to send; may be nil
	Sizes          <-chan Size // of the terminal; may be nil
	Begun          func()      // called once the request is sent; may be nil
}

// ErrLost is the cause of what ended without a status.
var ErrLost = errors.New("the stream ended before the command did")

// ErrOutput is the cause where a command ended, and its output could not be written here.
var ErrOutput = errors.New("the output could not be written")

// Run runs a command over a stream that the agent has said "ok" to, and closes it. It returns when the
// command has ended and its output is written, or with an error when the stream broke, the guest did
// not keep to the form, or ctx ended: the guest then hangs the command up. A Stdin that blocks is left
// behind blocked, and so is an output that blocks when ctx ends.
func Run(ctx context.Context, conn io.ReadWriteCloser, r Request, s Streams) (Status, error) {
	defer conn.Close()
	request, err := r.Encode()
	if err != nil {
		return Status{}, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	w := frame.NewWriter(conn)
	if err := w.Write(KindRequest, request); err != nil {
		return Status{}, errors.Join(ctx.Err(), ErrLost, err)
	}
	if s.Begun != nil {
		s.Begun()
	}

	ended := make(chan struct{})
	var control sync.WaitGroup
	control.Go(func() { sendControl(w, s, ended) })
	input := NewOutlet(w, KindInput)
	go func() { // not waited for: a terminal's read ends with the next key
		if s.Stdin != nil && input.Pump(s.Stdin) != nil {
			return
		}
		_ = w.Write(KindInput, nil)
	}()
	out := NewInlet(w, KindOutput, writeOnly{s.Stdout})
	errs := NewInlet(w, KindErrors, writeOnly{s.Stderr})

	status, err := receive(frame.NewReader(conn), input, out, errs)
	close(ended)
	input.Close()
	out.End()
	errs.End()
	if err != nil {
		_ = conn.Close() // before the output is written, which may block: the command is to be hung up
	}
	control.Wait()
	output := make(chan error, 1)
	go func() { output <- errors.Join(out.Wait(), errs.Wait()) }()
	var written error
	select {
	case written = <-output:
	case <-ctx.Done():
		out.Abort()
		errs.Abort()
		return status, errors.Join(ctx.Err(), err)
	}
	switch {
	case err != nil:
		return status, errors.Join(ctx.Err(), err)
	case written != nil:
		return status, fmt.Errorf("%w: %w", ErrOutput, written)
	}
	return status, nil
}

// receive reads frames until the status.
func receive(r *frame.Reader, input *Outlet, out, errs *Inlet) (Status, error) {
	for {
		kind, payload, err := r.Next()
		if err != nil {
			return Status{}, errors.Join(ErrLost, err)
		}
		switch kind {
		case KindOutput:
			err = out.Push(payload)
		case KindErrors:
			err = errs.Push(payload)
		case KindCredit:
			of, n, bad := ParseCredit(payload)
			switch {
			case bad != nil:
				err = bad
			case of != KindInput:
				err = fmt.Errorf("credit for %q, of which the host sends nothing", of)
			default:
				err = input.Give(n)
			}
		case KindStatus:
			return ParseStatus(payload)
		default:
			err = fmt.Errorf("a frame of unknown kind %q", kind)
		}
		if err != nil {
			return Status{}, fmt.Errorf("the guest does not keep to the form of a command's stream: %w", err)
		}
	}
}

// sendControl passes signals and sizes on until ended is closed.
func sendControl(w *frame.Writer, s Streams, ended <-chan struct{}) {
	for {
		var err error
		select {
		case n := <-s.Signals:
			if n > 0 && n <= 64 {
				err = w.Write(KindSignal, []byte{byte(n)})
			}
		case size := <-s.Sizes:
			err = w.Write(KindSize, size.encode())
		case <-ended:
			return
		}
		if err != nil {
			return // the reader of the stream sees it as well
		}
	}
}

// writeOnly is a destination that others close.
type writeOnly struct{ io.Writer }

func (writeOnly) Close() error { return nil }
