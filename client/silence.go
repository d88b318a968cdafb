package client

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/api/banger/v1/bangerv1connect"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

const (
	// quietTime is how long a call may go without its answer before the daemon is asked whether it is there at all.
	quietTime = 5 * time.Second
	// aliveTime bounds the answer to that, which takes a daemon no work. It is longer than a daemon may take to start.
	aliveTime = 15 * time.Second
)

// listen looks after a call while it is under way: the call may take as long as it wants to as long as the daemon answers others,
// and ends with a fault that says what is the matter with the daemon, the cause of the context, if it does not. stop ends the
// watch.
func (c *Client) listen(ctx context.Context) (bounded context.Context, stop func()) {
	bounded, cancel := context.WithCancelCause(ctx)
	go func() {
		for {
			select {
			case <-time.After(c.quiet):
			case <-bounded.Done():
				return
			}
			if err := c.alive(bounded); err != nil {
				cancel(err)
				return
			}
		}
	}()
	return bounded, func() { cancel(nil) }
}

// alive asks the daemon for its status over a connection of its own. fault.Unavailable if it takes the connection and does not
// answer; nil in any other case, whose errors are the watched call's to find.
func (c *Client) alive(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, c.most)
	defer cancel()
	conn, err := c.connect(ctx, filepath.Base(c.opts.Socket))
	if err != nil {
		return nil
	}
	defer conn.Close()
	pid := listener(conn) // the transport closes the connection
	transport := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }, DisableKeepAlives: true}
	_, err = bangerv1connect.NewDaemonServiceClient(&http.Client{Transport: transport}, url).GetStatus(ctx, &bangerv1.GetStatusRequest{})
	if connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		return nil
	}
	const ended = "VMs keep running, and the next command starts another"
	f := fault.New(fault.Unavailable, "", "the daemon takes connections and does not answer, not even within %v", c.most).
		WithHint("banger daemon logs tells what it did last; when its process is ended, %s", ended)
	switch program, state := look(pid); {
	case program == "", program == "systemd": // which made the socket, where it starts the daemon
	case state == "T":
		f = fault.New(fault.Unavailable, "", "the daemon does not answer: its process %d is stopped", pid).
			WithHint("kill -CONT %d lets it go on; after kill -KILL %[1]d %s", pid, ended)
	default:
		f = f.WithHint("banger daemon logs tells what it did last; after kill -KILL %d %s", pid, ended)
	}
	return f
}

// listener is the process that made the socket behind a connection, 0 if it is not known.
func listener(conn net.Conn) (pid int) {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) { // its error is a closed connection's
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil { // unix(7): who called listen(2)
			pid = int(cred.Pid)
		}
	})
	return pid
}

// look reads a process's name and the letter of its state (proc_pid_stat(5)). Both are "" if there is none.
func look(pid int) (program, state string) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", ""
	}
	_, rest, _ := strings.Cut(string(stat), "(")
	end := strings.LastIndexByte(rest, ')') // of a name that may have some itself
	if end < 0 || len(rest) < end+3 {
		return "", ""
	}
	return rest[:end], rest[end+2 : end+3]
}
