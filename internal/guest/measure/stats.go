// Package measure owns what the agent reads of the guest it runs in: counters of the kernel, and who
// listens on which port.
//
// It reads /proc and asks the kernel; it never changes anything, runs no program, and keeps nothing
// between calls: an agent that nobody asks does nothing.
package measure

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

// most bounds a list that the guest's own state could make long.
const most = 64

// tick is a unit of /proc/stat in milliseconds: USER_HZ is 100 on x86 (sysconf(3), _SC_CLK_TCK).
const tick = 10

// Stats measures the guest. proc is where proc(5) is mounted, disks are the mounts to tell of: what is
// called and where it is found. A file that the kernel does not have leaves its fields zero.
func Stats(proc string, disks []Disk) (*agentv1.StatsResponse, error) {
	r := &agentv1.StatsResponse{UptimeMs: system.BootTime().Milliseconds()}
	err := errors.Join(cpu(proc, r), load(proc, r), memory(proc, r), interfaces(proc, r))
	if err != nil {
		return nil, err
	}
	for _, d := range disks[:min(len(disks), most)] {
		var st unix.Statfs_t
		if err := unix.Statfs(d.Path, &st); err != nil {
			continue // unmounted since: nothing to tell
		}
		r.Disks = append(r.Disks, &agentv1.DiskStats{Target: d.Target, TotalBytes: int64(st.Blocks) * st.Frsize,
			UsedBytes: int64(st.Blocks-st.Bfree) * st.Frsize, AvailableBytes: int64(st.Bavail) * st.Frsize})
	}
	return r, nil
}

// Disk is a mounted filesystem: its name for people, and a path in it.
type Disk struct{ Target, Path string }

// lines calls f with the fields of each line of a file.
func lines(proc, name string, f func(fields []string)) error {
	b, err := os.ReadFile(filepath.Join(proc, name))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	scan := bufio.NewScanner(bytes.NewReader(b))
	for scan.Scan() {
		f(strings.Fields(scan.Text()))
	}
	if err := scan.Err(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// number is 0 for what is none.
func number(s string) int64 {
	n, _ := strconv.ParseInt(s, 10, 64)
	return n
}

// cpu reads proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal, then what is part of the
// first two.
func cpu(proc string, r *agentv1.StatsResponse) error {
	return lines(proc, "stat", func(f []string) {
		switch {
		case len(f) < 5 || !strings.HasPrefix(f[0], "cpu"):
		case f[0] != "cpu":
			r.Cpus++
		default:
			for i, v := range f[1:min(len(f), 9)] {
				if i == 3 || i == 4 {
					r.CpuIdleMs += number(v) * tick
				} else {
					r.CpuBusyMs += number(v) * tick
				}
			}
		}
	})
}

func load(proc string, r *agentv1.StatsResponse) error {
	return lines(proc, "loadavg", func(f []string) {
		for i, to := range []*int64{&r.Load1Milli, &r.Load5Milli, &r.Load15Milli} {
			if i < len(f) {
				v, _ := strconv.ParseFloat(f[i], 64) // 0 for what is no number
				*to = int64(v * 1000)
			}
		}
	})
}

func memory(proc string, r *agentv1.StatsResponse) error {
	fields := map[string]*int64{"MemTotal:": &r.MemoryTotalBytes, "MemAvailable:": &r.MemoryAvailableBytes,
		"SwapTotal:": &r.SwapTotalBytes, "SwapFree:": &r.SwapFreeBytes}
	return lines(proc, "meminfo", func(f []string) {
		if len(f) >= 2 && fields[f[0]] != nil {
			*fields[f[0]] = number(f[1]) << 10
		}
	})
}

// interfaces reads /proc/net/dev (proc_pid_net(5)): name, eight numbers received, eight sent.
func interfaces(proc string, r *agentv1.StatsResponse) error {
	return lines(proc, "net/dev", func(f []string) {
		line := strings.Join(f, " ")
		name, rest, ok := strings.Cut(line, ":")
		f = strings.Fields(rest)
		if !ok || len(f) < 9 || name == "lo" || len(r.Interfaces) == most {
			return
		}
		r.Interfaces = append(r.Interfaces, &agentv1.InterfaceStats{Name: name, ReceivedBytes: number(f[0]), SentBytes: number(f[8])})
	})
}
