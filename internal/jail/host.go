package jail

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/process"
)

// lockTime bounds the wait for the records, which others hold for some milliseconds.
const lockTime = 10 * time.Second

// Options are what a Host is made of.
type Options struct {
	User int    // whose VMs these are
	Dir  string // of root alone: records, and where jails are mounted
	Root string // begins the paths of /etc; "" for the host itself
	// Programs says which programs there are now. Its error is a fault with what to do.
	Programs func() (Programs, error)
	// GiveTAP makes a user the one who may open a TAP of the host.
	GiveTAP func(name string, uid int) error
}

// Host makes the jails of one user on this host, which takes root. Safe for concurrent use, also with the Hosts of other
// processes. What its methods return as not understood or not possible here, before anything was made, is
// fault.Unsupported: the VM may be started without a jail.
type Host struct {
	o Options
	d records
}

// NewHost returns one, and does nothing to the host.
func NewHost(o Options) *Host { return &Host{o: o, d: records(o.Dir)} }

// Check says whether a VM whose files are where this open directory is could be started in a jail. It changes nothing that lasts.
func (h *Host) Check(ctx context.Context, dir *os.File) error {
	p, err := h.programs()
	if err != nil {
		return err
	}
	gid, err := check(dir, h.o.User, dir.Name(), true, false)
	if err != nil {
		return err
	}
	release, err := h.d.lock(ctx)
	if err != nil {
		return err
	}
	release()
	tried := plan{programs: p, base: h.d.path(jailBase), marker: "check", owner: h.o.User, uid: FirstUID,
		mounts: []mount{{at: Run, dir: true}}, files: []*os.File{dir}, gids: []int{gid}}
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return unsupported(err, "unshare")
		}
		unix.Umask(0o077)
		trees, err := detachAll(tried.mounts, tried.files, tried.gids, tried.owner, tried.uid)
		if err != nil {
			return err
		}
		defer closeAll(trees)
		return furnish(tried, trees)
	})
}

func (h *Host) programs() (p Programs, err error) {
	if p, err = h.o.Programs(); err != nil {
		return p, err
	}
	for _, program := range []*string{&p.Firecracker, &p.Jailer} {
		if *program, err = filepath.EvalSymlinks(*program); err != nil { // as the jailer and /proc name it
			return p, fault.Wrap(err, fault.Unsupported, "jailer", "its programs are not there")
		}
	}
	return p, nil
}

// Start starts a VM's Firecracker, which has no machine yet, in a jail; its API is at APISocket of f.Run. fault.Busy if one of that name runs. The process
// outlives this one.
func (h *Host) Start(ctx context.Context, r Request, f Files) (s process.Started, err error) {
	if err := r.Validate(); err != nil {
		return s, err
	}
	gids, err := checkAll(r, f, h.o.User)
	if err != nil {
		return s, err
	}
	p, err := h.programs()
	if err != nil {
		return s, err
	}
	note, err := h.reserve(ctx, r.Name, p)
	if err != nil {
		return s, err
	}
	defer func() {
		if err == nil {
			return
		}
		if left := h.forget(context.WithoutCancel(ctx), note); left != nil { // joined only then: a join hides the hint
			err = errors.Join(err, left)
		}
	}()
	stdin := f.locked(r)
	if stdin == nil {
		if stdin, err = os.Open(os.DevNull); err != nil {
			return s, err
		}
		defer stdin.Close()
	}
	for _, tap := range r.TAPs {
		if err := h.o.GiveTAP(tap, note.UID); err != nil {
			return s, err
		}
	}
	child, pidfd, err := launch(plan{programs: p, base: h.d.path(jailBase), marker: r.Marker(), owner: h.o.User, uid: note.UID,
		mounts: r.mounts(f.Net != nil), files: f.bound(), gids: gids, stdin: stdin, log: f.Log})
	if err != nil {
		for _, tap := range r.TAPs { // it may be started without a jail
			if back := h.o.GiveTAP(tap, h.o.User); back != nil {
				err = errors.Join(err, back)
			}
		}
		return s, err
	}
	note.PID = child.Pid
	if note.Start, err = process.StartTime(child.Pid); err == nil {
		err = h.d.put(note)
	}
	if err != nil {
		kill := child.Kill()
		_, wait := child.Wait()
		return s, errors.Join(err, kill, wait, pidfd.Close())
	}
	exit := make(chan syscall.WaitStatus, 1)
	go func() { // or it would stay behind as a zombie; when this process ends, init does it
		if state, err := child.Wait(); err == nil {
			if ws, ok := state.Sys().(syscall.WaitStatus); ok {
				exit <- ws
			}
		}
		close(exit)
		bounded, cancel := context.WithTimeout(context.Background(), lockTime)
		defer cancel()
		_ = h.forget(bounded, note) // or the next start finds that it is stale
	}()
	return process.Started{PID: note.PID, Start: note.Start, PIDFD: pidfd, Exit: exit}, nil
}

