package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// figure is what was measured under one name: milliseconds of p50 and p95, or a count.
type figure struct {
	P50     float64 `json:"p50,omitempty"`
	P95     float64 `json:"p95,omitempty"`
	Min     float64 `json:"min,omitempty"`
	Samples int     `json:"samples,omitempty"`
	Count   float64 `json:"count"`
	Unit    string  `json:"unit"`
}

// threshold holds a figure against what was measured beside it.
type threshold struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Most  float64 `json:"most"`
	Of    string  `json:"of"` // what Value is
	Met   bool    `json:"met"`
}

// goal is a figure of the plan in absolute terms. It is reported and fails nothing: machines differ.
type goal struct {
	Name    string  `json:"name"`
	Value   float64 `json:"value_ms"`
	Below   float64 `json:"below_ms"`
	Reached bool    `json:"reached"`
}

type machine struct {
	CPU         string `json:"cpu"`
	Cores       int    `json:"cores"`
	Kernel      string `json:"kernel"`
	Filesystem  string `json:"filesystem"`
	Accel       string `json:"accel,omitempty"`
	QEMU        string `json:"qemu,omitempty"`
	Firecracker string `json:"firecracker,omitempty"`
	LoadBefore  string `json:"load_before"`
	LoadAfter   string `json:"load_after"`
}

type report struct {
	plan       plan
	samples    map[string][]float64
	mib        map[string]bool // figures that are memory
	missing    []string
	At         time.Time         `json:"at"`
	Command    string            `json:"command"`
	Machine    machine           `json:"machine"`
	Host       *machine          `json:"host,omitempty"`   // of the lab, if Machine is it
	Stalls     int               `json:"stalls,omitempty"` // guests of the lab that stood still and were made once more
	Figures    map[string]figure `json:"figures"`
	Thresholds []threshold       `json:"thresholds"`
	Goals      []goal            `json:"goals"`
}

func newReport(p plan, dir string) *report {
	r := &report{plan: p, samples: map[string][]float64{}, mib: map[string]bool{}, At: time.Now().UTC().Truncate(time.Second), Command: "make bench",
		Machine: thisMachine(dir), Figures: map[string]figure{}}
	if p.quick {
		r.Command = "BENCH_QUICK=1 make bench"
	}
	return r
}

func thisMachine(dir string) machine {
	m := machine{CPU: "unknown", Cores: runtime.NumCPU(), LoadBefore: load()}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) == nil {
		names := map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.XFS_SUPER_MAGIC: "xfs",
			unix.TMPFS_MAGIC: "tmpfs", unix.OVERLAYFS_SUPER_MAGIC: "overlayfs"}
		if m.Filesystem = names[st.Type]; m.Filesystem == "" {
			m.Filesystem = fmt.Sprintf("type %#x", st.Type)
		}
	}
	return m
}

func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(b), " ")
	return first
}

// at names a figure at a level.
func at(name string, level int) string { return fmt.Sprintf("%s@%d", name, level) }

// sample takes one sample of a duration.
func (r *report) sample(name string, f func() (time.Duration, error)) error {
	d, err := f()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	r.add(name, d)
	return nil
}

func (r *report) add(name string, d time.Duration) {
	r.samples[name] = append(r.samples[name], float64(d.Microseconds())/1000)
}

// addMiB takes one sample of an amount of memory.
func (r *report) addMiB(name string, mib float64) {
	r.samples[name] = append(r.samples[name], mib)
	r.mib[name] = true
}

// count sets a figure that is no duration.
func (r *report) count(name string, n float64) { r.Figures[name] = figure{Count: n, Unit: "count"} }

// percentile is the smallest sample that at least p of all samples do not exceed.
func percentile(sorted []float64, p float64) float64 {
	return sorted[max(0, int(math.Ceil(p*float64(len(sorted))))-1)]
}

// derive makes figures of samples.
func (r *report) derive() {
	for name, s := range r.samples {
		slices.Sort(s)
		unit := "ms"
		if r.mib[name] {
			unit = "MiB"
		}
		r.Figures[name] = figure{P50: percentile(s, 0.5), P95: percentile(s, 0.95), Min: s[0], Samples: len(s), Unit: unit}
	}
	r.Machine.LoadAfter = load()
}

