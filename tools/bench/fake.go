package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/api/banger/v1/bangerv1connect"
	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// measureStarts times programs that ask no daemon anything.
func measureStarts(ctx context.Context, r *report, o options, dir string) error {
	s, err := newSite(filepath.Join(dir, "starts"), o.banger, o.fake, config.NetworkUser)
	if err != nil {
		return err
	}
	f := &floors{}
	for range r.plan.Starts {
		if err := r.sample("floor.process", func() (time.Duration, error) { return f.process(ctx) }); err != nil {
			return err
		}
		for name, args := range map[string][]string{"start.help": {"--help"}, "start.version": {"version"}} {
			if err := r.sample(name, func() (time.Duration, error) { u, err := s.cli(ctx, args...); return u.Wall, err }); err != nil {
				return err
			}
		}
	}
	return nil
}

// measureFake fills an installation with fake VMs and measures at each level.
func measureFake(ctx context.Context, r *report, o options, dir, fakeBundle string, say func(string, ...any)) (err error) {
	env := []string{"BANGER_RUNTIME_DIR=" + fakeBundle, "BANGER_FAKE_WORLD=" + filepath.Join(dir, "world")}
	s, err := newSite(filepath.Join(dir, "fake"), o.banger, o.fake, config.NetworkUser, env...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close(ctx)) }()
	if err := s.connect(ctx); err != nil {
		return err
	}
	// The first create captures the image, which is no create's cost but the bundle's; a few more let
	// the daemon's heap and the log of its database find their size.
	if err := s.create(ctx, "first"); err != nil {
		return err
	}
	for range 5 {
		if err := errors.Join(s.create(ctx, "warm-up"), s.delete(ctx, "warm-up")); err != nil {
			return err
		}
	}
	blanks, err := filepath.Glob(filepath.Join(s.dir, "cache/banger/templates/banger-system-*.ext4"))
	if err != nil || len(blanks) == 0 {
		return errors.Join(err, fault.New(fault.Internal, s.dir, "the daemon made no blank disks"))
	}
	slices.SortFunc(blanks, func(a, b string) int { return len(a) - len(b) }) // the default size has most digits
	f, err := newFloors(filepath.Join(dir, "floors"), blanks[len(blanks)-1], filepath.Join(fakeBundle, bundle.FileName(bundle.WorkSeed)))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()

	if err := r.sizeOfDisks(f); err != nil {
		return err
	}
	have := 1
	for _, level := range r.plan.Levels {
		say("%d fake VMs", level)
		if err := s.fill(ctx, have, level); err != nil {
			return err
		}
		have = level
		if err := s.measureCreates(ctx, r, f, level); err != nil {
			return err
		}
		if err := s.measureLists(ctx, r, f, level); err != nil {
			return err
		}
	}
	say("programs executed for a create")
	return countExecs(ctx, r, filepath.Join(dir, "fake-traced"), o, env)
}

// fill makes VMs until there are to of them, some at once.
func (s *site) fill(ctx context.Context, from, to int) error {
	names := make(chan string)
	var group sync.WaitGroup
	var mu sync.Mutex
	var failed error
	for range 4 {
		group.Go(func() {
			for name := range names {
				if err := s.create(ctx, name); err != nil {
					mu.Lock()
					failed = errors.Join(failed, err)
					mu.Unlock()
				}
			}
		})
	}
	for i := from; i < to; i++ {
		names <- fmt.Sprintf("filler-%d", i)
	}
	close(names)
	group.Wait()
	return failed
}

// measureCreates makes one VM more than there are, again and again.
func (s *site) measureCreates(ctx context.Context, r *report, f *floors, level int) error {
	pid, err := s.daemonPID(ctx)
	if err != nil {
		return err
	}
	var io ioCounts
	for i := range r.plan.Creates {
		name := fmt.Sprintf("sample-%d", i)
		err := errors.Join(
			r.sample(at("floor.process", level), func() (time.Duration, error) { return f.process(ctx) }),
			r.sample(at("floor.transaction", level), func() (time.Duration, error) { return f.transaction(ctx) }),
			r.sample(at("floor.disks", level), f.disks),
		)
		if err != nil {
			return err
		}
		before, err := s.io(pid)
		if err != nil {
			return err
		}
		err = r.sample(at("create", level), func() (time.Duration, error) {
			u, err := s.cli(ctx, "vm", "create", "--name", name)
			return u.Wall, err
		})
		if err != nil {
			return err
		}
		after, err := s.io(pid)
		if err != nil {
			return err
		}
		io.Written += after.Written - before.Written
		io.Storage += after.Storage - before.Storage
		io.Allocated += after.Allocated - before.Allocated
		if err := s.delete(ctx, name); err != nil {
			return err
		}
	}
	n := float64(r.plan.Creates)
	r.count(at("create.bytes_written", level), float64(io.Written)/n)
	r.count(at("create.bytes_to_storage", level), float64(io.Storage)/n)
	r.count(at("create.bytes_allocated", level), float64(io.Allocated)/n)
	return nil
}

