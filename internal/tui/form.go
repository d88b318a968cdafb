package tui

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

// form makes a VM. Empty fields mean the daemon's defaults, which are shown in them.
type form struct {
	at       int
	fields   [formFields]input // those that are typed into
	image    int               // into images
	nat, off bool              // off: make it, do not start it
	images   []string
	defaults *bangerv1.GetDefaultsResponse // nil: not here yet
	failed   string                        // what the daemon said to the last try
	sent     bool                          // a try is on its way
}

const (
	fieldName = iota
	fieldImage
	fieldVCPU
	fieldMemory
	fieldDisk
	fieldSystem
	fieldNAT
	fieldStart
	formFields
)

var fieldNames = [formFields]string{"Name", "Image", "vCPU", "Memory", "Work disk", "System disk", "NAT", "Start it"}

var fieldTexts = [formFields]string{
	"a-z, 0-9 and hyphens; empty: a generated one",
	"",
	"virtual CPUs",
	"4G, 512M; a number alone is MiB",
	"mounted at /root; 16G, 512M",
	"everything written elsewhere",
	"let it reach what the host reaches",
	"",
}

type formMsg struct {
	defaults *bangerv1.GetDefaultsResponse
	op       *bangerv1.Operation
	off      bool
	err      error
}

// openForm shows the form, with an image chosen if one is named.
func (m *model) openForm(image string) tea.Cmd {
	if m.gone != nil {
		m.tell(bad, "There is no daemon to ask. D starts it.")
		return nil
	}
	m.mode, m.form = modeForm, &form{}
	for _, i := range m.world.images {
		m.form.images = append(m.form.images, i.GetName())
	}
	m.form.choose(image)
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(m.f.ctx, callTime)
		defer cancel()
		d, err := m.o.Follow.VMs.GetDefaults(ctx, &bangerv1.GetDefaultsRequest{})
		return formMsg{defaults: d, err: err}
	}
}

func (f *form) choose(image string) {
	for i, name := range f.images {
		if name == image {
			f.image = i
		}
	}
}

func (m *model) formAnswer(msg formMsg) {
	f := m.form
	if f == nil {
		if msg.op != nil {
			m.made(msg)
		}
		return
	}
	f.sent = false
	switch {
	case msg.err != nil:
		f.failed = errorText(msg.err)
	case msg.op != nil:
		m.mode, m.form = modeList, nil
		m.made(msg)
	case msg.defaults != nil:
		f.defaults, f.nat = msg.defaults, msg.defaults.GetNat()
		if len(f.images) == 0 { // the daemon captures its default when it is first used
			f.images = []string{msg.defaults.GetImage()}
		}
		if f.image == 0 {
			f.choose(msg.defaults.GetImage())
		}
	}
}

// made is told that a create began.
func (m *model) made(msg formMsg) {
	b := &batch{verb: "create", begin: "creating", after: "running", total: 1, one: msg.op.GetVmName()}
	if msg.off {
		b.after = "made"
	}
	m.begun(begunMsg{b: b, vm: msg.op.GetVmId(), op: msg.op, name: msg.op.GetVmName()})
	m.atNext = msg.op.GetVmId()
	m.focus, m.stale = false, true
}

// request is what the form asks for. A field that cannot be read counts as empty: check tells of it.
func (f *form) request() *bangerv1.CreateVMRequest {
	r := &bangerv1.CreateVMRequest{Name: f.value(fieldName), NoStart: f.off}
	if f.image < len(f.images) {
		r.Image = f.images[f.image]
	}
	if n, err := strconv.ParseInt(f.value(fieldVCPU), 10, 32); err == nil {
		r.Vcpu = int32(n)
	}
	r.MemoryMib, _ = client.ParseMemory(f.value(fieldMemory))
	r.DiskBytes, _ = client.ParseDiskSize(f.value(fieldDisk))
	r.SystemBytes, _ = client.ParseDiskSize(f.value(fieldSystem))
	if f.nat != f.defaults.GetNat() {
		r.Nat = &f.nat
	}
	return r
}

func (f *form) value(i int) string { return strings.TrimSpace(f.fields[i].String()) }

// check says what is wrong with a field, "" if nothing is.
func (f *form) check(i int, taken func(name string) bool) string {
	text := f.value(i)
	if text == "" || f.defaults == nil {
		return ""
	}
	r := &bangerv1.CreateVMRequest{}
	var err error
	zero := false
	switch i {
	case fieldName:
		if taken(text) {
			return "a VM of this name exists"
		}
		r.Name = text
	case fieldVCPU:
		n, e := strconv.ParseInt(text, 10, 32)
		if e != nil {
			return "a whole number from 1 up"
		}
		r.Vcpu, zero = int32(n), n == 0
	case fieldMemory:
		r.MemoryMib, err = client.ParseMemory(text)
		zero = r.MemoryMib == 0
	case fieldDisk:
		r.DiskBytes, err = client.ParseDiskSize(text)
		zero = r.DiskBytes == 0
	case fieldSystem:
		r.SystemBytes, err = client.ParseDiskSize(text)
		zero = r.SystemBytes == 0
	default:
		return ""
	}
	if err == nil && zero {
		return "zero is too little"
	}
	if err == nil {
		err = client.CheckCreate(r, f.defaults)
	}
	var e *client.Error
	switch {
	case err == nil:
		return ""
	case asError(err, &e):
		return client.Visible(e.Message)
	}
	return client.Visible(err.Error())
}

