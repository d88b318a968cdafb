package cli

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

func (a *app) sshConfigCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ssh-config",
		Short: "Let ssh, scp, rsync and editors reach VMs as NAME.vm",
		Long: `Print what your SSH configuration would have of banger. install writes it to a file of banger's own,
~/.ssh/banger_config, which then follows the VMs there are; --include also puts the one line into
~/.ssh/config that makes ssh read it. Nothing else of yours is changed.`,
		Example: `  banger ssh-config install --include
  ssh calm-otter.vm
  rsync -a project calm-otter.vm:`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(cmd, "%q is no command of %s", args[0], cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			program, err := ownProgram()
			if err != nil {
				return err
			}
			resp, err := c.Daemon.GetSSHConfig(cmd.Context(), &bangerv1.GetSSHConfigRequest{Program: program})
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(viewSSHConfig(resp.GetConfig()))
			}
			_, err = fmt.Fprint(a.stdout, resp.GetConfig().GetText())
			return err
		},
	}
	var include bool
	install := &cobra.Command{
		Use: "install", Short: "Write banger's own file in ~/.ssh, and keep it", Args: noArgs,
		Example: "  banger ssh-config install --include",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			program, err := ownProgram()
			if err != nil {
				return err
			}
			resp, err := c.Daemon.InstallSSHConfig(cmd.Context(), &bangerv1.InstallSSHConfigRequest{Program: program, Include: include})
			if err != nil {
				return err
			}
			config := resp.GetConfig()
			switch {
			case a.json:
				return a.printJSON(viewSSHConfig(config))
			case config.GetIncluded():
				fmt.Fprintf(a.stdout, "%s follows the VMs there are; try: ssh NAME.vm\n", config.GetPath())
			default:
				fmt.Fprintf(a.stdout, "%s follows the VMs there are. ssh does not read it yet: put this first into ~/.ssh/config, or use --include\nInclude banger_config\n", config.GetPath())
			}
			return nil
		},
	}
	install.Flags().BoolVar(&include, "include", false, "put the line into ~/.ssh/config that makes ssh read it")
	cmd.AddCommand(install, &cobra.Command{
		Use: "remove", Short: "Take banger's file and line out of ~/.ssh", Args: noArgs,
		Example: "  banger ssh-config remove",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			_, err = c.Daemon.RemoveSSHConfig(cmd.Context(), &bangerv1.RemoveSSHConfigRequest{})
			return err
		},
	})
	return cmd
}

type sshConfigView struct {
	Path      string `json:"path"`
	Installed bool   `json:"installed"`
	Included  bool   `json:"included"`
	Text      string `json:"text"`
}

func viewSSHConfig(c *bangerv1.SSHConfig) sshConfigView {
	return sshConfigView{c.GetPath(), c.GetInstalled(), c.GetIncluded(), c.GetText()}
}

// ownProgram is this program's path.
func ownProgram() (string, error) {
	exe, err := os.Executable()
	if err != nil {
		return "", fault.Wrap(err, fault.Internal, "", "cannot find out where banger lies: %v", err)
	}
	return exe, nil
}
