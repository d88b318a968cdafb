package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/namegen"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// Create validates, admits the VM in one transaction and starts it in an operation.
// fault.Invalid, Exists, NotFound (image), Exhausted (disk), Corrupt (bundle): nothing was made.
//
// An operation that fails before a guest ever ran takes everything away again; one that fails at
// or after the start of the VMM leaves the VM as failed, for its log to be read.
func (s *Service) Create(ctx context.Context, r CreateRequest) (operation.Operation, error) {
	v, release, err := s.define(ctx, r)
	if err != nil {
		return operation.Operation{}, err
	}
	defer release()
	var op operation.Operation
	for {
		op = newOperation(operation.Create, v)
		_, err := s.store.AdmitVM(ctx, v, op)
		if fault.Is(err, fault.Exists) && r.Name == "" {
			// Somebody took the generated name between the choice and now.
			if v.Name, err = s.generateName(ctx); err != nil {
				return op, err
			}
			continue
		}
		if err != nil {
			return op, err
		}
		break
	}
	s.run(op, s.create)
	return op, nil
}

// define checks everything about a request that can be checked without making anything. What the VM
// is to be made from is kept until release.
func (s *Service) define(ctx context.Context, r CreateRequest) (v vm.VM, release func(), err error) {
	v = vm.VM{ID: vm.NewID(), Name: r.Name, State: vm.Defined, Desired: vm.WantRunning, CreatedAt: time.Now()}
	if r.NoStart {
		v.Desired = vm.WantStopped
	}
	if r.Name != "" {
		if err := vm.ValidateName(r.Name); err != nil {
			return v, nil, err
		}
		if _, taken := s.store.VMByName(r.Name); taken {
			return v, nil, fault.New(fault.Exists, r.Name, "a VM of this name exists").
				WithHint("choose another --name, enter it with `banger vm ssh %s`, or delete it with `banger vm delete %s`", r.Name, r.Name)
		}
	}
	v.Spec = s.fillIn(r.Spec)
	v.Spec.NAT, v.Spec.NetworkGroup = s.cfg.DefaultNAT, s.cfg.DefaultNetworkGroup
	if r.NAT != nil {
		v.Spec.NAT = *r.NAT
	}
	if r.NetworkGroup != nil {
		v.Spec.NetworkGroup = *r.NetworkGroup
	}
	if err := v.Spec.Validate(s.host); err != nil {
		return v, nil, err
	}
	pins, free, err := s.images.pins(ctx, r.Image)
	if err != nil {
		return v, nil, err
	}
	defer func() {
		if err != nil {
			free()
		}
	}()
	v.Pins = pins
	if err := s.images.checkWorkSize(ctx, v.Pins, v.Spec.DiskSize); err != nil {
		return v, nil, err
	}
	if err := s.driver.Check(ctx); err != nil {
		return v, nil, err
	}
	need, err := s.images.captureNeed(ctx, v.Pins)
	if err != nil {
		return v, nil, err
	}
	if err := disk.CheckRoom(s.paths.State, need); err != nil {
		return v, nil, err
	}
	if v.Name == "" {
		if v.Name, err = s.generateName(ctx); err != nil {
			return v, nil, err
		}
	}
	v.Secrets, err = newSecrets()
	return v, free, err
}

func (s *Service) fillIn(spec vm.Spec) vm.Spec {
	d := s.defaultSpec()
	if spec.VCPU == 0 {
		spec.VCPU = d.VCPU
	}
	if spec.MemoryMiB == 0 {
		spec.MemoryMiB = d.MemoryMiB
	}
	if spec.DiskSize == 0 {
		spec.DiskSize = d.DiskSize
	}
	if spec.SystemSize == 0 {
		spec.SystemSize = d.SystemSize
	}
	return spec
}

func (s *Service) defaultSpec() vm.Spec {
	return vm.Spec{VCPU: s.cfg.DefaultVCPU, MemoryMiB: s.cfg.DefaultMemoryMiB,
		DiskSize: s.cfg.DefaultDiskSize, SystemSize: s.cfg.DefaultSystemSize}
}

