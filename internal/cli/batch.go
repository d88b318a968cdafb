package cli

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

// task is what a batch does to one VM: it starts an operation, or is done at once (a nil operation).
type task func(ctx context.Context, c *client.Client, v *bangerv1.VM) (*bangerv1.Operation, error)

// batchSize bounds how many VMs of one command are worked on at once.
const batchSize = 16

// result is what became of one reference.
type result struct {
	ref     string
	vm      *bangerv1.VM
	op      *bangerv1.Operation // final, or as far as it was seen
	deleted bool
	err     error
}

// batch resolves references, drops those that name a VM again, and runs do on all the others at
// once. Each has its own result, printed in the order given; bad references do not keep good ones
// from running. done is what happened in one word ("stopped"), printed unless the operation says that
// it was so already.
func (a *app) batch(cmd *cobra.Command, refs []string, done string, do task) error {
	views, err := a.batchResults(cmd, refs, done, do)
	if a.json && views != nil {
		if err := a.printJSON(views); err != nil {
			return err
		}
	}
	return err
}

// batchResults is batch, which leaves what is printed as JSON to its caller; nil if nothing was begun.
func (a *app) batchResults(cmd *cobra.Command, refs []string, done string, do task) ([]resultView, error) {
	ctx := cmd.Context()
	c, err := a.connect()
	if err != nil {
		return nil, err
	}
	resolved, err := c.VMs.ResolveVMs(ctx, &bangerv1.ResolveVMsRequest{Refs: refs})
	if err != nil {
		return nil, err
	}
	var results []*result
	seen := map[string]bool{}
	for _, r := range resolved.GetResults() {
		key := "ref " + r.GetRef()
		if r.GetVm() != nil {
			key = "id " + r.GetVm().GetId()
		}
		if !seen[key] {
			seen[key] = true
			results = append(results, &result{ref: r.GetRef(), vm: r.GetVm(), err: client.FromFault(r.GetFault())})
		}
	}
	// One VM's stages are worth watching; those of many would only flicker.
	quiet := len(results) > 1
	var p *progress
	if quiet {
		p = a.progress(cmd.Name(), false)
		p.wait("%d VMs", len(results))
	}
	slots := make(chan struct{}, batchSize)
	finished := make([]chan struct{}, len(results))
	var all sync.WaitGroup
	for i, r := range results {
		finished[i] = make(chan struct{})
		all.Go(func() {
			defer close(finished[i])
			if r.err != nil {
				return
			}
			select {
			case slots <- struct{}{}:
				defer func() { <-slots }()
			case <-ctx.Done():
				r.err = errInterrupted
				return
			}
			a.runTask(ctx, c, r, quiet, do)
		})
	}
	views, said := []resultView{}, map[string]bool{}
	var failed []error
	var left []*bangerv1.Operation
	for i, r := range results {
		<-finished[i]
		if p != nil {
			p.mu.Lock()
			p.clear()
		}
		switch {
		case !a.json:
			a.printResult(r, done, said)
		case a.output == outputName && r.err != nil: // names have no room for it
			a.printError(r.err)
		}
		views = append(views, viewResult(r))
		if p != nil {
			p.mu.Unlock()
		}
		if r.err != nil {
			failed = append(failed, r.err)
		}
		if errors.Is(r.err, errInterrupted) && r.op != nil {
			left = append(left, r.op)
		}
	}
	all.Wait()
	if p != nil {
		p.end()
	}
	for _, op := range left {
		a.goesOn(op)
	}
	if len(failed) == 0 {
		return views, nil
	}
	code := exitCode(failed[0])
	for _, err := range failed {
		if exitCode(err) != code {
			code = exitFailed
		}
	}
	if ctx.Err() != nil {
		code = exitInterrupted
	}
	return views, reported{code}
}

func (a *app) runTask(ctx context.Context, c *client.Client, r *result, quiet bool, do task) {
	op, err := do(ctx, c, r.vm)
	if err != nil {
		if ctx.Err() != nil {
			err = errInterrupted
		}
		r.err = err
		return
	}
	if op == nil {
		return
	}
	r.op = op
	last, err := a.follow(ctx, c, op, quiet)
	r.err = err
	if last != nil {
		r.op = last
		if last.GetVm() != nil {
			r.vm = last.GetVm()
		} else {
			r.deleted = last.GetKind() == "delete" && err == nil
		}
	}
}

// printResult prints what became of a VM. said holds the notices that were printed before.
func (a *app) printResult(r *result, done string, said map[string]bool) {
	if errors.Is(r.err, errInterrupted) {
		return // goesOn speaks of it
	}
	if r.err != nil {
		a.printError(r.err)
		return
	}
	for _, n := range r.op.GetNotices() {
		if strings.HasPrefix(n, "already ") {
			done = n
		} else if !said[n] { // of all VMs alike, as that they are emulated: once is enough
			said[n] = true
			fmt.Fprintln(a.stderr, n)
		}
	}
	fmt.Fprintf(a.stdout, "%s: %s\n", r.vm.GetName(), done)
}

