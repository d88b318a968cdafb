package agentd

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/exec"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

// loginPath is where programs are looked for if nothing says otherwise: what Debian's login gives
// root (ENV_SUPATH in login.defs(5)).
const loginPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// account is who a command runs as.
type account struct {
	uid, gid uint32
	groups   []uint32
	name     string
	home     string
}

// lookup finds "name", "uid", "name:group" or "uid:gid"; empty is whoever the agent is, which is root
// in a guest. As with docker exec a number needs no entry; its group is then 0.
func lookup(who string) (account, error) {
	name, group, grouped := strings.Cut(who, ":")
	if name == "" {
		name = strconv.Itoa(os.Getuid())
	}
	u, err := user.Lookup(name)
	if err != nil {
		u, err = user.LookupId(name)
	}
	var a account
	number, notNumber := strconv.ParseUint(name, 10, 32)
	switch {
	case err == nil:
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return a, err
		}
		a = account{uid: uint32(uid), gid: uint32(gid), name: u.Username, home: u.HomeDir}
		ids, err := u.GroupIds()
		if err != nil {
			return a, fmt.Errorf("the groups of %s: %w", name, err)
		}
		for _, id := range ids {
			if n, err := strconv.ParseUint(id, 10, 32); err == nil {
				a.groups = append(a.groups, uint32(n))
			}
		}
	case notNumber == nil:
		a = account{uid: uint32(number), name: name, home: "/"}
	default:
		return a, fmt.Errorf("there is no user %q", name)
	}
	if grouped {
		id := group
		if g, err := user.LookupGroup(group); err == nil {
			id = g.Gid
		}
		gid, err := strconv.ParseUint(id, 10, 32)
		if err != nil {
			return a, fmt.Errorf("there is no group %q", group)
		}
		a.gid, a.groups = uint32(gid), []uint32{uint32(gid)}
	}
	return a, nil
}

// environment is that of a log-in: /etc/environment, which pam_env(8) reads for ssh, then what was asked.
func (a account) environment(asked []string) []string {
	env := []string{"PATH=" + loginPath, "HOME=" + a.home, "USER=" + a.name, "LOGNAME=" + a.name}
	system, err := os.ReadFile("/etc/environment")
	if err == nil {
		env = append(env, parseEnvironment(string(system))...)
	}
	env = append(env, asked...)
	// The last one counts; execve(2) would pass both on.
	seen := map[string]bool{}
	var out []string
	for _, e := range slices.Backward(env) {
		if key, _, _ := strings.Cut(e, "="); !seen[key] {
			seen[key] = true
			out = append(out, e)
		}
	}
	slices.Reverse(out)
	return out
}

// parseEnvironment reads KEY=VALUE lines in the form of pam_env(8): "export" and quotes around a value
// are taken off, the rest is skipped.
func parseEnvironment(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		line = strings.TrimPrefix(strings.TrimSpace(line), "export ")
		key, value, ok := strings.Cut(line, "=")
		if !ok || key == "" || strings.ContainsAny(key, "# \t") || strings.ContainsRune(line, 0) {
			continue
		}
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		out = append(out, key+"="+value)
	}
	return out
}

