package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/jail"
	"git.thaloco.com/thaloco/banger/internal/vmm/firecracker"
)

// jailsOf says who makes the jails of Firecrackers: this process if it is root's, else the root helper, where it is installed with what that
// takes. VMs that run in jails are found and signalled also if no more are to be started in them.
func jailsOf(ctx context.Context, c config.Config, uid int, log *slog.Logger) firecracker.Jails {
	j := firecracker.Jails{Want: c.Jailer != config.JailerOff, Must: c.Jailer == config.JailerOn}
	if !j.Want {
		j.Why = `jailer = "off" in config.toml`
	}
	if uid == 0 {
		h := jail.NewHost(jail.Options{User: uid, Dir: wire.Jails, Programs: func() (jail.Programs, error) { return findJailer(c) }, GiveTAP: hostnet.GiveTAP})
		if err := h.Sweep(ctx); err != nil {
			log.Warn("jails that do not run any more are not forgotten", "err", err)
		}
		j.Jail = h
		return j
	}
	return jailsAt(ctx, j, wire.JailSocket(uid), wire.Socket(uid))
}

// jailsAt is jailsOf for an ordinary user, whose helper listens there, and for networks at another socket.
func jailsAt(ctx context.Context, j firecracker.Jails, socket, networks string) firecracker.Jails {
	if _, err := wire.Probe(ctx, socket); err != nil {
		why, fix := "it takes root, or its helper: "+strings.Join(strings.Fields(err.Error()), " "), fault.HintOf(err)
		if _, none := os.Stat(networks); none == nil && errors.Is(err, fs.ErrNotExist) {
			why, fix = "the root helper was installed without a Firecracker", "make runtime, then "+wire.InstallCommand()
		}
		if j.Want {
			j.Why = why
		}
		j.Want, j.Fix = false, fix
		return j
	}
	j.Jail = helper.NewJailer(socket)
	return j
}

// findJailer says where the jailer of the Firecracker that VMs are started with is: beside it, as in a bundle and in a release. Its error is
// fault.Unsupported.
func findJailer(c config.Config) (p jail.Programs, err error) {
	if p.Firecracker, err = findFirecracker(c); err != nil {
		return p, err
	}
	name := filepath.Base(p.Firecracker)
	if !strings.Contains(name, "firecracker") { // which the jailer wants of it
		return p, fault.New(fault.Unsupported, "jailer", "firecracker_bin is not called firecracker, and has no jailer beside it")
	}
	p.Jailer = filepath.Join(filepath.Dir(p.Firecracker), strings.Replace(name, "firecracker", "jailer", 1))
	if _, err := os.Stat(p.Jailer); err != nil {
		return p, fault.Wrap(err, fault.Unsupported, "jailer", "there is none beside %s", p.Firecracker).WithHint("make runtime brings both")
	}
	return p, nil
}
