package boot

import (
	"bytes"
	"strings"
)

// FatalLine renders the console line of a boot that failed at stage. Line ends in reason become
// spaces, since the host reads one line.
func FatalLine(stage, reason string) string {
	return FatalMarker + stage + ": " + strings.Join(strings.Fields(reason), " ") + "\n"
}

// FatalReason finds the last line with FatalMarker in the tail of a console log. The tail may
// begin and end in mid-line and hold any bytes: the guest wrote it.
func FatalReason(tail []byte) (stage, reason string, ok bool) {
	at := bytes.LastIndex(tail, []byte(FatalMarker))
	if at < 0 {
		return "", "", false
	}
	line, _, _ := bytes.Cut(tail[at+len(FatalMarker):], []byte("\n"))
	stage, reason, ok = strings.Cut(printable(line), ": ")
	if !ok || stage == "" {
		return "", "", false
	}
	return stage, reason, true
}

// printable drops control bytes, so that a guest cannot drive the terminal of whoever reads the
// reason, and cuts what no reason of ours is as long as.
func printable(line []byte) string {
	const longest = 1024
	line = line[:min(len(line), longest)]
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == '\ufffd' {
			return -1
		}
		return r
	}, string(line)))
}
