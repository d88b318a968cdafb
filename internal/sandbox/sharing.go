package sandbox

import (
	"context"
	"time"

	"golang.org/x/sync/singleflight"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// sharesAtOnce is how many callers are answered each by themselves; more than these share answers.
const sharesAtOnce = 4

// sharing answers one question that many may have at the same time. An answer is never older than the
// question: whoever comes while all slots are taken shares the next one with the others that wait.
type sharing[T any] struct {
	flights singleflight.Group
	slots   chan struct{}
}

func newSharing[T any]() *sharing[T] { return &sharing[T]{slots: make(chan struct{}, sharesAtOnce)} }

// ask calls answer, which must bound itself, or gives what another caller's call gave: T must not be
// changed. answer's context does not end with ctx, for others may wait when this caller is gone. The fault is
// ctx's, or fault.Timeout if the calls before took too long.
func (s *sharing[T]) ask(ctx context.Context, subject string, answer func(context.Context) T) (T, error) {
	const next = ""
	came := s.flights.DoChan(next, func() (any, error) {
		late := time.NewTimer(askTime)
		defer late.Stop()
		select {
		case s.slots <- struct{}{}:
			defer func() { <-s.slots }()
		case <-late.C:
			return nil, fault.New(fault.Timeout, subject, "those who asked before have no answer in %s", askTime).
				WithHint("banger vm show %s", subject)
		}
		s.flights.Forget(next) // who comes from here on gets a newer one
		return answer(context.WithoutCancel(ctx)), nil
	})
	var none T
	select {
	case r := <-came:
		if r.Err != nil {
			return none, r.Err
		}
		return r.Val.(T), nil
	case <-ctx.Done():
		return none, fault.Wrap(ctx.Err(), fault.CodeOf(ctx.Err()), subject, "the question was given up")
	}
}
