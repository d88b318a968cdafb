package firecracker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/console"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// machine is a Firecracker process. Its goroutine, watch, sees its end, and pauses it before the host's
// disk is full. It asks its API nothing: whatever it tells is read of the process.
type machine struct {
	spec    vmm.Spec
	process *process.Process
	room    room
	logged  int64 // size of the log at its start, 0 if that is not known

	up       *rundir.First         // nil: nothing is awaited
	unjail   func(context.Context) // nil without a jail
	lifeless time.Time             // since when it has no guest, for watch alone

	closed  chan struct{} // Close was called
	poke    chan struct{} // the state may have changed; room for one
	done    chan struct{}
	changes chan vmm.Change

	mu       sync.Mutex
	reported vmm.State
	killed   bool // by us
	hung     bool // it was ended because its guest had, and it had not
	exit     vmm.Exit
	over     bool // closed was closed
}

var (
	_ vmm.Machine  = (*machine)(nil)
	_ vmm.Reporter = (*machine)(nil)
	_ vmm.Resizer  = (*machine)(nil)
	_ vmm.Jailed   = (*machine)(nil)
)

// watchOver makes a machine of a process whose guest runs, or is stopped. up is nil for one that is adopted.
func (d *Driver) watchOver(spec vmm.Spec, p *process.Process, logged int64, up *rundir.First) *machine {
	m := &machine{
		spec: spec, process: p, logged: logged, up: up, reported: vmm.Running,
		closed: make(chan struct{}), poke: make(chan struct{}, 1), done: make(chan struct{}), changes: make(chan vmm.Change, 1),
	}
	if p.Elsewhere() && d.jails.Jail != nil {
		m.unjail = func(ctx context.Context) { d.unjail(ctx, spec) }
	}
	var err error
	if m.room, err = roomOf(p.PID(), d.free); err != nil || len(m.room.paths) == 0 {
		// It has ended, which is seen at once, or /proc is hidden: its log lies with its disks.
		m.room = room{paths: []string{spec.Log}, free: d.free}
	}
	m.observe() // one that is paused has that reported
	go m.watch()
	return m
}

// watch looks at the host's disk and at the process until that has ended, then cleans up after it and
// closes done.
func (m *machine) watch() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-m.closed:
			return
		case <-m.process.Done():
			select {
			case <-m.closed: // as well: whoever comes next cleans up, and may have begun
			default:
				m.finish()
			}
			return
		case <-m.poke:
		case <-timer.C:
		}
		timer.Reset(m.observe())
	}
}

// observe stops a machine that runs while its host's disk is all but full, reports what changed, and
// says when to look again.
func (m *machine) observe() time.Duration {
	free, err := m.room.least()
	if err != nil { // it has ended, or the disk is gone: there is nothing that a pause would save
		return lookSeldom
	}
	stopped := m.process.Stopped()
	if !stopped && !m.alive() {
		return endTime
	}
	if !stopped && free < reserve && m.process.Signal(int(unix.SIGSTOP)) == nil {
		stopped = m.await(true)
	}
	state, reason := vmm.Running, ""
	if stopped {
		state, reason = vmm.Paused, m.why(free)
	}
	m.report(vmm.Change{State: state, Reason: reason, At: time.Now()})
	if stopped {
		return lookSeldom
	}
	return nextLook(free)
}

// alive tells whether the machine has a guest. A Firecracker that stays for longer than endTime without
// one is ended: a request to its API that came while it was ending leaves it waiting for itself for ever.
func (m *machine) alive() bool {
	if hasGuest(m.process.PID()) {
		m.lifeless = time.Time{}
		return true
	}
	if m.lifeless.IsZero() {
		m.lifeless = time.Now()
	} else if time.Since(m.lifeless) >= endTime {
		m.mu.Lock()
		m.hung = true
		m.mu.Unlock()
		_ = m.process.Signal(int(unix.SIGKILL)) // gone: what was wanted
	}
	return false
}

// hasGuest tells whether the process has a thread of a virtual CPU, by the name that Firecracker gives it
// (proc_pid_comm(5)). It has them from the guest's start to its end. True if that cannot be found out.
func hasGuest(pid int) bool {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "task")
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return true
	}
	for _, t := range tasks {
		if name, err := os.ReadFile(filepath.Join(dir, t.Name(), "comm")); err == nil && strings.HasPrefix(string(name), "fc_vcpu") {
			return true
		}
	}
	return false
}

func (m *machine) why(free int64) string {
	if free < reserve {
		return reasonFull
	}
	return reasonStopped
}

// await waits until the process is stopped or goes on, and tells whether it is stopped. Nothing tells of
// that but a look: waitid(2) does for children alone. It takes a write that is under way.
func (m *machine) await(stopped bool) bool {
	const pause, patience = time.Millisecond, time.Second
	for begin := time.Now(); time.Since(begin) < patience; {
		if m.process.Stopped() == stopped {
			return stopped
		}
		select {
		case <-m.process.Done():
			return false
		case <-time.After(pause):
		}
	}
	return m.process.Stopped()
}