func (s *Service) generateName(ctx context.Context) (string, error) {
	return namegen.Generator{Program: s.cfg.NamegenPath}.Generate(ctx, func(name string) bool {
		_, ok := s.store.VMByName(name)
		return ok
	})
}

// create is the body of a create operation.
func (s *Service) create(ctx context.Context, h *operation.Handle, v *vm.VM) error {
	if s.notice != "" {
		h.Notice(s.notice)
	}
	for _, n := range v.Spec.Notices(s.host) {
		h.Notice(n)
	}
	if len(s.networks) > 0 && !v.Spec.NAT {
		h.Notice(fmt.Sprintf("it has no way out of the host; `banger vm set %s --nat` gives it one", v.Name))
	}
	defer s.lookAtFirewall(ctx, v.Spec)(h)
	if v.Desired == vm.WantStopped { // --no-start
		if err := s.engine.UpDurable(ctx, v, h.Stage); err != nil {
			return s.endFailed(ctx, h, v, err, true)
		}
		v.State = vm.Stopped
		return s.store.Save(context.WithoutCancel(ctx), *v)
	}
	s.tellOfMemory(h, v)
	err := s.engine.Up(ctx, v, h.Stage)
	return s.endFailed(ctx, h, v, err, true)
}

// endFailed records how an Up that gave up leaves the VM, and returns err. created says that the VM
// is made by this very operation, so that what never ran a guest, or was cancelled, goes away.
func (s *Service) endFailed(ctx context.Context, h *operation.Handle, v *vm.VM, err error, created bool) error {
	if err == nil || suspended(ctx) {
		return err
	}
	left := errors.Is(err, lifecycle.ErrNotUndone)
	free, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if superseded(ctx) && !left {
		v.State, v.Desired = vm.Stopped, vm.WantStopped
		return errors.Join(err, s.store.Save(free, *v))
	}
	cancelled := ctx.Err() != nil
	if created && (cancelled || !ranVMM(err)) {
		if down := s.remove(free, h, v); down != nil {
			return errors.Join(err, down)
		}
		return explain(err, v.Name, created)
	}
	if cancelled && !left {
		v.State, v.Desired = vm.Stopped, vm.WantStopped
		return errors.Join(err, s.store.Save(free, *v))
	}
	err = explain(err, v.Name, created)
	v.State, v.Desired = vm.Failed, vm.WantStopped
	v.Failure = lifecycle.FailureOf(err, time.Now())
	return errors.Join(err, s.store.Save(free, *v))
}

// ranVMM says whether the step that gave up is one that comes with or after the start of the VMM.
func ranVMM(err error) bool {
	var se *lifecycle.StepError
	return errors.As(err, &se) && (se.Step == stepVMM || se.Step == stepAgent)
}

// explain makes the user's error of a step's: what could not be done, why, and what next. The step
// stays in the chain.
func explain(err error, name string, created bool) error {
	f := fault.Wrap(err, fault.CodeOf(err), name, "the VM could not be started")
	if hint := fault.HintOf(err); hint != "" {
		return f.WithHint("%s", hint)
	}
	if created && !ranVMM(err) {
		return f
	}
	return f.WithHint("see what is known with `banger vm show %s`, try again with `banger vm start %s`, or delete it with `banger vm delete %s`", name, name, name)
}

// Start starts a VM by id. Starting a running VM succeeds with the notice "already running"; one
// that its VMM paused (full disk of the host) goes on.
func (s *Service) Start(ctx context.Context, id vm.ID) (operation.Operation, error) {
	v, err := s.known(id)
	if err != nil {
		return operation.Operation{}, err
	}
	return s.begin(ctx, operation.Start, v, s.start)
}

