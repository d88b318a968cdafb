package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

func (a *app) vmCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:   "vm",
		Short: "Make, enter and look after VMs",
		Example: `  banger vm create --name calm-otter --memory 4G
  banger vm ssh calm-otter`,
	})
	cmd.AddCommand(
		a.createCommand(), a.runCommand(), a.listCommand(), a.showCommand(), a.sshCommand(), a.execCommand(), a.cpCommand(),
		a.forwardCommand(), a.logsCommand(), a.waitCommand(),
		a.startCommand(), a.stopCommand(), a.restartCommand(), a.setCommand(), a.statsCommand(), a.portsCommand(), a.trimCommand(), a.killCommand(), a.deleteCommand(),
	)
	return cmd
}

func (a *app) createCommand() *cobra.Command {
	var (
		flags          *createFlags
		noStart, quiet bool
	)
	cmd := &cobra.Command{
		Use:   "create [flags]",
		Short: "Make a VM and start it",
		Long: `Make a VM and start it. Returns when the VM's agent answers; banger vm ssh waits for
the SSH server if it needs to. Sizes are written 4G, 4GiB or 512M.`,
		Example: `  banger vm create
  banger vm create --name calm-otter --vcpu 4 --memory 4G --disk-size 32G
  name=$(banger vm create --quiet) && banger vm ssh "$name"`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(cmd, "%s takes no arguments; a name is given as --name %s", cmd.CommandPath(), args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := flags.request(cmd)
			if err != nil {
				return err
			}
			r.NoStart = noStart
			return a.create(cmd.Context(), r, quiet)
		},
	}
	flags = addCreateFlags(cmd)
	f := cmd.Flags()
	f.BoolVar(&noStart, "no-start", false, "make it, do not start it")
	f.BoolVarP(&quiet, "quiet", "q", false, "print nothing but the VM's name")
	return cmd
}

func (a *app) create(ctx context.Context, r *bangerv1.CreateVMRequest, quiet bool) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	resp, err := c.VMs.CreateVM(ctx, r)
	if err != nil {
		return err
	}
	op, err := a.follow(ctx, c, resp.GetOperation(), quiet)
	if err != nil {
		if errors.Is(err, errInterrupted) {
			a.goesOn(resp.GetOperation())
			return reported{exitInterrupted}
		}
		return err
	}
	switch {
	case a.json:
		return a.printJSON(viewVM(op.GetVm()))
	case quiet:
		fmt.Fprintln(a.stdout, op.GetVmName())
		return nil
	}
	for _, n := range op.GetNotices() {
		fmt.Fprintln(a.stderr, n)
	}
	took := op.GetFinishedAt().AsTime().Sub(op.GetCreatedAt().AsTime())
	fmt.Fprintf(a.stderr, "%s: %s after %s\n", op.GetVmName(), op.GetVm().GetState(), formatTook(took))
	if r.GetNoStart() {
		fmt.Fprintf(a.stdout, "banger vm start %s\n", op.GetVmName())
		return nil
	}
	fmt.Fprintf(a.stdout, "banger vm ssh %s\n", op.GetVmName())
	return nil
}

