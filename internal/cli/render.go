package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	"git.thaloco.com/thaloco/banger/internal/age"
)

// Colours, as SGR parameters (ECMA-48). Only the terminal's own sixteen are used.
const (
	red    = "31"
	green  = "32"
	yellow = "33"
	dim    = "2"
)

func paint(on bool, color, s string) string {
	if !on || color == "" || s == "" {
		return s
	}
	return "\x1b[" + color + "m" + s + "\x1b[0m"
}

func (a *app) paint(color, s string) string    { return paint(a.color, color, s) }
func (a *app) paintErr(color, s string) string { return paint(a.errColor, color, s) }

// stateColor is how a VM's or an operation's state is painted.
func stateColor(state string) string {
	switch state {
	case "running", "succeeded", "pass":
		return green
	case "failed", "fail":
		return red
	case "starting", "stopping", "deleting", "defined", "warn":
		return yellow
	}
	return dim
}

// cell is a table's cell; its colour, and the link that a terminal may open, take no width.
type cell struct{ text, color, link string }

// render paints a cell. A link is told by OSC 8 (ECMA-48 5.6 is its form; terminals that do not know it show
// the text).
func (c cell) render(color bool) string {
	s := paint(color, c.color, c.text)
	if color && c.link != "" {
		s = "\x1b]8;;" + c.link + "\x1b\\" + s + "\x1b]8;;\x1b\\"
	}
	return s
}

// withHeader are the lines of a table, the header first if there is one.
func withHeader(header []string, rows [][]cell) [][]cell {
	if header == nil {
		return rows
	}
	head := make([]cell, len(header))
	for i, h := range header {
		head[i] = cell{text: h, color: dim}
	}
	return append([][]cell{head}, rows...)
}

// columnWidths are those of the widest cells, in characters.
func columnWidths(lines [][]cell) (widths []int) {
	for _, row := range lines {
		for i, c := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(c.text))
		}
	}
	return widths
}

// gap is what is between two columns, in characters.
const gap = 2

// table prints aligned columns. Trailing space is left out, so that output can be compared.
func table(w io.Writer, color bool, header []string, rows [][]cell) error {
	all := withHeader(header, rows)
	widths := columnWidths(all)
	var b strings.Builder
	for _, row := range all {
		for i, c := range row {
			b.WriteString(c.render(color))
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text)+gap))
			}
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// fit leaves out columns of a table, those of least first, until it is as wide as a terminal. A width of 0 has room for all.
func fit(width int, header []string, rows [][]cell, least ...string) ([]string, [][]cell) {
	widths := columnWidths(withHeader(header, rows))
	total := -gap // none behind the last
	for _, w := range widths {
		total += w + gap
	}
	for _, name := range least {
		if width == 0 || total <= width {
			break
		}
		i := slices.Index(header, name)
		if i < 0 {
			continue
		}
		total -= widths[i] + gap
		widths, header = slices.Delete(widths, i, i+1), slices.Delete(header, i, i+1)
		for r, row := range rows {
			rows[r] = slices.Delete(row, i, i+1)
		}
	}
	return header, rows
}

// formatBytes is a size for people: "512 MiB", "1.5 GiB".
func formatBytes(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	v, i := float64(n), 0
	for v >= 1024 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	s := fmt.Sprintf("%.1f", v)
	return strings.TrimSuffix(s, ".0") + " " + units[i]
}

// ageOf is formatAge of a view's time.
func ageOf(now time.Time, at *time.Time) string {
	if at == nil {
		return "-"
	}
	return formatAge(now, timestamppb.New(*at))
}

// formatAge is how long ago something was: "12s ago", "3m ago", "5h ago", "9d ago".
func formatAge(now time.Time, at *timestamppb.Timestamp) string {
	if at == nil {
		return "-"
	}
	return age.Text(now.Sub(at.AsTime())) + " ago"
}

// formatTook is how long something took: "4 ms", "1.3 s", "2m05s".
func formatTook(d time.Duration) string {
	switch {
	case d < 100*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
}

func timeOf(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	v := t.AsTime()
	return &v
}