func (s *Service) start(ctx context.Context, h *operation.Handle, v *vm.VM) error {
	if v.State == vm.Running {
		resumed, err := s.machines.resume(ctx, v.ID)
		switch {
		case err != nil:
			return err
		case resumed:
			h.Notice("it was paused and goes on")
			v.Note = ""
			if err := s.store.Save(ctx, *v); err != nil {
				return err
			}
			for _, err := range s.applySettings(ctx, v) { // that were set meanwhile
				h.Notice(guestText(err.Error()))
			}
			return nil
		}
		h.Notice("already running")
		return nil
	}
	if err := s.roomToRun(); err != nil { // before anything is changed
		return err
	}
	if s.notice != "" {
		h.Notice(s.notice)
	}
	s.tellOfMemory(h, v)
	return s.bringUp(ctx, h, v)
}

// tellOfMemory says when the VMs that run, and v with them, may take more memory than the host has. It is no obstacle: few guests
// use all of theirs, and what the kernel does about it otherwise comes as a surprise.
func (s *Service) tellOfMemory(h *operation.Handle, v *vm.VM) {
	all := v.Spec.MemoryMiB
	for _, other := range s.store.VMs() {
		if other.ID != v.ID && other.Desired == vm.WantRunning {
			all += other.Spec.MemoryMiB
		}
	}
	if has := s.host.MemoryMiB; has > 0 && all > has { // 0: not known
		h.Notice(fmt.Sprintf("with it, the VMs that run may take %.1f GiB of memory, and this host has %.1f: where it runs short, the kernel ends one of them (banger vm stats shows what they use)",
			float64(all)/1024, float64(has)/1024))
	}
}

// bringUp records the wish and starts a VM that is down.
func (s *Service) bringUp(ctx context.Context, h *operation.Handle, v *vm.VM) error {
	v.Desired, v.State, v.Note, v.Failure = vm.WantRunning, vm.Starting, "", nil
	err := s.store.Save(ctx, *v)
	if err == nil {
		err = s.engine.Up(ctx, v, h.Stage)
	}
	return s.endFailed(ctx, h, v, err, false)
}

// roomToRun refuses to start a guest that would soon be stopped by a full disk.
func (s *Service) roomToRun() error { return disk.CheckRoom(s.paths.State, 0) }

// Stop shuts a VM down by its agent, then hard when the bound passes. force skips the agent.
// Stopping a stopped VM succeeds with the notice "already stopped". A start that is under way is
// ended first; with force, so is an orderly stop.
func (s *Service) Stop(ctx context.Context, id vm.ID, force bool) (operation.Operation, error) {
	v, err := s.known(id)
	if err != nil {
		return operation.Operation{}, err
	}
	ends := endedByStop
	if force {
		ends = anyButDelete
	}
	return s.beginOver(ctx, ends, operation.Stop, v, func(ctx context.Context, h *operation.Handle, v *vm.VM) error {
		how := lifecycle.Orderly
		if force {
			how = lifecycle.Hard
		}
		return s.stop(ctx, h, v, how)
	})
}

func (s *Service) stop(ctx context.Context, h *operation.Handle, v *vm.VM, how lifecycle.How) error {
	if v.State == vm.Stopped || v.State == vm.Defined {
		h.Notice("already stopped")
		return nil
	}
	v.Desired, v.Note = vm.WantStopped, ""
	if err := s.takeDown(ctx, h, v, how); err != nil {
		return err
	}
	if v.Note != "" { // how it was stopped, if not as asked
		h.Notice(v.Note)
	}
	return s.store.Save(context.WithoutCancel(ctx), *v)
}

// takeDown records the state and brings a VM down to its durable steps. The last change of the
// record is left to the caller to save.
func (s *Service) takeDown(ctx context.Context, h *operation.Handle, v *vm.VM, how lifecycle.How) error {
	v.State = vm.Stopping
	if err := s.store.Save(ctx, *v); err != nil {
		return err
	}
	if err := s.engine.Down(ctx, v, how, false, downStages(h.Stage)); err != nil {
		if suspended(ctx) || superseded(ctx) {
			return err // somebody else goes on from here
		}
		v.State, v.Failure = vm.Failed, lifecycle.FailureOf(err, time.Now())
		return errors.Join(err, s.store.Save(context.WithoutCancel(ctx), *v))
	}
	now := time.Now()
	v.State, v.StoppedAt, v.Failure = vm.Stopped, &now, nil
	return nil
}

