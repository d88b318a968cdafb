package firecracker

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// Firecracker answers a write that the host cannot take with an I/O error, which a guest's filesystem
// does not survive in order. So a machine is stopped before its host's disk is full.
const (
	// reserve is what must be free for machines to run, in bytes. Half of what a start asks for
	// (disk.ReserveBytes), so that what was just started is not stopped at once.
	reserve = 128 << 20
	// fastest is how many bytes a second guests are thought to write at most: a page cache takes about
	// that. With it the looks at the disk are as rare as they may be.
	fastest = 2 << 30
	// The bounds of the time between two looks. What is written within the shorter one fits the reserve.
	lookOften  = 50 * time.Millisecond
	lookSeldom = 2 * time.Second
)

// room knows the filesystems that a machine's process writes to.
type room struct {
	paths []string // one for each filesystem
	free  func(path string) (int64, error)
}

// roomOf finds the files that the process holds open for writing: its data disks and its log. So it does
// not matter who started it. The links in /proc are kept: they lead to the files also when those were
// renamed (proc_pid_fd(5)).
func roomOf(pid int, free func(string) (int64, error)) (room, error) {
	r := room{free: free}
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return r, err
	}
	seen := map[uint64]bool{}
	for _, fd := range fds {
		path := filepath.Join(dir, "fd", fd.Name())
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || seen[st.Dev] {
			continue
		}
		info, err := os.ReadFile(filepath.Join(dir, "fdinfo", fd.Name()))
		if err != nil || !forWriting(string(info)) {
			continue // closed meanwhile, or nothing is written to it
		}
		seen[st.Dev] = true
		r.paths = append(r.paths, path)
	}
	return r, nil
}

// forWriting reads the line "flags:" of fdinfo, octal as for open(2) (proc_pid_fdinfo(5)).
func forWriting(info string) bool {
	_, rest, _ := strings.Cut(info, "flags:")
	line, _, _ := strings.Cut(rest, "\n")
	flags, err := strconv.ParseUint(strings.TrimSpace(line), 8, 64)
	return err == nil && flags&unix.O_ACCMODE != unix.O_RDONLY
}

// least is how much is free on the fullest of them, in bytes.
func (r room) least() (int64, error) {
	least := int64(1) << 62
	for _, p := range r.paths {
		n, err := r.free(p)
		if err != nil {
			return 0, err
		}
		least = min(least, n)
	}
	return least, nil
}

// nextLook is how long nobody can have filled a disk with so many bytes free down to the reserve.
func nextLook(free int64) time.Duration {
	ms := max(0, free-reserve) / (fastest / 1000)
	return min(max(time.Duration(ms)*time.Millisecond, lookOften), lookSeldom)
}

// free is how many bytes an ordinary user can still write on a file's filesystem: f_bavail of
// statvfs(3). What a page cache still has to write is taken off already.
func free(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", path, err)
	}
	return int64(min(st.Bavail, 1<<62/uint64(max(st.Frsize, 1)))) * st.Frsize, nil
}

// The reasons of a pause.
const (
	reasonFull    = vmm.NoRoom
	reasonStopped = "stopped" // by a signal, which was not ours or whose reason has gone
)
