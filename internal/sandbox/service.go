// Package sandbox owns the use cases (create, start, stop, restart, kill, delete, ...) and the list
// of capabilities that a VM is made of. Front ends call it; it calls lifecycle, which knows the order.
//
// It never talks HTTP, never prints, and executes no program: what a VM costs the host is in the
// capabilities. A VM's record is changed only under that VM's lock.
package sandbox

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"git.thaloco.com/thaloco/banger/internal/cgroup"
	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/console"
	"git.thaloco.com/thaloco/banger/internal/dns"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/store"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// Options are what a Service is made of.
type Options struct {
	Driver vmm.Driver // starts VMs
	// Others find VMs that still run under the VMM that an earlier daemon chose, until they stop.
	Others []vmm.Driver
	// Networks makes the kinds of network that VMs may be on: they are put on the first, the others have VMs of
	// former daemons. nil: none.
	Networks  func(NetworkHost) []Network
	VMMNotice string // why this driver and not a faster one, "" if there is no faster one
	Config    config.Config
	Paths     config.Paths
	Host      vm.Host
	Log       *slog.Logger
}

// Service is the daemon's use cases. Safe for concurrent use.
type Service struct {
	store  *store.Store
	cfg    config.Config
	paths  config.Paths
	host   vm.Host
	log    *slog.Logger
	notice string
	driver vmm.Driver
	others []vmm.Driver

	ops    *operation.Runner
	counts operationCounts
	engine *lifecycle.Engine
	locks  keyedLocks
	hub    hub

	images   *images
	builds   buildLogs
	machines *machines
	cgroups  *cgroup.Host
	ssh      *sshFile
	logs     *console.Keeper // nil if the host has no inotify instance left

	network       *networkCapability
	networks      []Network       // of Options
	networkNotice *doctor.Finding // nil if VMs are where they are to be
	dns           *dns.Server     // nil if none is wanted, or with dnsFault
	dnsFault      error
	links         linkNames

	bg       context.Context // background watchers of machines; ends with Close
	bgStop   context.CancelFunc
	watchers sync.WaitGroup

	warnMu   sync.Mutex
	warnings []warning
}

// New returns a Service over an open store, which it closes in the end. Call Reconcile before the
// first use case.
func New(st *store.Store, o Options) *Service {
	s := &Service{store: st, cfg: o.Config, paths: o.Paths, host: o.Host, log: o.Log, notice: o.VMMNotice, driver: o.Driver, others: o.Others}
	s.bg, s.bgStop = context.WithCancel(context.Background())
	s.ops = operation.NewRunner(s.store.SaveOperation,
		func(op operation.Operation) {
			s.counts.note(op)
			s.hub.publish(Event{Operation: &op})
		},
		func(op operation.Operation, err error) {
			s.log.Error("the end of an operation could not be recorded", "op", op.ID, "vm", op.VMID, "err", err)
		})
	s.ssh = newSSHFile(s)
	s.store.Subscribe(
		func(v vm.VM) { s.hub.publish(Event{VM: &v}); s.ssh.look() },
		func(id vm.ID) { s.hub.publish(Event{Deleted: id}); s.ssh.look() })
	s.store.SubscribeImages(func() { s.hub.publish(Event{imagesChanged: true}) })
	s.images = &images{store: s.store, cfg: o.Config, paths: o.Paths, mu: newCtxLock()}
	s.machines = &machines{service: s, byID: map[vm.ID]*machine{}}
	s.cgroups = cgroup.New(s.store.InstallationID())
	s.openLogKeeper()
	s.links.service = s
	s.network = &networkCapability{service: s}
	if o.Networks != nil {
		s.networks = o.Networks(s.networkHost())
	}
	s.ssh.look()
	s.watchers.Go(func() { s.ssh.keep(s.bg) })

	parts := capabilities(s)
	s.machines.parts = parts
	steps := make([]lifecycle.Step, len(parts))
	for i, c := range parts {
		steps[i] = c
	}
	s.engine = lifecycle.New(s.store, steps...)
	s.openDNS()
	return s
}

