package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// SetRequest is a change of a VM's settings. With Restart a VM that runs is stopped and started if the
// change needs that; without, such a change is refused.
type SetRequest struct {
	Change  vm.Change `json:"change"`
	Restart bool      `json:"restart,omitempty"`
}

// The stages of a set, beside those of a restart.
const (
	stageDisks    = "enlarge disks"
	stageSettings = "apply settings"
)

// applyTime bounds what one capability does to a running guest in ApplySettings.
const applyTime = 15 * time.Second

// Set changes the settings of a VM, all that is asked or nothing. The whole change is checked first:
// fault.Invalid (limits, a disk that would shrink) and fault.Precondition (it needs a stop, and r has no
// Restart) mean that nothing was done. Then the request is on record, and is finished whatever happens.
//
// Disks are enlarged, then the settings are recorded, then a running VM is made as they say. What it does
// not take (a guest that hangs) is a notice: it holds from the next start on.
func (s *Service) Set(ctx context.Context, id vm.ID, r SetRequest) (operation.Operation, error) {
	v, err := s.known(id)
	if err != nil {
		return operation.Operation{}, err
	}
	if _, err := s.checkSet(ctx, &v, r); err != nil {
		return operation.Operation{}, err
	}
	op := newOperation(operation.Set, v)
	if op.Request, err = json.Marshal(r); err != nil {
		return op, err
	}
	if err := s.store.SaveOperation(ctx, op); err != nil {
		return op, err
	}
	s.run(op, s.set(r, false))
	return op, nil
}

// checkSet returns the settings after a change, or why it cannot be. It changes nothing.
func (s *Service) checkSet(ctx context.Context, v *vm.VM, r SetRequest) (vm.Spec, error) {
	to, err := r.Change.Apply(v.Spec, s.host)
	if err != nil {
		return to, err
	}
	for _, p := range s.machines.parts {
		if c, ok := p.(changeable); ok {
			if err := c.CheckChange(ctx, v, to); err != nil {
				return to, err
			}
		}
	}
	if cold := vm.NeedsStop(v.Spec, to); len(cold) > 0 && !r.Restart && goesUp(v) {
		return to, fault.New(fault.Precondition, v.Name, "%s can change only while it is stopped (it is %s); nothing was changed", strings.Join(cold, " and "), v.State).
			WithHint("add --restart to stop and start it, or stop it first with `banger vm stop %s`", v.Name)
	}
	return to, nil
}

// goesUp says whether a VM runs or is on its way to.
func goesUp(v *vm.VM) bool {
	return v.State == vm.Running || v.Desired == vm.WantRunning && (v.State == vm.Starting || v.State == vm.Stopping)
}

// set is the body of a set operation. It begins anew after a crash (again), from whatever state it finds.
func (s *Service) set(r SetRequest, again bool) func(context.Context, *operation.Handle, *vm.VM) error {
	return func(ctx context.Context, h *operation.Handle, v *vm.VM) error {
		up := goesUp(v)
		half := up && v.State != vm.Running // a restart of this operation that a crash ended half-way
		to, err := s.checkSet(ctx, v, r)
		if err != nil {
			return err
		}
		if vm.Same(v.Spec, to) && !again {
			h.Notice("already so")
		}
		if v.Spec.VCPU != to.VCPU {
			for _, n := range to.Notices(s.host) {
				h.Notice(n)
			}
		}
		if !v.Spec.NAT {
			s.lookAtFirewall(ctx, to)(h)
		}
		restart := half || up && len(vm.NeedsStop(v.Spec, to)) > 0
		if restart {
			if err := s.roomToRun(); err != nil { // before anything is changed
				return err
			}
			if v.State != vm.Starting {
				if err := s.downForRestart(ctx, h, v); err != nil {
					return err
				}
			}
		}
		if err := s.changeSettings(ctx, h, v, to); err != nil {
			if restart && !suspended(ctx) { // it is down for nothing: as it was, then
				err = errors.Join(err, s.bringUp(ctx, h, v))
			}
			return err
		}
		switch {
		case restart:
			return s.bringUp(ctx, h, v)
		case v.State == vm.Running:
			h.Stage(stageSettings)
			for _, err := range s.applySettings(ctx, v) {
				h.Notice(fmt.Sprintf("%s: it is set, and holds from the next start on: %s", v.Name, guestText(err.Error())))
			}
			h.Stage("")
		}
		return nil
	}
}

// downForRestart takes a VM down to be brought up again by the same operation.
func (s *Service) downForRestart(ctx context.Context, h *operation.Handle, v *vm.VM) error {
	// Wanted running all along: a crash between down and up is finished upwards.
	v.Desired, v.Note = vm.WantRunning, ""
	down, stop := untilTakenOver(ctx)
	defer stop()
	if err := s.takeDown(down, h, v, lifecycle.Orderly); err != nil {
		return err
	}
	if v.Note != "" {
		h.Notice(v.Note)
	}
	v.State = vm.Stopping // until the start is recorded, so that Settle finds a half-done restart
	return nil
}