// finish works out why the process ended and removes what it left.
func (m *machine) finish() {
	m.mu.Lock()
	m.exit = vmm.Exit{Reason: m.reason(), At: time.Now()}
	m.mu.Unlock()
	if m.up != nil {
		m.up.Close() // the next one in this directory listens there
	}

	ctx, cancel := context.WithTimeout(context.Background(), lockTime)
	defer cancel()
	// What cannot be removed now is removed by the next Start or Adopt, which do report it.
	_ = rundir.CleanAfter(ctx, m.spec.RunDir, pidfile, m.spec.Marker(), clean)
	if m.unjail != nil {
		m.unjail(ctx)
	}

	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.over {
		m.over = true
		close(m.changes)
	}
	close(m.done)
}

// reason is why the process ended. Firecracker ends with status 0 when its guest resets, whether to
// reboot or to be off: the guest's last words tell which. The status of a process that was adopted is
// nobody's to know: then they are all there is. Called with mu locked.
func (m *machine) reason() string {
	ws, known := m.process.Status()
	said := console.End(m.spec.Log, m.logged)
	switch {
	case known && ws.Signaled() && !m.hung:
		if m.killed || process.ByHand(ws.Signal()) {
			return vmm.Killed
		}
		return vmm.Crashed
	case known && !m.hung && ws.ExitStatus() != 0:
		return vmm.Crashed
	case said != "":
		return said
	case m.killed:
		return vmm.Killed
	case known:
		return vmm.GuestReset
	}
	return vmm.Crashed
}

// report puts a change into the channel if it is one, in place of one that nobody has received.
func (m *machine) report(c vmm.Change) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over || c.State == m.reported {
		return
	}
	m.reported = c.State
	select {
	case <-m.changes:
	default:
	}
	m.changes <- c
}

func (m *machine) PID() int { return m.process.PID() }

func (m *machine) Done() <-chan struct{} { return m.done }

func (m *machine) Exit() vmm.Exit {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.exit
}

func (m *machine) Changes() <-chan vmm.Change { return m.changes }

func (m *machine) State(ctx context.Context) (vmm.State, error) {
	c, err := m.Last(ctx)
	return c.State, err
}

// Last is from the process's own state. Firecracker is not asked: a request that comes while its guest
// ends leaves it waiting for itself for ever.
func (m *machine) Last(ctx context.Context) (vmm.Change, error) {
	if err := ctx.Err(); err != nil {
		return vmm.Change{}, fault.Wrap(err, fault.CodeOf(err), m.spec.Name, "its state was not looked at")
	}
	select {
	case <-m.process.Done():
		return vmm.Change{}, fault.New(fault.Unavailable, m.spec.Name, "its Firecracker is gone")
	default:
	}
	if !m.process.Stopped() {
		return vmm.Change{State: vmm.Running, At: time.Now()}, nil
	}
	free, err := m.room.least()
	if err != nil {
		return vmm.Change{}, fault.Wrap(err, fault.Unavailable, m.spec.Name, "the room on its disk cannot be found out")
	}
	return vmm.Change{State: vmm.Paused, Reason: m.why(free), At: time.Now()}, nil
}

// Resume lets the process go on. fault.Exhausted while the host's disk has no room: it would be stopped
// again at once, with what its guest could write meanwhile.
func (m *machine) Resume(ctx context.Context) error {
	last, err := m.Last(ctx)
	if err != nil || last.State == vmm.Running {
		return err
	}
	free, err := m.room.least()
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, m.spec.Name, "the room on its disk cannot be found out")
	}
	if free < reserve {
		return fault.New(fault.Exhausted, m.spec.Name, "it stays paused: the disk that it writes to has %d MiB free, %d MiB are needed", free>>20, reserve>>20).
			WithOp("vmm resume").WithHint("free space (df -h %s), then try again", m.spec.Log)
	}
	if err := m.process.Signal(int(unix.SIGCONT)); err != nil {
		return fault.Wrap(err, fault.CodeOf(err), m.spec.Name, "its Firecracker cannot be let go on")
	}
	if m.await(false) {
		return fault.New(fault.Unavailable, m.spec.Name, "its Firecracker does not go on")
	}
	select { // to report it
	case m.poke <- struct{}{}:
	default:
	}
	return nil
}

