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

// The cgroup is begun before the process is, and is told the pid of one that runs, once, after its pidfile was written.
func TestCgroup(t *testing.T) {
	c := newCommand(t)
	var pids []int
	c.Cgroup = func(context.Context) func(context.Context, int) {
		if r, err := readPidfile(c.Pidfile); err != nil || r.PID != starting {
			t.Errorf("pidfile when the cgroup is begun: %+v, %v; want it to say that one starts", r, err)
		}
		return func(_ context.Context, pid int) {
			if r, err := readPidfile(c.Pidfile); err != nil || r.PID != pid {
				t.Errorf("pidfile when the process is put into it: %+v, %v; want process %d", r, err, pid)
			}
			pids = append(pids, pid)
		}
	}
	p := start(t, c)
	if diff := cmp.Diff([]int{p.PID()}, pids); diff != "" {
		t.Errorf("told (-want +got):\n%s", diff)
	}
	pids = nil
	c = newCommand(t)
	c.Path = "/nonexistent/program"
	c.Cgroup = func(context.Context) func(context.Context, int) {
		return func(_ context.Context, pid int) { pids = append(pids, pid) }
	}
	if _, err := Start(t.Context(), c); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v, want not exist", err)
	}
	if diff := cmp.Diff([]int{0}, pids); diff != "" {
		t.Errorf("told of a program that did not start (-want +got):\n%s", diff)
	}
}
