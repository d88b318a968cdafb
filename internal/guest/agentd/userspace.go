package agentd

import (
	"context"
	"encoding/hex"
	"errors"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

// Bounds of watching a boot. A guest that takes longer is not wrong, only unwatched: its stages stay
// unreached.
const (
	userspaceTime = 15 * time.Minute
	sshTime       = 15 * time.Minute
	systemdSocket = "/run/systemd/private" // systemd's own D-Bus socket, there once it takes requests
)

// watchUserspace waits for the distribution's init to finish starting, and remembers how it went.
func (l *live) watchUserspace(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, userspaceTime)
	defer cancel()
	select {
	case <-l.listening: // the stages stay in their order where there is nothing to wait for
	case <-ctx.Done():
		return
	}
	state, failed := "unknown", []string(nil)
	if l.state.OwnInit {
		state = "running" // it has nothing to finish
	}
	if l.state.Systemd {
		if err := waitPath(ctx, systemdSocket); err == nil {
			state, failed = systemdState(ctx)
		}
		if ctx.Err() != nil {
			return
		}
	}
	l.mu.Lock()
	l.userspace, l.failed = state, failed
	l.mu.Unlock()
	l.stages.Reach(system.Now(boot.StageUserspace, strings.TrimSpace(state+" "+strings.Join(failed, " "))))
	debug.FreeOSMemory() // once: what the boot needed
}

// systemdState waits, by systemd's own signal, until it has started, and asks what failed.
func systemdState(ctx context.Context) (state string, failed []string) {
	output, _ := systemctl(ctx, "is-system-running", "--wait") // exits with 1 for "degraded"
	state = strings.TrimSpace(output)
	if state != "running" && state != "degraded" {
		return "unknown", nil
	}
	units, err := systemctl(ctx, "list-units", "--failed", "--plain", "--no-legend", "--full")
	if err != nil {
		return state, nil
	}
	for line := range strings.Lines(units) {
		if fields := strings.Fields(line); len(fields) > 0 {
			failed = append(failed, fields[0])
		}
	}
	return state, failed
}

// waitPath waits until the absolute path p exists, by inotify on the directory that is to hold its
// next missing part.
func waitPath(ctx context.Context, p string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return err
	}
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	stop := context.AfterFunc(ctx, func() { _ = events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buffer := make([]byte, 4096)
	for {
		// Every directory on the way is watched before it is looked into, so nothing is missed.
		for at := 1; ; {
			next := strings.IndexByte(p[at:], '/')
			if next < 0 {
				break
			}
			dir := p[:at+next]
			if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO); errors.Is(err, unix.ENOENT) {
				break
			} else if err != nil {
				return err
			}
			at += next + 1
		}
		if _, err := os.Lstat(p); err == nil {
			return nil
		}
		if _, err := events.Read(buffer); err != nil {
			return err
		}
	}
}

// watchSSH notes when something listens on port 22. The kernel announces no listener, and asking
// costs no connection, which sshd would log and fork for: the table of sockets is read, ever less
// often, until then.
func (l *live) watchSSH(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, sshTime)
	defer cancel()
	for pause := 100 * time.Millisecond; ; pause = min(pause*21/20, 500*time.Millisecond) {
		if listens(22) {
			l.stages.Reach(system.Now(boot.StageSSH, ""))
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// listens says whether a socket listens on a TCP port on all addresses or on loopback.
func listens(port uint16) bool {
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		content, err := os.ReadFile(table)
		if err == nil && tableListens(string(content), port) {
			return true
		}
	}
	return false
}

// tableListens reads a table of proc_pid_net(5): the second field is the local address in hex,
// "address:port", the fourth the state, 0A for listening.
func tableListens(table string, port uint16) bool {
	suffix := ":" + strings.ToUpper(hex.EncodeToString([]byte{byte(port >> 8), byte(port)}))
	return slices.ContainsFunc(strings.Split(table, "\n"), func(line string) bool {
		fields := strings.Fields(line)
		return len(fields) > 3 && fields[3] == "0A" && strings.HasSuffix(fields[1], suffix)
	})
}