// p50 of a figure, or its count; a figure that is not there is noted and fails the run.
func (r *report) p50(name string) float64 {
	f, ok := r.Figures[name]
	if !ok {
		if !slices.Contains(r.missing, name) {
			r.missing = append(r.missing, name)
		}
		return math.NaN()
	}
	if f.Unit == "count" {
		return f.Count
	}
	return f.P50
}

// createTransactions is what a create commits: the admission, the intent of all that is made, what was made before the guest is
// waited for, its end, and the operation's.
const createTransactions = 5

// bareCreate is the floor of a create at a level: a process, the copies, the transactions.
func (r *report) bareCreate(level int) float64 {
	return r.p50("start.version") + r.p50(at("floor.disks", level)) + createTransactions*r.p50(at("floor.transaction", level))
}

// hold notes a threshold. NaN, a figure that is missing, is not met.
func (r *report) hold(name, of string, value, most float64) {
	r.Thresholds = append(r.Thresholds, threshold{name, round(value), most, of, value <= most})
}

// judge compares figures with floors. It returns what is wrong.
func (r *report) judge() []string {
	first, last := r.plan.Levels[0], r.plan.Levels[len(r.plan.Levels)-1]
	ratio := func(level int) float64 { return r.p50(at("create", level)) / r.bareCreate(level) }
	// 2.6 on a quiet machine, 3.9 with a load of 14 on two cores: a create changes hands more often than
	// its floor does, and each time waits for its turn.
	for _, level := range r.plan.Levels {
		r.hold(at("create", level), fmt.Sprintf("times a bare process, copy of the disks and %d transactions", createTransactions), ratio(level), 5)
	}
	r.hold("create grows", fmt.Sprintf("times the same ratio at %d VMs", first), ratio(last)/ratio(first), 1.5)
	r.hold("bytes written grow", fmt.Sprintf("times those at %d VMs", first),
		r.p50(at("create.bytes_written", last))/r.p50(at("create.bytes_written", first)), 1.25)
	r.hold("bytes allocated", "times those of the two disks' copies and 256 KiB",
		r.p50(at("create.bytes_allocated", last))/(r.p50("floor.disks.bytes")+256<<10), 1)
	r.hold("programs, fake", "executed by the daemon for a create", r.p50("create.programs"), 0)
	r.hold("programs, command line", "executed by banger vm create", r.p50("create.programs_cli"), 0)
	r.hold("list in the daemon", fmt.Sprintf("times the bare encoding of %d VMs", last),
		r.p50(at("list.daemon", last))/r.p50(at("floor.encode", last)), 25)
	r.hold("list grows", fmt.Sprintf("times the VMs that are more than at %d", r.plan.Levels[1]),
		r.p50(at("list.daemon", last))/r.p50(at("list.daemon", r.plan.Levels[1]))/(float64(last)/float64(r.plan.Levels[1])), 1.5)
	r.hold("--help", "times a bare process", r.p50("start.help")/r.p50("floor.process"), 15)
	r.hold(at("vm list", last), "times a bare process", r.p50(at("list", last))/r.p50(at("floor.process.list", last)), 40)
	// QEMU and, beside it, the user network's program: a stack that a guest speaks to has no place in the daemon.
	r.hold("programs, QEMU", "executed by the daemon for a create", r.p50("real.programs"), 2)
	// Two calls: the handshake goes to and fro twice. A second lost to a retry would be ten more.
	r.hold("real create", "times bare create, bare QEMU and two calls to the agent, beyond the guest's own boot",
		r.p50("real.warm.host")/(r.bareCreate(first)+r.p50("floor.qemu")+2*r.p50("floor.agent")), 4)

	aim := func(name string, value, below float64) {
		r.Goals = append(r.Goals, goal{name, round(value), below, value < below})
	}
	aim("banger --help", r.p50("start.help"), 30)
	aim(fmt.Sprintf("banger vm list, %d VMs", last), r.p50(at("list", last)), 50)
	aim(fmt.Sprintf("list of %d VMs in the daemon", last), r.p50(at("list.daemon", last)), 20)
	for _, level := range r.plan.Levels {
		aim(fmt.Sprintf("create, nothing boots, %d VMs", level), r.p50(at("create", level)), 60)
	}
	// The clocks are laid over each other by a report that was on its way for less than a call takes.
	aim("real create beyond the guest's boot and its QEMU's start, and a call to the agent", r.p50("real.warm.host")-r.p50("real.warm.vmm")+r.p50("floor.agent"), 60)

	for _, f := range r.rows() {
		r.p50(f.name) // a figure that is missing fails
	}
	return r.wrong()
}

