// Package firecracker owns how Firecracker is run: its arguments, its API, its run directory, and what
// its end meant.
//
// It starts exactly one program per machine, Firecracker itself, and never creates, grows or repairs a
// disk. Why it does what Firecracker could do otherwise is in docs/decisions/firecracker.md.
//
// A run directory holds firecracker.pid (internal/process), api.sock and agent.sock (the guest's vsock), and agent.sock_1025, which
// leads the guest's frames to its network where that is a socket. The sockets of a Firecracker in a jail are in a directory of their own
// in it, jail, which is all of the run directory that the jail has.
package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/console"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

const (
	// startTime bounds the time from exec to a guest that runs: some ten milliseconds on a quiet machine.
	startTime = 30 * time.Second
	// versionTime bounds --version.
	versionTime = 10 * time.Second
	// apiTime bounds a request to a machine that runs.
	apiTime = 5 * time.Second
	// lockTime bounds the wait for the run directory when a process has ended.
	lockTime = 10 * time.Second
	// killTime bounds a clean-up's wait for a killed process.
	killTime = 10 * time.Second
	// endTime bounds the wait for a process whose API broke, or whose guest is gone: it is about to end.
	endTime = time.Second
)

// Driver is the vmm.Driver of Firecracker. Safe for concurrent use.
type Driver struct {
	find func() (string, error)
	kvm  func() (usable bool, reason string)
	free func(path string) (int64, error)

	jails Jails

	mu      sync.Mutex
	checked checked
	kvmFine bool
	plain   string // why the last machine was started without a jail
}

// checked is what a look at the program found, for as long as the program stays the same.
type checked struct {
	path    string
	size    int64
	mtime   time.Time
	version string
	err     error
	done    bool
}

// New returns a driver. find says where the program is now; its error is a fault whose hint says how
// to get one.
func New(find func() (string, error)) *Driver {
	return &Driver{find: find, kvm: vmm.KVMUsable, free: free}
}

// Name is "firecracker".
func (d *Driver) Name() string { return "firecracker" }

// Features of this driver: it runs with KVM or not at all.
func (d *Driver) Features() vmm.Features {
	return vmm.Features{Accel: "kvm", Vsock: true, NICVsock: true}
}

// Check finds Firecracker, looks at its version and at KVM. The program runs once for that, and again
// only when the file was replaced; a KVM that was usable is not tried again. So Check costs a stat(2)
// before each create.
func (d *Driver) Check(ctx context.Context) error {
	_, err := d.look(ctx)
	return err
}

// look is Check, and returns the program.
func (d *Driver) look(ctx context.Context) (string, error) {
	path, err := d.find()
	if err != nil {
		return "", err
	}
	st, err := os.Stat(path)
	if err != nil {
		return "", fault.Wrap(err, fault.Unavailable, "firecracker", "%s cannot be looked at", path).WithOp("vmm check").WithHint("%s", fix)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	c := checked{path: path, size: st.Size(), mtime: st.ModTime(), done: true}
	if known := d.checked; !known.done || known.path != c.path || known.size != c.size || !known.mtime.Equal(c.mtime) {
		out, err := askVersion(ctx, path)
		if err != nil {
			return "", err
		}
		if m := versionLine.FindStringSubmatch(out); m != nil {
			c.version = m[1]
		}
		c.err = judge(path, out)
		d.checked = c
	}
	if d.checked.err != nil || d.kvmFine {
		return path, d.checked.err
	}
	usable, why := d.kvm()
	if !usable {
		return "", fault.New(fault.Unavailable, "firecracker", "KVM cannot be used: %s", why).
			WithOp("vmm check").WithHint("set vmm = \"auto\" in config.toml: VMs run by emulation then")
	}
	d.kvmFine = true
	return path, nil
}

// Version is vmm.Versioned's.
func (d *Driver) Version() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.checked.version
}

// askVersion runs the program with --version.
func askVersion(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, versionTime)
	defer cancel()
	command := exec.CommandContext(ctx, path, "--version")
	command.WaitDelay = time.Second // for what a wrapper has started
	out, err := command.Output()
	bad := func(cause error, code fault.Code, format string, args ...any) *fault.Error {
		return fault.Wrap(cause, code, "firecracker", format, args...).WithOp("vmm check").WithHint("%s", fix)
	}
	switch {
	case ctx.Err() != nil:
		return "", bad(ctx.Err(), fault.CodeOf(ctx.Err()), "%s --version did not end", path)
	case errors.Is(err, fs.ErrPermission):
		return "", bad(err, fault.Permission, "%s cannot be executed", path).WithHint("chmod +x %s", path)
	case err != nil:
		return "", bad(err, fault.Unavailable, "%s --version does not run", path)
	}
	return string(out), nil
}

