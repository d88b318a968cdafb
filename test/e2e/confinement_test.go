//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/cgroup"
	"git.thaloco.com/thaloco/banger/internal/jail"
)

// TestConfinement compares what vm show says of a VM's program with what the kernel does, and, where
// the host has them, the bounds of its control group with what the VM was made with.
func TestConfinement(t *testing.T) {
	h := newHost(t)
	h.create("held", "--memory", "256M", "--vcpu", "2")
	type shown struct {
		PID         int `json:"pid"`
		Confinement struct {
			UID             int     `json:"uid"`
			NoNewPrivileges bool    `json:"no_new_privileges"`
			Seccomp         string  `json:"seccomp"`
			Cgroup          string  `json:"cgroup"`
			NoCgroup        string  `json:"no_cgroup"`
			MemoryMax       int64   `json:"memory_max_bytes"`
			CPUMax          float64 `json:"cpu_max"`
			TasksMax        int64   `json:"tasks_max"`
			Jailed          bool    `json:"jailed"`
		} `json:"confinement"`
	}
	var v, later shown
	h.json(&v, "vm", "show", "held")
	c := v.Confinement
	if c.Jailed != jail.Inside(c.UID) || !c.Jailed && c.UID != os.Geteuid() || !c.NoNewPrivileges || c.Seccomp != "filter" {
		t.Errorf("confinement: %+v", c)
	}
	if os.Geteuid() == 0 && underFirecracker() && !c.Jailed {
		t.Errorf("root's VM is in no jail: %+v", c)
	}
	own, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", v.PID))
	if err != nil {
		t.Fatal(err)
	}
	why := cgroup.New("test").Missing()
	if why != "" {
		if c.Cgroup != "" || c.NoCgroup != why {
			t.Errorf("a control group on a host without: %+v", c)
		}
		t.Skip("no control groups for VMs here: " + why)
	}
	_, group, _ := strings.Cut(string(own), "0::")
	group, _, _ = strings.Cut(group, "\n")
	if c.Cgroup == "" || filepath.Base(group) != c.Cgroup {
		t.Fatalf("shown %q (%s), the kernel says %s", c.Cgroup, c.NoCgroup, own)
	}
	dir := filepath.Join("/sys/fs/cgroup", group)
	for file, want := range map[string]string{
		"memory.max": fmt.Sprint(c.MemoryMax),
		"cpu.max":    fmt.Sprintf("%.0f 100000", c.CPUMax*100_000),
		"pids.max":   fmt.Sprint(c.TasksMax),
	} {
		if got, err := os.ReadFile(filepath.Join(dir, file)); err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("%s: %q, %v; vm show says %q", file, got, err, want)
		}
	}
	// As docs/troubleshooting.md says. An emulator takes memory of its own beside.
	least := cgroup.ForVM(2, 256, 0)
	if c.CPUMax != least.CPUs || c.TasksMax != least.Tasks || c.MemoryMax < least.Memory || underFirecracker() && c.MemoryMax != least.Memory {
		t.Errorf("bounds of %+v, want %+v", c, least)
	}
	if got := h.do("vm", "show", "held"); !strings.Contains(got, fmt.Sprintf("cgroup %s (memory ", c.Cgroup)) || !strings.Contains(got, ", 3 CPUs, 258 tasks)") {
		t.Errorf("vm show says\n%s", got)
	}
	// Who asks later reads the same: another daemon adopts it in its group.
	h.do("daemon", "stop")
	if h.json(&later, "vm", "show", "held"); later != v {
		t.Errorf("the next daemon says %+v, the one before %+v", later, v)
	}
	if os.Geteuid() != 0 && !strings.HasPrefix(group, fmt.Sprintf("/user.slice/user-%[1]d.slice/user@%[1]d.service/", os.Geteuid())) && strings.HasSuffix(group, ".scope") {
		t.Errorf("the scope %s is not the user's manager's", group)
	}
	h.do("vm", "stop", "--force", "held")
	h.until("its control group is gone", 20*time.Second, func() bool {
		_, err := os.Stat(dir)
		return os.IsNotExist(err)
	})
}
