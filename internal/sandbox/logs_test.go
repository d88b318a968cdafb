package sandbox

import (
	"strings"
	"testing"
)

// Lines are chosen and made harmless whole, however they arrive, and one without end is broken.
func TestLogLines(t *testing.T) {
	const log = "  boot\x1b[31m red\x1b[0m\r\nqemu-system-x86_64: own\x07\n\x1b]0;title\x07login: "
	for _, c := range []struct {
		r    LogRequest
		want string
	}{
		{LogRequest{Plain: true}, "  boot red\nqemu-system-x86_64: own\nlogin: \n"},
		{LogRequest{VMM: true}, "qemu-system-x86_64: own\x07\n"},
		{LogRequest{VMM: true, Plain: true}, "qemu-system-x86_64: own\n"},
	} {
		for _, step := range []int{1, 3, 7, len(log)} {
			var out strings.Builder
			l := newLogLines(c.r, func(b []byte) error { out.Write(b); return nil })
			for rest := []byte(log); len(rest) > 0; {
				n := min(step, len(rest))
				if err := l.take(rest[:n]); err != nil {
					t.Fatal(err)
				}
				rest = rest[n:]
			}
			if err := l.rest(); err != nil {
				t.Fatal(err)
			}
			if out.String() != c.want {
				t.Errorf("%+v in steps of %d: %q, want %q", c.r, step, out.String(), c.want)
			}
		}
	}
	l := newLogLines(LogRequest{Plain: true}, func([]byte) error { return nil })
	for range 1000 {
		if err := l.take([]byte(strings.Repeat("x", 1000))); err != nil {
			t.Fatal(err)
		}
		if len(l.cut.partial) > longestLine {
			t.Fatalf("%d bytes of a line are kept", len(l.cut.partial))
		}
	}
}
