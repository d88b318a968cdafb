// Package cli holds txtar scripts of what people type and get to read, one file a behaviour: the
// real command line against a real daemon whose machines are fake.
//
// It never boots a machine, and leaves no daemon behind.
package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/store"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/test/fakeinstall"
)

var install fakeinstall.Install

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "banger-cli-*")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if install, err = fakeinstall.Build(filepath.Join("..", ".."), dir); err != nil {
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
			vars, err := install.Env(env.WorkDir)
			if err != nil {
				return err
			}
			for _, v := range vars {
				name, value, _ := strings.Cut(v, "=")
				env.Setenv(name, value)
			}
			env.Defer(func() {
				if err := install.EndDaemons(env.WorkDir); err != nil {
					t.Error(err)
				}
			})
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code":       codeCmd,
			"until":      untilCmd,
			"killdaemon": killDaemonCmd,
			"daemons":    daemonsCmd,
			"twin":       twinCmd,
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
	pids := install.Daemons(ts.Getenv("WORK"))
	if neg || len(args) > 0 || len(pids) != 1 {
		ts.Fatalf("usage: killdaemon, with one daemon running; there are %d", len(pids))
	}
	ts.Check(fakeinstall.End(pids[0], syscall.SIGKILL))
}

// twinCmd puts a VM on record that is as another one, but for its name and what follows the first eight digits of its id:
// twin NEW OLD. Ids are random; no script makes enough VMs for two that begin alike. The daemon must not run.
func twinCmd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 || len(install.Daemons(ts.Getenv("WORK"))) > 0 {
		ts.Fatalf("usage: twin NEW OLD, with no daemon running")
	}
	ctx := context.Background()
	records, err := store.Open(ctx, filepath.Join(ts.Getenv("XDG_STATE_HOME"), "banger", "banger.db"))
	ts.Check(err)
	v, ok := records.VMByName(args[1])
	if !ok {
		_ = records.Close()
		ts.Fatalf("there is no VM %s", args[1])
	}
	v.ID, v.Name = v.ID[:8]+vm.ID(strings.Repeat("0", 24)), args[0]
	_, err = records.AdmitVM(ctx, v, operation.Operation{ID: operation.NewID(), Kind: operation.Create, State: operation.Succeeded,
		VMID: string(v.ID), VMName: v.Name, CreatedAt: time.Now()})
	ts.Check(errors.Join(err, records.Close()))
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
		pids := install.Daemons(ts.Getenv("WORK"))
		if len(pids) == want {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%d daemons run: %v; want %d", len(pids), pids, want)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
