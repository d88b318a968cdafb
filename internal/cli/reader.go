package cli

import (
	"context"

	"golang.org/x/sys/unix"
)

// whileRead is ctx until nobody reads stdout any more, if that is a pipe: what follows events would notice with the next one
// only, which may never come (banger events | head -1). poll(2): POLLERR is told of a pipe whose reading end is closed.
func (a *app) whileRead(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	var st unix.Stat_t
	if a.out == nil || unix.Fstat(int(a.out.Fd()), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return ctx, cancel
	}
	go func() { // it stays in poll, and ends with the process
		set := []unix.PollFd{{Fd: int32(a.out.Fd())}}
		for {
			if _, err := unix.Poll(set, -1); err != nil && err != unix.EINTR {
				return
			}
			if set[0].Revents != 0 {
				cancel()
				return
			}
		}
	}()
	return ctx, cancel
}
