package firecracker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/jail"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// Jails say whether VMs are started in jails.
type Jails struct {
	Jail jail.Maker // nil: there is none
	Want bool       // start VMs in it. Those that were, are found and signalled in any case
	Must bool       // start none without
	Why  string     // why there is none, or why it is not wanted, in one line; "" if there is one
	Fix  string     // a hint on that, if there is one
}

// UseJails has VMs that are started from then on put into jails. Before the driver is used.
func (d *Driver) UseJails(j Jails) { d.jails = j }

// jailDir is the part of a run directory that a jail has.
const jailDir = "jail"

// signalTime bounds the request that a jail be signalled.
const signalTime = 10 * time.Second

// layout says where a machine's files are for its Firecracker. The zero value is for one without a jail.
type layout struct{ jailed bool }

func (l layout) kernel(s vmm.Spec) string {
	if l.jailed {
		return jail.Kernel
	}
	return s.Kernel
}

func (l layout) initrd(s vmm.Spec) string {
	if l.jailed {
		return jail.Initrd
	}
	return s.Initrd
}

func (l layout) drive(d vmm.Drive) string {
	if l.jailed {
		return jail.DrivePath(string(d.Role))
	}
	return d.Path
}

func (l layout) socket(name string) string {
	if l.jailed {
		return path.Join(jail.Run, name)
	}
	return name
}

// started is a Firecracker that waits for its machine.
type started struct {
	process *process.Process
	layout  layout
	socket  *pathWatch    // of its API
	sockets *rundir.Dir   // where its sockets are
	own     bool          // sockets is closed with this
	up      *rundir.First // outlives this if the machine runs
}

// listen waits for what it and its guest will have to say, from before it is started.
func (s *started) listen(spec vmm.Spec) (err error) {
	if s.up, err = s.sockets.ListenFirst(upSocket); err != nil {
		return fault.Wrap(err, fault.Unavailable, spec.Name, "its guest cannot be listened for")
	}
	if s.socket, err = watchFor(s.sockets, apiSocket); err != nil {
		s.up.Close()
		return fault.Wrap(err, fault.Unavailable, spec.Name, "its run directory cannot be watched")
	}
	return nil
}

func (s *started) close() {
	s.socket.close()
	if s.own {
		s.sockets.Close()
	}
}

// jailName is a machine's name among jails. The place tells the run directories of copies of an installation apart.
func jailName(spec vmm.Spec) jail.Name {
	return jail.Name{Installation: spec.Owner, VM: spec.ID, Place: placeOf(filepath.Dir(spec.RunDir))}
}

func placeOf(under string) string {
	if resolved, err := filepath.EvalSymlinks(under); err == nil {
		under = resolved
	}
	sum := sha256.Sum256([]byte(filepath.Clean(under)))
	return hex.EncodeToString(sum[:16])
}

// startJailed starts Firecracker in a jail. locked are the drives that are written, open and locked. Neither a result nor an error: there
// is no jail, and it is to be started without.
func (d *Driver) startJailed(ctx context.Context, dir *rundir.Dir, spec vmm.Spec, locked []*os.File) (_ *started, err error) {
	if why := d.without(); why != nil {
		if d.jails.Must {
			return nil, d.noJail(spec, why)
		}
		d.note(oneLine(why))
		return nil, nil
	}
	name := jailName(spec)
	signal := func(sig int) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), signalTime)
		defer cancel()
		return d.jails.Jail.Signal(ctx, name, sig)
	}
	if err := os.Mkdir(dir.Path(jailDir), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fault.Wrap(err, fault.Unavailable, spec.Name, "its run directory cannot be used")
	}
	s := &started{layout: layout{jailed: true}, own: true}
	if s.sockets, err = rundir.Open(filepath.Join(spec.RunDir, jailDir)); err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, spec.Name, "its run directory cannot be used")
	}
	if err := s.listen(spec); err != nil {
		s.sockets.Close()
		return nil, err
	}
	defer func() {
		if err != nil {
			s.up.Close()
			s.close()
		}
	}()
	if spec.Initrd, err = initrdNear(dir, spec); err != nil {
		return nil, err
	}
	files, request, err := d.jailFiles(spec, s.sockets, locked)
	defer func() { // the locked ones are closed by who opened them
		for _, f := range files.All() {
			if f != nil && !slices.Contains(locked, f) {
				_ = f.Close()
			}
		}
	}()
	if err != nil {
		return nil, err
	}
	s.process, err = process.StartElsewhere(ctx, filepath.Join(dir.Name(), pidfile), spec.Marker(), func(ctx context.Context) (process.Started, error) {
		// Who gives up while it is made would have to wait for it all the same, to end it.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTime)
		defer cancel()
		return d.jails.Jail.Start(ctx, request, files)
	})
	switch {
	case fault.Is(err, fault.Unsupported) && d.jails.Must:
		return nil, d.noJail(spec, err)
	case fault.Is(err, fault.Unsupported):
		d.note(oneLine(err))
		s.up.Close()
		s.close()
		return nil, errors.Join(removeJail(dir), dir.Remove(jailInitrd))
	case err != nil:
		if end := signal(int(unix.SIGKILL)); end != nil && !fault.Is(end, fault.NotFound) && fault.CodeOf(err) != fault.CodeOf(end) {
			err = errors.Join(err, end)
		}
		return nil, err
	}
	d.note("")
	s.process.SignalBy(signal)
	return s, nil
}

