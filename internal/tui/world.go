package tui

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

const (
	keptEvents     = 500
	keptOperations = 200 // that ended
)

// world is what the event stream has told so far.
type world struct {
	vms     map[string]*bangerv1.VM
	ops     map[string]*bangerv1.Operation
	running map[string]*bangerv1.Operation // the operation that runs on a VM
	images  []*bangerv1.Image
	usage   map[string]*usage // of VMs that run and were looked at
	stages  map[string]int    // how many stages the last operation of a kind had
	events  []event           // oldest first
	heard   bool              // the stream has told the whole state
}

// event is one line of what happened.
type event struct {
	at    time.Time
	vm    string
	text  string
	style style
}

// usage is what a VM used at the last look.
type usage struct {
	last  *bangerv1.VMStats
	cpu   float64 // of all the guest's CPUs, 0 to 1; negative: not known so far
	ports []*bangerv1.Port
	known bool // ports were looked at
	fault string
}

func newWorld() *world {
	return &world{
		vms: map[string]*bangerv1.VM{}, ops: map[string]*bangerv1.Operation{}, running: map[string]*bangerv1.Operation{},
		usage: map[string]*usage{}, stages: map[string]int{},
	}
}

func (w *world) say(at time.Time, vm string, s style, format string, args ...any) {
	w.events = append(w.events, event{at, vm, client.Visible(fmt.Sprintf(format, args...)), s})
	w.events = w.events[max(0, len(w.events)-keptEvents):]
}

// apply takes a message of the stream. The operation is one that ended with it, or nil.
func (w *world) apply(e *bangerv1.WatchResponse, now time.Time) (ended *bangerv1.Operation) {
	switch {
	case e.GetSnapshot() != nil:
		w.snapshot(e.GetSnapshot())
	case e.GetVm() != nil:
		w.changed(e.GetVm(), now)
	case e.GetOperation() != nil:
		return w.operation(e.GetOperation(), now)
	case e.GetImages() != nil:
		w.images = e.GetImages().GetImages()
	case e.GetVmDeleted() != "":
		id := e.GetVmDeleted()
		if v := w.vms[id]; v != nil {
			w.say(now, v.GetName(), faint, "deleted")
		}
		delete(w.vms, id)
		delete(w.usage, id)
	}
	return nil
}

func (w *world) snapshot(s *bangerv1.Snapshot) {
	w.heard = true
	w.vms, w.ops, w.running = map[string]*bangerv1.VM{}, map[string]*bangerv1.Operation{}, map[string]*bangerv1.Operation{}
	w.images = s.GetImages()
	for _, v := range s.GetVms() {
		w.vms[v.GetId()] = v
	}
	for id := range w.usage {
		if w.vms[id].GetState() != "running" {
			delete(w.usage, id)
		}
	}
	for _, op := range s.GetOperations() {
		w.keep(op)
	}
}

// keep takes an operation as it is.
func (w *world) keep(op *bangerv1.Operation) {
	w.ops[op.GetId()] = op
	if !client.Final(op) {
		if op.GetVmId() != "" { // else it is an image's
			w.running[op.GetVmId()] = op
		}
		return
	}
	if r := w.running[op.GetVmId()]; r.GetId() == op.GetId() {
		delete(w.running, op.GetVmId())
	}
	if op.GetState() == "succeeded" {
		w.stages[op.GetKind()] = len(op.GetStages())
	}
}

func (w *world) operation(op *bangerv1.Operation, now time.Time) (ended *bangerv1.Operation) {
	before, known := w.ops[op.GetId()]
	if known && client.Final(before) {
		return nil // messages may come twice
	}
	w.keep(op)
	who := subject(op)
	switch {
	case !client.Final(op):
		if !known {
			w.say(now, who, plain, "%s begins", op.GetKind())
		}
		return nil
	case op.GetState() == "succeeded":
		text := op.GetKind() + " done after " + took(op.GetFinishedAt().AsTime().Sub(op.GetCreatedAt().AsTime()))
		if len(op.GetNotices()) > 0 {
			text += ": " + strings.Join(op.GetNotices(), "; ")
		}
		w.say(now, who, good, "%s", text)
	case op.GetFault() != nil:
		w.say(now, who, bad, "%s %s: %s", op.GetKind(), op.GetState(), faultText(op.GetFault()))
	default:
		w.say(now, who, warning, "%s %s", op.GetKind(), op.GetState())
	}
	w.forget()
	return op
}

// forget lets the oldest operations go that ended.
func (w *world) forget() {
	if len(w.ops) <= keptOperations {
		return
	}
	for _, op := range w.operations()[keptOperations:] {
		if client.Final(op) {
			delete(w.ops, op.GetId())
		}
	}
}

