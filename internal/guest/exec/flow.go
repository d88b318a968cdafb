package exec

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"git.thaloco.com/thaloco/banger/internal/guest/frame"
)

// Outlet sends one direction of data within the credit that the other side gave. Safe for one sender
// and one giver of credit at a time.
type Outlet struct {
	w    *frame.Writer
	kind byte

	mu     sync.Mutex
	more   sync.Cond
	credit int
	closed bool
}

// NewOutlet returns an Outlet for frames of a kind, with a whole window of credit.
func NewOutlet(w *frame.Writer, kind byte) *Outlet {
	o := &Outlet{w: w, kind: kind, credit: Window}
	o.more.L = &o.mu
	return o
}

// Pump sends what r has until its end, which is no error, or until Close. It does not tell the other
// side of the end.
func (o *Outlet) Pump(r io.Reader) error {
	buffer := make([]byte, chunk)
	for {
		n, err := r.Read(buffer)
		for b := buffer[:n]; len(b) > 0; {
			may := o.take(len(b))
			if may == 0 {
				return io.ErrClosedPipe
			}
			if err := o.w.Write(o.kind, b[:may]); err != nil {
				return err
			}
			b = b[may:]
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// take waits for credit and takes at most n bytes of it; 0 after Close.
func (o *Outlet) take(n int) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.credit == 0 && !o.closed {
		o.more.Wait()
	}
	if o.closed {
		return 0
	}
	n = min(n, o.credit)
	o.credit -= n
	return n
}

// Give adds credit. More than was ever sent is an error: the other side counts wrong, or lies.
func (o *Outlet) Give(n uint32) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if int64(o.credit)+int64(n) > Window {
		return fmt.Errorf("credit for %d bytes more than were sent", int64(o.credit)+int64(n)-Window)
	}
	o.credit += int(n)
	o.more.Broadcast()
	return nil
}

// Close ends Pump at its next frame.
func (o *Outlet) Close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	o.more.Broadcast()
}

// Inlet takes one direction of data in: it never makes the reader of the stream wait, and holds at
// most Window bytes.
type Inlet struct {
	w    *frame.Writer
	kind byte
	to   io.WriteCloser

	mu     sync.Mutex
	more   sync.Cond
	queue  []byte
	ended  bool
	gone   error // of to; what still comes is dropped
	owed   int   // consumed, and no credit given so far
	closed chan struct{}
}

// NewInlet returns an Inlet that writes data of a kind to to, and closes to at the data's end. It runs
// until End or Abort.
func NewInlet(w *frame.Writer, kind byte, to io.WriteCloser) *Inlet {
	in := &Inlet{w: w, kind: kind, to: to, closed: make(chan struct{})}
	in.more.L = &in.mu
	go in.run()
	return in
}

func (in *Inlet) run() {
	defer close(in.closed)
	for {
		in.mu.Lock()
		for len(in.queue) == 0 && !in.ended {
			in.more.Wait()
		}
		b, ended, gone := in.queue, in.ended, in.gone
		in.queue = nil
		in.mu.Unlock()
		if len(b) == 0 && ended {
			err := in.to.Close()
			in.mu.Lock()
			if in.gone == nil {
				in.gone = err
			}
			in.mu.Unlock()
			return
		}
		if gone == nil {
			if _, err := in.to.Write(b); err != nil {
				in.mu.Lock()
				in.gone = err
				in.mu.Unlock()
			}
		}
		in.consumed(len(b))
	}
}

// consumed gives credit, a part of a window at a time: a keystroke is not answered by a frame.
func (in *Inlet) consumed(n int) {
	in.mu.Lock()
	in.owed += n
	give := 0
	if in.owed >= Window/4 && !in.ended {
		give, in.owed = in.owed, 0
	}
	in.mu.Unlock()
	if give > 0 {
		payload := binary.BigEndian.AppendUint32([]byte{in.kind}, uint32(give))
		_ = in.w.Write(KindCredit, payload) // the reader of the stream sees that it broke
	}
}

// Push takes data in. An error if it is more than the sender had credit for.
func (in *Inlet) Push(b []byte) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.ended {
		return errors.New("data came after its end")
	}
	if len(in.queue)+len(b) > Window {
		return fmt.Errorf("%d bytes came, and there was credit for %d", len(in.queue)+len(b), Window)
	}
	in.queue = append(in.queue, b...)
	in.more.Broadcast()
	return nil
}

// End says that no more comes. What is there is still written.
func (in *Inlet) End() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.ended = true
	in.more.Broadcast()
}

// Abort is End that also drops what is there.
func (in *Inlet) Abort() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.ended, in.queue = true, nil
	in.more.Broadcast()
}

// Wait returns after End or Abort, once everything is written and the destination closed, with what
// went wrong with that.
func (in *Inlet) Wait() error {
	<-in.closed
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.gone
}

// ParseCredit reads the payload of a credit frame: the kind of data it is for, and how many bytes.
func ParseCredit(b []byte) (kind byte, n uint32, err error) {
	if len(b) != 5 {
		return 0, 0, fmt.Errorf("a credit of %d bytes", len(b))
	}
	return b[0], binary.BigEndian.Uint32(b[1:]), nil
}