// without is why no machine is started in a jail, nil if they are.
func (d *Driver) without() error {
	if !d.jails.Want || d.jails.Jail == nil {
		return errors.New(d.jails.Why)
	}
	// What a machine does is read of its process, which is another user's in a jail (proc(5), hidepid).
	if _, err := os.ReadFile("/proc/1/stat"); err != nil {
		return errors.New("this host hides other users' processes")
	}
	return nil
}

func (d *Driver) noJail(spec vmm.Spec, why error) error {
	return fault.Wrap(why, fault.Unsupported, spec.Name, "it is to run in a jail or not at all, and there is none").WithHint("set jailer = \"auto\" in config.toml, then banger daemon stop; or do what `banger doctor` says of the jail")
}

// note remembers why the last machine was started without a jail.
func (d *Driver) note(why string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.plain = why
}

// jailInitrd is the run directory's copy of an initrd.
const jailInitrd = "initrd.img"

// initrdNear is where the initrd is, or a copy of it in the run directory: caches may be on a filesystem that jails cannot have files of, which the
// state directory is not. It has some megabytes.
func initrdNear(dir *rundir.Dir, spec vmm.Spec) (path string, err error) {
	var here, there unix.Stat_t
	if err := errors.Join(unix.Stat(dir.Path("."), &here), unix.Stat(spec.Initrd, &there)); err != nil || here.Dev == there.Dev {
		return spec.Initrd, nil //nolint:nilerr // whoever opens it says what is wrong
	}
	b, err := os.ReadFile(spec.Initrd)
	if err == nil {
		err = os.WriteFile(dir.Path(jailInitrd), b, 0o600)
	}
	if err != nil {
		return "", fault.Wrap(err, fault.Unavailable, spec.Name, "its initrd %s cannot be copied", spec.Initrd)
	}
	return filepath.Join(spec.RunDir, jailInitrd), nil
}

// jailFiles opens what a jail gets. What was opened is returned with an error as well.
func (d *Driver) jailFiles(spec vmm.Spec, sockets *rundir.Dir, locked []*os.File) (f jail.Files, r jail.Request, err error) {
	r = jail.Request{Name: jailName(spec), VCPU: spec.VCPU, MemoryMiB: spec.MemoryMiB}
	open := func(path string, flags int, what string) *os.File {
		if err != nil {
			return nil
		}
		var file *os.File
		if file, err = os.OpenFile(path, flags, 0o600); err != nil {
			err = fault.Wrap(err, fault.Unavailable, spec.Name, "its %s cannot be opened", what)
			return nil
		}
		return file
	}
	f.Log = open(spec.Log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, "log")
	f.Run = open(sockets.Name(), os.O_RDONLY|unix.O_DIRECTORY, "run directory")
	f.Kernel = open(spec.Kernel, os.O_RDONLY, "kernel")
	f.Initrd = open(spec.Initrd, os.O_RDONLY, "initrd")
	for _, drive := range spec.Drives {
		r.Drives = append(r.Drives, jail.Drive{Role: string(drive.Role), ReadOnly: drive.ReadOnly})
		if drive.ReadOnly {
			f.Drives = append(f.Drives, open(drive.Path, os.O_RDONLY, string(drive.Role)+" disk"))
			continue
		}
		f.Drives = append(f.Drives, locked[0])
		locked = locked[1:]
	}
	for _, n := range spec.NICs {
		if n.TAP != "" {
			r.TAPs = append(r.TAPs, n.TAP)
			continue
		}
		// The directory, since the socket is made anew when the program behind it is.
		f.Net = open(filepath.Dir(n.Socket), os.O_RDONLY|unix.O_DIRECTORY, "network's directory")
		if err == nil {
			err = os.Symlink(path.Join(jail.Net, filepath.Base(n.Socket)), sockets.Path(nicSocket))
		}
	}
	return f, r, err
}

