// Package namegen owns the names that VMs get when nobody names them: adjective-animal, or what a
// program of the user's prints.
//
// It does not know which names are taken and reserves none: the caller says, and its transaction
// that admits the VM decides.
package namegen

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

const (
	// programTimeout and programOutput bound what a program of the user's may take.
	programTimeout = 5 * time.Second
	programOutput  = 4096

	// wordTries are fresh names tried before digits are appended. With half of all names taken, one
	// in a thousand names gets digits.
	wordTries = 10
	// programTries is small: a program that keeps state prints another name each time, one that does
	// not prints the same for ever.
	programTries = 3
	digitTries   = 100
)

// Generator makes names. The zero value uses the built-in words. Safe for concurrent use.
type Generator struct {
	// Program prints one name on its first line: a path, or a name to look up in PATH. It is run
	// without arguments, with the caller's environment, and is killed after 5 seconds.
	Program string
}

// Generate returns a valid name for which taken is false. taken is called from this goroutine.
// fault.Exhausted if none was found; with a Program fault.Unavailable, Timeout or Invalid, naming it.
func (g Generator) Generate(ctx context.Context, taken func(string) bool) (string, error) {
	next, tries := builtin, wordTries
	if g.Program != "" {
		next, tries = g.run, programTries
	}
	var name string
	for range tries {
		if err := ctx.Err(); err != nil {
			return "", context.Cause(ctx)
		}
		var err error
		if name, err = next(ctx); err != nil {
			return "", err
		}
		if !taken(name) {
			return name, nil
		}
	}
	for limit := 10; limit <= 1_000_000; limit *= 10 {
		for range digitTries {
			suffix := fmt.Sprintf("-%d", 1+rand.IntN(limit-1))
			stem := strings.TrimRight(name[:min(len(name), vm.MaxName-len(suffix))], "-")
			if candidate := stem + suffix; !taken(candidate) {
				return candidate, nil
			}
		}
	}
	return "", fault.New(fault.Exhausted, "name", "no free name was found near %q", name).WithHint("choose one: --name calm-otter")
}

func builtin(context.Context) (string, error) {
	return adjectives[rand.IntN(len(adjectives))] + "-" + animals[rand.IntN(len(animals))], nil
}

// run executes the program once.
func (g Generator) run(ctx context.Context) (string, error) {
	const hint = "correct or remove namegen_path in config.toml, or choose a name: --name calm-otter"
	subject := "namegen_path " + g.Program
	bounded, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	cmd := exec.CommandContext(bounded, g.Program)
	// In a group of its own, so that what the program starts ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // a grandchild that left the group may hold the pipe open
	var stdout, stderr limited
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case bounded.Err() != nil:
		return "", fault.New(fault.Timeout, subject, "printed no name within %s", programTimeout).WithHint(hint)
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, exec.ErrNotFound):
		return "", fault.Wrap(err, fault.Unavailable, subject, "there is no such program").WithHint(hint)
	case err != nil:
		return "", fault.Wrap(err, fault.Unavailable, subject, "failed%s", after(": ", firstLine(stderr.Bytes()))).WithHint(hint)
	}
	name := firstLine(stdout.Bytes())
	if err := vm.ValidateName(name); err != nil {
		return "", fault.Wrap(err, fault.Invalid, subject, "printed what cannot be a name").WithHint(hint)
	}
	return name, nil
}

func after(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}

func firstLine(b []byte) string {
	line, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(line)
}

// limited keeps the first bytes and swallows the rest, so that a program which floods us still ends.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if room := programOutput - l.Len(); room > 0 {
		l.Buffer.Write(p[:min(room, len(p))]) // never fails, see bytes.Buffer
	}
	return len(p), nil
}

// ReadFrom hides bytes.Buffer's, which io.Copy would prefer and which has no limit.
func (l *limited) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{l}, r)
}