// operations are those that run, then those that ended, newest first.
func (w *world) operations() []*bangerv1.Operation {
	out := make([]*bangerv1.Operation, 0, len(w.ops))
	for _, op := range w.ops {
		out = append(out, op)
	}
	slices.SortFunc(out, func(a, b *bangerv1.Operation) int {
		if client.Final(a) != client.Final(b) {
			if client.Final(b) {
				return -1
			}
			return 1
		}
		return cmp.Or(b.GetCreatedAt().AsTime().Compare(a.GetCreatedAt().AsTime()), cmp.Compare(a.GetId(), b.GetId()))
	})
	return out
}

func (w *world) changed(v *bangerv1.VM, now time.Time) {
	before := w.vms[v.GetId()]
	w.vms[v.GetId()] = v
	if v.GetState() != "running" {
		delete(w.usage, v.GetId())
	}
	if before.GetState() != v.GetState() {
		text := v.GetState()
		if before != nil {
			text = before.GetState() + " → " + v.GetState()
		}
		w.say(now, v.GetName(), stateStyle(v.GetState()), "%s", text)
	}
	if v.GetNote() != "" && v.GetNote() != before.GetNote() {
		w.say(now, v.GetName(), warning, "%s", v.GetNote())
	}
}

// look takes a look at what a VM uses.
func (w *world) look(r *bangerv1.WatchUsageResponse) {
	st := r.GetStats()
	id := st.GetVm().GetId()
	if w.vms[id].GetState() != "running" {
		return
	}
	u := w.usage[id]
	if u == nil {
		u = &usage{cpu: -1}
		w.usage[id] = u
	}
	u.fault = ""
	if st.GetGuestFault() != nil {
		u.fault = faultText(st.GetGuestFault())
	}
	g, b := st.GetGuest(), u.last.GetGuest()
	if g == nil || g.GetUptimeMs() < b.GetUptimeMs() {
		u.cpu = -1 // it said nothing, or this is another boot
	} else if b != nil {
		busy, idle := g.GetCpuBusyMs()-b.GetCpuBusyMs(), g.GetCpuIdleMs()-b.GetCpuIdleMs()
		if busy >= 0 && idle >= 0 && busy+idle > 0 {
			u.cpu = float64(busy) / float64(busy+idle)
		}
	}
	u.last = st
	if p := r.GetPorts(); p != nil {
		u.known, u.ports = true, nil
		if p.GetFault() == nil {
			u.ports = p.GetPorts()
		}
	}
}

// cpuText is the guest's CPU time of the last look, "-" if it is not known.
func (u *usage) cpuText() string {
	if u == nil || u.cpu < 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f%%", u.cpu*100)
}

// memory is what the guest uses of its memory, in bytes; negative: not known.
func (u *usage) memory() int64 {
	if u == nil || u.last.GetGuest() == nil {
		return -1
	}
	return max(0, u.last.GetGuest().GetMemoryTotalBytes()-u.last.GetGuest().GetMemoryAvailableBytes())
}

// portsText is the ports' numbers. Those that a browser can open have a mark, and come first: there may not be
// room for all.
func (u *usage) portsText() string {
	if u == nil || !u.known {
		return "-"
	}
	var words []string
	ports := u.sorted()
	slices.SortStableFunc(ports, func(a, b *bangerv1.Port) int {
		switch {
		case (a.GetScheme() != "") == (b.GetScheme() != ""):
			return 0
		case a.GetScheme() != "":
			return -1
		}
		return 1
	})
	for _, p := range ports {
		word := fmt.Sprint(p.GetPort())
		switch {
		case p.GetScheme() != "":
			word += "*"
		case p.GetProtocol() == "udp":
			word += "u"
		}
		words = append(words, word)
	}
	if len(words) == 0 {
		return "none"
	}
	return strings.Join(words, " ")
}

// sorted are the ports, TCP before UDP, by number.
func (u *usage) sorted() []*bangerv1.Port {
	if u == nil {
		return nil
	}
	out := slices.Clone(u.ports)
	slices.SortStableFunc(out, func(a, b *bangerv1.Port) int {
		return cmp.Or(cmp.Compare(a.GetProtocol(), b.GetProtocol()), cmp.Compare(a.GetPort(), b.GetPort()), cmp.Compare(a.GetAddress(), b.GetAddress()))
	})
	return out
}

// subject is the name of what an operation is about: a VM, or an image.
func subject(op *bangerv1.Operation) string { return cmp.Or(op.GetVmName(), op.GetImage()) }

// atWork is how many operations run.
func (w *world) atWork() (n int) {
	for _, op := range w.ops {
		if !client.Final(op) {
			n++
		}
	}
	return n
}

// stageNow is the stage that runs, or nil.
func stageNow(op *bangerv1.Operation) *bangerv1.OperationStage {
	for _, s := range op.GetStages() {
		if s.GetFinishedAt() == nil {
			return s
		}
	}
	return nil
}

func faultText(f *bangerv1.Fault) string {
	text := f.GetMessage()
	if c := f.GetCause(); c != "" && !strings.Contains(text, c) {
		text += ": " + c
	}
	return text
}