// reserve notes that a jail is about to be made, with a user id for it.
func (h *Host) reserve(ctx context.Context, n Name, p Programs) (record, error) {
	release, err := h.d.lock(ctx)
	if err != nil {
		return record{}, err
	}
	defer release()
	old, err := h.d.get(n.file(h.o.User))
	if err != nil {
		return record{}, err
	}
	if old != nil {
		live, err := h.live(*old, p)
		if err != nil {
			return record{}, err
		}
		if live {
			return record{}, fault.New(fault.Busy, n.about(), "its Firecracker runs in a jail already, or is about to")
		}
		if err := h.d.drop(*old); err != nil {
			return record{}, err
		}
	}
	note := record{Name: n, User: h.o.User, By: os.Getpid()}
	if note.BySince, err = process.StartTime(note.By); err != nil {
		return record{}, err
	}
	free, err := taken(filepath.Join("/", h.o.Root))
	if err != nil {
		return record{}, err
	}
	if note.UID, err = h.d.claim(free, n.file(h.o.User)); err != nil {
		return record{}, err
	}
	if err := h.d.put(note); err != nil {
		return record{}, errors.Join(err, h.d.drop(note))
	}
	return note, nil
}

// live says whether the jail of a record runs, or is being made. Called with the lock. One whose maker was killed is found, and noted.
func (h *Host) live(r record, p Programs) (bool, error) {
	switch {
	case r.PID != 0:
		return runs(r.PID, r.Start), nil
	case runs(r.By, r.BySince):
		return true, nil
	}
	pid, start := r.lost(p.Jailer)
	if pid == 0 {
		return false, nil
	}
	r.PID, r.Start = pid, start
	return true, h.d.put(r)
}

// forget drops a record, unless the name has got another one since.
func (h *Host) forget(ctx context.Context, r record) error {
	release, err := h.d.lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	now, err := h.d.get(r.file(r.User))
	if err != nil {
		return err
	}
	if now != nil && now.UID != r.UID {
		return nil
	}
	return h.d.drop(r)
}

// Find returns the process of a VM's jail. fault.NotFound if none runs. pidfd is the caller's to close.
func (h *Host) Find(ctx context.Context, n Name) (pid int, pidfd *os.File, err error) {
	if err := n.Validate(); err != nil {
		return 0, nil, err
	}
	none := fault.New(fault.NotFound, n.about(), "no jail of it runs")
	if _, err := os.Stat(h.d.path(n.file(h.o.User))); err != nil {
		return 0, nil, none // without the lock, for those who ask about each VM
	}
	release, err := h.d.lock(ctx)
	if err != nil {
		return 0, nil, err
	}
	defer release()
	r, err := h.d.get(n.file(h.o.User))
	if err != nil || r == nil {
		return 0, nil, errors.Join(err, none)
	}
	p, err := h.o.Programs()
	if err != nil {
		p = Programs{} // were taken away; a jail that runs needs none
	}
	live, err := h.live(*r, p)
	if err != nil {
		return 0, nil, err
	}
	if live {
		if r, err = h.d.get(n.file(h.o.User)); err != nil { // with what live has noted
			return 0, nil, err
		}
		if r.PID == 0 {
			return 0, nil, fault.New(fault.Busy, n.about(), "its jail is being made")
		}
		fd, err := unix.PidfdOpen(r.PID, 0)
		if err == nil {
			if runs(r.PID, r.Start) { // still: so the pidfd is its
				return r.PID, os.NewFile(uintptr(fd), "pidfd"), nil
			}
			_ = unix.Close(fd)
		} else if !errors.Is(err, unix.ESRCH) {
			return 0, nil, fault.Wrap(err, fault.Internal, n.about(), "its process cannot be held")
		}
	}
	if err := h.d.drop(*r); err != nil {
		return 0, nil, err
	}
	return 0, nil, none
}