// find is execvp(3)'s search, in the command's own PATH and working directory.
func find(program, dir string, env []string) (string, error) {
	path := ""
	for _, e := range env {
		if value, ok := strings.CutPrefix(e, "PATH="); ok {
			path = value
		}
	}
	candidates := []string{program}
	if !strings.Contains(program, "/") {
		candidates = candidates[:0]
		for _, d := range filepath.SplitList(path) {
			candidates = append(candidates, filepath.Join(d, program))
		}
	}
	err := fs.ErrNotExist
	for _, c := range candidates {
		if !filepath.IsAbs(c) {
			c = filepath.Join(dir, c)
		}
		st, statErr := os.Stat(c)
		switch {
		case statErr != nil && !errors.Is(statErr, fs.ErrNotExist) && !errors.Is(statErr, unix.ENOTDIR):
			err = fs.ErrPermission
		case statErr != nil:
		case st.IsDir() || st.Mode()&0o111 == 0:
			err = fs.ErrPermission
		default:
			return c, nil
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%s: not found in the guest: %w", program, err)
	}
	return "", fmt.Errorf("%s: is no program that can be run: %w", program, err)
}

// StartProcess is a Guest's Exec: it runs the command on this machine, in a session of its own.
func StartProcess(r exec.Request) (*Process, error) {
	who, err := lookup(r.User)
	if err != nil {
		return nil, err
	}
	dir := who.home
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		dir = "/"
	}
	if r.Dir != "" {
		if dir = filepath.Join(dir, r.Dir); filepath.IsAbs(r.Dir) {
			dir = r.Dir
		}
		if st, err := os.Stat(dir); err != nil || !st.IsDir() {
			return nil, fmt.Errorf("%s is no directory of the guest", dir) // 126: the program may well be there
		}
	}
	env := who.environment(r.Env)
	program, err := find(r.Args[0], dir, env)
	if err != nil {
		return nil, err
	}
	std, err := openStd(r, who)
	if err != nil {
		return nil, err
	}
	defer std.closeChild()
	attr := &os.ProcAttr{Dir: dir, Env: env, Files: std.child, Sys: &syscall.SysProcAttr{Setsid: true, Setctty: r.TTY}}
	if int(who.uid) != os.Getuid() || int(who.gid) != os.Getgid() || r.User != "" {
		attr.Sys.Credential = &syscall.Credential{Uid: who.uid, Gid: who.gid, Groups: who.groups}
	}
	var child *os.Process
	err = asOthers(func() (err error) {
		child, err = os.StartProcess(program, r.Args, attr)
		return err
	})
	if err != nil {
		std.close()
		if errors.Is(err, fs.ErrNotExist) { // a script's interpreter, or the loader
			return nil, fmt.Errorf("%s: what it is to be run with is not in the guest: %w", r.Args[0], err)
		}
		return nil, fmt.Errorf("%s cannot be run as %s in %s: %w", r.Args[0], who.name, dir, err)
	}
	return std.process(child), nil
}

// std is a command's standard files: the child's ends, and ours.
type std struct {
	child          []*os.File
	stdin          *os.File
	stdout, stderr *ending
	terminal       *os.File // nil without
}

func openStd(r exec.Request, who account) (*std, error) {
	s := &std{}
	if r.TTY {
		master, slave, err := openTerminal(exec.Size{Rows: r.Rows, Cols: r.Cols}, who.uid)
		if err != nil {
			return nil, fmt.Errorf("no terminal can be had in the guest: %w", err)
		}
		s.terminal, s.stdin, s.stdout = master, master, &ending{f: master}
		s.child = []*os.File{slave, slave, slave}
		return s, nil
	}
	for i := range 3 {
		r, w, err := os.Pipe()
		if err != nil {
			s.closeChild()
			s.close()
			return nil, err
		}
		switch i {
		case 0:
			s.child, s.stdin = append(s.child, r), w
		case 1:
			s.child, s.stdout = append(s.child, w), &ending{f: r}
		case 2:
			s.child, s.stderr = append(s.child, w), &ending{f: r}
		}
	}
	return s, nil
}

func (s *std) closeChild() {
	for _, f := range s.child {
		_ = f.Close() // a terminal is there three times
	}
}

func (s *std) close() {
	for _, f := range []*ending{s.stdout, s.stderr} {
		if f != nil {
			_ = f.f.Close()
		}
	}
	if s.stdin != nil {
		_ = s.stdin.Close() // the command has closed its end: it was told already
	}
}

// process watches a child that was started with these files.
func (s *std) process(child *os.Process) *Process {
	p := &Process{Stdin: s.stdin, Stdout: s.stdout, Close: s.close}
	if s.terminal != nil {
		p.Stdin = &terminalInput{f: s.terminal}
		p.Resize = func(size exec.Size) error { return setSize(s.terminal, size) }
	} else {
		p.Stderr = s.stderr
	}
	ended := make(chan struct{})
	var status exec.Status
	go func() {
		defer close(ended)
		state, err := child.Wait()
		switch wait, ok := state.Sys().(syscall.WaitStatus); {
		case err != nil || !ok:
			status = exec.Status{Failed: fmt.Sprintf("the command was lost: %v", err), Code: exec.CodeCannotRun}
		case wait.Signaled():
			status.Signal = int(wait.Signal())
		default:
			status.Code = wait.ExitStatus()
		}
		s.stdout.end()
		if s.stderr != nil {
			s.stderr.end()
		}
	}()
	p.Wait = func() exec.Status {
		<-ended
		return status
	}
	p.Signal = func(number int) error {
		select {
		case <-ended:
			return os.ErrProcessDone // the number may be another's by now
		default:
		}
		group := child.Pid
		if s.terminal != nil {
			_ = onFile(s.terminal, func(fd int) error {
				foreground, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
				if err == nil && foreground > 0 {
					group = foreground
				}
				return err
			})
		}
		return unix.Kill(-group, unix.Signal(number))
	}
	p.HangUp = func() { hangUp(child.Pid) }
	return p
}

