package main

import (
	"context"
	"os/exec"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/firecracker"
	"git.thaloco.com/thaloco/banger/internal/vmm/qemu"
)

// choice is the VMM that starts VMs, those under which some may run from before, and why it is not a
// faster one ("" if there is none).
type choice struct {
	driver vmm.Driver
	others []vmm.Driver
	notice string
}

// choose picks the VMM by the setting vmm and by what the host can do: Firecracker where KVM is usable
// and a Firecracker is there that works, else QEMU.
func choose(ctx context.Context, c config.Config, jails firecracker.Jails, kvm func() (usable bool, reason string)) choice {
	usable, why := kvm()
	q := qemu.New(usable)
	f := firecracker.New(func() (string, error) { return findFirecracker(c) })
	f.UseJails(jails)
	underQEMU := choice{driver: q, others: []vmm.Driver{f}}
	switch {
	case c.VMM == config.VMMFirecracker: // what is missing, its Check says
		return choice{driver: f, others: []vmm.Driver{q}}
	case !usable:
		underQEMU.notice = "no hardware virtualization (" + why + "): VMs run by emulation, many times slower"
	case c.VMM == config.VMMAuto:
		err := f.Check(ctx)
		if err == nil {
			return choice{driver: f, others: []vmm.Driver{q}}
		}
		underQEMU.notice = "VMs run with QEMU instead of Firecracker, which cannot be used (" + err.Error() + ")"
	}
	return underQEMU
}

// findFirecracker says where the program is: where firecracker_bin says, else in the runtime bundle, else
// in PATH. Its error is a fault with what to do.
func findFirecracker(c config.Config) (string, error) {
	if name := c.FirecrackerBin; name != "" {
		if strings.Contains(name, "/") {
			return name, nil
		}
		path, err := exec.LookPath(name)
		if err != nil {
			return "", fault.Wrap(err, fault.Unavailable, "firecracker", "firecracker_bin names %s, which is not in PATH", name).
				WithOp("vmm check").WithHint("give its path in config.toml, or leave firecracker_bin out")
		}
		return path, nil
	}
	if at, err := bundle.Locate(c.RuntimeDir); err == nil {
		if b, err := bundle.Load(at.Dir); err == nil { // create and doctor say what is wrong with a bundle
			if path := b.Path(bundle.Firecracker); path != "" {
				return path, nil
			}
		}
	}
	path, err := exec.LookPath("firecracker")
	if err != nil {
		return "", fault.Wrap(err, fault.Unavailable, "firecracker", "it is neither in the runtime bundle nor in PATH").
			WithOp("vmm check").WithHint("make runtime brings it; or set firecracker_bin in config.toml")
	}
	return path, nil
}