// Signals are those that may be sent to jails: none (is it there?), an end, and to stop and go on.
var Signals = []int{0, int(unix.SIGKILL), int(unix.SIGTERM), int(unix.SIGINT), int(unix.SIGHUP), int(unix.SIGSTOP), int(unix.SIGCONT)}

// Signal sends a signal to a VM's jail. fault.NotFound if none runs.
func (h *Host) Signal(ctx context.Context, n Name, sig int) error {
	if !slices.Contains(Signals, sig) {
		return invalid("signal %d is none that a jail is sent", sig)
	}
	_, pidfd, err := h.Find(ctx, n)
	if err != nil {
		return err
	}
	defer pidfd.Close()
	if err := unix.PidfdSendSignal(int(pidfd.Fd()), unix.Signal(sig), nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fault.Wrap(err, fault.Internal, n.about(), "signal %d", sig)
	}
	return nil
}

// List returns the VMs of an installation at a place that run in jails, and forgets those that do not.
func (h *Host) List(ctx context.Context, installation, place string) (vms []string, err error) {
	all, err := h.d.of(h.o.User)
	if err != nil {
		return nil, err
	}
	for _, r := range all {
		if r.Installation != installation || r.Place != place {
			continue
		}
		_, pidfd, err := h.Find(ctx, r.Name)
		switch {
		case fault.Is(err, fault.NotFound):
		case err != nil:
			return nil, err
		default:
			_ = pidfd.Close()
			vms = append(vms, r.VM)
		}
	}
	return vms, nil
}

// Sweep forgets all jails of this user that do not run any more: those whose process ended while nobody was there to see it.
func (h *Host) Sweep(ctx context.Context) error {
	all, err := h.d.of(h.o.User)
	if err != nil {
		return err
	}
	for _, r := range all {
		_, pidfd, err := h.Find(ctx, r.Name)
		switch {
		case err == nil:
			_ = pidfd.Close()
		case !fault.Is(err, fault.NotFound) && !fault.Is(err, fault.Busy):
			return err
		}
	}
	return nil
}

// everybody calls f for each jail that runs, of all users but root, whose daemon needs no helper.
func everybody(ctx context.Context, dir string, f func(h *Host, n Name) error) error {
	all, err := records(dir).all()
	if err != nil {
		return err
	}
	for _, r := range all {
		if r.User == 0 {
			continue
		}
		h := NewHost(Options{User: r.User, Dir: dir, Programs: func() (Programs, error) { return Programs{}, nil }})
		_, pidfd, err := h.Find(ctx, r.Name)
		if fault.Is(err, fault.NotFound) {
			continue
		}
		if err == nil {
			err = errors.Join(pidfd.Close(), f(h, r.Name))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// CountAll says how many jails run, of all users but root.
func CountAll(ctx context.Context, dir string) (n int, err error) {
	err = everybody(ctx, dir, func(*Host, Name) error { n++; return nil })
	return n, err
}

// EndAll ends all jails of all users but root, with SIGKILL.
func EndAll(ctx context.Context, dir string) error {
	return everybody(ctx, dir, func(h *Host, n Name) error {
		if err := h.Signal(ctx, n, int(unix.SIGKILL)); err != nil && !fault.Is(err, fault.NotFound) {
			return err
		}
		return nil
	})
}

func (n Name) about() string { return fmt.Sprintf("VM %.12s", n.VM) }
