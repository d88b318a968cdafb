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
	var v struct {
		PID         int `json:"pid"`
		Confinement struct {
			UID             int    `json:"uid"`
			NoNewPrivileges bool   `json:"no_new_privileges"`
			Seccomp         string `json:"seccomp"`
			Cgroup          string `json:"cgroup"`
			NoCgroup        string `json:"no_cgroup"`
			Jailed          bool   `json:"jailed"`
		} `json:"confinement"`
	}
	h.json(&v, "vm", "show", "held")
	c := v.Confinement
	if c.Jailed != jail.Inside(c.UID) || !c.Jailed && c.UID != os.Geteuid() || !c.NoNewPrivileges || c.Seccomp != "filter" {
		t.Errorf("confinement: %+v", c)
	}
	own, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", v.PID))
	if err != nil {
		t.Fatal(err)
	}
	why := cgroup.New("test").Missing()
	if why != "" {
		if c.Cgroup != "" || c.NoCgroup == "" {
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
	for file, least := range map[string]int64{"memory.max": 512 << 20, "cpu.max": 300_000, "pids.max": 100} {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Error(err)
			continue
		}
		var got int64
		if _, err := fmt.Sscan(string(b), &got); err != nil || got < least || got > 8*least {
			t.Errorf("%s: %q, want at least %d", file, b, least)
		}
	}
	h.do("vm", "stop", "--force", "held")
	h.until("its control group is gone", 20*time.Second, func() bool {
		_, err := os.Stat(dir)
		return os.IsNotExist(err)
	})
}
