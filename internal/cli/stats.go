package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/age"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// sampleTime is between the two measurements of a single look: rates are differences.
const sampleTime = 500 * time.Millisecond

func (a *app) statsCommand() *cobra.Command {
	o := &listOptions{}
	cmd := &cobra.Command{
		Use: "stats [VM...]", Short: "Show what VMs use",
		Long: `Show what VMs cost the host, and what their guests use. Without names all that run are shown.

HOST CPU and HOST MEM are those of the program that runs the VM, DISK and SYSTEM what the guest's filesystems
hold of their size, and what that takes of the host. Rates are measured over half a second, with --watch over
two seconds. On a terminal that is narrower than the table some columns are left out, and -o wide shows them all.`,
		Example: `  banger vm stats
  banger vm stats calm-otter --watch
  banger vm stats --filter name=web-* --sort=-host.memory_bytes
  banger vm stats -o json | jq '.[] | {name, memory: .host.memory_bytes}'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.output(a, cmd); err != nil {
				return err
			}
			m := &meter{a: a, refs: args, options: o, last: map[string]*bangerv1.VMStats{}, trends: map[string]*trend{}}
			if o.watching {
				return a.watch(cmd.Context(), m.take)
			}
			return a.lookOnce(cmd.Context(), m.takeTwice)
		},
	}
	o.add(cmd, keysOf(statsView{}))
	cmd.Annotations = map[string]string{wideAnnotation: "yes"}
	return cmd
}

// meter makes rates of counters: of each look and the one before.
type meter struct {
	a       *app
	refs    []string
	options *listOptions
	last    map[string]*bangerv1.VMStats // by VM id
	trends  map[string]*trend
}

// trend is what a sparkline is drawn of.
type trend struct{ cpu, memory, network history }

type statsView struct {
	Ref   string          `json:"ref"`
	ID    string          `json:"id,omitempty"`
	Name  string          `json:"name,omitempty"`
	State string          `json:"state,omitempty"`
	At    *time.Time      `json:"at,omitempty"`
	Host  *hostStatsView  `json:"host,omitempty"`
	Guest *guestStatsView `json:"guest,omitempty"`
	Error *errorView      `json:"error,omitempty"`
	err   error
}

type hostStatsView struct {
	CPUPercent           *float64 `json:"cpu_percent,omitempty"` // of one CPU
	CPUMS                int64    `json:"cpu_ms"`
	MemoryBytes          int64    `json:"memory_bytes"`
	DiskAllocatedBytes   int64    `json:"disk_allocated_bytes"`
	SystemAllocatedBytes int64    `json:"system_allocated_bytes"`
}

type guestStatsView struct {
	UptimeMS             int64                `json:"uptime_ms"`
	CPUs                 int32                `json:"cpus"`
	CPUPercent           *float64             `json:"cpu_percent,omitempty"` // of all its CPUs
	Load                 [3]float64           `json:"load"`
	MemoryTotalBytes     int64                `json:"memory_total_bytes"`
	MemoryAvailableBytes int64                `json:"memory_available_bytes"`
	SwapTotalBytes       int64                `json:"swap_total_bytes"`
	SwapFreeBytes        int64                `json:"swap_free_bytes"`
	Disks                []guestDiskView      `json:"disks"`
	Interfaces           []guestInterfaceView `json:"interfaces"`
}

type guestDiskView struct {
	Target         string `json:"target"`
	TotalBytes     int64  `json:"total_bytes"`
	UsedBytes      int64  `json:"used_bytes"`
	AvailableBytes int64  `json:"available_bytes"`
}

type guestInterfaceView struct {
	Name              string   `json:"name"`
	ReceivedBytes     int64    `json:"received_bytes"`
	SentBytes         int64    `json:"sent_bytes"`
	ReceivedPerSecond *float64 `json:"received_per_second,omitempty"`
	SentPerSecond     *float64 `json:"sent_per_second,omitempty"`
}

// takeTwice is a look by itself, which is preceded by one that it is compared with.
func (m *meter) takeTwice(ctx context.Context, c *client.Client) (look, error) {
	if _, err := m.take(ctx, c); err != nil {
		return look{}, err
	}
	select {
	case <-time.After(sampleTime):
	case <-ctx.Done():
		return look{}, errInterrupted
	}
	return m.take(ctx, c)
}

// take looks once.
func (m *meter) take(ctx context.Context, c *client.Client) (look, error) {
	resp, err := c.VMs.GetStats(ctx, &bangerv1.GetStatsRequest{Refs: m.refs})
	if err != nil {
		return look{}, err
	}
	all := []statsView{}
	for key, r := range once(resp.GetResults()) {
		v := m.view(r)
		if r.GetVm() != nil {
			m.last[key] = r
			m.remember(key, v)
		}
		all = append(all, v)
	}
	shown := applyTo(all, m.options.filters, m.options.sort, func(v statsView) bool { return v.ID != "" })
	l := look{json: shown, text: func(w io.Writer) error { return m.print(w, shown, len(all)) }}
	for _, v := range shown {
		if v.ID == "" {
			l.errs = append(l.errs, v.err)
		}
	}
	l.over = allGone(m.refs, l.errs)
	return l, nil
}

// allGone is the end of a watch of VMs that were named, once there is none of them.
func allGone(refs []string, errs []error) error {
	there := func(err error) bool { return !fault.Is(err, fault.NotFound) }
	if len(refs) == 0 || len(errs) < len(refs) || slices.ContainsFunc(errs, there) {
		return nil
	}
	return reportedAll(errs)
}

// reportedAll is the end of a command whose errors are printed one by one; nil if there are none.
func reportedAll(errs []error) error {
	if len(errs) == 0 {
		return nil
	}
	code := exitCode(errs[0])
	for _, err := range errs {
		if exitCode(err) != code {
			code = exitFailed
		}
	}
	return reported{code}
}

// rate is the growth of a counter over a time; nil if it cannot be told: after a restart it is smaller.
func rate(now, before, elapsed int64, unit float64) *float64 {
	if elapsed <= 0 || now < before {
		return nil
	}
	r := float64(now-before) / float64(elapsed) * unit
	return &r
}

func (m *meter) view(r *bangerv1.VMStats) (v statsView) {
	v = statsView{Ref: r.GetRef(), ID: r.GetVm().GetId(), Name: r.GetVm().GetName(), State: r.GetVm().GetState(), At: timeOf(r.GetAt()),
		err: client.FromFault(r.GetFault())}
	defer func() { v.Error = viewError(v.err) }()
	last := m.last[v.ID]
	if h := r.GetHost(); h != nil {
		v.Host = &hostStatsView{CPUMS: h.GetCpuMs(), MemoryBytes: h.GetMemoryBytes(),
			DiskAllocatedBytes: h.GetDiskAllocatedBytes(), SystemAllocatedBytes: h.GetSystemAllocatedBytes()}
		if b := last.GetHost(); b != nil {
			v.Host.CPUPercent = rate(h.GetCpuMs(), b.GetCpuMs(), r.GetAt().AsTime().Sub(last.GetAt().AsTime()).Milliseconds(), 100)
		}
	}
	g := r.GetGuest()
	if g == nil {
		if r.GetGuestFault() != nil && r.GetVm().GetState() == "running" {
			v.err = client.FromFault(r.GetGuestFault())
		}
		return v
	}
	v.Guest = &guestStatsView{
		UptimeMS: g.GetUptimeMs(), CPUs: g.GetCpus(),
		Load:             [3]float64{float64(g.GetLoad1Milli()) / 1000, float64(g.GetLoad5Milli()) / 1000, float64(g.GetLoad15Milli()) / 1000},
		MemoryTotalBytes: g.GetMemoryTotalBytes(), MemoryAvailableBytes: g.GetMemoryAvailableBytes(),
		SwapTotalBytes: g.GetSwapTotalBytes(), SwapFreeBytes: g.GetSwapFreeBytes(),
		Disks: []guestDiskView{}, Interfaces: []guestInterfaceView{},
	}
	b := last.GetGuest()
	elapsed := g.GetUptimeMs() - b.GetUptimeMs()
	if b == nil || elapsed <= 0 { // another boot: nothing to compare with
		b, elapsed = nil, 0
	}
	if b != nil {
		busy := g.GetCpuBusyMs() - b.GetCpuBusyMs()
		v.Guest.CPUPercent = rate(g.GetCpuBusyMs(), b.GetCpuBusyMs(), busy+g.GetCpuIdleMs()-b.GetCpuIdleMs(), 100)
	}
	for _, d := range g.GetDisks() {
		v.Guest.Disks = append(v.Guest.Disks, guestDiskView{d.GetTarget(), d.GetTotalBytes(), d.GetUsedBytes(), d.GetAvailableBytes()})
	}
	for _, i := range g.GetInterfaces() {
		iv := guestInterfaceView{Name: i.GetName(), ReceivedBytes: i.GetReceivedBytes(), SentBytes: i.GetSentBytes()}
		for _, bi := range b.GetInterfaces() {
			if bi.GetName() == i.GetName() {
				iv.ReceivedPerSecond = rate(i.GetReceivedBytes(), bi.GetReceivedBytes(), elapsed, 1000)
				iv.SentPerSecond = rate(i.GetSentBytes(), bi.GetSentBytes(), elapsed, 1000)
			}
		}
		v.Guest.Interfaces = append(v.Guest.Interfaces, iv)
	}
	return v
}

// network adds up an interface's rates, or nil if none is known.
func (v statsView) network() (in, out *float64) {
	add := func(sum, r *float64) *float64 {
		if r == nil {
			return sum
		}
		if sum == nil {
			sum = new(float64)
		}
		*sum += *r
		return sum
	}
	if v.Guest != nil {
		for _, i := range v.Guest.Interfaces {
			in, out = add(in, i.ReceivedPerSecond), add(out, i.SentPerSecond)
		}
	}
	return in, out
}

func (m *meter) remember(id string, v statsView) {
	t := m.trends[id]
	if t == nil {
		t = &trend{}
		m.trends[id] = t
	}
	if v.Host != nil && v.Host.CPUPercent != nil {
		t.cpu.add(*v.Host.CPUPercent)
	}
	if v.Guest != nil {
		t.memory.add(float64(v.Guest.MemoryTotalBytes - v.Guest.MemoryAvailableBytes))
	}
	if in, out := v.network(); in != nil && out != nil {
		t.network.add(*in + *out)
	}
}

// print is the table of a look. Errors follow it on stderr.
func (m *meter) print(w io.Writer, views []statsView, all int) error {
	a := m.a
	header := []string{"NAME", "HOST CPU", "HOST MEM", "GUEST CPU", "LOAD", "MEMORY", "DISK", "SYSTEM", "NET IN", "NET OUT", "UPTIME"}
	graphs := m.options.watching && a.color
	if graphs {
		header = append(header, "CPU", "MEM", "NET")
	}
	var rows [][]cell
	for _, v := range views {
		if v.ID == "" {
			continue
		}
		row := []string{v.Name, "-", "-", "-", "-", "-", "-", "-", "-", "-", v.State}
		if h := v.Host; h != nil {
			row[1], row[2] = percent(h.CPUPercent), formatBytes(h.MemoryBytes)
			row[6], row[7] = formatBytes(h.DiskAllocatedBytes)+" on host", formatBytes(h.SystemAllocatedBytes)+" on host"
		}
		if g := v.Guest; g != nil {
			row[3], row[4] = percent(g.CPUPercent), fmt.Sprintf("%.2f", g.Load[0])
			row[5] = of(g.MemoryTotalBytes-g.MemoryAvailableBytes, g.MemoryTotalBytes)
			for _, d := range g.Disks {
				at, allocated := 7, v.Host
				if d.Target == "/root" {
					at = 6
				}
				row[at] = of(d.UsedBytes, d.TotalBytes)
				if allocated != nil {
					n := allocated.SystemAllocatedBytes
					if at == 6 {
						n = allocated.DiskAllocatedBytes
					}
					row[at] += " (" + formatBytes(n) + ")"
				}
			}
			in, out := v.network()
			row[8], row[9] = perSecond(in), perSecond(out)
			row[10] = age.Text(time.Duration(g.UptimeMS) * time.Millisecond)
		}
		var cells []cell
		for _, text := range row {
			cells = append(cells, cell{text: text})
		}
		if graphs {
			t := m.trends[v.ID]
			total := 0.0
			if v.Guest != nil {
				total = float64(v.Guest.MemoryTotalBytes)
			}
			for _, line := range []string{t.cpu.line(100), t.memory.line(total), t.network.line(0)} {
				cells = append(cells, cell{text: line + strings.Repeat(" ", sparks-len([]rune(line))), color: green})
			}
		}
		rows = append(rows, cells)
	}
	if len(views) == 0 {
		return a.nothing(w, all, "No VM runs. Start one: banger vm start NAME", m.options.watching)
	}
	if a.output != outputWide {
		width := int(sizeOf(a.out).Col)
		if graphs {
			width = max(width-1, 0) // clip keeps the last column free
		}
		header, rows = fit(width, header, rows, "SYSTEM", "LOAD", "NET OUT", "NET IN", "HOST MEM", "GUEST CPU", "DISK", "NET", "UPTIME", "MEM")
	}
	if len(rows) > 0 {
		if err := table(w, a.color, header, rows); err != nil {
			return err
		}
	}
	for _, v := range views {
		switch {
		case v.err == nil:
		case graphs: // what is drawn over must not be written beside
			fmt.Fprintln(w, v.err)
		default:
			a.printError(v.err)
		}
	}
	return nil
}

func percent(p *float64) string {
	if p == nil {
		return "-"
	}
	return fmt.Sprintf("%.0f%%", *p)
}

// of is a part of a whole: "1.2 of 2 GiB" would need one unit for both, which hides small parts.
func of(part, whole int64) string { return formatBytes(max(part, 0)) + " of " + formatBytes(whole) }

func perSecond(r *float64) string {
	if r == nil {
		return "-"
	}
	return formatBytes(int64(*r)) + "/s"
}