// wrong says which thresholds are not met and which figures are missing.
func (r *report) wrong() []string {
	var wrong []string
	for _, t := range r.Thresholds {
		if !t.Met {
			wrong = append(wrong, fmt.Sprintf("%s: %.2f %s, at most %.2f", t.Name, t.Value, t.Of, t.Most))
		}
	}
	for _, name := range r.missing {
		wrong = append(wrong, "no figure: "+name)
	}
	return wrong
}

// round keeps what is worth writing down; JSON knows no NaN.
func round(v float64) float64 {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return -1
	}
	return math.Round(v*100) / 100
}

func (r *report) writeJSON(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// writeRow writes one line of the table of figures.
func (r *report) writeRow(b *strings.Builder, label, name string) {
	f, ok := r.Figures[name]
	switch {
	case !ok:
		fmt.Fprintf(b, "| %s | missing | | |\n", label)
	case f.Unit == "count":
		fmt.Fprintf(b, "| %s | %s | | |\n", label, formatCount(name, f.Count))
	case f.Unit == "MiB":
		fmt.Fprintf(b, "| %s | %.1f MiB | %.1f MiB | %d |\n", label, f.P50, f.P95, f.Samples)
	default:
		fmt.Fprintf(b, "| %s | %s | %s | %d |\n", label, formatMS(f.P50), formatMS(f.P95), f.Samples)
	}
}

// thresholds writes the table of thresholds.
func (r *report) thresholds(b *strings.Builder) {
	b.WriteString("\n| threshold | is | at most | of |\n| --- | ---: | ---: | --- |\n")
	for _, t := range r.Thresholds {
		mark := ""
		if !t.Met {
			mark = " **not met**"
		}
		fmt.Fprintf(b, "| %s | %.2f | %.2f | %s%s |\n", t.Name, t.Value, t.Most, t.Of, mark)
	}
}

// lab says where the figures of inLab are from.
func (r *report) lab() string {
	return fmt.Sprintf("`%s`: %s in the lab, Linux %s with %d CPUs, %s; load in it %s before, %s after.\n"+
		"The lab ran on %s, %d cores, Linux %s; load %s before, %s after; %s.\n\n",
		r.Command, r.Machine.Firecracker, r.Machine.Kernel, r.Machine.Cores, r.Machine.Filesystem, r.Machine.LoadBefore, r.Machine.LoadAfter,
		r.Host.CPU, r.Host.Cores, r.Host.Kernel, r.Host.LoadBefore, r.Host.LoadAfter, r.At.Format("2006-01-02 15:04 UTC"))
}

// stalls writes how many guests were made once more, if any were.
func (r *report) stalls(b *strings.Builder) {
	if r.Stalls > 0 {
		fmt.Fprintf(b, "\nGuests that stood still and were made once more: %d.\n", r.Stalls)
	}
}

// tableOfFloor renders the figures of bench-floor.
func (r *report) tableOfFloor() string {
	var b strings.Builder
	b.WriteString(r.lab())
	b.WriteString("| what | p50 | p95 | samples |\n| --- | ---: | ---: | ---: |\n")
	for _, s := range floorStages {
		r.writeRow(&b, s.label, s.name)
	}
	r.stalls(&b)
	r.thresholds(&b)
	return b.String()
}

// row is a line of a table of figures: what is shown of one, and its name.
type row struct{ label, name string }

// rows are the lines of the table, of which none may be missing.
func (r *report) rows() []row {
	rows := []row{
		{"floor: a process that does nothing", "floor.process"},
		{"floor: a durable transaction", at("floor.transaction", r.plan.Levels[0])},
		{"floor: a durable copy of both blank disks", at("floor.disks", r.plan.Levels[0])},
		{"floor: QEMU until its monitor answers", "floor.qemu"},
		{"floor: a call to the agent of a guest that boots", "floor.agent"},
		{"`banger --help`", "start.help"},
	}
	add := func(label, name string) { rows = append(rows, row{label, name}) }
	for _, level := range r.plan.Levels {
		add(fmt.Sprintf("`banger vm create`, nothing boots, %d VMs", level), at("create", level))
	}
	for _, level := range r.plan.Levels {
		add(fmt.Sprintf("`banger vm list`, %d VMs", level), at("list", level))
	}
	for _, level := range r.plan.Levels {
		add(fmt.Sprintf("list in the daemon, %d VMs", level), at("list.daemon", level))
	}
	for _, level := range r.plan.Levels {
		add(fmt.Sprintf("bytes written for a create, %d VMs", level), at("create.bytes_written", level))
	}
	add("disk space that a create takes", at("create.bytes_allocated", r.plan.Levels[len(r.plan.Levels)-1]))
	add("programs executed for a create, nothing boots", "create.programs")
	add("programs executed for a create, QEMU", "real.programs")
	for _, s := range realStages {
		add("real create, warm: "+s.label, "real.warm."+s.name)
	}
	for _, s := range realStages {
		add("real create, cold: "+s.label, "real.cold."+s.name)
	}
	return rows
}

// table renders the figures for docs/benchmarks.md.
func (r *report) table() string {
	var b strings.Builder
	m := r.Machine
	fmt.Fprintf(&b, "`%s` on %s, %d cores, Linux %s, %s", r.Command, m.CPU, m.Cores, m.Kernel, m.Filesystem)
	if m.QEMU != "" {
		fmt.Fprintf(&b, ", %s with %s", m.QEMU, m.Accel)
	}
	fmt.Fprintf(&b, "; load %s before, %s after; %s.\n\n", m.LoadBefore, m.LoadAfter, r.At.Format("2006-01-02 15:04 UTC"))
	b.WriteString("| what | p50 | p95 | samples |\n| --- | ---: | ---: | ---: |\n")
	for _, f := range r.rows() {
		r.writeRow(&b, f.label, f.name)
	}
	r.thresholds(&b)
	b.WriteString("\n| goal | is | below |\n| --- | ---: | ---: |\n")
	for _, g := range r.Goals {
		mark := ""
		if !g.Reached {
			mark = " **not reached**"
		}
		fmt.Fprintf(&b, "| %s%s | %s | %s |\n", g.Name, mark, formatMS(g.Value), formatMS(g.Below))
	}
	return b.String()
}

func formatMS(ms float64) string {
	switch {
	case ms >= 10000:
		return fmt.Sprintf("%.1f s", ms/1000)
	case ms >= 100:
		return fmt.Sprintf("%.0f ms", ms)
	case ms >= 1:
		return fmt.Sprintf("%.1f ms", ms)
	}
	return fmt.Sprintf("%.2f ms", ms)
}

func formatCount(name string, n float64) string {
	if strings.Contains(name, "bytes") {
		return fmt.Sprintf("%.0f KiB", n/1024)
	}
	return fmt.Sprintf("%g", n)
}

// refresh puts a table into the page, between the two lines that name the command which makes it.
func refresh(path, command, table string) error {
	tableBegin := "<!-- made by " + command + ": begin -->"
	tableEnd := "<!-- made by " + command + ": end -->"
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	head, rest, ok := strings.Cut(string(b), tableBegin+"\n")
	_, tail, end := strings.Cut(rest, tableEnd)
	if !ok || !end {
		return fault.New(fault.Corrupt, path, "the lines between which the table lies are missing").
			WithHint("put back %s and %s", tableBegin, tableEnd)
	}
	return os.WriteFile(path, []byte(head+tableBegin+"\n\n"+table+"\n"+tableEnd+tail), 0o644)
}
