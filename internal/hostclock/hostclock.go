// Package hostclock owns one question about the host's clock: when did it jump? It does when somebody sets
// it, and when the host wakes from sleep. Guests do not notice either.
//
// It never sets a clock, and never looks at one from time to time: the kernel tells.
package hostclock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// far is when the timer would run out, if the clock never jumped.
const far = 10 * 365 * 24 * time.Hour

// Watch calls jumped after each jump until ctx ends, whose error it returns. The kernel cancels a timer on the
// real-time clock when that is set or the system resumes (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET); calls
// may be fewer than jumps.
func Watch(ctx context.Context, jumped func()) error {
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("timerfd_create: %w", err)
	}
	timer := os.NewFile(uintptr(fd), "timerfd")
	stop := context.AfterFunc(ctx, func() { _ = timer.Close() }) // ends the read
	defer func() {
		if stop() {
			_ = timer.Close()
		}
	}()
	arm := func() error {
		raw, err := timer.SyscallConn()
		if err != nil {
			return err
		}
		var set error
		at := unix.NsecToTimespec(time.Now().Add(far).UnixNano())
		err = raw.Control(func(fd uintptr) {
			set = unix.TimerfdSettime(int(fd), unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, &unix.ItimerSpec{Value: at}, nil)
		})
		if errors.Is(set, unix.ECANCELED) { // it is set all the same: the clock jumped since the last time
			set = nil
		}
		return errors.Join(err, set)
	}
	if err := arm(); err != nil {
		return ended(ctx, err)
	}
	var expirations [8]byte
	for {
		_, err := timer.Read(expirations[:])
		if err != nil && !errors.Is(err, unix.ECANCELED) {
			return ended(ctx, err)
		}
		if err := arm(); err != nil { // before the call, so that a jump meanwhile is told of
			return ended(ctx, err)
		}
		jumped()
	}
}

// ended is ctx's error if that is why a call failed.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}
