package tui

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	tea "charm.land/bubbletea/v2"
	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

// callsAtOnce bounds the calls of a batch that are on their way.
const callsAtOnce = 16

func asError(err error, e **client.Error) bool { return errors.As(err, e) }

// batch is one thing that was asked of one or several VMs.
type batch struct {
	verb         string // start
	begin, after string // starting, running
	total        int
	done, failed int
	one          string // the VM, if it is one
	last         string // what the last failure said
}

func (b *batch) end(op *bangerv1.Operation) {
	b.done++
	if op != nil && op.GetState() != "succeeded" {
		b.failed++
		if b.last = op.GetVmName() + ": " + op.GetState(); op.GetFault() != nil {
			b.last = op.GetVmName() + ": " + faultText(op.GetFault())
			if h := op.GetFault().GetHint(); h != "" {
				b.last += " (" + h + ")"
			}
		}
	}
}

// text is how far it is.
func (b *batch) text() (style, string) {
	who := b.one
	if b.total > 1 {
		who = fmt.Sprintf("%d VMs", b.total)
	}
	switch {
	case b.done < b.total && b.total > 1:
		return plain, fmt.Sprintf("%s: %s, %d done", who, b.begin, b.done)
	case b.done < b.total:
		return plain, fmt.Sprintf("%s: %s", who, b.begin)
	case b.failed > 0 && b.total > 1:
		return bad, fmt.Sprintf("%s: %d failed. %s", who, b.failed, b.last)
	case b.failed > 0:
		return bad, b.verb + ": " + b.last
	}
	return good, fmt.Sprintf("%s: %s", who, b.after)
}

type begunMsg struct {
	b    *batch
	vm   string
	op   *bangerv1.Operation
	err  error
	name string
}

// doneMsg is the end of a program that had the terminal.
type doneMsg struct {
	vm  string
	err error
}

// call begins an operation on a VM.
type call func(ctx context.Context, c *client.Client, id string) (*bangerv1.Operation, error)

var calls = map[command]struct {
	verb, begin, after string
	call               call
}{
	startVM: {"start", "starting", "running", func(ctx context.Context, c *client.Client, id string) (*bangerv1.Operation, error) {
		r, err := c.VMs.StartVM(ctx, &bangerv1.StartVMRequest{Id: id})
		return r.GetOperation(), err
	}},
	stopVM: {"stop", "stopping", "stopped", func(ctx context.Context, c *client.Client, id string) (*bangerv1.Operation, error) {
		r, err := c.VMs.StopVM(ctx, &bangerv1.StopVMRequest{Id: id})
		return r.GetOperation(), err
	}},
	restartVM: {"restart", "restarting", "running", func(ctx context.Context, c *client.Client, id string) (*bangerv1.Operation, error) {
		r, err := c.VMs.RestartVM(ctx, &bangerv1.RestartVMRequest{Id: id})
		return r.GetOperation(), err
	}},
	deleteVM: {"delete", "deleting", "deleted", func(ctx context.Context, c *client.Client, id string) (*bangerv1.Operation, error) {
		r, err := c.VMs.DeleteVM(ctx, &bangerv1.DeleteVMRequest{Id: id})
		return r.GetOperation(), err
	}},
}

