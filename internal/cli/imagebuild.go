package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

func (a *app) imageBuildCommand() *cobra.Command {
	r := &bangerv1.BuildImageRequest{}
	var packages, file string
	var scripts []string
	rootSize := &size{what: "--size", parse: vm.ParseDiskSize}
	cmd := &cobra.Command{
		Use: "build --name NAME", Short: "Build an image in a VM of its own",
		Long: `Build an image in a VM of its own, which begins with another image and has the network. What it has in /root at
the end becomes the work seed: /root of new VMs is a copy of it. Every image gets mise (activated in bash), opencode by mise, and
tmux-resurrect and tmux-continuum for root.

The output is shown and kept in a file. Ctrl-C ends the build; that, and a failure, leave nothing but this file. An image that
was built under the name before is replaced: new VMs get the new one, those that exist keep theirs.

A file for --file has steps, in their order, each with a name and either packages or a script:

  [[step]]
  name = "database"
  packages = ["postgresql-client"]

  [[step]]
  name = "project"
  run = "git clone https://example.org/project /root/project"

  [[step]]
  script = "setup.sh"`,
		Example: `  banger image build --name docker-dev --docker
  banger image build --name project --from docker-dev --packages postgresql-client,redis-tools --script setup.sh
  banger image build --name project --file steps.toml --size 12G --keep-on-failure`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if r.GetName() == "" {
				return usage(cmd, "%s needs a --name", cmd.CommandPath())
			}
			var err error
			if r.Packages, err = packageList(packages); err != nil {
				return err
			}
			for _, path := range scripts {
				text, err := ownText(path)
				if err != nil {
					return err
				}
				r.Steps = append(r.Steps, &bangerv1.BuildStep{Name: filepath.Base(path), Script: text})
			}
			if file != "" {
				steps, err := readSteps(file)
				if err != nil {
					return err
				}
				r.Steps = append(r.Steps, steps...)
			}
			r.SizeBytes = rootSize.value
			return a.buildImage(cmd.Context(), r)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.Var((*text)(&r.Name), "name", "name of the image")
	f.Var((*text)(&r.From), "from", "image to begin with (default: default_base_rootfs of the settings, or the default image)")
	f.BoolVar(&r.Docker, "docker", false, "with Docker")
	f.StringVar(&packages, "packages", "", "packages to install: a `FILE` with one a line, or a list with commas (default the list of the settings)")
	f.Var((*paths)(&scripts), "script", "script to run as root at the end, can be repeated")
	f.StringVar(&file, "file", "", "`FILE` with steps, which come after the scripts")
	f.Var(rootSize, "size", "size of the root filesystem (default 4 GiB more than that of the base); what is not used takes no room")
	f.BoolVar(&r.KeepOnFailure, "keep-on-failure", false, "leave the VM of a build that failed, to look into it")
	return cmd
}

// paths is a repeatable flag with a file of the user's.
type paths []string

func (p *paths) String() string { return "" }
func (p *paths) Type() string   { return "FILE" }
func (p *paths) Set(s string) error {
	if s == "" {
		return errors.New("it is empty")
	}
	*p = append(*p, s)
	return nil
}

// ownText reads a script of the user's.
func ownText(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fault.Wrap(err, fault.NotFound, path, "cannot be read").WithHint("check it: ls -l %s", path)
	}
	if len(b) == 0 {
		return "", fault.New(fault.Invalid, path, "is empty")
	}
	return string(b), nil
}

// packageList is what --packages means: a file if there is one, or if it can only be one, else a list.
func packageList(value string) ([]string, error) {
	if value == "" {
		return nil, nil
	}
	text := value
	if _, err := os.Stat(value); err == nil || strings.Contains(value, "/") {
		if text, err = ownText(value); err != nil {
			return nil, err
		}
	}
	var out []string
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		out = append(out, strings.FieldsFunc(line, func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) })...)
	}
	if len(out) == 0 {
		return nil, fault.New(fault.Invalid, value, "names no packages")
	}
	return out, nil
}

