// Package fakeinstall owns installations of banger for tests that run its programs and boot nothing:
// the command line, the daemon with fake machines (bangerd-fake), a bundle that passes all checks,
// and the environment in which these find each other and nothing of the user's.
//
// It never touches the user's own installation, and ends the daemons it is told to, no others.
package fakeinstall

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/test/fakebundle"
)

// Install is the part that any number of state directories can share.
type Install struct {
	Bin    string // directory of banger and bangerd-fake
	Bundle string // directory of the runtime bundle
}

// Build builds the programs of the module at root and makes a bundle, all in dir. It runs the go
// command: real programs and not a test binary under other names, because banger runs itself by
// /proc/*/exe.
func Build(root, dir string) (Install, error) {
	in := Install{Bin: filepath.Join(dir, "bin"), Bundle: filepath.Join(dir, "bundle")}
	build := exec.Command("go", "build", "-o", in.Bin+"/", "./cmd/banger", "./test/bangerd-fake")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		return in, fmt.Errorf("go build: %w\n%s", err, out)
	}
	return in, fakebundle.Make(in.Bundle)
}

// Env makes home and runtime directory in work, and returns the variables of an installation that
// keeps everything there. They replace the caller's of the same names.
func (in Install) Env(work string) ([]string, error) {
	for _, dir := range []string{"home", "run"} {
		if err := os.Mkdir(filepath.Join(work, dir), 0o700); err != nil {
			return nil, err
		}
	}
	return []string{
		"WORK=" + work, // by which Daemons finds them
		"HOME=" + filepath.Join(work, "home"),
		"XDG_RUNTIME_DIR=" + filepath.Join(work, "run"),
		"XDG_STATE_HOME=" + filepath.Join(work, "state"),
		"XDG_CONFIG_HOME=" + filepath.Join(work, "config"),
		"XDG_CACHE_HOME=" + filepath.Join(work, "cache"),
		"BANGER_STATE_DIR=",
		"BANGER_CONFIG=",
		"BANGER_LOG_LEVEL=",
		"BANGER_RUNTIME_DIR=" + in.Bundle,
		"BUNDLE=" + in.Bundle,
		"BANGER=" + filepath.Join(in.Bin, "banger"),
		"BANGERD=" + filepath.Join(in.Bin, "bangerd-fake"),
		"BANGER_FAKE_WORLD=" + filepath.Join(work, "world"),
		"PATH=" + in.Bin + ":" + os.Getenv("PATH"),
	}, nil
}

// Daemons finds the daemons that run for a work directory, by their program and their environment.
func (in Install) Daemons(work string) []int {
	var out []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		exe, err := os.Readlink(filepath.Join("/proc", e.Name(), "exe"))
		if err != nil || exe != filepath.Join(in.Bin, "bangerd-fake") {
			continue
		}
		env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if err == nil && slices.Contains(strings.Split(string(env), "\x00"), "WORK="+work) {
			out = append(out, pid)
		}
	}
	return out
}

// EndDaemons ends the daemons of a work directory. One that has to be killed is an error.
func (in Install) EndDaemons(work string) error {
	var errs []error
	for _, pid := range in.Daemons(work) {
		if err := End(pid, syscall.SIGTERM); err != nil {
			errs = append(errs, err, End(pid, syscall.SIGKILL))
		}
	}
	return errors.Join(errs...)
}

// End signals a process and waits until it is gone, at most 30 s.
func End(pid int, sig syscall.Signal) error {
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
		n, err := unix.Poll(set, max(0, int(time.Until(deadline).Milliseconds())))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = fmt.Errorf("process %d does not end", pid)
		}
		return err
	}
}
