package tui

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

const (
	// settle is how long the screen must stay as it is before what it shows is asked for: moving over a
	// list must not ask for each of its rows.
	settle = 100 * time.Millisecond
	// again is when a stream that ended by itself is asked for once more.
	again = 2 * time.Second
	// Between two drawings of what grows by the clock alone: while something runs, and while nothing does.
	busyTick, idleTick = 200 * time.Millisecond, 10 * time.Second
	// callTime bounds a call that begins an operation or asks one question.
	callTime = 30 * time.Second
	// maxUsage is how many VMs are looked at, at most: the API's own bound.
	maxUsage = 256
	keptLog  = 2000 // lines
)

// pane is what the lower (or right) part shows.
type pane int

const (
	paneDetails pane = iota
	paneOperations
	paneLogs
	paneEvents
	panePorts
	paneImages
	panes
)

var paneNames = [panes]string{"Details", "Operations", "Log", "Events", "Ports", "Images"}

// mode is who gets the keys.
type mode int

const (
	modeList mode = iota
	modeFilter
	modeForm
	modeConfirm
	modeHelp
)

// model is all that the screen is made of. It is used by bubbletea's loop alone.
type model struct {
	o Options
	f *feeds
	painter
	now func() time.Time

	w, h   int
	status *bangerv1.GetStatusResponse
	gone   error // there is no daemon
	over   bool  // and none is waited for
	world  *world

	shown   []string // ids, filtered and sorted
	stale   bool     // shown is not what it should be
	at      string   // id under the cursor
	top     int      // first row on the screen
	atNext  string   // id of a VM that gets the cursor when it is listed
	marks   map[string]bool
	words   input // the filter
	order   order
	reverse bool

	mode   mode
	pane   pane
	focus  bool // on the pane
	zoomed bool
	item   [panes]int // under the cursor, in panes that have one
	scroll [panes]int // first line on the screen
	tail   bool       // the log is followed: the last line is on the screen
	form   *form
	ask    *question
	say    string // the line above the keys
	saying style
	helpAt int

	detail      *bangerv1.VM // of the VM under the cursor
	detailFault string
	detailOld   bool
	log         []string
	logRest     string // of a line without its end
	logFor      string // whose log is followed
	logFault    string
	usageFor    string // ids that are looked at
	settling    bool
	away        bool // something else has the terminal
	ticks       int
	ticking     int // number of the ticker in use

	batches map[string]*batch      // by operation
	opened  map[string]*openedPort // by VM and port
}

func newModel(o Options, f *feeds) *model {
	return &model{
		o: o, f: f, painter: painter(o.Color), now: time.Now, world: newWorld(), marks: map[string]bool{}, tail: true,
		batches: map[string]*batch{}, opened: map[string]*openedPort{}, w: 80, h: 24,
	}
}

type (
	settledMsg struct{}
	tickMsg    struct{ number int }
	detailMsg  struct {
		id  string
		vm  *bangerv1.VM
		err error
	}
	statusMsg struct {
		status *bangerv1.GetStatusResponse
		err    error
	}
)

func (m *model) takeStatus(s *bangerv1.GetStatusResponse) {
	clean(s)
	m.status = s
}

// Init begins the clock.
func (m *model) Init() tea.Cmd { return m.tick() }

// tick is the local clock: ages, elapsed times and the spinner. It asks nobody anything.
func (m *model) tick() tea.Cmd {
	m.ticking++
	number, every := m.ticking, idleTick
	if m.world.atWork() > 0 {
		every = busyTick
	}
	return tea.Tick(every, func(time.Time) tea.Msg { return tickMsg{number} })
}

// Update takes what happened.
func (m *model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	cmd := m.take(msg)
	m.refresh()
	return m, tea.Batch(cmd, m.follow())
}

