package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

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
		Use:   "wait VM...",
		Short: "Wait until VMs run, answer on a port, or are stopped",
		Long: `Wait until a VM runs (its agent answers), its SSH server or something else listens on a TCP port of
the guest, or it is stopped. A VM that is not running yet may be started meanwhile; one that failed, or
is deleted, ends the wait for it. Of several VMs all are waited for, and each has its own result.`,
		Example: `  banger vm wait calm-otter --for ssh
  banger vm wait calm-otter buildbox
  banger vm wait calm-otter --for port:3000 --timeout 30s
  banger vm wait calm-otter --for stopped`,
		Args: someRefs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if timeout <= 0 {
				return usage(cmd, "--timeout is not positive")
			}
			if len(args) == 1 {
				return a.wait(cmd.Context(), args[0], until, timeout)
			}
			deadline := a.now().Add(timeout) // one for all of them
			return a.batch(cmd, args, until.reached(), func(ctx context.Context, c *client.Client, v *bangerv1.VM) (*bangerv1.Operation, error) {
				reached, err := a.waitFor(ctx, c, v, until, deadline.Sub(a.now()), timeout)
				if err == nil {
					proto.Reset(v)
					proto.Merge(v, reached)
				}
				return nil, err
			})
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

// reached says that it is, in a word or two.
func (g *goal) reached() string {
	if g.port > 0 {
		return "answers on " + g.String()
	}
	return g.state
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
	reached, err := a.waitFor(ctx, c, r.GetVm(), g, timeout, timeout)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(viewVM(reached))
	}
	return nil
}

// waitFor waits for one VM, for so long; timeout is what was asked for, for people.
func (a *app) waitFor(ctx context.Context, c *client.Client, v *bangerv1.VM, g goal, most, timeout time.Duration) (*bangerv1.VM, error) {
	bounded, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	late := func(last string) error {
		if ctx.Err() != nil {
			return errInterrupted
		}
		return fault.New(fault.Timeout, v.GetName(), "%s after %s, waiting for %s", last, formatTook(timeout), g.String()).
			WithHint("banger vm show %s", v.GetName())
	}
	for {
		reached, last, err := awaitState(bounded, c, v, g)
		switch {
		case bounded.Err() != nil, fault.Is(err, fault.Timeout): // the daemon may notice first
			return nil, late("is " + last)
		case err != nil:
			return nil, err
		}
		if g.port == 0 {
			return reached, nil
		}
		deadline, _ := bounded.Deadline()
		stream, err := c.DialGuest(bounded, v.GetId(), g.port, time.Until(deadline))
		switch {
		case err == nil:
			return reached, stream.Close() // it was opened to see that it can be
		case bounded.Err() != nil, fault.Is(err, fault.Timeout):
			return nil, late(fmt.Sprintf("nothing listens on port %d", g.port))
		case !fault.Is(err, fault.Unavailable) && !fault.Is(err, fault.Precondition) && !fault.Is(err, fault.NotFound):
			return nil, err
		}
		// It stopped, was deleted, or its agent gave up waiting: its state tells which, and what to wait for.
		select {
		case <-time.After(waitPause):
		case <-bounded.Done():
		}
	}
}

// waitPause is between two tries to reach a guest that runs and cannot be reached, which should not last.
const waitPause = 250 * time.Millisecond

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
		now, gone := watched(stream.Msg(), v.GetId())
		switch {
		case gone:
			return nil, last, deleted
		case now == nil:
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

// watched is what a message of the daemon's watch says of a VM: how it is now, nil if nothing, or that it is gone.
func watched(m *bangerv1.WatchResponse, id string) (now *bangerv1.VM, gone bool) {
	switch e := m.GetEvent().(type) {
	case *bangerv1.WatchResponse_Snapshot:
		for _, v := range e.Snapshot.GetVms() {
			if v.GetId() == id {
				return v, false
			}
		}
		return nil, true
	case *bangerv1.WatchResponse_Vm:
		if e.Vm.GetId() == id {
			return e.Vm, false
		}
	case *bangerv1.WatchResponse_VmDeleted:
		return nil, e.VmDeleted == id
	}
	return nil, false
}

// servicesTime is how long after a VM's start its guest's services are waited for: longer than one takes that boots well by
// emulation, and no obstacle to who looks after a boot that hangs.
const servicesTime = time.Minute

// settle waits until the services of a guest that was started just now have started, so that a command finds what it asks for:
// the agent takes commands long before systemd, D-Bus and Docker do. A VM that is stopped or deleted meanwhile is an error.
func (a *app) settle(ctx context.Context, c *client.Client, v *bangerv1.VM) error {
	settled := func(v *bangerv1.VM) bool {
		return slices.ContainsFunc(v.GetBoot(), func(s *bangerv1.Stage) bool { return s.GetName() == "userspace" })
	}
	most := servicesTime - a.now().Sub(v.GetStartedAt().AsTime())
	if settled(v) || most <= 0 {
		return nil
	}
	bounded, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	p := a.progress(v.GetName(), false)
	defer p.end()
	p.wait("waiting for its services to start, at most %s", formatTook(most.Round(time.Second)))
	stream, err := c.Daemon.Watch(bounded, &bangerv1.WatchRequest{})
	if err != nil {
		return client.FromConnect(err)
	}
	defer stream.Close()
	for stream.Receive() {
		now, gone := watched(stream.Msg(), v.GetId())
		switch {
		case gone:
			return fault.New(fault.NotFound, v.GetName(), "was deleted")
		case now == nil:
			continue
		}
		if err := enterable(now); err != nil || settled(now) {
			return err
		}
	}
	if ctx.Err() != nil {
		return errInterrupted
	}
	return nil
}
