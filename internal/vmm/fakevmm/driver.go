package fakevmm

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// Agent plays the guest's side of one connection to it, like a server's handler: it returns when
// the connection is done, and ctx ends with the machine. The connection is one end of a socketpair.
type Agent func(ctx context.Context, g *Guest, conn net.Conn)

// Driver is the vmm.Driver of a World. Any number of drivers, in any number of processes, may share
// one world, as daemons share a host.
type Driver struct {
	world *World
	agent Agent
	watch watcher
}

// New returns a driver. Without an agent, connections to guests are refused.
func New(world *World, agent Agent) *Driver {
	return &Driver{world: world, agent: agent, watch: watcher{world: world}}
}

// Name is "fake".
func (d *Driver) Name() string { return "fake" }

// Features say that it emulates, and that each Dial is a stream of its own.
func (d *Driver) Features() vmm.Features {
	return vmm.Features{Accel: "tcg", Vsock: true}
}

// Check finds nothing wrong as long as the world is there.
func (d *Driver) Check(context.Context) error {
	if _, err := os.Stat(d.world.machineFile(".")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.Wrap(err, fault.Unavailable, "fake vmm", "its world cannot be read")
	}
	return nil
}

// pidfile is there for the same reason as a real driver's: a run directory that holds one when
// nothing runs shows that somebody forgot to clean up.
const pidfile = "vmm.pid"

// Start is vmm.Driver's. Like a real VMM it opens every file of the spec and connects to every socket, so
// one that an earlier step forgot to make is noticed.
func (d *Driver) Start(ctx context.Context, spec vmm.Spec) (vmm.Machine, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	m, err := d.Adopt(ctx, spec)
	if !fault.Is(err, fault.NotFound) {
		return m, err
	}
	if err := openAll(spec); err != nil {
		return nil, err
	}
	if err := d.hold(ctx, spec); err != nil {
		return nil, err
	}
	if text, ok := d.world.fault(spec, "refuse"); ok {
		if text == "" {
			text = "scripted by the faults file"
		}
		return nil, fault.New(fault.Unavailable, spec.Name, "the fake VMM ended before it was ready: %s", text).WithOp("vmm start")
	}
	r, started, err := d.world.start(spec)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, spec.Name, "the fake VMM cannot be started").WithOp("vmm start")
	}
	if started {
		if err := d.boot(spec, r); err != nil {
			_, kill := d.world.end(spec.Marker(), r.Instance, vmm.Killed)
			return nil, fault.Wrap(errors.Join(err, kill), fault.Internal, spec.Name, "the fake VMM cannot be started").WithOp("vmm start")
		}
	}
	return d.handle(spec, r)
}

// boot does what a VMM does once it runs: its pidfile, its log, and the faults of a start.
func (d *Driver) boot(spec vmm.Spec, r Record) error {
	if err := writePidfile(spec, r); err != nil {
		return err
	}
	if err := appendLine(spec.Log, fmt.Sprintf("fake: start %d of %s", r.Instance, spec.Marker()), os.O_CREATE); err != nil {
		return err
	}
	if text, ok := d.world.fault(spec, "console"); ok {
		if err := appendLine(spec.Log, text, 0); err != nil {
			return err
		}
	}
	if _, ok := d.world.fault(spec, "pause"); ok {
		if err := d.world.setState(spec.Marker(), r.Instance, vmm.Paused, "io-error"); err != nil {
			return err
		}
	}
	if reason, ok := d.world.fault(spec, "die"); ok {
		if _, err := d.world.end(spec.Marker(), r.Instance, cmp.Or(reason, vmm.Crashed)); err != nil {
			return err
		}
	}
	return nil
}

// Adopt is vmm.Driver's.
func (d *Driver) Adopt(ctx context.Context, spec vmm.Spec) (vmm.Machine, error) {
	if err := spec.ValidateIdentity(); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r, ok, err := d.world.running(spec.Marker())
	if err != nil {
		return nil, fault.Wrap(err, fault.Corrupt, spec.Name, "the record of the fake machine cannot be read").WithOp("vmm adopt")
	}
	if !ok {
		if err := removePidfile(spec); err != nil {
			return nil, fault.Wrap(err, fault.Internal, spec.Name, "the run directory cannot be cleaned").WithOp("vmm adopt")
		}
		return nil, fault.New(fault.NotFound, spec.Name, "no VMM of it runs").WithOp("vmm adopt")
	}
	return d.handle(r.Spec, r) // the spec it was started with: this one need hold no more than an identity
}