func (m *model) take(msg tea.Msg) tea.Cmd {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.w, m.h = msg.Width, msg.Height
		return anew()
	case tea.KeyPressMsg:
		return m.key(msg)
	case tea.PasteMsg:
		m.paste(msg.Content)
	case tea.MouseClickMsg:
		return m.click(msg.Mouse())
	case tea.MouseWheelMsg:
		m.wheel(msg.Mouse())
	case tea.ResumeMsg:
		m.away = false
	case tickMsg:
		if msg.number == m.ticking {
			m.ticks++
			return m.tick()
		}
	case eventMsg:
		clean(msg.e)
		return m.event(msg.e)
	case goneMsg:
		m.gone, m.over = msg.err, msg.over
		m.usageFor, m.logFor = "", ""
		m.f.watchUsage(nil)
		m.f.readLog("")
		what := "the daemon is gone"
		if msg.over {
			what = "the daemon cannot be followed"
		}
		m.world.say(m.now(), "", bad, "%s: %s", what, errorText(msg.err))
	case usageMsg:
		if msg.number == m.f.usage.number {
			clean(msg.look)
			m.world.look(msg.look)
			m.stale = m.stale || m.order == byCPU || m.order == byMemory
		}
	case usageEndMsg:
		if msg.number == m.f.usage.number {
			return tea.Tick(again, func(time.Time) tea.Msg { return usageAgainMsg(msg) })
		}
	case usageAgainMsg:
		if msg.number == m.f.usage.number {
			m.usageFor = ""
		}
	case logMsg:
		if msg.number == m.f.log.number {
			m.addLog(msg.data)
		}
	case logEndMsg:
		if msg.number == m.f.log.number && msg.err != nil {
			m.logFault = errorText(msg.err)
		}
	case detailMsg:
		if msg.id == m.at {
			clean(msg.vm)
			m.detail, m.detailFault = msg.vm, ""
			if msg.err != nil {
				m.detailFault = errorText(msg.err)
			}
		}
	case statusMsg:
		if msg.err != nil {
			m.complain(msg.err)
		} else {
			m.takeStatus(msg.status)
			if m.over { // it was given up: another daemon may fit
				m.over = false
				m.f.all.Go(m.f.follow)
			}
		}
	case settledMsg:
		m.settling = false
		return m.settle()
	case begunMsg:
		clean(msg.op)
		m.begun(msg)
	case doneMsg:
		return m.done(msg)
	case formMsg:
		clean(msg.op)
		clean(msg.defaults)
		m.formAnswer(msg)
	case imageDeletedMsg:
		if msg.err != nil {
			m.complain(msg.err)
		} else {
			m.tell(good, "%s: deleted", msg.name)
		}
	case openedMsg:
		m.openedAnswer(msg)
	case forwardFailedMsg:
		m.complain(fmt.Errorf("port %d of %s: %w", msg.port, msg.vm, msg.err))
	}
	return nil
}

// anew draws everything, on a terminal that may be in any state. bubbletea scrolls with margins (DECSTBM), and sets
// them back to the height that it knows: if the terminal was given another one meanwhile, they stay, and all that
// is drawn after it is drawn wrong.
func anew() tea.Cmd {
	return tea.Sequence(tea.Raw(ansi.SetTopBottomMargins(0, 0)), tea.ClearScreen)
}

type usageAgainMsg struct{ number int }

func (m *model) event(e *bangerv1.WatchResponse) tea.Cmd {
	busy := m.world.atWork() > 0
	back := m.gone != nil
	if back {
		m.gone, m.over = nil, false
		m.world.say(m.now(), "", good, "the daemon is back")
		m.tell(good, "The daemon is back.")
	}
	ended := m.world.apply(e, m.now())
	m.stale, m.detailOld = true, true
	if ended != nil {
		m.ended(ended)
	}
	if m.logFault != "" || e.GetSnapshot() != nil {
		m.logFor = "" // there may be a log now
	}
	if e.GetSnapshot() != nil {
		for id, b := range m.batches { // what ended while nobody listened
			if op := m.world.ops[id]; op == nil || client.Final(op) {
				delete(m.batches, id)
				b.end(op)
			}
		}
	}
	var cmds []tea.Cmd
	if !busy && m.world.atWork() > 0 {
		cmds = append(cmds, m.tick())
	}
	if back {
		cmds = append(cmds, m.askStatus())
	}
	return tea.Batch(cmds...)
}

