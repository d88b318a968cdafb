package system

import (
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// What banger's own init takes as process 1, as busybox's does, whose poweroff and reboot then work.
const (
	SignalPowerOff = unix.SIGUSR2
	SignalReboot   = unix.SIGTERM
	SignalHalt     = unix.SIGUSR1 // a VM has nothing to halt for: it powers off
)

// termTime is what processes have to end by themselves.
const termTime = 10 * time.Second

// Stop ends every process but init and this program's own, leaves clean disks and ends the machine, by a reset
// or by power-off. It returns only if the kernel refuses.
func Stop(reboot bool) {
	others := otherProcesses()
	for _, pid := range others {
		_ = unix.Kill(pid, unix.SIGTERM) // gone already: what was wanted
	}
	WaitGone(others, termTime)
	for _, pid := range otherProcesses() {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	WaitGone(otherProcesses(), time.Second)
	if err := UnmountDisks(); err != nil {
		Say("banger: shutdown: " + err.Error() + "\n") // the last place left
	}
	if err := Off(reboot); err != nil {
		Say("banger: shutdown: " + err.Error() + "\n")
	}
}

// otherProcesses are all but init, this process and its supervisor, and the kernel's threads, which
// have no executable.
func otherProcesses() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 || pid == os.Getpid() || pid == os.Getppid() {
			continue
		}
		if _, err := os.Readlink("/proc/" + e.Name() + "/exe"); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// WaitGone waits until the processes have ended, for at most the given time in all (pidfd_open(2)).
func WaitGone(pids []int, most time.Duration) {
	deadline := time.Now().Add(most)
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // gone
		}
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			left := max(0, time.Until(deadline))
			if _, err := unix.Poll(fds, int(left.Milliseconds())); err != unix.EINTR {
				break
			}
		}
		_ = unix.Close(fd)
	}
}
