package sandbox

import (
	"context"

	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// The names of the steps, in the order of capabilities: what later ones need, earlier ones make.
const (
	stepImage   = "image"
	stepSystem  = "system disk"
	stepWork    = "work disk"
	stepNetwork = "network"
	stepConfig  = "guest config"
	stepVMM     = "vmm"
	stepAgent   = "agent"
)

// capability owns one kind of host resource of a VM. Whatever else it takes part in, it says by
// implementing the small interfaces below.
type capability interface {
	lifecycle.Step
	// Check looks at what the capability needs from the host and changes nothing. Doctor is this,
	// over the list.
	Check(ctx context.Context) []doctor.Finding
}

// guestContributor puts its part into what the guest is told at boot.
type guestContributor interface {
	GuestConfig(v *vm.VM, c *boot.Config) error
}

// machineContributor puts its part into what the VMM is started with.
type machineContributor interface {
	Machine(ctx context.Context, v *vm.VM, spec *vmm.Spec) error
}

// changeable has a say in a change of a VM's settings.
type changeable interface {
	// CheckChange refuses settings that its resource of v cannot take, and changes nothing. Limits of the
	// settings themselves, and that no disk shrinks, are the domain's and were checked.
	CheckChange(ctx context.Context, v *vm.VM, to vm.Spec) error
}

// liveSetter makes a running VM as its settings say, without disturbing the guest.
type liveSetter interface {
	// ApplySettings is called, in the order of the list, when the settings of a running VM have changed
	// and are on record, and when a paused one goes on. It measures, then acts: it is called again after
	// a crash. An error takes nothing back: the user is told that it holds from the next start on.
	ApplySettings(ctx context.Context, v *vm.VM) error
}

// capabilities is the list that a VM is made of, in order. A new host feature is a line here.
func capabilities(s *Service) []capability {
	config := &guestConfig{service: s}
	parts := []capability{
		&imageCapability{images: s.images},
		&systemDisk{service: s},
		&workDisk{service: s},
		s.network,
		config,
		&machineCapability{machines: s.machines},
		&agentCapability{machines: s.machines},
	}
	config.parts = parts
	return parts
}
