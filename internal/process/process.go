// Package process owns the question "is this still the process that was started?": it starts
// programs that outlive the daemon, finds them again, signals them, and sees them end.
//
// A process is known by a pidfd from the moment it is started or found, so a pid that the kernel
// has given to someone else is never signalled. It knows nothing of VMs, and never restarts anything.
package process

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Command is a program to start. Marker must be one of Args, alone: with it the process is found
// again, also when the daemon died before the pidfile was written.
type Command struct {
	Path    string   // of the program; absolute
	Args    []string // argv, the program's name included
	Dir     string   // working directory
	Env     []string
	Log     string // stdout and stderr are appended here; made with mode 0600
	Pidfile string
	Marker  string
	Files   []*os.File // become descriptors 3, 4, ... of the child
	Cgroup  Cgroup     // nil: the daemon's own
}

// Cgroup begins to make a control group for a process that is about to be started, and returns at once. put is called once, with
// the process that was just started, or with 0 if none was. It returns when the process is in the group, or when that is known not
// to work, which is for it to remember and no reason to end the program.
type Cgroup func(ctx context.Context) (put func(ctx context.Context, pid int))

// record is the pidfile's content. The start time and the boot tell the process apart from a later
// one with the same pid.
type record struct {
	PID    int    `json:"pid"`
	Start  uint64 `json:"start_ticks"` // field 22 of /proc/<pid>/stat, clock ticks since boot (proc_pid_stat(5))
	Boot   string `json:"boot_id"`     // /proc/sys/kernel/random/boot_id (random(4))
	Marker string `json:"marker"`      // for people who look at the file
	// Elsewhere: somebody else started it, as another user (see StartElsewhere).
	Elsewhere bool `json:"elsewhere,omitempty"`
}

// starting in place of a pid is the intent: it is written before the process is started, so that a
// daemon killed in between leaves a reason to look for one.
const starting = 0

// exitTime bounds the wait for what another process has to say of an end, which takes it a moment: it is waiting for that, too.
const exitTime = 5 * time.Second

// Process is a process that was started or found. Safe for concurrent use.
type Process struct {
	pid       int
	start     uint64
	pidfd     *os.File
	raw       syscall.RawConn
	child     *os.Process               // nil if it is not ours to reap
	elsewhere bool                      // it may be another user's
	kept      bool                      // it was started for us, and is watched until it ends
	exit      <-chan syscall.WaitStatus // from who reaps it; nil if nobody tells

	done chan struct{}

	mu     sync.Mutex
	status *syscall.WaitStatus // set before done is closed, if it was ours to reap
	signal func(sig int) error // sends what this user may not
}

// Start runs c in a session of its own, without a terminal, with umask 077, with no descriptors but
// those named and with PR_SET_NO_NEW_PRIVS, and writes its pidfile. It is tied neither to ctx nor to the daemon's life. An
// error means that nothing runs and no pidfile is left. fs.ErrNotExist and fs.ErrPermission come
// from the program's own path.
func Start(ctx context.Context, c Command) (*Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(c.Log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()

	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	r := record{PID: starting, Boot: boot, Marker: c.Marker}
	if err := writePidfile(c.Pidfile, r); err != nil {
		return nil, errors.Join(err, Forget(c.Pidfile))
	}
	pid := 0 // of what runs when this returns
	if c.Cgroup != nil {
		put := c.Cgroup(ctx)
		defer func() { put(ctx, pid) }()
	}
	p, err := fork(c, append([]*os.File{null, log, log}, c.Files...))
	if err != nil {
		return nil, errors.Join(err, Forget(c.Pidfile))
	}
	r.PID, r.Start = p.pid, p.start
	if err := writePidfile(c.Pidfile, r); err != nil {
		kill, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		return nil, errors.Join(err, p.Kill(kill), Forget(c.Pidfile))
	}
	pid = p.pid
	return p, nil
}

// fork starts the program from a thread that shares its umask with no other, and that is thrown
// away afterwards: the umask of a process is one for all its threads until unshare(2) with CLONE_FS.
// PR_SET_NO_NEW_PRIVS is a thread's own, is inherited, and cannot be taken back (prctl(2)).
func fork(c Command, files []*os.File) (*Process, error) {
	type result struct {
		p   *Process
		err error
	}
	got := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		p, err := func() (*Process, error) {
			switch err := unix.Unshare(unix.CLONE_FS); err {
			case nil:
				unix.Umask(0o077)
			case unix.EPERM:
				// A container's system call filter. The child gets the daemon's umask, which is
				// 077 as well; that it is set here is a second line of defence.
			default:
				return nil, fmt.Errorf("unshare the umask: %w", err)
			}
			if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
				return nil, fmt.Errorf("set no_new_privs: %w", err)
			}
			// Our own descriptors are close-on-exec; those that the daemon inherited may not be.
			if err := unix.CloseRange(3, 1<<31-1, unix.CLOSE_RANGE_CLOEXEC); err != nil && err != unix.ENOSYS && err != unix.EINVAL { // Linux 5.11 has it
				return nil, fmt.Errorf("close_range: %w", err)
			}
			pidfd := -1
			child, err := os.StartProcess(c.Path, c.Args, &os.ProcAttr{
				Dir: c.Dir, Env: c.Env, Files: files,
				Sys: &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd},
			})
			if err != nil {
				return nil, err
			}
			if pidfd < 0 {
				err := errors.New("the kernel gave no pidfd (Linux 5.4 has them)")
				_, wait := child.Wait()
				return nil, errors.Join(err, child.Kill(), wait)
			}
			return watch(child.Pid, pidfd, child)
		}()
		got <- result{p, err}
	}()
	r := <-got
	return r.p, r.err
}

