package measure

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
)

func proc(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestStats(t *testing.T) {
	dir := proc(t, map[string]string{
		"stat":    "cpu  100 10 50 1000 40 5 5 30 7 7\ncpu0 1 1 1 1 1 1 1 1 1 1\ncpu1 1 1 1 1 1 1 1 1 1 1\nintr 5 4\n",
		"loadavg": "0.52 1.00 12.34 1/100 999\n",
		"meminfo": "MemTotal:        2048 kB\nMemFree: 1 kB\nMemAvailable:    1024 kB\nSwapTotal: 4 kB\nSwapFree: 3 kB\n",
		"net/dev": "Inter-|   Receive                                                |  Transmit\n face |bytes    packets\n" +
			"    lo:  11    1    0    0    0     0          0         0   11       1    0    0    0     0       0          0\n" +
			"  eth0:1234    1    0    0    0     0          0         0   99       1    0    0    0     0       0          0\n",
	})
	got, err := Stats(dir, []Disk{{Target: "/root", Path: "/"}, {Target: "/gone", Path: "/nonexistent"}})
	if err != nil {
		t.Fatal(err)
	}
	if got.UptimeMs <= 0 || len(got.Disks) != 1 || got.Disks[0].Target != "/root" || got.Disks[0].TotalBytes <= 0 ||
		got.Disks[0].UsedBytes+got.Disks[0].AvailableBytes > got.Disks[0].TotalBytes {
		t.Errorf("uptime %d, disks %v", got.UptimeMs, got.Disks)
	}
	got.UptimeMs, got.Disks = 0, nil
	want := &agentv1.StatsResponse{Cpus: 2, CpuBusyMs: 2000, CpuIdleMs: 10400, Load1Milli: 520, Load5Milli: 1000, Load15Milli: 12340,
		MemoryTotalBytes: 2 << 20, MemoryAvailableBytes: 1 << 20, SwapTotalBytes: 4 << 10, SwapFreeBytes: 3 << 10,
		Interfaces: []*agentv1.InterfaceStats{{Name: "eth0", ReceivedBytes: 1234, SentBytes: 99}}}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

// A guest may have mounted something else on its /proc, or nothing.
func TestStatsOfNonsense(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"empty":   {},
		"garbage": {"stat": "cpu \x00 - x\ncpu", "loadavg": "\n", "meminfo": "MemTotal:\nMemAvailable: x", "net/dev": "eth0:\n:::::"},
	} {
		if r, err := Stats(proc(t, files), nil); err != nil || r.MemoryTotalBytes != 0 {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
}

// TestStatsOfThisMachine reads the real files.
func TestStatsOfThisMachine(t *testing.T) {
	r, err := Stats("/proc", nil)
	if err != nil || r.Cpus < 1 || r.CpuIdleMs+r.CpuBusyMs < 1 || r.MemoryTotalBytes < r.MemoryAvailableBytes || r.MemoryAvailableBytes < 1 {
		t.Errorf("%v, %v", r, err)
	}
}