// targets are the VMs that a key is about: those marked, in the order of the list, else the one under the cursor.
func (m *model) targets() []string {
	var ids []string
	for _, id := range m.shown {
		if m.marks[id] {
			ids = append(ids, id)
		}
	}
	for id := range m.marks { // marked, and then filtered out: they were chosen all the same
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 && m.at != "" {
		ids = []string{m.at}
	}
	return ids
}

// act begins one thing on VMs, some at a time. Marks are taken off: the same key again must not do it again.
func (m *model) act(do command, ids []string) tea.Cmd {
	if len(ids) == 0 {
		return nil
	}
	if m.gone != nil {
		m.tell(bad, "There is no daemon to ask. D starts it.")
		return nil
	}
	c := calls[do]
	b := &batch{verb: c.verb, begin: c.begin, after: c.after, total: len(ids), one: m.world.vms[ids[0]].GetName()}
	s, text := b.text()
	m.tell(s, "%s", text)
	clear(m.marks)
	names := map[string]string{}
	for _, id := range ids {
		names[id] = m.world.vms[id].GetName()
	}
	ctx, acting, send := m.f.ctx, m.o.Follow, m.f.send
	return func() tea.Msg {
		slots := make(chan struct{}, callsAtOnce)
		var all sync.WaitGroup
		for _, id := range ids {
			slots <- struct{}{}
			all.Go(func() {
				defer func() { <-slots }()
				ctx, cancel := context.WithTimeout(ctx, callTime)
				defer cancel()
				op, err := c.call(ctx, acting, id)
				send(begunMsg{b: b, vm: id, op: op, err: err, name: names[id]})
			})
		}
		all.Wait()
		return nil
	}
}

func (m *model) begun(msg begunMsg) {
	switch known := m.world.ops[msg.op.GetId()]; {
	case msg.err != nil:
		msg.b.done++
		msg.b.failed++
		msg.b.last = errorText(msg.err)
		m.world.say(m.now(), msg.name, bad, "%s: %s", msg.b.verb, errorText(msg.err))
	case client.Final(msg.op):
		msg.b.end(msg.op)
	case known != nil && client.Final(known): // its end came before the answer to its beginning
		msg.b.end(known)
	default:
		m.batches[msg.op.GetId()] = msg.b
	}
	m.tellBatch(msg.b)
}

func (m *model) ended(op *bangerv1.Operation) {
	if b := m.batches[op.GetId()]; b != nil {
		delete(m.batches, op.GetId())
		b.end(op)
		m.tellBatch(b)
	}
}

func (m *model) tellBatch(b *batch) {
	s, text := b.text()
	m.tell(s, "%s", text)
}

// cancelOperations asks what runs on VMs to stop and undo.
func (m *model) cancelOperations(ids []string) tea.Cmd {
	var ops []*bangerv1.Operation
	for _, id := range ids {
		if op := m.world.running[id]; op != nil {
			ops = append(ops, op)
		}
	}
	return m.cancelThese(ops)
}

func (m *model) cancelThese(ops []*bangerv1.Operation) tea.Cmd {
	if len(ops) == 0 {
		m.tell(warning, "Nothing runs that could be cancelled.")
		return nil
	}
	ctx, acting, send := m.f.ctx, m.o.Follow, m.f.send
	m.tell(plain, "cancelling")
	return func() tea.Msg {
		for _, op := range ops {
			ctx, cancel := context.WithTimeout(ctx, callTime)
			if _, err := acting.Operations.CancelOperation(ctx, &bangerv1.CancelOperationRequest{Id: op.GetId()}); err != nil {
				send(statusMsg{err: err})
			}
			cancel()
		}
		return nil
	}
}

// enter gives the terminal to ssh.
func (m *model) enter() tea.Cmd {
	v := m.world.vms[m.at]
	if v == nil {
		return nil
	}
	if s := v.GetState(); s != "running" && s != "starting" {
		m.tell(warning, "%s is %s. s starts it.", v.GetName(), s)
		return nil
	}
	name := v.GetName()
	m.leave()
	return tea.Exec(&session{cmd: m.o.SSH(v.GetId()), quick: 5 * time.Second}, func(err error) tea.Msg { return doneMsg{name, err} })
}

// leave stops what streams to the screen while nobody reads it: the daemon must not be kept waiting. The event
// stream stays; who falls behind in it is sent the whole state.
func (m *model) leave() {
	m.away, m.usageFor, m.logFor = true, "", ""
	m.f.watchUsage(nil)
	m.f.readLog("")
}

// canSuspend says whether there is a shell that would take the terminal and give it back (credentials(7)): a program
// whose parent is not of its session cannot be stopped by the terminal, and would wait for ever to go on.
func canSuspend() bool {
	own, err := unix.Getsid(0)
	if err != nil {
		return false
	}
	parents, err := unix.Getsid(os.Getppid())
	return err == nil && own == parents
}

func (m *model) done(msg doneMsg) tea.Cmd {
	m.away = false
	var exit *exec.ExitError
	switch {
	case msg.err == nil:
		m.tell(plain, "Back from %s.", msg.vm)
	case errors.As(msg.err, &exit):
		m.tell(warning, "Back from %s; the session ended with %d.", msg.vm, exit.ExitCode())
	default:
		m.complain(msg.err)
	}
	return nil
}

// openedPort is a port of a guest that is reached on this host's loopback until the screen ends.
type openedPort struct{ url, web string }

func portKey(vm string, port uint32) string { return vm + ":" + strconv.Itoa(int(port)) }

type openedMsg struct {
	opened *openedPort
	seen   error // the browser did not start
	shown  bool  // a browser was started
	name   string
	port   uint32
}

type forwardFailedMsg struct {
	vm   string
	port uint32
	err  error
}

// open brings a TCP port of a guest to this host's loopback and shows where, in a browser if there is one. That
// needs neither a network nor names under .vm, and reaches what listens in the guest for itself alone.
func (m *model) open(v *bangerv1.VM, p *bangerv1.Port) tea.Cmd {
	if p.GetProtocol() != "tcp" {
		m.tell(warning, "Port %d is UDP, which cannot be opened here.", p.GetPort())
		return nil
	}
	key := portKey(v.GetId(), p.GetPort())
	id, name, port, scheme := v.GetId(), v.GetName(), p.GetPort(), p.GetScheme()
	have := m.opened[key]
	if have == nil {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			m.complain(err)
			return nil
		}
		have = &openedPort{url: l.Addr().String()}
		if scheme != "" {
			have.web = scheme + "://" + l.Addr().String() + "/"
			have.url = have.web
		}
		m.opened[key] = have
		ctx, c, send := m.f.ctx, m.o.Follow, m.f.send
		m.f.all.Go(func() {
			failed := func(err error) { send(forwardFailedMsg{name, port, err}) }
			if err := c.Forward(ctx, l, id, int(port), failed); err != nil {
				failed(err)
			}
		})
	}
	return func() tea.Msg {
		msg := openedMsg{opened: have, name: name, port: port}
		if have.web != "" {
			msg.shown, msg.seen = browse(have.web)
		}
		return msg
	}
}

