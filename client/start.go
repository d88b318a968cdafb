package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/filelock"
	"git.thaloco.com/thaloco/banger/internal/privatedir"
)

// elsewhere is the way out of a home that cannot be written.
const elsewhere = "BANGER_STATE_DIR names another place: a directory on a local disk that this user may write"

// startTimeout bounds the start of a daemon, the wait for an older one to end included.
const startTimeout = 10 * time.Second

// dial connects to the API socket, starting the daemon if none answers.
func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	conn, err := c.connect(ctx, filepath.Base(c.opts.Socket))
	if err == nil || !absent(err) {
		return conn, err
	}
	if c.opts.Daemon == "" {
		return nil, fault.Wrap(err, fault.Unavailable, "", "the daemon does not run").
			WithHint("any command that needs it starts it, e.g. banger vm list")
	}
	if err := c.start(ctx); err != nil {
		return nil, err
	}
	return c.connect(ctx, filepath.Base(c.opts.Socket))
}

// absent reports whether nobody listens on the socket: it is not there, or it is stale.
func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// connect opens a connection to a socket in the API socket's directory, which must be this user's.
func (c *Client) connect(ctx context.Context, name string) (net.Conn, error) {
	dir, err := privatedir.Open(filepath.Dir(c.opts.Socket))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", dir.Address(name))
	if err != nil && !absent(err) {
		return nil, fault.Wrap(err, fault.Unavailable, filepath.Join(dir.Path(), name), "cannot connect to the daemon's socket")
	}
	return conn, err
}

// Running reports whether a daemon answers on the socket. It starts none.
func (c *Client) Running(ctx context.Context) (bool, error) {
	conn, err := c.connect(ctx, filepath.Base(c.opts.Socket))
	switch {
	case err == nil:
		return true, conn.Close()
	case absent(err):
		return false, nil
	}
	return false, err
}

// start starts the daemon. Of several clients at once, in whatever processes, one starts it and
// the others wait for that one on a lock, and then find it running.
func (c *Client) start(ctx context.Context) error {
	c.starting.Lock()
	defer c.starting.Unlock()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()

	if err := keptHome(c.opts.StateDir); err != nil {
		return err
	}
	// The daemon checks whose it is and closes it to others.
	if err := os.MkdirAll(c.opts.StateDir, 0o700); err != nil {
		return fault.Wrap(err, fault.Permission, c.opts.StateDir, "the state directory cannot be made: %v", err).WithHint("%s", elsewhere)
	}
	lock, err := os.OpenFile(filepath.Join(c.opts.StateDir, "bangerd.start.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fault.Wrap(err, fault.Permission, c.opts.StateDir, "cannot be written: %v", err).WithHint("%s", elsewhere)
	}
	defer lock.Close() // unlocks
	if err := filelock.Wait(ctx, lock, unix.LOCK_EX); err != nil {
		if ctx.Err() == nil {
			return fault.Wrap(err, fault.Internal, lock.Name(), "cannot lock")
		}
		return fault.Wrap(ctx.Err(), fault.CodeOf(ctx.Err()), "", "another banger has been starting the daemon for %v", startTimeout).
			WithHint("its log: %s", c.logPath())
	}
	if running, err := c.Running(ctx); err != nil || running {
		return err
	}
	if c.opts.Starting != nil {
		c.opts.Starting()
	}
	return c.spawn(ctx)
}

// keptHome refuses a root who came by sudo(8) and still has the home of the user who called it, as with sudo -E: what root makes
// there shuts that user out. SUDO_UID is that user.
func keptHome(dir string) error {
	user := os.Getenv("SUDO_UID")
	if os.Geteuid() != 0 || user == "" || user == "0" {
		return nil
	}
	var st unix.Stat_t
	err := unix.Stat(dir, &st)
	for errors.Is(err, unix.ENOENT) && dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		err = unix.Stat(dir, &st)
	}
	if err != nil || strconv.FormatUint(uint64(st.Uid), 10) != user {
		return nil // which who uses it finds out
	}
	return fault.New(fault.Permission, dir, "belongs to the user who called sudo: what root made there would shut that user out").
		WithHint("run banger without sudo, or with root's own home: sudo -H banger ...")
}

