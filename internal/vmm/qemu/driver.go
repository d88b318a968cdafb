// Package qemu owns how QEMU is run: its command line, its monitor, its run directory, and what its
// end meant. It drives machines with KVM or by software emulation.
//
// It starts exactly one program per machine, QEMU itself, and never creates, grows or repairs a disk.
// What was found out about QEMU's versions and machine types is in docs/architecture.md.
//
// A run directory holds vmm.pid (internal/process), qmp.sock (the monitor, which serves one daemon
// at a time) and, without vsock, agent.sock (the virtio-serial port).
package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"git.thaloco.com/thaloco/banger/internal/console"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

const (
	// startTime bounds the time from exec to the monitor's answer: a second on a quiet machine.
	startTime = 30 * time.Second
	// monitorTime bounds one exchange with a monitor whose QEMU runs already.
	monitorTime = 10 * time.Second
	// killTime bounds a clean-up's wait for a killed process.
	killTime = 10 * time.Second
)

// oldest is the first QEMU that has every option of args.go. Older ones are refused.
var oldest = version{6, 1}

// parallel is the first QEMU whose emulation may run each virtual CPU in a thread of its own. Before
// it ("accel/tcg: Always lock pages before translation", in 8.1), one CPU could translate code
// that another was just patching and keep the breakpoint that the kernel had put there meanwhile: the
// guest died with "Oops: int3", one boot in some dozens.
var parallel = version{8, 1}

// Driver is the vmm.Driver of QEMU. Safe for concurrent use.
type Driver struct {
	platform platform

	mu      sync.Mutex
	checked checked
}

// checked is what a look at the program found, for as long as the program stays the same.
type checked struct {
	path    string
	size    int64
	mtime   time.Time
	version version
	err     error
	done    bool
}

// New returns a driver that uses KVM, which the caller has found usable (vmm.KVMUsable), or emulates.
// The agent is reached over vsock if this host has vhost-vsock and lets this user open it.
func New(kvm bool) *Driver {
	return &Driver{platform: platform{kvm: kvm, vsock: vsockUsable()}}
}

func vsockUsable() bool {
	f, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	_ = f.Close()
	return true
}

// Name is "qemu".
func (d *Driver) Name() string { return "qemu" }

// Features of this driver on this host.
func (d *Driver) Features() vmm.Features {
	f := vmm.Features{Accel: "tcg", Vsock: d.platform.vsock, OverheadMiB: 2 * translated}
	if d.platform.kvm {
		f.Accel, f.OverheadMiB = "kvm", 0
	}
	return f
}

// find returns the program: Debian's name in PATH, or where Red Hat's family keeps it.
func find() (string, error) {
	path, err := exec.LookPath("qemu-system-x86_64")
	if err == nil {
		return path, nil
	}
	const libexec = "/usr/libexec/qemu-kvm"
	if st, statErr := os.Stat(libexec); statErr == nil && st.Mode()&0o111 != 0 {
		return libexec, nil
	}
	return "", fault.Wrap(err, fault.Unavailable, "qemu", "qemu-system-x86_64 is not installed").
		WithOp("vmm check").WithHint("sudo apt install qemu-system-x86")
}

// Check finds QEMU and looks at its version. The program runs once for that, and again only when
// the file was replaced: Check costs a stat(2) before each create.
func (d *Driver) Check(ctx context.Context) error {
	path, err := find()
	if err != nil {
		return err
	}
	st, err := os.Stat(path)
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "qemu", "it cannot be looked at").WithOp("vmm check")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	c := checked{path: path, size: st.Size(), mtime: st.ModTime()}
	if known := d.checked; known.done && known.path == c.path && known.size == c.size && known.mtime.Equal(c.mtime) {
		return known.err
	}
	ctx, cancel := context.WithTimeout(ctx, monitorTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "qemu", "%s --version does not run", path).
			WithOp("vmm check").WithHint("sudo apt install --reinstall qemu-system-x86")
	}
	c.version, c.err = judge(path, string(out))
	c.done = true
	d.checked = c
	return c.err
}

