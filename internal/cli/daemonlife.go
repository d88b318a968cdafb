package cli

import (
	"bufio"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/version"
)

// stopTimeout is longer than the daemon's own bounds for its calls and operations.
const stopTimeout = 40 * time.Second

func (a *app) daemonStopCommand() *cobra.Command {
	var all, hostShutdown bool
	cmd := &cobra.Command{
		Use: "stop", Short: "Stop the daemon; VMs run on",
		Long: `Stop the daemon. VMs run on, and the next command starts the daemon again, which finds them.

With --all VMs are shut down first, each as banger vm stop does. If one cannot be, the daemon goes on.`,
		Example: `  banger daemon stop
  banger daemon stop --all`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if hostShutdown && !all {
				return usage(cmd, "--host-shutdown is about what --all stops")
			}
			var stopped []resultView
			if all {
				var err error
				if stopped, err = a.stopAll(cmd, hostShutdown); err != nil {
					if a.json && stopped != nil {
						_ = a.printJSON(stoppedView{VMs: stopped})
					}
					return err
				}
			}
			return a.daemonStop(cmd.Context(), stopped)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "shut VMs down first")
	cmd.Flags().BoolVar(&hostShutdown, "host-shutdown", false, "the host goes down: VMs with autostart are started again after its boot")
	return cmd
}

// stopAll shuts down the VMs that run or are about to. One that ends by itself meanwhile is fine. It works with a daemon
// of any API revision: after an upgrade that nobody followed by a restart of the daemon, the host still goes down.
func (a *app) stopAll(cmd *cobra.Command, hostShutdown bool) ([]resultView, error) {
	a.revision = client.AnyRevision
	c, err := a.connect() // VMs may run without a daemon
	if err != nil {
		return nil, err
	}
	resp, err := c.VMs.ListVMs(cmd.Context(), &bangerv1.ListVMsRequest{})
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, v := range resp.GetVms() {
		switch v.GetState() {
		case "stopped", "defined", "deleting":
		default:
			ids = append(ids, v.GetId())
		}
	}
	if len(ids) == 0 {
		return nil, nil
	}
	return a.batchResults(cmd, ids, "stopped", func(ctx context.Context, c *client.Client, v *bangerv1.VM) (*bangerv1.Operation, error) {
		r, err := c.VMs.StopVM(ctx, &bangerv1.StopVMRequest{Id: v.GetId(), HostShutdown: hostShutdown})
		return r.GetOperation(), err
	})
}

func (a *app) daemonStop(ctx context.Context, stopped []resultView) error {
	c, err := a.connectWith(false)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	p := a.progress("daemon", false)
	p.wait("ending")
	was, err := c.Shutdown(ctx)
	p.end()
	if err != nil {
		return err
	}
	switch {
	case a.json:
		return a.printJSON(stoppedView{was, stopped})
	case was && len(stopped) > 0:
		fmt.Fprintln(a.stdout, "the daemon is stopped, too")
	case was:
		fmt.Fprintln(a.stdout, "stopped; VMs run on, and the next command starts the daemon again")
	default:
		fmt.Fprintln(a.stdout, "was not running")
	}
	return nil
}

func (a *app) daemonRestartCommand() *cobra.Command {
	return &cobra.Command{
		Use: "restart", Short: "Stop the daemon and start the one that lies beside this banger; VMs run on",
		Long: `Stop the daemon and start the one that lies beside this banger. VMs run on, and so do operations. It works with a
daemon of any version. Sessions of vm ssh and vm exec that the daemon carries end: those with VMs without vsock, which
under QEMU need /dev/vhost-vsock.`,
		Example: `  banger daemon restart`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := a.restartDaemon(cmd.Context())
			if err != nil {
				return err
			}
			view := a.viewDaemon(s)
			if a.json {
				return a.printJSON(view)
			}
			fmt.Fprintf(a.stdout, "the daemon %s runs, pid %d; VMs: %s\n", view.Version, view.PID, statesText(view))
			return nil
		},
	}
}

func (a *app) restartDaemon(ctx context.Context) (*bangerv1.GetStatusResponse, error) {
	if a.client != nil { // it may be one that starts no daemon
		a.client.Close()
		a.client = nil
	}
	c, err := a.connect()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	p := a.progress("daemon", false)
	p.wait("restarting")
	defer p.end()
	return c.Restart(ctx)
}

// restartsFor offers to restart a daemon that is older than this program, which no command can speak to, and reports
// whether the command may be tried again. People are asked, since sessions may end; programs read the hint.
func (a *app) restartsFor(ctx context.Context, err error) bool {
	if !fault.Is(err, fault.VersionSkew) || a.client == nil || a.json || !a.errTTY || !isatty.IsTerminal(a.stdin.Fd()) {
		return false
	}
	s, statusErr := a.client.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
	if statusErr != nil || s.GetApiRevision() >= bangerv1.Revision { // it is a guest's agent that is older, or this program
		return false
	}
	fmt.Fprintf(a.stderr, "The running daemon (%s) is older than this banger (%s). VMs keep running over its restart.\nRestart it now? [Y/n] ", s.GetVersion(), version.String())
	answer := make(chan string, 1)
	go func() {
		line, err := bufio.NewReader(a.stdin).ReadString('\n') // after Ctrl-C it ends with the process
		if err != nil {
			line = "no"
		}
		answer <- line
	}()
	var said string
	select {
	case said = <-answer:
	case <-ctx.Done():
		said = "no"
		fmt.Fprintln(a.stderr)
	}
	switch strings.ToLower(strings.TrimSpace(said)) {
	case "", "y", "yes":
	default:
		return false
	}
	if _, err := a.restartDaemon(ctx); err != nil {
		a.printError(err)
		return false
	}
	return true
}