// watch makes a Process of a pidfd, which it owns from then on, and begins to wait for its end. The
// wait is in the runtime's epoll: it costs no thread.
func watch(pid, pidfd int, child *os.Process) (*Process, error) {
	return begin(&Process{pid: pid, child: child}, pidfd)
}

// begin is watch for a Process that says how it came about.
func begin(p *Process, pidfd int) (*Process, error) {
	pid, child := p.pid, p.child
	if err := unix.SetNonblock(pidfd, true); err != nil {
		_ = unix.Close(pidfd)
		return nil, err
	}
	p.pidfd, p.done = os.NewFile(uintptr(pidfd), "pidfd "+strconv.Itoa(pid)), make(chan struct{})
	var err error
	if p.raw, err = p.pidfd.SyscallConn(); err == nil && p.start == 0 {
		p.start, err = StartTime(pid)
	}
	if err != nil && child == nil {
		_ = p.pidfd.Close()
		return nil, err
	}
	if err != nil {
		_ = p.pidfd.Close()
		kill := child.Kill()
		_, wait := child.Wait()
		return nil, errors.Join(err, kill, wait)
	}
	go p.wait()
	return p, nil
}

// wait closes done when the process has ended, and reaps it if it is our child. A child is reaped
// even after Close, else it would stay behind as a zombie; what was adopted is let go.
func (p *Process) wait() {
	err := p.raw.Read(func(fd uintptr) bool { return exited(int(fd)) })
	if err != nil {
		return // closed
	}
	if p.child != nil {
		if state, err := p.child.Wait(); err == nil {
			if ws, ok := state.Sys().(syscall.WaitStatus); ok {
				p.mu.Lock()
				p.status = &ws
				p.mu.Unlock()
			}
		}
	}
	if p.exit != nil {
		select {
		case ws, ok := <-p.exit:
			if ok {
				p.mu.Lock()
				p.status = &ws
				p.mu.Unlock()
			}
		case <-time.After(exitTime):
		}
	}
	close(p.done)
	_ = p.pidfd.Close()
}

// exited tells whether the pidfd's process has ended; it may still be a zombie.
func exited(pidfd int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1 && fds[0].Revents&unix.POLLIN != 0
}

// PID of the process. Only for people: use Signal.
func (p *Process) PID() int { return p.pid }

// Done is closed when the process has ended and, if it is our child, has been reaped. It stays open
// after Close of an adopted process.
func (p *Process) Done() <-chan struct{} { return p.done }

// Carries tells whether one of the program's arguments is this one: what a marker does not say, such as
// which program it is. False once it is gone.
func (p *Process) Carries(arg string) bool { return carries(p.pid, arg, p.elsewhere) && !p.over() }

// over tells whether the process has ended: what /proc says of its pid may be another's then.
func (p *Process) over() bool {
	over := true
	if p.raw.Control(func(fd uintptr) { over = exited(int(fd)) }) != nil {
		return true
	}
	return over
}

// Stopped tells whether job control holds the process (SIGSTOP), by the third field of
// /proc/<pid>/stat (proc_pid_stat(5)). False once it is gone.
func (p *Process) Stopped() bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.pid), "stat"))
	if err != nil || p.over() {
		return false
	}
	return bytes.HasPrefix(b[bytes.LastIndexByte(b, ')')+1:], []byte(" T"))
}

