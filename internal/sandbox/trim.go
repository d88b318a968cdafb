package sandbox

import (
	"context"
	"fmt"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

const (
	// trimTime bounds a trim that was asked for; the guest may have to go through terabytes.
	trimTime = 2 * time.Minute
	// stopTrimTime bounds that of an orderly stop, for which somebody waits.
	stopTrimTime = 5 * time.Second
)

// Trim makes the guest tell which blocks it does not use, so that they take no room of the host any more.
// fault.Precondition if the VM does not run or is paused; the operation fails with fault.Unsupported if its
// VMM takes no discards.
func (s *Service) Trim(ctx context.Context, id vm.ID) (operation.Operation, error) {
	v, err := s.known(id)
	if err != nil {
		return operation.Operation{}, err
	}
	if err := s.machines.listens(ctx, &v); err != nil {
		return operation.Operation{}, err
	}
	return s.begin(ctx, operation.Trim, v, s.trim)
}

func (s *Service) trim(ctx context.Context, h *operation.Handle, v *vm.VM) error {
	if err := s.machines.listens(ctx, v); err != nil {
		return err
	}
	h.Stage("trim")
	before, err := s.allocated(v.ID)
	if err != nil {
		return err
	}
	// A guest may take long to go through its disks; one that hangs is found out before.
	err = s.ask(ctx, v, "whether it is well", func(ctx context.Context, sess *agent.Session) error {
		_, err := sess.Client().Health(ctx, &agentv1.HealthRequest{})
		return err
	})
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, trimTime)
	defer cancel()
	if err := s.machines.trim(bounded, v); err != nil {
		return err
	}
	after, err := s.allocated(v.ID)
	if err != nil {
		return err
	}
	h.Notice(fmt.Sprintf("%s: %s given back to the host, its disks take %s there", v.Name, vm.FormatSize((before-after)/vm.MiB*vm.MiB), vm.FormatSize(after/vm.MiB*vm.MiB)))
	return nil
}

// allocated is what a VM's disks take of the host, in bytes.
func (s *Service) allocated(id vm.ID) (int64, error) {
	work, err := disk.Allocated(s.workDisk(id))
	if err != nil {
		return 0, err
	}
	system, err := disk.Allocated(s.systemDisk(id))
	return work + system, err
}

// trim asks the guest to discard what its filesystems do not use.
func (ms *machines) trim(ctx context.Context, v *vm.VM) error {
	sess, err := ms.session(ctx, v.ID)
	if err != nil {
		return fault.Wrap(err, fault.CodeOf(err), v.Name, "the guest's agent does not answer").WithHint("banger vm show %s", v.Name)
	}
	r, err := sess.Client().Trim(ctx, &agentv1.TrimRequest{})
	if err != nil {
		return agentFault(ctx, err, v, "trim")
	}
	for _, t := range r.GetTrimmed() {
		if t.GetUnsupported() {
			return fault.New(fault.Unsupported, v.Name, "%s takes no discards: what its guest frees is used again by the guest, and not given back to the host", v.VMM).
				WithHint("vmm = \"qemu\" in config.toml runs it under one that does, from its next start on")
		}
	}
	return nil
}
