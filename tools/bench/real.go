package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
)

// realStages are the parts of a real create, in order of time.
var realStages = []struct{ name, label string }{
	{"wall", "the whole process"},
	{"before", "until the first stage: program, call, admission"},
	{"image", "stage image"},
	{"system disk", "stage system disk"},
	{"work disk", "stage work disk"},
	{"network", "stage network"},
	{"guest config", "stage guest config"},
	{"vmm", "stage vmm: QEMU's start"},
	{"firmware", "guest: firmware and early kernel, until its clock starts"},
	{"init", "guest: kernel, until our init"},
	{"root", "guest: init, until the root is together"},
	{"listening", "guest: until its agent listens"},
	{"agent", "guest: until its agent has answered, without its wait for the host"},
	{"waited", "the guest's wait for the host"},
	{"notice", "until the daemon has noticed"},
	{"after", "until the program ends"},
	{"host", "sum: all but the guest's boot"},
}

// measureReal makes real VMs: the first one, which captures the image, then some more.
func measureReal(ctx context.Context, r *report, o options, dir string, say func(string, ...any)) (err error) {
	env := []string{"BANGER_RUNTIME_DIR=" + o.runtime}
	s, err := newSite(filepath.Join(dir, "real"), o.banger, o.bangerd, config.NetworkUser, env...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close(ctx)) }()
	if err := s.connect(ctx); err != nil {
		return err
	}
	var argv []string
	for i := range r.plan.Warm + 1 {
		kind := "warm"
		if i == 0 {
			kind = "cold"
		}
		say("a real create, %s", kind)
		if argv, err = s.realCreate(ctx, r, kind, fmt.Sprintf("%s-%d", kind, i)); err != nil {
			return err
		}
	}
	if r.Machine.QEMU, err = qemuVersion(ctx, argv[0]); err != nil {
		return err
	}
	say("programs executed for a real create")
	return countReal(ctx, r, filepath.Join(dir, "real-traced"), s, o, env)
}

// realCreate makes one VM, takes its create apart, and returns the command line of its QEMU.
func (s *site) realCreate(ctx context.Context, r *report, kind, name string) (argv []string, err error) {
	began := time.Now()
	u, err := s.cli(ctx, "vm", "create", "--name", name)
	if err != nil {
		return nil, err
	}
	ended := began.Add(u.Wall)
	if kind == "warm" {
		for range 5 { // GetVM asks the agent, and the guest is as busy as when it was asked first
			err := r.sample("floor.agent", func() (time.Duration, error) {
				began := time.Now()
				_, err := s.client.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Id: name})
				return time.Since(began), err
			})
			if err != nil {
				return nil, err
			}
		}
	}
	v, err := s.booted(ctx, name)
	if err != nil {
		return nil, err
	}
	r.Machine.Accel = v.GetAccel()
	op, err := s.createOf(ctx, v.GetId())
	if err != nil {
		return nil, err
	}
	part := func(stage string, d time.Duration) { r.add("real."+kind+"."+stage, d) }
	part("wall", u.Wall)
	var stages = map[string]*bangerv1.OperationStage{}
	for _, st := range op.GetStages() {
		stages[st.GetName()] = st
		if st.GetName() != "agent" {
			part(st.GetName(), st.GetFinishedAt().AsTime().Sub(st.GetStartedAt().AsTime()))
		}
	}
	agent := stages["agent"]
	if agent == nil {
		return nil, fault.New(fault.Internal, name, "its create has no agent stage")
	}
	start := op.GetStages()[0].GetStartedAt().AsTime()
	part("before", start.Sub(began))
	guest, err := s.clock(v.GetId())
	if err != nil {
		return nil, err
	}
	ran := agent.GetStartedAt().AsTime()
	part("firmware", guest.born.Sub(ran))
	last := time.Duration(0)
	for _, b := range v.GetBoot() {
		reached := time.Duration(b.GetAtMs() * float64(time.Millisecond))
		switch n := b.GetName(); n {
		case "init", "root", "listening":
			part(n, reached-last)
			last = reached
		case "agent":
			part(n, reached-last-guest.waited)
			last = reached
		}
	}
	part("waited", guest.waited)
	ready := guest.born.Add(last)
	part("notice", agent.GetFinishedAt().AsTime().Sub(ready))
	part("after", ended.Sub(agent.GetFinishedAt().AsTime()))
	part("host", ran.Sub(began)+guest.waited+ended.Sub(ready))

	if argv, err = commandLine(int(v.GetPid())); err != nil {
		return nil, err
	}
	if err := s.stopGuest(ctx, v.GetId()); err != nil {
		return nil, err
	}
	if kind == "warm" {
		// Its disks are still there, and its VMM is not: the bare start opens the same files.
		if err := s.bareStarts(ctx, r, argv, name); err != nil {
			return nil, err
		}
	}
	return argv, s.delete(ctx, name)
}

// booted waits until the guest has told the daemon of its boot as far as its SSH server.
func (s *site) booted(ctx context.Context, name string) (*bangerv1.VM, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, fault.New(fault.Timeout, name, "its guest did not report its boot within a minute"))
	defer cancel()
	return s.reported(ctx, name, boot.StageSSH)
}

