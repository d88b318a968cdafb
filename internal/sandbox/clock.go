package sandbox

import (
	"context"
	"sync"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
	"git.thaloco.com/thaloco/banger/internal/hostclock"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// followClock keeps the clocks of running guests right when the host's jumps: a guest does not notice that
// its host slept, or that somebody set its clock. It ends with the daemon.
func (s *Service) followClock() {
	err := hostclock.Watch(s.bg, func() {
		s.log.Info("the host's clock jumped: the clocks of running guests are set")
		s.watchers.Go(func() { s.setClocks(s.bg) }) // it may jump again before all are set
	})
	if s.bg.Err() == nil {
		s.warn("banger daemon restart", "the clocks of guests are not set after a sleep of the host: %v", err)
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

const (
	// clockTime is for how long a guest is asked that does not answer: a host that wakes may be busy with other things than its guests.
	clockTime  = 2 * time.Minute
	clockPause = 5 * time.Second
	// clockQuick is how long an answer may take for the guest to have the right time: it is set to what was right when it was asked.
	clockQuick = time.Second
	// clockSlow is after how many answers that took longer it is left at that.
	clockSlow = 3
)

// setClock steps a guest's clock if it is off. A guest that cannot be asked goes on with the clock that it
// has: a paused one is asked when it goes on, an older agent never. One that does not answer is asked again.
func (s *Service) setClock(ctx context.Context, v vm.VM) {
	bounded, cancel := context.WithTimeout(ctx, clockTime)
	defer cancel()
	for slow := 0; ; {
		began := time.Now()
		err := s.ask(bounded, &v, "clock", func(ctx context.Context, sess *agent.Session) error {
			r, err := sess.Client().SetClock(ctx, &agentv1.SetClockRequest{UnixMs: time.Now().UnixMilli(), SentBoottimeMs: system.BootTime().Milliseconds()})
			if r.GetStepped() {
				s.log.Info("a guest's clock was set", "vm", v.ID, "off_ms", r.GetOffMs())
			}
			return err
		})
		if err == nil {
			if slow++; time.Since(began) <= clockQuick || slow == clockSlow {
				return
			}
			continue
		}
		if fault.Is(err, fault.Timeout) || fault.Is(err, fault.Unavailable) {
			select {
			case <-time.After(clockPause):
				continue
			case <-bounded.Done():
			}
		}
		if ctx.Err() == nil {
			s.log.Warn("a guest's clock was not set", "vm", v.ID, "err", err)
		}
		return
	}
}
