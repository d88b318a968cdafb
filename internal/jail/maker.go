package jail

import (
	"context"
	"os"

	"git.thaloco.com/thaloco/banger/internal/process"
)

// Maker starts Firecrackers in jails, and signals them, which takes root. A Host is one, and what asks the root helper is another.
// fault.Unsupported says that this host, or this filesystem, has no jails; nothing was made then.
type Maker interface {
	// Check says whether a VM whose files are where this open directory is could be started in a jail.
	Check(ctx context.Context, dir *os.File) error
	// Start starts a Firecracker without a machine. The files stay the caller's.
	Start(ctx context.Context, r Request, f Files) (process.Started, error)
	// Find returns the process of a jail. fault.NotFound if none runs. pidfd becomes the caller's.
	Find(ctx context.Context, n Name) (pid int, pidfd *os.File, err error)
	// Signal sends one of Signals to a jail. fault.NotFound if none runs.
	Signal(ctx context.Context, n Name, sig int) error
	// List returns the VMs of an installation at a place that run in jails.
	List(ctx context.Context, installation, place string) (vms []string, err error)
}

var _ Maker = (*Host)(nil)