func (m *model) taken(name string) bool {
	for _, v := range m.world.vms {
		if v.GetName() == name {
			return true
		}
	}
	return false
}

// usable says whether all fields can be sent.
func (m *model) usable() bool {
	for i := range formFields {
		if m.form.check(i, m.taken) != "" {
			return false
		}
	}
	return m.form.defaults != nil && !m.form.sent
}

func (m *model) formKey(k tea.KeyPressMsg) tea.Cmd {
	f := m.form
	switch k.String() {
	case "esc", "ctrl+c":
		m.mode, m.form = modeList, nil
		return nil
	case "up", "shift+tab":
		f.at = (f.at + formFields - 1) % formFields
		return nil
	case "down", "tab":
		f.at = (f.at + 1) % formFields
		return nil
	case "enter":
		if !m.usable() {
			return nil
		}
		r, off := f.request(), f.off
		f.sent, f.failed = true, ""
		return func() tea.Msg {
			ctx, cancel := context.WithTimeout(m.f.ctx, callTime)
			defer cancel()
			resp, err := m.o.Follow.VMs.CreateVM(ctx, r)
			return formMsg{op: resp.GetOperation(), off: off, err: err}
		}
	}
	switch f.at {
	case fieldImage:
		switch n := len(f.images); {
		case n == 0:
		case k.String() == "left":
			f.image = (f.image + n - 1) % n
		case k.String() == "right" || k.String() == "space":
			f.image = (f.image + 1) % n
		}
	case fieldNAT, fieldStart:
		flag := &f.nat
		if f.at == fieldStart {
			flag = &f.off
		}
		yes := f.at == fieldNAT
		switch k.String() {
		case "left", "right", "space":
			*flag = !*flag
		case "y":
			*flag = yes
		case "n":
			*flag = !yes
		}
	default:
		f.fields[f.at].key(k)
	}
	f.failed = ""
	return nil
}

// byDefault is what an empty field means.
func (f *form) byDefault(i int) string {
	d := f.defaults
	if d == nil {
		return "..."
	}
	switch i {
	case fieldName:
		return "generated"
	case fieldVCPU:
		return fmt.Sprint(d.GetVcpu())
	case fieldMemory:
		return client.FormatSize(d.GetMemoryMib() << 20)
	case fieldDisk:
		return client.FormatSize(d.GetDiskBytes())
	case fieldSystem:
		return client.FormatSize(d.GetSystemBytes())
	}
	return ""
}

// formLines draws the form, and says where in it the cursor is.
func (m *model) formLines(w, h int) (lines []string, x, y int) {
	const label, box = 13, 26
	f := m.form
	lines = append(lines, m.paint(strong, "Make a VM"), "")
	for i := range formFields {
		text, note, s := "", fieldTexts[i], faint
		switch i {
		case fieldImage:
			if f.image < len(f.images) {
				text = f.images[f.image]
			}
			if note = "the only one"; len(f.images) > 1 {
				note = fmt.Sprintf("%d of %d; ← → for another", f.image+1, len(f.images))
			}
		case fieldNAT:
			text = yesNo(f.nat)
		case fieldStart:
			text = yesNo(!f.off)
		default:
			var at int
			text, at = f.fields[i].view(box - 1)
			if i == f.at {
				x, y = label+2+at, len(lines)
			}
		}
		if wrong := f.check(i, m.taken); wrong != "" {
			note, s = wrong, bad
		}
		field := fit(text, box)
		if text == "" && i != fieldImage {
			field = m.paint(faint, fit(f.byDefault(i), box))
		}
		pointer, name := "  ", fit(fieldNames[i], label-2)
		if i == f.at {
			pointer, name = "> ", m.paint(strong, name)
		}
		mark := " "
		if s == bad {
			mark = m.paint(bad, "!")
		}
		notes := wrap(note, max(w-label-box-7, 10))
		lines = append(lines, pointer+name+" ["+field+"]"+mark+" "+m.paint(s, notes[0]))
		for _, more := range notes[1:] {
			lines = append(lines, strings.Repeat(" ", label+box+5)+m.paint(s, more))
		}
	}
	lines = append(lines, "")
	switch {
	case f.failed != "":
		for _, l := range wrap(f.failed, w-2) {
			lines = append(lines, m.paint(bad, l))
		}
	case f.sent:
		lines = append(lines, "The daemon is asked ...")
	case f.defaults == nil:
		lines = append(lines, "The daemon is asked for its defaults ...")
	case !m.usable():
		lines = append(lines, m.paint(warning, "What is marked with ! cannot be made."))
	default:
		lines = append(lines, "Enter makes it.  ↑ ↓ Tab another field  Esc back")
	}
	for i := range lines {
		lines[i] = ansi.Truncate(" "+lines[i], w, "…")
	}
	if f.at == fieldImage || f.at == fieldNAT || f.at == fieldStart {
		x = -1
	}
	return lines, x + 1, y
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
