// Package docs holds the documentation to what the programs do: the commands it shows are run, the
// output it shows is compared, and commands, flags, settings, targets and files that it names exist.
//
// How a page says it:
//
//	```console         commands after "$ ", continued by a \ at the end, each followed by its output;
//	                   no output: not compared. "..." stands for any lines, or any part of a line, and
//	                   any number of spaces equals any other. A command must succeed, unless the
//	                   output shown has a line of an error ("banger: ..." or "make: ...").
//	```sh              a script that must succeed
//	```toml            a config.toml that must be accepted
//
// All blocks of a page run in its order, in one shell, against a daemon with fake machines. Comments
// above a block change that:
//
//	<!-- test: real -->               run with a real VM instead (tag e2e), named calm-otter, which README.md makes
//	<!-- test: recorded -->           shown as it was once: other numbers and times will do, and other lines about how
//	                                  long something took
//	<!-- test: skip because ... -->   not run; every skip is in testdata/skips.golden
//	<!-- test: before: COMMAND -->    run first, unseen by the reader; any number of times
//
// Lines that begin with make are not run: their targets must exist.
package docs

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
)

// block is one fenced block of a page.
type block struct {
	page   string // relative to the root of the repository
	line   int    // of the first line in the fence
	lang   string
	text   string
	real   bool
	record bool     // other numbers will do
	skip   string   // why it is not run
	before []string // commands
}

func (b block) at() string { return fmt.Sprintf("%s:%d", b.page, b.line) }

// page is one file of documentation.
type page struct {
	name   string
	text   string
	prose  string // without its blocks
	blocks []block
}

var (
	fence     = regexp.MustCompile("^( *)```([a-z]*) *$")
	directive = regexp.MustCompile(`^<!-- test: (.*) -->$`)
)

// readPage takes a page apart.
func readPage(root, name string) (page, error) {
	text, err := os.ReadFile(root + "/" + name)
	if err != nil {
		return page{}, err
	}
	p := page{name: name, text: string(text)}
	var prose strings.Builder
	var next block
	var open *block
	for i, line := range strings.Split(p.text, "\n") {
		m := fence.FindStringSubmatch(line)
		switch {
		case open != nil && m != nil:
			p.blocks, open = append(p.blocks, *open), nil
		case open != nil:
			open.text += line + "\n"
		case m != nil:
			next.page, next.line, next.lang = name, i+2, m[2]
			b := next
			open, next = &b, block{}
		default:
			if d := directive.FindStringSubmatch(line); d != nil {
				switch command, isBefore := strings.CutPrefix(d[1], "before: "); {
				case isBefore:
					next.before = append(next.before, command)
				case d[1] == "real":
					next.real = true
				case d[1] == "recorded":
					next.record = true
				case strings.HasPrefix(d[1], "skip because "):
					next.skip = strings.TrimPrefix(d[1], "skip because ")
				default:
					return p, fmt.Errorf("%s:%d: no test directive: %s", name, i+1, d[1])
				}
			} else if strings.TrimSpace(line) != "" && (next.real || next.record || next.skip != "" || next.before != nil) {
				return p, fmt.Errorf("%s:%d: a test directive belongs right above a block", name, i+1)
			}
		}
		if open == nil && m == nil {
			prose.WriteString(line)
		}
		prose.WriteByte('\n')
	}
	if open != nil {
		return p, fmt.Errorf("%s: the block is never closed", open.at())
	}
	p.prose = prose.String()
	return p, nil
}

// command is what a reader types, and what the page says comes of it.
type command struct {
	line   int
	typed  string
	shown  []string // nil: not said
	record bool
}

// commands takes a console or sh block apart.
func (b block) commands() ([]command, error) {
	lines := strings.Split(strings.TrimSuffix(b.text, "\n"), "\n")
	if b.lang == "sh" {
		return []command{{line: b.line, typed: b.text}}, nil
	}
	var out []command
	for i := 0; i < len(lines); i++ {
		typed, ok := strings.CutPrefix(lines[i], "$ ")
		if !ok {
			if len(out) == 0 {
				return nil, fmt.Errorf("%s: output without a command: a command begins with \"$ \"", b.at())
			}
			last := &out[len(out)-1]
			last.shown = append(last.shown, lines[i])
			continue
		}
		c := command{line: b.line + i, typed: typed, record: b.record}
		for strings.HasSuffix(c.typed, `\`) && i+1 < len(lines) {
			i++
			c.typed += "\n" + lines[i]
		}
		out = append(out, c)
	}
	return out, nil
}

var errorLine = regexp.MustCompile(`(?m)^(banger|make): `)

// fails says whether the page shows that the command fails.
func (c command) fails() bool { return errorLine.MatchString(strings.Join(c.shown, "\n")) }

// matches compares output with what is shown.
func (c command) matches(output string) bool {
	if c.shown == nil {
		return true
	}
	var re strings.Builder
	var lines []*regexp.Regexp
	for _, line := range c.shown {
		if strings.TrimSpace(line) == "..." {
			re.WriteString(`(?:[^\n]*\n)*?`)
			continue
		}
		var words []string
		for _, w := range strings.Fields(line) {
			words = append(words, c.word(w))
		}
		one := strings.Join(words, " ")
		re.WriteString(one + `\n`)
		lines = append(lines, regexp.MustCompile(`^`+one+`$`))
	}
	var plain strings.Builder
	for line := range strings.Lines(output) {
		line = strings.Join(strings.Fields(line), " ")
		if c.record {
			line = minutes.ReplaceAllString(line, "60 s")
		}
		if c.record && took.MatchString(line) && !slices.ContainsFunc(lines, func(re *regexp.Regexp) bool { return re.MatchString(line) }) {
			continue
		}
		plain.WriteString(line + "\n")
	}
	return regexp.MustCompile(`^` + re.String() + `$`).MatchString(plain.String())
}

var (
	// took is a line about how long a stage took, or takes: which there are depends on the machine.
	took    = regexp.MustCompile(`^[a-z0-9-]+: .* [0-9.]+ m?s$`)
	minutes = regexp.MustCompile(`\b[0-9]+m[0-9]{2}s\b`)
	id      = regexp.MustCompile(`^[0-9a-f]{12}$`)
	number  = regexp.MustCompile(`[0-9]+(?:\\\.[0-9]+)?`)
	unit    = regexp.MustCompile(`^(?:m?s|[KMG]iB)$`)
)

// word is the expression of what a word of the page stands for.
func (c command) word(w string) string {
	switch {
	case c.record && id.MatchString(w):
		return `[0-9a-f]{12}`
	case c.record && unit.MatchString(w):
		return unit.String()[1 : len(unit.String())-1]
	}
	out := strings.ReplaceAll(regexp.QuoteMeta(w), `\.\.\.`, `[^\n]*`)
	if c.record {
		out = number.ReplaceAllString(out, `[0-9]+(?:\.[0-9]+)?`)
	}
	return out
}