// fix is what repairs an installation, whatever is wrong with its Firecracker.
const fix = "make runtime brings one, or set firecracker_bin in config.toml to version 1.12 or newer"

// judge says whether a Firecracker of that --version can be used.
func judge(path, output string) error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Unsupported, "firecracker", format, args...).WithOp("vmm check").WithHint("%s", fix)
	}
	m := versionLine.FindStringSubmatch(output)
	if m == nil {
		return bad("%s is no Firecracker: its --version says %.80q", path, output)
	}
	v, ok := parseVersion(m[1])
	if !ok {
		return bad("%s does not say which version it is: %.80q", path, m[1])
	}
	if !v.atLeast(oldest) {
		return bad("%s is version %s, at least %d.%d is needed", path, m[1], oldest.major, oldest.minor)
	}
	return nil
}

// Start is vmm.Driver's. fault.Unavailable if Firecracker ends before the guest runs or refuses a part of
// the machine, with its own words; fault.Busy if another VMM writes to one of the disks.
func (d *Driver) Start(ctx context.Context, spec vmm.Spec) (vmm.Machine, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	if spec.CID < 3 {
		return nil, fault.New(fault.Invalid, spec.Name, "the vsock context id %d is reserved", spec.CID).WithOp("vmm start")
	}
	sockets := 0
	for _, n := range spec.NICs {
		if n.Socket != "" {
			sockets++
		}
	}
	if sockets > 1 {
		return nil, fault.New(fault.Unsupported, spec.Name, "Firecracker's vsock leads to one socket for a network interface, not to %d", sockets).WithOp("vmm start")
	}
	dir, err := rundir.OpenLocked(ctx, spec.RunDir, spec.Name)
	if err != nil {
		return nil, vmm.StartFailed(err, "Firecracker")
	}
	defer dir.Close()
	// Open, not Find: looking through /proc would make a create cost more with each VM. A Firecracker
	// whose pidfile was lost holds locks on its disks, so that a second one is refused.
	m, err := d.adopt(ctx, dir, spec, process.Open)
	if fault.Is(err, fault.NotFound) {
		m, err = d.launch(ctx, dir, spec)
	}
	if err != nil {
		return nil, vmm.StartFailed(err, "Firecracker")
	}
	return m, nil
}

// clean removes what a Firecracker that is gone left behind. Fine if there is nothing.
func clean(dir *rundir.Dir) error {
	return errors.Join(dir.Remove(apiSocket, agentSocket, nicSocket, upSocket, pidfile, pidfile+".tmp", jailInitrd), removeJail(dir))
}

// linkNIC lets the guest's connections to NICPort end at the socket of its network interface: Firecracker connects to
// the vsock's path with "_" and the port behind it (its docs/vsock.md, "Guest-Initiated Connections"), and follows links.
func linkNIC(dir *rundir.Dir, spec vmm.Spec) error {
	for _, n := range spec.NICs {
		if n.Socket == "" {
			continue
		}
		target := n.Socket
		if filepath.Dir(target) == filepath.Clean(spec.RunDir) {
			target = filepath.Base(target)
		}
		return os.Symlink(target, dir.Path(nicSocket))
	}
	return nil
}

// launch starts Firecracker and its guest. Called with the run directory locked and clean; leaves it
// clean on error.
func (d *Driver) launch(ctx context.Context, dir *rundir.Dir, spec vmm.Spec) (_ *machine, err error) {
	path, err := d.look(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startTime, fmt.Errorf("its Firecracker was not ready after %v", startTime))
	defer cancel()
	defer func() {
		if err != nil {
			if dirty := clean(dir); dirty != nil { // joined only then: a join hides the hint
				err = errors.Join(err, dirty)
			}
		}
	}()
	// Locks that live as long as Firecracker does, which inherits the descriptors.
	files, err := lockDrives(spec)
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	logged := console.Size(spec.Log)
	put := func(context.Context, int) {}
	if spec.Cgroup != nil {
		put = spec.Cgroup(ctx)
	}
	s, err := d.startJailed(ctx, dir, spec, files)
	if s == nil && err == nil {
		s, err = d.startPlain(ctx, dir, spec, files, path)
	}
	if err != nil {
		put(ctx, 0)
		return nil, err
	}
	defer s.close()
	defer func() {
		if err != nil {
			s.up.Close()
		}
	}()
	p := s.process

	// Its group is made while it starts and takes its machine, and is there before the guest runs.
	grouped := make(chan struct{})
	go func() {
		defer close(grouped)
		put(ctx, p.PID())
	}()
	failed := d.configure(ctx, spec, s, grouped)
	<-grouped // bounded by itself
	if failed == nil {
		return d.watchOver(spec, p, logged, s.up), nil
	}
	// Its own end explains more than a broken connection.
	ended := false
	var refused *refusal
	if ctx.Err() == nil && !errors.As(failed, &refused) {
		select {
		case <-p.Done():
			ended = true
		case <-time.After(endTime):
		}
	}
	kill, stop := context.WithTimeout(context.WithoutCancel(ctx), killTime)
	defer stop()
	if err := p.Kill(kill); err != nil {
		return nil, errors.Join(failed, err)
	}
	said := console.Quote(spec.Log, logged)
	switch {
	case ended:
		return nil, tell(spec, p, said)
	case ctx.Err() != nil:
		return nil, fault.Wrap(context.Cause(ctx), fault.CodeOf(ctx.Err()), spec.Name, "Firecracker was started and ended again, its API had not answered%s", said)
	case refused != nil, fault.HintOf(failed) != "":
		return nil, failed
	}
	return nil, fault.Wrap(failed, fault.Unavailable, spec.Name, "Firecracker's API fails%s", said)
}

