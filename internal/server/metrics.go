package server

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// MetricsPath is where the metrics are, on the API socket and on the port of their own.
const MetricsPath = "/metrics"

// Measured is what the metrics need of the use cases.
type Measured interface {
	Status(ctx context.Context) (sandbox.Status, error)
	Stats(ctx context.Context, refs []string) []sandbox.Stats
	OperationCounts() []sandbox.OperationCount
}

// Metrics returns the handler of MetricsPath, which answers in the text format of Prometheus (0.0.4). Guests that run
// are asked for theirs; one that hangs costs an answer some seconds, and its own part of it.
func Metrics(svc Measured, info Info, log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "metrics are read", http.StatusMethodNotAllowed)
			return
		}
		text, err := exposition(r.Context(), svc, info)
		if err != nil {
			log.Error("metrics", "error", err)
			http.Error(w, "the daemon's log says why", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_, _ = w.Write(text) // who asked may be gone
	})
}

// family is a metric with all its samples: a format's reader wants them together.
type family struct{ bytes.Buffer }

func begin(name, kind, help string) *family {
	f := &family{}
	fmt.Fprintf(f, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	return f
}

// add is a sample. labels are names and values in turn.
func (f *family) add(name string, value float64, labels ...string) {
	f.WriteString(name)
	for i := 0; i < len(labels); i += 2 {
		f.WriteByte("{,"[min(i, 1)])
		fmt.Fprintf(f, "%s=\"%s\"", labels[i], strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`).Replace(labels[i+1]))
	}
	if len(labels) > 0 {
		f.WriteByte('}')
	}
	fmt.Fprintf(f, " %s\n", strconv.FormatFloat(value, 'g', -1, 64))
}

func exposition(ctx context.Context, svc Measured, info Info) ([]byte, error) {
	status, err := svc.Status(ctx)
	if err != nil {
		return nil, err
	}
	var all []*family
	one := func(name, kind, help string, value float64, labels ...string) {
		f := begin(name, kind, help)
		f.add(name, value, labels...)
		all = append(all, f)
	}
	one("banger_build_info", "gauge", "The daemon and what VMs run under.", 1,
		"version", info.Version, "api_revision", strconv.Itoa(info.Revision), "vmm", status.VMM, "vmm_version", status.VMMVersion, "accel", status.Accel, "network", status.Network)
	one("banger_start_time_seconds", "gauge", "When the daemon started, in seconds since 1970.", float64(info.StartedAt.UnixMilli())/1000)
	one("banger_images", "gauge", "Images.", float64(status.Images))
	one("banger_operations_running", "gauge", "Operations that have not ended.", float64(status.OperationsRunning))

	vms := begin("banger_vms", "gauge", "VMs by state.")
	for _, state := range []vm.State{vm.Defined, vm.Starting, vm.Running, vm.Stopping, vm.Stopped, vm.Failed, vm.Deleting} {
		vms.add("banger_vms", float64(status.ByState[state]), "state", string(state))
	}
	all = append(all, vms)

	took := begin("banger_operation_duration_seconds", "histogram", "Operations that ended since the daemon's start, by how long they took.")
	for _, n := range svc.OperationCounts() {
		labels := []string{"kind", string(n.Kind), "state", string(n.State)}
		for i, bound := range sandbox.OperationBuckets {
			took.add("banger_operation_duration_seconds_bucket", float64(n.Within[i]), append(slices.Clone(labels), "le", strconv.FormatFloat(bound, 'g', -1, 64))...)
		}
		took.add("banger_operation_duration_seconds_bucket", float64(n.Count), append(slices.Clone(labels), "le", "+Inf")...)
		took.add("banger_operation_duration_seconds_sum", n.Seconds, labels...)
		took.add("banger_operation_duration_seconds_count", float64(n.Count), labels...)
	}
	all = append(all, took)
	all = append(all, ofVMs(svc.Stats(ctx, nil))...)

	var out bytes.Buffer
	for _, f := range all {
		_, _ = f.WriteTo(&out)
	}
	return out.Bytes(), nil
}

// ofVMs are the metrics of VMs that run. What a guest did not tell is left out of them.
func ofVMs(stats []sandbox.Stats) []*family {
	cpu := begin("banger_vm_host_cpu_seconds_total", "counter", "CPU time of the program that runs the VM.")
	memory := begin("banger_vm_host_memory_bytes", "gauge", "Memory of that program (PSS).")
	disk := begin("banger_vm_host_disk_bytes", "gauge", "What the VM's disks take of the host.")
	answers := begin("banger_vm_agent_up", "gauge", "Whether the guest's agent answered.")
	guestCPU := begin("banger_vm_guest_cpu_seconds_total", "counter", "Busy time of all of the guest's CPUs.")
	total := begin("banger_vm_guest_memory_bytes", "gauge", "The guest's memory.")
	available := begin("banger_vm_guest_memory_available_bytes", "gauge", "What of it is available.")
	size := begin("banger_vm_guest_filesystem_bytes", "gauge", "Size of a filesystem of the guest.")
	used := begin("banger_vm_guest_filesystem_used_bytes", "gauge", "What of it is used.")
	in := begin("banger_vm_guest_received_bytes_total", "counter", "Received by an interface of the guest.")
	sent := begin("banger_vm_guest_sent_bytes_total", "counter", "Sent by an interface of the guest.")
	for _, st := range stats {
		if st.Err != nil {
			continue
		}
		id := []string{"vm", st.VM.Name, "id", string(st.VM.ID)}
		and := func(name, value string) []string { return append(slices.Clone(id), name, value) }
		if h := st.Host; h != nil {
			cpu.add("banger_vm_host_cpu_seconds_total", h.CPU.Seconds(), id...)
			memory.add("banger_vm_host_memory_bytes", float64(h.Memory), id...)
			disk.add("banger_vm_host_disk_bytes", float64(h.DiskAllocated), and("disk", "work")...)
			disk.add("banger_vm_host_disk_bytes", float64(h.SystemAllocated), and("disk", "system")...)
		}
		g := st.Guest
		if g == nil {
			answers.add("banger_vm_agent_up", 0, id...)
			continue
		}
		answers.add("banger_vm_agent_up", 1, id...)
		guestCPU.add("banger_vm_guest_cpu_seconds_total", (time.Duration(g.GetCpuBusyMs()) * time.Millisecond).Seconds(), id...)
		total.add("banger_vm_guest_memory_bytes", float64(g.GetMemoryTotalBytes()), id...)
		available.add("banger_vm_guest_memory_available_bytes", float64(g.GetMemoryAvailableBytes()), id...)
		for _, d := range g.GetDisks() {
			size.add("banger_vm_guest_filesystem_bytes", float64(d.GetTotalBytes()), and("mountpoint", d.GetTarget())...)
			used.add("banger_vm_guest_filesystem_used_bytes", float64(d.GetUsedBytes()), and("mountpoint", d.GetTarget())...)
		}
		for _, i := range g.GetInterfaces() {
			in.add("banger_vm_guest_received_bytes_total", float64(i.GetReceivedBytes()), and("interface", i.GetName())...)
			sent.add("banger_vm_guest_sent_bytes_total", float64(i.GetSentBytes()), and("interface", i.GetName())...)
		}
	}
	return []*family{cpu, memory, disk, answers, guestCPU, total, available, size, used, in, sent}
}
