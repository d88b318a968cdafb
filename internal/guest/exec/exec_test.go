package exec

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/frame"
)

func TestRequest(t *testing.T) {
	want := Request{Args: []string{"a", "", "ü\n"}, Env: []string{"A=b=c"}, Dir: "/x", User: "u:g", TTY: true, Rows: 1, Cols: 2}
	b, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseRequest(b)
	if again, _ := got.Encode(); err != nil || !bytes.Equal(again, b) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []Request{
		{}, {Args: []string{""}}, {Args: []string{"a\x00b"}}, {Args: []string{"a"}, Env: []string{"A"}}, {Args: []string{"a"}, Env: []string{"=a"}},
		{Args: []string{"a"}, Dir: "\x00"}, {Args: []string{"a", strings.Repeat("x", frame.Max)}},
	} {
		if _, err := bad.Encode(); err == nil {
			t.Errorf("%.100v was taken", bad)
		}
	}
}

func TestExit(t *testing.T) {
	for _, c := range []struct {
		s    Status
		want int
	}{{Status{}, 0}, {Status{Code: 255}, 255}, {Status{Signal: 15}, 143}, {Status{Failed: "no", Code: 127}, 127}} {
		if got := c.s.Exit(); got != c.want {
			t.Errorf("%+v: %d, want %d", c.s, got, c.want)
		}
		if back, err := ParseStatus(c.s.Encode()); err != nil || back != c.s {
			t.Errorf("%+v came back as %+v, %v", c.s, back, err)
		}
	}
}

// An Outlet sends its window and no more, until there is credit.
func TestOutletKeepsToItsCredit(t *testing.T) {
	var sent bytes.Buffer
	o := NewOutlet(frame.NewWriter(&sent), KindInput)
	done := make(chan error, 1)
	go func() { done <- o.Pump(io.LimitReader(endless{}, Window+10)) }()
	select {
	case err := <-done:
		t.Fatalf("a window and ten bytes were sent without credit: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := o.Give(10); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := o.Give(Window + 1); err == nil {
		t.Error("credit for what was never sent was taken")
	}
	o.Close()
	if err := o.Pump(endless{}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("after Close: %v", err)
	}
}

type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// FuzzReceive: whatever a guest sends, the host ends, keeps to its bounds, and shows nothing that a
// terminal would act upon.
func FuzzReceive(f *testing.F) {
	var b bytes.Buffer
	w := frame.NewWriter(&b)
	for _, k := range []struct {
		kind    byte
		payload string
	}{{KindOutput, "out"}, {KindErrors, "err"}, {KindCredit, "i\x00\x00\x00\x00"}, {KindStatus, `{"code":3,"failed":"x"}`}} {
		if err := w.Write(k.kind, []byte(k.payload)); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(b.Bytes())
	f.Add([]byte{KindStatus, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{KindCredit, 0, 0, 0, 1, 'o'})
	f.Fuzz(func(t *testing.T, data []byte) {
		var out counter
		w := frame.NewWriter(io.Discard)
		to, errs := NewInlet(w, KindOutput, writeOnly{&out}), NewInlet(w, KindErrors, writeOnly{io.Discard})
		s, err := receive(frame.NewReader(bytes.NewReader(data)), NewOutlet(w, KindInput), to, errs)
		to.End()
		errs.End()
		_, _ = to.Wait(), errs.Wait()
		if int(out) > len(data) {
			t.Errorf("%d bytes of output from %d", out, len(data))
		}
		if exit := s.Exit(); err == nil && (exit < 0 || exit > 255) {
			t.Errorf("exit code %d", exit)
		}
		if strings.ContainsAny(s.Failed, "\x1b\n\a") {
			t.Errorf("%q would be shown", s.Failed)
		}
	})
}

type counter int

func (c *counter) Write(b []byte) (int, error) {
	*c += counter(len(b))
	return len(b), nil
}

// When its caller leaves, Run returns at once, although nobody takes the output.
func TestRunIsLeft(t *testing.T) {
	host, guest := net.Pipe()
	defer guest.Close()
	go func() { // a guest that sends much, and never ends
		w, r := frame.NewWriter(guest), frame.NewReader(guest)
		if _, _, err := r.Next(); err != nil {
			return
		}
		go func() { _, _ = io.Copy(io.Discard, guest) }()
		for range 8 {
			if w.Write(KindOutput, make([]byte, chunk)) != nil {
				return
			}
		}
	}()
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	full, stuck := io.Pipe() // whose reader reads nothing
	defer full.Close()
	began := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		_, err := Run(ctx, host, Request{Args: []string{"yes"}}, Streams{Stdout: stuck, Stderr: io.Discard, Begun: func() { close(began) }})
		done <- err
	}()
	<-began
	time.Sleep(20 * time.Millisecond)
	leave()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it waits for its output to be taken")
	}
}