// startPlain starts Firecracker as this user.
func (d *Driver) startPlain(ctx context.Context, dir *rundir.Dir, spec vmm.Spec, files []*os.File, path string) (_ *started, err error) {
	if err := linkNIC(dir, spec); err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, spec.Name, "the way to its network cannot be laid")
	}
	s := &started{sockets: dir}
	if err := s.listen(spec); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.up.Close()
			s.close()
		}
	}()
	s.process, err = process.Start(ctx, process.Command{
		Path: path, Args: append([]string{path}, arguments(spec)...), Dir: spec.RunDir,
		// Nothing of the daemon's environment is Firecracker's business.
		Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Log: spec.Log, Pidfile: dir.Name() + "/" + pidfile, Marker: spec.Marker(), Files: files,
	})
	if errors.Is(err, fs.ErrPermission) {
		return nil, fault.Wrap(err, fault.Permission, spec.Name, "%s cannot be executed", path).WithHint("chmod +x %s", path)
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, spec.Name, "Firecracker cannot be started").WithHint("%s", fix)
	}
	return s, nil
}

// configure makes the machine by the API of a fresh process and starts its guest once the process is grouped. Only the last
// call runs anything: a daemon that is killed before leaves a process that is ended by the next.
func (d *Driver) configure(ctx context.Context, spec vmm.Spec, s *started, grouped <-chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-s.process.Done():
			cancel() // nobody will answer any more
		case <-ctx.Done():
		}
	}()
	conn, err := s.socket.dial(ctx)
	if err != nil {
		return err
	}
	c := newClient(conn)
	defer c.close()
	var says versionInfo
	if err := c.do(ctx, http.MethodGet, "/version", nil, &says); err != nil {
		return err
	}
	v, ok := parseVersion(says.Version)
	if !ok || !v.atLeast(oldest) { // another one than was looked at
		return fault.New(fault.Unsupported, spec.Name, "its Firecracker says that it is version %.40q, at least %d.%d is needed", says.Version, oldest.major, oldest.minor).
			WithHint("%s", fix)
	}
	for _, r := range requests(spec, s.layout, v) {
		if err := c.do(ctx, r.method, r.path, r.body, nil); err != nil {
			return refusedBy(spec, err, r.about)
		}
	}
	<-grouped
	if err := c.do(ctx, http.MethodPut, "/actions", action{"InstanceStart"}, nil); err != nil {
		return refusedBy(spec, err, "to start with the kernel "+spec.Kernel)
	}
	return nil
}

// refusedBy makes a fault of a refusal, and leaves other errors as they are.
func refusedBy(spec vmm.Spec, err error, about string) error {
	var r *refusal
	if !errors.As(err, &r) {
		return err
	}
	says := func(parts ...string) bool {
		for _, p := range parts {
			if strings.Contains(r.Message, p) {
				return true
			}
		}
		return false
	}
	switch {
	case says("/dev/kvm", "Error creating KVM object") && says("Permission denied", "os error 13"):
		return fault.Wrap(err, fault.Permission, spec.Name, "this user may not open /dev/kvm").
			WithHint("sudo usermod -aG kvm $USER, then log in again")
	case says("Cannot allocate memory", "os error 12"):
		return fault.Wrap(err, fault.Exhausted, spec.Name, "the host cannot give it %d MiB of memory", spec.MemoryMiB).
			WithHint("stop another VM, or create this one with less --memory")
	}
	return fault.Wrap(err, fault.Unavailable, spec.Name, "Firecracker refuses %s", about)
}