type version struct{ major, minor int }

// Version is vmm.Versioned's.
func (d *Driver) Version() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if v := d.checked.version; v != (version{}) {
		return fmt.Sprintf("%d.%d", v.major, v.minor)
	}
	return ""
}

func (v version) atLeast(w version) bool {
	return v.major > w.major || v.major == w.major && v.minor >= w.minor
}

var versionForm = regexp.MustCompile(`version (\d+)\.(\d+)`)

// judge says whether a QEMU of that --version can be used.
func judge(path, output string) (v version, err error) {
	m := versionForm.FindStringSubmatch(output)
	if m == nil {
		return v, fault.New(fault.Unsupported, "qemu", "%s does not say which version it is: %.80q", path, output).
			WithOp("vmm check").WithHint("sudo apt install --reinstall qemu-system-x86")
	}
	v.major, _ = strconv.Atoi(m[1]) // digits by the expression
	v.minor, _ = strconv.Atoi(m[2])
	if !v.atLeast(oldest) {
		return v, fault.New(fault.Unsupported, "qemu", "%s is version %d.%d, at least %d.%d is needed", path, v.major, v.minor, oldest.major, oldest.minor).
			WithOp("vmm check").WithHint("sudo apt install qemu-system-x86 on Debian 12, Ubuntu 22.04 or later")
	}
	return v, nil
}

// Start is vmm.Driver's. fault.Unavailable if QEMU ends before it is ready, with the last lines of
// its log; fault.Busy if the CID or a disk is in use by another VMM.
func (d *Driver) Start(ctx context.Context, spec vmm.Spec) (vmm.Machine, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	if d.platform.vsock && spec.CID < 3 {
		return nil, fault.New(fault.Invalid, spec.Name, "the vsock context id %d is reserved", spec.CID).WithOp("vmm start")
	}
	dir, err := rundir.OpenLocked(ctx, spec.RunDir, spec.Name)
	if err != nil {
		return nil, vmm.StartFailed(err, "QEMU")
	}
	defer dir.Close()
	// Open, not Find: looking through /proc would make a create cost more with each VM. A QEMU whose
	// pidfile was lost holds locks on its disks, so that a second one is refused.
	m, err := d.adopt(ctx, dir, spec, process.Open)
	if err == nil {
		return m, nil
	}
	if !fault.Is(err, fault.NotFound) {
		return nil, vmm.StartFailed(err, "QEMU")
	}
	m, err = d.launch(ctx, dir, spec)
	if err != nil {
		return nil, vmm.StartFailed(err, "QEMU")
	}
	return m, nil
}

// clean removes what a QEMU that is gone left behind. Fine if there is nothing.
func clean(dir *rundir.Dir) error {
	return dir.Remove(monitorSocket, agentSocket, pidfile, pidfile+".tmp")
}

