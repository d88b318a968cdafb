package cli

import (
	"context"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

func (a *app) trimCommand() *cobra.Command {
	return &cobra.Command{
		Use: "trim VM...", Short: "Give what VMs have freed on their disks back to the host",
		Long: `Give what VMs have freed on their disks back to the host. A stop does that, too. It takes a VMM that takes
discards: QEMU does, Firecracker 1.12 does not.` + refsHelp,
		Example: `  banger vm trim calm-otter`,
		Args:    someRefs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.batch(cmd, args, "trimmed", func(ctx context.Context, c *client.Client, v *bangerv1.VM) (*bangerv1.Operation, error) {
				r, err := c.VMs.TrimVM(ctx, &bangerv1.TrimVMRequest{Id: v.GetId()})
				return r.GetOperation(), err
			})
		},
	}
}
