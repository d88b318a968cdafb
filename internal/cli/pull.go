package cli

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
)

func (a *app) imagePullCommand() *cobra.Command {
	r := &bangerv1.PullImageRequest{}
	cmd := &cobra.Command{
		Use: "pull REFERENCE", Short: "Make an image of a container image",
		Long: `Make an image of a container image: one of a registry, of a local OCI layout, or of an archive that docker save
wrote. Registries are asked with the credentials that docker login keeps. Layers are kept in the cache: a pull that was
interrupted goes on where it was, and a layer that two images share is fetched once.

An image that has an init (systemd, OpenRC, runit) boots with it. In one that has none banger's own init runs, with an
SSH server, and the image's command under it; what that says is in /var/log/banger/command.log of the VM. The image's
environment is that of its sessions. What is in /root of the image is in /root of new VMs.`,
		Example: `  banger image pull debian:13
  banger image pull registry.example.com/team/app:1.4 --name app
  banger image pull oci:./layout:latest --name app
  banger image pull docker-archive:app.tar`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(cmd, "%s takes one reference, as in: %s debian:13", cmd.CommandPath(), cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if r.Reference, err = absoluteReference(args[0]); err != nil {
				return err
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			resp, err := c.Images.PullImage(cmd.Context(), r)
			if err != nil {
				return err
			}
			return a.makeImage(cmd.Context(), c, resp.GetOperation(), "pulled")
		},
	}
	cmd.Flags().Var((*text)(&r.Name), "name", "name of the image (default one made of the reference)")
	return cmd
}

// absoluteReference makes the path in a reference to local files absolute: the daemon works elsewhere.
func absoluteReference(ref string) (string, error) {
	for _, prefix := range []string{"oci:", "docker-archive:"} {
		if rest, ok := strings.CutPrefix(ref, prefix); ok && rest != "" {
			// The end of it may be a tag with slashes, which filepath.Abs would take for a path's.
			if filepath.IsAbs(rest) {
				return ref, nil
			}
			here, err := os.Getwd()
			return prefix + strings.TrimSuffix(here, "/") + "/" + strings.TrimPrefix(rest, "./"), err
		}
	}
	if strings.HasPrefix(ref, "./") || strings.HasPrefix(ref, "../") || ref == "." || ref == ".." {
		return filepath.Abs(ref)
	}
	return ref, nil
}
