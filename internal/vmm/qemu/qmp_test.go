package qemu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}`

// monitorPeer plays a monitor: for each line it gets, it writes what answer returns.
func monitorPeer(t *testing.T, first string, answer func(line string) string) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	go func() {
		defer theirs.Close()
		if _, err := fmt.Fprint(theirs, first); err != nil {
			return
		}
		lines := bufio.NewScanner(theirs)
		for lines.Scan() {
			text := answer(lines.Text())
			if text == "hang up" {
				return
			}
			if _, err := fmt.Fprint(theirs, text); err != nil {
				return
			}
		}
	}()
	return ours
}

// accept answers every command with success.
func accept(line string) string {
	_, id, _ := strings.Cut(line, `"id":`)
	return fmt.Sprintf("{\"return\": {\"status\": \"running\"}, \"id\": %s}\n", strings.TrimRight(id, "}"))
}

func shortly(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// TestQMPGreeting gives the client good and bad monitors, and compares what it makes of them.
func TestQMPGreeting(t *testing.T) {
	for _, c := range []struct{ name, first, want string }{
		{"good", greeting + "\r\n", ""},
		{"silent", "", "deadline exceeded"},
		{"no QMP", "SSH-2.0-OpenSSH\n", "not QMP"},
		{"endless line", strings.Repeat("x", maxLine+5000), "longer than"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := shortly(t)
			if c.first != "" { // only silence is to be waited out
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(t.Context(), patience)
				defer cancel()
			}
			q, err := newQMP(ctx, monitorPeer(t, c.first, accept), func(event) {})
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v, want %q", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer q.close()
			if q.version != "7.2.22" {
				t.Errorf("version %q", q.version)
			}
		})
	}
}

// TestQMPCommands mixes answers, refusals, events and silence on one connection.
func TestQMPCommands(t *testing.T) {
	events := make(chan event, 10)
	conn := monitorPeer(t, greeting+"\n", func(line string) string {
		switch {
		case strings.Contains(line, "refuse"):
			return strings.Replace(accept(line), `"return": {"status": "running"}`, `"error": {"class": "GenericError", "desc": "no"}`, 1)
		case strings.Contains(line, "silence"):
			return `{"event": "STOP", "data": {}}` + "\n"
		case strings.Contains(line, "die"):
			return "hang up"
		}
		return `{"event": "SHUTDOWN", "data": {"guest": true}}` + "\n" + `{"return": {}, "id": 999}` + "\n" + accept(line)
	})
	q, err := newQMP(t.Context(), conn, func(e event) { events <- e })
	if err != nil {
		t.Fatal(err)
	}
	defer q.close()
	var status struct{ Status string }
	if err := q.do(t.Context(), "query-status", nil, &status); err != nil || status.Status != "running" {
		t.Errorf("query-status: %+v, %v", status, err)
	}
	var refused *qmpError
	if err := q.do(t.Context(), "refuse", nil, nil); !errors.As(err, &refused) || refused.Desc != "no" {
		t.Errorf("refuse: %v", err)
	}
	if err := q.do(shortly(t), "silence", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silence: %v", err)
	}
	if err := q.do(t.Context(), "query-status", nil, &status); err != nil {
		t.Errorf("query-status after an answer that nobody waited for: %v", err)
	}
	waiting := make(chan error, 1)
	go func() { waiting <- q.do(t.Context(), "silence", nil, nil) }()
	for range 2 { // one of the event above, one that says that the second silence has begun
		for e := range events {
			if e.Name == "STOP" {
				break
			}
		}
	}
	if err := q.do(t.Context(), "die", nil, nil); !errors.Is(err, errQMPClosed) {
		t.Errorf("die: %v", err)
	}
	if err := <-waiting; !errors.Is(err, errQMPClosed) {
		t.Errorf("what waited when the monitor went away: %v", err)
	}
	if err := q.do(t.Context(), "query-status", nil, nil); !errors.Is(err, errQMPClosed) {
		t.Errorf("query-status after the end: %v", err)
	}
}

// FuzzQMPMessage: whatever the peer sends, the reader neither panics nor hangs.
func FuzzQMPMessage(f *testing.F) {
	f.Add([]byte(greeting + "\n"))
	f.Add([]byte(`{"event":"STOP"}` + "\n" + `{"return":{},"id":1}` + "\n"))
	f.Add([]byte(`{"error":null,"id":null}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		ours, theirs := net.Pipe()
		go func() { theirs.Write(data); theirs.Close() }()
		q := &qmp{conn: ours, onEvent: func(event) {}, gone: make(chan struct{}), pending: map[int]chan reply{1: make(chan reply, 1)}}
		q.read(make(chan error, 1))
	})
}

// TestExitReasons maps every ShutdownCause that QEMU 7.2 and 10.0 know (run-state.json).
func TestExitReasons(t *testing.T) {
	got := map[string]string{}
	for reason, guest := range map[string]bool{
		"guest-shutdown": true, "guest-reset": true, "guest-panic": true, "subsystem-reset": true,
		"host-signal": false, "host-qmp-quit": false, "host-ui": false, "host-error": false, "none": false,
	} {
		got[reason] = exitReason(guest, reason)
	}
	want := map[string]string{
		"guest-shutdown": "guest-shutdown", "guest-reset": "guest-reset", "guest-panic": "crashed", "subsystem-reset": "guest-reset",
		"host-signal": "killed", "host-qmp-quit": "killed", "host-ui": "crashed", "host-error": "crashed", "none": "crashed",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
