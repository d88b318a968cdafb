package server_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/server"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

type measured struct{ err error }

func (m measured) Status(context.Context) (sandbox.Status, error) {
	return sandbox.Status{VMM: "qemu", VMMVersion: "7.2", Accel: "tcg", Images: 2, OperationsRunning: 1, ByState: map[vm.State]int{vm.Running: 2, vm.Stopped: 1}}, m.err
}

func (measured) Stats(context.Context, []string) []sandbox.Stats {
	return []sandbox.Stats{
		{VM: vm.VM{ID: "aa", Name: "otter"}, Host: &sandbox.HostStats{Usage: process.Usage{CPU: 1500 * time.Millisecond, Memory: 1 << 20}, DiskAllocated: 10, SystemAllocated: 20},
			Guest: &agentv1.StatsResponse{CpuBusyMs: 250, MemoryTotalBytes: 100, MemoryAvailableBytes: 40,
				Disks: []*agentv1.DiskStats{{Target: "/a\"b\\c\nd", TotalBytes: 8, UsedBytes: 4}}, Interfaces: []*agentv1.InterfaceStats{{Name: "eth0", ReceivedBytes: 5, SentBytes: 6}}}},
		{VM: vm.VM{ID: "bb", Name: "silent"}, Host: &sandbox.HostStats{}, GuestErr: errors.New("no")},
		{Ref: "gone", Err: fault.New(fault.NotFound, "gone", "no")},
	}
}

func (measured) OperationCounts() []sandbox.OperationCount {
	return []sandbox.OperationCount{{Kind: operation.Create, State: operation.Succeeded, Count: 3, Seconds: 4.5, Within: []int64{0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3}}}
}

const wantMetrics = `# HELP banger_build_info The daemon and what VMs run under.
# TYPE banger_build_info gauge
banger_build_info{version="v1",api_revision="5",vmm="qemu",vmm_version="7.2",accel="tcg",network=""} 1
# HELP banger_start_time_seconds When the daemon started, in seconds since 1970.
# TYPE banger_start_time_seconds gauge
banger_start_time_seconds 1000.5
# HELP banger_images Images.
# TYPE banger_images gauge
banger_images 2
# HELP banger_operations_running Operations that have not ended.
# TYPE banger_operations_running gauge
banger_operations_running 1
# HELP banger_vms VMs by state.
# TYPE banger_vms gauge
banger_vms{state="defined"} 0
banger_vms{state="starting"} 0
banger_vms{state="running"} 2
banger_vms{state="stopping"} 0
banger_vms{state="stopped"} 1
banger_vms{state="failed"} 0
banger_vms{state="deleting"} 0
# HELP banger_operation_duration_seconds Operations that ended since the daemon's start, by how long they took.
# TYPE banger_operation_duration_seconds histogram
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="0.05"} 0
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="0.1"} 1
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="0.25"} 1
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="0.5"} 1
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="1"} 2
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="2.5"} 2
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="5"} 3
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="10"} 3
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="30"} 3
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="60"} 3
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="120"} 3
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="300"} 3
banger_operation_duration_seconds_bucket{kind="create",state="succeeded",le="+Inf"} 3
banger_operation_duration_seconds_sum{kind="create",state="succeeded"} 4.5
banger_operation_duration_seconds_count{kind="create",state="succeeded"} 3
# HELP banger_vm_host_cpu_seconds_total CPU time of the program that runs the VM.
# TYPE banger_vm_host_cpu_seconds_total counter
banger_vm_host_cpu_seconds_total{vm="otter",id="aa"} 1.5
banger_vm_host_cpu_seconds_total{vm="silent",id="bb"} 0
# HELP banger_vm_host_memory_bytes Memory of that program (PSS).
# TYPE banger_vm_host_memory_bytes gauge
banger_vm_host_memory_bytes{vm="otter",id="aa"} 1.048576e+06
banger_vm_host_memory_bytes{vm="silent",id="bb"} 0
# HELP banger_vm_host_disk_bytes What the VM's disks take of the host.
# TYPE banger_vm_host_disk_bytes gauge
banger_vm_host_disk_bytes{vm="otter",id="aa",disk="work"} 10
banger_vm_host_disk_bytes{vm="otter",id="aa",disk="system"} 20
banger_vm_host_disk_bytes{vm="silent",id="bb",disk="work"} 0
banger_vm_host_disk_bytes{vm="silent",id="bb",disk="system"} 0
# HELP banger_vm_agent_up Whether the guest's agent answered.
# TYPE banger_vm_agent_up gauge
banger_vm_agent_up{vm="otter",id="aa"} 1
banger_vm_agent_up{vm="silent",id="bb"} 0
# HELP banger_vm_guest_cpu_seconds_total Busy time of all of the guest's CPUs.
# TYPE banger_vm_guest_cpu_seconds_total counter
banger_vm_guest_cpu_seconds_total{vm="otter",id="aa"} 0.25
# HELP banger_vm_guest_memory_bytes The guest's memory.
# TYPE banger_vm_guest_memory_bytes gauge
banger_vm_guest_memory_bytes{vm="otter",id="aa"} 100
# HELP banger_vm_guest_memory_available_bytes What of it is available.
# TYPE banger_vm_guest_memory_available_bytes gauge
banger_vm_guest_memory_available_bytes{vm="otter",id="aa"} 40
# HELP banger_vm_guest_filesystem_bytes Size of a filesystem of the guest.
# TYPE banger_vm_guest_filesystem_bytes gauge
banger_vm_guest_filesystem_bytes{vm="otter",id="aa",mountpoint="/a\"b\\c\nd"} 8
# HELP banger_vm_guest_filesystem_used_bytes What of it is used.
# TYPE banger_vm_guest_filesystem_used_bytes gauge
banger_vm_guest_filesystem_used_bytes{vm="otter",id="aa",mountpoint="/a\"b\\c\nd"} 4
# HELP banger_vm_guest_received_bytes_total Received by an interface of the guest.
# TYPE banger_vm_guest_received_bytes_total counter
banger_vm_guest_received_bytes_total{vm="otter",id="aa",interface="eth0"} 5
# HELP banger_vm_guest_sent_bytes_total Sent by an interface of the guest.
# TYPE banger_vm_guest_sent_bytes_total counter
banger_vm_guest_sent_bytes_total{vm="otter",id="aa",interface="eth0"} 6
`

func TestMetrics(t *testing.T) {
	info := server.Info{Version: "v1", Revision: 5, StartedAt: time.UnixMilli(1_000_500)}
	ask := func(method string, svc server.Measured) (int, string, string) {
		s := httptest.NewServer(server.Metrics(svc, info, slog.New(slog.DiscardHandler)))
		defer s.Close()
		req, err := http.NewRequestWithContext(t.Context(), method, s.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := s.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, resp.Header.Get("Content-Type"), string(body)
	}
	status, kind, body := ask(http.MethodGet, measured{})
	if status != 200 || kind != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("%d, %s", status, kind)
	}
	if diff := cmp.Diff(wantMetrics, body); diff != "" {
		t.Error(diff)
	}
	if status, _, _ := ask(http.MethodPost, measured{}); status != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", status)
	}
	if status, _, body := ask(http.MethodGet, measured{errors.New("secret")}); status != 500 || body != "the daemon's log says why\n" {
		t.Errorf("an error: %d, %q", status, body)
	}
}
