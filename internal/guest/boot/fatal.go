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
	stage, reason, ok = strings.Cut(Printable(string(line)), ": ")
	if !ok || stage == "" {
		return "", "", false
	}
	return stage, reason, true
}