// reported waits until the guest has told the daemon of all these stages.
func (s *site) reported(ctx context.Context, name string, stages ...string) (*bangerv1.VM, error) {
	watch, err := s.client.Daemon.Watch(ctx, &bangerv1.WatchRequest{})
	if err != nil {
		return nil, err
	}
	defer watch.Close()
	reported := func(v *bangerv1.VM) bool {
		return v.GetName() == name && !slices.ContainsFunc(stages, func(stage string) bool { return !slices.ContainsFunc(v.GetBoot(), named(stage)) })
	}
	for watch.Receive() {
		vms := watch.Msg().GetSnapshot().GetVms()
		if v := watch.Msg().GetVm(); v != nil {
			vms = append(vms, v)
		}
		if i := slices.IndexFunc(vms, reported); i >= 0 {
			return vms[i], nil
		}
	}
	return nil, errors.Join(watch.Err(), context.Cause(ctx))
}

// bareStarts samples the VMM's own share of a create.
func (s *site) bareStarts(ctx context.Context, r *report, argv []string, name string) error {
	dir := filepath.Join(s.dir, "bare-"+name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// The config drive goes at stop; any file does for a guest that never runs.
	config := filepath.Join(dir, "config.tar")
	if err := os.WriteFile(config, make([]byte, 4096), 0o600); err != nil {
		return err
	}
	for i, a := range argv {
		if strings.Contains(a, `/config.tar"`) {
			var node map[string]any
			if err := json.Unmarshal([]byte(a), &node); err != nil {
				return err
			}
			node["file"].(map[string]any)["filename"] = config
			b, err := json.Marshal(node)
			if err != nil {
				return err
			}
			argv[i] = string(b)
		}
	}
	for range 5 {
		if err := r.sample("floor.qemu", func() (time.Duration, error) { return bareQEMU(ctx, dir, argv) }); err != nil {
			return err
		}
	}
	return nil
}

// stopGuest ends a guest hard: what it holds is thrown away next.
func (s *site) stopGuest(ctx context.Context, id string) error {
	resp, err := s.client.VMs.StopVM(ctx, &bangerv1.StopVMRequest{Id: id, Force: true})
	if err != nil {
		return err
	}
	return s.wait(ctx, resp.GetOperation())
}

func (s *site) createOf(ctx context.Context, id string) (*bangerv1.Operation, error) {
	list, err := s.client.Operations.ListOperations(ctx, &bangerv1.ListOperationsRequest{})
	if err != nil {
		return nil, err
	}
	for _, op := range list.GetOperations() {
		if op.GetVmId() == id && op.GetKind() == "create" && len(op.GetStages()) > 0 {
			return op, nil
		}
	}
	return nil, fault.New(fault.Internal, id, "the daemon knows no create of it")
}

// clock is what a guest's reports tell of its time.
type clock struct {
	born   time.Time     // its beginning, by the host's clock
	waited time.Duration // for the host, in the first handshake
}

// clock lays a guest's clock over the host's. Each stage that the guest reported gives its clock's
// reading when it sent the report; the daemon's log has when that arrived. The one that was shortest on
// its way is the best.
func (s *site) clock(id string) (clock, error) {
	b, err := os.ReadFile(filepath.Join(s.state(), "bangerd.log"))
	if err != nil {
		return clock{}, err
	}
	c := clock{waited: -1}
	for line := range bytes.Lines(b) {
		var entry struct {
			Time    time.Time `json:"time"`
			Message string    `json:"msg"`
			VM      string    `json:"vm"`
			Stage   string    `json:"stage"`
			Detail  string    `json:"detail"`
			Guest   float64   `json:"guest_ms"`
		}
		if json.Unmarshal(line, &entry) != nil || entry.Message != "the guest reached a stage of its boot" || entry.VM != id || entry.Guest <= 0 {
			continue
		}
		if t := entry.Time.Add(-time.Duration(entry.Guest * float64(time.Millisecond))); c.born.IsZero() || t.Before(c.born) {
			c.born = t
		}
		if entry.Stage == "agent" {
			var ms float64
			if _, err := fmt.Sscanf(entry.Detail, "waited %f ms for the host", &ms); err != nil {
				return c, fault.Wrap(err, fault.Internal, id, "its agent did not say how long it waited for the host: %q", entry.Detail)
			}
			c.waited = time.Duration(ms * float64(time.Millisecond))
		}
	}
	if c.waited < 0 {
		return c, fault.New(fault.Internal, id, "the daemon's log does not say what its guest reported")
	}
	return c, nil
}

func commandLine(pid int) ([]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil, err
	}
	argv := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return nil, err
	}
	argv[0] = exe
	return argv, nil
}

func qemuVersion(ctx context.Context, path string) (string, error) {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	first, _, _ := strings.Cut(string(out), "\n")
	first, _, _ = strings.Cut(strings.TrimPrefix(first, "QEMU emulator version "), " ")
	return "QEMU " + first, err
}

// countReal counts the programs of a real create, the daemon's first one. It shares the first site's
// captured image by its state directory, which only one daemon may use at a time.
func countReal(ctx context.Context, r *report, dir string, s *site, o options, env []string) (err error) {
	if err := s.close(ctx); err != nil {
		return err
	}
	s.client = nil
	t, err := newTraced(dir, o.banger, o.bangerd, env...)
	if err != nil {
		return err
	}
	for _, d := range []string{"state", "cache"} {
		if err := os.Rename(filepath.Join(s.dir, d), filepath.Join(t.dir, d)); err != nil {
			return err
		}
	}
	defer func() { err = errors.Join(err, t.close(ctx)) }()
	if err := t.connect(ctx); err != nil {
		return err
	}
	executed, err := t.executedBy(func() error { _, err := t.cli(ctx, "vm", "create", "--name", "counted"); return err })
	if err != nil {
		return err
	}
	r.count("real.programs", float64(len(executed)))
	if len(executed) != 2 {
		fmt.Fprintln(os.Stderr, "executed by the daemon:", strings.Join(executed, " "))
	}
	return nil
}
