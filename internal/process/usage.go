package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// Usage is what a process has cost so far.
type Usage struct {
	CPU time.Duration // user and system time of all its threads, in ticks of 10 ms
	// Memory is its proportional set size in bytes: pages that it shares count in part. The resident set
	// where the kernel does not tell the other.
	Memory int64
}

// UsageOf reads what a process costs (proc_pid_stat(5), proc_pid_smaps(5)). Reading the second takes the
// kernel some microseconds for each MiB that the process has mapped. An error if it is gone; the pid may
// be another's then, which the caller has to look at.
func UsageOf(pid int) (Usage, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return Usage{}, err
	}
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:]) // from the third on
	if len(fields) < 22 {
		return Usage{}, fmt.Errorf("%s/stat has %d fields", dir, len(fields))
	}
	var ticks, pages int64
	for i, to := range map[int]*int64{11: &ticks, 12: &ticks, 21: &pages} {
		n, err := strconv.ParseInt(string(fields[i]), 10, 64)
		if err != nil {
			return Usage{}, fmt.Errorf("%s/stat: %w", dir, err)
		}
		*to += n
	}
	u := Usage{CPU: time.Duration(ticks) * 10 * time.Millisecond, Memory: pages * int64(os.Getpagesize())}
	rollup, err := os.ReadFile(filepath.Join(dir, "smaps_rollup"))
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, os.ErrPermission):
		return u, nil // a kernel without it, or a process that may not be looked into
	case err != nil:
		return u, err // ESRCH: it has just ended
	}
	for line := range bytes.Lines(rollup) {
		if f := bytes.Fields(line); len(f) >= 2 && string(f[0]) == "Pss:" {
			kib, err := strconv.ParseInt(string(f[1]), 10, 64)
			if err != nil {
				return u, fmt.Errorf("%s/smaps_rollup: %w", dir, err)
			}
			u.Memory = kib << 10
		}
	}
	return u, nil
}
