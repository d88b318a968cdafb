package cli

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/age"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/version"
)

func (a *app) daemonCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use: "daemon", Short: "Look at the daemon, or stop it",
		Long:    "Look at the daemon, or stop it. It starts by itself with the first command that needs it, and VMs run on without it.",
		Example: `  banger daemon status`,
	})
	cmd.AddCommand(
		&cobra.Command{
			Use: "status", Short: "Show whether the daemon runs, and where everything is",
			Example: `  banger daemon status
  banger daemon status --output json | jq .running`,
			Args: noArgs,
			RunE: func(cmd *cobra.Command, _ []string) error { return a.daemonStatus(cmd.Context()) },
		},
		&cobra.Command{
			Use: "socket", Short: "Print the path of the API's socket",
			Example: `  curl --unix-socket "$(banger daemon socket)" -H 'Content-Type: application/json' -d '{}' http://d/banger.v1.VMService/ListVMs`,
			Args:    noArgs,
			RunE: func(*cobra.Command, []string) error {
				p, err := a.place()
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(socketView{p.socket})
				}
				fmt.Fprintln(a.stdout, p.socket)
				return nil
			},
		},
		a.daemonStopCommand(), a.daemonRestartCommand(), a.daemonLogsCommand(), a.daemonInstallCommand(), a.daemonUninstallCommand(),
	)
	return cmd
}

func (a *app) daemonStatus(ctx context.Context) error {
	p, err := a.place()
	if err != nil {
		return err
	}
	c, err := a.connectWith(false)
	if err != nil {
		return err
	}
	view := daemonView{Socket: p.socket, Log: p.log(), StateDir: p.stateDir, Warnings: []string{}}
	if view.Running, err = c.Running(ctx); err != nil {
		return err
	}
	if !view.Running {
		if a.json {
			return a.printJSON(view)
		}
		fmt.Fprintln(a.stdout, "not running; the next command that needs it starts it, e.g. banger vm list")
		return table(a.stdout, a.color, nil, [][]cell{
			{{text: "socket", color: dim}, {text: view.Socket}}, {{text: "log", color: dim}, {text: view.Log}},
		})
	}
	s, err := c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
	if err != nil {
		return err
	}
	view = a.viewDaemon(s)
	if a.json {
		return a.printJSON(view)
	}
	return a.printDaemon(view)
}

func (a *app) viewDaemon(s *bangerv1.GetStatusResponse) daemonView {
	view := daemonView{
		Running: true, PID: s.GetPid(), Version: s.GetVersion(), APIRevision: s.GetApiRevision(), Socket: s.GetSocket(),
		Log: s.GetLog(), StateDir: s.GetStateDir(), RuntimeDir: s.GetRuntimeDir(), DNSAddress: s.GetDnsAddress(),
		VMM: s.GetVmm(), Accel: s.GetAccel(), VMMNotice: s.GetVmmNotice(), StartedAt: timeOf(s.GetStartedAt()),
		VMsTotal: s.GetVmsTotal(), VMsRunning: s.GetVmsRunning(), OperationsRunning: s.GetOperationsRunning(),
		Warnings: append([]string{}, s.GetWarnings()...), InstallationID: s.GetInstallationId(),
		VMMVersion: s.GetVmmVersion(), Network: s.GetNetwork(), Images: s.GetImages(), VMsByState: s.GetVmsByState(),
		UptimeMS: max(0, a.now().Sub(s.GetStartedAt().AsTime()).Milliseconds()),
	}
	if view.APIRevision != bangerv1.Revision {
		view.Warnings = append(view.Warnings, fmt.Sprintf("this banger speaks API revision %d, the daemon %d: banger daemon restart starts the daemon that fits (VMs keep running)", bangerv1.Revision, view.APIRevision))
	} else if view.Version != version.String() {
		view.Warnings = append(view.Warnings, fmt.Sprintf("this banger is %s, the daemon %s: banger daemon restart starts the daemon that fits (VMs keep running)", version.String(), view.Version))
	}
	return view
}

func (a *app) printDaemon(view daemonView) error {
	var rows [][]cell
	add := func(key, value string) {
		if value != "" {
			rows = append(rows, []cell{{text: key, color: dim}, {text: value}})
		}
	}
	add("status", "running")
	add("pid", fmt.Sprint(view.PID))
	add("version", view.Version)
	add("uptime", age.Text(time.Duration(view.UptimeMS)*time.Millisecond))
	add("vmm", strings.Join(strings.Fields(view.VMM+" "+view.VMMVersion+" "+view.Accel), " "))
	add("notice", view.VMMNotice)
	network := view.Network
	if network == "" {
		network = "none"
	}
	add("network", network)
	add("vms", statesText(view))
	add("images", fmt.Sprint(view.Images))
	if view.OperationsRunning > 0 {
		add("operations", fmt.Sprintf("%d running", view.OperationsRunning))
	}
	add("socket", view.Socket)
	add("log", view.Log)
	add("state", view.StateDir)
	add("bundle", view.RuntimeDir)
	dns := view.DNSAddress
	if dns == "" {
		dns = "none"
	}
	add("dns", dns)
	for _, w := range view.Warnings {
		rows = append(rows, []cell{{text: "warning", color: yellow}, {text: w}})
	}
	return table(a.stdout, a.color, nil, rows)
}