// Close suspends running operations (the next daemon goes on with them), lets go of all machines
// without ending them and waits, bounded by ctx.
func (s *Service) Close(ctx context.Context) error {
	err := s.ops.Stop(ctx, lifecycle.ErrSuspended)
	s.bgStop()
	s.machines.closeAll()
	done := make(chan struct{})
	go func() { s.watchers.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		err = errors.Join(err, fault.Wrap(ctx.Err(), fault.Timeout, "watchers", "some did not stop in time"))
	}
	if s.logs != nil {
		err = errors.Join(err, s.logs.Close())
	}
	for _, n := range s.networks {
		err = errors.Join(err, n.Close(ctx))
	}
	if s.dns != nil { // after the networks, which tell the host's resolver that it goes
		err = errors.Join(err, s.dns.Close())
	}
	return errors.Join(err, s.store.Close())
}

// vmDir is where a VM's disks, config drive and log lie.
func (s *Service) vmDir(id vm.ID) string { return s.paths.VM(string(id)) }

// runDir is where a VM's sockets and pidfile lie. It must survive a logout, so it is not below
// XDG_RUNTIME_DIR.
func (s *Service) runDir(id vm.ID) string {
	return s.paths.Run(id.Short())
}

// logFile is the VM's console and VMM output. The name is a promise of the first README, whatever
// the VMM.
func (s *Service) logFile(id vm.ID) string { return filepath.Join(s.vmDir(id), "firecracker.log") }

// errSuperseded is the cause with which a stop or delete ends a start that is under way.
var errSuperseded = errors.New("a later stop or delete took over")

// CreateRequest is what a user asked for. Zero values mean the default.
type CreateRequest struct {
	Name  string
	Image string
	Spec  vm.Spec // its NAT and group are not looked at
	NAT   *bool   // nil: the default
	// NetworkGroup is nil for the default, and empty for none.
	NetworkGroup *string
	NoStart      bool
}

// Defaults are what Create chooses for what is not asked.
type Defaults struct {
	Image string
	Spec  vm.Spec
	Host  vm.Host // what bounds a spec
}

// Detail is a VM with what costs system calls to find out.
type Detail struct {
	VM              vm.VM
	KernelVersion   string
	DiskAllocated   int64
	SystemAllocated int64
	Directory       string
	Log             string
	VMMState        string
	Agent           string // "answers", or why not
	Confinement     *Confinement
	Addresses       []netip.Addr // by which the host reaches it while it runs
}

// Event is one change. Exactly one field is set.
type Event struct {
	Snapshot  *Snapshot
	VM        *vm.VM
	Deleted   vm.ID
	Operation *operation.Operation
	Images    *[]image.Image // all, after one was made, changed or deleted

	imagesChanged bool // Watch fills Images in
}

// Snapshot is the whole state: the first event of every watch.
type Snapshot struct {
	VMs        []vm.VM
	Operations []operation.Operation // running, and those that ended lately
	Images     []image.Image
}

// Status is what the daemon knows of itself.
type Status struct {
	InstallationID    string
	VMM               string
	Accel             string
	VMMNotice         string // why not KVM, "" if it is
	RuntimeDir        string // of the runtime bundle, whether or not one is there
	Total, Running    int
	OperationsRunning int
	DNS               string // address of the server for .vm, "" if there is none
	VMMVersion        string // "" if it is not known
	Network           string // kind of the network that VMs are put on, "" if there is none
	Images            int
	ByState           map[vm.State]int
	Warnings          []string
}

// superseded says whether a later stop or delete ended this operation.
func superseded(ctx context.Context) bool { return errors.Is(context.Cause(ctx), errSuperseded) }

// suspended says whether the daemon's end did.
func suspended(ctx context.Context) bool {
	return errors.Is(context.Cause(ctx), lifecycle.ErrSuspended)
}

// begin records an operation of an existing VM and runs fn in it under the VM's lock, on a fresh
// copy of its record. fn ends with the record saved.
func (s *Service) begin(ctx context.Context, kind operation.Kind, v vm.VM, fn func(context.Context, *operation.Handle, *vm.VM) error) (operation.Operation, error) {
	op := newOperation(kind, v)
	if err := s.store.SaveOperation(ctx, op); err != nil {
		return op, err
	}
	s.run(op, fn)
	return op, nil
}

// beginOver is begin for an operation that does not wait for those of certain kinds: they are ended.
// Only when it is on record: what they were to do is then this one's to finish, whatever happens.
func (s *Service) beginOver(ctx context.Context, ends []operation.Kind, kind operation.Kind, v vm.VM, fn func(context.Context, *operation.Handle, *vm.VM) error) (operation.Operation, error) {
	op := newOperation(kind, v)
	if err := s.store.SaveOperation(ctx, op); err != nil {
		return op, err
	}
	for _, other := range s.ops.AllRunningOf(string(v.ID)) {
		if slices.Contains(ends, other.Kind) {
			_ = s.ops.Cancel(other.ID, errSuperseded) // fault.NotFound only: it ended meanwhile, which is as good
		}
	}
	s.run(op, fn)
	return op, nil
}

