package agentd

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

// Bounds of a stop without systemd.
const (
	replyTime = 200 * time.Millisecond // for the answer to leave before everything ends
	termTime  = 10 * time.Second       // for processes to end by themselves
)

// stopRunit tells runit to end: `init 0` or `init 6` (runit-init(8)).
func stopRunit(ctx context.Context, init string, reboot bool) error {
	level := "0"
	if reboot {
		level = "6"
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, init, level).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", init, level, err, strings.TrimSpace(string(out)))
	}
	// runit forgets the signal that it gets while it boots (stage 1), though not what it stands for: it is given again
	// until the services have gone, and this program with them.
	go func() {
		for range time.Tick(time.Second) {
			_ = unix.Kill(1, unix.SIGCONT)
		}
	}()
	return nil
}

// stopWithoutSystemd ends every process but init and this program's own, leaves clean disks and ends
// the machine.
func stopWithoutSystemd(reboot bool) {
	time.Sleep(replyTime) // the host reads the answer of the call that brought us here
	others := otherProcesses()
	for _, pid := range others {
		_ = unix.Kill(pid, unix.SIGTERM) // gone already: what was wanted
	}
	waitGone(others, termTime)
	for _, pid := range otherProcesses() {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	waitGone(otherProcesses(), time.Second)
	if err := system.UnmountDisks(); err != nil {
		system.Say("banger: shutdown: " + err.Error() + "\n") // the last place left
	}
	_ = system.Off(reboot)
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

// waitGone waits until the processes have ended, for at most the given time in all (pidfd_open(2)).
func waitGone(pids []int, most time.Duration) {
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
