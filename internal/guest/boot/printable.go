package boot

import (
	"regexp"
	"strings"
	"unicode"
)

// maxPrintable is the length, in bytes, to which Printable cuts.
const maxPrintable = 300

// escapes are what programs send to terminals: control sequences (ECMA-48 5.4), strings that end
// with BEL or ST (5.6), and the short ones.
var escapes = regexp.MustCompile(`\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])`)

// Printable makes text that a guest had a hand in safe to show: one line of bounded length that holds
// nothing that a terminal would act upon, or that would make text look like other text.
func Printable(s string) string {
	s = s[:min(len(s), 4*maxPrintable)] // before the work, which need not be done for megabytes
	s = Visible(s)
	if len(s) > maxPrintable {
		s = strings.ToValidUTF8(s[:maxPrintable], "") + "..."
	}
	return strings.TrimSpace(s)
}

// Visible is what Printable keeps of a line of any length, its indentation included.
func Visible(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t' || r == '\n':
			return ' '
		case r == unicode.ReplacementChar || !unicode.IsPrint(r): // bidirectional controls among them
			return -1
		}
		return r
	}, escapes.ReplaceAllString(s, ""))
}
