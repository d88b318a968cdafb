package tui

import (
	"slices"
	"strings"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"git.thaloco.com/thaloco/banger/client"
)

// maxInput bounds what one can type into a field, in characters.
const maxInput = 200

// input is a line of text that is edited. The zero value is empty.
type input struct {
	text []rune
	at   int // where the cursor is
}

func (i *input) String() string { return string(i.text) }

func (i *input) set(s string) { i.text, i.at = []rune(s), len([]rune(s)) }

func (i *input) insert(s string) {
	r := []rune(strings.TrimRight(client.Visible(s), "\r\n"))
	r = r[:min(len(r), maxInput-len(i.text))]
	i.text = slices.Insert(i.text, i.at, r...)
	i.at += len(r)
}

// key edits, and reports whether the key was one for that.
func (i *input) key(k tea.KeyPressMsg) bool {
	switch k.String() {
	case "left", "ctrl+b":
		i.at = max(0, i.at-1)
	case "right", "ctrl+f":
		i.at = min(len(i.text), i.at+1)
	case "home", "ctrl+a":
		i.at = 0
	case "end", "ctrl+e":
		i.at = len(i.text)
	case "backspace", "ctrl+h":
		if i.at > 0 {
			i.at--
			i.text = slices.Delete(i.text, i.at, i.at+1)
		}
	case "delete", "ctrl+d":
		if i.at < len(i.text) {
			i.text = slices.Delete(i.text, i.at, i.at+1)
		}
	case "ctrl+u":
		i.text, i.at = slices.Delete(i.text, 0, i.at), 0
	case "ctrl+w":
		from := i.at
		for from > 0 && i.text[from-1] == ' ' {
			from--
		}
		for from > 0 && i.text[from-1] != ' ' {
			from--
		}
		i.text, i.at = slices.Delete(i.text, from, i.at), from
	default:
		if k.Text == "" {
			return false
		}
		i.insert(k.Text)
	}
	return true
}

// view is the part around the cursor that fits into w cells, and where in it the cursor is.
func (i *input) view(w int) (text string, at int) {
	from := 0
	for ansi.StringWidth(string(i.text[from:i.at])) >= w && from < i.at {
		from++
	}
	return ansi.Truncate(string(i.text[from:]), w, ""), ansi.StringWidth(string(i.text[from:i.at]))
}
