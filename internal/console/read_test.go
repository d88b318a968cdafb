package console

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestLastLines(t *testing.T) {
	for _, c := range []struct {
		log  string
		n    int
		want string
	}{
		{"a\nb\nc\n", 2, "b\nc\n"}, {"a\nb\nc", 2, "b\nc"}, {"a\nb\n", 0, ""}, {"a\nb", 0, ""}, {"a\nb\n", 5, "a\nb\n"}, {"", 3, ""}, {"\n\n", 1, "\n"},
	} {
		if got := string(LastLines([]byte(c.log), c.n)); got != c.want {
			t.Errorf("%d of %q: %q, want %q", c.n, c.log, got, c.want)
		}
	}
}

func TestOwn(t *testing.T) {
	for line, want := range map[string]bool{
		"2026-01-02T03:04:05.123456789 [anonymous-instance:main] Running Firecracker v1.12.1": true,
		"qemu-system-x86_64: terminating on signal 15":                                        true, StartMark + "now": true,
		"[    0.000000] Linux version": false, "": false, "see qemu-system-x86_64: x": false,
	} {
		if Own([]byte(line)) != want {
			t.Errorf("%q: %v", line, !want)
		}
	}
}

// following is a log that is being read.
type following struct {
	t    *testing.T
	path string
	got  chan string
	end  chan error
	stop func()
}

func follow(t *testing.T, content string, lines int) *following {
	f := &following{t: t, path: filepath.Join(t.TempDir(), "log"), got: make(chan string, 10000), end: make(chan error, 1)}
	f.write(content)
	ctx, cancel := context.WithCancel(t.Context())
	f.stop = cancel
	t.Cleanup(cancel)
	go func() {
		f.end <- Read(ctx, f.path, lines, true, func(b []byte) error { f.got <- string(b); return nil })
	}()
	return f
}

func (f *following) write(text string) {
	f.t.Helper()
	w, err := os.OpenFile(f.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err == nil {
		_, err = w.WriteString(text)
		err = errors.Join(err, w.Close())
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

// wants what was sent up to a text, and returns it.
func (f *following) wants(last string) string {
	f.t.Helper()
	var all strings.Builder
	for {
		select {
		case s := <-f.got:
			all.WriteString(s)
			if strings.HasSuffix(all.String(), last) {
				return all.String()
			}
		case <-time.After(10 * time.Second):
			s := all.String()
			f.t.Fatalf("%q did not come; %d bytes ending in %q did", last, len(s), s[max(0, len(s)-100):])
		}
	}
}

func (f *following) ended() error {
	f.t.Helper()
	select {
	case err := <-f.end:
		return err
	case <-time.After(10 * time.Second):
		f.t.Fatal("it goes on")
		return nil
	}
}

func TestFollow(t *testing.T) {
	f := follow(t, "one\ntwo\nthree\n", 2)
	if got := f.wants("three\n"); got != "two\nthree\n" {
		t.Errorf("got %q", got)
	}
	f.write("four\n")
	if got := f.wants("four\n"); got != "four\n" {
		t.Errorf("got %q", got)
	}
	if err := os.Remove(f.path); err != nil {
		t.Fatal(err)
	}
	if err := f.ended(); err != nil {
		t.Errorf("of a log that was removed: %v", err)
	}
	f = follow(t, "x\n", -1)
	f.wants("x\n")
	f.stop()
	if err := f.ended(); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if err := Read(t.Context(), filepath.Join(t.TempDir(), "none"), -1, false, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of no log: %v", err)
	}
}

// TestFollowOverACut cuts the log back below a follower, by both ways: no line is lost and none comes
// twice.
func TestFollowOverACut(t *testing.T) {
	for name, fallocate := range map[string]func(int, uint32, int64, int64) error{
		"in place": unix.Fallocate, "by copying": func(int, uint32, int64, int64) error { return unix.EOPNOTSUPP },
	} {
		t.Run(name, func(t *testing.T) {
			var before bytes.Buffer
			for i := 0; before.Len() < Max+100; i++ {
				fmt.Fprintf(&before, "line %d\n", i)
			}
			f := follow(t, before.String(), 1)
			f.wants("\n")
			if err := bound(f.path, fallocate); err != nil {
				t.Fatal(err)
			}
			if Size(f.path) > 2*Keep {
				t.Fatal("it was not cut")
			}
			f.write("next\n")
			if got := f.wants("next\n"); got != "next\n" {
				t.Errorf("got %d bytes, %.100q", len(got), got)
			}
			// One that was left behind says so.
			if err := os.WriteFile(f.path, []byte("all is new\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := f.wants("all is new\n"); !strings.Contains(got, "was cut back here") {
				t.Errorf("got %q", got)
			}
		})
	}
}
