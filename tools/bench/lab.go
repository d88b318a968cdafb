package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"git.thaloco.com/thaloco/banger/test/lab"
)

// labMemory is the lab's, in MiB: one guest of the default size at a time, and room for the page cache. Two CPUs: on a host of
// one what daemon and guest do side by side anywhere else comes one after the other. The guests have one each.
//
// The emulator's translated code is never thrown away in a run: what ran first after that would be several times slower, as on no
// real CPU, and banger has more code to run than Firecracker alone.
const (
	labMemory = 6144
	labCPUs   = 2
	labCode   = 2047
)

// inLab runs `bench -bare` in the lab and returns its report. A command that a user typed ends the lab
// with it.
func inLab(ctx context.Context, p plan, boot bool) (_ *report, err error) {
	host, err := filepath.EvalSymlinks(lab.HostDir)
	if err != nil {
		return nil, fmt.Errorf("no lab: make lab builds it (%w)", err)
	}
	dir, err := lab.Scratch("dist/lab")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r := newReport(p, dir) // before the lab runs: it notes the load
	outer := r.Machine
	payload, err := lab.MakePayload(ctx, ".", dir, lab.Content{Bench: true})
	if err != nil {
		return nil, err
	}
	m, err := lab.Boot(ctx, lab.Options{Host: host, Payload: payload, Memory: labMemory, CPUs: labCPUs, Code: labCode})
	if err != nil {
		return nil, err
	}
	defer m.Kill()
	quick, what := "", ""
	if p.quick {
		quick = "BENCH_QUICK=1 "
	}
	if boot {
		what = " -boot"
	}
	var out bytes.Buffer
	if err := m.Run(ctx, "root", "cd ~/banger && "+quick+"dist/bench -bare"+what+" -stock /payload/stock", nil, &out, os.Stderr); err != nil {
		return nil, fmt.Errorf("measuring in the lab: %w", err)
	}
	if err := json.Unmarshal(out.Bytes(), r); err != nil {
		return nil, fmt.Errorf("the lab's report cannot be read: %w", err)
	}
	r.Host = &outer
	r.Host.LoadAfter = load()
	return r, nil
}

// floorStages are the rows of the table, in order of time.
var floorStages = []struct{ name, label string }{
	{"bare.agent", "floor: from fork to the agent's answer"},
	{"banger.create", "`banger vm create`, the whole process"},
	{"banger.before", "of it: until the first stage"},
	{"banger.image", "of it: stage image"},
	{"banger.system disk", "of it: stage system disk"},
	{"banger.work disk", "of it: stage work disk"},
	{"banger.guest config", "of it: stage guest config"},
	{"banger.vmm", "of it: stage vmm: Firecracker's start"},
	{"banger.agent", "of it: stage agent: the guest's boot"},
	{"banger.after", "of it: until the program ends"},
	{"bare.guest.init", "floor, by the guest's clock: our init runs"},
	{"banger.guest.init", "banger, by the guest's clock: our init runs"},
	{"bare.guest.root", "floor, by the guest's clock: the root is together"},
	{"banger.guest.root", "banger, by the guest's clock: the root is together"},
	{"bare.guest.listening", "floor, by the guest's clock: the agent listens"},
	{"banger.guest.listening", "banger, by the guest's clock: the agent listens"},
	{"bare.guest.agent", "floor, by the guest's clock: the agent has answered"},
	{"banger.guest.agent", "banger, by the guest's clock: the agent has answered"},
	{"bare.guest.ssh", "floor, by the guest's clock: sshd answers"},
	{"bare.guest.userspace", "floor, by the guest's clock: systemd has finished"},
	{"bare.ssh", "floor: from fork until the host knows that sshd answers"},
	{"banger.ssh", "banger: from fork until the host knows that sshd answers"},
	{"stock.ssh", "untrimmed Debian: from fork until sshd says that it listens"},
	{"bare.pss", "floor: memory at rest, PSS of Firecracker and its guest"},
	{"banger.pss", "banger: memory at rest, PSS of Firecracker and its guest"},
	{"stock.pss", "untrimmed Debian: memory at rest, PSS of Firecracker and its guest"},
}

// judgeFloor is judge for the figures of bench-floor.
func (r *report) judgeFloor() []string {
	for _, s := range floorStages {
		r.p50(s.name) // a figure that is missing fails
	}
	r.hold("create", "times Firecracker alone, from fork to the agent's answer", r.p50("banger.create")/r.p50("bare.agent"), 1.10)
	r.hold("memory at rest", "times Firecracker's alone", r.p50("banger.pss")/r.p50("bare.pss"), 1.05)
	r.hold("agent answers", "of the untrimmed guest's time to sshd", r.p50("bare.agent")/r.p50("stock.ssh"), 0.35)
	r.hold("sshd answers", "of the untrimmed guest's time to sshd", r.p50("bare.ssh")/r.p50("stock.ssh"), 0.60)
	return r.wrong()
}
