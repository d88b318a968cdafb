// Package cli owns the command line: what people and scripts type, what they get to read, and the
// exit codes.
//
// It speaks to the daemon through package client alone and decides nothing about VMs: it imports no
// store, no driver, no use case. Results go to stdout; progress, notices and errors to stderr.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/version"
)

// app is one run of the program.
type app struct {
	stdin          *os.File
	stdout, stderr io.Writer
	out            *os.File // what stdout writes to, for programs that get it as theirs
	now            func() time.Time

	args     []string
	output   string // --output
	json     bool   // a value is printed, and not text for people
	color    bool   // on stdout
	errColor bool   // on stderr
	outTTY   bool   // stdout is a terminal
	errTTY   bool   // stderr is a terminal: progress may redraw

	place    func() (place, error)
	client   *client.Client // made by connect
	revision int            // of the API, as client.Options has it
}

// Main runs the command line and returns the process's exit code.
func Main(args []string) int {
	a := &app{
		stdin: os.Stdin, stdout: &results{file: os.Stdout}, out: os.Stdout, stderr: os.Stderr, now: time.Now, place: findPlace,
		outTTY: isatty.IsTerminal(os.Stdout.Fd()),
		errTTY: isatty.IsTerminal(os.Stderr.Fd()) && os.Getenv("TERM") != "dumb",
	}
	plain := os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" // https://no-color.org
	a.color = !plain && isatty.IsTerminal(os.Stdout.Fd())
	a.errColor = !plain && isatty.IsTerminal(os.Stderr.Fd())
	return a.run(args)
}

func (a *app) run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// After the first Ctrl-C a second one ends the program the usual way.
	defer context.AfterFunc(ctx, stop)()

	// Errors of parsing must be JSON, too, and come before the flag is parsed.
	a.json, a.args = wantsJSON(args), args
	err := a.execute(ctx, args)
	if a.restartsFor(ctx, err) { // nothing was done yet: such a daemon refuses every call
		err = a.execute(ctx, args)
	}
	if a.client != nil {
		a.client.Close()
	}
	if r, ok := a.stdout.(*results); ok && err == nil && r.err != nil {
		err = r.err
	}
	if err == nil {
		return exitOK
	}
	if ctx.Err() != nil && fault.Is(err, fault.Cancelled) {
		err = errInterrupted
	}
	a.printError(err)
	return exitCode(err)
}

// results is stdout. It keeps the first error, since not every print looks at it: a result that was lost, to a full disk
// or a closed descriptor, must not pass for one.
type results struct {
	file *os.File
	err  error
}

func (r *results) Write(b []byte) (int, error) {
	n, err := r.file.Write(b)
	if err != nil {
		var cause *fs.PathError
		if errors.As(err, &cause) {
			err = cause.Err // whatever its name is here
		}
		err = fault.New(fault.Internal, "stdout", "cannot be written: %v", err)
		if r.err == nil {
			r.err = err
		}
	}
	return n, err
}

// execute runs the command line once.
func (a *app) execute(ctx context.Context, args []string) error {
	root := a.root()
	root.SetArgs(args)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetIn(a.stdin)
	return root.ExecuteContext(ctx)
}

func wantsJSON(args []string) bool {
	for i, arg := range args {
		switch {
		case arg == "--":
			return false
		case arg == "--output=json", arg == "-ojson", arg == "-o=json", arg == "--output=yaml", arg == "-oyaml", arg == "-o=yaml":
			return true
		case (arg == "--output" || arg == "-o") && i+1 < len(args) && (args[i+1] == outputJSON || args[i+1] == outputYAML):
			return true
		}
	}
	return false
}

// connect gives the client of this run, which starts the daemon when it is needed.
func (a *app) connect() (*client.Client, error) {
	return a.connectWith(true)
}

// connectWith can also give a client that never starts a daemon.
func (a *app) connectWith(start bool) (*client.Client, error) {
	if a.client != nil {
		return a.client, nil
	}
	p, err := a.place()
	if err != nil {
		return nil, err
	}
	o := client.Options{Socket: p.socket, StateDir: p.stateDir, Revision: a.revision}
	if start {
		o.Daemon = p.daemon
	}
	a.client = client.New(o)
	return a.client, nil
}

