package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"git.thaloco.com/thaloco/banger/internal/console"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// Reconcile brings records and host together at the start of a daemon, before any use case: it
// takes in the VMMs that run, finishes or undoes what a crash left in the middle (in operations of
// their own, so that the daemon answers meanwhile) and removes what belongs to no VM of this
// installation. Disks without a record are reported, never removed. One VM that cannot be
// reconciled is a warning, not an end to the others.
func (s *Service) Reconcile(ctx context.Context, bootID string) error {
	if err := s.ensureBlanks(ctx); err != nil {
		// Everything but making VMs works without them, and doctor and create say so again.
		s.log.Warn("blank disks could not be made", "err", err)
	}
	// An interrupted create goes on capturing from the bundle it began with.
	if err := s.images.refresh(ctx); err != nil && !fault.Is(err, fault.NotFound) {
		s.log.Warn("the runtime bundle cannot be used", "err", err)
	}
	s.watchers.Go(s.followClock)
	// Looking at the VMM runs a program once; now, so that no create does. Create says what is wrong.
	s.watchers.Go(func() { _ = s.driver.Check(s.bg) })
	last, err := s.store.Meta(ctx, "boot_id")
	if err != nil {
		return err
	}
	rebooted := last != "" && bootID != "" && last != bootID
	recorded, err := s.store.Operations(ctx)
	if err != nil {
		return err
	}
	s.ops.Remember(recorded)
	pending := map[vm.ID]operation.Operation{} // the newest unfinished operation of each VM
	for _, op := range recorded {              // newest first
		if op.State != operation.Running {
			continue
		}
		if _, newer := pending[vm.ID(op.VMID)]; newer {
			if err := s.endInterrupted(ctx, op, nil, false); err != nil {
				return err
			}
			continue
		}
		pending[vm.ID(op.VMID)] = op
	}
	s.restoreNetworks(ctx, rebooted)
	for _, v := range s.store.VMs() {
		op, interrupted := pending[v.ID]
		delete(pending, v.ID)
		if err := s.settle(ctx, v, op, interrupted, rebooted); err != nil {
			s.warn(doctor.FixOf(err, "banger daemon restart"), "%s could not be reconciled: %v", v.Name, err)
			s.log.Error("a VM could not be reconciled", "vm", v.ID, "name", v.Name, "err", err)
		}
	}
	// Only now: a crash before this finds the host as rebooted again.
	if bootID != "" && last != bootID {
		if err := s.store.SetMeta(ctx, "boot_id", bootID); err != nil {
			return err
		}
	}
	for _, op := range pending { // of VMs that are gone: a delete that forgot the VM last
		if err := s.endInterrupted(ctx, op, nil, op.Kind == operation.Delete); err != nil {
			return err
		}
	}
	return s.sweep(ctx)
}

