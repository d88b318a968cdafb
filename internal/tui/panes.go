package tui

import (
	"fmt"
	"slices"
	"strings"
	"time"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

// content is what a pane could show if it were high enough. items is where each thing with a cursor begins.
type content struct {
	lines []string
	items []int
}

func (m *model) paneLines(w int) content {
	switch m.pane {
	case paneOperations:
		return m.operationLines(w)
	case paneLogs:
		return m.logLines()
	case paneEvents:
		return m.eventLines(w)
	case panePorts:
		return m.portLines(w)
	case paneImages:
		return m.imageLines(w)
	default:
		return content{lines: m.detailLines(w)}
	}
}

func (m *model) detailLines(w int) []string {
	v := m.world.vms[m.at]
	if v == nil {
		return nil
	}
	const label = 13
	var lines []string
	add := func(key string, s style, value string) {
		if value == "" {
			return
		}
		for _, l := range wrap(value, w-label-1) {
			lines = append(lines, " "+m.paint(faint, fit(key, label-1))+m.paint(s, l))
			key = ""
		}
	}
	d := m.detail
	if d == nil {
		d = v
	}
	now := m.now()
	state := v.GetState()
	if s := d.GetVmmState(); s != "" && s != state && state == "running" {
		state += ", its machine is " + s
	}
	add("state", stateStyle(v.GetState()), state)
	if op := m.world.running[v.GetId()]; op != nil {
		head, stages := m.progressLines(op, w-label-1)
		add(op.GetKind(), plain, head)
		for _, l := range stages {
			lines = append(lines, strings.Repeat(" ", label)+l)
		}
	}
	if f := v.GetFailure(); f != nil {
		add("failed at", bad, client.StageText(f.GetStep())+", "+since(now, f.GetAt())+" ago")
		add("because", plain, f.GetFault().GetMessage())
		add("hint", plain, f.GetFault().GetHint())
	}
	add("note", warning, v.GetNote())
	add("in it", warning, m.detailFault)
	if u := m.world.usage[v.GetId()]; u != nil {
		add("uses", plain, m.usesText(u))
		add("guest", warning, u.fault)
	}
	add("has", plain, fmt.Sprintf("%d vCPU, %s memory, work disk %s, system disk %s", v.GetVcpu(), client.FormatSize(v.GetMemoryMib()<<20),
		client.FormatSize(v.GetDiskBytes()), client.FormatSize(v.GetSystemBytes())))
	if d.GetDiskAllocatedBytes() > 0 {
		add("on the host", plain, fmt.Sprintf("%s work disk, %s system disk", short(d.GetDiskAllocatedBytes()), short(d.GetSystemAllocatedBytes())))
	}
	image := v.GetImage()
	if d.GetKernel() != "" {
		image += ", kernel " + d.GetKernel()
	}
	add("image", plain, image)
	if v.GetVmm() != "" && v.GetPid() > 0 {
		add("machine", plain, strings.TrimSpace(v.GetVmm()+" "+v.GetAccel())+fmt.Sprintf(", process %d", v.GetPid()))
	}
	if v.GetNetwork() != "" {
		way := "no way out"
		if v.GetNat() {
			way = "NAT"
		}
		text := v.GetNetwork() + ", " + way + ", " + v.GetAddress()
		if v.GetNetworkGroup() != "" {
			text += ", group " + v.GetNetworkGroup()
		}
		if a := d.GetHostAddresses(); len(a) > 0 {
			text += ", from the host " + strings.Join(a, " ")
		}
		add("network", plain, text)
	}
	add("agent", plain, d.GetAgent())
	var boot []string
	for _, s := range v.GetBoot() {
		boot = append(boot, fmt.Sprintf("%s %.1fs", s.GetName(), s.GetAtMs()/1000))
	}
	add("boot", plain, strings.Join(boot, ", "))
	var labels []string
	for key, value := range v.GetLabels() {
		labels = append(labels, key+"="+value)
	}
	slices.Sort(labels)
	add("labels", plain, strings.Join(labels, " "))
	if v.GetAutostart() {
		add("autostart", plain, "after a reboot of the host")
	}
	times := "made " + since(now, v.GetCreatedAt()) + " ago"
	if v.GetStartedAt() != nil {
		times += ", started " + since(now, v.GetStartedAt()) + " ago"
	}
	if v.GetStoppedAt() != nil {
		times += ", stopped " + since(now, v.GetStoppedAt()) + " ago"
	}
	add("times", plain, times)
	add("id", plain, v.GetId())
	return lines
}

func (m *model) usesText(u *usage) string {
	parts := []string{"CPU " + u.cpuText()}
	g, h := u.last.GetGuest(), u.last.GetHost()
	if g != nil {
		parts = append(parts, fmt.Sprintf("load %.2f", float64(g.GetLoad1Milli())/1000), "memory "+short(u.memory())+" of "+short(g.GetMemoryTotalBytes()))
		for _, d := range g.GetDisks() {
			parts = append(parts, fmt.Sprintf("%s %s of %s", d.GetTarget(), short(d.GetUsedBytes()), short(d.GetTotalBytes())))
		}
	}
	if h.GetMemoryBytes() > 0 {
		parts = append(parts, short(h.GetMemoryBytes())+" of the host's memory")
	}
	return strings.Join(parts, ", ")
}

// progressLines are how far an operation is, and its stages.
func (m *model) progressLines(op *bangerv1.Operation, w int) (head string, stages []string) {
	const width = 12
	done, now := 0, m.now()
	var words []string
	for _, s := range op.GetStages() {
		text := client.StageText(s.GetName())
		if s.GetFinishedAt() != nil {
			done++
			words = append(words, "✓ "+text+" "+took(s.GetFinishedAt().AsTime().Sub(s.GetStartedAt().AsTime())))
			continue
		}
		if d := s.GetDetail(); d != "" {
			text += ": " + d
		}
		words = append(words, spin(m.ticks)+" "+text+" "+took(now.Sub(s.GetStartedAt().AsTime()).Truncate(100*time.Millisecond)))
	}
	head = took(now.Sub(op.GetCreatedAt().AsTime()).Truncate(100 * time.Millisecond))
	// How many stages there will be nobody says; the last operation of the kind had so many.
	if total := m.world.stages[op.GetKind()]; total > 0 {
		total = max(total, len(op.GetStages()))
		head = fmt.Sprintf("%s %d/%d, %s", bar(done, total, width), done, total, head)
	} else {
		head = fmt.Sprintf("%d stages done, %s", done, head)
	}
	line := ""
	for _, word := range words {
		if line != "" && len([]rune(line))+2+len([]rune(word)) > w {
			stages = append(stages, line)
			line = ""
		}
		if line != "" {
			line += "  "
		}
		line += word
	}
	if line != "" {
		stages = append(stages, line)
	}
	return head, stages
}

// itemLine is a line with a cursor.
func (m *model) itemLine(i int, w int, s style, text string) string {
	here := m.item[m.pane] == i && m.focus
	pointer := "  "
	if here {
		pointer = "> "
	}
	if text = fit(pointer+text, w); here {
		return m.paint(chosen, text)
	}
	return m.paint(s, text)
}

func (m *model) operationLines(w int) (c content) {
	ops := m.world.operations()
	if len(ops) == 0 {
		return content{lines: []string{" Nothing was done so far."}}
	}
	now := m.now()
	for i, op := range ops {
		c.items = append(c.items, len(c.lines))
		name := fit(op.GetKind(), 15) + " " + fit(subject(op), 16) + " "
		if !client.Final(op) {
			head, stages := m.progressLines(op, w-6)
			c.lines = append(c.lines, m.itemLine(i, w, warning, name+head))
			for _, l := range stages {
				c.lines = append(c.lines, "      "+l)
			}
			continue
		}
		text := fmt.Sprintf("%s after %s, %s ago", op.GetState(), took(op.GetFinishedAt().AsTime().Sub(op.GetCreatedAt().AsTime())), since(now, op.GetFinishedAt()))
		c.lines = append(c.lines, m.itemLine(i, w, stateStyle(op.GetState()), name+text))
		if f := op.GetFault(); f != nil {
			for _, l := range wrap(faultText(f), w-6) {
				c.lines = append(c.lines, "      "+l)
			}
			if f.GetHint() != "" {
				for _, l := range wrap("hint: "+f.GetHint(), w-6) {
					c.lines = append(c.lines, "      "+m.paint(faint, l))
				}
			}
		}
	}
	return c
}

func (m *model) logLines() content {
	lines := m.log
	if rest := client.Visible(m.logRest); rest != "" {
		lines = append(slices.Clip(lines), rest)
	}
	if m.logFault != "" {
		lines = append(slices.Clip(lines), m.paint(warning, m.logFault))
	}
	if len(lines) == 0 {
		lines = []string{m.paint(faint, "Nothing is in its log.")}
	}
	return content{lines: lines}
}

// eventLines are the events, newest first.
func (m *model) eventLines(w int) (c content) {
	if len(m.world.events) == 0 {
		return content{lines: []string{m.paint(faint, " Nothing happened since you came.")}}
	}
	for i := len(m.world.events) - 1; i >= 0; i-- {
		e := m.world.events[i]
		who := e.vm
		if who == "" {
			who = "banger"
		}
		head := " " + e.at.Local().Format("15:04:05") + " " + fit(who, 18) + " "
		for _, l := range wrap(e.text, max(w-len(head), 10)) {
			c.lines = append(c.lines, head+m.paint(e.style, l))
			head = strings.Repeat(" ", 29)
		}
	}
	return c
}

func (m *model) portLines(w int) (c content) {
	v, u := m.world.vms[m.at], m.world.usage[m.at]
	switch {
	case v == nil:
		return c
	case v.GetState() != "running":
		return content{lines: []string{m.paint(faint, " It does not run, so nothing listens.")}}
	case u == nil || !u.known:
		return content{lines: []string{m.paint(faint, " The guest is asked ...")}}
	case len(u.ports) == 0:
		return content{lines: []string{m.paint(faint, " Nothing listens.")}}
	}
	for i, p := range u.sorted() {
		c.items = append(c.items, len(c.lines))
		web := ""
		switch {
		case p.GetScheme() != "":
			web = client.WebText(p.GetScheme(), p.GetStatus(), p.GetTitle())
		case p.GetLoopback():
			web = "for the guest alone"
		case p.GetUnreachable():
			web = "not reachable by the network"
		}
		text := fit(fmt.Sprintf("%d/%s", p.GetPort(), p.GetProtocol()), 10) + fit(p.GetProcess(), 14) + " "
		rest := w - 2 - 25
		if o := m.opened[portKey(v.GetId(), p.GetPort())]; o != nil {
			text += fit("→ "+link(o.web, o.url), min(32, rest)) + " "
			rest -= 33
		}
		c.lines = append(c.lines, m.itemLine(i, w, plain, text+fit(web, max(rest, 0))))
	}
	return c
}

func (m *model) imageLines(w int) (c content) {
	if len(m.world.images) == 0 {
		return content{lines: []string{m.paint(faint, " No image was used so far; the first create takes the default one in.")}}
	}
	now := m.now()
	made := map[string]int{}
	for _, v := range m.world.vms {
		made[v.GetImageId()]++
	}
	for i, image := range m.world.images {
		c.items = append(c.items, len(c.lines))
		mark := ""
		if image.GetIsDefault() {
			mark = "default"
		}
		c.lines = append(c.lines, m.itemLine(i, w, plain, fit(image.GetName(), 24)+right(short(image.GetSizeBytes()), 6)+"  "+
			fit(mark, 9)+right(since(now, image.GetCreatedAt()), 4)+"  "+fit("for "+count(made[image.GetId()]), 12)+image.GetSource()))
	}
	return c
}
