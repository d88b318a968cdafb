package cli

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"github.com/spf13/cobra"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// The units of systemd by which the daemon starts with the host, or with the first command, and guests are powered off
// before the host goes down.
//
//go:embed units/*
var unitFiles embed.FS

// units are their names, in the order in which they are enabled.
var units = []string{"bangerd.socket", "bangerd.service", "banger-guests.service"}

// unitPlace is what the units are filled in with. User: of a user's manager, not the host's.
type unitPlace struct {
	Banger, Bangerd string // programs, absolute; Banger is "" where guests are not to be powered off
	Runtime         string // directory of the sockets, as units write it
	User            bool
	XDGRuntime      string // XDG_RUNTIME_DIR of the programs, where the manager does not set it itself
	Needs           string // unit that makes Runtime's parent, "" if that is there
	Linger          string // directory with a file for each user who lingers (systemd's logind)
}

// word quotes a word of a command for a unit (systemd.service(5), "COMMAND LINES"; specifiers are systemd.unit(5)'s).
func word(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%", "$", "$$").Replace(s) + `"`
}

func renderUnit(name string, p unitPlace) ([]byte, error) {
	t, err := template.New(name).Funcs(template.FuncMap{"word": word}).ParseFS(unitFiles, "units/"+name)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = t.Execute(&b, p)
	return b.Bytes(), err
}

// writeUnits writes them into dir, each at once and whole.
func writeUnits(dir string, p unitPlace) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fault.Wrap(err, fault.Permission, dir, "the directory of units cannot be made: %v", err)
	}
	for _, name := range units {
		text, err := renderUnit(name, p)
		if err != nil {
			return err
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path+".new", text, 0o644); err != nil {
			return fault.Wrap(err, fault.Permission, path, "cannot be written: %v", err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			return fault.Wrap(err, fault.Permission, path, "cannot be written: %v", err)
		}
	}
	return nil
}

// systemdTime bounds one call of systemctl. Stopping the guests' unit may take as long as they do.
const systemdTime = 3 * time.Minute

func (a *app) daemonInstallCommand() *cobra.Command {
	return &cobra.Command{
		Use: "install", Short: "Have systemd start the daemon, and power guests off before the host goes down",
		Long: `Write units for systemd and enable them: the daemon is started with the host, so that VMs with autostart come back, and by
its socket; guests are powered off in order before the host goes down. For root they are the host's, for anybody else the
user's own: these begin with the host only for a user who lingers. VMs that run are not disturbed.`,
		Example: `  banger daemon install
  sudo loginctl enable-linger $USER`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, p, err := a.unitsHere()
			if err != nil {
				return err
			}
			return a.installUnits(cmd.Context(), dir, p)
		},
	}
}

func (a *app) daemonUninstallCommand() *cobra.Command {
	return &cobra.Command{
		Use: "uninstall", Short: "Take the units of banger daemon install away; VMs run on",
		Example: `  banger daemon uninstall`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, p, err := a.unitsHere()
			if err != nil {
				return err
			}
			return a.uninstallUnits(cmd.Context(), dir, p)
		},
	}
}

type unitsView struct {
	Directory string   `json:"directory"`
	Units     []string `json:"units"`
	Lingers   bool     `json:"lingers"` // they begin with the host
	Warnings  []string `json:"warnings"`
}

// unitsHere are the place of this installation's units and what they are filled in with.
func (a *app) unitsHere() (dir string, p unitPlace, err error) {
	at, err := a.place()
	if err != nil {
		return "", p, err
	}
	if os.Getenv("BANGER_STATE_DIR") != "" || os.Getenv("BANGER_CONFIG") != "" {
		return "", p, fault.New(fault.Unsupported, "", "units are for the installation with its usual directories, and BANGER_STATE_DIR or BANGER_CONFIG is set").
			WithHint("unset BANGER_STATE_DIR BANGER_CONFIG")
	}
	exe, err := os.Executable()
	if err != nil {
		return "", p, fault.Wrap(err, fault.Internal, "", "cannot find out where banger lies: %v", err)
	}
	p = unitPlace{Banger: exe, Bangerd: at.daemon, Runtime: "%t/banger", User: os.Geteuid() != 0, Linger: "/var/lib/systemd/linger"}
	if !p.User {
		// The host's manager has /run as %t, and root's shells a directory of their own: the socket is where shells look.
		p.Runtime = strings.ReplaceAll(filepath.Dir(at.socket), "%", "%%")
		p.XDGRuntime = os.Getenv("XDG_RUNTIME_DIR")
		if p.XDGRuntime == "/run/user/0" { // logind's, which is there while root is logged in, or something needs it
			p.Needs = "user-runtime-dir@0.service"
		}
		return "/etc/systemd/system", p, nil
	}
	config := os.Getenv("XDG_CONFIG_HOME")
	if !filepath.IsAbs(config) {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", p, fault.Wrap(err, fault.Precondition, "home directory", "there is none")
		}
		config = filepath.Join(home, ".config")
	}
	return filepath.Join(config, "systemd/user"), p, nil
}