// What a stop ends, and what a forced one or a delete ends besides.
var (
	endedByStop  = []operation.Kind{operation.Create, operation.Start, operation.Restart, operation.Set, operation.Trim, operation.ImageBuild}
	anyButDelete = append(slices.Clone(endedByStop), operation.Stop)
)

func newOperation(kind operation.Kind, v vm.VM) operation.Operation {
	return operation.Operation{ID: operation.NewID(), Kind: kind, VMID: string(v.ID), VMName: v.Name,
		State: operation.Running, CreatedAt: time.Now()}
}

// run runs a recorded operation in the background.
func (s *Service) run(op operation.Operation, fn func(context.Context, *operation.Handle, *vm.VM) error) {
	id := vm.ID(op.VMID)
	s.ops.Go(op, lifecycle.ErrSuspended, func(ctx context.Context, h *operation.Handle) (err error) {
		log := s.log.With("op", op.ID, "kind", op.Kind, "vm", op.VMID, "name", op.VMName)
		log.Info("operation begins")
		began := time.Now()
		defer func() {
			switch took := time.Since(began).Milliseconds(); {
			case errors.Is(err, lifecycle.ErrSuspended):
				log.Info("operation is suspended: the next daemon goes on with it", "ms", took)
			case err != nil:
				log.Warn("operation ends with an error", "ms", took, "code", fault.CodeOf(err), "err", err)
			default:
				log.Info("operation ends", "ms", took)
			}
		}()
		unlock, free := s.locks.tryLock(id)
		if !free {
			h.Stage("waiting for another operation of this VM")
			if unlock, err = s.locks.lock(ctx, id); err != nil {
				if suspended(ctx) {
					return lifecycle.ErrSuspended
				}
				return err
			}
		}
		defer unlock()
		v, ok := s.store.VM(id)
		switch {
		case !ok && op.Kind == operation.Delete:
			h.Notice("already deleted")
			return nil
		case !ok:
			return fault.New(fault.NotFound, op.VMName, "the VM was deleted meanwhile")
		case v.Desired == vm.WantDeleted && op.Kind != operation.Delete:
			// Its disks may be gone already: a start would make new ones.
			return fault.New(fault.Precondition, op.VMName, "the VM is being deleted").
				WithHint("finish it with `banger vm delete %s`", op.VMName)
		case ctx.Err() != nil && op.Kind != operation.Create: // a create has made something: its record
			err = context.Cause(ctx)
		default:
			err = fn(ctx, h, &v)
		}
		if err != nil && suspended(ctx) {
			return lifecycle.ErrSuspended
		}
		return err
	})
}

// ctxLock is a mutex whose waiters may give up.
type ctxLock chan struct{}

func newCtxLock() ctxLock { return make(ctxLock, 1) }

func (l ctxLock) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case l <- struct{}{}:
		return func() { <-l }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// keyedLocks are one lock per VM; waiting for one ends with the context. The zero value is ready.
type keyedLocks struct {
	mu    sync.Mutex
	locks map[vm.ID]*keyedLock
}

type keyedLock struct {
	ch   chan struct{}
	refs int
}

func (k *keyedLocks) acquire(id vm.ID) *keyedLock {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.locks == nil {
		k.locks = map[vm.ID]*keyedLock{}
	}
	l := k.locks[id]
	if l == nil {
		l = &keyedLock{ch: make(chan struct{}, 1)}
		k.locks[id] = l
	}
	l.refs++
	return l
}

func (k *keyedLocks) drop(id vm.ID, l *keyedLock) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if l.refs--; l.refs == 0 {
		delete(k.locks, id)
	}
}

func (k *keyedLocks) lock(ctx context.Context, id vm.ID) (unlock func(), err error) {
	l := k.acquire(id)
	select {
	case l.ch <- struct{}{}:
		return func() { <-l.ch; k.drop(id, l) }, nil
	case <-ctx.Done():
		k.drop(id, l)
		return nil, ctx.Err()
	}
}

func (k *keyedLocks) tryLock(id vm.ID) (unlock func(), free bool) {
	l := k.acquire(id)
	select {
	case l.ch <- struct{}{}:
		return func() { <-l.ch; k.drop(id, l) }, true
	default:
		k.drop(id, l)
		return nil, false
	}
}