// Resize is Firecracker's PATCH of a drive with the path that it has: the file is opened again, and the
// guest gets an interrupt for its device's new capacity. Firecracker's own page on it
// (docs/api_requests/patch-block.md) wants the device not to be mounted, because the file could be another
// one; here it is the same, with its beginning unchanged, and the synchronous engine, which has no request
// under way while it answers its API.
func (m *machine) Resize(ctx context.Context, drive vmm.Drive, _ int64) error {
	last, err := m.Last(ctx)
	switch {
	case err != nil:
		return err
	case last.State == vmm.Paused:
		return fault.New(fault.Precondition, m.spec.Name, "it is paused, and takes no new size meanwhile")
	}
	ctx, cancel := context.WithTimeout(ctx, apiTime)
	defer cancel()
	dir, err := rundir.Open(m.sockets())
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, m.spec.Name, "its run directory cannot be opened")
	}
	defer dir.Close()
	c, err := dial(ctx, dir)
	if err == nil {
		defer c.close()
		err = c.do(ctx, http.MethodPatch, "/drives/"+string(drive.Role), drivePatch{ID: string(drive.Role), Path: m.layout().drive(drive)}, nil)
	}
	var r *refusal
	switch {
	case err == nil:
		return nil
	case errors.As(err, &r):
		return fault.Wrap(err, fault.Precondition, m.spec.Name, "Firecracker refuses the new size of its %s drive", drive.Role)
	case ctx.Err() != nil:
		return fault.Wrap(err, fault.CodeOf(ctx.Err()), m.spec.Name, "Firecracker did not answer")
	}
	return fault.Wrap(err, fault.Unavailable, m.spec.Name, "Firecracker's API cannot be reached")
}

// Kill ends the process and returns when it is gone and its sockets are removed.
func (m *machine) Kill(ctx context.Context) error {
	m.mu.Lock()
	m.killed = true
	m.mu.Unlock()
	if err := m.process.Kill(ctx); err != nil {
		return fault.Wrap(err, fault.CodeOf(err), m.spec.Name, "its Firecracker cannot be ended")
	}
	select {
	case <-m.done:
		return nil
	case <-m.closed:
		return nil // nobody watches any more: the next Start or Adopt cleans up
	case <-ctx.Done():
		return fault.Wrap(ctx.Err(), fault.CodeOf(ctx.Err()), m.spec.Name, "its Firecracker ended, and the run directory was not cleaned")
	}
}

// Signal sends one signal to Firecracker, which SIGTERM, SIGINT and SIGHUP end at once.
func (m *machine) Signal(_ context.Context, sig int) error {
	if process.ByHand(syscall.Signal(sig)) { // before: its end may be seen before this returns
		m.mu.Lock()
		m.killed = true
		m.mu.Unlock()
	}
	if err := m.process.Signal(sig); err != nil {
		return fault.Wrap(err, fault.CodeOf(err), m.spec.Name, "its Firecracker was not signalled")
	}
	return nil
}

// Close leaves Firecracker running; another driver may adopt it from then on.
func (m *machine) Close() error {
	m.mu.Lock()
	if !m.over {
		m.over = true
		close(m.closed)
		close(m.changes)
	}
	m.mu.Unlock()
	if m.up != nil {
		m.up.Close()
	}
	return m.process.Close()
}

func (m *machine) Link() vmm.Link {
	l := vmm.Link{Dial: m.dial}
	if m.up != nil {
		l.Up = m.up.Came
	}
	return l
}

// dial connects to the agent's port by Firecracker's host-initiated vsock (its docs/vsock.md): the line
// CONNECT, which the line OK answers when the guest has accepted. While the guest boots it may hang, or
// be closed without a byte: whoever dials bounds it and repeats.
func (m *machine) dial(ctx context.Context) (net.Conn, error) {
	conn, err := func() (net.Conn, error) {
		dir, err := rundir.Open(m.sockets())
		if err != nil {
			return nil, err
		}
		defer dir.Close()
		conn, err := dir.Dial(ctx, agentSocket)
		if err != nil {
			return nil, err
		}
		if err := Connect(ctx, conn, vmm.AgentPort); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		return conn, nil
	}()
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() != nil:
		return nil, fault.Wrap(err, fault.CodeOf(ctx.Err()), m.spec.Name, "its agent did not answer over vsock").WithOp("vmm dial")
	}
	return nil, fault.Wrap(err, fault.Unavailable, m.spec.Name, "its agent cannot be reached over vsock").WithOp("vmm dial")
}

// connectTime bounds one CONNECT: a guest that has a listener answers within milliseconds.
const connectTime = time.Second

// Connect asks a Firecracker, over a connection to its vsock's socket, for a port of the guest (its docs/vsock.md, "Host-Initiated
// Connections"). It ends with ctx, and within a second. The answer is read a byte at a time: what follows it is the guest's, and the
// caller's to read. The connection is the caller's to close, also after an error.
func Connect(ctx context.Context, conn net.Conn, port int) error {
	deadline := time.Now().Add(connectTime)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		stop()
		return err
	}
	const longest = len("OK 4294967295\n")
	var line []byte
	for !strings.HasSuffix(string(line), "\n") {
		if len(line) == longest {
			stop()
			return fmt.Errorf("an answer to CONNECT that is too long: %q", line)
		}
		var b [1]byte
		if _, err := conn.Read(b[:]); err != nil {
			stop()
			return fmt.Errorf("CONNECT %d: %w", port, err)
		}
		line = append(line, b[0])
	}
	if !stop() {
		return ctx.Err()
	}
	if !strings.HasPrefix(string(line), "OK ") {
		return fmt.Errorf("CONNECT %d was answered with %q", port, line)
	}
	return conn.SetDeadline(time.Time{})
}
