package cli

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/version"
)

func (a *app) doctorCommand() *cobra.Command {
	var fix bool
	cmd := &cobra.Command{
		Use: "doctor", Short: "Check this machine: what works, what does not, and what to type about it",
		Long: `Check this machine and the installation by the same checks that commands make, and say what to type about each thing
that is not as it should be. With --fix what can be repaired without losing anything is: permissions of banger's own files,
and a daemon that is not of banger's version (VMs run on over its restart).`,
		Example: `  banger doctor
  banger doctor --fix
  banger doctor --output json | jq '.[] | select(.severity == "fail")'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.doctor(cmd.Context(), fix) },
	}
	cmd.Flags().BoolVar(&fix, "fix", false, "repair what can be repaired without losing anything")
	return cmd
}

func (a *app) doctor(ctx context.Context, fix bool) error {
	findings, err := a.findings(ctx, fix)
	if err != nil {
		return err
	}
	failed := 0
	views := []findingView{}
	var rows strings.Builder
	for _, f := range findings {
		if f.GetSeverity() == "fail" {
			failed++
		}
		views = append(views, findingView{f.GetCode(), f.GetSeverity(), f.GetTitle(), f.GetDetail(), f.GetFix(), f.GetFixable(), f.GetFixed()})
		fmt.Fprintf(&rows, "%s  %s\n", a.paint(stateColor(f.GetSeverity()), f.GetSeverity()), f.GetTitle())
		if f.GetDetail() != "" {
			fmt.Fprintf(&rows, "      %s\n", f.GetDetail())
		}
		switch {
		case f.GetFixed():
			fmt.Fprintf(&rows, "      repaired\n")
		case f.GetFix() != "" && f.GetSeverity() != "pass":
			by := ""
			if f.GetFixable() && !fix {
				by = " (banger doctor --fix does it)"
			}
			fmt.Fprintf(&rows, "      fix: %s%s\n", strings.ReplaceAll(f.GetFix(), "\n", "\n           "), by)
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

// findings are this program's own, of how it and the daemon fit together, and then the daemon's.
func (a *app) findings(ctx context.Context, fix bool) ([]*bangerv1.Finding, error) {
	c, err := a.connect()
	var versions *bangerv1.Finding
	if err == nil {
		c, versions, err = a.checkVersions(ctx, c, fix)
	}
	var resp *bangerv1.RunDoctorResponse
	if err == nil {
		resp, err = c.Daemon.RunDoctor(ctx, &bangerv1.RunDoctorRequest{Fix: fix})
	}
	switch {
	case err == nil:
		return append([]*bangerv1.Finding{versions}, resp.GetFindings()...), nil
	case ctx.Err() != nil:
		return nil, err
	case fault.Is(err, fault.VersionSkew) && versions != nil: // says it already
		return []*bangerv1.Finding{versions}, nil
	}
	// A daemon that cannot start is a finding: doctor is where people go then.
	v := viewError(err)
	title := v.Message
	if v.Subject != "" {
		title = v.Subject + ": " + title
	}
	return []*bangerv1.Finding{{Code: "daemon", Severity: "fail", Title: title, Fix: cmp.Or(v.Hint, "banger daemon logs")}}, nil
}

// checkVersions compares the daemon with this program, and with fix restarts one that is older or of another build.
func (a *app) checkVersions(ctx context.Context, c *client.Client, fix bool) (*client.Client, *bangerv1.Finding, error) {
	s, err := c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
	if err != nil {
		return c, nil, err
	}
	f := compareVersions(s)
	if !fix || !f.GetFixable() {
		return c, f, nil
	}
	if s, err = a.restartDaemon(ctx); err != nil {
		return c, f, err
	}
	again := compareVersions(s)
	again.Fixed = again.GetSeverity() == "pass"
	return a.client, again, nil
}

func compareVersions(s *bangerv1.GetStatusResponse) *bangerv1.Finding {
	f := &bangerv1.Finding{Code: "versions", Severity: "pass", Title: "Versions of banger and its daemon", Detail: version.String()}
	mine, its := fmt.Sprintf("banger %s, API revision %d", version.String(), bangerv1.Revision), fmt.Sprintf("the daemon %s, API revision %d", s.GetVersion(), s.GetApiRevision())
	switch {
	case s.GetApiRevision() > bangerv1.Revision:
		f.Severity, f.Detail, f.Fix = "fail", mine+", is older than "+its, "upgrade banger, or run the banger that lies beside the daemon's bangerd"
	case s.GetApiRevision() < bangerv1.Revision:
		f.Severity, f.Detail, f.Fix, f.Fixable = "fail", its+", is older than "+mine, "banger daemon restart", true
	case s.GetVersion() != version.String():
		f.Severity, f.Detail, f.Fix, f.Fixable = "warn", its+", and "+mine+", are not of one build", "banger daemon restart", true
	}
	return f
}