// downStages names the stages of a way down: a restart goes through each step twice, and who watches
// must be able to tell the two apart.
func downStages(progress lifecycle.Progress) lifecycle.Progress {
	return func(step string) {
		switch step {
		case "":
			progress("")
		case stepAgent:
			progress("shutdown")
		case stepVMM:
			progress("vmm end")
		default:
			progress(step + " removal")
		}
	}
}

// PowerOff is Stop for a host that goes down: the VM stays wanted, so that it is started after the host's boot if it is set
// to. Until then nothing starts it.
func (s *Service) PowerOff(ctx context.Context, id vm.ID) (operation.Operation, error) {
	v, err := s.known(id)
	if err != nil {
		return operation.Operation{}, err
	}
	return s.beginOver(ctx, endedByStop, operation.Stop, v, func(ctx context.Context, h *operation.Handle, v *vm.VM) error {
		if v.State == vm.Stopped || v.State == vm.Defined {
			h.Notice("already stopped")
			return nil
		}
		v.Note = ""
		if err := s.takeDown(ctx, h, v, lifecycle.Orderly); err != nil {
			return err
		}
		if v.Note != "" {
			h.Notice(v.Note)
		}
		return s.store.Save(context.WithoutCancel(ctx), *v)
	})
}

// Restart stops and starts as one operation. A stopped VM is started.
func (s *Service) Restart(ctx context.Context, id vm.ID) (operation.Operation, error) {
	v, err := s.known(id)
	if err != nil {
		return operation.Operation{}, err
	}
	return s.begin(ctx, operation.Restart, v, s.restart)
}

func (s *Service) restart(ctx context.Context, h *operation.Handle, v *vm.VM) error {
	if err := s.roomToRun(); err != nil { // before anything is changed
		return err
	}
	if s.notice != "" {
		h.Notice(s.notice)
	}
	if v.State == vm.Running || v.State == vm.Stopping {
		if err := s.downForRestart(ctx, h, v); err != nil {
			return err
		}
	}
	return s.bringUp(ctx, h, v)
}

// untilTakenOver is ctx without cancellation by request: a guest that was asked to power off will, so
// going down goes on, and what is cancelled is the way up.
func untilTakenOver(ctx context.Context) (context.Context, func()) {
	down, end := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		if !errors.Is(context.Cause(ctx), operation.ErrCancelled) {
			end(context.Cause(ctx))
		}
	})
	return down, func() { stop(); end(nil) }
}

// Delete takes a VM away in any state, its disks included. A start or stop that is under way is
// ended first.
func (s *Service) Delete(ctx context.Context, id vm.ID) (operation.Operation, error) {
	v, err := s.known(id)
	if err != nil {
		return operation.Operation{}, err
	}
	return s.beginOver(ctx, anyButDelete, operation.Delete, v, s.remove)
}

func (s *Service) remove(ctx context.Context, h *operation.Handle, v *vm.VM) error {
	v.Desired, v.State, v.Note = vm.WantDeleted, vm.Deleting, ""
	if err := s.store.Save(ctx, *v); err != nil {
		return err
	}
	if err := s.engine.Down(ctx, v, lifecycle.Hard, true, downStages(h.Stage)); err != nil {
		if suspended(ctx) {
			return err
		}
		v.Failure = lifecycle.FailureOf(err, time.Now())
		return errors.Join(err, s.store.Save(context.WithoutCancel(ctx), *v))
	}
	ctx = context.WithoutCancel(ctx)
	if err := s.store.Forget(ctx, v.ID); err != nil {
		return err
	}
	// The VM is gone whatever becomes of what only it referred to; that is tried again at the next
	// delete, change of the bundle or start of a daemon.
	if err := s.images.collectUnused(ctx); err != nil {
		s.log.Warn("captured artifacts that nothing refers to could not be removed", "err", err)
	}
	return nil
}

