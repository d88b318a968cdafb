// Command bangerd is banger's daemon: one a user, started by the CLI when it is needed. See
// internal/daemon.
package main

import (
	"context"
	"log/slog"
	"os"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/daemon"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/qemu"
)

func main() { os.Exit(daemon.Main(os.Args[1:], open)) }

func open(ctx context.Context, p config.Paths, c config.Config, log *slog.Logger) (daemon.Backend, error) {
	driver, notice, err := chooseDriver(c)
	if err != nil {
		return nil, err
	}
	return sandbox.Open(ctx, sandbox.Options{
		Driver: driver, VMMNotice: notice, Config: c, Paths: p, Host: config.Host(), Log: log,
	})
}

// chooseDriver picks the VMM by the setting vmm and by what the host can do, and says why not a
// faster one.
func chooseDriver(c config.Config) (vmm.Driver, string, error) {
	if c.VMM == config.VMMFirecracker {
		return nil, "", fault.New(fault.Unsupported, "vmm", "this version of banger runs VMs with QEMU only").
			WithHint("set vmm = \"auto\" in config.toml, or leave it out")
	}
	kvm, why := vmm.KVMUsable()
	if kvm {
		return qemu.New(true), "", nil
	}
	return qemu.New(false), "no hardware virtualization (" + why + "): VMs run by emulation, many times slower", nil
}
