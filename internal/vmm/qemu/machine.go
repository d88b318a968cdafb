package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/vsock"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// machine is a QEMU process and the connection to its monitor. Its goroutine, watch, sees changes
// and the end; the monitor's reader only takes notes.
type machine struct {
	spec     vmm.Spec
	platform platform
	process  *process.Process
	monitor  *monitor

	closed  chan struct{} // Close was called
	poke    chan struct{} // the state may have changed; room for one
	done    chan struct{}
	changes chan vmm.Change

	mu       sync.Mutex
	reported vmm.State
	shutdown string // exit reason, from the monitor's SHUTDOWN event
	killed   bool   // by us
	exit     vmm.Exit
	over     bool // closed was closed
}

var (
	_ vmm.Machine  = (*machine)(nil)
	_ vmm.Reporter = (*machine)(nil)
	_ vmm.Resizer  = (*machine)(nil)
)

func newMachine(spec vmm.Spec, pf platform, p *process.Process) *machine {
	m := &machine{
		spec: spec, platform: pf, process: p, reported: vmm.Running,
		closed: make(chan struct{}), poke: make(chan struct{}, 1), done: make(chan struct{}), changes: make(chan vmm.Change, 1),
	}
	m.monitor = join(m)
	return m
}

// event takes notes of what the monitor tells (QEMU's docs, run-state and block-core of its QAPI
// schema). Called by the monitor's reader.
func (m *machine) event(e event) {
	switch e.Name {
	case "SHUTDOWN":
		var why struct {
			Guest  bool   `json:"guest"`
			Reason string `json:"reason"`
		}
		if json.Unmarshal(e.Data, &why) != nil {
			return
		}
		m.mu.Lock()
		m.shutdown = exitReason(why.Guest, why.Reason)
		m.mu.Unlock()
	case "STOP", "RESUME", "BLOCK_IO_ERROR":
		m.look()
	}
}

// exitReason maps a ShutdownCause. A guest's panic arrives as guest-reset: the driver's kernel
// command line turns the one into the other.
func exitReason(guest bool, reason string) string {
	switch {
	case reason == "guest-reset" || reason == "subsystem-reset":
		return vmm.GuestReset
	case guest && reason != "guest-panic":
		return vmm.GuestShutdown
	case reason == "host-signal" || reason == "host-qmp-quit":
		return vmm.Killed
	}
	return vmm.Crashed
}

// watch reports changes until the process has ended, then cleans up after it and closes done.
func (m *machine) watch() {
	for {
		select {
		case <-m.closed:
			return
		case <-m.poke:
			ctx, cancel := context.WithTimeout(context.Background(), monitorTime)
			change, err := m.Last(ctx)
			cancel()
			if err == nil { // else it is ending, which is seen here as well
				m.report(change)
			}
		case <-m.process.Done():
			select {
			case <-m.closed: // as well: whoever comes next cleans up, and may have begun
			default:
				m.finish()
			}
			return
		}
	}
}

// finish works out why the process ended and removes what it left.
func (m *machine) finish() {
	if q := m.monitor.current(); q != nil {
		select { // what QEMU said before it ended is still in the socket
		case <-q.gone:
		case <-time.After(time.Second):
		}
	}
	m.monitor.leave(m)
	m.mu.Lock()
	reason := m.shutdown
	if reason == "" {
		reason = vmm.Crashed
		if ws, ok := m.process.Status(); m.killed || ok && ws.Signaled() && process.ByHand(ws.Signal()) {
			reason = vmm.Killed
		}
	}
	m.exit = vmm.Exit{Reason: reason, At: time.Now()}
	m.mu.Unlock()

	ctx, cancel := context.WithTimeout(context.Background(), monitorTime)
	defer cancel()
	// What cannot be removed now is removed by the next Start or Adopt, which do report it.
	_ = rundir.CleanAfter(ctx, m.spec.RunDir, pidfile, m.spec.Marker(), clean)

	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.over {
		m.over = true
		close(m.changes)
	}
	close(m.done)
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

// Last maps QEMU's RunState: whatever does not run is Paused, for the reason that QEMU names.
func (m *machine) Last(ctx context.Context) (vmm.Change, error) {
	var status struct {
		Status string `json:"status"`
	}
	if err := m.command(ctx, "query-status", nil, &status); err != nil {
		return vmm.Change{}, err
	}
	c := vmm.Change{State: vmm.Paused, Reason: status.Status, At: time.Now()}
	if status.Status == "running" {
		c.State, c.Reason = vmm.Running, ""
	}
	return c, nil
}

// Resume lets QEMU go on; it repeats the requests that the host could not serve. A guest that stops
// again at once is reported as Paused once more, although nobody saw it run in between.
func (m *machine) Resume(ctx context.Context) error {
	m.mu.Lock()
	if m.reported != vmm.Running {
		m.reported = "" // whatever comes next is news
	}
	m.mu.Unlock()
	if err := m.command(ctx, "cont", nil, nil); err != nil {
		return err
	}
	m.look()
	return nil
}

// Resize is QEMU's block_resize (block-core of its QAPI schema). It sets the length of the file, too,
// which has it already, and the guest gets an interrupt for its device's new capacity.
func (m *machine) Resize(ctx context.Context, drive vmm.Drive, bytes int64) error {
	return m.command(ctx, "block_resize", map[string]any{"node-name": nodeName(drive.Role), "size": bytes}, nil)
}

// look makes watch ask for the state.
func (m *machine) look() {
	select {
	case m.poke <- struct{}{}:
	default:
	}
}

// command runs a monitor command within monitorTime.
func (m *machine) command(ctx context.Context, name string, args, result any) error {
	ctx, cancel := context.WithTimeout(ctx, monitorTime)
	defer cancel()
	select {
	case <-m.process.Done():
		return fault.New(fault.Unavailable, m.spec.Name, "its QEMU is gone")
	default:
	}
	err := func() error {
		q := m.monitor.current()
		if q == nil {
			dir, err := rundir.Open(m.spec.RunDir)
			if err != nil {
				return err
			}
			defer dir.Close()
			if q, err = m.monitor.connect(ctx, dir); err != nil {
				return err
			}
		}
		return q.do(ctx, name, args, result)
	}()
	var refused *qmpError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &refused):
		return fault.Wrap(err, fault.Precondition, m.spec.Name, "QEMU refuses")
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fault.Wrap(err, fault.CodeOf(err), m.spec.Name, "QEMU's monitor did not answer")
	}
	return fault.Wrap(err, fault.Unavailable, m.spec.Name, "QEMU's monitor cannot be reached")
}