// Kill sends a signal to the VMM process. fault.Precondition if the VM does not run.
func (s *Service) Kill(ctx context.Context, id vm.ID, signal int) (vm.VM, error) {
	v, err := s.known(id)
	if err != nil {
		return v, err
	}
	m := s.machines.get(id)
	if m == nil {
		return v, notRunning(v)
	}
	if err := m.Signal(ctx, signal); err != nil {
		return v, err
	}
	v, err = s.known(id)
	return v, err
}

func notRunning(v vm.VM) error {
	return fault.New(fault.Precondition, v.Name, "the VM does not run (it is %s)", v.State).
		WithHint("banger vm start %s", v.Name)
}

func (s *Service) known(id vm.ID) (vm.VM, error) {
	v, ok := s.store.VM(id)
	if !ok {
		return v, noSuchVM(string(id))
	}
	return v, nil
}

func noSuchVM(ref string) error {
	return fault.New(fault.NotFound, ref, "there is no such VM").WithHint("see what there is with `banger vm list`")
}

// minPrefix is the shortest id prefix that is looked up: shorter ones match by accident.
const minPrefix = 4

// Resolve maps a reference (name, id, unique id prefix of at least 4 digits) to a VM.
// fault.NotFound, fault.Ambiguous.
func (s *Service) Resolve(_ context.Context, ref string) (vm.VM, error) {
	if v, ok := s.store.VMByName(ref); ok {
		return v, nil
	}
	if v, ok := s.store.VM(vm.ID(ref)); ok {
		return v, nil
	}
	var found []vm.VM
	if len(ref) >= minPrefix && strings.Trim(ref, "0123456789abcdef") == "" {
		for _, v := range s.store.VMs() {
			if strings.HasPrefix(string(v.ID), ref) {
				found = append(found, v)
			}
		}
	}
	switch len(found) {
	case 0:
		return vm.VM{}, noSuchVM(ref)
	case 1:
		return found[0], nil
	}
	names := make([]string, len(found))
	for i, v := range found {
		names[i] = v.Name + " (" + v.ID.Short() + ")"
	}
	return vm.VM{}, fault.New(fault.Ambiguous, ref, "this id prefix matches %s", strings.Join(names, ", ")).
		WithHint("type the name, or more digits of the id")
}

// Show is Resolve plus what costs system calls.
func (s *Service) Show(ctx context.Context, ref string) (Detail, error) {
	v, err := s.Resolve(ctx, ref)
	if err != nil {
		return Detail{}, err
	}
	d := Detail{VM: v, Directory: s.vmDir(v.ID), Log: s.logFile(v.ID), Addresses: s.addresses(v.Name)}
	d.KernelVersion = s.KernelVersion(ctx, v.Pins.Kernel)
	// A disk that is not there yet takes no room.
	if d.DiskAllocated, err = disk.Allocated(s.workDisk(v.ID)); err != nil && !fault.Is(err, fault.NotFound) {
		return d, err
	}
	if d.SystemAllocated, err = disk.Allocated(s.systemDisk(v.ID)); err != nil && !fault.Is(err, fault.NotFound) {
		return d, err
	}
	if m := s.machines.get(v.ID); m != nil {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		if st, err := m.State(ctx); err != nil {
			d.VMMState = "unknown: " + err.Error()
		} else {
			d.VMMState = string(st)
		}
		if d.VMMState == string(vmm.Paused) {
			d.Agent = "does not answer: the machine is paused"
		} else {
			d.Agent = s.machines.health(ctx, v.ID)
		}
		d.Confinement = s.machines.confinement(v.ID, m)
	}
	return d, nil
}

// List returns all VMs, oldest first. No system call per VM.
func (s *Service) List(context.Context) ([]vm.VM, error) { return s.store.VMs(), nil }

