// Package cli holds txtar scripts of what people type and get to read, one file a behaviour: the
// real command line against a real daemon whose machines are fake.
//
// It never boots a machine, and leaves no daemon behind.
package cli

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/test/fakebundle"
)

var (
	bin    string // programs: banger, bangerd-fake
	bundle string
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "banger-cli-*")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin, bundle = filepath.Join(dir, "bin"), filepath.Join(dir, "bundle")
	// Real programs, and not this test binary under other names: banger runs itself by /proc/*/exe.
	build := exec.Command("go", "build", "-o", bin+"/", "./cmd/banger", "./test/bangerd-fake")
	build.Dir = filepath.Join("..", "..")
	build.Stderr = os.Stderr
	if err := errors.Join(build.Run(), fakebundle.Make(bundle)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			for _, dir := range []string{"home", "run"} {
				if err := os.Mkdir(filepath.Join(env.WorkDir, dir), 0o700); err != nil {
					return err
				}
			}
			env.Setenv("HOME", filepath.Join(env.WorkDir, "home"))
			env.Setenv("XDG_RUNTIME_DIR", filepath.Join(env.WorkDir, "run"))
			env.Setenv("XDG_STATE_HOME", filepath.Join(env.WorkDir, "state"))
			env.Setenv("XDG_CONFIG_HOME", filepath.Join(env.WorkDir, "config"))
			env.Setenv("XDG_CACHE_HOME", filepath.Join(env.WorkDir, "cache"))
			env.Setenv("BANGER_RUNTIME_DIR", bundle)
			env.Setenv("BUNDLE", bundle)
			env.Setenv("BANGER", filepath.Join(bin, "banger"))
			env.Setenv("BANGER_FAKE_WORLD", filepath.Join(env.WorkDir, "world"))
			env.Setenv("BANGERD", filepath.Join(bin, "bangerd-fake"))
			env.Setenv("PATH", bin+":"+env.Getenv("PATH"))
			env.Defer(func() { endDaemons(t, env.WorkDir) })
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code":       codeCmd,
			"until":      untilCmd,
			"killdaemon": killDaemonCmd,
			"daemons":    daemonsCmd,
		},
	})
}

// codeCmd runs a program that must end with an exit code: code N program args...
func codeCmd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N program args...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// untilCmd runs a program again and again until its stdout matches: until REGEXP program args...
func untilCmd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: until REGEXP program args...")
	}
	re, err := regexp.Compile(`(?m)` + args[0])
	ts.Check(err)
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := ts.Exec(args[1], args[2:]...)
		out := ts.ReadFile("stdout")
		if err == nil && re.MatchString(out) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%q never matched; last: %v\n%s", args[0], err, out)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// killDaemonCmd ends the script's daemon with SIGKILL and waits until it is gone.
func killDaemonCmd(ts *testscript.TestScript, neg bool, args []string) {
	pids := daemonsOf(ts.Getenv("WORK"))
	if neg || len(args) > 0 || len(pids) != 1 {
		ts.Fatalf("usage: killdaemon, with one daemon running; there are %d", len(pids))
	}
	ts.Check(end(pids[0], syscall.SIGKILL))
}

// daemonsCmd checks how many daemons the script has running: daemons N
func daemonsCmd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: daemons N")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	// One that lost a race ends by itself; it may take a moment.
	deadline := time.Now().Add(5 * time.Second)
	for {
		pids := daemonsOf(ts.Getenv("WORK"))
		if len(pids) == want {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%d daemons run: %v; want %d", len(pids), pids, want)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// daemonsOf finds the daemons that a script started, by their program and their environment.
func daemonsOf(work string) []int {
	var out []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		exe, err := os.Readlink(filepath.Join("/proc", e.Name(), "exe"))
		if err != nil || exe != filepath.Join(bin, "bangerd-fake") {
			continue
		}
		env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if err == nil && slices.Contains(strings.Split(string(env), "\x00"), "WORK="+work) {
			out = append(out, pid)
		}
	}
	return out
}

// end signals a process and waits until it is gone.
func end(pid int, sig syscall.Signal) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	} else if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	set := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for deadline := time.Now().Add(30 * time.Second); ; {
		n, err := unix.Poll(set, int(time.Until(deadline).Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = fmt.Errorf("process %d does not end", pid)
		}
		return err
	}
}

func endDaemons(t *testing.T, work string) {
	for _, pid := range daemonsOf(work) {
		if err := end(pid, syscall.SIGTERM); err != nil {
			t.Error(errors.Join(err, end(pid, syscall.SIGKILL)))
		}
	}
}
