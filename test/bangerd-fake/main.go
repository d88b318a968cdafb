// Command bangerd-fake is the daemon for tests that boot nothing: everything is real but the
// machines, which are records in the directory BANGER_FAKE_WORLD (see fakevmm). Its guests run an
// SSH server that knows a few commands. Beside what goes wrong with fake machines, the line "<who> impostor" in
// the faults file has that server show another host key than the VM's.
//
// It is never installed. BANGER_TEST_API_REVISION makes it speak another revision of the API.
package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strconv"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/daemon"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
	"git.thaloco.com/thaloco/banger/test/fakeguest"
)

func main() {
	os.Exit(daemon.Main(os.Args[1:], open, func(o *daemon.Options) {
		if n, err := strconv.Atoi(os.Getenv("BANGER_TEST_API_REVISION")); err == nil {
			o.Revision = n
		}
	}))
}

func open(ctx context.Context, p config.Paths, c config.Config, log *slog.Logger) (daemon.Backend, error) {
	dir := os.Getenv("BANGER_FAKE_WORLD")
	if dir == "" {
		return nil, errors.New("BANGER_FAKE_WORLD is not set")
	}
	world, err := fakevmm.Open(dir)
	if err != nil {
		return nil, err
	}
	if c.DNSListenAddr == config.Defaults(config.Host()).DNSListenAddr {
		c.DNSListenAddr = "127.0.0.1:0" // tests run beside each other, and beside a daemon of the user's
	}
	return sandbox.Open(ctx, sandbox.Options{
		Driver: fakevmm.New(world, fakeguest.Agent(dial, fakeguest.Boot()...)), VMMNotice: "nothing boots: machines are fake",
		Config: c, Paths: p, Host: config.Host(), Log: log,
	})
}
