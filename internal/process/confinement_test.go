package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"
)

// What Start holds a program to is read from the running program, and what else the daemon starts is
// not held to it.
func TestConfinement(t *testing.T) {
	privileges := func() ([]byte, error) { return exec.Command("grep", "NoNewPrivs", "/proc/self/status").Output() }
	before, err := privileges()
	if err != nil {
		t.Fatal(err)
	}
	own, err := CgroupOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for range 3 { // several threads of the daemon
		p := start(t, newCommand(t))
		got, err := ConfinementOf(p.PID())
		if err != nil {
			t.Fatal(err)
		}
		self, err := ConfinementOf(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		want := Confinement{UID: os.Geteuid(), NoNewPrivs: true, Seccomp: self.Seccomp, Cgroup: own}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("confinement (-want +got):\n%s", diff)
		}
		kill(t, p)
		if _, err := ConfinementOf(p.PID()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("of a process that is gone: %v, want that it does not exist", err)
		}
	}
	// Whichever of its threads starts them, other programs of the daemon are not held to it.
	var all errgroup.Group
	for range 20 {
		all.Go(func() error {
			out, err := privileges()
			if err == nil && string(out) != string(before) {
				err = fmt.Errorf("another program of the daemon: %q", out)
			}
			return err
		})
	}
	if err := all.Wait(); err != nil {
		t.Error(err)
	}
}

// The cgroup is told the pid of a process that runs, once, after its pidfile was written.
func TestCgroup(t *testing.T) {
	c := newCommand(t)
	var pids []int
	c.Cgroup = func(_ context.Context, pid int) {
		if r, err := readPidfile(c.Pidfile); err != nil || r.PID != pid {
			t.Errorf("pidfile when the cgroup is made: %+v, %v; want process %d", r, err, pid)
		}
		pids = append(pids, pid)
	}
	p := start(t, c)
	if diff := cmp.Diff([]int{p.PID()}, pids); diff != "" {
		t.Errorf("told (-want +got):\n%s", diff)
	}
	c = newCommand(t)
	c.Path = "/nonexistent/program"
	c.Cgroup = func(context.Context, int) { t.Error("told of a program that did not start") }
	if _, err := Start(t.Context(), c); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v, want not exist", err)
	}
}