// RunningOperation returns the id of the operation that runs for a VM, "" if none does.
func (s *Service) RunningOperation(id vm.ID) string { return s.ops.RunningOf(string(id)) }

// KernelVersion returns the version of a captured kernel by its content id, "" if it is not known.
func (s *Service) KernelVersion(ctx context.Context, id string) string {
	version, err := s.images.kernelVersion(ctx, id)
	if err != nil {
		return ""
	}
	return version
}

// Images returns all images, and the name of the default one.
func (s *Service) Images(ctx context.Context) ([]image.Image, string, error) {
	if err := s.images.refresh(ctx); err != nil && !fault.Is(err, fault.NotFound) {
		return nil, "", err
	}
	list, err := s.store.Images(ctx)
	return list, defaultImage, err
}

// Defaults tells what Create chooses.
func (s *Service) Defaults(context.Context) (Defaults, error) {
	spec := s.defaultSpec()
	spec.NAT = s.cfg.DefaultNAT
	return Defaults{Image: defaultImage, Spec: spec, Host: s.host}, nil
}

// Operation returns one operation by id. fault.NotFound.
func (s *Service) Operation(_ context.Context, id string) (operation.Operation, error) {
	return s.ops.Get(id)
}

// Operations returns the running operations and the latest ended ones, newest first.
func (s *Service) Operations(context.Context) ([]operation.Operation, error) {
	return s.ops.List(), nil
}

// WatchOperation calls send with the operation as it is, then after each change, and returns after
// the final state was sent, when ctx ends, or with send's error.
func (s *Service) WatchOperation(ctx context.Context, id string, send func(operation.Operation) error) error {
	return s.ops.Watch(ctx, id, send)
}

// Cancel asks an operation to stop and undo. No effect on one that ended. A stop or delete goes on:
// half of it is no state to be in; fault.Precondition.
func (s *Service) Cancel(_ context.Context, id string) (operation.Operation, error) {
	op, err := s.ops.Get(id)
	if err != nil {
		return op, err
	}
	if op.State == operation.Running {
		if op.Kind == operation.Stop || op.Kind == operation.Delete {
			return op, fault.New(fault.Precondition, id, "a %s cannot be cancelled", op.Kind).
				WithHint("watch it with `banger operation watch %s`", id)
		}
		if err := s.ops.Cancel(id, operation.ErrCancelled); err != nil {
			return op, err
		}
	}
	return s.ops.Get(id)
}

// DialGuest opens a TCP connection to a port on the guest's loopback through the agent, and if it is to wait, does so
// until something listens there or ctx ends; otherwise a port where nobody listens is fault.Unavailable at once. Where the VMM has vsock the connection is backed by a
// descriptor of its own (syscall.Conn); otherwise it is a stream of the daemon's session.
func (s *Service) DialGuest(ctx context.Context, id vm.ID, port int, wait bool) (net.Conn, error) {
	v, session, err := s.reach(ctx, id)
	if err != nil {
		return nil, err
	}
	conn, err := session.DialTCP(ctx, port, wait)
	if err != nil {
		return nil, unreached(v, port, err)
	}
	return conn, nil
}

func unreached(v vm.VM, port int, err error) error {
	return fault.Wrap(err, fault.CodeOf(err), v.Name, "port %d of the guest cannot be reached", port).
		WithHint("see what listens there: banger vm ports %s", v.Name)
}

// DialForward opens a TCP connection to a port on the guest's loopback where something listens now. The stream has frame.Duplex's
// form, so that each direction ends by itself on every VMM, and is backed as DialGuest says. fault.VersionSkew if the guest runs an agent that lacks it.
func (s *Service) DialForward(ctx context.Context, id vm.ID, port int) (net.Conn, error) {
	v, session, err := s.reach(ctx, id)
	if err != nil {
		return nil, err
	}
	conn, err := session.DialForward(ctx, port)
	switch {
	case err == nil:
		return conn, nil
	case fault.Is(err, fault.VersionSkew):
		return nil, lacks(v, wire.KindForward, err)
	}
	return nil, unreached(v, port, err)
}