// systemctl runs it for the manager that the units are for.
func (a *app) systemctl(ctx context.Context, p unitPlace, args ...string) error {
	if p.User {
		args = append([]string{"--user"}, args...)
	}
	ctx, cancel := context.WithTimeout(ctx, systemdTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return fault.Wrap(err, fault.Unsupported, "systemctl", "this host has no systemd").
			WithHint("have your init run %s as your user", p.Bangerd)
	case ctx.Err() != nil:
		return fault.Wrap(ctx.Err(), fault.CodeOf(ctx.Err()), "systemctl", "%s did not end", strings.Join(args, " "))
	case err != nil:
		return fault.Wrap(err, fault.Unavailable, "systemctl "+strings.Join(args, " "), "failed: %s", strings.TrimSpace(string(out))).
			WithHint("systemctl %s; a user's manager needs a login session (not su or sudo)", strings.Join(append(args[:len(args):len(args)], "--no-pager"), " "))
	}
	return nil
}

func (a *app) installUnits(ctx context.Context, dir string, p unitPlace) error {
	if _, err := os.Stat(p.Bangerd); err != nil {
		return fault.Wrap(err, fault.NotFound, p.Bangerd, "is not there").WithHint("bangerd belongs beside banger: install both")
	}
	view := unitsView{Directory: dir, Units: units, Lingers: true, Warnings: []string{}}
	if p.User {
		u, err := user.Current()
		if err != nil {
			return fault.Wrap(err, fault.Internal, "", "who is this? %v", err)
		}
		if _, err := os.Stat(filepath.Join(p.Linger, u.Username)); err != nil {
			view.Lingers = false
			view.Warnings = append(view.Warnings, fmt.Sprintf("%s does not linger: the daemon begins with the first login, and the end of the last one powers VMs off; sudo loginctl enable-linger %s", u.Username, u.Username))
		}
	}
	if err := writeUnits(dir, p); err != nil {
		return err
	}
	if err := a.systemctl(ctx, p, "daemon-reload"); err != nil {
		return err
	}
	// One that was started by a command holds what the unit's is to have. VMs run on.
	c, err := a.connectWith(false)
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if _, err := c.Shutdown(bounded); err != nil {
		return err
	}
	if err := a.systemctl(ctx, p, append([]string{"enable", "--now"}, units...)...); err != nil {
		return err
	}
	if a.json {
		return a.printJSON(view)
	}
	for _, w := range view.Warnings {
		fmt.Fprintln(a.stderr, w)
	}
	fmt.Fprintf(a.stdout, "enabled in %s: %s\n", dir, strings.Join(units, " "))
	return nil
}

func (a *app) uninstallUnits(ctx context.Context, dir string, p unitPlace) error {
	left := []string{}
	for _, name := range units {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			left = append(left, name)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return fault.Wrap(err, fault.Permission, dir, "cannot be looked into: %v", err)
		}
	}
	if len(left) > 0 {
		// The end of the guests' unit is not to power them off this time: it gets one that does nothing.
		p.Banger = ""
		if err := writeUnits(dir, p); err != nil {
			return err
		}
		if err := a.systemctl(ctx, p, "daemon-reload"); err != nil {
			return err
		}
		if err := a.systemctl(ctx, p, append([]string{"disable", "--now"}, units...)...); err != nil {
			return err
		}
		for _, name := range units {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				return fault.Wrap(err, fault.Permission, filepath.Join(dir, name), "cannot be removed: %v", err)
			}
		}
		if err := a.systemctl(ctx, p, "daemon-reload"); err != nil {
			return err
		}
	}
	if a.json {
		return a.printJSON(unitsView{Directory: dir, Units: left, Lingers: false, Warnings: []string{}})
	}
	if len(left) == 0 {
		fmt.Fprintf(a.stdout, "there are none in %s\n", dir)
	} else {
		fmt.Fprintf(a.stdout, "removed from %s: %s; VMs run on\n", dir, strings.Join(left, " "))
	}
	return nil
}

// unitsCommand writes units for a package: those of users, which run the programs of BIN.
func (a *app) unitsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "units DIRECTORY BIN", Short: "Write the units for users' managers, with programs in BIN, into a directory",
		Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			return writeUnits(args[0], unitPlace{Banger: filepath.Join(args[1], "banger"), Bangerd: filepath.Join(args[1], "bangerd"), Runtime: "%t/banger", User: true})
		},
	}
}
