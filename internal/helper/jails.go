package helper

import (
	"context"
	"encoding/binary"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/record"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/jail"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/process"
)

// jailVerbs are those of a helper that makes jails.
var jailVerbs = []wire.Verb{wire.JailCheck, wire.JailStart, wire.JailFind, wire.JailSignal, wire.JailList}

// doJail performs a verb of jails. Several are performed at once: they are of different VMs, or the records keep them apart. What it
// returns of descriptors goes with the answer.
func (s *Server) doJail(ctx context.Context, r wire.Request, files []*os.File) (a wire.Answer, out []*os.File, err error) {
	switch {
	case !slices.Contains(jailVerbs, r.Verb):
		return a, nil, invalid("there is no verb %.40q", r.Verb)
	case r.Jail == nil:
		return a, nil, invalid("%s is asked for no jail", r.Verb)
	}
	name := jail.Name{Installation: r.Network.Installation, VM: r.Jail.VM, Place: r.Jail.Place}
	want := map[wire.Verb]int{wire.JailCheck: 1}[r.Verb]
	if r.Verb != wire.JailStart && len(files) != want {
		return a, nil, invalid("%s comes with %d descriptors, not %d", r.Verb, len(files), want)
	}
	var mine *record.Record // nil for an installation that has no network of the helper's
	if record.ID.MatchString(name.Installation) {
		if mine, err = s.own(name.Installation); err != nil {
			return a, nil, err
		}
	}
	switch r.Verb {
	case wire.JailCheck:
		return a, nil, s.o.Jails.Check(ctx, files[0])
	case wire.JailSignal:
		return a, nil, s.o.Jails.Signal(ctx, name, r.Jail.Signal)
	case wire.JailList:
		if err := (jail.Name{Installation: name.Installation, VM: "any", Place: name.Place}).Validate(); err != nil {
			return a, nil, err
		}
		a.VMs, err = s.o.Jails.List(ctx, name.Installation, name.Place)
		return a, nil, err
	case wire.JailFind:
		pid, pidfd, err := s.o.Jails.Find(ctx, name)
		if err != nil {
			return a, nil, err
		}
		a.PID = pid
		return a, []*os.File{pidfd}, nil
	}
	started, err := s.startJail(ctx, name, mine, r, files)
	if err != nil {
		return a, nil, err
	}
	a.PID, a.Start = started.PID, started.Start
	tell, err := statusPipe(started.Exit)
	if err != nil { // no descriptors are left: whoever asked ends it
		_ = started.PIDFD.Close()
		return a, nil, fault.Wrap(err, fault.Exhausted, "root helper", "it cannot hand on what it started")
	}
	return a, []*os.File{started.PIDFD, tell}, nil
}

// statusPipe is where the status of an end can be read: four bytes, the least significant first. Nothing is if this process ends before.
func statusPipe(exit <-chan syscall.WaitStatus) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	go func() {
		defer w.Close()
		if ws, ok := <-exit; ok {
			_, _ = w.Write(binary.LittleEndian.AppendUint32(nil, uint32(ws))) // nobody may listen any more
		}
	}()
	return r, nil
}

// readStatus is the other end of statusPipe. The file stays the caller's.
func readStatus(f *os.File) <-chan syscall.WaitStatus {
	exit := make(chan syscall.WaitStatus, 1)
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(fd, true) // or it takes a thread
	}
	if err != nil {
		close(exit)
		return exit
	}
	r := os.NewFile(uintptr(fd), "status")
	go func() {
		defer close(exit)
		defer r.Close()
		var b [4]byte
		if _, err := io.ReadFull(r, b[:]); err == nil {
			exit <- syscall.WaitStatus(binary.LittleEndian.Uint32(b[:]))
		}
	}()
	return exit
}