// settle finishes one VM. The operation that was interrupted goes on under its id if it is what is
// left to do.
func (s *Service) settle(ctx context.Context, v vm.VM, op operation.Operation, interrupted, rebooted bool) error {
	todo, err := s.engine.Settle(ctx, &v, rebooted)
	if err != nil {
		return err
	}
	if v.Build != nil && !v.Build.Kept {
		// An image that was half built is worth nothing.
		if interrupted {
			if err := s.endInterrupted(ctx, op, nil, false); err != nil {
				return err
			}
		}
		_, err := s.begin(ctx, operation.Delete, v, s.remove)
		return err
	}
	// A set that was interrupted goes on whatever else is left to do, and after it.
	var set func(context.Context, *operation.Handle, *vm.VM) error
	if interrupted && op.Kind == operation.Set {
		r, err := requestOf(op)
		if err != nil {
			s.log.Error("an interrupted operation cannot be finished", "op", op.ID, "err", err)
		} else {
			set = s.set(r, true)
		}
	}
	resume := func(kind operation.Kind, fn func(context.Context, *operation.Handle, *vm.VM) error) error {
		switch {
		case set != nil && kind != operation.Delete:
			op.Stages = nil
			op.Notices = append(op.Notices, "the daemon was restarted meanwhile")
			s.run(op, func(ctx context.Context, h *operation.Handle, v *vm.VM) error {
				if err := fn(ctx, h, v); err != nil {
					return err
				}
				return set(ctx, h, v)
			})
			return nil
		case interrupted && continues(op.Kind, kind):
			op.Stages = nil
			op.Notices = append(op.Notices, "the daemon was restarted meanwhile")
			s.run(op, fn)
			return nil
		case interrupted:
			if err := s.endInterrupted(ctx, op, nil, false); err != nil {
				return err
			}
		}
		_, err := s.begin(ctx, kind, v, fn)
		return err
	}
	// A VMM that ended while nobody looked: the guest may have said why.
	end := ""
	if todo == lifecycle.GoDown && !rebooted && v.State == vm.Running && v.Desired == vm.WantRunning {
		if end = console.End(s.logFile(v.ID), 0); end == vmm.GuestReset {
			todo = lifecycle.Cycle
		}
	}
	// The newest operation is what the user wanted last, also if it had to wait for another one and
	// had not begun.
	if interrupted {
		switch {
		case op.Kind == operation.Delete:
			todo = lifecycle.Remove
		case op.Kind == operation.Stop && (todo == lifecycle.GoUp || todo == lifecycle.Cycle):
			todo = lifecycle.GoDown
		case (op.Kind == operation.Start || op.Kind == operation.Restart) && (v.State == vm.Stopping || v.State == vm.Running) && todo == lifecycle.GoDown && !rebooted:
			todo = lifecycle.Cycle
		}
	}
	if set != nil && (todo == lifecycle.GoUp || todo == lifecycle.Cycle) {
		// It was at its restart, which it does again itself.
		return resume(op.Kind, func(context.Context, *operation.Handle, *vm.VM) error { return nil })
	}
	switch todo {
	case lifecycle.GoUp:
		created := interrupted && op.Kind == operation.Create
		kind := operation.Start
		if interrupted {
			kind = op.Kind
		}
		return resume(kind, func(ctx context.Context, h *operation.Handle, v *vm.VM) error {
			return s.endFailed(ctx, h, v, s.engine.Up(ctx, v, h.Stage), created)
		})
	case lifecycle.Cycle:
		return resume(operation.Restart, func(ctx context.Context, h *operation.Handle, v *vm.VM) error {
			if end != "" {
				h.Notice(endNotes[end] + " while the daemon was away")
			}
			return s.restart(ctx, h, v)
		})
	case lifecycle.Remove:
		return resume(operation.Delete, s.remove)
	case lifecycle.GoDown:
		how, note := lifecycle.Hard, v.Note
		switch {
		case rebooted:
			note = "the host was rebooted"
		case v.State == vm.Running:
			note = "its VMM ended while the daemon was away"
			if end != "" {
				note = endNotes[end] + " while the daemon was away"
			}
		case v.State == vm.Stopping:
			how, note = lifecycle.Orderly, "" // its guest may still run, and hold what is not written yet
		}
		failed := v.State == vm.Failed
		if rebooted && v.Spec.Autostart && v.Desired == vm.WantRunning {
			return resume(operation.Restart, func(ctx context.Context, h *operation.Handle, v *vm.VM) error {
				h.Notice(note)
				v.Note = ""
				if err := s.takeDown(ctx, h, v, how); err != nil {
					return err
				}
				v.State = vm.Stopping // still wanted running: a crash from here on is finished upwards
				if set != nil {
					return nil
				}
				if err := s.roomToRun(); err != nil {
					return s.endFailed(ctx, h, v, err, false)
				}
				return s.bringUp(ctx, h, v)
			})
		}
		return resume(operation.Stop, func(ctx context.Context, h *operation.Handle, v *vm.VM) error {
			failure := v.Failure
			v.Desired, v.Note = vm.WantStopped, note
			if err := s.takeDown(ctx, h, v, how); err != nil {
				return err
			}
			if failed {
				v.State, v.Failure = vm.Failed, failure
			}
			return s.store.Save(context.WithoutCancel(ctx), *v)
		})
	default:
		if v.State == vm.Starting || v.State == vm.Stopping { // nothing was made or all is taken down
			v.State, v.Desired = vm.Stopped, vm.WantStopped
			if err := s.store.Save(ctx, v); err != nil {
				return err
			}
		}
		if !interrupted {
			return nil
		}
		// The operation ended but for its record, or it was taken on and had not begun.
		switch op.Kind {
		case operation.Create:
			if v.State == vm.Defined { // it was not to be started, and its disks may not be there yet
				return resume(op.Kind, s.create)
			}
		case operation.Stop:
			if v.State == vm.Running {
				return resume(op.Kind, func(ctx context.Context, h *operation.Handle, v *vm.VM) error {
					return s.stop(ctx, h, v, lifecycle.Orderly)
				})
			}
		case operation.Start:
			if v.State != vm.Running && !rebooted {
				return resume(op.Kind, s.start)
			}
		case operation.Trim:
			return s.endInterrupted(ctx, op, nil, false)
		case operation.Set:
			if set != nil {
				return resume(op.Kind, func(context.Context, *operation.Handle, *vm.VM) error { return nil })
			}
			return s.endInterrupted(ctx, op, nil, false)
		case operation.Restart:
			done := v.State == vm.Running && v.StartedAt != nil && v.StartedAt.After(op.CreatedAt)
			if !done && !rebooted {
				return resume(op.Kind, s.restart)
			}
		}
		var why *vm.Failure
		if op.Kind == operation.Create {
			why = v.Failure
		}
		return s.endInterrupted(ctx, op, why, !rebooted || op.Kind == operation.Stop)
	}
}

