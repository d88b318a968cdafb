package tui

import (
	"slices"

	tea "charm.land/bubbletea/v2"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
)

// wheelStep is how many lines a step of the mouse's wheel is.
const wheelStep = 3

func (m *model) key(k tea.KeyPressMsg) tea.Cmd {
	switch m.mode {
	case modeForm:
		return m.formKey(k)
	case modeFilter:
		switch k.String() {
		case "enter":
			m.mode = modeList
		case "esc", "ctrl+c":
			m.mode = modeList
			m.words.set("")
		case "up":
			m.move(-1)
		case "down":
			m.move(1)
		default:
			m.words.key(k)
		}
		m.stale = true
		return nil
	case modeConfirm:
		ask := m.ask
		switch k.String() {
		case "y", "Y":
			m.mode, m.ask = modeList, nil
			return ask.yes()
		case "n", "N", "esc", "q", "ctrl+c":
			m.mode, m.ask = modeList, nil
			m.tell(plain, "Nothing was deleted.")
		}
		return nil // nothing else answers: a key that was meant for the list must not
	case modeHelp:
		switch commandOf(k.String()) {
		case goUp:
			m.helpAt--
		case goDown:
			m.helpAt++
		case goPageUp:
			m.helpAt -= m.h - 3
		case goPageDown:
			m.helpAt += m.h - 3
		case goFirst:
			m.helpAt = 0
		case goLast:
			m.helpAt = 1 << 20
		default:
			m.mode = modeList
		}
		return nil
	}
	m.say = ""
	return m.command(commandOf(k.String()))
}

func (m *model) command(do command) tea.Cmd {
	switch do {
	case quit:
		return tea.Quit
	case redraw:
		return anew()
	case suspend:
		if !canSuspend() {
			m.tell(warning, "There is no shell to go back to.")
			return nil
		}
		m.leave()
		return tea.Suspend
	case help:
		m.mode, m.helpAt = modeHelp, 0
	case newVM:
		image := ""
		if m.focus && m.pane == paneImages {
			image = m.imageAt().GetName()
		}
		return m.openForm(image)
	case startVM, stopVM, restartVM:
		return m.act(do, m.targets())
	case deleteVM:
		if m.focus && m.pane == paneImages {
			m.askDeleteImage(m.imageAt())
			return nil
		}
		m.askDelete(m.targets())
	case enterVM:
		return m.enter()
	case openPort:
		return m.openOne()
	case cancelOperation:
		if m.focus && m.pane == paneOperations {
			if ops := m.world.operations(); m.item[paneOperations] < len(ops) && ops[m.item[paneOperations]].GetState() == "running" {
				return m.cancelThese([]*bangerv1.Operation{ops[m.item[paneOperations]]})
			}
			return m.cancelThese(nil)
		}
		return m.cancelOperations(m.targets())
	case mark:
		if m.at != "" {
			m.toggle(m.at)
			m.move(1)
		}
	case markAll:
		all := !slices.ContainsFunc(m.shown, func(id string) bool { return !m.marks[id] })
		clear(m.marks)
		if !all {
			for _, id := range m.shown {
				m.marks[id] = true
			}
		}
	case filter:
		m.mode, m.focus, m.zoomed = modeFilter, false, false
	case sortNext:
		m.order, m.reverse, m.stale = (m.order+1)%orders, false, true
	case sortReverse:
		m.reverse, m.stale = !m.reverse, true
	case showDetails, showOperations, showLogs, showEvents, showPorts, showImages:
		m.show(pane(do - showDetails))
	case nextPane:
		m.show((m.pane + 1) % panes)
	case zoom:
		m.zoomed = !m.zoomed
		m.focus = m.zoomed
	case switchFocus:
		m.focus = !m.focus
		m.zoomed = m.zoomed && m.focus
	case goBack:
		switch {
		case m.zoomed:
			m.zoomed, m.focus = false, false
		case m.focus:
			m.focus = false
		case len(m.marks) > 0:
			clear(m.marks)
		default:
			m.words.set("")
			m.stale = true
		}
	case activate:
		return m.activate()
	case startDaemon:
		return m.wakeDaemon()
	case goUp:
		m.step(-1)
	case goDown:
		m.step(1)
	case goPageUp:
		m.step(-m.page())
	case goPageDown:
		m.step(m.page())
	case goFirst:
		m.step(-1 << 20)
	case goLast:
		m.step(1 << 20)
	case doNothing:
	}
	return nil
}

func (m *model) toggle(id string) {
	if m.marks[id] {
		delete(m.marks, id)
	} else {
		m.marks[id] = true
	}
}

func (m *model) show(p pane) {
	m.pane = p
	if p == paneDetails {
		m.detailOld = true // usage on the host's disks has no event
	}
}

func (m *model) page() int {
	l := m.layout()
	if m.focus {
		return max(l.pane.h-2, 1)
	}
	return max(l.list.h-2, 1)
}

// step moves the cursor, or what is scrolled, by n lines.
func (m *model) step(n int) {
	if !m.focus {
		m.move(n)
		return
	}
	switch m.pane {
	case paneOperations, panePorts, paneImages:
		m.item[m.pane] = max(0, min(m.item[m.pane]+n, m.items()-1))
	default:
		m.scrollBy(n)
	}
}

