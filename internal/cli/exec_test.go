package cli

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
)

// Ctrl-C typed for a command with a terminal is that command's, unless its guest does not answer.
func TestInterruptKey(t *testing.T) {
	for name, c := range map[string]struct {
		silent, answers bool
		output          int // milliseconds after the first key
		keys            []int
		want            bool
	}{
		"one":                        {keys: []int{0}},
		"one, and known to hang":     {silent: true, keys: []int{0}, want: true},
		"three, and it hangs":        {keys: []int{0, 500, 1000}, want: true},
		"three, and it answers":      {answers: true, keys: []int{0, 500, 1000}},
		"three, and something came":  {output: 300, keys: []int{0, 500, 1000}},
		"three, one after the other": {keys: []int{0, 1500, 3000}},
		"many, and it hangs":         {keys: []int{0, 1500, 3000, 3100, 3200}, want: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, leave := context.WithCancel(t.Context())
				defer leave()
				e := &execution{leave: leave, pulse: &pulse{}}
				e.pulse.silent.Store(c.silent)
				begin := time.Now()
				out := &heard{Writer: io.Discard, e: e, now: time.Now}
				in := &interrupts{Reader: &typist{begin, c.keys}, each: func() {
					e.interruptKey(time.Now(), func() bool { return c.answers })
				}}
				if c.output > 0 {
					time.AfterFunc(time.Duration(c.output)*time.Millisecond, func() { _, _ = out.Write([]byte("x")) })
				}
				if _, err := io.Copy(io.Discard, in); err != nil {
					t.Error(err)
				}
				synctest.Wait()
				if left := ctx.Err() != nil; left != c.want {
					t.Errorf("left %v, want %v", left, c.want)
				}
			})
		})
	}
}

// typist types Ctrl-C at moments, in milliseconds.
type typist struct {
	begin time.Time
	keys  []int
}

func (k *typist) Read(b []byte) (int, error) {
	if len(k.keys) == 0 {
		return 0, io.EOF
	}
	time.Sleep(time.Until(k.begin.Add(time.Duration(k.keys[0]) * time.Millisecond)))
	k.keys = k.keys[1:]
	return copy(b, "a\x03"), nil
}

// What is told of a guest, and that it is silent only until it answers or the watch ends.
func TestPulse(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		json bool
		want string
	}{
		{false, "banger: otter: its guest has not answered for 30 s\n  hint: wait, leave with Ctrl-C, or end the VM: banger vm kill otter\n" +
			"banger: otter: its guest answers again\n" +
			"banger: otter: paused: no room\n  hint: banger vm start otter\n" +
			"banger: otter: its guest answers again\n"},
		{true, `{"error":{"code":"timeout","subject":"otter","message":"its guest has not answered for 30 s","hint":"wait, leave with Ctrl-C, or end the VM: banger vm kill otter"}}` + "\n" +
			`{"error":{"code":"precondition","subject":"otter","message":"paused: no room","hint":"banger vm start otter"}}` + "\n"},
	} {
		var stderr bytes.Buffer
		a := &app{stderr: io.Discard, json: c.json, now: func() time.Time { return now }}
		p := &pulse{}
		states := []*bangerv1.WatchGuestResponse{
			{State: "answers"}, {State: "silent", Since: timestamppb.New(now.Add(-30 * time.Second))}, {State: "answers"}, {State: "paused", Note: "paused: no room"}, {State: "answers"},
		}
		silent := []bool{false, false, true, false, true, false} // before each
		i := 0
		lines := saying(&stderr, func() bool { return false })
		say := func(text string) { // whoever reads it may press Ctrl-C at once
			if again := strings.Contains(text, "answers again"); p.silent.Load() == again {
				t.Errorf("silent %v when it says %q", p.silent.Load(), text)
			}
			lines(text)
		}
		p.follow(a, "otter", "Ctrl-C", say, func() *bangerv1.WatchGuestResponse {
			if p.silent.Load() != silent[i] {
				t.Errorf("silent %v before state %d", p.silent.Load(), i)
			}
			if i == len(states) {
				return nil
			}
			i++
			return states[i-1]
		})
		if stderr.String() != c.want {
			t.Errorf("got  %q\nwant %q", stderr.String(), c.want)
		}
	}
	var raw bytes.Buffer
	saying(&raw, func() bool { return true })("a\nb\n")
	if raw.String() != "\r\na\r\nb\r\n" || strings.Contains(raw.String(), "\n\n") {
		t.Errorf("on a raw terminal: %q", raw.String())
	}
}
