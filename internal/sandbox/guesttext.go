package sandbox

import (
	"bytes"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
)

// guestText is boot.Printable: everything that a guest had a hand in passes through it before it gets
// into a record or an error.
func guestText(s string) string { return boot.Printable(s) }

// lastLines renders the end of a console for an error: the last lines that say something.
func lastLines(tail []byte) string {
	const most = 5
	var lines []string
	for len(tail) > 0 && len(lines) < most {
		at := bytes.LastIndexByte(tail, '\n')
		if line := guestText(string(tail[at+1:])); line != "" {
			lines = append(lines, "\n  console: "+line)
		}
		tail = tail[:max(0, at)]
	}
	if len(lines) == 0 {
		return "; its console is empty"
	}
	var out strings.Builder
	for i := len(lines) - 1; i >= 0; i-- {
		out.WriteString(lines[i])
	}
	return out.String()
}