// tell makes a fault of a Firecracker that ended by itself at start.
func tell(spec vmm.Spec, p *process.Process, said string) error {
	how := "ended"
	if ws, ok := p.Status(); ok && ws.Signaled() {
		how = fmt.Sprintf("was ended by signal %d (%v)", ws.Signal(), ws.Signal())
	} else if ok {
		how = fmt.Sprintf("ended with status %d", ws.ExitStatus())
	}
	return fault.New(fault.Unavailable, spec.Name, "Firecracker %s before its guest ran%s", how, said).WithHint("%s", fix)
}

// lockDrives opens every drive that is written, for writing alone (jail.Files), with a lock on it: Firecracker itself takes none, and two
// machines that write to one filesystem destroy it. The lock belongs to the open file
// (F_OFD_SETLK of fcntl(2)), so it goes with the last process that has it. It covers the bytes by which
// QEMU tells what it does to an image (its docs/system/images.rst, "Disk image file locking"), so that neither VMM runs over the
// other. fault.Busy if another one holds it. What was opened is returned with an error as well.
func lockDrives(spec vmm.Spec) (files []*os.File, err error) {
	for _, d := range spec.Drives {
		if d.ReadOnly {
			continue
		}
		f, err := os.OpenFile(d.Path, os.O_WRONLY, 0)
		if err != nil {
			return files, fault.Wrap(err, fault.Unavailable, spec.Name, "its %s disk cannot be opened", d.Role)
		}
		files = append(files, f)
		const first, past = 100, 300 // QEMU's block/file-posix.c: RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE
		lock := unix.Flock_t{Type: unix.F_WRLCK, Start: first, Len: past - first}
		err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
			return files, fault.Wrap(err, fault.Busy, spec.Name, "another program uses its %s disk %s", d.Role, d.Path)
		case err != nil:
			return files, fault.Wrap(err, fault.Unavailable, spec.Name, "its %s disk %s cannot be locked", d.Role, d.Path)
		}
	}
	return files, nil
}

// Adopt is vmm.Driver's. A process that has no guest is ended.
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
	return fault.Wrap(cause, fault.NotFound, spec.Name, "no Firecracker of it runs").WithOp("vmm adopt")
}

// finder is process.Find or process.Open.
type finder func(ctx context.Context, pidfile, marker string) (*process.Process, error)

// adopt finds the machine's process. Called with the run directory locked.
func (d *Driver) adopt(ctx context.Context, dir *rundir.Dir, spec vmm.Spec, find finder) (*machine, error) {
	gone := func(cause error) error {
		if err := clean(dir); err != nil {
			return fault.Wrap(err, fault.Internal, spec.Name, "the run directory cannot be cleaned").WithOp("vmm adopt")
		}
		return notRunning(cause, spec)
	}
	p, err := d.findProcess(ctx, dir, spec, find)
	if fault.Is(err, fault.NotFound) {
		return nil, gone(err)
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.CodeOf(err), spec.Name, "its Firecracker cannot be looked for").WithOp("vmm adopt")
	}
	if !p.Carries(apiFlag) { // another VMM runs the machine, or it has just ended
		if err := p.Close(); err != nil {
			return nil, err
		}
		return nil, gone(errors.New("the process with its marker is no Firecracker"))
	}
	if p.Stopped() { // it answers nothing, and did run
		return d.watchOver(spec, p, 0, nil), nil
	}
	if hasGuest(p.PID()) {
		return d.watchOver(spec, p, 0, nil), nil
	}
	// Its daemon was killed in the middle of the start, or it is just ending: there is no guest to lose.
	select {
	case <-p.Done():
	case <-time.After(endTime):
	}
	bounded, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	if err := p.Kill(bounded); err != nil {
		return nil, errors.Join(fault.Wrap(err, fault.CodeOf(err), spec.Name, "its Firecracker, which has no guest, cannot be ended").WithOp("vmm adopt"), p.Close())
	}
	return nil, gone(errors.New("its Firecracker had no guest"))
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
	if err == nil {
		var jailed []string
		jailed, err = d.sweepJails(ctx, owner, under, known)
		markers = append(markers, jailed...)
	}
	if err != nil {
		return markers, fault.Wrap(err, fault.CodeOf(err), "firecracker", "machines without a record cannot be looked for or ended").WithOp("vmm sweep")
	}
	return markers, nil
}

var (
	_ vmm.Driver  = (*Driver)(nil)
	_ vmm.Sweeper = (*Driver)(nil)
	_ vmm.Jailer  = (*Driver)(nil)
)
