package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// firstPassed is the first descriptor that systemd passes (SD_LISTEN_FDS_START, sd_listen_fds(3)).
const firstPassed = 3

// passedSockets takes in the sockets on which systemd listens for this daemon, by path; none if systemd passed none. The
// variables that name them are not for children, and are dropped.
func passedSockets() (map[string]*net.UnixListener, error) {
	pid, count := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		if err := os.Unsetenv(name); err != nil {
			return nil, err
		}
	}
	if pid != strconv.Itoa(os.Getpid()) { // of a parent's, or none
		return nil, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > 16 {
		return nil, fault.New(fault.Invalid, "LISTEN_FDS", "%q is no number of sockets", count)
	}
	out := map[string]*net.UnixListener{}
	var errs []error
	for fd := firstPassed; fd < firstPassed+n; fd++ {
		unix.CloseOnExec(fd)
		file := os.NewFile(uintptr(fd), "passed")
		l, err := net.FileListener(file) // has a descriptor of its own
		errs = append(errs, file.Close())
		if err != nil {
			errs = append(errs, fmt.Errorf("descriptor %d, which systemd passed: %w", fd, err))
			continue
		}
		u, ok := l.(*net.UnixListener)
		if !ok {
			errs = append(errs, fmt.Errorf("descriptor %d, which systemd passed, is no unix socket", fd), l.Close())
			continue
		}
		u.SetUnlinkOnClose(false) // it is systemd's
		out[u.Addr().String()] = u
	}
	if err := errors.Join(errs...); err != nil {
		for _, l := range out {
			_ = l.Close()
		}
		return nil, fault.Wrap(err, fault.Invalid, "bangerd.socket", "what systemd passed cannot be used").WithHint("banger daemon install writes the unit anew")
	}
	return out, nil
}

// notify tells the service manager a state (sd_notify(3)). Without one nobody listens; one that does not is not waited for.
func notify(state string) error {
	address := os.Getenv("NOTIFY_SOCKET")
	if address == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: address, Net: "unixgram"}) // "@" is net's for abstract ones, too
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	_, err = conn.Write([]byte(state))
	return err
}
