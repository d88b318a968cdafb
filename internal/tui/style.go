package tui

import (
	"fmt"
	"strings"
	"time"

	"github.com/charmbracelet/x/ansi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"git.thaloco.com/thaloco/banger/internal/age"
)

// style is SGR parameters (ECMA-48 8.3.117): a colour, which NO_COLOR takes away, and what stays. Only the
// terminal's own sixteen colours are used.
type style struct{ color, rest string }

var (
	plain   = style{}
	good    = style{color: "32"}
	bad     = style{color: "31"}
	warning = style{color: "33"}
	faint   = style{color: "90"}
	strong  = style{rest: "1"}
	chosen  = style{rest: "7"}
	accent  = style{color: "36", rest: "1"}
)

type painter bool

func (color painter) paint(s style, text string) string {
	parameters := s.rest
	if color && s.color != "" {
		parameters = strings.TrimPrefix(parameters+";"+s.color, ";")
	}
	if parameters == "" || text == "" {
		return text
	}
	return "\x1b[" + parameters + "m" + text + "\x1b[0m"
}

// link is text that a terminal may open (OSC 8), if there is a url.
func link(url, text string) string {
	if url == "" {
		return text
	}
	return ansi.SetHyperlink(url) + text + ansi.ResetHyperlink()
}

func stateStyle(state string) style {
	switch state {
	case "running", "succeeded":
		return good
	case "failed":
		return bad
	case "starting", "stopping", "deleting", "defined":
		return warning
	}
	return faint
}

// fit makes text exactly w cells wide.
func fit(text string, w int) string {
	if w <= 0 {
		return ""
	}
	have := ansi.StringWidth(text)
	if have > w {
		text = ansi.Truncate(text, w, "…")
		have = ansi.StringWidth(text)
	}
	return text + strings.Repeat(" ", w-have)
}

// right is fit, with the text at the right.
func right(text string, w int) string {
	if have := ansi.StringWidth(text); have < w {
		return strings.Repeat(" ", w-have) + text
	}
	return fit(text, w)
}

// wrap breaks text into lines of at most w cells.
func wrap(text string, w int) []string {
	return strings.Split(ansi.Wrap(text, max(w, 1), ""), "\n")
}

// short is a size in at most five cells: 512M, 1.5G.
func short(bytes int64) string {
	v, units := float64(bytes), "BKMGTPE"
	i := 0
	for v >= 1000 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	if v < 10 && i > 0 {
		return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0") + units[i:i+1]
	}
	return fmt.Sprintf("%.0f%c", v, units[i])
}

// took is how long something took.
func took(d time.Duration) string {
	switch d = max(d, 0); {
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
}

func since(now time.Time, at *timestamppb.Timestamp) string {
	if at == nil {
		return "-"
	}
	return age.Text(now.Sub(at.AsTime()))
}

// bar is a progress bar of w cells.
func bar(done, total, w int) string {
	full := 0
	if total > 0 {
		full = min(done*w/total, w)
	}
	return strings.Repeat("█", full) + strings.Repeat("░", w-full)
}

const spinner = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"

func spin(n int) string {
	frames := []rune(spinner)
	return string(frames[n%len(frames)])
}