func lacks(v vm.VM, feature wire.Kind, err error) error {
	return fault.Wrap(err, fault.VersionSkew, v.Name, "its agent lacks the feature %q", feature).WithHint("banger vm restart %s", v.Name)
}

// DialAgent opens a stream of a service of the guest's agent, backed as DialGuest says.
// fault.VersionSkew if the guest runs an agent that lacks it.
func (s *Service) DialAgent(ctx context.Context, id vm.ID, service wire.Kind) (net.Conn, error) {
	v, session, err := s.reach(ctx, id)
	if err != nil {
		return nil, err
	}
	conn, err := session.DialStream(ctx, service)
	switch {
	case err == nil:
		return conn, nil
	case fault.Is(err, fault.VersionSkew):
		return nil, lacks(v, service, err)
	}
	return nil, fault.Wrap(err, fault.CodeOf(err), v.Name, "the guest's agent did not take the request").
		WithHint("see `banger vm show %s`", v.Name)
}

// reach returns the session with the agent of a VM that can be spoken to.
func (s *Service) reach(ctx context.Context, id vm.ID) (vm.VM, *agent.Session, error) {
	v, err := s.known(id)
	if err != nil {
		return v, nil, err
	}
	if err := s.machines.listens(ctx, &v); err != nil {
		return v, nil, err
	}
	session, err := s.machines.session(ctx, id)
	if err != nil {
		return v, nil, fault.Wrap(err, fault.CodeOf(err), v.Name, "the guest's agent does not answer").
			WithHint("see `banger vm show %s`", v.Name)
	}
	return v, session, nil
}

// SSHTarget is what `vm ssh` needs to know.
type SSHTarget struct {
	HostKey      string // to expect, in authorized_keys form without a comment
	IdentityFile string // private key that the VM accepts
	Remind       bool   // to say after a session that the VM still runs
}

// SSHTarget tells how to enter a VM. fault.Precondition if it does not run.
func (s *Service) SSHTarget(_ context.Context, id vm.ID) (SSHTarget, error) {
	v, err := s.known(id)
	if err != nil {
		return SSHTarget{}, err
	}
	if v.State != vm.Running && v.State != vm.Starting {
		return SSHTarget{}, notRunning(v)
	}
	key, err := s.images.identity()
	return SSHTarget{HostKey: v.Secrets.HostKeyPub, IdentityFile: key, Remind: s.cfg.SSHReminder}, err
}

// Status tells what the daemon knows of itself.
func (s *Service) Status(ctx context.Context) (Status, error) {
	images, err := s.store.Images(ctx)
	if err != nil {
		return Status{}, err
	}
	st := Status{InstallationID: s.store.InstallationID(), VMM: s.driver.Name(), Accel: s.driver.Features().Accel, VMMNotice: s.notice, VMMVersion: s.vmmVersion(),
		Images: len(images), ByState: map[vm.State]int{}}
	if len(s.networks) > 0 {
		st.Network = s.networks[0].Kind()
	}
	for _, v := range s.store.VMs() {
		st.Total++
		st.ByState[v.State]++
		if v.State == vm.Running {
			st.Running++
		}
	}
	for _, op := range s.ops.List() {
		if op.State == operation.Running {
			st.OperationsRunning++
		}
	}
	if where, err := bundle.Locate(s.cfg.RuntimeDir); err == nil {
		st.RuntimeDir = where.Dir
	}
	if s.dns != nil {
		st.DNS = s.dns.Addr().String()
	}
	s.warnMu.Lock()
	for _, w := range s.warnings {
		st.Warnings = append(st.Warnings, w.text)
	}
	s.warnMu.Unlock()
	if n := s.networkNotice; n != nil {
		st.Warnings = append(st.Warnings, "network of VMs: "+n.Detail)
	}
	st.Warnings = append(st.Warnings, s.dnsWarnings()...)
	return st, nil
}