// Status is how it ended. ok is false before Done, and for a process that was not our child: its
// status belongs to whoever reaped it.
func (p *Process) Status() (status syscall.WaitStatus, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status == nil {
		return 0, false
	}
	return *p.status, true
}

// Signal sends one signal. fault.Precondition if the process is gone, fault.Invalid for a number
// that is no signal.
func (p *Process) Signal(sig int) error {
	gone := func() error { return fault.New(fault.Precondition, "", "process %d is gone", p.pid) }
	select {
	case <-p.done:
		return gone()
	default:
	}
	var errno error
	err := p.raw.Control(func(fd uintptr) {
		if exited(int(fd)) { // a zombie takes signals and says nothing
			errno = unix.ESRCH
			return
		}
		errno = unix.PidfdSendSignal(int(fd), unix.Signal(sig), nil, 0)
	})
	switch {
	case err != nil && !errors.Is(err, os.ErrClosed):
		return fault.Wrap(err, fault.Internal, "", "signal %d to process %d", sig, p.pid)
	case err != nil:
		select {
		case <-p.done:
			return gone()
		default:
			return fault.Wrap(err, fault.Internal, "", "signal %d to process %d after Close", sig, p.pid)
		}
	case errno == unix.ESRCH:
		return gone()
	case errno == unix.EINVAL:
		return fault.New(fault.Invalid, "", "there is no signal %d", sig)
	case errno == unix.EPERM:
		p.mu.Lock()
		other := p.signal
		p.mu.Unlock()
		if other == nil {
			return fault.Wrap(errno, fault.Permission, "", "signal %d to process %d", sig, p.pid)
		}
		if err := other(sig); err != nil {
			if fault.Is(err, fault.NotFound) {
				return gone() // it ended on the way
			}
			return err
		}
		return nil
	case errno != nil:
		return fault.Wrap(errno, fault.Internal, "", "signal %d to process %d", sig, p.pid)
	}
	return nil
}

// Kill sends SIGKILL and waits until the process is gone. Fine if it is gone already. fault.Timeout
// if ctx ends first: a process in an uninterruptible read of a dead disk does not die.
func (p *Process) Kill(ctx context.Context) error {
	if err := p.Signal(int(unix.SIGKILL)); err != nil && !fault.Is(err, fault.Precondition) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fault.Wrap(ctx.Err(), fault.CodeOf(ctx.Err()), "", "process %d did not end on SIGKILL", p.pid)
	}
}

