package agentd

import (
	"context"
	"slices"
	"sync"

	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

// Stage is one step of a boot that was reached, At the guest's CLOCK_BOOTTIME.
type Stage = system.Stage

// Stages is the log of one boot. It only grows. The zero value is an empty log; safe for
// concurrent use.
type Stages struct {
	mu      sync.Mutex
	reached []Stage
	changed chan struct{} // closed at the next change; nil while nobody waits
}

// Reach appends a stage. A stage that was reached stays as it was.
func (s *Stages) Reach(stage Stage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.ContainsFunc(s.reached, func(r Stage) bool { return r.Name == stage.Name }) {
		return
	}
	s.reached = append(s.reached, stage)
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// All returns the stages reached so far, in order.
func (s *Stages) All() []Stage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.reached)
}

// after returns the stages from index n on, waiting for one if there is none.
func (s *Stages) after(ctx context.Context, n int) ([]Stage, error) {
	for {
		s.mu.Lock()
		if len(s.reached) > n {
			defer s.mu.Unlock()
			return slices.Clone(s.reached[n:]), nil
		}
		if s.changed == nil {
			s.changed = make(chan struct{})
		}
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
