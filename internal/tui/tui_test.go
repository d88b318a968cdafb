package tui

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"
	"google.golang.org/protobuf/types/known/timestamppb"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
)

var update = flag.Bool("update", false, "rewrite the keys in docs/tui.md")

// bench is a model that nothing feeds but the test.
func bench(w, h int, vms ...*bangerv1.VM) *model {
	m := newModel(Options{Color: true}, &feeds{ctx: context.Background()})
	m.now = func() time.Time { return time.Unix(1_800_000_000, 0) }
	m.Update(tea.WindowSizeMsg{Width: w, Height: h})
	m.Update(eventMsg{&bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_Snapshot{Snapshot: &bangerv1.Snapshot{Vms: vms}}}})
	return m
}

func machine(name, state string) *bangerv1.VM {
	return &bangerv1.VM{Id: fmt.Sprintf("%032x", name), Name: name, State: state, Vcpu: 2, MemoryMib: 1024, DiskBytes: 8 << 30, SystemBytes: 16 << 30,
		Image: "default", CreatedAt: timestamppb.New(time.Unix(1_799_999_000, 0))}
}

func press(m *model, keys ...string) {
	for _, k := range keys {
		r := []rune(k)
		msg := tea.KeyPressMsg{Text: k, Code: r[0]}
		switch k {
		case "enter":
			msg = tea.KeyPressMsg{Code: tea.KeyEnter}
		case "esc":
			msg = tea.KeyPressMsg{Code: tea.KeyEscape}
		case "tab":
			msg = tea.KeyPressMsg{Code: tea.KeyTab}
		case "down":
			msg = tea.KeyPressMsg{Code: tea.KeyDown}
		}
		m.Update(msg)
	}
}

// Whatever the daemon or a guest says, wherever it is shown: nothing reaches the terminal but text and this
// package's own sequences, and no line is wider or longer than the screen.
func TestHostileWords(t *testing.T) {
	const evil = "\x1b]0;owned\x07\x1b[35mx\x1b[2J\x9b1m\u202ey\r\nz\x00\u200b\xff"
	v := machine("otter", "running")
	v.Name, v.State, v.Image, v.Kernel, v.Note, v.Vmm, v.Pid, v.Agent = evil, "running", evil, evil, evil, evil, 1, evil
	v.Network, v.Address, v.HostAddresses, v.Labels = evil, evil, []string{evil}, map[string]string{evil: evil}
	v.Boot = []*bangerv1.Stage{{Name: evil}}
	broken := machine("broken", "failed")
	broken.Failure = &bangerv1.Failure{Step: evil, Fault: &bangerv1.Fault{Message: evil, Hint: evil, Cause: evil}}
	odd := machine("odd", evil)
	fault := &bangerv1.Fault{Message: evil, Hint: evil, Cause: evil, Subject: evil}
	for _, size := range [][2]int{{80, 24}, {200, 50}, {40, 10}} {
		m := bench(size[0], size[1], v, broken, odd)
		m.Update(statusMsg{status: &bangerv1.GetStatusResponse{Vmm: evil, Accel: evil}})
		m.Update(detailMsg{id: v.GetId(), vm: v})
		m.Update(eventMsg{&bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_Snapshot{Snapshot: &bangerv1.Snapshot{
			Vms: []*bangerv1.VM{v, broken, odd}, Images: []*bangerv1.Image{{Name: evil, Source: evil}}}}}})
		for i, state := range []string{"running", "failed", "succeeded", evil} {
			m.Update(eventMsg{&bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_Operation{Operation: &bangerv1.Operation{
				Id: fmt.Sprint(i), Kind: evil, VmId: v.GetId(), VmName: evil, State: state, Fault: fault, Notices: []string{evil},
				Stages: []*bangerv1.OperationStage{{Name: evil, Detail: evil}},
			}}}})
		}
		m.Update(usageMsg{look: &bangerv1.WatchUsageResponse{
			Stats: &bangerv1.VMStats{Vm: v, GuestFault: fault, Guest: &bangerv1.GuestStats{Disks: []*bangerv1.GuestDisk{{Target: evil}}}},
			Ports: &bangerv1.VMPorts{Ports: []*bangerv1.Port{{Protocol: evil, Process: evil, Title: evil, Scheme: evil, Command: evil}}},
		}})
		m.Update(logMsg{data: []byte(evil + "\n" + evil)})
		m.complain(errors.New(evil))
		look := func(what string) {
			t.Helper()
			lines, _ := m.screen()
			if len(lines) > size[1] {
				t.Errorf("%v, %s: %d lines", size, what, len(lines))
			}
			for _, l := range lines {
				if w := ansi.StringWidth(l); w > size[0] {
					t.Errorf("%v, %s: a line of %d cells: %q", size, what, w, l)
				}
				bare := regexp.MustCompile(`\x1b\[[0-9;]*m`).ReplaceAllString(l, "")
				if i := strings.IndexFunc(bare, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }); i >= 0 {
					t.Errorf("%v, %s: %q", size, what, l)
				}
				if strings.Contains(bare, "owned") || strings.Contains(l, "\x1b[35mx") {
					t.Errorf("%v, %s: a sequence came through: %q", size, what, l)
				}
			}
		}
		for _, id := range slices.Clone(m.shown) {
			m.goTo(id)
			for p := range panes {
				m.pane = p
				for _, focus := range []bool{false, true} {
					m.focus = focus
					look(paneNames[p])
				}
			}
		}
		m.askDelete(m.shown)
		look("question")
		press(m, "n", "?")
		look("help")
		press(m, "esc", "/", evil)
		look("filter")
		press(m, "esc")
		m.Update(goneMsg{err: errors.New(evil)})
		look("gone")
	}
}

