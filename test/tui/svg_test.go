package tui

import (
	"fmt"
	"html"
	"regexp"
	"strconv"
	"strings"
	"testing"

	uv "github.com/charmbracelet/ultraviolet"
	"github.com/charmbracelet/x/ansi"
)

// A cell of the picture, in SVG's user units, and the space around the screen.
const (
	cellWidth, cellHeight = 8.4, 17.0
	baseline              = 12.5
	margin                = 14.0
)

// palette is what the sixteen colours of a terminal look like in the picture: on a dark ground, whatever page it is on.
var palette = [16]string{
	"#1d2129", "#e06c75", "#98c379", "#e5c07b", "#61afef", "#c678dd", "#56b6c2", "#c8ccd4",
	"#7f8794", "#e06c75", "#98c379", "#e5c07b", "#61afef", "#c678dd", "#56b6c2", "#ffffff",
}

// run is neighbouring cells of one look, with text that one font has: what is not ASCII may come from another.
type run struct {
	x, width int // in cells
	text     string
	look     string // class in the picture: e.g. "c2 b", or "" for plain text
	ascii    bool
}

// look is the class of a cell's style: c and the colour's number, b for bold, r for reverse.
func look(t *testing.T, s uv.Style) string {
	t.Helper()
	var words []string
	switch c := s.Fg.(type) {
	case nil:
	case ansi.BasicColor:
		words = append(words, fmt.Sprintf("c%d", c))
	default:
		t.Fatalf("a colour that is none of the sixteen: %T", c)
	}
	if s.Attrs&uv.AttrBold != 0 {
		words = append(words, "b")
	}
	if s.Attrs&uv.AttrReverse != 0 {
		words = append(words, "r")
	}
	return strings.Join(words, " ")
}

// runs are the screen's lines, without what is blank.
func (x *terminal) runs() [][]run {
	x.t.Helper()
	x.mu.Lock()
	defer x.mu.Unlock()
	out := make([][]run, x.emu.Height())
	for y := range out {
		for col := 0; col < x.emu.Width(); {
			r := run{x: col, width: 1, text: " ", ascii: true}
			if c := x.emu.CellAt(col, y); c != nil && c.Content != "" {
				r = run{x: col, width: max(c.Width, 1), text: c.Content, look: look(x.t, c.Style), ascii: c.Content[0] < 0x80}
			}
			col += r.width
			if line := out[y]; len(line) > 0 && line[len(line)-1].look == r.look && line[len(line)-1].ascii == r.ascii {
				last := &line[len(line)-1]
				last.text, last.width = last.text+r.text, last.width+r.width
				continue
			}
			out[y] = append(out[y], r)
		}
	}
	return out
}

// svg draws the screen. Each run has a length of its own, so that the columns stay columns in whatever font there is.
func (x *terminal) svg() string {
	width, height := float64(x.emu.Width())*cellWidth+2*margin, float64(x.emu.Height())*cellHeight+2*margin
	var b strings.Builder
	fmt.Fprintf(&b, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\">\n", width, height, width, height)
	b.WriteString("<!-- drawn by go test ./test/tui -run TestPicture -update -->\n<style>\n")
	b.WriteString("text { font: 13px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: " + palette[7] + "; white-space: pre }\n.b { font-weight: bold }\n.r { fill: " + palette[0] + " }\nrect.r { fill: " + palette[7] + " }\n")
	for i, color := range palette {
		fmt.Fprintf(&b, ".c%d { fill: %s }\n", i, color)
	}
	fmt.Fprintf(&b, "</style>\n<rect width=\"%.0f\" height=\"%.0f\" rx=\"8\" fill=\"%s\"/>\n", width, height, palette[0])
	for y, line := range x.runs() {
		top := margin + float64(y)*cellHeight
		fmt.Fprintf(&b, "<!-- line -->\n")
		for _, r := range line {
			if r.look == "" && strings.TrimSpace(r.text) == "" {
				continue
			}
			left, wide := margin+float64(r.x)*cellWidth, float64(r.width)*cellWidth
			if strings.Contains(r.look, "r") {
				fmt.Fprintf(&b, "<rect class=\"r\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/>\n", left, top, wide, cellHeight)
			}
			class := ""
			if r.look != "" {
				class = " class=\"" + r.look + "\""
			}
			fmt.Fprintf(&b, "<text%s x=\"%.1f\" y=\"%.1f\" textLength=\"%.1f\" xml:space=\"preserve\">%s</text>\n", class, left, top+baseline, wide, html.EscapeString(r.text))
		}
	}
	b.WriteString("</svg>\n")
	return b.String()
}

var (
	textOf  = regexp.MustCompile(`<text(?: class="([^"]*)")? x="([0-9.]+)"[^>]*>([^<]*)</text>`)
	lineEnd = regexp.MustCompile(`(?m)^<!-- line -->\n`)
)

// readSVG is what a picture of svg shows: its text, and, line by line, which looks it has.
func readSVG(picture string) (text, looks string) {
	for _, part := range lineEnd.Split(picture, -1)[1:] {
		line, seen := "", ""
		for _, m := range textOf.FindAllStringSubmatch(part, -1) {
			left, _ := strconv.ParseFloat(m[2], 64) // it matched
			if column := int((left-margin)/cellWidth + 0.5); column > len([]rune(line)) {
				line += strings.Repeat(" ", column-len([]rune(line)))
			}
			line, seen = line+html.UnescapeString(m[3]), seen+" "+m[1]
		}
		text, looks = text+line+"\n", looks+seen+"\n"
	}
	return text, looks
}
