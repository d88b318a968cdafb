package cli

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal runs a program in a terminal of its own.
type terminal struct {
	cmd *exec.Cmd
	pty *os.File

	mu     sync.Mutex
	screen bytes.Buffer // all that was printed
}

func openTerminal(t *testing.T, env []string, program ...string) *terminal {
	t.Helper()
	pty, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pty.Close() })
	number, err := unix.IoctlGetInt(int(pty.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(pty.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(pty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: 200}); err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, program[0], program[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.Env = append(append(os.Environ(), env...), "TERM=xterm", "LC_ALL=C.UTF-8")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = cmd.Wait() })
	term := &terminal{cmd: cmd, pty: pty}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := pty.Read(buf)
			if err != nil {
				return
			}
			term.mu.Lock()
			term.screen.Write(buf[:n])
			term.mu.Unlock()
		}
	}()
	return term
}

// tail is the end of what was printed.
func (s *terminal) tail() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.screen.String()
	return all[max(0, len(all)-500):]
}

func (s *terminal) typed(t *testing.T, keys string) {
	t.Helper()
	if _, err := s.pty.WriteString(keys); err != nil {
		t.Fatal(err)
	}
}

// TestCompletion types commands with TAB in the shells that banger completes in. What became of them the shells show by
// running them.
func TestCompletion(t *testing.T) {
	work := t.TempDir()
	env, err := install.Env(work)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := install.EndDaemons(work); err != nil {
			t.Error(err)
		}
	})
	banger := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(filepath.Join(install.Bin, "banger"), args...)
		cmd.Env = append(os.Environ(), env...)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return string(out)
	}
	// A press of TAB starts no daemon.
	if got := banger("__complete", "vm", "ssh", ""); strings.Contains(got, "otter") || len(install.Daemons(work)) > 0 {
		t.Errorf("completion without a daemon: %q, daemons %v", got, install.Daemons(work))
	}
	banger("vm", "create", "--no-start", "--name", "calm-otter", "--label", "team=web")
	banger("vm", "create", "--no-start", "--name", "buildbox")

	for _, shell := range []struct {
		program []string
		setup   string
	}{
		{[]string{"bash", "--norc", "--noprofile", "-i"}, "source /usr/share/bash-completion/bash_completion; source <(banger completion bash)"},
		{[]string{"zsh", "-f", "-i"}, "autoload -U compinit; compinit -u -D; source <(banger completion zsh)"},
		{[]string{"fish", "--no-config", "-i"}, "banger completion fish | source"},
	} {
		t.Run(shell.program[0], func(t *testing.T) {
			if _, err := exec.LookPath(shell.program[0]); err != nil {
				t.Fatalf("%v; scripts/deps.sh test installs it", err)
			}
			dir := t.TempDir()
			term := openTerminal(t, env, shell.program...)
			await := func(what string, done func() bool) {
				t.Helper()
				for deadline := time.Now().Add(30 * time.Second); !done(); time.Sleep(20 * time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatalf("%s: nothing after 30 s; on the screen:\n%q", what, term.tail())
					}
				}
			}
			ready := filepath.Join(dir, "ready")
			term.typed(t, fmt.Sprintf("cd %s; %s; echo > %s\r", dir, shell.setup, ready))
			await(shell.setup, func() bool { _, err := os.Stat(ready); return err == nil })
			for i, c := range []struct{ keys, want string }{
				{"banger vm sho\tca\t-o na\t", "calm-otter"},
				{"banger vm show calm-otter --outp\tna\t", "calm-otter"},
				{"banger image li\t-q", "default"},
				{"banger vm create --no-start --ima\tdefa\t--name made-by-%s -q", "made-by-%s"},
				{"banger vm list --sort stat\t-q --filter labels.team=web", "calm-otter"},
				{"banger vm set bui\t--label te\t; banger vm list -q --filter 'name=build*' --filter labels.team=web", "buildbox"},
				{"banger vm set bui\t--label team-; echo removed", "removed"},
				{"banger operation canc\t--help | grep -c 'cancel OPERATION'", "1"},
			} {
				out := filepath.Join(dir, fmt.Sprint(i))
				line := strings.ReplaceAll(c.keys, "%s", shell.program[0])
				if strings.Contains(line, ";") && shell.program[0] == "fish" {
					line = "begin; " + line + "; end"
				} else if strings.Contains(line, ";") {
					line = "{ " + line + "; }"
				}
				term.typed(t, line+" > "+out+"; echo > "+out+".done\r")
				await(line, func() bool { _, err := os.Stat(out + ".done"); return err == nil })
				got, err := os.ReadFile(out)
				lines := strings.Split(strings.TrimSpace(string(got)), "\n")
				if want := strings.ReplaceAll(c.want, "%s", shell.program[0]); err != nil || lines[len(lines)-1] != want {
					t.Errorf("%q: %q, %v; want %q; on the screen:\n%q", line, got, err, want, term.tail())
				}
			}
		})
	}
}

// What is proposed, as all shells get it.
func TestCompletionProposes(t *testing.T) {
	work := t.TempDir()
	env, err := install.Env(work)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := install.EndDaemons(work); err != nil {
			t.Error(err)
		}
	})
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(filepath.Join(install.Bin, "banger"), args...)
		cmd.Env, cmd.Dir = append(os.Environ(), env...), work
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return string(out)
	}
	run("vm", "create", "--name", "calm-otter", "--label", "team=web")
	run("vm", "create", "--no-start", "--name", "buildbox")
	for line, want := range map[string]string{
		"vm ssh|":                 "calm-otter\trunning, default|buildbox\tstopped, default|:4",
		"vm stop|calm-otter|":     "buildbox\tstopped, default|:4",
		"vm show|calm-otter|":     ":4",
		"vm exec|calm-otter|--|":  ":0",
		"vm exec|calm-otter|":     ":4",
		"vm create|--image|":      "default\t17 B, the default|:4",
		"vm create|--memory|":     ":4",
		"vm kill|--signal|KI":     "KILL|:4",
		"vm list|--filter|stat":   "state=|:6",
		"vm list|--filter|labels": "labels.|:6",
		"vm list|--sort|stat":     "state|:4",
		"vm set|--label|":         "team=web|:4",
		"vm wait|--for|":          "running|ssh|stopped|port:|:4",
		"vm list|-o|":             "table|wide|json|yaml|name|:4",
		"vm show|-o|":             "table|json|yaml|name|:4",
		"vm ssh|-o|":              "table|:4",
		"vm cp|cal":               "calm-otter:\trunning, default|:2",
		"vm cp|./":                ":0",
		"completion|":             "bash|zsh|fish|:4",
		"daemon|sto":              "stop\tStop the daemon; VMs run on|:4",
	} {
		words := strings.Split(line, "|")
		args := append([]string{"__complete"}, strings.Fields(words[0])...)
		args = append(args, words[1:]...)
		got := strings.Join(strings.Split(strings.TrimSpace(run(args...)), "\n"), "|")
		if got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
}