// launch starts QEMU. Called with the run directory locked and clean; leaves it clean on error.
func (d *Driver) launch(ctx context.Context, dir *rundir.Dir, spec vmm.Spec) (_ *machine, err error) {
	if err := d.Check(ctx); err != nil {
		return nil, err
	}
	d.mu.Lock()
	path, platform := d.checked.path, d.platform
	platform.parallel = d.checked.version.atLeast(parallel)
	d.mu.Unlock()
	args, err := arguments(spec, platform)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startTime, fmt.Errorf("QEMU was not ready after %v", startTime))
	defer cancel()
	defer func() {
		if err != nil {
			if dirty := clean(dir); dirty != nil { // joined only then: a join hides the hint
				err = errors.Join(err, dirty)
			}
		}
	}()

	var files []*os.File // descriptors 3 and 4
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	names := []string{monitorSocket}
	if !d.platform.vsock {
		names = append(names, agentSocket)
	}
	for _, name := range names {
		f, err := dir.Listen(name)
		if err != nil {
			return nil, fault.Wrap(err, fault.Unavailable, spec.Name, "the socket %s cannot be made", name)
		}
		files = append(files, f)
	}
	logged := console.Size(spec.Log)
	p, err := process.Start(ctx, process.Command{
		Path: path, Args: append([]string{path}, args...), Dir: spec.RunDir,
		// English messages, which tell() below reads. Nothing of the daemon's environment is QEMU's business.
		Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"},
		Log: spec.Log, Pidfile: dir.Name() + "/" + pidfile, Marker: spec.Marker(), Files: files,
		Cgroup: spec.Cgroup,
	})
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, spec.Name, "QEMU cannot be started")
	}
	// From here on only QEMU holds the listening sockets: when it ends, the monitor's connection does.
	for _, f := range files {
		_ = f.Close()
	}
	files = nil

	m, err := d.attach(ctx, dir, spec, p)
	if err == nil {
		return m, nil
	}
	// Its own end explains more than a broken connection.
	kill, stop := context.WithTimeout(context.WithoutCancel(ctx), killTime)
	defer stop()
	ended := false
	select {
	case <-p.Done():
		ended = true
	default:
		if !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
			// The connection broke: QEMU is about to end, or is of no use.
			select {
			case <-p.Done():
				ended = true
			case <-time.After(time.Second):
			}
		}
	}
	killErr := p.Kill(kill)
	said := console.Quote(spec.Log, logged)
	switch {
	case killErr != nil:
		return nil, errors.Join(err, killErr)
	case ended:
		return nil, tell(spec, p, said)
	case context.Cause(ctx) != nil:
		return nil, fault.Wrap(context.Cause(ctx), fault.CodeOf(ctx.Err()), spec.Name, "QEMU was started and ended again, its monitor had not answered%s", said)
	}
	return nil, fault.Wrap(err, fault.Unavailable, spec.Name, "QEMU's monitor fails%s", said)
}

// tell makes a fault of a QEMU that ended by itself at start.
func tell(spec vmm.Spec, p *process.Process, said string) error {
	how := "ended"
	if ws, ok := p.Status(); ok && ws.Signaled() {
		how = fmt.Sprintf("was ended by signal %d (%v)", ws.Signal(), ws.Signal())
	} else if ok {
		how = fmt.Sprintf("ended with status %d", ws.ExitStatus())
	}
	switch {
	case strings.Contains(said, "guest cid") && strings.Contains(said, "in use"):
		return fault.New(fault.Busy, spec.Name, "another VM of this host uses the vsock context id %d%s", spec.CID, said)
	case strings.Contains(said, "lock") && strings.Contains(said, "Is another process using the image"):
		return fault.New(fault.Busy, spec.Name, "another program uses one of its disks%s", said)
	case strings.Contains(said, "annot allocate memory") || strings.Contains(said, "cannot set up guest memory"):
		return fault.New(fault.Exhausted, spec.Name, "the host cannot give it %d MiB of memory%s", spec.MemoryMiB, said).
			WithHint("stop another VM, or create this one with less --memory")
	}
	return fault.New(fault.Unavailable, spec.Name, "QEMU %s before the machine was ready%s", how, said)
}

