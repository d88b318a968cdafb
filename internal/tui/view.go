package tui

import (
	"fmt"
	"slices"
	"strings"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

const (
	leastWidth, leastHeight = 40, 10
	sideWidth               = 150 // from here on the pane is beside the list
	paneHeight              = 11  // less room than this below the header shows the list alone
)

type rect struct{ x, y, w, h int }

// layout is where things are. What is not shown has no height.
type layout struct{ list, pane rect }

func (m *model) layout() layout {
	w, body := m.w, m.h-3 // header, line of words, line of keys
	switch {
	case m.zoomed:
		return layout{pane: rect{0, 1, w, body}}
	case w >= sideWidth:
		list := min(w*55/100, 130)
		return layout{list: rect{0, 1, list, body}, pane: rect{list + 1, 1, w - list - 1, body}}
	case body < paneHeight && m.focus:
		return layout{pane: rect{0, 1, w, body}}
	case body < paneHeight:
		return layout{list: rect{0, 1, w, body}}
	}
	list := max(body*45/100, 5)
	return layout{list: rect{0, 1, w, list}, pane: rect{0, 1 + list, w, body - list}}
}

func (m *model) showsPane() bool { return m.layout().pane.h > 0 && m.mode != modeForm }

// View draws everything; bubbletea sends what differs from the screen.
func (m *model) View() tea.View {
	lines, cursor := m.screen()
	v := tea.NewView(strings.Join(lines, "\n"))
	v.AltScreen, v.MouseMode, v.WindowTitle, v.Cursor = true, tea.MouseModeCellMotion, "banger", cursor
	return v
}

func (m *model) screen() ([]string, *tea.Cursor) {
	if m.w < leastWidth || m.h < leastHeight {
		return []string{ansi.Truncate(fmt.Sprintf("banger needs %d x %d cells", leastWidth, leastHeight), max(m.w, 0), "")}, nil
	}
	var cursor *tea.Cursor
	var body []string
	switch m.mode {
	case modeForm:
		lines, x, y := m.formLines(m.w, m.h-3)
		if x > 0 {
			cursor = tea.NewCursor(x, y+1)
		}
		body = lines
	case modeHelp:
		body = m.helpLines(m.w, m.h-3)
	default:
		body = m.body()
	}
	if m.mode == modeConfirm {
		body = m.question(body)
	}
	for len(body) < m.h-3 {
		body = append(body, "")
	}
	lines := append([]string{m.header()}, body[:m.h-3]...)
	words, at := m.wordsLine()
	if m.mode == modeFilter {
		cursor = tea.NewCursor(at, m.h-2)
	}
	lines = append(lines, words, m.keysLine())
	for i := range lines {
		lines[i] = ansi.Truncate(lines[i], m.w, "…")
	}
	return lines, cursor
}

// header says where one is: how many VMs, how they run, whether there is a daemon.
func (m *model) header() string {
	running := 0
	for _, v := range m.world.vms {
		if v.GetState() == "running" {
			running++
		}
	}
	left := fmt.Sprintf("  %s, %d running", count(len(m.world.vms)), running)
	if len(m.marks) > 0 {
		left += fmt.Sprintf(", %d marked", len(m.marks))
	}
	if n := m.world.atWork(); n > 0 {
		left += fmt.Sprintf("  %s %d at work", spin(m.ticks), n)
	}
	if f := m.words.String(); f != "" {
		left += fmt.Sprintf("  /%s: %d", f, len(m.shown))
	}
	s, daemon := good, "● "+strings.TrimSpace(m.status.GetVmm()+" "+m.status.GetAccel())
	if m.gone != nil {
		s, daemon = bad, "○ no daemon"
	}
	w := m.w - ansi.StringWidth(daemon) - 1
	return m.paint(accent, fit(" banger", 7)) + fit(left, w-7) + m.paint(s, daemon) + " "
}

// count is so many VMs.
func count(n int) string {
	if n == 1 {
		return "1 VM"
	}
	return fmt.Sprintf("%d VMs", n)
}

// wordsLine is the line above the keys, and where the cursor is in it while a filter is typed.
func (m *model) wordsLine() (line string, at int) {
	switch {
	case m.mode == modeFilter:
		text, at := m.words.view(m.w - 30)
		return " " + m.paint(strong, "filter: ") + text + m.paint(faint, "  Enter keeps it, Esc takes it away"), at + 9
	case m.over:
		return m.paint(bad, fit(" D tries again: "+errorText(m.gone), m.w)), 0
	case m.gone != nil:
		return m.paint(bad, fit(" The daemon is gone; VMs run on. It is noticed when it is back; D starts it.", m.w)), 0
	case m.say != "":
		return m.paint(m.saying, fit(" "+m.say, m.w)), 0
	}
	return "", 0
}

// keysLine is as many of the keys as have room.
func (m *model) keysLine() string {
	switch m.mode {
	case modeForm:
		return ""
	case modeConfirm:
		return " " + m.paint(strong, "y") + " yes  " + m.paint(strong, "n") + " no"
	case modeHelp:
		return m.paint(faint, " ↑ ↓ scroll, any other key goes back")
	}
	line := ""
	for _, b := range keyMap {
		if b.short == "" {
			continue
		}
		word := "  " + m.paint(strong, b.keys[0]) + " " + b.short
		if ansi.StringWidth(line+word) > m.w+1 {
			break
		}
		line += word
	}
	return strings.TrimPrefix(line, " ")
}

func (m *model) body() []string {
	l := m.layout()
	list, shown := m.listLines(l.list.w, l.list.h), m.paneView(l.pane.w, l.pane.h)
	if l.list.h == 0 || l.pane.h == 0 || l.pane.x == 0 {
		return append(list, shown...)
	}
	for i := range list {
		list[i] = fit(list[i], l.list.w) + m.paint(faint, "│") + shown[i]
	}
	return list
}

type column struct {
	title string
	w     int
	order order // by which it sorts; negative: it does not
}

// columns shares out a width. What has a fixed form has a fixed width; the rest gets its part of what is left, so
// that nothing moves when VMs come and go.
func (m *model) columns(w int) []column {
	const cpu, memory, age, before, gaps = 4, 9, 4, 2, 5
	rest := max(w-before-cpu-memory-age-gaps, 9)
	name, state := rest*36/100, rest*37/100
	return []column{
		{"NAME", name, byName}, {"STATE", state, byState}, {"CPU", cpu, byCPU}, {"MEMORY", memory, byMemory},
		{"PORTS", rest - name - state, -1}, {"AGE", age, byAge},
	}
}

func (m *model) listLines(w, h int) []string {
	if h == 0 {
		return nil
	}
	columns := m.columns(w)
	head := " "
	for _, c := range columns {
		title := c.title
		if c.order == m.order {
			if title += "▾"; m.reverse {
				title = c.title + "▴"
			}
		}
		head += " " + fit(title, c.w)
	}
	lines := []string{m.paint(faint, ansi.Truncate(head, w, ""))}
	if len(m.shown) == 0 {
		switch {
		case !m.world.heard:
			lines = append(lines, "  ...")
		case len(m.world.vms) > 0:
			lines = append(lines, "  No VM has these words. Esc takes the filter away.")
		default:
			lines = append(lines, "  No VMs yet. Press n to make one.")
		}
	}
	now := m.now()
	for i := m.top; i < len(m.shown) && len(lines) < h; i++ {
		id := m.shown[i]
		v, u := m.world.vms[id], m.world.usage[id]
		cells := [...]struct {
			text  string
			style style
		}{
			{v.GetName(), plain}, {m.stateText(v), stateStyle(v.GetState())}, {right(u.cpuText(), columns[2].w), plain},
			{m.memoryText(v, u), plain}, {u.portsText(), plain}, {right(since(now, v.GetCreatedAt()), columns[5].w), faint},
		}
		line := ""
		here := id == m.at
		for j, c := range columns {
			text := fit(cells[j].text, c.w)
			if !here && m.gone == nil {
				text = m.paint(cells[j].style, text)
			}
			if j > 0 {
				line += " "
			}
			line += text
		}
		pointer, star := " ", " "
		if here {
			pointer = ">"
		}
		if m.marks[id] {
			star = "*"
		}
		line = pointer + star + line
		switch {
		case here && !m.focus:
			line = m.paint(chosen, fit(line, w))
		case here:
			line = m.paint(strong, fit(line, w))
		case m.gone != nil:
			line = m.paint(faint, fit(line, w))
		}
		lines = append(lines, ansi.Truncate(line, w, ""))
	}
	for len(lines) < h {
		lines = append(lines, "")
	}
	return lines
}

// stateText is the state, and what goes on or went wrong.
func (m *model) stateText(v *bangerv1.VM) string {
	state := v.GetState()
	if op := m.world.running[v.GetId()]; op != nil {
		if s := stageNow(op); s != nil {
			return client.StageText(s.GetName())
		}
		return state + ": " + op.GetKind()
	}
	switch {
	case v.GetState() == "failed" && v.GetFailure() != nil:
		return state + ": " + client.StageText(v.GetFailure().GetStep())
	case v.GetNote() != "":
		return state + ": " + v.GetNote()
	}
	return state
}

func (m *model) memoryText(v *bangerv1.VM, u *usage) string {
	all := short(v.GetMemoryMib() << 20)
	if used := u.memory(); used >= 0 {
		return short(used) + "/" + all
	}
	return all
}

type tab struct{ x, w int }

// tabs are where the panes' names are on their line.
func tabs() [panes]tab {
	var out [panes]tab
	x := 1
	for p, name := range paneNames {
		out[p] = tab{x, len(name) + 4}
		x += len(name) + 4
	}
	return out
}

func (m *model) tabLine(w int) string {
	line := m.paint(faint, "─")
	for p, name := range paneNames {
		text := fmt.Sprintf(" %d %s ", p+1, name)
		switch {
		case pane(p) == m.pane && m.focus:
			text = m.paint(chosen, "["+text[1:len(text)-1]+"]")
		case pane(p) == m.pane:
			text = m.paint(strong, "["+text[1:len(text)-1]+"]")
		default:
			text = m.paint(faint, text)
		}
		line += text
	}
	subject := ""
	if v := m.world.vms[m.at]; v != nil && m.pane != paneOperations && m.pane != paneEvents && m.pane != paneImages {
		subject = " " + v.GetName() + " "
	}
	room := w - ansi.StringWidth(line)
	if room <= 0 {
		return ansi.Truncate(line, w, "")
	}
	if ansi.StringWidth(subject) > room {
		subject = ""
	}
	return line + m.paint(faint, strings.Repeat("─", room-ansi.StringWidth(subject))) + m.paint(strong, subject)
}

// paneView is the pane: the line of tabs, and what the pane shows from its place on.
func (m *model) paneView(w, h int) []string {
	if h == 0 {
		return nil
	}
	c := m.paneLines(w)
	rows := h - 1
	at := &m.scroll[m.pane]
	if n := len(c.items); n > 0 {
		i := min(m.item[m.pane], n-1)
		end := len(c.lines)
		if i+1 < n {
			end = c.items[i+1]
		}
		*at = max(min(*at, c.items[i]), min(end, c.items[i]+rows)-rows)
	}
	*at = max(0, min(*at, len(c.lines)-rows))
	if m.pane == paneLogs && m.tail {
		*at = max(0, len(c.lines)-rows)
	}
	lines := append([]string{m.tabLine(w)}, c.lines[min(*at, len(c.lines)):min(*at+rows, len(c.lines))]...)
	for len(lines) < h {
		lines = append(lines, "")
	}
	for i := range lines {
		lines[i] = ansi.Truncate(lines[i], w, "…")
	}
	return lines
}

// question puts the question into the middle.
func (m *model) question(body []string) []string {
	var text []string
	w := min(m.w-8, 70)
	for _, l := range m.ask.lines {
		text = append(text, wrap(l, w)...)
	}
	text = append(text, "", "y: yes   n: no")
	for len(body) < m.h-3 {
		body = append(body, "")
	}
	top := max(0, (len(body)-len(text)-2)/2)
	edge := strings.Repeat("─", w+2)
	box := []string{"╭" + edge + "╮"}
	for _, l := range text {
		box = append(box, "│ "+fit(l, w)+" │")
	}
	box = append(box, "╰"+edge+"╯")
	left := strings.Repeat(" ", (m.w-w-4)/2)
	for i, l := range box {
		if top+i < len(body) {
			body[top+i] = left + m.paint(warning, l)
		}
	}
	return body
}

// helpLines are the keys, by what they are for.
func (m *model) helpLines(w, h int) []string {
	lines := helpText(w)
	for i, l := range lines {
		if l != "" && !strings.HasPrefix(l, " ") {
			lines[i] = m.paint(strong, l)
		}
		lines[i] = " " + lines[i]
	}
	m.helpAt = max(0, min(m.helpAt, len(lines)-h))
	return lines[m.helpAt:min(m.helpAt+h, len(lines))]
}

// helpText is made of the key map.
func helpText(w int) []string {
	var lines []string
	for _, group := range []string{groupVM, groupShow, groupMove, groupRest} {
		lines = append(lines, group)
		for _, b := range keyMap {
			if b.group != group {
				continue
			}
			for i, l := range wrap(b.text, w-16) {
				key := b.shown
				if i > 0 {
					key = ""
				}
				lines = append(lines, "  "+fit(key, 11)+l)
			}
		}
		lines = append(lines, "")
	}
	return slices.Clip(lines[:len(lines)-1])
}