// handle makes the Machine of a record. It watches before it looks, so that an end in between is
// not missed.
func (d *Driver) handle(spec vmm.Spec, r Record) (vmm.Machine, error) {
	m := &machine{driver: d, spec: spec, instance: r.Instance, done: make(chan struct{}), changes: make(chan vmm.Change, 1), last: vmm.Running}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.sub = &subscription{file: filepath.Base(d.world.machineFile(spec.Marker())), call: m.look}
	if err := d.watch.add(m.sub); err != nil {
		return nil, fault.Wrap(err, fault.Internal, spec.Name, "the fake machine cannot be watched")
	}
	m.look()
	return m, nil
}

// Sweep is vmm.Sweeper's.
func (d *Driver) Sweep(_ context.Context, owner, under string, known func(id string) bool) ([]string, error) {
	all, err := d.world.Machines()
	if err != nil {
		return nil, fault.Wrap(err, fault.Corrupt, "fake vmm", "its world cannot be read").WithOp("vmm sweep")
	}
	var ended []string
	for _, r := range all {
		if r.Spec.Owner != owner || !strings.HasPrefix(r.Spec.RunDir, filepath.Clean(under)+"/") || known(r.Spec.ID) {
			continue
		}
		if _, err := d.world.end(r.Spec.Marker(), r.Instance, vmm.Killed); err != nil {
			return ended, fault.Wrap(err, fault.Internal, r.Spec.Name, "the fake machine cannot be ended").WithOp("vmm sweep")
		}
		ended = append(ended, r.Spec.ID)
	}
	return ended, nil
}

// hold waits as long as the faults file says so.
func (d *Driver) hold(ctx context.Context, spec vmm.Spec) error {
	if _, ok := d.world.fault(spec, "hold"); !ok {
		return nil
	}
	return d.untilHealed(ctx, spec, "hold")
}

// untilHealed waits until the machine has no such line in the faults file.
func (d *Driver) untilHealed(ctx context.Context, spec vmm.Spec, kind string) error {
	changed := make(chan struct{}, 1)
	sub := &subscription{file: "faults", call: func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}}
	if err := d.watch.add(sub); err != nil {
		return err
	}
	defer d.watch.remove(sub)
	for {
		if _, ok := d.world.fault(spec, kind); !ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// openAll opens and closes what a VMM would open.
func openAll(spec vmm.Spec) error {
	if st, err := os.Stat(spec.RunDir); err != nil || !st.IsDir() {
		return fault.Wrap(err, fault.Unavailable, spec.Name, "there is no run directory %s", spec.RunDir).WithOp("vmm start")
	}
	paths := []string{spec.Kernel, spec.Initrd}
	for _, drive := range spec.Drives {
		paths = append(paths, drive.Path)
	}
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return fault.Wrap(err, fault.Unavailable, spec.Name, "the VMM cannot open %s", path).WithOp("vmm start")
		}
		_ = f.Close()
	}
	for _, n := range spec.NICs {
		if n.Socket == "" {
			continue // a TAP is the host's, and this one need not be
		}
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: n.Socket, Net: "unix"})
		if err != nil {
			return fault.Wrap(err, fault.Unavailable, spec.Name, "the VMM cannot connect to %s", n.Socket).WithOp("vmm start")
		}
		_ = conn.Close()
	}
	return nil
}

func writePidfile(spec vmm.Spec, r Record) error {
	return writeAtomic(filepath.Join(spec.RunDir, pidfile), fmt.Appendln(nil, r.PID()))
}

