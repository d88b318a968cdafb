package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
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
					return a.printJSON(map[string]string{"socket": p.socket})
				}
				fmt.Fprintln(a.stdout, p.socket)
				return nil
			},
		},
		&cobra.Command{
			Use: "stop", Short: "Stop the daemon; VMs run on",
			Long:    "Stop the daemon. VMs run on, and the next command starts the daemon again, which finds them.",
			Example: `  banger daemon stop`,
			Args:    noArgs,
			RunE:    func(cmd *cobra.Command, _ []string) error { return a.daemonStop(cmd.Context()) },
		},
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
	view = daemonView{
		Running: true, PID: s.GetPid(), Version: s.GetVersion(), APIRevision: s.GetApiRevision(), Socket: s.GetSocket(),
		Log: s.GetLog(), StateDir: s.GetStateDir(), RuntimeDir: s.GetRuntimeDir(), DNSAddress: s.GetDnsAddress(),
		VMM: s.GetVmm(), Accel: s.GetAccel(), VMMNotice: s.GetVmmNotice(), StartedAt: timeOf(s.GetStartedAt()),
		VMsTotal: s.GetVmsTotal(), VMsRunning: s.GetVmsRunning(), OperationsRunning: s.GetOperationsRunning(),
		Warnings: append([]string{}, s.GetWarnings()...), InstallationID: s.GetInstallationId(),
	}
	if view.APIRevision != bangerv1.Revision {
		view.Warnings = append(view.Warnings, fmt.Sprintf("this banger speaks API revision %d, the daemon %d: banger daemon stop, then any command starts the daemon that fits", bangerv1.Revision, view.APIRevision))
	}
	if a.json {
		return a.printJSON(view)
	}
	var rows [][]cell
	add := func(key, value string) {
		if value != "" {
			rows = append(rows, []cell{{text: key, color: dim}, {text: value}})
		}
	}
	add("status", "running")
	add("pid", fmt.Sprint(view.PID))
	add("version", view.Version)
	add("started", formatAge(a.now(), s.GetStartedAt()))
	add("vmm", strings.TrimSpace(view.VMM+" "+view.Accel))
	add("notice", view.VMMNotice)
	add("vms", fmt.Sprintf("%d, %d running", view.VMsTotal, view.VMsRunning))
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

// stopTimeout is longer than the daemon's own bounds for its calls and operations.
const stopTimeout = 40 * time.Second

func (a *app) daemonStop(ctx context.Context) error {
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
	if a.json {
		return a.printJSON(map[string]bool{"was_running": was})
	}
	if was {
		fmt.Fprintln(a.stdout, "stopped; VMs run on, and the next command starts the daemon again")
	} else {
		fmt.Fprintln(a.stdout, "was not running")
	}
	return nil
}

func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "Check this machine: what works, what does not, and what to type about it",
		Example: `  banger doctor
  banger doctor --output json | jq '.[] | select(.severity == "fail")'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.doctor(cmd.Context()) },
	}
}

func (a *app) doctor(ctx context.Context) error {
	var findings []*bangerv1.Finding
	c, err := a.connect()
	if err == nil {
		var resp *bangerv1.RunDoctorResponse
		resp, err = c.Daemon.RunDoctor(ctx, &bangerv1.RunDoctorRequest{})
		findings = resp.GetFindings()
	}
	if err != nil {
		if ctx.Err() != nil {
			return err
		}
		// A daemon that cannot start is a finding: doctor is where people go then.
		v := viewError(err)
		title := v.Message
		if v.Subject != "" {
			title = v.Subject + ": " + title
		}
		findings = []*bangerv1.Finding{{Code: "daemon", Severity: "fail", Title: title, Fix: v.Hint}}
	}
	failed := 0
	views := []findingView{}
	var rows strings.Builder
	for _, f := range findings {
		if f.GetSeverity() == "fail" {
			failed++
		}
		views = append(views, findingView{f.GetCode(), f.GetSeverity(), f.GetTitle(), f.GetDetail(), f.GetFix()})
		fmt.Fprintf(&rows, "%s  %s\n", a.paint(stateColor(f.GetSeverity()), f.GetSeverity()), f.GetTitle())
		if f.GetDetail() != "" {
			fmt.Fprintf(&rows, "      %s\n", f.GetDetail())
		}
		if f.GetFix() != "" && f.GetSeverity() != "pass" {
			fmt.Fprintf(&rows, "      fix: %s\n", strings.ReplaceAll(f.GetFix(), "\n", "\n           "))
		}
	}
	if a.json {
		if err := a.printJSON(views); err != nil {
			return err
		}
	} else {
		fmt.Fprint(a.stdout, rows.String())
	}
	if failed > 0 {
		return reported{exitFailed}
	}
	return nil
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
		&cobra.Command{
			Use: "list", Aliases: []string{"ls"}, Short: "List running operations and the latest ended ones",
			Example: `  banger operation list`,
			Args:    noArgs,
			RunE:    func(cmd *cobra.Command, _ []string) error { return a.operationList(cmd.Context()) },
		},
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

func (a *app) operationList(ctx context.Context) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	resp, err := c.Operations.ListOperations(ctx, &bangerv1.ListOperationsRequest{})
	if err != nil {
		return err
	}
	if a.json {
		views := []operationView{}
		for _, op := range resp.GetOperations() {
			views = append(views, viewOperation(op))
		}
		return a.printJSON(views)
	}
	if len(resp.GetOperations()) == 0 {
		fmt.Fprintln(a.stderr, "No operations")
		return nil
	}
	var rows [][]cell
	for _, op := range resp.GetOperations() {
		end := a.now()
		if op.GetFinishedAt() != nil {
			end = op.GetFinishedAt().AsTime()
		}
		rows = append(rows, []cell{
			{text: op.GetId()}, {text: op.GetKind()}, {text: subject(op)},
			{text: op.GetState(), color: stateColor(op.GetState())},
			{text: formatAge(a.now(), op.GetCreatedAt())}, {text: formatTook(end.Sub(op.GetCreatedAt().AsTime()))},
		})
	}
	return table(a.stdout, a.color, []string{"ID", "KIND", "VM", "STATE", "STARTED", "TOOK"}, rows)
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of banger, and of the daemon if it runs",
		Example: `  banger version`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			view := struct {
				Version     string `json:"version"`
				APIRevision int    `json:"api_revision"`
				Daemon      string `json:"daemon_version,omitempty"`
			}{version.String(), bangerv1.Revision, ""}
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
