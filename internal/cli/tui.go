package cli

import (
	"context"
	"os"
	"os/exec"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/tui"
)

func (a *app) tuiCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "tui",
		Short: "Show all VMs on the whole screen, live, with keys that act on them",
		Long: `Show all VMs on the whole screen: what they do and use, their stages, logs, ports and events, while it
happens. Keys act on the VM under the cursor or on those that are marked; ? shows them all.`,
		Example: `  banger tui
  NO_COLOR=1 banger tui`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.tui(cmd.Context()) },
	}
}

func (a *app) tui(ctx context.Context) error {
	if !a.outTTY || !isatty.IsTerminal(a.stdin.Fd()) || os.Getenv("TERM") == "dumb" {
		what := "a terminal"
		if os.Getenv("TERM") == "dumb" {
			what += " that can be drawn on: TERM is dumb"
		}
		return fault.New(fault.Invalid, "", "banger tui needs %s", what).WithHint("banger vm list, or banger vm list -o json for programs")
	}
	if a.json {
		return fault.New(fault.Invalid, "", "banger tui prints no JSON").WithHint("banger vm list -o json")
	}
	c, err := a.connect()
	if err != nil {
		return err
	}
	follow, err := a.onlooker()
	if err != nil {
		return err
	}
	defer follow.Close()
	// Ctrl-C is a key here; before an SSH session has the terminal it is ssh's. The screen ends by its own keys, or by
	// SIGTERM, which bubbletea takes.
	return tui.Run(context.WithoutCancel(ctx), tui.Options{
		Client: c, Follow: follow, In: a.stdin, Out: a.out, Color: a.color,
		SSH: func(id string) *exec.Cmd { return exec.Command("/proc/self/exe", "vm", "ssh", id) },
	})
}