func removePidfile(spec vmm.Spec) error {
	err := os.Remove(filepath.Join(spec.RunDir, pidfile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func hostUint32(b []byte) uint32 { return binary.NativeEndian.Uint32(b) }

// machine is a handle of one instance. ctx ends with the instance or the handle.
type machine struct {
	driver   *Driver
	spec     vmm.Spec
	instance int
	sub      *subscription
	ctx      context.Context
	cancel   context.CancelFunc

	mu      sync.Mutex
	done    chan struct{}
	exit    vmm.Exit
	closed  bool
	changes chan vmm.Change
	last    vmm.State
}

var (
	_ vmm.Driver   = (*Driver)(nil)
	_ vmm.Sweeper  = (*Driver)(nil)
	_ vmm.Machine  = (*machine)(nil)
	_ vmm.Reporter = (*machine)(nil)
	_ vmm.Resizer  = (*machine)(nil)
)

// look compares the handle with the world. Called after each change of the record.
func (m *machine) look() {
	r, ok, err := m.driver.world.running(m.spec.Marker())
	if err != nil {
		return // a record that cannot be read says nothing; State reports it to whoever asks
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || isClosed(m.done) {
		return
	}
	if ok && r.Instance == m.instance {
		if r.State != m.last {
			m.last = r.State
			select { // only the newest change is kept
			case <-m.changes:
			default:
			}
			m.changes <- vmm.Change{State: r.State, Reason: r.Reason, At: r.ChangedAt}
		}
		return
	}
	m.exit = m.driver.world.exitOf(m.spec.Marker(), m.instance)
	if !ok {
		// What cannot be removed here is removed by the next Start or Adopt, which do report it.
		_ = removePidfile(m.spec)
	}
	m.cancel()
	close(m.changes)
	close(m.done)
	m.driver.watch.remove(m.sub)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// PID is above any that a kernel gives out: signals sent to it reach nobody.
func (m *machine) PID() int { return Record{Instance: m.instance}.PID() }

func (m *machine) Done() <-chan struct{} { return m.done }

func (m *machine) Exit() vmm.Exit {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.exit
}

func (m *machine) State(ctx context.Context) (vmm.State, error) {
	c, err := m.Last(ctx)
	return c.State, err
}

func (m *machine) Last(context.Context) (vmm.Change, error) {
	r, ok, err := m.driver.world.running(m.spec.Marker())
	if err != nil {
		return vmm.Change{}, fault.Wrap(err, fault.Corrupt, m.spec.Name, "the record of the fake machine cannot be read")
	}
	if !ok || r.Instance != m.instance {
		return vmm.Change{}, fault.New(fault.Unavailable, m.spec.Name, "its VMM is gone")
	}
	return vmm.Change{State: r.State, Reason: r.Reason, At: r.ChangedAt}, nil
}

func (m *machine) Changes() <-chan vmm.Change { return m.changes }

func (m *machine) Kill(context.Context) error { return m.end(vmm.Killed) }

// end ends the instance and returns when Done is closed, as a process is gone when Kill returns.
func (m *machine) end(reason string) error {
	if _, err := m.driver.world.end(m.spec.Marker(), m.instance, reason); err != nil {
		return fault.Wrap(err, fault.Internal, m.spec.Name, "the fake machine cannot be ended")
	}
	m.look()
	return nil
}

// Signal does what the default actions of signal(7) do to a process; stopping and continuing it
// is not played.
func (m *machine) Signal(ctx context.Context, sig int) error {
	if _, err := m.Last(ctx); err != nil {
		return fault.Wrap(err, fault.Precondition, m.spec.Name, "signal %d reached nobody", sig)
	}
	switch syscall.Signal(sig) {
	case 0, syscall.SIGCHLD, syscall.SIGURG, syscall.SIGWINCH,
		syscall.SIGSTOP, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU, syscall.SIGCONT:
		return nil
	}
	if sig < 0 || sig > 64 {
		return fault.New(fault.Invalid, m.spec.Name, "there is no signal %d", sig)
	}
	return m.end(vmm.Killed)
}

func (m *machine) Resume(context.Context) error {
	if _, ok := m.driver.world.fault(m.spec, "pause"); ok {
		return nil // a real guest goes on and stops again at its next write
	}
	if err := m.driver.world.setState(m.spec.Marker(), m.instance, vmm.Running, ""); err != nil {
		return err
	}
	m.look()
	return nil
}

func (m *machine) Resize(_ context.Context, drive vmm.Drive, bytes int64) error {
	if _, stiff := m.driver.world.fault(m.spec, "stiff"); stiff {
		return fault.New(fault.Precondition, m.spec.Name, "the fake VMM refuses the new size of its %s drive", drive.Role)
	}
	return m.driver.world.resize(m.spec.Marker(), m.instance, drive.Role, bytes)
}

func (m *machine) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil
	}
	m.closed = true
	m.cancel()
	if !isClosed(m.done) {
		m.driver.watch.remove(m.sub)
		close(m.changes)
	}
	return nil
}

func (m *machine) Link() vmm.Link { return vmm.Link{Dial: m.dial} }

// dial hands one end of a socketpair to the agent. The guest's end goes with the machine or with
// this handle: a daemon that ends loses its connections, and the guest plays on for the next one.
func (m *machine) dial(ctx context.Context) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if m.ctx.Err() != nil {
		return nil, fault.New(fault.Unavailable, m.spec.Name, "its VMM is gone").WithOp("vmm dial")
	}
	if m.driver.agent == nil {
		return nil, fault.New(fault.Unavailable, m.spec.Name, "nobody listens in the guest").WithOp("vmm dial")
	}
	host, guest, err := socketpair()
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, m.spec.Name, "no connection to the fake guest").WithOp("vmm dial")
	}
	go func() {
		defer guest.Close()
		stop := context.AfterFunc(m.ctx, func() { _ = guest.Close() })
		defer stop()
		if _, mute := m.driver.world.fault(m.spec, "mute"); mute {
			if m.driver.untilHealed(m.ctx, m.spec, "mute") != nil {
				return
			}
		}
		m.driver.agent(m.ctx, &Guest{m: m}, &freezing{UnixConn: guest, m: m})
	}()
	return host, nil
}