func (m *model) askStatus() tea.Cmd {
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(m.f.ctx, callTime)
		defer cancel()
		s, err := m.o.Follow.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
		return statusMsg{s, err}
	}
}

// follow asks for what the screen shows, once it has been the same for a moment.
func (m *model) follow() tea.Cmd {
	if m.settling || m.away || m.gone != nil || !m.unsettled() {
		return nil
	}
	m.settling = true
	return tea.Tick(settle, func(time.Time) tea.Msg { return settledMsg{} })
}

func (m *model) unsettled() bool {
	return m.usageFor != strings.Join(m.wantUsage(), " ") || m.wantLog() != m.logFor || m.wantDetail()
}

func (m *model) wantLog() string {
	if m.showsPane() && m.pane == paneLogs {
		return m.at
	}
	return ""
}

func (m *model) wantDetail() bool {
	return m.at != "" && m.showsPane() && m.pane == paneDetails && (m.detailOld || m.detail.GetId() != m.at && m.detailFault == "")
}

// wantUsage is the VMs to look at: those that run and are on the screen, and all that are listed if they are
// sorted by what they use.
func (m *model) wantUsage() []string {
	rows := m.shown
	if m.order != byCPU && m.order != byMemory {
		if l := m.layout(); l.list.h > 1 {
			rows = rows[min(m.top, len(rows)):min(m.top+l.list.h-1, len(rows))]
		} else {
			rows = nil
		}
	}
	var ids []string
	if m.world.vms[m.at].GetState() == "running" {
		ids = append(ids, m.at)
	}
	for _, id := range rows {
		if id != m.at && m.world.vms[id].GetState() == "running" && len(ids) < maxUsage {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

func (m *model) settle() tea.Cmd {
	if m.gone != nil || m.away {
		return nil
	}
	ids := m.wantUsage()
	if key := strings.Join(ids, " "); key != m.usageFor {
		m.usageFor = key
		m.f.watchUsage(ids)
	}
	if id := m.wantLog(); id != m.logFor {
		m.logFor = id
		m.log, m.logRest, m.logFault, m.scroll[paneLogs], m.tail = nil, "", "", 0, true
		m.f.readLog(id)
	}
	if !m.wantDetail() {
		return nil
	}
	m.detailOld = false
	id := m.at
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(m.f.ctx, callTime)
		defer cancel()
		r, err := m.o.Follow.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Id: id})
		return detailMsg{id, r.GetVm(), err}
	}
}

func (m *model) addLog(data []byte) {
	lines := strings.Split(m.logRest+string(data), "\n")
	m.logRest = lines[len(lines)-1]
	if len(m.logRest) > 1<<16 { // a guest need not end its lines
		lines, m.logRest = append(lines, ""), ""
	}
	for _, l := range lines[:len(lines)-1] {
		m.log = append(m.log, client.Visible(l))
	}
	if extra := len(m.log) - keptLog; extra > 0 {
		m.log = slices.Clone(m.log[extra:])
		m.scroll[paneLogs] = max(0, m.scroll[paneLogs]-extra)
	}
}

// tell puts a line above the keys.
func (m *model) tell(s style, format string, args ...any) {
	m.say, m.saying = client.Visible(fmt.Sprintf(format, args...)), s
}

// complain says what went wrong; all of it is in the events, where there is room.
func (m *model) complain(err error) {
	m.tell(bad, "%s", errorText(err))
	m.world.say(m.now(), "", bad, "%s", errorText(err))
}

