package cli

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

func (a *app) cpCommand() *cobra.Command {
	var o client.CopyOptions
	cmd := &cobra.Command{
		Use:   "cp SOURCE... DESTINATION",
		Short: "Copy files between this host and a VM",
		Long: `Copy files and directories into a VM or out of it, through the VM's agent. A path in a VM is
written VM:PATH; a relative one is below /root. Directories are copied with all they hold. A destination
that is a directory gets the source under its own name; SOURCE/. means what is in a directory.

Permissions and times are kept, holes of sparse files stay holes, symbolic links are copied as links, and
hard links in what is copied stay links. What arrives in a VM belongs to root, what arrives here to you.`,
		Example: `  banger vm cp notes.txt calm-otter:
  banger vm cp project calm-otter:/srv
  banger vm cp calm-otter:/var/log/syslog .`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usage(cmd, "%s needs a source and a destination, one of them in a VM: VM:PATH", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			copies, err := plan(cmd, args)
			if err != nil {
				return err
			}
			return a.cp(cmd.Context(), copies, o)
		},
	}
	cmd.Flags().BoolVarP(&o.Owners, "archive", "a", false, "keep the numbers of user and group")
	return cmd
}

// location is a path, in a VM if vm is not empty.
type location struct{ vm, path string }

// parseLocation reads VM:PATH or PATH. As with scp a colon behind a slash is part of a path.
func parseLocation(s string) location {
	ref, path, ok := strings.Cut(s, ":")
	if !ok || ref == "" || strings.Contains(ref, "/") {
		return location{path: s}
	}
	if path == "" {
		path = "."
	}
	return location{ref, path}
}

type copying struct{ from, to location }

// plan finds out what is to be copied where, before anything is.
func plan(cmd *cobra.Command, args []string) ([]copying, error) {
	last := len(args) - 1
	to := parseLocation(args[last])
	var copies []copying
	for _, arg := range args[:last] {
		from := parseLocation(arg)
		switch {
		case from.path == "" || to.path == "":
			return nil, usage(cmd, "a path is empty")
		case from.vm == "" && to.vm == "":
			return nil, usage(cmd, "neither %s nor %s is in a VM: write VM:PATH", arg, args[last])
		case from.vm != "" && to.vm != "":
			return nil, usage(cmd, "%s and %s are both in VMs: copy to this host first", arg, args[last])
		}
		copies = append(copies, copying{from, to})
	}
	if len(copies) > 1 && to.vm == "" {
		if st, err := os.Stat(to.path); err != nil || !st.IsDir() {
			return nil, fault.New(fault.Invalid, to.path, "is no directory, and several sources go there")
		}
	}
	if len(copies) > 1 && to.vm != "" && !strings.HasSuffix(to.path, "/") {
		for i := range copies {
			copies[i].to.path += "/" // a file would not be replaced by one after the other
		}
	}
	return copies, nil
}

// cp copies one after the other, and stops at the first failure.
func (a *app) cp(ctx context.Context, copies []copying, o client.CopyOptions) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	var sum client.CopyResult
	known := map[string]*bangerv1.VM{}
	for _, cp := range copies {
		ref := cp.from.vm + cp.to.vm // one of them is empty
		v := known[ref]
		if v == nil {
			if v, err = a.running(ctx, c, ref); err != nil {
				return err
			}
			known[ref] = v
		}
		o.Progress = &client.CopyProgress{}
		p := a.copyProgress(v.GetName(), o.Progress)
		do, in, out := c.CopyTo, cp.from.path, cp.to.path
		if cp.from.vm != "" {
			do = c.CopyFrom
		}
		watch := a.watchPulse(ctx, c, v, "Ctrl-C", func(text string) { p.line("%s", strings.TrimSuffix(text, "\n")) })
		r, err := do(ctx, v.GetId(), in, out, o)
		watch.end()
		p.end()
		sum.Files, sum.Bytes, sum.Left = sum.Files+r.Files, sum.Bytes+r.Bytes, sum.Left+r.Left
		sum.Warnings = append(sum.Warnings, r.Warnings...)
		for _, w := range r.Warnings {
			if !a.json {
				fmt.Fprintf(a.stderr, "banger: left out: %s\n", w)
			}
		}
		if more := r.Left - int64(len(r.Warnings)); more > 0 && !a.json {
			fmt.Fprintf(a.stderr, "banger: and %d more\n", more)
		}
		if err != nil {
			return named(err, v.GetName())
		}
	}
	if a.json {
		warnings := sum.Warnings
		if warnings == nil {
			warnings = []string{}
		}
		err = a.printJSON(copyView{Files: sum.Files, Bytes: sum.Bytes, LeftOut: sum.Left, Warnings: warnings})
	}
	if err == nil && sum.Left > 0 {
		return reported{exitFailed}
	}
	return err
}

// copyProgress says on stderr how far a copy has come, once it takes longer than people like to wait for without a word.
func (a *app) copyProgress(name string, so *client.CopyProgress) *progress {
	p := a.progress(name, false)
	p.mu.Lock()
	defer p.mu.Unlock()
	begin := p.start
	p.live = func(now time.Time) string {
		files, bytes := so.Files.Load(), so.Bytes.Load()
		text := fmt.Sprintf("copying: %d files, %s", files, formatBytes(bytes))
		if files == 0 {
			return "reaching the guest's agent"
		}
		if files == 1 {
			text = "copying: " + formatBytes(bytes)
		}
		if took := now.Sub(begin); took >= firstLine {
			text += fmt.Sprintf(", %s/s", formatBytes(int64(float64(bytes)/took.Seconds())))
		}
		return text
	}
	return p
}

type copyView struct {
	Files    int64    `json:"files"`
	Bytes    int64    `json:"bytes"`
	LeftOut  int64    `json:"left_out"`
	Warnings []string `json:"warnings"`
}
