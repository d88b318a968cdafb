package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

func (a *app) execCommand() *cobra.Command {
	var (
		tty, noTTY, interactive bool
		user, dir               string
		env                     environment
	)
	cmd := &cobra.Command{
		Use:   "exec [flags] VM -- COMMAND [ARG...]",
		Short: "Run a command in a VM without SSH",
		Long: `Run a command in a VM as root, through the VM's agent: no SSH server, no network and no shell
takes part in it. Input, output, signals and Ctrl-C pass through; the exit code is the command's, or 128
and the signal that ended it, 127 if there is no such program in the guest, 126 if it cannot be run.
It has a terminal if input and output here are one. If this program ends, the command gets SIGHUP.
In the first minute of a VM it waits until the guest's services have started.`,
		Example: `  banger vm exec calm-otter -- uname -a
  banger vm exec --workdir /srv --env PORT=8080 calm-otter -- make run
  banger vm exec --user nobody calm-otter -- sh -c 'id && pwd'
  tar -c . | banger vm exec calm-otter -- tar -x -C /srv`,
		Args: func(cmd *cobra.Command, args []string) error {
			dash := cmd.ArgsLenAtDash()
			switch {
			case dash < 0 && len(args) > 1:
				return usage(cmd, "a command is given after --: banger vm exec %s -- %s", args[0], args[1])
			case dash < 0 && len(args) == 1, dash == 1 && len(args) == 1:
				return usage(cmd, "%s needs a command: banger vm exec %s -- COMMAND", cmd.CommandPath(), args[0])
			case dash < 0:
				return oneRef(cmd, args)
			}
			return oneRef(cmd, args[:dash])
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if tty && noTTY {
				return usage(cmd, "--tty and --no-tty exclude each other")
			}
			terminal := interactive && isatty.IsTerminal(a.stdin.Fd()) && a.outTTY
			return a.exec(cmd.Context(), args[0], client.Command{
				Args: args[1:], Env: env, Dir: dir, User: user, TTY: tty || terminal && !noTTY,
			}, interactive)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.BoolVarP(&tty, "tty", "t", false, "give the command a terminal, also where there is none here")
	f.BoolVar(&noTTY, "no-tty", false, "give it none, also where there is one here")
	f.BoolVarP(&interactive, "interactive", "i", true, "pass input on; --interactive=false gives it none")
	f.VarP((*text)(&user), "user", "u", "user or number, :group may follow (default root)")
	f.VarP((*path)(&dir), "workdir", "w", "directory in the guest to run it in (default the user's home)")
	f.VarP(&env, "env", "e", "variable for the command, can be repeated; NAME alone takes the one here")
	return cmd
}

// exec runs a command in a VM and passes its exit code on.
func (a *app) exec(ctx context.Context, ref string, command client.Command, interactive bool) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	v, err := a.running(ctx, c, ref)
	if err != nil {
		return err
	}
	if err := a.settle(ctx, c, v); err != nil {
		return err
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH)
	defer signal.Stop(signals)
	if ctx.Err() != nil { // by one that came before
		return errInterrupted
	}
	// From here on signals are the command's: ctx would end with the first one.
	ctx = context.WithoutCancel(ctx)

	s := client.CommandStreams{Stdout: a.stdout, Stderr: a.stderr}
	if interactive {
		s.Stdin = a.stdin
	}
	here, raw := int(a.stdin.Fd()), false
	if command.TTY {
		if t := os.Getenv("TERM"); t != "" && !slices.ContainsFunc(command.Env, func(e string) bool { return strings.HasPrefix(e, "TERM=") }) {
			command.Env = append(command.Env, "TERM="+t)
		}
		if size, err := unix.IoctlGetWinsize(here, unix.TIOCGWINSZ); err == nil {
			command.Rows, command.Cols, raw = size.Row, size.Col, interactive
		}
	}
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	e := &execution{leave: leave, numbers: make(chan int, 16), sizes: make(chan client.TerminalSize, 1)}
	s.Signals, s.Sizes = e.numbers, e.sizes
	var unprepared error
	s.Begun = func() {
		e.begun.Store(true)
		if !raw {
			return
		}
		if e.restore, unprepared = rawTerminal(here); unprepared != nil {
			leave()
		}
	}
	defer func() { // after c.Exec, which calls Begun
		if e.restore != nil {
			e.restore()
		}
	}()
	if raw { // Ctrl-C is a key, once there is a command
		s.Stdin = &interrupts{Reader: s.Stdin, each: func() {
			e.interruptKey(a.now(), func() bool { return a.guestAnswers(ctx, c, v.GetId()) })
		}}
		s.Stdout = &heard{Writer: s.Stdout, e: e, now: a.now}
	}
	e.pulse = a.watchPulse(ctx, c, v, "Ctrl-C", saying(a.stderr, func() bool { return raw && e.begun.Load() }))
	defer e.pulse.end()
	left := make(chan struct{})
	go func() {
		defer close(left)
		e.passSignals(ctx, signals, here, a.now)
	}()
	status, err := c.Exec(ctx, v.GetId(), command, s)
	impatient := ctx.Err() != nil
	leave()
	<-left
	switch {
	case unprepared != nil:
		return fault.Wrap(unprepared, fault.Internal, "stdin", "the terminal cannot be set up: %v", unprepared)
	case impatient && err != nil:
		return errInterrupted
	case err != nil:
		return named(err, v.GetName())
	case status.Failed != "":
		fmt.Fprintf(a.stderr, "banger: %s: %s\n", v.GetName(), status.Failed)
	}
	return passed(status.Exit())
}

// impatience is within how long the third Ctrl-C ends this program: a guest that hangs passes no
// signal on.
const impatience = 2 * time.Second

// execution is a command that runs, as far as its signals go.
type execution struct {
	leave   context.CancelFunc
	numbers chan int // what is not taken stands for what comes after it, as pending signals do
	sizes   chan client.TerminalSize
	begun   atomic.Bool // the guest has been asked to run it
	restore func()      // of the terminal that was made raw then
	pulse   *pulse

	mu     sync.Mutex
	typed  []time.Time // the latest interrupts
	output time.Time   // when the guest last sent some
	asking bool
}

// passSignals sends signals and the terminal's new sizes on until ctx ends. Before there is a command, and when its guest is known to be
// silent, those that are to end a program end this one.
func (e *execution) passSignals(ctx context.Context, signals <-chan os.Signal, terminal int, now func() time.Time) {
	for {
		select {
		case s := <-signals:
			if s == syscall.SIGWINCH {
				size, err := unix.IoctlGetWinsize(terminal, unix.TIOCGWINSZ)
				if err != nil {
					continue
				}
				select { // only the latest counts
				case <-e.sizes:
				default:
				}
				e.sizes <- client.TerminalSize{Rows: size.Row, Cols: size.Col}
				continue
			}
			number := s.(syscall.Signal) // os/signal gives no other on Unix
			ends := number == syscall.SIGINT || number == syscall.SIGTERM || number == syscall.SIGHUP || number == syscall.SIGQUIT
			if ends && (!e.begun.Load() || e.pulse.silent.Load()) || number == syscall.SIGINT && e.third(now()) {
				e.leave()
			}
			select {
			case e.numbers <- int(number):
			default:
			}
		case <-ctx.Done():
			return
		}
	}
}

// third notes an interrupt, and says whether it is the third one within impatience.
func (e *execution) third(now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.typed = append(e.typed, now)
	e.typed = e.typed[max(0, len(e.typed)-3):]
	return len(e.typed) == 3 && now.Sub(e.typed[0]) < impatience
}

// interruptKey is told of each Ctrl-C that was typed for a command with a terminal, which may mean anything to it. The third one that nothing came
// of leaves a guest that does not answer.
func (e *execution) interruptKey(now time.Time, answers func() bool) {
	if e.pulse.silent.Load() {
		e.leave()
		return
	}
	if !e.third(now) {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.asking || e.output.After(e.typed[0]) {
		return
	}
	e.asking = true
	go func() { // keys are passed on meanwhile
		if !answers() {
			e.leave()
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		e.asking = false
	}()
}

// guestAnswers asks how a guest is that does not seem to react. Where there is no daemon to ask, it does not.
func (*app) guestAnswers(ctx context.Context, c *client.Client, id string) bool {
	ctx, cancel := context.WithTimeout(ctx, remindTime)
	defer cancel()
	if running, err := c.Running(ctx); err != nil || !running {
		return false
	}
	resp, err := c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Id: id})
	return err == nil && strings.HasPrefix(resp.GetVm().GetAgent(), "answers")
}

// interrupts passes input on, and tells of each Ctrl-C in it.
type interrupts struct {
	io.Reader
	each func()
}

func (i *interrupts) Read(b []byte) (int, error) {
	n, err := i.Reader.Read(b)
	for range bytes.Count(b[:n], []byte{0x03}) {
		i.each()
	}
	return n, err
}

// heard passes output on, and notes that there was some.
type heard struct {
	io.Writer
	e   *execution
	now func() time.Time
}

func (h *heard) Write(b []byte) (int, error) {
	h.e.mu.Lock()
	h.e.output = h.now()
	h.e.mu.Unlock()
	return h.Writer.Write(b)
}

// running resolves a reference to a VM that can be entered.
func (a *app) running(ctx context.Context, c *client.Client, ref string) (*bangerv1.VM, error) {
	resp, err := c.VMs.ResolveVMs(ctx, &bangerv1.ResolveVMsRequest{Refs: []string{ref}})
	if err != nil {
		return nil, err
	}
	r := resp.GetResults()[0]
	if r.GetFault() != nil {
		return nil, client.FromFault(r.GetFault())
	}
	return r.GetVm(), enterable(r.GetVm())
}

// named gives an error that names nothing the VM's name.
func named(err error, name string) error {
	f, ok := err.(*client.Error) //nolint:errorlint // only the outermost is printed
	if ok && f.Subject == "" {
		with := *f
		with.Subject = name
		return &with
	}
	return err
}

// rawTerminal passes every key on as it is (cfmakeraw in termios(3)) until restore.
func rawTerminal(fd int) (restore func(), err error) {
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	raw := *old
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Oflag &^= unix.OPOST
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return nil, err
	}
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETSW, old) }, nil
}

// path is a flag with a path.
type path string

func (p *path) String() string     { return string(*p) }
func (p *path) Type() string       { return "PATH" }
func (p *path) Set(s string) error { *p = path(s); return nil }

// environment is a repeatable flag of NAME=VALUE; NAME alone takes the value here.
type environment []string

func (e *environment) String() string { return "" }
func (e *environment) Type() string   { return "NAME=VALUE" }
func (e *environment) Set(s string) error {
	name, _, ok := strings.Cut(s, "=")
	if name == "" {
		return fmt.Errorf("%q is no variable: write NAME=VALUE", s)
	}
	if !ok {
		value, set := os.LookupEnv(name)
		if !set {
			return fmt.Errorf("%s is not set here: write %s=VALUE", name, name)
		}
		s = name + "=" + value
	}
	*e = append(*e, s)
	return nil
}
