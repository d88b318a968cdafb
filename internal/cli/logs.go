package cli

import (
	"bytes"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

func (a *app) logsCommand() *cobra.Command {
	var r bangerv1.ReadLogRequest
	tail := &lineCount{}
	cmd := &cobra.Command{
		Use:   "logs VM",
		Short: "Show a VM's console and what its VMM says",
		Long: `Show a VM's log: what the guest prints on its console, and what the program that runs it says. On a
terminal control characters of the guest's are left out. --follow goes on, also over stops and starts,
until Ctrl-C or until the VM is deleted.`,
		Example: `  banger vm logs calm-otter --tail 50
  banger vm logs -f calm-otter
  banger vm logs --vmm calm-otter`,
		Args: oneRef,
		RunE: func(cmd *cobra.Command, args []string) error {
			if a.json && r.GetFollow() {
				return usage(cmd, "--follow has no end, and JSON is one value")
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			r.Id, r.Plain, r.Tail = args[0], a.outTTY, tail.value
			ctx, cancel := a.whileRead(cmd.Context())
			defer cancel()
			stream, err := c.VMs.ReadLog(ctx, &r)
			if err != nil {
				return client.FromConnect(err)
			}
			defer stream.Close()
			var all bytes.Buffer
			for stream.Receive() {
				if a.json {
					all.Write(stream.Msg().GetData())
					continue
				}
				if _, err := a.stdout.Write(stream.Msg().GetData()); err != nil {
					return err
				}
			}
			err = stream.Err()
			switch {
			case err != nil && r.GetFollow() && ctx.Err() != nil:
				return nil // Ctrl-C is how it ends
			case err != nil:
				return client.FromConnect(err)
			case a.json:
				return a.printJSON(logView{all.String()})
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&r.Follow, "follow", "f", false, "go on with what is written")
	f.VarP(tail, "tail", "n", "so many lines from the end (default all)")
	f.BoolVar(&r.Vmm, "vmm", false, "only lines of the VMM's and banger's own (a guest can print such lines, too)")
	return cmd
}

// lineCount is a flag with a number of lines, from 0 up.
type lineCount struct{ value *int32 }

func (l *lineCount) String() string { return "" }
func (l *lineCount) Type() string   { return "N" }
func (l *lineCount) Set(s string) error {
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil || n < 0 {
		return fmt.Errorf("%q is no number of lines", s)
	}
	lines := int32(n)
	l.value = &lines
	return nil
}