// Adopt is vmm.Driver's. fault.Unavailable if the machine runs and its monitor does not answer,
// perhaps because another daemon holds it: nothing was changed then.
func (d *Driver) Adopt(ctx context.Context, spec vmm.Spec) (vmm.Machine, error) {
	if err := spec.ValidateIdentity(); err != nil {
		return nil, err
	}
	dir, err := rundir.Open(spec.RunDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notRunning(err, spec)
	}
	if err == nil {
		dir.Close()
		dir, err = rundir.OpenLocked(ctx, spec.RunDir, spec.Name)
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	m, err := d.adopt(ctx, dir, spec, process.Find)
	if err != nil {
		return nil, err
	}
	return m, nil
}

func notRunning(cause error, spec vmm.Spec) error {
	return fault.Wrap(cause, fault.NotFound, spec.Name, "no QEMU of it runs").WithOp("vmm adopt")
}

// finder is process.Find or process.Open.
type finder func(ctx context.Context, pidfile, marker string) (*process.Process, error)

// adopt finds the machine's process. Called with the run directory locked.
func (d *Driver) adopt(ctx context.Context, dir *rundir.Dir, spec vmm.Spec, find finder) (*machine, error) {
	p, err := find(ctx, dir.Name()+"/"+pidfile, spec.Marker())
	if fault.Is(err, fault.NotFound) {
		if err := clean(dir); err != nil {
			return nil, fault.Wrap(err, fault.Internal, spec.Name, "the run directory cannot be cleaned").WithOp("vmm adopt")
		}
		return nil, notRunning(err, spec)
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.CodeOf(err), spec.Name, "its QEMU cannot be looked for").WithOp("vmm adopt")
	}
	if !p.Carries(nodefaults) { // another VMM runs the machine, or it has just ended
		if err := errors.Join(p.Close(), clean(dir)); err != nil {
			return nil, fault.Wrap(err, fault.Internal, spec.Name, "the run directory cannot be cleaned").WithOp("vmm adopt")
		}
		return nil, notRunning(errors.New("the process with its marker is no QEMU"), spec)
	}
	ctx, cancel := context.WithTimeout(ctx, monitorTime)
	defer cancel()
	m, err := d.attach(ctx, dir, spec, p)
	if err == nil {
		return m, nil
	}
	// A QEMU that is just ending has closed its monitor first.
	if !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		select {
		case <-p.Done():
		case <-time.After(time.Second):
		}
	}
	select {
	case <-p.Done():
		if err := clean(dir); err != nil {
			return nil, fault.Wrap(err, fault.Internal, spec.Name, "the run directory cannot be cleaned").WithOp("vmm adopt")
		}
		return nil, notRunning(err, spec)
	default:
	}
	busy := fault.Wrap(err, fault.Unavailable, spec.Name, "QEMU runs as process %d, but its monitor does not answer; another daemon may hold it", p.PID()).
		WithOp("vmm adopt").WithHint("kill -KILL %d ends it, with what its guest did not write yet", p.PID())
	if err := p.Close(); err != nil {
		return nil, errors.Join(busy, err)
	}
	return nil, busy
}

// attach opens the monitor of a running process, and lets a guest go that has not begun: its daemon
// may have been killed just before that. An error leaves the process as it is and open.
func (d *Driver) attach(ctx context.Context, dir *rundir.Dir, spec vmm.Spec, p *process.Process) (*machine, error) {
	m := newMachine(spec, d.platform, p)
	if _, err := m.monitor.connect(ctx, dir); err != nil {
		m.monitor.leave(m)
		return nil, err
	}
	change, err := m.Last(ctx)
	if err == nil && change.Reason == "prelaunch" {
		if err = m.Resume(ctx); err == nil {
			change = vmm.Change{State: vmm.Running, At: time.Now()}
		}
	}
	if err != nil {
		m.monitor.leave(m)
		return nil, err
	}
	m.report(change)
	go m.watch()
	return m, nil
}

// Sweep is vmm.Sweeper's.
func (d *Driver) Sweep(ctx context.Context, owner, under string, known func(id string) bool) ([]string, error) {
	prefix := vmm.Spec{Owner: owner}.Marker()
	markers, err := process.EndAll(ctx, prefix, under, func(marker string) bool {
		id := strings.TrimPrefix(marker, prefix)
		return !strings.Contains(id, "-") && !known(id) // with a dash it is another owner's whose name begins alike
	})
	for i := range markers {
		markers[i] = strings.TrimPrefix(markers[i], prefix)
	}
	if err != nil {
		return markers, fault.Wrap(err, fault.CodeOf(err), "qemu", "machines without a record cannot be looked for or ended").WithOp("vmm sweep")
	}
	return markers, nil
}

var (
	_ vmm.Driver  = (*Driver)(nil)
	_ vmm.Sweeper = (*Driver)(nil)
)