func (a *app) listCommand() *cobra.Command {
	return listing(a, &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls", "ps"},
		Short:   "List all VMs",
		Example: `  banger vm list
  banger vm list --filter state=running --sort -memory_mib
  banger vm list --filter labels.team=web --quiet | xargs banger vm stop
  banger vm list --output json | jq -r '.[] | select(.state == "running") | .name'`,
	}, list[*vmView]{
		fetch: func(ctx context.Context, c *client.Client) ([]*vmView, error) {
			resp, err := c.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{})
			views := make([]*vmView, len(resp.GetVms()))
			for i, v := range resp.GetVms() {
				views[i] = viewVM(v)
			}
			return views, err
		},
		columns: []column[*vmView]{
			{title: "NAME", of: func(v *vmView) cell { return cell{text: v.Name} }},
			{title: "ID", of: func(v *vmView) cell { return cell{text: shortID(v.ID)} }},
			{title: "STATE", of: func(v *vmView) cell { return cell{text: v.State, color: stateColor(v.State)} }},
			{title: "IMAGE", of: func(v *vmView) cell { return cell{text: v.Image} }},
			{title: "VCPU", of: func(v *vmView) cell { return cell{text: fmt.Sprint(v.VCPU)} }},
			{title: "MEMORY", of: func(v *vmView) cell { return cell{text: formatBytes(v.MemoryMiB * vm.MiB)} }},
			{title: "DISK", of: func(v *vmView) cell { return cell{text: formatBytes(v.DiskBytes)} }},
			{title: "SYSTEM", wide: true, of: func(v *vmView) cell { return cell{text: formatBytes(v.SystemBytes)} }},
			{title: "VMM", wide: true, of: func(v *vmView) cell { return cell{text: orDash(strings.TrimSpace(v.VMM + " " + v.Accel))} }},
			{title: "PID", wide: true, of: func(v *vmView) cell { return cell{text: orDash(strings.TrimPrefix(fmt.Sprint(v.PID), "0"))} }},
			{title: "NETWORK", wide: true, of: func(v *vmView) cell { return cell{text: orDash(v.Network)} }},
			{title: "ADDRESS", wide: true, of: func(v *vmView) cell { return cell{text: orDash(v.Address)} }},
			{title: "LABELS", wide: true, of: func(v *vmView) cell { return cell{text: orDash(labelText(v.Labels))} }},
			{title: "STARTED", wide: true, of: func(v *vmView) cell { return cell{text: ageOf(a.now(), v.StartedAt)} }},
			{title: "CREATED", of: func(v *vmView) cell { return cell{text: ageOf(a.now(), v.CreatedAt)} }},
			// Most have nothing to say; one that waits for something to be typed must be seen here.
			{title: "NOTE", rare: true, of: func(v *vmView) cell { return cell{text: v.Note} }},
		},
		empty: "No VMs yet. Make one: banger vm create",
	})
}

// orDash is a table's cell of which nothing is known.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func labelText(all map[string]string) string {
	var pairs []string
	for key, value := range all {
		pairs = append(pairs, key+"="+value)
	}
	slices.Sort(pairs)
	return strings.Join(pairs, " ")
}

// shortID is as much of an id as people are shown; it is a reference, too.
func shortID(id string) string { return id[:min(12, len(id))] }

func (a *app) showCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show VM",
		Short: "Show everything about one VM",
		Example: `  banger vm show calm-otter
  banger vm show calm-otter --output json | jq .boot`,
		Args: oneRef,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			resp, err := c.VMs.GetVM(cmd.Context(), &bangerv1.GetVMRequest{Id: args[0]})
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(viewVM(resp.GetVm()))
			}
			return a.printVM(resp.GetVm())
		},
	}
}