// continues says whether an interrupted operation of kind was is what now has to be done.
func continues(was, now operation.Kind) bool {
	return was == now || now == operation.Restart && was == operation.Start
}

// endInterrupted ends the record of an operation that a dead daemon left running: failed for the
// reason that the VM's record gives, if it has one.
func (s *Service) endInterrupted(ctx context.Context, op operation.Operation, f *vm.Failure, reached bool) error {
	op.State, op.FinishedAt = operation.Succeeded, time.Now()
	switch {
	case f != nil:
		op.State = operation.Failed
		op.Fault = &fault.Error{Code: fault.Code(f.Code), Subject: op.Subject(), Message: f.Message, Hint: f.Hint}
	case !reached:
		op.State = operation.Failed
		op.Fault = fault.New(fault.Cancelled, op.Subject(), "the daemon ended before this %s got anywhere", op.Kind).
			WithHint("type it again")
	}
	if err := s.store.SaveOperation(ctx, op); err != nil {
		return err
	}
	s.ops.Remember([]operation.Operation{op})
	return nil
}

// warning is something found while the daemon ran that is no error of any command.
type warning struct{ text, fix string }

// warn has the daemon's status and doctor tell of something, until the daemon ends. fix says what to type.
func (s *Service) warn(fix, format string, args ...any) {
	s.warnMu.Lock()
	defer s.warnMu.Unlock()
	s.warnings = append(s.warnings, warning{fmt.Sprintf(format, args...), fix})
}

// sweep removes what is left of VMs that have no record: VMMs (no crash leaves one, a database that
// was restored from a backup does), run directories and half-written files. VM directories without a record hold
// disks: they are reported.
func (s *Service) sweep(ctx context.Context) error {
	known := map[string]bool{}
	for _, v := range s.store.VMs() {
		known[string(v.ID)] = true
		known[v.ID.Short()] = true
		if _, err := disk.Sweep(s.vmDir(v.ID)); err != nil {
			return err
		}
	}
	if err := s.images.sweep(ctx); err != nil {
		return err
	}
	// A crash between the capture of a new image and its record, or before a delete had done this, leaves such.
	if err := s.images.collectUnused(ctx); err != nil {
		s.log.Warn("captured artifacts that nothing refers to could not be removed", "err", err)
	}
	if sw, ok := s.driver.(vmm.Sweeper); ok {
		ended, err := sw.Sweep(ctx, s.store.InstallationID(), filepath.Join(s.paths.State, "run"), func(id string) bool { return known[id] })
		for _, id := range ended {
			s.warn("its disks: ls -l "+s.vmDir(vm.ID(id)), "the VMM of a VM that is not in the database was ended (id %s); its disks are kept", vm.ID(id).Short())
			s.log.Warn("a VMM without a record was ended", "vm", id)
		}
		if err != nil { // what runs on is no obstacle to the VMs that are known
			s.warn(doctor.FixOf(err, "banger daemon restart"), "VMMs without a record could not be swept: %v", err)
			s.log.Error("VMMs without a record could not be swept", "err", err)
		}
	}
	if err := s.cgroups.Sweep(ctx); err != nil {
		return err
	}
	run, err := names(filepath.Join(s.paths.State, "run"))
	if err != nil {
		return err
	}
	for _, n := range run {
		if !known[n] {
			if err := os.RemoveAll(filepath.Join(s.paths.State, "run", n)); err != nil {
				return fault.Wrap(err, fault.Internal, n, "a left-over run directory cannot be removed")
			}
		}
	}
	dirs, err := names(s.paths.VMs())
	if err != nil {
		return err
	}
	for _, n := range dirs {
		if !known[n] {
			dir, aside := filepath.Join(s.paths.State, "vms", n), filepath.Join(s.paths.State, "kept")
			s.warn(fmt.Sprintf("mkdir -p %s && mv %s %s/, then banger daemon restart", aside, dir, aside),
				"%s belongs to no VM in the database; it is kept: move it away if you do not want its disks", dir)
		}
	}
	return nil
}

// names lists a directory; one that does not exist is empty.
func names(dir string) ([]string, error) {
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, dir, "the directory cannot be read")
	}
	out := make([]string, len(list))
	for i, e := range list {
		out[i] = e.Name()
	}
	return out, nil
}