func viewResult(r *result) resultView {
	v := resultView{Ref: r.ref, OK: r.err == nil, ID: r.vm.GetId(), Name: r.vm.GetName(), State: r.vm.GetState(),
		Notices: append([]string{}, r.op.GetNotices()...), Error: viewError(r.err)}
	if r.deleted {
		v.State = "deleted"
	}
	return v
}

const refsHelp = "\n\nA VM is named by its name, its id, or the start of its id. Several run at once, each with its own result."

func (a *app) startCommand() *cobra.Command {
	return &cobra.Command{
		Use: "start VM...", Short: "Start stopped VMs", Long: "Start stopped VMs. Starting a running one is fine." + refsHelp,
		Example: `  banger vm start calm-otter
  banger vm start calm-otter buildbox`,
		Args: someRefs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.batch(cmd, args, "running", func(ctx context.Context, c *client.Client, v *bangerv1.VM) (*bangerv1.Operation, error) {
				r, err := c.VMs.StartVM(ctx, &bangerv1.StartVMRequest{Id: v.GetId()})
				return r.GetOperation(), err
			})
		},
	}
}

func (a *app) stopCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "stop VM...", Short: "Shut VMs down; their files stay",
		Long: "Shut VMs down; their files stay. The guest is asked to write everything and power off, and is ended if it does not." + refsHelp,
		Example: `  banger vm stop calm-otter
  banger vm stop --force calm-otter buildbox`,
		Args: someRefs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.batch(cmd, args, "stopped", func(ctx context.Context, c *client.Client, v *bangerv1.VM) (*bangerv1.Operation, error) {
				r, err := c.VMs.StopVM(ctx, &bangerv1.StopVMRequest{Id: v.GetId(), Force: force})
				return r.GetOperation(), err
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not ask the guest: what it has not written yet is lost")
	return cmd
}

func (a *app) restartCommand() *cobra.Command {
	return &cobra.Command{
		Use: "restart VM...", Short: "Stop and start VMs", Long: "Stop and start VMs. A stopped one is started." + refsHelp,
		Example: `  banger vm restart calm-otter`,
		Args:    someRefs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.batch(cmd, args, "running", func(ctx context.Context, c *client.Client, v *bangerv1.VM) (*bangerv1.Operation, error) {
				r, err := c.VMs.RestartVM(ctx, &bangerv1.RestartVMRequest{Id: v.GetId()})
				return r.GetOperation(), err
			})
		},
	}
}

func (a *app) killCommand() *cobra.Command {
	signal := &signalFlag{number: 15}
	cmd := &cobra.Command{
		Use: "kill VM...", Short: "Send a signal to the program that runs a VM",
		Long: "Send a signal to the program that runs a VM. The guest is not asked: what it has not written yet is lost." + refsHelp,
		Example: `  banger vm kill calm-otter
  banger vm kill --signal KILL aa12bb34 cc56dd78`,
		Args: someRefs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.batch(cmd, args, "got SIG"+signal.String(), func(ctx context.Context, c *client.Client, v *bangerv1.VM) (*bangerv1.Operation, error) {
				_, err := c.VMs.KillVM(ctx, &bangerv1.KillVMRequest{Id: v.GetId(), Signal: int32(signal.number)})
				return nil, err
			})
		},
	}
	cmd.Flags().VarP(signal, "signal", "s", "signal to send: a name or a number")
	return cmd
}

func (a *app) deleteCommand() *cobra.Command {
	return &cobra.Command{
		Use: "delete VM...", Aliases: []string{"rm"}, Short: "Delete VMs and their disks",
		Long: "Delete VMs in any state, and their disks with them. There is no way back." + refsHelp,
		Example: `  banger vm delete calm-otter
  banger vm delete $(banger vm list -o json | jq -r '.[].id')`,
		Args: someRefs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.batch(cmd, args, "deleted", func(ctx context.Context, c *client.Client, v *bangerv1.VM) (*bangerv1.Operation, error) {
				r, err := c.VMs.DeleteVM(ctx, &bangerv1.DeleteVMRequest{Id: v.GetId()})
				return r.GetOperation(), err
			})
		},
	}
}

// once goes through answers about VMs with what each is remembered by, and leaves out those about a VM that was named twice.
func once[T interface {
	GetRef() string
	GetVm() *bangerv1.VM
}](answers []T) iter.Seq2[string, T] {
	return func(yield func(string, T) bool) {
		seen := map[string]bool{}
		for _, a := range answers {
			key := a.GetVm().GetId()
			if key == "" {
				key = "ref " + a.GetRef()
			}
			if !seen[key] && !yield(key, a) {
				return
			}
			seen[key] = true
		}
	}
}