// freezing is the guest's end of a connection.
type freezing struct {
	*net.UnixConn
	m *machine
}

// Read implements net.Conn.
func (c *freezing) Read(b []byte) (int, error) {
	n, err := c.UnixConn.Read(b)
	c.thaw()
	return n, err
}

// Write implements net.Conn.
func (c *freezing) Write(b []byte) (int, error) {
	c.thaw()
	return c.UnixConn.Write(b)
}

// thaw waits until the guest does not stand still, or is gone.
func (c *freezing) thaw() {
	if _, frozen := c.m.driver.world.fault(c.m.spec, "freeze"); frozen {
		_ = c.m.driver.untilHealed(c.m.ctx, c.m.spec, "freeze") // a guest that is gone has lost its connections
	}
}

func socketpair() (host net.Conn, guest *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	fa, fb := os.NewFile(uintptr(fds[0]), "host"), os.NewFile(uintptr(fds[1]), "guest")
	defer fa.Close() // FileConn duplicates
	defer fb.Close()
	if host, err = net.FileConn(fa); err != nil {
		return nil, nil, err
	}
	other, err := net.FileConn(fb)
	if err != nil {
		return nil, nil, errors.Join(err, host.Close())
	}
	return host, other.(*net.UnixConn), nil // FileConn of a unix socket gives no other
}

// Guest is what an Agent plays: one boot of one machine.
type Guest struct{ m *machine }

// Spec of the machine.
func (g *Guest) Spec() vmm.Spec { return g.m.spec }

// Boot tells boots apart: it differs after each start, and is the same over restarts of the daemon.
func (g *Guest) Boot() string { return fmt.Sprintf("boot-%d", g.m.instance) }

// StartedAt is when the machine started; zero if it is gone.
func (g *Guest) StartedAt() time.Time {
	r, ok, err := g.m.driver.world.running(g.m.spec.Marker())
	if err != nil || !ok || r.Instance != g.m.instance {
		return time.Time{}
	}
	return r.StartedAt
}

// Size is what the guest believes of a drive, in bytes; 0 if it has no such drive, or is gone.
func (g *Guest) Size(role vmm.Role) int64 {
	r, ok, err := g.m.driver.world.running(g.m.spec.Marker())
	if err != nil || !ok || r.Instance != g.m.instance {
		return 0
	}
	return r.Sizes[role]
}

// Fault returns the argument of such a line about the machine in the faults file; ok is false without one.
func (g *Guest) Fault(kind string) (arg string, ok bool) {
	return g.m.driver.world.fault(g.m.spec, kind)
}

// UntilHealed waits until there is no such line about the machine in the faults file; its error is ctx's, or that it cannot be watched.
func (g *Guest) UntilHealed(ctx context.Context, kind string) error {
	return g.m.driver.untilHealed(ctx, g.m.spec, kind)
}

// Console appends a line to the machine's log, as a guest that prints on its serial console. It makes no log: a VMM has its own open,
// and that of a machine that is gone may be just being removed.
func (g *Guest) Console(line string) error { return appendLine(g.m.spec.Log, line, 0) }

// PowerOff ends the machine as a guest's power-off does, unless it is deaf.
func (g *Guest) PowerOff() error { return g.leave(vmm.GuestShutdown) }

// Reset ends the machine as a guest's reboot does, unless it is deaf.
func (g *Guest) Reset() error { return g.leave(vmm.GuestReset) }

func (g *Guest) leave(reason string) error {
	if _, deaf := g.m.driver.world.fault(g.m.spec, "deaf"); deaf {
		return nil
	}
	return g.m.end(reason)
}
