package cli

import (
	"fmt"
	"os"
	"path/filepath"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// place is where the daemon is, or will be.
type place struct {
	socket   string
	stateDir string
	daemon   string // bangerd
	paths    config.Paths
}

func (p place) log() string { return p.paths.DaemonLog() }

// findPlace asks the settings' own code, so that CLI and daemon cannot disagree.
func findPlace() (place, error) {
	paths, err := config.ResolvePaths(config.System())
	if err != nil {
		return place{}, err
	}
	p := place{socket: paths.Socket(), stateDir: paths.State, paths: paths}
	// BANGERD lets tests run a daemon that has a fake VMM.
	if p.daemon = os.Getenv("BANGERD"); p.daemon != "" {
		return p, nil
	}
	exe, err := os.Executable()
	if err != nil {
		return place{}, fault.Wrap(err, fault.Internal, "", "cannot find out where banger lies: %v", err)
	}
	p.daemon = filepath.Join(filepath.Dir(exe), "bangerd")
	return p, nil
}

// defaults are what `vm create` chooses, as text for its help.
type defaults struct{ image, vcpu, memory, disk, system, nat, group string }

// createDefaults reads the settings as the daemon would: no daemon is started for --help.
func createDefaults() defaults {
	e, host := config.System(), config.Host()
	c := config.Defaults(host)
	if paths, err := config.ResolvePaths(e); err == nil {
		// A config file with an error is the daemon's to report: help still helps.
		if loaded, _, err := config.Load(e, paths, host); err == nil {
			c = loaded
		}
	}
	say := func(value string) string { return fmt.Sprintf(" (default %s)", value) }
	nat := ""
	if c.DefaultNAT {
		nat = say("yes")
	}
	group := ""
	if c.DefaultNetworkGroup != "" {
		group = say(c.DefaultNetworkGroup)
	}
	return defaults{
		image:  say("the one marked there"),
		vcpu:   say(fmt.Sprint(c.DefaultVCPU)),
		memory: say(formatBytes(c.DefaultMemoryMiB * vm.MiB)),
		disk:   say(formatBytes(c.DefaultDiskSize)),
		system: say(formatBytes(c.DefaultSystemSize)),
		nat:    nat,
		group:  group,
	}
}
