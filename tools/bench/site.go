package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// site is one installation in a directory of its own, with its own daemon.
type site struct {
	dir    string
	banger string
	env    []string
	client *client.Client
}

// newSite makes the directories. The daemon is started by the first command, as a user's is. network is the setting: never
// root's default, which would put a bridge and rules on the machine that measures. Nor are VMs in jails, as a Firecracker alone is not.
func newSite(dir, banger, daemon, network string, env ...string) (*site, error) {
	settings := filepath.Join(dir, "config", "banger")
	for _, d := range []string{filepath.Join(dir, "run"), filepath.Join(dir, "home"), settings} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(filepath.Join(settings, "config.toml"), fmt.Appendf(nil, "network = %q\njailer = \"off\"\n", network), 0o600); err != nil {
		return nil, err
	}
	s := &site{dir: dir, banger: banger}
	s.env = append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + filepath.Join(dir, "home"),
		"XDG_RUNTIME_DIR=" + filepath.Join(dir, "run"), "XDG_CACHE_HOME=" + filepath.Join(dir, "cache"),
		"XDG_CONFIG_HOME=" + filepath.Join(dir, "config"), "BANGER_STATE_DIR=" + s.state(), "BANGERD=" + daemon,
	}, env...)
	return s, nil
}

func (s *site) state() string { return filepath.Join(s.dir, "state") }

// usage is what one process cost, its whole life.
type usage struct {
	Wall, CPU time.Duration
	Stdout    []byte
}

// run runs a program to its end and fails if it does.
func run1(ctx context.Context, env []string, argv ...string) (usage, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = env
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	began := time.Now()
	err := cmd.Run()
	u := usage{Wall: time.Since(began), Stdout: out.Bytes()}
	if cmd.ProcessState != nil {
		u.CPU = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	if err != nil {
		err = fault.Wrap(err, fault.Internal, strings.Join(argv, " "), "it failed: %s", strings.TrimSpace(errs.String()))
	}
	return u, err
}

// cli runs banger in the site.
func (s *site) cli(ctx context.Context, args ...string) (usage, error) {
	return run1(ctx, s.env, append([]string{s.banger}, args...)...)
}

// connect starts the daemon and opens a client of it.
func (s *site) connect(ctx context.Context) error {
	if _, err := s.cli(ctx, "vm", "list"); err != nil {
		return err
	}
	u, err := s.cli(ctx, "daemon", "socket")
	if err != nil {
		return err
	}
	s.client = client.New(client.Options{Socket: strings.TrimSpace(string(u.Stdout)), StateDir: s.state()})
	return nil
}

// daemonPID asks the daemon itself.
func (s *site) daemonPID(ctx context.Context) (int, error) {
	st, err := s.client.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
	return int(st.GetPid()), err
}

// create makes a VM through the API and waits for it.
func (s *site) create(ctx context.Context, name string) error {
	resp, err := s.client.VMs.CreateVM(ctx, &bangerv1.CreateVMRequest{Name: name})
	if err != nil {
		return err
	}
	return s.wait(ctx, resp.GetOperation())
}

func (s *site) delete(ctx context.Context, name string) error {
	got, err := s.client.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Id: name})
	if err != nil {
		return err
	}
	resp, err := s.client.VMs.DeleteVM(ctx, &bangerv1.DeleteVMRequest{Id: got.GetVm().GetId()})
	if err != nil {
		return err
	}
	return s.wait(ctx, resp.GetOperation())
}

func (s *site) wait(ctx context.Context, op *bangerv1.Operation) error {
	last, err := s.client.WatchOperation(ctx, op.GetId(), client.Watcher{})
	if err != nil {
		return err
	}
	return client.FromFault(last.GetFault())
}

// close ends the site's VMs and its daemon.
func (s *site) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
	defer cancel()
	if s.client == nil {
		return nil
	}
	defer s.client.Close()
	list, err := s.client.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{})
	if err == nil {
		for _, v := range list.GetVms() {
			if v.GetVmm() != "fake" { // a fake machine is a file of the site
				err = errors.Join(err, s.delete(ctx, v.GetName()))
			}
		}
	}
	_, stopErr := s.client.Shutdown(ctx)
	return errors.Join(err, stopErr)
}

// ioCounts are the counters of proc_pid_io(5) and what the site's files take on the disk.
type ioCounts struct {
	Written   int64 // wchar: bytes given to write(2) and its kin
	Storage   int64 // write_bytes: bytes that went to the page cache of a storage device
	Allocated int64 // blocks of all files of the site
}

func (s *site) io(pid int) (ioCounts, error) {
	var c ioCounts
	f, err := os.Open(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return c, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), ": ")
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return c, err
		}
		switch key {
		case "wchar":
			c.Written = n
		case "write_bytes":
			c.Storage = n
		}
	}
	err = filepath.WalkDir(s.state(), func(_ string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return ignoreGone(err)
		}
		info, err := d.Info()
		if err != nil {
			return ignoreGone(err)
		}
		c.Allocated += info.Sys().(*syscall.Stat_t).Blocks * 512
		return nil
	})
	return c, err
}

func ignoreGone(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// traced is a site whose daemon runs under strace from its first instruction, so that no program
// that it or a child of it executes is missed.
type traced struct {
	*site
	log string
}

// newTraced needs strace: a missing one is an error, never a figure that is left out.
func newTraced(dir, banger, daemon string, env ...string) (*traced, error) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		return nil, fault.Wrap(err, fault.NotFound, "strace", "it is not installed, and counts the programs that a create executes").
			WithHint("scripts/deps.sh test")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	t := &traced{log: filepath.Join(dir, "execs")}
	// -D: the daemon keeps the process that was started. --seccomp-bpf: nothing but execve stops it.
	wrapper := filepath.Join(dir, "bangerd-traced")
	script := fmt.Sprintf("#!/bin/sh\nexec %q -D -f --seccomp-bpf -e trace=execve,execveat -e signal=none -o %q -- %q \"$@\"\n", strace, t.log, daemon)
	if err := os.WriteFile(wrapper, []byte(script), 0o700); err != nil {
		return nil, err
	}
	t.site, err = newSite(dir, banger, wrapper, config.NetworkUser, env...)
	return t, err
}

// execs returns the programs that were executed so far, by path.
func (t *traced) execs() ([]string, error) {
	b, err := os.ReadFile(t.log)
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		// "123 execve("/usr/bin/x", [...], ...) = 0"; a call that another thread interrupts takes two lines.
		_, call, ok := strings.Cut(line, "execve")
		if !ok || strings.Contains(line, "resumed>") {
			continue
		}
		_, rest, _ := strings.Cut(call, "\"")
		path, _, _ := strings.Cut(rest, "\"")
		out = append(out, path)
	}
	if len(out) == 0 {
		return nil, fault.New(fault.Internal, t.log, "strace saw not even the daemon's own start")
	}
	return out, nil
}
