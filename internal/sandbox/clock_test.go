package sandbox

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// guestClock is the clock of a fake guest, which may be off.
type guestClock struct {
	mu  sync.Mutex
	off time.Duration
	set chan time.Duration // by how much it was off when it was set
}

func (c *guestClock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.off)
}

func (c *guestClock) setNow(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.off
	c.off = time.Until(t)
	c.set <- was
	return nil
}

func (c *guestClock) stand(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off = -d
}

func (c *guestClock) wantSet(t *testing.T, when string) {
	t.Helper()
	select {
	case was := <-c.set:
		if off := time.Since(c.now()).Abs(); off > 2*time.Second {
			t.Errorf("%s: off by %s after it was set, %s before", when, off, was)
		}
	case <-time.After(patience):
		t.Fatalf("%s: the guest's clock is not set", when)
	}
}

// A guest's clock stands still while its host sleeps, while it is paused, and while no daemon is there.
func TestGuestClock(t *testing.T) {
	clock := &guestClock{set: make(chan time.Duration, 16)}
	r := newRig(t)
	r.agent = guestWith(func(g *agentd.Guest) { g.Now, g.SetNow = clock.now, clock.setNow })
	r.start()
	clock.stand(time.Minute)
	v := r.create("web")
	clock.wantSet(t, "after its boot")

	clock.stand(time.Hour)
	r.s.setClocks(r.ctx()) // what a jump of the host's clock leads to
	clock.wantSet(t, "after a jump")

	clock.stand(500 * time.Millisecond)
	r.s.setClocks(r.ctx())
	if len(clock.set) != 0 {
		t.Error("a clock that is hardly off was set")
	}

	if err := r.world.Pause("web", vmm.NoRoom); err != nil {
		t.Fatal(err)
	}
	r.untilVM(v.ID, "a note of the pause", func(v vm.VM) bool { return v.Note != "" })
	clock.stand(time.Minute)
	r.s.setClocks(r.ctx()) // it does not hear
	if len(clock.set) != 0 {
		t.Error("the clock of a paused guest was set")
	}
	r.done(r.s.Start(r.ctx(), v.ID))
	clock.wantSet(t, "after a pause")

	clock.stand(time.Minute)
	r.restart()
	clock.wantSet(t, "by the next daemon")
}

// A guest that does not answer just when its host wakes is asked again, and so is one whose answer took so long that what it was set to is
// wrong by then.
func TestGuestClockOfASlowGuest(t *testing.T) {
	t.Parallel()
	clock := &guestClock{set: make(chan time.Duration, 16)}
	var first atomic.Bool
	var one sync.Mutex // as the agent of a guest has: the question that it found when it went on comes beside the next one
	r := newRig(t)
	r.agent = guestWith(func(g *agentd.Guest) {
		g.Now = clock.now
		g.SetNow = func(at time.Time) error {
			one.Lock()
			defer one.Unlock()
			if first.Swap(false) {
				time.Sleep(3 * time.Second) // between the host's looking at its clock and the guest's
			}
			return clock.setNow(at)
		}
	})
	r.start()
	clock.stand(time.Minute)
	r.create("web")
	clock.wantSet(t, "after its boot")
	first.Store(true)
	clock.stand(time.Hour)
	r.faults("web freeze")
	done := make(chan struct{})
	go func() { defer close(done); r.s.setClocks(r.ctx()) }()
	time.Sleep(askTime + time.Second) // the first question is over
	if len(clock.set) != 0 {
		t.Error("the clock of a guest that stands still was set")
	}
	r.faults()
	for range 2 {
		select {
		case <-clock.set:
		case <-time.After(patience):
			t.Fatal("the guest is not asked again")
		}
	}
	<-done
	if off := time.Since(clock.now()).Abs(); off > time.Second {
		t.Errorf("off by %s in the end", off)
	}
}