// items is how many things the pane has a cursor for.
func (m *model) items() int {
	switch m.pane {
	case paneOperations:
		return len(m.world.ops)
	case panePorts:
		return len(m.world.usage[m.at].sorted())
	case paneImages:
		return len(m.world.images)
	}
	return 0
}

func (m *model) scrollBy(n int) {
	l := m.layout()
	most := max(0, len(m.paneLines(l.pane.w).lines)-(l.pane.h-1))
	at := &m.scroll[m.pane]
	if m.pane == paneLogs && m.tail {
		*at = most
	}
	*at = max(0, min(*at+n, most))
	if m.pane == paneLogs {
		m.tail = *at == most
	}
}

// activate is Enter.
func (m *model) activate() tea.Cmd {
	if !m.focus {
		m.show(paneDetails)
		m.focus = true
		return nil
	}
	switch m.pane {
	case panePorts:
		if ports := m.world.usage[m.at].sorted(); m.item[panePorts] < len(ports) {
			return m.open(m.world.vms[m.at], ports[m.item[panePorts]])
		}
	case paneImages:
		if i := m.imageAt(); i != nil {
			return m.openForm(i.GetName())
		}
	case paneOperations:
		if ops := m.world.operations(); m.item[paneOperations] < len(ops) {
			if id := ops[m.item[paneOperations]].GetVmId(); slices.Contains(m.shown, id) {
				m.goTo(id)
				m.show(paneDetails)
			}
		}
	}
	return nil
}

func (m *model) imageAt() *bangerv1.Image {
	if i := m.item[paneImages]; i < len(m.world.images) {
		return m.world.images[i]
	}
	return nil
}

// wakeDaemon starts the daemon, by asking it something with the client that may.
func (m *model) wakeDaemon() tea.Cmd {
	if m.gone == nil {
		m.tell(plain, "The daemon runs.")
		return nil
	}
	m.tell(plain, "starting the daemon")
	ctx, c := m.f.ctx, m.o.Client
	return func() tea.Msg {
		s, err := c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
		return statusMsg{s, err}
	}
}

func (m *model) paste(text string) {
	switch {
	case m.mode == modeFilter:
		m.words.insert(text)
		m.stale = true
	case m.mode == modeForm && m.form.at != fieldImage && m.form.at != fieldNAT && m.form.at != fieldStart:
		m.form.fields[m.form.at].insert(text)
	}
}

func (r rect) has(x, y int) bool { return x >= r.x && x < r.x+r.w && y >= r.y && y < r.y+r.h }

// click puts the cursor where the mouse is: on a row, a mark, a column's title, a tab, a line of a pane.
func (m *model) click(at tea.Mouse) tea.Cmd {
	if at.Button != tea.MouseLeft || m.mode == modeConfirm || m.mode == modeForm {
		return nil
	}
	if m.mode == modeHelp {
		m.mode = modeList
		return nil
	}
	l := m.layout()
	switch {
	case l.list.has(at.X, at.Y):
		m.focus = false
		row := at.Y - l.list.y - 1
		if row < 0 {
			m.sortAt(at.X - l.list.x)
			return nil
		}
		if i := m.top + row; i < len(m.shown) {
			m.goTo(m.shown[i])
			if at.X-l.list.x < 2 {
				m.toggle(m.shown[i])
			}
		}
	case l.pane.has(at.X, at.Y) && at.Y == l.pane.y:
		for p, t := range tabs() {
			if x := at.X - l.pane.x; x >= t.x && x < t.x+t.w {
				m.show(pane(p))
				m.focus = true
			}
		}
	case l.pane.has(at.X, at.Y):
		m.focus = true
		line := at.Y - l.pane.y - 1 + m.scroll[m.pane]
		c := m.paneLines(l.pane.w)
		for i := len(c.items) - 1; i >= 0; i-- {
			if line >= c.items[i] {
				m.item[m.pane] = i
				break
			}
		}
	}
	return nil
}

// sortAt sorts by the column at a place; the same again turns the order round.
func (m *model) sortAt(x int) {
	from := 2
	for _, c := range m.columns(m.layout().list.w) {
		if x >= from && x < from+c.w && c.order >= 0 {
			m.reverse = m.order == c.order && !m.reverse
			m.order, m.stale = c.order, true
			return
		}
		from += c.w + 1
	}
}

func (m *model) wheel(at tea.Mouse) {
	n := wheelStep
	switch at.Button {
	case tea.MouseWheelUp:
		n = -n
	case tea.MouseWheelDown:
	default:
		return
	}
	switch l := m.layout(); {
	case m.mode == modeHelp:
		m.helpAt += n
	case m.mode != modeList:
	case l.list.has(at.X, at.Y):
		m.move(n)
	case l.pane.has(at.X, at.Y):
		m.scrollPane(n)
	}
}

// scrollPane scrolls a pane under the mouse, whether or not it has the keys.
func (m *model) scrollPane(n int) {
	switch m.pane {
	case paneOperations, panePorts, paneImages:
		m.item[m.pane] = max(0, min(m.item[m.pane]+n, m.items()-1))
	default:
		m.scrollBy(n)
	}
}