// Close stops watching and leaves the process running. Fine to call twice.
func (p *Process) Close() error {
	if p.child != nil || p.kept {
		return nil // its reaper goes on
	}
	if err := p.pidfd.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// writePidfile needs no fsync: a host that loses it has lost the process, too.
func writePidfile(path string, r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// Forget removes a pidfile and what an interrupted write of it left. Fine if there is none.
func Forget(pidfile string) error {
	var errs []error
	for _, path := range []string{pidfile, pidfile + ".tmp"} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Find returns the running process that Start recorded in the pidfile. If the pidfile names none, it
// looks once through /proc for a process of this user whose command line carries the marker, so a
// lost pidfile loses no process. In that case the pidfile is written. fault.NotFound if none runs.
func Find(ctx context.Context, pidfile, marker string) (*Process, error) {
	p, err := Open(ctx, pidfile, marker)
	if !fault.Is(err, fault.NotFound) {
		return p, err
	}
	return recoverLost(ctx, pidfile, marker)
}

// Open is Find for those who know that the pidfile was not lost: it looks through /proc only if the
// pidfile says that a start was under way when its daemon was killed, or cannot be read. Its cost
// does not grow with the number of processes.
func Open(ctx context.Context, pidfile, marker string) (*Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	r, err := readPidfile(pidfile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.Wrap(err, fault.NotFound, marker, "nothing was started")
	case err != nil, r.PID == starting && r.Boot == boot:
		return recoverLost(ctx, pidfile, marker)
	case r.Boot != boot:
		return nil, fault.New(fault.NotFound, marker, "it was started before the host's last boot")
	}
	return open(r.PID, marker, r.Start, r.Elsewhere)
}

// recoverLost finds a process without its pidfile, and writes that.
func recoverLost(ctx context.Context, pidfile, marker string) (*Process, error) {
	p, err := scan(ctx, marker)
	if err != nil {
		return nil, err
	}
	if err := p.note(pidfile, marker); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// note writes the pidfile of a process that was found.
func (p *Process) note(pidfile, marker string) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	return writePidfile(pidfile, record{PID: p.pid, Start: p.start, Boot: boot, Marker: marker, Elsewhere: p.elsewhere})
}

func readPidfile(path string) (r record, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	if r.PID < 0 || r.PID != starting && r.Start == 0 {
		return r, fmt.Errorf("%s names no process", path)
	}
	return r, nil
}

// scan looks for the marker in the command lines of this user's processes.
func scan(ctx context.Context, marker string) (*Process, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == os.Getpid() {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if !carries(pid, marker, false) {
			continue // the cheap look, before a descriptor is made
		}
		p, err := open(pid, marker, 0, false)
		if fault.Is(err, fault.NotFound) {
			continue
		}
		return p, err
	}
	return nil, fault.New(fault.NotFound, marker, "no process of this user carries that marker")
}

// EndAll ends, with SIGKILL, every process of this user that works in a directory below under and
// carries an argument that begins with prefix and that wanted accepts, and waits until they are
// gone. It returns those arguments. It is for what nobody keeps a record of: the working directory is
// what is left of where it was started, also when that has been removed (proc_pid_cwd(5)).
func EndAll(ctx context.Context, prefix, under string, wanted func(marker string) bool) (ended []string, err error) {
	if resolved, err := filepath.EvalSymlinks(under); err == nil {
		under = resolved // as the kernel names it
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if err := ctx.Err(); err != nil {
			return ended, err
		}
		marker, ok := argument(pid, false, func(arg string) bool { return strings.HasPrefix(arg, prefix) && wanted(arg) })
		if !ok {
			continue
		}
		cwd, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
		if err != nil || !strings.HasPrefix(cwd, under+"/") {
			continue
		}
		p, err := open(pid, marker, 0, false)
		if fault.Is(err, fault.NotFound) {
			continue // it ended meanwhile
		}
		if err != nil {
			return ended, err
		}
		if err := errors.Join(p.Kill(ctx), p.Close()); err != nil {
			return ended, err
		}
		ended = append(ended, marker)
	}
	return ended, nil
}

// open makes a Process of a pid if it belongs to this user, or may be elsewhere, carries the marker, and started at that
// time (0: at any). The pidfd is made first: if its process still runs after the looks at /proc, it
// was the one that was looked at.
func open(pid int, marker string, start uint64, elsewhere bool) (*Process, error) {
	notFound := func() error { return fault.New(fault.NotFound, marker, "process %d is not it", pid) }
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) { // EINVAL: a thread's id
		return nil, notFound()
	}
	if err != nil {
		return nil, fmt.Errorf("pidfd_open %d: %w", pid, err)
	}
	ticks, err := StartTime(pid)
	if err != nil || (start != 0 && ticks != start) || !carries(pid, marker, elsewhere) || exited(pidfd) {
		_ = unix.Close(pidfd)
		return nil, notFound()
	}
	p, err := begin(&Process{pid: pid, elsewhere: elsewhere}, pidfd)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil, notFound()
	}
	return p, err
}

// carries tells whether a process of this user, or of anybody, has the marker as one of its arguments.
func carries(pid int, marker string, anybody bool) bool {
	_, ok := argument(pid, anybody, func(arg string) bool { return arg == marker })
	return ok
}

// argument is the first one that is wanted of a process of this user, or of anybody.
func argument(pid int, anybody bool, wanted func(string) bool) (string, bool) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil || !anybody && int(st.Uid) != os.Geteuid() {
		return "", false
	}
	cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return "", false
	}
	for arg := range bytes.SplitSeq(cmdline, []byte{0}) {
		if wanted(string(arg)) {
			return string(arg), true
		}
	}
	return "", false
}

// StartTime is when a process started, in clock ticks since the boot: with its pid it tells it from all others of this boot. It
// reads field 22 of /proc/<pid>/stat. The second field is the program's name in
// parentheses and may hold anything, so fields are counted from the last parenthesis.
func StartTime(pid int) (uint64, error) {
	path := filepath.Join("/proc", strconv.Itoa(pid), "stat")
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("%s: has %d fields after the name", path, len(fields))
	}
	return strconv.ParseUint(fields[19], 10, 64) // field 3 is the first one here
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// ByHand tells signals that someone sends to end a program from those of one that went wrong.
func ByHand(sig syscall.Signal) bool {
	return sig == syscall.SIGKILL || sig == syscall.SIGTERM || sig == syscall.SIGINT || sig == syscall.SIGHUP
}
