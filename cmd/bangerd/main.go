// Command bangerd is banger's daemon: one a user, started by the CLI when it is needed. See
// internal/daemon. Under another name it is the network of one VM: see internal/network/usernet.
package main

import (
	"context"
	"log/slog"
	"os"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/daemon"
	"git.thaloco.com/thaloco/banger/internal/network/usernet"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

func main() {
	if os.Args[0] == usernet.Program {
		os.Exit(usernet.Main(os.Args))
	}
	os.Exit(daemon.Main(os.Args[1:], open))
}

func open(ctx context.Context, p config.Paths, c config.Config, log *slog.Logger) (daemon.Backend, error) {
	chosen := choose(ctx, c, jailsOf(ctx, c, os.Geteuid(), log), vmm.KVMUsable)
	return sandbox.Open(ctx, sandbox.Options{
		Driver: chosen.driver, Others: chosen.others, VMMNotice: chosen.notice, Networks: networks(p, c, chosen.driver, os.Geteuid(), findHelper(ctx, os.Geteuid())),
		Config: c, Paths: p, Host: config.Host(), Log: log,
	})
}