// readSteps reads a file for --file. Scripts that it names lie where it says from its own directory.
func readSteps(path string) ([]*bangerv1.BuildStep, error) {
	in, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(err, fault.NotFound, path, "cannot be read").WithHint("check it: ls -l %s", path)
	}
	defer in.Close()
	var doc struct {
		Step []struct {
			Name     string   `toml:"name"`
			Packages []string `toml:"packages"`
			Run      string   `toml:"run"`
			Script   string   `toml:"script"`
		} `toml:"step"`
	}
	if err := toml.NewDecoder(in).DisallowUnknownFields().Decode(&doc); err != nil {
		f := fault.Wrap(err, fault.Invalid, path, "is no file of steps").WithHint("banger image build --help shows one")
		var strict *toml.StrictMissingError
		var decode *toml.DecodeError
		switch {
		case errors.As(err, &strict):
			return nil, f.WithHint("the line is:\n%s", strict.String())
		case errors.As(err, &decode):
			return nil, f.WithHint("the line is:\n%s", decode.String())
		}
		return nil, f
	}
	if len(doc.Step) == 0 {
		return nil, fault.New(fault.Invalid, path, "has no steps").WithHint("banger image build --help shows one")
	}
	var out []*bangerv1.BuildStep
	for i, step := range doc.Step {
		name := step.Name
		if name == "" {
			name = fmt.Sprintf("step %d", i+1)
		}
		given := 0
		for _, is := range []bool{len(step.Packages) > 0, step.Run != "", step.Script != ""} {
			if is {
				given++
			}
		}
		if given != 1 {
			return nil, fault.New(fault.Invalid, path, "%s has %d of packages, run and script: it must be one", name, given)
		}
		s := &bangerv1.BuildStep{Name: name, Packages: step.Packages, Script: step.Run}
		if step.Script != "" {
			script := step.Script
			if !filepath.IsAbs(script) {
				script = filepath.Join(filepath.Dir(path), script)
			}
			if s.Script, err = ownText(script); err != nil {
				return nil, err
			}
		}
		out = append(out, s)
	}
	return out, nil
}

// buildImage begins a build and shows its output until it ends.
func (a *app) buildImage(ctx context.Context, r *bangerv1.BuildImageRequest) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	resp, err := c.Images.BuildImage(ctx, r)
	if err != nil {
		return err
	}
	op := resp.GetOperation()
	if a.json {
		return a.makeImage(ctx, c, op, "built")
	}
	fmt.Fprintf(a.stderr, "the output is kept in %s\n", resp.GetLog())
	p := a.progress(subject(op), false)
	// The log ends with the build, also after a Ctrl-C: what it says then is worth reading.
	reading, stop := context.WithCancel(context.WithoutCancel(ctx))
	var reader sync.WaitGroup
	reader.Go(func() { a.showBuildLog(reading, c, op.GetId(), p) })
	last, err := c.WatchOperation(ctx, op.GetId(), client.Watcher{
		Changed: p.update,
		Lost:    func(error) { p.line("%s: lost the connection to the daemon; connecting again", subject(op)) },
	})
	interrupted := err != nil && ctx.Err() != nil
	if interrupted {
		last, err = a.cancelBuild(ctx, c, op, p)
	}
	if err != nil {
		stop()
	}
	reader.Wait()
	stop()
	p.end()
	switch {
	case interrupted && err != nil:
		a.goesOn(op)
		return reported{exitInterrupted}
	case err != nil:
		return err
	}
	for _, n := range last.GetNotices() {
		fmt.Fprintln(a.stderr, n)
	}
	if interrupted && last.GetState() != "succeeded" {
		a.printError(errInterrupted)
		return reported{exitInterrupted}
	}
	if f := last.GetFault(); f != nil {
		return client.FromFault(f)
	}
	fmt.Fprintf(a.stdout, "%s: built\n", subject(last))
	return nil
}

// cancelBuild ends a build that the user interrupted, and waits until it has undone what it did.
func (a *app) cancelBuild(ctx context.Context, c *client.Client, op *bangerv1.Operation, p *progress) (*bangerv1.Operation, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cancelTime)
	defer cancel()
	p.line("%s: cancelling", subject(op))
	if _, err := c.Operations.CancelOperation(ctx, &bangerv1.CancelOperationRequest{Id: op.GetId()}); err != nil {
		return nil, err
	}
	return c.WatchOperation(ctx, op.GetId(), client.Watcher{Changed: p.update, Lost: func(error) {}})
}

// showBuildLog prints a build's output, whole lines at a time, between what is redrawn.
func (a *app) showBuildLog(ctx context.Context, c *client.Client, id string, p *progress) {
	stream, err := c.Images.ReadBuildLog(ctx, &bangerv1.ReadBuildLogRequest{OperationId: id})
	if err != nil {
		return // the output is kept in the file that was named
	}
	defer stream.Close()
	var partial string
	for stream.Receive() {
		partial += string(stream.Msg().GetData())
		at := strings.LastIndexByte(partial, '\n')
		if at < 0 {
			continue
		}
		p.line("%s", partial[:at])
		partial = partial[at+1:]
	}
}
