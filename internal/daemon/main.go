package daemon

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/version"
)

// Opener makes the backend from settings that were read and directories that were prepared.
type Opener func(ctx context.Context, p config.Paths, c config.Config, log *slog.Logger) (Backend, error)

// Main is the main function of a bangerd: flags, settings, Run. It returns the exit code. A bangerd
// of tests may adjust the options that Run gets.
func Main(args []string, open Opener, adjust ...func(*Options)) int {
	flags := flag.NewFlagSet("bangerd", flag.ContinueOnError)
	showVersion := flags.Bool("version", false, "print the version and exit")
	readyFD := flags.Int("ready-fd", -1, "descriptor to report readiness on (for the CLI)")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "bangerd: %q is no flag\nhint: bangerd --help\n", flags.Arg(0))
		return 2
	}
	if *showVersion {
		fmt.Println("bangerd", version.String())
		return 0
	}
	var ready *os.File
	if *readyFD >= 0 {
		ready = os.NewFile(uintptr(*readyFD), "ready")
	}
	if err := start(context.Background(), ready, open, adjust); err != nil {
		fmt.Fprintln(os.Stderr, "bangerd:", err)
		if hint := fault.HintOf(err); hint != "" {
			fmt.Fprintln(os.Stderr, "hint:", hint)
		}
		return 1
	}
	return 0
}

func start(ctx context.Context, ready *os.File, open Opener, adjust []func(*Options)) error {
	env := config.System()
	paths, err := config.ResolvePaths(env)
	if err != nil {
		Report(ready, err)
		return err
	}
	cfg, warnings, err := config.Load(env, paths, config.Host())
	if err != nil {
		Report(ready, err)
		return err
	}
	o := Options{
		Paths: paths, LogLevel: cfg.LogLevel, Warnings: warnings, Ready: ready, MetricsAddr: cfg.MetricsListenAddr,
		Open: func(ctx context.Context, log *slog.Logger) (Backend, error) {
			if err := paths.EnsureCache(); err != nil {
				return nil, err
			}
			return open(ctx, paths, cfg, log)
		},
	}
	for _, f := range adjust {
		f(&o)
	}
	return Run(ctx, o)
}