// errorText is an error with its hint, on one line.
func errorText(err error) string {
	var e *client.Error
	if !asError(err, &e) {
		return client.Visible(err.Error())
	}
	text := e.Message
	if text == "" && e.Cause != nil {
		text = e.Cause.Error()
	}
	if e.Subject != "" && !strings.Contains(text, e.Subject) {
		text = e.Subject + ": " + text
	}
	if e.Hint != "" {
		text += " (" + e.Hint + ")"
	}
	return client.Visible(text)
}

// order is the column by which VMs are sorted.
type order int

const (
	byName order = iota
	byState
	byCPU
	byMemory
	byAge
	orders
)

// refresh makes the list, and keeps the cursor on what it was on.
func (m *model) refresh() {
	if m.stale {
		m.stale = false
		was := slices.Index(m.shown, m.at)
		m.shown = m.shown[:0]
		words := strings.Fields(strings.ToLower(m.words.String()))
		for id, v := range m.world.vms {
			if m.matches(v, words) {
				m.shown = append(m.shown, id)
			}
		}
		slices.SortFunc(m.shown, m.compare)
		for id := range m.marks {
			if m.world.vms[id] == nil {
				delete(m.marks, id)
			}
		}
		if m.atNext != "" && slices.Contains(m.shown, m.atNext) {
			m.goTo(m.atNext)
			m.atNext = ""
		}
		if !slices.Contains(m.shown, m.at) {
			m.at = ""
			if n := len(m.shown); n > 0 {
				m.at = m.shown[min(max(was, 0), n-1)]
			}
			m.detail, m.detailFault, m.item[panePorts] = nil, "", 0
		}
	}
	rows := max(m.layout().list.h-1, 1)
	i := max(slices.Index(m.shown, m.at), 0)
	m.top = min(m.top, i)
	m.top = max(m.top, i-rows+1)
	m.top = max(0, min(m.top, len(m.shown)-rows))
}

func (m *model) matches(v *bangerv1.VM, words []string) bool {
	text := strings.ToLower(v.GetName() + " " + m.stateText(v) + " " + v.GetImage() + " " + v.GetId())
	for key, value := range v.GetLabels() {
		text += " " + strings.ToLower(key+"="+value)
	}
	for _, w := range words {
		if !strings.Contains(text, w) {
			return false
		}
	}
	return true
}

// states in the order in which they want to be looked at.
var stateOrder = []string{"failed", "starting", "stopping", "deleting", "running", "defined", "stopped"}

func (m *model) compare(a, b string) int {
	v, w := m.world.vms[a], m.world.vms[b]
	c := 0
	switch m.order {
	case byName:
	case byState:
		c = cmp.Compare(slices.Index(stateOrder, v.GetState()), slices.Index(stateOrder, w.GetState()))
	case byCPU:
		cpu := func(id string) float64 {
			if u := m.world.usage[id]; u != nil {
				return u.cpu
			}
			return -2
		}
		c = cmp.Compare(cpu(b), cpu(a))
	case byMemory:
		c = cmp.Compare(m.world.usage[b].memory(), m.world.usage[a].memory())
	case byAge:
		c = w.GetCreatedAt().AsTime().Compare(v.GetCreatedAt().AsTime())
	}
	if m.reverse {
		c = -c
	}
	if c != 0 {
		return c
	}
	c = cmp.Or(cmp.Compare(v.GetName(), w.GetName()), cmp.Compare(a, b))
	if m.reverse && m.order == byName {
		c = -c
	}
	return c
}

// move puts the cursor n rows on.
func (m *model) move(n int) {
	if len(m.shown) == 0 {
		return
	}
	i := min(max(max(slices.Index(m.shown, m.at), 0)+n, 0), len(m.shown)-1)
	m.goTo(m.shown[i])
}

func (m *model) goTo(id string) {
	if id == m.at {
		return
	}
	m.at, m.detail, m.detailFault, m.item[panePorts] = id, nil, "", 0
	m.scroll[paneDetails], m.scroll[panePorts] = 0, 0
}