func (s *Server) startJail(ctx context.Context, name jail.Name, mine *record.Record, r wire.Request, files []*os.File) (none process.Started, err error) {
	want := jail.Request{Name: name, VCPU: r.Jail.VCPU, MemoryMiB: r.Jail.MemoryMiB}
	for _, d := range r.Jail.Drives {
		want.Drives = append(want.Drives, jail.Drive{Role: d.Role, ReadOnly: d.ReadOnly})
	}
	if err := checkSlots(r.Slots); err != nil {
		return none, err
	}
	if len(r.Slots) > 0 && mine == nil {
		return none, fault.New(fault.Precondition, r.Network.Installation, "it has no network of which a jail could have a device").WithOp("root helper")
	}
	plan := network.Plan{Installation: name.Installation}
	for _, slot := range r.Slots {
		want.TAPs = append(want.TAPs, plan.TAP(slot))
	}
	if err := want.Validate(); err != nil {
		return none, err
	}
	given, err := jail.Restore(want, files)
	if err != nil {
		return none, err
	}
	started, err := s.o.Jails.Start(ctx, want, given)
	if err == nil {
		s.o.Bound(ctx, want, started.PID)
	}
	return started, err
}

// Jailer is a jail.Maker that has the helper make them. Each call is a connection of its own. Safe for concurrent use.
type Jailer struct{ socket string }

var _ jail.Maker = (*Jailer)(nil)

// NewJailer returns a Jailer that speaks to the helper at a socket. It does not connect.
func NewJailer(socket string) *Jailer { return &Jailer{socket} }

// someInstallation stands for one where it does not matter which.
const someInstallation = "000000000000"

// Check says whether a VM whose files are where this directory is could be started in a jail.
func (j *Jailer) Check(ctx context.Context, dir *os.File) error {
	r := wire.Request{Verb: wire.JailCheck, Network: wire.Network{Installation: someInstallation}, Jail: &wire.Jail{}}
	_, _, err := wire.CallFiles(ctx, j.socket, r, []*os.File{dir}, 0)
	return err
}

func request(verb wire.Verb, n jail.Name) wire.Request {
	return wire.Request{Verb: verb, Network: wire.Network{Installation: n.Installation}, Jail: &wire.Jail{VM: n.VM, Place: n.Place}}
}

// Start starts a Firecracker in a jail. The status of its end is told for as long as the helper lives, which ends when it is idle.
func (j *Jailer) Start(ctx context.Context, r jail.Request, f jail.Files) (process.Started, error) {
	q := request(wire.JailStart, r.Name)
	q.Jail.VCPU, q.Jail.MemoryMiB = r.VCPU, r.MemoryMiB
	for _, d := range r.Drives {
		q.Jail.Drives = append(q.Jail.Drives, wire.JailDrive{Role: d.Role, ReadOnly: d.ReadOnly})
	}
	plan := network.Plan{Installation: r.Installation}
	for _, tap := range r.TAPs {
		slot, err := strconv.Atoi(strings.TrimPrefix(tap, plan.TAPPrefix()))
		if err != nil || plan.TAP(slot) != tap {
			return process.Started{}, fault.New(fault.Internal, tap, "the device is not of this installation")
		}
		q.Slots = append(q.Slots, slot)
	}
	a, files, err := wire.CallFiles(ctx, j.socket, q, f.All(), 2)
	if err != nil {
		return process.Started{}, err
	}
	defer files[1].Close()
	return process.Started{PID: a.PID, Start: a.Start, PIDFD: files[0], Exit: readStatus(files[1])}, nil
}

// Find returns the process of a VM's jail.
func (j *Jailer) Find(ctx context.Context, n jail.Name) (pid int, pidfd *os.File, err error) {
	a, files, err := wire.CallFiles(ctx, j.socket, request(wire.JailFind, n), nil, 1)
	if err != nil {
		return 0, nil, err
	}
	return a.PID, files[0], nil
}

// Signal sends a signal to a VM's jail.
func (j *Jailer) Signal(ctx context.Context, n jail.Name, sig int) error {
	r := request(wire.JailSignal, n)
	r.Jail.Signal = sig
	_, err := wire.Call(ctx, j.socket, r)
	return err
}

// List returns the VMs of an installation at a place that run in jails.
func (j *Jailer) List(ctx context.Context, installation, place string) ([]string, error) {
	a, err := wire.Call(ctx, j.socket, request(wire.JailList, jail.Name{Installation: installation, Place: place}))
	return a.VMs, err
}
