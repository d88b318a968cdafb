package process

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Confinement is what the kernel holds a running process to, as /proc tells it.
type Confinement struct {
	UID        int    // effective
	NoNewPrivs bool   // PR_SET_NO_NEW_PRIVS: no program that it runs gains anything
	Seccomp    string // "" for none, "strict" or "filter", of its first thread
	Cgroup     string // path in the cgroup v2 hierarchy, "" if the host has none
}

// ConfinementOf is Confinement for a pid of which the caller knows that the process still runs after
// the call.
func ConfinementOf(pid int) (Confinement, error) {
	c, err := statusOf(filepath.Join("/proc", strconv.Itoa(pid)))
	if err != nil {
		return c, err
	}
	c.Cgroup, err = CgroupOf(pid)
	return c, err
}

// statusOf reads a process's or a thread's directory below /proc.
func statusOf(dir string) (c Confinement, err error) {
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return c, err
	}
	lines := bufio.NewScanner(bytes.NewReader(status))
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ":")
		fields := strings.Fields(value)
		switch {
		case key == "Uid" && len(fields) == 4: // real, effective, saved, filesystem
			if c.UID, err = strconv.Atoi(fields[1]); err != nil {
				return c, fmt.Errorf("%s/status: %w", dir, err)
			}
		case key == "NoNewPrivs" && len(fields) == 1:
			c.NoNewPrivs = fields[0] == "1"
		case key == "Seccomp" && len(fields) == 1:
			// seccomp(2): 1 and 2 are SECCOMP_MODE_STRICT and SECCOMP_MODE_FILTER.
			c.Seccomp = map[string]string{"1": "strict", "2": "filter"}[fields[0]]
		}
	}
	return c, lines.Err()
}

// CgroupOf is the path of a process in the cgroup v2 hierarchy, as its host or container sees it, ""
// if there is no such hierarchy (cgroups(7), /proc/pid/cgroup).
func CgroupOf(pid int) (string, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSuffix(path, "\n"), nil
		}
	}
	return "", nil
}
