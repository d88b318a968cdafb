//go:build e2e

package e2e

import (
	"encoding/json"
	"slices"
	"testing"
)

// TestBenchCreate measures creates of real VMs as docs/benchmarks.md says, and holds the figures to what they are said to be.
func TestBenchCreate(t *testing.T) {
	h := newHost(t)
	cmd := command(t.Context(), "make", "-C", checkout, "--no-print-directory", "bench-create", "ARGS=--runs 1")
	cmd.Env = h.env
	out, err := cmd.Output() // JSON alone: what make does before it is said on stderr
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	type spread struct{ Min, P50, P90, P95, P99, Max, Mean float64 }
	type group struct {
		CreateMS   spread `json:"create_ms"`
		SSHReadyMS spread `json:"ssh_ready_ms"`
		Runs       []struct {
			CreateMS   float64 `json:"create_ms"`
			SSHReadyMS float64 `json:"ssh_ready_ms"`
			Stages     []struct {
				Name string
				MS   float64
			}
			Boot []struct {
				Name string
				AtMS float64 `json:"at_ms"`
			}
		}
	}
	var report struct {
		Version, VMM, Accel, Image string
		Daemon                     string `json:"daemon_version"`
		CPUs                       int    `json:"host_cpus"`
		Cold, Warm                 *group
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var status struct {
		Version, VMM, Accel string
		VMMVersion          string `json:"vmm_version"`
	}
	h.json(&status, "daemon", "status")
	if report.VMM != status.VMM+" "+status.VMMVersion || report.Accel != status.Accel || report.Daemon != status.Version || report.Version == "" || report.Image != "default" || report.CPUs < 1 {
		t.Errorf("it says %+v, and the daemon %+v", report, status)
	}
	for kind, g := range map[string]*group{"cold": report.Cold, "warm": report.Warm} {
		if g == nil || len(g.Runs) != 1 {
			t.Fatalf("%s: %+v", kind, g)
		}
		r := g.Runs[0]
		t.Logf("%s: created after %.0f ms, entered after %.0f ms: %v", kind, r.CreateMS, r.SSHReadyMS, r.Stages)
		all := func(v float64) spread { return spread{v, v, v, v, v, v, v} }
		if g.CreateMS != all(r.CreateMS) || g.SSHReadyMS != all(r.SSHReadyMS) {
			t.Errorf("%s: of one run the spread is %+v", kind, g)
		}
		stages, names := 0.0, []string{}
		for _, s := range r.Stages {
			stages, names = stages+s.MS, append(names, s.Name)
		}
		if want := []string{"image", "system disk", "work disk", "network", "guest config", "vmm", "agent"}; !slices.Equal(names, want) {
			t.Errorf("%s: stages %v, want %v", kind, names, want)
		}
		// A guest boots, and what the daemon did is most of what the command took.
		if stages < 500 || stages > r.CreateMS || r.SSHReadyMS <= r.CreateMS {
			t.Errorf("%s: stages %v ms of a create of %v ms, entered after %v ms", kind, stages, r.CreateMS, r.SSHReadyMS)
		}
		if len(r.Boot) == 0 || r.Boot[len(r.Boot)-1].AtMS <= 0 {
			t.Errorf("%s: the guest's own stages are %v", kind, r.Boot)
		}
	}
	if left := h.list(); len(left) > 0 {
		t.Errorf("left: %+v", left)
	}
}
