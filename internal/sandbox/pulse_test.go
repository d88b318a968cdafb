package sandbox

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
)

// pulses watches a guest, and gives what is told of it.
func (r *rig) pulses(ctx context.Context, id string) (<-chan Pulse, <-chan error) {
	r.t.Helper()
	v, err := r.s.Resolve(r.ctx(), id)
	if err != nil {
		r.t.Fatal(err)
	}
	told, ended := make(chan Pulse, 16), make(chan error, 1)
	go func() {
		ended <- r.s.WatchGuest(ctx, v.ID, 600*time.Millisecond, func(p Pulse) error { told <- p; return nil })
	}()
	return told, ended
}

func (r *rig) next(told <-chan Pulse, want PulseState) Pulse {
	r.t.Helper()
	select {
	case p := <-told:
		if p.State != want {
			r.t.Errorf("told %+v, want %s", p, want)
		}
		return p
	case <-time.After(20 * time.Second):
		r.t.Fatalf("nothing was told, want %s", want)
	}
	return Pulse{}
}

// A guest that stands still is told of, and that it goes on; a paused one is told apart; the end of the VM ends the watch.
func TestWatchGuest(t *testing.T) {
	r := newRig(t).start()
	v := r.create("web")
	told, ended := r.pulses(r.ctx(), "web")
	r.next(told, PulseAnswers)
	began := time.Now()
	r.faults("web freeze")
	if p := r.next(told, PulseSilent); p.Since.Before(began.Add(-time.Second)) || time.Since(p.Since) < 600*time.Millisecond {
		t.Errorf("silent since %v, frozen at %v, now %v", p.Since, began, time.Now())
	}
	r.faults()
	r.next(told, PulseAnswers)
	r.faults("web freeze")
	if err := r.world.Pause(string(v.ID), "io-error"); err != nil {
		t.Fatal(err)
	}
	if p := r.next(told, PulsePaused); p.Note == "" {
		t.Errorf("%+v", p)
	}
	r.faults()
	if m := r.s.machines.get(v.ID); m.Resume(r.ctx()) != nil {
		t.Error("it does not go on")
	}
	r.next(told, PulseAnswers)
	r.done(r.s.Stop(r.ctx(), v.ID, true))
	if err := <-ended; err != nil {
		t.Errorf("after the VM's end: %v", err)
	}
	if err := r.s.WatchGuest(r.ctx(), v.ID, 0, nil); !fault.Is(err, fault.Precondition) {
		t.Errorf("a VM that does not run: %v", err)
	}
	if err := r.s.WatchGuest(r.ctx(), v.ID, time.Millisecond, nil); !fault.Is(err, fault.Invalid) {
		t.Errorf("a millisecond: %v", err)
	}
}

// Any number of watchers ask a guest once, and one that leaves takes no answer from the others.
func TestWatchGuestTogether(t *testing.T) {
	var asked atomic.Int32
	r := newRig(t)
	r.agent = guestWith(func(g *agentd.Guest) {
		facts := g.Facts
		g.Facts = func() agentd.Facts { asked.Add(1); return facts() }
	})
	r.start()
	r.create("web")
	before := asked.Load()
	ctx, leave := context.WithCancel(r.ctx())
	var all sync.WaitGroup
	var states []PulseState
	var mu sync.Mutex
	v, _ := r.s.Resolve(r.ctx(), "web")
	for range 50 {
		all.Go(func() {
			err := r.s.WatchGuest(ctx, v.ID, 600*time.Millisecond, func(p Pulse) error {
				mu.Lock()
				defer mu.Unlock()
				states = append(states, p.State)
				return nil
			})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("a watch that was left: %v", err)
			}
		})
	}
	time.Sleep(1100 * time.Millisecond)
	leave()
	all.Wait()
	if n := asked.Load() - before; n < 2 || n > 14 {
		t.Errorf("it was asked %d times in a second by 50", n)
	}
	if len(states) != 50 || slices.Contains(states, PulseSilent) {
		t.Errorf("%v", states)
	}
}

// Who shares a question that another watcher asked late is not told late.
func TestSilenceIsToldInTime(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	v := r.create("web")
	m := r.s.machines.get(v.ID)
	before := time.Now().Add(-time.Hour)
	m.pulse.mu.Lock()
	m.pulse.asked, m.pulse.asking = before, make(chan struct{}) // of a question that is never over
	m.pulse.mu.Unlock()
	late := make(chan time.Time, 1)
	late <- time.Now()
	if asked, well := r.s.feelPulse(r.ctx(), v.ID, m, time.Hour, late); well || !asked.Equal(before) {
		t.Errorf("asked %v, well %t", asked, well)
	}
	told, ended := r.pulses(r.ctx(), "web")
	r.next(told, PulseSilent)
	r.done(r.s.Stop(r.ctx(), v.ID, true))
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