// Kill ends the process and returns when it is gone and its sockets are removed.
func (m *machine) Kill(ctx context.Context) error {
	m.mu.Lock()
	m.killed = true
	m.mu.Unlock()
	if err := m.process.Kill(ctx); err != nil {
		return fault.Wrap(err, fault.CodeOf(err), m.spec.Name, "its QEMU cannot be ended")
	}
	select {
	case <-m.done:
		return nil
	case <-m.closed:
		return nil // nobody watches any more: the next Start or Adopt cleans up
	case <-ctx.Done():
		return fault.Wrap(ctx.Err(), fault.CodeOf(ctx.Err()), m.spec.Name, "its QEMU ended, and the run directory was not cleaned")
	}
}

// Signal sends one signal to QEMU, which takes SIGTERM, SIGINT and SIGHUP for a request to end at once.
func (m *machine) Signal(_ context.Context, sig int) error {
	if syscall.Signal(sig) == syscall.SIGKILL {
		m.mu.Lock()
		m.killed = true
		m.mu.Unlock()
	}
	if err := m.process.Signal(sig); err != nil {
		return fault.Wrap(err, fault.CodeOf(err), m.spec.Name, "its QEMU was not signalled")
	}
	return nil
}

// Close leaves QEMU running; another driver may adopt it from then on.
func (m *machine) Close() error {
	m.mu.Lock()
	if !m.over {
		m.over = true
		close(m.closed)
		close(m.changes)
	}
	m.mu.Unlock()
	m.monitor.leave(m)
	return m.process.Close()
}

func (m *machine) Link() vmm.Link {
	if m.platform.vsock {
		return vmm.Link{Dial: m.dialVsock}
	}
	return vmm.Link{Dial: m.dialSerial, Mux: true}
}

// dialSerial connects to the virtio-serial port. While another connection is open, QEMU lets this
// one wait: a Mux link carries one at a time.
func (m *machine) dialSerial(ctx context.Context) (net.Conn, error) {
	dir, err := rundir.Open(m.spec.RunDir)
	if err == nil {
		defer dir.Close()
		var conn net.Conn
		if conn, err = dir.Dial(ctx, agentSocket); err == nil {
			return conn, nil
		}
	}
	return nil, fault.Wrap(err, fault.Unavailable, m.spec.Name, "its agent port cannot be reached").WithOp("vmm dial")
}

// dialVsock connects to the agent. The dial itself cannot be interrupted: it ends when the guest's
// kernel refuses or vsock(7)'s connect timeout of two seconds has passed, and then a connection that
// nobody waits for is closed.
func (m *machine) dialVsock(ctx context.Context) (net.Conn, error) {
	type result struct {
		conn *vsock.Conn
		err  error
	}
	got := make(chan result, 1)
	go func() {
		conn, err := vsock.Dial(m.spec.CID, vmm.AgentPort, nil)
		got <- result{conn, err}
	}()
	select {
	case r := <-got:
		if r.err != nil {
			return nil, fault.Wrap(r.err, fault.Unavailable, m.spec.Name, "its agent cannot be reached over vsock").WithOp("vmm dial")
		}
		return r.conn, nil
	case <-ctx.Done():
		go func() {
			if r := <-got; r.conn != nil {
				_ = r.conn.Close()
			}
		}()
		return nil, fault.Wrap(ctx.Err(), fault.CodeOf(ctx.Err()), m.spec.Name, "its agent did not answer over vsock").WithOp("vmm dial")
	}
}