// Commands are banger's, for who describes them; they are not run.
func Commands() *cobra.Command { return (&app{place: findPlace}).root() }

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:     "banger",
		Short:   "Linux machines of your own, one command each",
		Version: version.String(),
		Long: `banger gives you persistent development sandboxes: each a microVM with a name,
an SSH session and files that stay. The daemon starts by itself when it is needed.`,
		Example: `  banger vm create
  banger vm ssh calm-otter
  banger vm list`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	output := newOutput()
	root.PersistentFlags().VarP(output, "output", "o", "what to print")
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return a.setOutput(cmd, output.value) }
	root.SetFlagErrorFunc(flagError)
	root.AddGroup(&cobra.Group{ID: "main", Title: "Commands:"})
	root.SetHelpCommandGroupID("main")
	for _, cmd := range []*cobra.Command{
		a.vmCommand(), a.imageCommand(), a.operationCommand(), a.tuiCommand(), a.daemonCommand(), a.doctorCommand(), a.sshConfigCommand(), a.systemCommand(), a.eventsCommand(), a.benchCommand(), a.schemaCommand(), a.completionCommand(), a.versionCommand(),
	} {
		cmd.GroupID = "main"
		root.AddCommand(cmd)
	}
	root.AddCommand(a.internalCommand())
	group(root)
	a.complete(root)
	_ = root.RegisterFlagCompletionFunc("output", a.outputCompletion) // cannot fail: it is there, once
	return root
}

// groupAnnotation marks commands that only have subcommands.
const groupAnnotation = "group"

// group makes a command that only has subcommands: alone it prints its help, and a word it does
// not know is a usage error with the nearest ones it does.
func group(cmd *cobra.Command) *cobra.Command {
	cmd.Annotations = map[string]string{groupAnnotation: "yes"}
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		e := fault.New(fault.Invalid, "", "%q is no command of %s", args[0], cmd.CommandPath())
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			return e.WithHint("did you mean %s?", strings.Join(near, " or "))
		}
		return e.WithHint("%s --help", cmd.CommandPath())
	}
	cmd.SuggestionsMinimumDistance = 2
	return cmd
}

// usage makes a fault for a wrong command line.
func usage(cmd *cobra.Command, format string, args ...any) error {
	return fault.New(fault.Invalid, "", "%s", fmt.Sprintf(format, args...)).WithHint("%s --help", cmd.CommandPath())
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(cmd, "%s takes no arguments, and got %q", cmd.CommandPath(), args[0])
	}
	return nil
}

func oneRef(cmd *cobra.Command, args []string) error {
	switch len(args) {
	case 1:
		return nil
	case 0:
		return usage(cmd, "%s needs a VM: its name, id, or the start of its id", cmd.CommandPath())
	}
	return usage(cmd, "%s takes one VM, and got %d", cmd.CommandPath(), len(args))
}

func someRefs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return usage(cmd, "%s needs at least one VM: a name, an id, or the start of an id", cmd.CommandPath())
	}
	return nil
}

// flagError rewords pflag's errors for people and finds the flag that was meant.
func flagError(cmd *cobra.Command, err error) error {
	if errors.Is(err, errHelp) {
		return err
	}
	var own *fault.Error
	if errors.As(err, &own) {
		return own
	}
	text := err.Error()
	if _, reason, ok := strings.Cut(text, "flag: "); ok && strings.HasPrefix(text, "invalid argument") {
		return fault.New(fault.Invalid, "", "%s", reason).WithHint("%s --help", cmd.CommandPath())
	}
	e := fault.New(fault.Invalid, "", "%s", text).WithHint("%s --help", cmd.CommandPath())
	if name, ok := strings.CutPrefix(text, "unknown flag: --"); ok {
		if near := nearestFlag(cmd, name); near != "" {
			return e.WithHint("did you mean --%s?", near)
		}
	}
	return e
}
