package cli

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/install"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
)

func (a *app) systemCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use: "system", Short: "Install the root helper, which gives users a bridge network and jails",
		Long: `Install, look at or remove the root helper. With it an ordinary user's VMs are on a bridge of the
host, and those under Firecracker run in its jail. It does that, and nothing else, for the users that
root names; it starts when it is needed and ends when it is idle.`,
		Example: `  sudo banger system install`,
	})
	var users, ranges []string
	installCmd := &cobra.Command{
		Use: "install", Short: "Install the root helper, or replace it by this version's; takes root", Args: noArgs,
		Long: `Install the root helper for the user who called sudo, or for those that --user names, and keep those
who may use it already. Over another version it takes its place; networks and VMs stay.`,
		Example: `  sudo banger system install
  sudo banger system install --user alice --user bob`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.systemInstall(cmd, users, ranges) },
	}
	installCmd.Flags().StringArrayVar(&users, "user", nil, "`NAME` or number of a user who may use it (default: who called sudo)")
	installCmd.Flags().StringArrayVar(&ranges, "range", nil, "IPv4 `RANGE` in which users may have networks (default: as before, or 172.16.0.0/16)")
	var force bool
	uninstallCmd := &cobra.Command{
		Use: "uninstall", Short: "Remove the root helper, and all that it made; takes root", Args: noArgs,
		Long:    "Remove the root helper, and all that it made. While somebody's network is there, or a VM runs in a jail, it is refused.",
		Example: `  sudo banger system uninstall`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := install.System().Uninstall(cmd.Context(), os.Geteuid(), force); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(systemUninstallView{Removed: install.Program})
			}
			fmt.Fprintln(a.stdout, "the root helper is removed")
			return nil
		},
	}
	uninstallCmd.Flags().BoolVar(&force, "force", false, "also take away networks of VMs that run, and end VMs in jails")
	cmd.AddCommand(installCmd, &cobra.Command{
		Use: "status", Short: "Show whether the root helper is installed, fits, and answers", Args: noArgs,
		Example: `  banger system status
  banger system status --output json | jq .usable`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.systemStatus(cmd.Context()) },
	}, uninstallCmd)
	return cmd
}

// systemInstallView is what was installed, under --output json.
type systemInstallView struct {
	Program string   `json:"program"`
	ByHand  []string `json:"by_hand"` // what root has to run where systemd does not
}

// systemUninstallView is what was removed, under --output json.
type systemUninstallView struct {
	Removed string `json:"removed"`
}

// systemView is the root helper under --output json.
type systemView struct {
	Installed bool       `json:"installed"`
	Program   string     `json:"program"`
	Version   string     `json:"version"`
	Users     []int      `json:"users"`
	Usable    bool       `json:"usable"` // by who asks, with this banger
	Error     *errorView `json:"error,omitempty"`
	Jailer    string     `json:"jailer"` // the version of the Firecracker that it runs in jails, "" if there is none
	Jails     bool       `json:"jails"`  // it makes some for who asks
}

func (a *app) systemInstall(cmd *cobra.Command, users, ranges []string) error {
	r := install.Request{UID: os.Geteuid()}
	for _, s := range ranges {
		p, err := netip.ParsePrefix(s)
		if err != nil || !p.Addr().Is4() || p != p.Masked() || !p.Addr().IsPrivate() {
			return usage(cmd, "--range %q is no private IPv4 range such as 172.16.0.0/16", s)
		}
		r.Ranges = append(r.Ranges, p)
	}
	if len(users) == 0 && os.Getenv("SUDO_UID") != "" && os.Getenv("SUDO_UID") != "0" {
		users = []string{os.Getenv("SUDO_UID")}
	}
	var names []string
	for _, name := range users {
		u, err := lookUser(name)
		if err != nil {
			return fault.Wrap(err, fault.NotFound, name, "there is no such user").WithHint("%s --help", cmd.CommandPath())
		}
		uid, err := strconv.Atoi(u.Uid)
		if err != nil {
			return fault.Wrap(err, fault.Internal, name, "this user has no number")
		}
		r.Users, names = append(r.Users, uid), append(names, u.Username)
	}
	exe, err := ownProgram()
	if err != nil {
		return err
	}
	r.Source = filepath.Join(filepath.Dir(exe), "banger-helper")
	noJails := ""
	if r.Firecracker, r.Jailer, err = jailPrograms(); err != nil {
		noJails = err.Error()
	}
	byHand, err := install.System().Install(cmd.Context(), r)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(systemInstallView{install.Program, append([]string{}, byHand...)})
	}
	fmt.Fprintf(a.stdout, "%s is installed\n", install.Program)
	if noJails != "" {
		fmt.Fprintf(a.stdout, "it makes no jails with a Firecracker of this banger: %s\n", noJails)
	}
	if len(byHand) > 0 {
		fmt.Fprintf(a.stdout, "systemd does not run here: have root run this now, and at each boot\n")
		for _, line := range byHand {
			fmt.Fprintf(a.stdout, "  %s\n", line)
		}
	}
	if len(names) > 0 {
		fmt.Fprintf(a.stdout, "%s may use it; a daemon that runs does from its next start on: banger daemon stop\n", strings.Join(names, ", "))
	}
	return nil
}