// browse starts a browser, if there is a way to: a screen to show it on, or BROWSER, which xdg-open honours.
func browse(url string) (bool, error) {
	if os.Getenv("DISPLAY") == "" && os.Getenv("WAYLAND_DISPLAY") == "" && os.Getenv("BROWSER") == "" {
		return false, nil
	}
	program, err := exec.LookPath("xdg-open")
	if err != nil {
		return false, nil // without it the address is shown, which is all that there is to do
	}
	cmd := exec.Command(program, url)
	if err := cmd.Start(); err != nil {
		return false, err
	}
	go func() { _ = cmd.Wait() }() // how a browser ends is nobody's business
	return true, nil
}

func (m *model) openedAnswer(msg openedMsg) {
	text, how := fmt.Sprintf("Port %d of %s: %s", msg.port, msg.name, msg.opened.url), ", until you leave"
	if msg.shown {
		how = ", in your browser, until you leave"
	}
	m.tell(good, "%s", text+how)
	if msg.seen != nil {
		m.tell(warning, "%s No browser: %v", text, msg.seen)
	}
}

// openOne opens the one web port of a VM, or shows all its ports.
func (m *model) openOne() tea.Cmd {
	v, u := m.world.vms[m.at], m.world.usage[m.at]
	if v == nil {
		return nil
	}
	if v.GetState() != "running" {
		m.tell(warning, "%s is %s. s starts it.", v.GetName(), v.GetState())
		return nil
	}
	var web []*bangerv1.Port
	for _, p := range u.sorted() {
		if p.GetScheme() != "" {
			web = append(web, p)
		}
	}
	if len(web) == 1 {
		return m.open(v, web[0])
	}
	m.pane, m.focus = panePorts, true
	m.tell(plain, "%s", "Enter opens the port under the cursor.")
	return nil
}

// question is asked before something that has no way back.
type question struct {
	lines []string
	yes   func() tea.Cmd
}

func (m *model) askDelete(ids []string) {
	if len(ids) == 0 {
		return
	}
	var names []string
	for _, id := range ids {
		names = append(names, m.world.vms[id].GetName())
	}
	what := names[0] + " and its disks?"
	if len(names) > 1 {
		what = fmt.Sprintf("%d VMs and their disks?", len(names))
	}
	lines := []string{"Delete " + what + " There is no way back."}
	if len(names) > 1 {
		const most = 12
		text := strings.Join(names[:min(len(names), most)], ", ")
		if len(names) > most {
			text += fmt.Sprintf(" and %d more", len(names)-most)
		}
		lines = append(lines, "", text)
	}
	m.mode = modeConfirm
	m.ask = &question{lines: lines, yes: func() tea.Cmd { return m.act(deleteVM, ids) }}
}

// imageDeletedMsg is the answer to the deletion of an image.
type imageDeletedMsg struct {
	name string
	err  error
}

func (m *model) askDeleteImage(i *bangerv1.Image) {
	if i == nil {
		return
	}
	ctx, c, id, name := m.f.ctx, m.o.Follow, i.GetId(), i.GetName()
	m.mode = modeConfirm
	m.ask = &question{lines: []string{"Delete the image " + name + "? One that VMs were made from stays."}, yes: func() tea.Cmd {
		return func() tea.Msg {
			ctx, cancel := context.WithTimeout(ctx, callTime)
			defer cancel()
			_, err := c.Images.DeleteImage(ctx, &bangerv1.DeleteImageRequest{Ref: id})
			return imageDeletedMsg{name, err}
		}
	}}
}