// A key does one thing, people can see which, and the page in the documentation is made of the same list.
func TestKeyMap(t *testing.T) {
	seen := map[string]command{}
	for _, b := range keyMap {
		for _, k := range b.keys {
			if other, ok := seen[k]; ok {
				t.Errorf("%s does %d and %d", k, other, b.do)
			}
			seen[k] = b.do
			if commandOf(k) != b.do {
				t.Errorf("%s does not do what it says", k)
			}
		}
		if b.shown == "" || b.text == "" || b.group == "" || !slices.Contains(helpText(200), "  "+fit(b.shown, 11)+b.text) {
			t.Errorf("%v is not in the help", b.keys)
		}
	}
	var table strings.Builder
	for _, group := range []string{groupVM, groupShow, groupMove, groupRest} {
		fmt.Fprintf(&table, "\n| %s | |\n| --- | --- |\n", group)
		for _, b := range keyMap {
			if b.group == group {
				fmt.Fprintf(&table, "| `%s` | %s |\n", b.shown, b.text)
			}
		}
	}
	const page, begin, end = "../../docs/tui.md", "<!-- keys: made of the program's own list by go test ./internal/tui -update -->\n", "\n<!-- keys end -->"
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(b), begin)
	have, after, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no place for the keys", page)
	}
	if have == table.String() {
		return
	}
	if !*update {
		t.Fatalf("%s has other keys than the program; go test ./internal/tui -update writes them", page)
	}
	if err := os.WriteFile(page, []byte(before+begin+table.String()+end+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

// What is under the cursor stays there when others come and go, and the next takes its place when it goes itself.
func TestCursor(t *testing.T) {
	m := bench(80, 24, machine("b", "running"), machine("d", "running"), machine("f", "running"))
	press(m, "down")
	name := func() string { return m.world.vms[m.at].GetName() }
	if name() != "d" {
		t.Fatalf("it is on %s", name())
	}
	m.Update(eventMsg{&bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_Vm{Vm: machine("a", "stopped")}}})
	if name() != "d" {
		t.Errorf("one that came before it moved it to %s", name())
	}
	gone := func(name string) {
		m.Update(eventMsg{&bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_VmDeleted{VmDeleted: machine(name, "").GetId()}}})
	}
	press(m, " ")
	gone("d")
	if name() != "f" && name() != "b" {
		t.Errorf("after its end it is on %q", name())
	}
	for _, n := range []string{"a", "b", "f"} {
		gone(n)
	}
	if m.at != "" || len(m.marks) > 0 {
		t.Errorf("nothing is left, and the cursor is on %q, marks %v", m.at, m.marks)
	}
	press(m, "s", "x", "d", "e", "o", "c", "enter", "tab", "down", "enter") // nothing to act on: nothing happens
	if m.mode != modeList {
		t.Errorf("mode %d", m.mode)
	}
}

// Rates are of two looks of one boot, and forgotten when the VM does not run any more.
func TestUsage(t *testing.T) {
	v := machine("otter", "running")
	w := newWorld()
	w.apply(&bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_Vm{Vm: v}}, time.Now())
	look := func(up, busy, idle int64) string {
		w.look(&bangerv1.WatchUsageResponse{Stats: &bangerv1.VMStats{Vm: v, Guest: &bangerv1.GuestStats{UptimeMs: up, CpuBusyMs: busy, CpuIdleMs: idle}}})
		return w.usage[v.GetId()].cpuText()
	}
	if got := look(1000, 500, 500); got != "-" {
		t.Errorf("one look tells %s", got)
	}
	if got := look(2000, 750, 1250); got != "25%" {
		t.Errorf("two looks tell %s", got)
	}
	if got := look(100, 10, 90); got != "-" {
		t.Errorf("another boot tells %s", got)
	}
	stopped := machine("otter", "stopped")
	w.apply(&bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_Vm{Vm: stopped}}, time.Now())
	w.look(&bangerv1.WatchUsageResponse{Stats: &bangerv1.VMStats{Vm: v}}) // one that was on its way
	if w.usage[v.GetId()] != nil {
		t.Error("one that is stopped uses something")
	}
}

func TestShort(t *testing.T) {
	for n, want := range map[int64]string{0: "0B", 999: "999B", 1000: "1K", 512 << 20: "512M", 1 << 30: "1G", 3 << 29: "1.5G", 16 << 30: "16G", 1023 << 20: "1G", 999 << 20: "999M"} {
		if got := short(n); got != want || len(got) > 5 {
			t.Errorf("short(%d) = %q, want %q", n, got, want)
		}
	}
}

// Drawing is quick: each event draws, and events come in hundreds.
func BenchmarkDraw200(b *testing.B) {
	var vms []*bangerv1.VM
	for i := range 200 {
		vms = append(vms, machine(fmt.Sprintf("vm-%03d", i), "running"))
	}
	m := bench(200, 50, vms...)
	for b.Loop() {
		m.Update(eventMsg{&bangerv1.WatchResponse{Event: &bangerv1.WatchResponse_Vm{Vm: vms[7]}}})
		_ = m.View()
	}
}