// oneLine renders an error as one line for people.
func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

// removeJail removes what a jail left in a run directory. Fine if there is nothing. What is there was made by a program that a guest may have
// taken over: a directory that its owner may not read does not keep the VM from its next start.
func removeJail(dir *rundir.Dir) error {
	path := dir.Path(jailDir)
	err := os.RemoveAll(path)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	walked := filepath.WalkDir(path, func(path string, d fs.DirEntry, err error) error {
		if d == nil || !d.IsDir() {
			return err
		}
		if err := os.Chmod(path, 0o700); err != nil { // before it is read
			return err
		}
		return nil
	})
	if walked != nil {
		return errors.Join(err, walked)
	}
	return os.RemoveAll(path)
}

// findProcess finds a machine's process: by the pidfile, by its command line if it is this user's, or by the records of jails.
func (d *Driver) findProcess(ctx context.Context, dir *rundir.Dir, spec vmm.Spec, find finder) (*process.Process, error) {
	p, err := find(ctx, filepath.Join(dir.Name(), pidfile), spec.Marker())
	if d.jails.Jail == nil {
		if err == nil && p.Elsewhere() {
			p.SignalBy(func(int) error {
				return fault.New(fault.Unavailable, spec.Name, "it runs in a jail, and who may signal it is not there: %s", d.jails.Why).WithHint("%s", d.jails.Fix)
			})
		}
		return p, err
	}
	name := jailName(spec)
	if fault.Is(err, fault.NotFound) {
		pid, pidfd, jailErr := d.jails.Jail.Find(ctx, name)
		switch {
		case fault.Is(jailErr, fault.NotFound):
			return nil, err
		case jailErr != nil:
			return nil, jailErr
		}
		p, err = process.TakeIn(filepath.Join(dir.Name(), pidfile), spec.Marker(), pid, pidfd)
	}
	if err == nil && p.Elsewhere() {
		p.SignalBy(func(sig int) error {
			ctx, cancel := context.WithTimeout(context.Background(), signalTime)
			defer cancel()
			return d.jails.Jail.Signal(ctx, name, sig)
		})
	}
	return p, err
}

// sweepJails is Sweep for those in jails.
func (d *Driver) sweepJails(ctx context.Context, owner, under string, known func(id string) bool) (ended []string, err error) {
	if d.jails.Jail == nil {
		return nil, nil
	}
	place := placeOf(under)
	vms, err := d.jails.Jail.List(ctx, owner, place)
	if err != nil {
		return nil, err
	}
	for _, id := range vms {
		if known(id) {
			continue
		}
		if err := d.jails.Jail.Signal(ctx, jail.Name{Installation: owner, VM: id, Place: place}, int(unix.SIGKILL)); err != nil && !fault.Is(err, fault.NotFound) {
			return ended, err
		}
		ended = append(ended, id)
	}
	return ended, nil
}

// unjail has the record of a jail dropped whose process has ended. The helper that started it may have gone meanwhile, and does not
// know; asking after the jail has it look. What it does not drop now counts for nothing, and goes with the next question.
func (d *Driver) unjail(ctx context.Context, spec vmm.Spec) {
	if _, pidfd, err := d.jails.Jail.Find(ctx, jailName(spec)); err == nil { // another one has been started
		_ = pidfd.Close()
	}
}

// layout is where this machine's files are for it.
func (m *machine) layout() layout { return layout{jailed: m.process.Elsewhere()} }

// sockets is the directory of its sockets.
func (m *machine) sockets() string {
	if m.process.Elsewhere() {
		return filepath.Join(m.spec.RunDir, jailDir)
	}
	return m.spec.RunDir
}

// Jailed is vmm.Jailed's.
func (m *machine) Jailed() bool { return m.process.Elsewhere() }

// CheckJail is vmm.Jailer's.
func (d *Driver) CheckJail(ctx context.Context, dir string) (jailed bool, why string, err error) {
	if why := d.without(); why != nil {
		if d.jails.Must {
			err = fault.Wrap(why, fault.Unsupported, "jail", "VMs are to run in one or not at all, and there is none").WithHint("%s", d.jails.Fix)
		}
		return false, oneLine(why), err
	}
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return false, "", err
	}
	defer f.Close()
	if err := d.jails.Jail.Check(ctx, f); err != nil {
		return false, oneLine(err), err
	}
	return true, "", nil
}

// NoJail is vmm.Jailer's.
func (d *Driver) NoJail() string {
	d.mu.Lock()
	plain := d.plain
	d.mu.Unlock()
	if plain != "" {
		return plain
	}
	if why := d.without(); why != nil {
		return oneLine(why)
	}
	return "it was started without one"
}
