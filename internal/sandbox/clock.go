package sandbox

import (
	"context"
	"sync"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/hostclock"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// followClock keeps the clocks of running guests right when the host's jumps: a guest does not notice that
// its host slept, or that somebody set its clock. It ends with the daemon.
func (s *Service) followClock() {
	err := hostclock.Watch(s.bg, func() {
		s.log.Info("the host's clock jumped: the clocks of running guests are set")
		s.setClocks(s.bg)
	})
	if s.bg.Err() == nil {
		s.warn("the clocks of guests are not set after a sleep of the host: %v", err)
		s.log.Error("the host's clock is not watched", "err", err)
	}
}

// setClocks sets the clocks of all guests that run, at the same time.
func (s *Service) setClocks(ctx context.Context) {
	var all sync.WaitGroup
	for _, v := range s.store.VMs() {
		if v.State == vm.Running {
			all.Go(func() { s.setClock(ctx, v) })
		}
	}
	all.Wait()
}

// setClock steps a guest's clock if it is off. A guest that cannot be asked goes on with the clock that it
// has: a paused one is asked when it goes on, an older agent never.
func (s *Service) setClock(ctx context.Context, v vm.VM) {
	err := s.ask(ctx, &v, "clock", func(ctx context.Context, sess *agent.Session) error {
		r, err := sess.Client().SetClock(ctx, &agentv1.SetClockRequest{UnixMs: time.Now().UnixMilli()})
		if r.GetStepped() {
			s.log.Info("a guest's clock was set", "vm", v.ID, "off_ms", r.GetOffMs())
		}
		return err
	})
	if err != nil && ctx.Err() == nil {
		s.log.Warn("a guest's clock was not set", "vm", v.ID, "err", err)
	}
}