func (c *Client) logPath() string { return filepath.Join(c.opts.StateDir, "bangerd.log") }

// spawn runs the daemon in a session of its own and waits for its line on a pipe.
func (c *Client) spawn(ctx context.Context) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fault.Wrap(err, fault.Exhausted, "", "cannot make a pipe")
	}
	defer r.Close()
	cmd := exec.Command(c.opts.Daemon, "--ready-fd", "3")
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{w}
	// A session of its own: neither the terminal's Ctrl-C nor its hang-up reaches the daemon.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, c.opts.Daemon, "cannot start the daemon: %v", err).
			WithHint("bangerd belongs beside banger: install or build both")
	}
	go func() { _ = cmd.Wait() }() // a long-lived client must not keep a zombie of it

	line := make(chan string, 1)
	go func() {
		text, err := bufio.NewReader(io.LimitReader(r, 64<<10)).ReadString('\n')
		if err != nil {
			text = ""
		}
		line <- strings.TrimSpace(text)
	}()
	select {
	case text := <-line:
		return c.readiness(text)
	case <-ctx.Done():
		return fault.Wrap(ctx.Err(), fault.CodeOf(ctx.Err()), c.opts.Daemon, "the daemon was not ready within %v%s", startTimeout, c.logTail()).
			WithHint("its log: %s", c.logPath())
	}
}

func (c *Client) readiness(line string) error {
	if line == "ready" {
		return nil
	}
	var f bangerv1.Fault
	if err := json.Unmarshal([]byte(line), &f); err == nil && f.GetCode() != "" {
		return FromFault(&f)
	}
	return fault.New(fault.Unavailable, c.opts.Daemon, "the daemon died while starting%s", c.logTail()).
		WithHint("its log: %s", c.logPath())
}

// logTail is the end of the daemon's log, as an indented block for an error message.
func (c *Client) logTail() string {
	f, err := os.Open(c.logPath())
	if err != nil {
		return ""
	}
	defer f.Close()
	const window, lines = 16 << 10, 5
	if _, err := f.Seek(-window, io.SeekEnd); err != nil {
		_, _ = f.Seek(0, io.SeekStart)
	}
	b, err := io.ReadAll(io.LimitReader(f, window))
	if err != nil || len(b) == 0 {
		return ""
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	from := max(0, len(all)-lines)
	for i, line := range all {
		// What the Go runtime says first when a program dies; the stacks after it are for the log.
		if strings.HasPrefix(line, "panic: ") || strings.HasPrefix(line, "fatal error: ") {
			from, all = i, all[:min(i+lines, len(all))]
			break
		}
	}
	return "; its log says:\n    " + strings.Join(all[from:], "\n    ")
}

// process is a process watched by pidfd, so that its end is an event and its number cannot be reused.
type process struct{ fd int }

func watchProcess(pid int) (process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return process{-1}, nil
	}
	if err != nil {
		return process{-1}, fault.Wrap(err, fault.Internal, "", "cannot watch process %d", pid)
	}
	return process{fd}, nil
}

func (p process) close() {
	if p.fd >= 0 {
		_ = unix.Close(p.fd)
	}
}

// wait returns when the process is gone or ctx ends.
func (p process) wait(ctx context.Context) error {
	if p.fd < 0 {
		return nil
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return err
	}
	defer unix.Close(wake)
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-woken // it must not write to a descriptor that is closed
		}
	}()
	set := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(set, -1); err == unix.EINTR {
			continue
		} else if err != nil {
			return err
		}
		if set[0].Revents != 0 {
			return nil
		}
		return ctx.Err()
	}
}
