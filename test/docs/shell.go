package docs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// shell is a reader's terminal: commands of one page run in one bash, so that variables and the
// directory stay.
type shell struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	script string
	limit  time.Duration // of one command
}

const sentinel = "--- the command ended with "

func startShell(dir string, env []string, limit time.Duration) (*shell, error) {
	s := &shell{script: filepath.Join(dir, ".typed"), limit: limit}
	s.cmd = exec.Command("bash", "--noprofile", "--norc")
	s.cmd.Dir, s.cmd.Env = dir, env
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var err error
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	s.cmd.Stdout, s.cmd.Stderr = w, w // one pipe: lines come in the order that a terminal has them
	s.out = bufio.NewReader(r)
	err = s.cmd.Start()
	return s, errors.Join(err, w.Close())
}

// run types one command and returns all that was printed, and the exit code.
func (s *shell) run(typed string) (string, int, error) {
	if err := os.WriteFile(s.script, []byte(typed+"\n"), 0o600); err != nil {
		return "", 0, err
	}
	timer := time.AfterFunc(s.limit, func() { _ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL) })
	defer timer.Stop()
	if _, err := fmt.Fprintf(s.in, ". %s </dev/null; echo \"%s$?\"\n", s.script, sentinel); err != nil {
		return "", 0, err
	}
	var out strings.Builder
	for {
		line, err := s.out.ReadString('\n')
		if text, code, ok := strings.Cut(line, sentinel); ok {
			out.WriteString(text) // output need not end with a newline
			n, err := strconv.Atoi(strings.TrimSpace(code))
			return out.String(), n, err
		}
		out.WriteString(line)
		if err != nil {
			return out.String(), 0, fmt.Errorf("the shell is gone; did the command take %v? %w", s.limit, err)
		}
	}
}

// close ends the shell and what it left running in the foreground.
func (s *shell) close() error {
	_ = s.in.Close()
	timer := time.AfterFunc(10*time.Second, func() { _ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL) })
	defer timer.Stop()
	err := s.cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil // of the last command
	}
	return err
}

// runBlock runs a block and reports what is not as the page says. The rest of the page makes no
// sense after a failure.
func (s *shell) runBlock(b block) error {
	for _, c := range b.before {
		out, code, err := s.run(c)
		if err != nil {
			return fmt.Errorf("%s: before: %s: %w\n%s", b.at(), c, err, out)
		}
		if code != 0 {
			return fmt.Errorf("%s: before: %s\nexit code %d:\n%s", b.at(), c, code, out)
		}
	}
	commands, err := b.commands()
	if err != nil {
		return err
	}
	for _, c := range commands {
		typed := c.typed
		if b.lang == "sh" {
			typed = "( set -e\n" + withoutMake(typed) + "\n)"
		} else if strings.HasPrefix(typed, "make ") {
			continue
		}
		out, code, err := s.run(typed)
		at := fmt.Sprintf("%s:%d: %s", b.page, c.line, strings.TrimSpace(c.typed))
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w\n%s", at, err, out)
		case !c.fails() && code != 0:
			return fmt.Errorf("%s\nexit code %d:\n%s", at, code, out)
		case c.fails() && code == 0:
			return fmt.Errorf("%s\nsucceeds; the page shows an error:\n%s", at, out)
		case !c.matches(out):
			return fmt.Errorf("%s\nprints:\n%s\nthe page shows:\n%s", at, out, strings.Join(c.shown, "\n"))
		}
	}
	return nil
}

func withoutMake(script string) string {
	lines := strings.Split(script, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, "make ") {
			lines[i] = ""
		}
	}
	return strings.Join(lines, "\n")
}
