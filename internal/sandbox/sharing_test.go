package sandbox

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func TestSharing(t *testing.T) {
	// occupy takes all slots.
	occupy := func(t *testing.T, all *sync.WaitGroup, ask func(context.Context) (int, error)) {
		for range sharesAtOnce {
			all.Go(func() { _, _ = ask(t.Context()) })
			synctest.Wait()
		}
	}
	// Each sub-test's answer is a number that grows with each call, after hold.
	rig := func() (ask func(context.Context) (int, error), hold chan struct{}, calls func() int) {
		s, hold := newSharing[int](), make(chan struct{})
		var mu sync.Mutex
		n := 0
		return func(ctx context.Context) (int, error) {
				return s.ask(ctx, "web", func(ctx context.Context) int {
					mu.Lock()
					n++
					mine := n
					mu.Unlock()
					select {
					case <-hold:
					case <-time.After(time.Hour):
					}
					if ctx.Err() != nil {
						return -1
					}
					return mine
				})
			}, hold, func() int {
				mu.Lock()
				defer mu.Unlock()
				return n
			}
	}

	t.Run("few calls for many callers, and none gets an answer that is older than its question", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ask, hold, calls := rig()
			var all sync.WaitGroup
			for range 100 {
				all.Go(func() {
					if _, err := ask(t.Context()); err != nil {
						t.Error(err)
					}
				})
				synctest.Wait()
			}
			before := calls()
			if before != sharesAtOnce {
				t.Errorf("%d calls while none was answered", before)
			}
			close(hold)
			all.Wait()
			if n := calls(); n != before+1 {
				t.Errorf("%d calls, want one for all who waited", n-before)
			}
			if n, err := ask(t.Context()); n != before+2 || err != nil {
				t.Errorf("afterwards: the answer of call %d, %v", n, err)
			}
		})
	})

	t.Run("who asked first may go away", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ask, hold, _ := rig()
			var all sync.WaitGroup
			occupy(t, &all, ask)
			ctx, cancel := context.WithCancel(t.Context())
			all.Go(func() {
				if _, err := ask(ctx); !fault.Is(err, fault.Cancelled) || !errors.Is(err, context.Canceled) {
					t.Errorf("given up: %v", err)
				}
			})
			synctest.Wait()
			all.Go(func() {
				if n, err := ask(t.Context()); n != sharesAtOnce+1 || err != nil {
					t.Errorf("%d, %v", n, err)
				}
			})
			synctest.Wait()
			cancel()
			synctest.Wait()
			close(hold)
			all.Wait()
		})
	})

	t.Run("nobody waits for ever behind others", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ask, hold, _ := rig()
			var all sync.WaitGroup
			occupy(t, &all, ask)
			_, err := ask(t.Context())
			wants(t, "behind calls that hang", err, fault.Timeout, "those who asked before have no answer in 5s", "banger vm show web")
			close(hold)
			all.Wait()
			if _, err := ask(t.Context()); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	})
}
