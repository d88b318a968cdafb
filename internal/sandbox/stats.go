package sandbox

import (
	"context"
	"sync"
	"time"

	"connectrpc.com/connect"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Stats is what one VM costs, and what its guest says of itself.
type Stats struct {
	Ref string
	VM  vm.VM
	At  time.Time
	// Host is nil if no program of the VM runs. It and Guest may be other callers' as well, and must not be
	// changed.
	Host *HostStats
	// Guest is what the guest said: its text is printable, its numbers are not negative and its lists are
	// short, and nothing of it need be true. nil if it said nothing; GuestErr is why.
	Guest    *agentv1.StatsResponse
	GuestErr error
	Err      error // there is no such VM
}

// HostStats are what a VM costs the host. Disks are bytes.
type HostStats struct {
	process.Usage
	DiskAllocated, SystemAllocated int64
}

const (
	// askTime bounds a question to a guest that is asked for people to look at: one that hangs must not
	// keep them from the others.
	askTime = 5 * time.Second
	// asksAtOnce bounds how many guests are asked at a time.
	asksAtOnce = 16
	// guestList bounds each list of a guest's answer.
	guestList = 64
)

// each calls f for every reference at the same time, some at once; without references for every VM that
// runs. f must only touch what is its i's.
func (s *Service) each(ctx context.Context, refs []string, room func(n int), f func(i int, ref string, v vm.VM, err error)) {
	var vms []vm.VM
	if len(refs) == 0 {
		for _, v := range s.store.VMs() {
			if v.State == vm.Running {
				refs, vms = append(refs, v.Name), append(vms, v)
			}
		}
	}
	room(len(refs))
	slots := make(chan struct{}, asksAtOnce)
	var all sync.WaitGroup
	for i, ref := range refs {
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			if vms != nil {
				f(i, ref, vms[i], nil)
				return
			}
			v, err := s.Resolve(ctx, ref)
			f(i, ref, v, err)
		})
	}
	all.Wait()
}

// Stats measures VMs, one result per reference in the order given; without references all that run. A
// guest that does not answer in a few seconds is part of a result, not an error.
func (s *Service) Stats(ctx context.Context, refs []string) []Stats {
	var out []Stats
	s.each(ctx, refs, func(n int) { out = make([]Stats, n) }, func(i int, ref string, v vm.VM, err error) {
		out[i] = Stats{Ref: ref, VM: v, Err: err}
		if err == nil {
			s.measure(ctx, &out[i])
		}
	})
	return out
}

// measure fills in what a VM costs and what its guest says.
func (s *Service) measure(ctx context.Context, st *Stats) {
	m := s.machines.get(st.VM.ID)
	if m == nil {
		st.At, st.GuestErr = time.Now(), notRunning(st.VM)
		return
	}
	v := st.VM
	got, err := m.stats.ask(ctx, v.Name, func(ctx context.Context) Stats { return s.stats(ctx, m, v) })
	if err != nil {
		got = Stats{At: time.Now(), GuestErr: err}
	}
	st.At, st.Host, st.Guest, st.GuestErr = got.At, got.Host, got.Guest, got.GuestErr
}

// stats measures one machine, and asks its guest.
func (s *Service) stats(ctx context.Context, m *machine, v vm.VM) Stats {
	st := Stats{At: time.Now(), Host: &HostStats{}}
	if u, err := process.UsageOf(m.PID()); err == nil {
		select {
		case <-m.Done(): // its pid may be somebody else's by now
		default:
			st.Host.Usage = u
		}
	}
	// Disks that cannot be looked at are told by doctor and start; here they take no room.
	st.Host.DiskAllocated, _ = disk.Allocated(s.workDisk(v.ID))
	st.Host.SystemAllocated, _ = disk.Allocated(s.systemDisk(v.ID))
	st.GuestErr = s.ask(ctx, &v, "stats", func(ctx context.Context, sess *agent.Session) (err error) {
		st.Guest, err = sess.Client().Stats(ctx, &agentv1.StatsRequest{})
		return err
	})
	if st.GuestErr != nil {
		st.Guest = nil
		return st
	}
	tame(st.Guest)
	return st
}

// ask puts one question to a guest's agent within askTime. The fault says what is in the way: the VM does
// not run or is paused, its agent does not answer, is older than the question (fault.VersionSkew), or
// refused it.
func (s *Service) ask(ctx context.Context, v *vm.VM, what string, question func(context.Context, *agent.Session) error) error {
	if err := s.machines.listens(ctx, v); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	sess, err := s.machines.session(ctx, v.ID)
	if err != nil {
		return fault.Wrap(err, fault.CodeOf(err), v.Name, "the guest's agent does not answer").WithHint("banger vm show %s", v.Name)
	}
	if err := question(ctx, sess); err != nil {
		return agentFault(ctx, err, v, what)
	}
	return nil
}

// agentFault makes a fault of what an agent's call gave in place of an answer.
func agentFault(ctx context.Context, err error, v *vm.VM, what string) error {
	switch {
	case connect.CodeOf(err) == connect.CodeUnimplemented:
		return fault.Wrap(err, fault.VersionSkew, v.Name, "its agent is older than this daemon and has no %s", what).
			WithHint("banger vm restart %s brings the new one", v.Name)
	case ctx.Err() != nil, connect.CodeOf(err) == connect.CodeDeadlineExceeded: // the agent may notice first
		return fault.Wrap(err, fault.Timeout, v.Name, "the guest's agent took the question (%s) and did not answer in time", what).
			WithHint("banger vm show %s", v.Name)
	default:
		return fault.New(fault.Unavailable, v.Name, "the guest's agent could not tell (%s): %s", what, guestText(err.Error()))
	}
}

// tame makes a guest's answer safe to show and to reckon with.
func tame(g *agentv1.StatsResponse) {
	g.Cpus = max(g.Cpus, 0)
	for _, n := range []*int64{&g.UptimeMs, &g.CpuBusyMs, &g.CpuIdleMs, &g.Load1Milli, &g.Load5Milli, &g.Load15Milli,
		&g.MemoryTotalBytes, &g.MemoryAvailableBytes, &g.SwapTotalBytes, &g.SwapFreeBytes} {
		*n = max(*n, 0)
	}
	g.Disks = g.Disks[:min(len(g.Disks), guestList)]
	for _, d := range g.Disks {
		d.Target = guestText(d.Target)
		d.TotalBytes, d.UsedBytes, d.AvailableBytes = max(d.TotalBytes, 0), max(d.UsedBytes, 0), max(d.AvailableBytes, 0)
	}
	g.Interfaces = g.Interfaces[:min(len(g.Interfaces), guestList)]
	for _, i := range g.Interfaces {
		i.Name = guestText(i.Name)
		i.ReceivedBytes, i.SentBytes = max(i.ReceivedBytes, 0), max(i.SentBytes, 0)
	}
}