// measureLists lists all VMs: as a program, as the raw call, and, for the floor, as the mere making of
// the answer's bytes.
func (s *site) measureLists(ctx context.Context, r *report, f *floors, level int) error {
	list, err := s.client.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{})
	if err != nil {
		return err
	}
	if n := len(list.GetVms()); n != level {
		return fault.New(fault.Internal, "list", "there are %d VMs instead of %d", n, level)
	}
	u, err := s.cli(ctx, "daemon", "socket")
	if err != nil {
		return err
	}
	raw := rawClient(strings.TrimSpace(string(u.Stdout)))
	defer raw.CloseIdleConnections()
	for range r.plan.Lists {
		err := errors.Join(
			r.sample(at("floor.process.list", level), func() (time.Duration, error) { return f.process(ctx) }),
			r.sample(at("floor.encode", level), func() (time.Duration, error) { return encode(list) }),
			r.sample(at("list.daemon", level), func() (time.Duration, error) { return rawList(ctx, raw) }),
			r.sample(at("list", level), func() (time.Duration, error) {
				u, err := s.cli(ctx, "vm", "list")
				if lines := bytes.Count(u.Stdout, []byte("\n")); err == nil && lines != level+1 {
					err = fault.New(fault.Internal, "vm list", "it printed %d lines for %d VMs", lines, level)
				}
				return u.Wall, err
			}),
		)
		if err != nil {
			return err
		}
	}
	return nil
}

func encode(m proto.Message) (time.Duration, error) {
	began := time.Now()
	_, err := proto.Marshal(m)
	return time.Since(began), err
}

func rawClient(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
}

// rawList calls ListVMs and reads the answer without looking at it: what is left is the daemon's work.
func rawList(ctx context.Context, c *http.Client) (time.Duration, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://bangerd"+bangerv1connect.VMServiceListVMsProcedure, http.NoBody)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/proto")
	req.Header.Set("Connect-Protocol-Version", "1")
	req.Header.Set("Accept-Encoding", "identity")
	began := time.Now()
	resp, err := c.Do(req)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	took := time.Since(began)
	if resp.StatusCode != http.StatusOK {
		err = errors.Join(err, fmt.Errorf("ListVMs: %s", resp.Status))
	}
	return took, errors.Join(err, resp.Body.Close())
}

// countExecs counts what the daemon and the command line execute for creates.
func countExecs(ctx context.Context, r *report, dir string, o options, env []string) (err error) {
	t, err := newTraced(dir, o.banger, o.fake, env...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.close(ctx)) }()
	if err := t.connect(ctx); err != nil {
		return err
	}
	// Also the very first create after the daemon's start is counted: nothing may be put off to it.
	const creates = 5
	executed, err := t.executedBy(func() error {
		for i := range creates {
			if _, err := t.cli(ctx, "vm", "create", "--name", fmt.Sprintf("counted-%d", i)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.count("create.programs", float64(len(executed))/creates)
	own, err := cliExecs(ctx, t.site, "vm", "create", "--name", "counted-cli")
	if err != nil {
		return err
	}
	r.count("create.programs_cli", float64(own))
	return nil
}

// executedBy returns what the daemon executes while f runs.
func (t *traced) executedBy(f func() error) ([]string, error) {
	before, err := t.execs()
	if err != nil {
		return nil, err
	}
	if err := f(); err != nil {
		return nil, err
	}
	after, err := t.execs()
	if err != nil {
		return nil, err
	}
	return after[len(before):], nil
}

// cliExecs counts the programs that the command line itself executes, the one that was typed left out.
func cliExecs(ctx context.Context, s *site, args ...string) (int, error) {
	log := filepath.Join(s.dir, "cli-execs")
	t := &traced{site: s, log: log}
	argv := append([]string{"strace", "-f", "--seccomp-bpf", "-e", "trace=execve,execveat", "-e", "signal=none", "-o", log, "--", s.banger}, args...)
	if _, err := run1(ctx, s.env, argv...); err != nil {
		return 0, err
	}
	all, err := t.execs()
	return len(all) - 1, err
}

// sizeOfDisks notes what the two disks take when they are copied, which is the floor of a create's space.
func (r *report) sizeOfDisks(f *floors) error {
	var sum int64
	for _, path := range []string{f.blank, f.seed} {
		n, err := disk.Allocated(path)
		if err != nil {
			return err
		}
		sum += n
	}
	r.count("floor.disks.bytes", float64(sum))
	return nil
}
