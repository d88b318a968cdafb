package qemu

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/vmmtest"
)

// TestConformance runs the port's suite on real QEMU processes with the tiny kernel. The cases that
// need an agent in the guest are in the e2e test, with a Linux kernel.
func TestConformance(t *testing.T) { vmmtest.Run(t, conformance()) }

func conformance() vmmtest.Config {
	return vmmtest.Config{
		New: func(t *testing.T) vmm.Driver { return New(false) },
		Spec: func(t *testing.T) vmm.Spec {
			s := newSpec(t)
			s.ID = string(vm.NewID())
			return s
		},
		Processes: func(t *testing.T, s vmm.Spec) int { return len(processes(t, s)) },
		End: func(t *testing.T, s vmm.Spec) {
			p, err := process.Open(t.Context(), filepath.Join(s.RunDir, pidfile), s.Marker())
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(p.Kill(t.Context()), p.Close()); err != nil {
				t.Fatal(err)
			}
		},
		Leave: func(t *testing.T, s *vmm.Spec, reason string) {
			s.Cmdline = map[string]string{vmm.GuestShutdown: "poweroff", vmm.GuestReset: "reset"}[reason]
		},
		// The pidfile of a process that is real, alive and recorded with its true start time: only
		// its command line tells that it is someone else.
		Forge: func(t *testing.T, s vmm.Spec, pid int) {
			stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
			if err != nil {
				t.Fatal(err)
			}
			ticks, err := strconv.ParseUint(string(bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])[19]), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
			if err != nil {
				t.Fatal(err)
			}
			b, err := json.Marshal(map[string]any{"pid": pid, "start_ticks": ticks, "boot_id": string(bytes.TrimSpace(boot)), "marker": s.Marker()})
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(s.RunDir, pidfile), b, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		// The monitor's own stop: TestHostFull has the real reason, which needs a guest that writes.
		Pause: func(t *testing.T, s vmm.Spec, m vmm.Machine) {
			if err := m.(*machine).command(t.Context(), "stop", nil, nil); err != nil {
				t.Fatal(err)
			}
		},
		Locks: true,
	}
}

// processes lists the pids whose command line carries the marker.
func processes(t *testing.T, s vmm.Spec) (pids []int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err == nil && bytes.Contains(b, []byte("\x00"+s.Marker()+"\x00")) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}
