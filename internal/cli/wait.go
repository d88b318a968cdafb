package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

func (a *app) waitCommand() *cobra.Command {
	var (
		until   = goal{state: "running"}
		timeout = 5 * time.Minute
	)
	cmd := &cobra.Command{
		Use:   "wait VM",
		Short: "Wait until a VM runs, answers on a port, or is stopped",
		Long: `Wait until a VM runs (its agent answers), its SSH server or something else listens on a TCP port of
the guest, or it is stopped. A VM that is not running yet may be started meanwhile; one that failed, or
is deleted, ends the wait.`,
		Example: `  banger vm wait calm-otter --for ssh
  banger vm wait calm-otter --for port:3000 --timeout 30s
  banger vm wait calm-otter --for stopped`,
		Args: oneRef,
		RunE: func(cmd *cobra.Command, args []string) error {
			if timeout <= 0 {
				return usage(cmd, "--timeout is not positive")
			}
			return a.wait(cmd.Context(), args[0], until, timeout)
		},
	}
	cmd.Flags().Var(&until, "for", "running, ssh, port:N or stopped")
	cmd.Flags().DurationVar(&timeout, "timeout", timeout, "how long at most, such as 30s or 10m")
	return cmd
}

// goal is a flag with what is waited for: a state, or a port of a running VM.
type goal struct {
	state string
	port  int // 0: none
}

func (g *goal) String() string {
	switch {
	case g.port == sshPort:
		return "ssh"
	case g.port > 0:
		return fmt.Sprintf("port:%d", g.port)
	}
	return g.state
}
func (g *goal) Type() string { return "running|ssh|port:N|stopped" }
func (g *goal) Set(s string) error {
	switch port, ok := strings.CutPrefix(s, "port:"); {
	case ok:
		n, err := strconv.Atoi(port)
		if err != nil || n < 1 || n > 65535 {
			return fmt.Errorf("%q is no port: 1 to 65535", port)
		}
		*g = goal{"running", n}
	case s == "ssh":
		*g = goal{"running", sshPort}
	case s == "running", s == "stopped":
		*g = goal{state: s}
	default:
		return fmt.Errorf("%q is none of running, ssh, port:N, stopped", s)
	}
	return nil
}

func (a *app) wait(ctx context.Context, ref string, g goal, timeout time.Duration) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	resp, err := c.VMs.ResolveVMs(ctx, &bangerv1.ResolveVMsRequest{Refs: []string{ref}})
	if err != nil {
		return err
	}
	r := resp.GetResults()[0]
	if r.GetFault() != nil {
		return client.FromFault(r.GetFault())
	}
	v := r.GetVm()
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	late := func(last string) error {
		if ctx.Err() != nil {
			return errInterrupted
		}
		return fault.New(fault.Timeout, v.GetName(), "%s after %s, waiting for %s", last, formatTook(timeout), g.String()).
			WithHint("banger vm show %s", v.GetName())
	}
	reached, last, err := awaitState(bounded, c, v, g)
	switch {
	case bounded.Err() != nil, fault.Is(err, fault.Timeout): // the daemon may notice first
		return late("is " + last)
	case err != nil:
		return err
	}
	if g.port > 0 {
		deadline, _ := bounded.Deadline()
		stream, err := c.DialGuest(bounded, v.GetId(), g.port, time.Until(deadline))
		switch {
		case err == nil:
			_ = stream.Close() // it was opened to see that it can be
		case bounded.Err() != nil, fault.Is(err, fault.Timeout):
			return late(fmt.Sprintf("nothing listens on port %d", g.port))
		default:
			return err
		}
	}
	if a.json {
		return a.printJSON(viewVM(reached))
	}
	return nil
}

// awaitState returns the VM once it is in the state; last is the state it was seen in last.
func awaitState(ctx context.Context, c *client.Client, v *bangerv1.VM, g goal) (reached *bangerv1.VM, last string, err error) {
	last = v.GetState()
	stream, err := c.Daemon.Watch(ctx, &bangerv1.WatchRequest{})
	if err != nil {
		return nil, last, client.FromConnect(err)
	}
	defer stream.Close()
	deleted := fault.New(fault.NotFound, v.GetName(), "was deleted")
	for stream.Receive() {
		var now *bangerv1.VM
		switch e := stream.Msg().GetEvent().(type) {
		case *bangerv1.WatchResponse_Snapshot:
			for _, candidate := range e.Snapshot.GetVms() {
				if candidate.GetId() == v.GetId() {
					now = candidate
				}
			}
			if now == nil {
				return nil, last, deleted
			}
		case *bangerv1.WatchResponse_Vm:
			if now = e.Vm; now.GetId() != v.GetId() {
				continue
			}
		case *bangerv1.WatchResponse_VmDeleted:
			if e.VmDeleted == v.GetId() {
				return nil, last, deleted
			}
			continue
		default:
			continue
		}
		last = now.GetState()
		switch {
		case last == g.state:
			return now, last, nil
		case last == "failed" && g.state == "running":
			return nil, last, enterable(now) // says why, and what to type
		}
	}
	err = stream.Err()
	if err == nil {
		err = errors.New("the daemon ended the watch")
	}
	return nil, last, client.FromConnect(err)
}