// statesText is how many VMs there are, and in which states: "3, 2 running, 1 stopped".
func statesText(view daemonView) string {
	text := fmt.Sprint(view.VMsTotal)
	for _, state := range slices.Sorted(maps.Keys(view.VMsByState)) {
		text += fmt.Sprintf(", %d %s", view.VMsByState[state], state)
	}
	return text
}

func (a *app) operationCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use: "operation", Aliases: []string{"op"}, Short: "Look at what the daemon is doing",
		Example: `  banger operation list`,
	})
	one := func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usage(cmd, "%s takes the id of one operation", cmd.CommandPath())
		}
		return nil
	}
	cmd.AddCommand(
		a.operationListCommand(),
		&cobra.Command{
			Use: "watch OPERATION", Short: "Follow an operation until it ends",
			Example: `  banger operation watch 0b9f2c4d`,
			Args:    one,
			RunE: func(cmd *cobra.Command, args []string) error {
				c, err := a.connect()
				if err != nil {
					return err
				}
				op, err := a.follow(cmd.Context(), c, &bangerv1.Operation{Id: args[0]}, false)
				if op != nil && a.json {
					if err := a.printJSON(viewOperation(op)); err != nil {
						return err
					}
				}
				if err != nil {
					return err
				}
				if !a.json {
					fmt.Fprintf(a.stdout, "%s: %s %s\n", subject(op), op.GetKind(), op.GetState())
				}
				return nil
			},
		},
		&cobra.Command{
			Use: "cancel OPERATION", Short: "Ask an operation to stop and undo what it did",
			Example: `  banger operation cancel 0b9f2c4d`,
			Args:    one,
			RunE: func(cmd *cobra.Command, args []string) error {
				c, err := a.connect()
				if err != nil {
					return err
				}
				if _, err := c.Operations.CancelOperation(cmd.Context(), &bangerv1.CancelOperationRequest{Id: args[0]}); err != nil {
					return err
				}
				op, err := a.follow(cmd.Context(), c, &bangerv1.Operation{Id: args[0]}, false)
				if op == nil {
					return err
				}
				if a.json {
					return a.printJSON(viewOperation(op))
				}
				if op.GetState() != "cancelled" {
					return fault.New(fault.Precondition, subject(op), "too late: the %s had ended already (%s)", op.GetKind(), op.GetState())
				}
				fmt.Fprintf(a.stdout, "%s: %s cancelled\n", subject(op), op.GetKind())
				return nil
			},
		},
	)
	return cmd
}

func (a *app) operationListCommand() *cobra.Command {
	return listing(a, &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List running operations and the latest ended ones",
		Example: `  banger operation list
  banger operation list --filter state=running --watch
  banger operation list --filter state=failed -o json | jq -r '.[].error.message'`,
	}, list[operationView]{
		fetch: func(ctx context.Context, c *client.Client) ([]operationView, error) {
			resp, err := c.Operations.ListOperations(ctx, &bangerv1.ListOperationsRequest{})
			var views []operationView
			for _, op := range resp.GetOperations() {
				views = append(views, viewOperation(op))
			}
			return views, err
		},
		columns: []column[operationView]{
			{title: "ID", of: func(v operationView) cell { return cell{text: v.ID} }},
			{title: "KIND", of: func(v operationView) cell { return cell{text: v.Kind} }},
			{title: "VM", of: func(v operationView) cell { return cell{text: cmp.Or(v.Image, v.VMName)} }}, // or image
			{title: "STATE", of: func(v operationView) cell { return cell{text: v.State, color: stateColor(v.State)} }},
			{title: "STARTED", of: func(v operationView) cell { return cell{text: ageOf(a.now(), v.CreatedAt)} }},
			{title: "TOOK", of: func(v operationView) cell {
				end := a.now()
				if v.FinishedAt != nil {
					end = *v.FinishedAt
				}
				if v.CreatedAt == nil {
					return cell{text: "-"}
				}
				return cell{text: formatTook(end.Sub(*v.CreatedAt))}
			}},
			{title: "STAGE", wide: true, of: func(v operationView) cell {
				if len(v.Stages) == 0 {
					return cell{text: "-"}
				}
				return cell{text: v.Stages[len(v.Stages)-1].Name}
			}},
			{title: "ERROR", wide: true, rare: true, of: func(v operationView) cell {
				if v.Error == nil {
					return cell{}
				}
				text, _, _ := strings.Cut(v.Error.Message, "\n")
				return cell{text: text}
			}},
		},
		empty: "No operations",
	})
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of banger, and of the daemon if it runs",
		Example: `  banger version`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			view := versionView{Version: version.String(), APIRevision: bangerv1.Revision}
			// The daemon is a bonus: the version is printed even where no daemon can be found.
			if c, err := a.connectWith(false); err == nil {
				if running, err := c.Running(cmd.Context()); err == nil && running {
					if s, err := c.Daemon.GetStatus(cmd.Context(), &bangerv1.GetStatusRequest{}); err == nil {
						view.Daemon = s.GetVersion()
					}
				}
			}
			if a.json {
				return a.printJSON(view)
			}
			fmt.Fprintf(a.stdout, "banger %s, API revision %d\n", view.Version, view.APIRevision)
			if view.Daemon != "" {
				fmt.Fprintf(a.stdout, "bangerd %s\n", view.Daemon)
			}
			return nil
		},
	}
}
