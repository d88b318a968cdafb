package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

const (
	// admitTime bounds the call that admits a VM, which a Ctrl-C does not cut short.
	admitTime = 30 * time.Second
	// removeTime bounds how long --rm waits for the end of its delete. The delete goes on in the daemon.
	removeTime = 2 * time.Minute
)

// endings are the signals with which a person, or who started banger, ends it.
var endings = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}

// run is what `vm run` was asked for.
type run struct {
	request *bangerv1.CreateVMRequest
	command []string // empty: a shell by SSH
	remove  bool     // --rm
	quiet   bool
}

func (a *app) runCommand() *cobra.Command {
	var (
		flags         *createFlags
		remove, quiet bool
	)
	cmd := &cobra.Command{
		Use:   "run [flags] [-- COMMAND [ARG...]]",
		Short: "Make a VM, or take the one of that name, and enter it",
		Long: `Make a VM, wait until it can be entered, and enter it: by SSH, or to run one command in it as banger vm exec
does, with its exit code. A VM that has the name already is taken as it is, and started if it is stopped; it must be
as the flags say.

With --rm the VM is deleted afterwards, its disks with it, whatever happened: also if it did not start, if the command
failed, and after Ctrl-C. --rm never deletes a VM that was there before.`,
		Example: `  banger vm run
  banger vm run --name calm-otter
  banger vm run --rm -- uname -a
  banger vm run --name ci --memory 4G -- sh -c 'cd /root/project && make test'`,
		Args: func(cmd *cobra.Command, args []string) error {
			dash := cmd.ArgsLenAtDash()
			switch {
			case dash < 0 && len(args) > 0, dash > 0:
				return usage(cmd, "a name is given as --name %s, and a command after --", args[0])
			case dash == 0 && len(args) == 0:
				return usage(cmd, "there is no command after --")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := flags.request(cmd)
			if err != nil {
				return err
			}
			return a.runVM(cmd.Context(), run{request: r, command: args, remove: remove, quiet: quiet})
		},
	}
	flags = addCreateFlags(cmd)
	f := cmd.Flags()
	f.BoolVar(&remove, "rm", false, "delete the VM afterwards, whatever happened")
	f.BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	return cmd
}

func (a *app) runVM(ctx context.Context, r run) (err error) {
	c, err := a.connect()
	if err != nil {
		return err
	}
	if r.remove {
		// A terminal that is closed ends us as Ctrl-C does: with the VM deleted. And nothing ends us before
		// the daemon has been told, however often Ctrl-C is typed.
		var stop context.CancelFunc
		ctx, stop = signal.NotifyContext(ctx, syscall.SIGHUP)
		defer stop()
		held := make(chan os.Signal, 1)
		signal.Notify(held, endings...)
		defer signal.Stop(held)
	}
	v, op, err := a.takeOrMake(ctx, c, r)
	if err != nil {
		return err
	}
	if r.remove {
		defer func() {
			removal := a.removeAfter(ctx, c, v)
			if removal == nil {
				return
			}
			a.printError(removal) // what went wrong before it decides how the command ends
			if exitCode(err) == exitOK {
				err = reported{exitCode(removal)}
			}
		}()
	}
	if op != nil {
		last, err := a.follow(ctx, c, op, r.quiet)
		if err != nil {
			if errors.Is(err, errInterrupted) && !r.remove {
				a.goesOn(op)
				return reported{exitInterrupted}
			}
			return err
		}
		if !r.quiet && !a.json {
			for _, n := range last.GetNotices() {
				if !strings.HasPrefix(n, "already ") {
					fmt.Fprintln(a.stderr, n)
				}
			}
		}
	}
	if ctx.Err() != nil {
		return errInterrupted
	}
	if len(r.command) == 0 {
		return a.ssh(ctx, v.GetId(), nil, !r.remove)
	}
	terminal := isatty.IsTerminal(a.stdin.Fd()) && a.outTTY
	return a.exec(ctx, v.GetId(), client.Command{Args: r.command, TTY: terminal}, true)
}

// takeOrMake gives the VM, and the operation that brings it up: none if it runs.
func (a *app) takeOrMake(ctx context.Context, c *client.Client, r run) (*bangerv1.VM, *bangerv1.Operation, error) {
	if r.request.GetName() != "" {
		v, op, err := a.take(ctx, c, r)
		if v != nil || err != nil {
			return v, op, err
		}
	}
	// Whether a call that Ctrl-C cut short has made a VM, nobody could tell afterwards: it is short, and is not.
	admit, cancel := context.WithTimeout(context.WithoutCancel(ctx), admitTime)
	defer cancel()
	resp, err := c.VMs.CreateVM(admit, r.request)
	if r.request.GetName() != "" && fault.Is(err, fault.Exists) { // another one was quicker
		v, op, takeErr := a.take(ctx, c, r)
		if v != nil || takeErr != nil {
			return v, op, takeErr
		}
	}
	if err != nil {
		return nil, nil, err
	}
	op := resp.GetOperation()
	return &bangerv1.VM{Id: op.GetVmId(), Name: op.GetVmName()}, op, nil
}

// take gives the VM that has the name, and the operation that starts it if it does not run; neither if there is none.
func (a *app) take(ctx context.Context, c *client.Client, r run) (*bangerv1.VM, *bangerv1.Operation, error) {
	resp, err := c.VMs.ResolveVMs(ctx, &bangerv1.ResolveVMsRequest{Refs: []string{r.request.GetName()}})
	if err != nil {
		return nil, nil, err
	}
	found := resp.GetResults()[0]
	v := found.GetVm()
	switch f := client.FromFault(found.GetFault()); {
	case fault.Is(f, fault.NotFound):
		return nil, nil, nil
	case f != nil && !fault.Is(f, fault.Ambiguous):
		return nil, nil, f
	case v.GetName() != r.request.GetName(): // a reference may be the start of an id, too
		return nil, nil, nil
	}
	if r.remove {
		return nil, nil, fault.New(fault.Exists, v.GetName(), "there is such a VM already, and --rm deletes only what it made").
			WithHint("another --name, or no --rm and then: banger vm delete %s", v.GetName())
	}
	if what := unlike(v, r.request); what != "" {
		return nil, nil, fault.New(fault.Precondition, v.GetName(), "it exists already, with %s", what).
			WithHint("leave the flag out, or change it: banger vm set %s", v.GetName())
	}
	if v.GetState() == "running" && v.GetNote() == "" { // a note may say that it is paused
		return v, nil, nil
	}
	started, err := c.VMs.StartVM(ctx, &bangerv1.StartVMRequest{Id: v.GetId()})
	return v, started.GetOperation(), err
}

// unlike says what about a VM is not as asked; "" if nothing is. What was not asked for may be anything.
func unlike(v *bangerv1.VM, r *bangerv1.CreateVMRequest) string {
	size := func(what string, have, want int64) string {
		if want == 0 || have == want {
			return ""
		}
		return fmt.Sprintf("%s of %s and not %s", what, formatBytes(have), formatBytes(want))
	}
	switch {
	case r.GetImage() != "" && r.GetImage() != v.GetImage() && r.GetImage() != v.GetImageId():
		return fmt.Sprintf("image %s and not %s", v.GetImage(), r.GetImage())
	case r.GetVcpu() != 0 && r.GetVcpu() != v.GetVcpu():
		return fmt.Sprintf("%d virtual CPUs and not %d", v.GetVcpu(), r.GetVcpu())
	case r.Nat != nil && r.GetNat() != v.GetNat():
		return map[bool]string{true: "NAT", false: "no NAT"}[v.GetNat()]
	}
	for key, value := range r.GetLabels() {
		if have, ok := v.GetLabels()[key]; !ok || have != value {
			return fmt.Sprintf("no label %s=%s", key, value)
		}
	}
	for _, what := range []string{
		size("memory", v.GetMemoryMib()*vm.MiB, r.GetMemoryMib()*vm.MiB),
		size("a work disk", v.GetDiskBytes(), r.GetDiskBytes()),
		size("a system disk", v.GetSystemBytes(), r.GetSystemBytes()),
	} {
		if what != "" {
			return what
		}
	}
	return ""
}

// removeAfter deletes the VM that --rm made. An end of ctx is no reason not to.
func (a *app) removeAfter(ctx context.Context, c *client.Client, v *bangerv1.VM) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTime)
	defer cancel()
	resp, err := c.VMs.DeleteVM(ctx, &bangerv1.DeleteVMRequest{Id: v.GetId()})
	if fault.Is(err, fault.NotFound) {
		return nil // somebody else deleted it, or its create was cancelled
	}
	if err == nil {
		// It goes on in the daemon: from here on Ctrl-C may end the wait.
		wait, stop := signal.NotifyContext(ctx, endings...)
		defer stop()
		_, err = a.follow(wait, c, resp.GetOperation(), true)
		if errors.Is(err, errInterrupted) {
			a.goesOn(resp.GetOperation())
			return reported{exitInterrupted}
		}
	}
	if err == nil {
		return nil
	}
	return fault.Wrap(err, fault.CodeOf(err), v.GetName(), "it was to be deleted, and may still be there").
		WithHint("banger vm delete %s", v.GetName())
}