// jailPrograms are Firecracker and its jailer of this program's runtime bundle, as they are listed there.
func jailPrograms() (firecracker, jailer string, err error) {
	at, err := bundle.Locate("")
	if err != nil {
		return "", "", err
	}
	b, err := bundle.Load(at.Dir)
	if err != nil {
		return "", "", err
	}
	if firecracker, jailer = b.Path(bundle.Firecracker), b.Path(bundle.Jailer); firecracker == "" || jailer == "" {
		return "", "", fault.New(fault.NotFound, at.Dir, "the runtime bundle has no Firecracker with its jailer").WithHint("make runtime")
	}
	return firecracker, jailer, nil
}

// lookUser finds a user by name or number.
func lookUser(name string) (*user.User, error) {
	if _, err := strconv.Atoi(name); err == nil {
		return user.LookupId(name)
	}
	return user.Lookup(name)
}

func (a *app) systemStatus(ctx context.Context) error {
	uid := os.Geteuid()
	s, err := install.System().Status(ctx, uid)
	if err != nil {
		return err
	}
	if uid == 0 { // it has no helper, and needs none
		s.Err = nil
	}
	view := systemView{Installed: s.Installed, Program: install.Program, Version: s.Version, Users: append([]int{}, s.Users...),
		Usable: uid != 0 && s.Err == nil, Error: viewError(s.Err),
		Jailer: s.Jailer, Jails: uid != 0 && s.JailErr == nil}
	if a.json {
		return a.printJSON(view)
	}
	var rows [][]cell
	add := func(key, value string) {
		rows = append(rows, []cell{{text: key, color: dim}, {text: value}})
	}
	switch {
	case s.Installed:
		add("installed", s.Version)
		add("program", install.Program)
	case s.Err == nil && uid != 0:
		add("installed", "no, but one answers")
	default:
		add("installed", "no")
	}
	if len(s.Users) > 0 {
		names := make([]string, len(s.Users))
		for i, id := range s.Users {
			names[i] = strconv.Itoa(id)
			if u, err := user.LookupId(names[i]); err == nil {
				names[i] = u.Username
			}
		}
		add("users", strings.Join(names, ", "))
	}
	switch {
	case uid == 0:
		add("for you", "root's daemon needs no helper")
	case s.Err != nil:
		add("for you", s.Err.Error())
	default:
		add("for you", fmt.Sprintf("it answers: %s, revision %d", s.Answer.Release, s.Answer.Revision))
	}
	switch {
	case s.Installed && s.Jailer == "":
		add("jails", "none: it was installed without a Firecracker")
	case s.Installed && uid != 0 && s.JailErr != nil:
		add("jails", s.JailErr.Error())
	case s.Installed:
		add("jails", "with Firecracker "+s.Jailer)
	}
	if err := table(a.stdout, a.color, nil, rows); err != nil {
		return err
	}
	if s.Err != nil {
		fmt.Fprintf(a.stdout, "\n%s\n", fault.HintOf(s.Err))
	}
	if uid == 0 && !s.Installed {
		fmt.Fprintf(a.stdout, "\n%s\n", wire.InstallCommand())
	}
	return nil
}
