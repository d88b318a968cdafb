package cli

import (
	"time"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

// eventView is a change, or, of type snapshot, the state that it all begins with.
type eventView struct {
	Type      string         `json:"type"` // snapshot, vm, vm_deleted, operation
	At        *time.Time     `json:"at"`   // when it was heard of here
	VM        *vmView        `json:"vm,omitempty"`
	VMID      string         `json:"vm_id,omitempty"` // that was deleted
	Operation *operationView `json:"operation,omitempty"`
	Snapshot  *snapshotView  `json:"snapshot,omitempty"`
}

type snapshotView struct {
	VMs        []*vmView       `json:"vms"`
	Operations []operationView `json:"operations"`
	Images     []*imageView    `json:"images"`
}

func (a *app) viewEvent(m *bangerv1.WatchResponse) (v eventView, known bool) {
	now := a.now()
	v.At = &now
	switch e := m.GetEvent().(type) {
	case *bangerv1.WatchResponse_Snapshot:
		v.Type, v.Snapshot = "snapshot", &snapshotView{VMs: []*vmView{}, Operations: []operationView{}, Images: []*imageView{}}
		for _, one := range e.Snapshot.GetVms() {
			v.Snapshot.VMs = append(v.Snapshot.VMs, viewVM(one))
		}
		for _, one := range e.Snapshot.GetOperations() {
			v.Snapshot.Operations = append(v.Snapshot.Operations, viewOperation(one))
		}
		for _, one := range e.Snapshot.GetImages() {
			v.Snapshot.Images = append(v.Snapshot.Images, viewImage(one))
		}
	case *bangerv1.WatchResponse_Vm:
		v.Type, v.VM = "vm", viewVM(e.Vm)
	case *bangerv1.WatchResponse_VmDeleted:
		v.Type, v.VMID = "vm_deleted", e.VmDeleted
	case *bangerv1.WatchResponse_Operation:
		op := viewOperation(e.Operation)
		v.Type, v.Operation = "operation", &op
	default:
		return v, false
	}
	return v, true
}

func (a *app) eventsCommand() *cobra.Command {
	only := filters{keys: keysOf(eventView{})}
	cmd := &cobra.Command{
		Use: "events", Short: "Print what happens, a JSON object a line, until Ctrl-C",
		Long: `Print what happens to VMs and operations, a JSON object a line (NDJSON), until Ctrl-C. The first line, of type snapshot, is
all that there is; each one after it a VM or an operation as it is now, or the id of a VM that was deleted. If the daemon
ends it waits for the next one, of which the first line is a snapshot again: what is not in that is gone.`,
		Example: `  banger events | jq -c 'select(.type == "vm") | [.vm.name, .vm.state]'
  banger events --filter type=operation --filter operation.state=failed`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !a.json { // there is no table of it
				a.output, a.json = outputJSON, true
			}
			c, err := a.watched(cmd.Context())
			if err != nil {
				return err
			}
			defer c.Close()
			ctx, cancel := a.whileRead(cmd.Context())
			defer cancel()
			daemon := absence{a: a}
			var unwritten error
			err = c.Follow(ctx, client.Follower{
				Event: func(m *bangerv1.WatchResponse) {
					daemon.ends()
					v, known := a.viewEvent(m)
					if !known || !only.match(v) || unwritten != nil {
						return
					}
					if unwritten = a.printValue(v, false); unwritten != nil {
						cancel()
					}
				},
				Gone: daemon.begins,
			})
			switch {
			case unwritten != nil:
				return unwritten
			case ctx.Err() != nil:
				return nil
			}
			return err
		},
	}
	cmd.Flags().Var(&only, "filter", "only lines with KEY=PATTERN or KEY!=PATTERN, can be repeated")
	return cmd
}