// changeSettings enlarges the disks and records the settings: all or nothing.
func (s *Service) changeSettings(ctx context.Context, h *operation.Handle, v *vm.VM, to vm.Spec) error {
	var grow []disk.Growth
	for path, size := range map[string]int64{s.systemDisk(v.ID): to.SystemSize, s.workDisk(v.ID): to.DiskSize} {
		if exists(path) { // else it is made with that size when it is first needed
			grow = append(grow, disk.Growth{Path: path, Size: size})
		}
	}
	if v.Spec.SystemSize != to.SystemSize || v.Spec.DiskSize != to.DiskSize {
		h.Stage(stageDisks)
	}
	if err := disk.GrowAll(grow...); err != nil {
		return err
	}
	if vm.Same(v.Spec, to) {
		return nil
	}
	v.Spec = to
	// Not to be ended half-way: the disks are as the record is about to say.
	return s.store.Save(context.WithoutCancel(ctx), *v)
}

// applySettings lets every capability make a running VM as its settings say, and returns what could not
// be done now. What one cannot do keeps no other from its part.
func (s *Service) applySettings(ctx context.Context, v *vm.VM) []error {
	var failed []error
	for _, p := range s.machines.parts {
		c, ok := p.(liveSetter)
		if !ok {
			continue
		}
		bounded, cancel := context.WithTimeout(ctx, applyTime)
		if err := c.ApplySettings(bounded, v); err != nil {
			s.log.Warn("a running VM did not take its settings", "vm", v.ID, "capability", p.Name(), "err", err)
			failed = append(failed, err)
		}
		cancel()
	}
	return failed
}

// requestOf reads what an interrupted set was to do.
func requestOf(op operation.Operation) (SetRequest, error) {
	var r SetRequest
	if err := json.Unmarshal(op.Request, &r); err != nil {
		return r, fault.Wrap(err, fault.Corrupt, op.VMName, "what operation %s was to set is not on record", op.ID)
	}
	return r, nil
}

// CheckChange looks whether the overlay can become as large as asked.
func (d *systemDisk) CheckChange(_ context.Context, v *vm.VM, to vm.Spec) error {
	return checkGrowth("system size", d.service.systemDisk(v.ID), v.Spec.SystemSize, to.SystemSize)
}

// ApplySettings tells the machine how large the overlay is.
func (d *systemDisk) ApplySettings(ctx context.Context, v *vm.VM) error {
	s := d.service
	return s.machines.resize(ctx, v, vmm.Drive{Role: vmm.RoleSystem, Path: s.systemDisk(v.ID)}, v.Spec.SystemSize)
}

// CheckChange looks whether the disk can become as large as asked.
func (d *workDisk) CheckChange(_ context.Context, v *vm.VM, to vm.Spec) error {
	return checkGrowth("disk size", d.service.workDisk(v.ID), v.Spec.DiskSize, to.DiskSize)
}

// ApplySettings tells the machine how large the disk is.
func (d *workDisk) ApplySettings(ctx context.Context, v *vm.VM) error {
	s := d.service
	return s.machines.resize(ctx, v, vmm.Drive{Role: vmm.RoleWork, Path: s.workDisk(v.ID)}, v.Spec.DiskSize)
}

// checkGrowth is disk.CheckGrow about a setting instead of a file. A disk that is not there is made when
// it is first needed.
func checkGrowth(what, path string, from, to int64) error {
	if from == to {
		return nil
	}
	err := disk.CheckGrow(path, to)
	if err == nil || fault.Is(err, fault.NotFound) {
		return nil
	}
	f := fault.Wrap(err, fault.CodeOf(err), what, "its disk cannot become so large")
	if hint := fault.HintOf(err); hint != "" {
		return f.WithHint("%s", hint)
	}
	return f
}

// resize tells a running machine the size of a drive.
func (ms *machines) resize(ctx context.Context, v *vm.VM, drive vmm.Drive, bytes int64) error {
	m := ms.get(v.ID)
	if m == nil {
		return notRunning(*v)
	}
	r, ok := m.Machine.(vmm.Resizer)
	if !ok {
		return fault.New(fault.Unsupported, v.Name, "%s cannot enlarge a disk while it runs", v.VMM)
	}
	return r.Resize(ctx, drive, bytes)
}

// ApplySettings makes the guest grow its filesystems to their drives.
func (c *agentCapability) ApplySettings(ctx context.Context, v *vm.VM) error {
	if err := c.machines.listens(ctx, v); err != nil {
		return err
	}
	sess, err := c.machines.session(ctx, v.ID)
	if err == nil {
		_, err = sess.Client().GrowFilesystems(ctx, &agentv1.GrowFilesystemsRequest{})
	}
	if err != nil {
		return fault.Wrap(err, fault.CodeOf(err), v.Name, "its guest did not grow its filesystems: %s", guestText(err.Error()))
	}
	return nil
}

// listens refuses what a guest cannot hear: it does not run, or is paused. A machine that does not tell its
// state is asked all the same.
func (ms *machines) listens(ctx context.Context, v *vm.VM) error {
	if ms.get(v.ID) == nil {
		return notRunning(*v)
	}
	if st, err := ms.state(ctx, v.ID); err != nil || st != vmm.Paused {
		return nil
	}
	return fault.New(fault.Precondition, v.Name, "%s", pausedNote(v)).WithHint("banger vm start %s", v.Name)
}

// pausedNote says that a VM is paused, and why if that is known.
func pausedNote(v *vm.VM) string {
	if v.Note == "" {
		return "paused"
	}
	return v.Note
}
