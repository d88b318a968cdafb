package sandbox

import (
	"context"
	"sync"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// PulseState says how a guest is that somebody has a session with.
type PulseState string

// The states.
const (
	PulseAnswers PulseState = "answers"
	PulseSilent  PulseState = "silent"
	PulsePaused  PulseState = "paused"
)

// Pulse is whether a guest answers.
type Pulse struct {
	State PulseState
	Since time.Time // PulseSilent: when it answered last, or the watch began
	Note  string    // PulsePaused: why
}

const (
	// silentTime is for how long a guest must not have answered until that is told: one that is emulated on a
	// busy host takes some seconds now and then.
	silentTime    = 30 * time.Second
	minSilentTime = 100 * time.Millisecond
)

// pulse is what was last known of one machine's guest. All who watch it share the questions.
type pulse struct {
	mu     sync.Mutex
	asking chan struct{} // closed when the question under way is over; nil: there is none
	asked  time.Time     // when the last one that is over began
	well   bool          // it was answered
}

// WatchGuest tells how the guest of a running VM is: once it was asked, then after each change. It is asked three times in silent (0:
// half a minute), and only while somebody watches. It returns without an error when the VM does not run any more, or the daemon
// ends; otherwise the error is ctx's or send's. fault.Invalid, fault.NotFound, and fault.Precondition for a VM that does not run.
func (s *Service) WatchGuest(ctx context.Context, id vm.ID, silent time.Duration, send func(Pulse) error) error {
	if silent == 0 {
		silent = silentTime
	}
	if silent < minSilentTime {
		return fault.New(fault.Invalid, "silent", "%v is less than %v", silent, minSilentTime)
	}
	v, err := s.known(id)
	if err != nil {
		return err
	}
	m := s.machines.get(id)
	if m == nil {
		return notRunning(v)
	}
	alive, end := m.whileAlive(ctx)
	defer end()
	defer context.AfterFunc(s.bg, end)()
	every := time.NewTicker(silent / 3)
	defer every.Stop()
	heard := time.Now()
	late := time.NewTimer(silent)
	defer late.Stop()
	for told := (Pulse{}); ; {
		now := Pulse{State: PulseAnswers}
		asked, well := s.feelPulse(alive, id, m, silent/3, late.C)
		if alive.Err() != nil {
			return ctx.Err()
		}
		if well {
			heard = asked
			late.Reset(time.Until(heard.Add(silent)))
		} else if st, err := m.State(alive); err == nil && st == vmm.Paused {
			if current, ok := s.store.VM(id); ok {
				v = current
			}
			now, heard = Pulse{State: PulsePaused, Note: pausedNote(&v)}, time.Now()
			late.Reset(silent)
		} else if time.Since(heard) >= silent {
			now = Pulse{State: PulseSilent, Since: heard}
		}
		if now != told {
			if err := send(now); err != nil {
				return err
			}
			told = now
		}
		select {
		case <-every.C:
		case <-alive.Done():
			return ctx.Err()
		}
	}
}

// feelPulse asks a guest whether it is well, within bound, and returns when it began to. Who asks while somebody else does, or
// just did, gets the same answer, and when late comes first the one before: somebody else's question may have begun much later
// than the caller's turn came.
func (s *Service) feelPulse(ctx context.Context, id vm.ID, m *machine, bound time.Duration, late <-chan time.Time) (asked time.Time, well bool) {
	p := &m.pulse
	p.mu.Lock()
	over := p.asking
	if over == nil && time.Since(p.asked) >= bound/2 {
		over = make(chan struct{})
		p.asking = over
		s.watchers.Go(func() { // whoever asked first may leave
			asked := time.Now()
			bounded, cancel := context.WithTimeout(s.bg, bound)
			defer cancel()
			sess, err := s.machines.session(bounded, id)
			if err == nil {
				_, err = sess.Client().Health(bounded, &agentv1.HealthRequest{})
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			p.asked, p.well, p.asking = asked, err == nil, nil
			close(over)
		})
	}
	p.mu.Unlock()
	if over != nil {
		select {
		case <-over:
		case <-late:
		case <-ctx.Done():
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.asked, p.well
}