// hangUp ends a session: SIGHUP for everyone in it, SIGKILL for those that do not go. What made a
// session of its own (a daemon) is not of this one.
func hangUp(session int) {
	members := sessionMembers(session)
	for _, pid := range members {
		_ = unix.Kill(pid, unix.SIGHUP)
		_ = unix.Kill(pid, unix.SIGCONT) // one that is stopped would not notice
	}
	system.WaitGone(members, hangUpTime)
	for _, pid := range sessionMembers(session) {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// sessionMembers lists the processes of a session (proc_pid_stat(5), the sixth field).
func sessionMembers(session int) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return []int{session}
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		// The second field is the name in brackets, which may hold anything.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) > 3 && fields[3] == strconv.Itoa(session) && fields[0] != "Z" {
			pids = append(pids, pid)
		}
	}
	return pids
}

// ending reads a pipe or a terminal until its other end is closed, or, after end, until nothing is
// in it: a program that was left behind may hold the other end for ever.
type ending struct {
	f    *os.File
	once sync.Once
	over bool // of the one reader
}

func (e *ending) end() { e.once.Do(func() { _ = e.f.SetReadDeadline(time.Unix(1, 0)) }) }

func (e *ending) Read(b []byte) (int, error) {
	if !e.over {
		n, err := e.f.Read(b)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			e.over = true
			if err := e.f.SetReadDeadline(time.Time{}); err != nil {
				return 0, err
			}
		case errors.Is(err, unix.EIO): // a terminal that nobody has open any more (pty(7))
			return n, io.EOF
		default:
			return n, err
		}
	}
	raw, err := e.f.SyscallConn()
	if err != nil {
		return 0, err
	}
	n := 0
	readErr := raw.Read(func(fd uintptr) bool {
		n, err = unix.Read(int(fd), b)
		return true // the file is non-blocking
	})
	if readErr != nil || err != nil || n <= 0 {
		return 0, io.EOF
	}
	return n, nil
}

// terminalInput is a terminal's master as what the command reads. Its end is the key that says so:
// the master itself is also the output.
type terminalInput struct {
	f    *os.File
	once sync.Once
}

func (t *terminalInput) Write(b []byte) (int, error) { return t.f.Write(b) }

func (t *terminalInput) Close() error {
	t.once.Do(func() {
		_ = t.f.SetWriteDeadline(time.Now().Add(time.Second)) // nobody may be reading
		_, _ = t.f.Write([]byte{4})                           // VEOF of a terminal as it is opened (termios(3))
	})
	return nil
}

// openTerminal makes a terminal (pts(4)) that belongs to uid.
func openTerminal(size exec.Size, uid uint32) (master, slave *os.File, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			_ = master.Close()
		}
	}()
	var number int
	if err := onFile(master, func(fd int) error {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return err
		}
		number, err = unix.IoctlGetInt(fd, unix.TIOCGPTN)
		return err
	}); err != nil {
		return nil, nil, err
	}
	name := "/dev/pts/" + strconv.Itoa(number)
	if err := os.Chown(name, int(uid), -1); err != nil && int(uid) != os.Getuid() {
		return nil, nil, err
	}
	if size.Rows > 0 && size.Cols > 0 {
		if err := setSize(master, size); err != nil {
			return nil, nil, err
		}
	}
	slave, err = os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	return master, slave, err
}

func setSize(master *os.File, size exec.Size) error {
	return onFile(master, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: size.Rows, Col: size.Cols})
	})
}

// onFile lends a file's descriptor. Fd would make the file blocking.
func onFile(f *os.File, use func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var used error
	if err := raw.Control(func(fd uintptr) { used = use(int(fd)) }); err != nil {
		return err
	}
	return used
}
