package hostclock

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestWatchEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Watch(ctx, func() { t.Error("told of a jump") }) }()
	select {
	case err := <-done:
		t.Fatalf("ended by itself: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("goes on after its context")
	}
}

// TestJumps sets the clock of the system, so it runs where that is of no harm: test/e2e runs it in a guest.
func TestJumps(t *testing.T) {
	if os.Getenv("BANGER_TEST_MAY_SET_CLOCK") == "" {
		t.Skip("this would set the system's clock; test/e2e runs it in a guest")
	}
	jumps := make(chan struct{}, 16)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { _ = Watch(ctx, func() { jumps <- struct{}{} }) }()
	time.Sleep(500 * time.Millisecond) // until it watches; nothing tells of that
	for _, by := range []time.Duration{time.Hour, -time.Hour} {
		ts := unix.NsecToTimespec(time.Now().Add(by).UnixNano())
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
			t.Fatal(err)
		}
		select {
		case <-jumps:
		case <-time.After(10 * time.Second):
			t.Fatalf("a jump by %s was not told of", by)
		}
	}
}

// TestSleeps suspends the system to memory until an alarm of its real-time clock, so it runs where that is of no harm: test/e2e runs it in a guest.
func TestSleeps(t *testing.T) {
	if os.Getenv("BANGER_TEST_MAY_SLEEP") == "" {
		t.Skip("this would send the system to sleep; test/e2e runs it in a guest")
	}
	jumps := make(chan struct{}, 16)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { _ = Watch(ctx, func() { jumps <- struct{}{} }) }()
	time.Sleep(500 * time.Millisecond) // until it watches; nothing tells of that
	began := clock(t, unix.CLOCK_MONOTONIC)
	boot := clock(t, unix.CLOCK_BOOTTIME)
	if out, err := exec.Command("rtcwake", "--mode", "mem", "--seconds", "10").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// The one clock goes on while the system sleeps, the other does not (clock_gettime(2)).
	slept := clock(t, unix.CLOCK_BOOTTIME) - boot - (clock(t, unix.CLOCK_MONOTONIC) - began)
	if slept < 5*time.Second {
		t.Fatalf("it slept for %s", slept)
	}
	select {
	case <-jumps:
		t.Logf("told of a sleep of %s", slept)
	case <-time.After(10 * time.Second):
		t.Fatalf("a sleep of %s was not told of", slept)
	}
}

func clock(t *testing.T, id int32) time.Duration {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(id, &ts); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}