func (a *app) printVM(v *bangerv1.VM) error {
	now := a.now()
	var rows [][]cell
	add := func(key, value string) {
		for i, line := range strings.Split(value, "\n") {
			if i > 0 {
				key = ""
			}
			if value != "" {
				rows = append(rows, []cell{{text: key, color: dim}, {text: strings.TrimSpace(line)}})
			}
		}
	}
	add("name", v.GetName())
	add("id", v.GetId())
	rows = append(rows, []cell{{text: "state", color: dim}, {text: v.GetState(), color: stateColor(v.GetState())}})
	if v.GetVmmState() != "" && v.GetVmmState() != v.GetState() {
		add("machine", v.GetVmmState())
	}
	if f := v.GetFailure(); f != nil {
		add("failed at", f.GetStep()+", "+formatAge(now, f.GetAt()))
		add("because", without(f.GetFault().GetMessage(), v.GetName()))
		add("hint", f.GetFault().GetHint())
	}
	add("note", v.GetNote())
	add("operation", v.GetOperationId())
	add("image", v.GetImage())
	add("kernel", v.GetKernel())
	add("vcpu", fmt.Sprint(v.GetVcpu()))
	add("memory", formatBytes(v.GetMemoryMib()*vm.MiB))
	add("work disk", diskText(v.GetDiskBytes(), v.GetDiskAllocatedBytes()))
	add("system disk", diskText(v.GetSystemBytes(), v.GetSystemAllocatedBytes()))
	add("labels", labelText(v.GetLabels()))
	if v.GetAutostart() {
		add("autostart", "after a reboot of the host")
	}
	if v.GetVmm() != "" {
		add("vmm", strings.TrimSpace(v.GetVmm()+" "+v.GetAccel()))
	}
	if v.GetPid() > 0 {
		add("pid", fmt.Sprint(v.GetPid()))
	}
	if v.GetNetwork() != "" {
		way := "no way out"
		if v.GetNat() {
			way = "NAT"
		}
		add("network", v.GetNetwork()+", "+way)
		add("address", v.GetAddress())
	}
	add("network group", v.GetNetworkGroup())
	add("from the host", strings.Join(v.GetHostAddresses(), " "))
	add("confinement", confinementText(v.GetConfinement()))
	add("agent", v.GetAgent())
	var stages []string
	for _, s := range v.GetBoot() {
		stages = append(stages, fmt.Sprintf("%s %.1fs", s.GetName(), s.GetAtMs()/1000))
	}
	add("boot", strings.Join(stages, ", "))
	add("created", formatAge(now, v.GetCreatedAt()))
	if v.GetStartedAt() != nil {
		add("started", formatAge(now, v.GetStartedAt()))
	}
	if v.GetStoppedAt() != nil {
		add("stopped", formatAge(now, v.GetStoppedAt()))
	}
	add("directory", v.GetDirectory())
	add("log", v.GetLog())
	return table(a.stdout, a.color, nil, rows)
}

func diskText(size, allocated int64) string {
	if allocated == 0 {
		return formatBytes(size)
	}
	return fmt.Sprintf("%s (%s used on the host)", formatBytes(size), formatBytes(allocated))
}

// confinementText names what the kernel holds a VM's program to, and what it does not.
func confinementText(c *bangerv1.Confinement) string {
	if c == nil {
		return ""
	}
	parts := []string{fmt.Sprintf("user %d", c.GetUid())}
	switch {
	case c.GetJailed():
		parts = append(parts, "in a jail")
	case c.GetNoJail() != "":
		parts = append(parts, "no jail: "+c.GetNoJail())
	}
	if c.GetNoNewPrivileges() {
		parts = append(parts, "no new privileges")
	} else {
		parts = append(parts, "may gain privileges")
	}
	if c.GetSeccomp() != "" {
		parts = append(parts, "seccomp "+c.GetSeccomp())
	} else {
		parts = append(parts, "no seccomp")
	}
	if c.GetCgroup() == "" {
		return strings.Join(append(parts, "no cgroup: "+c.GetNoCgroup()), ", ")
	}
	var bounds []string
	if n := c.GetMemoryMaxBytes(); n > 0 {
		bounds = append(bounds, "memory "+formatBytes(n))
	}
	if n := c.GetCpuMax(); n > 0 {
		bounds = append(bounds, strconv.FormatFloat(n, 'g', -1, 64)+" CPUs")
	}
	if n := c.GetTasksMax(); n > 0 {
		bounds = append(bounds, fmt.Sprintf("%d tasks", n))
	}
	if len(bounds) == 0 {
		bounds = append(bounds, "without bounds")
	}
	return strings.Join(append(parts, fmt.Sprintf("cgroup %s (%s)", c.GetCgroup(), strings.Join(bounds, ", "))), ", ")
}
