package system

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// WaitDevice calls found until it says true: at once, then after each event of the kernel about any
// device (NETLINK_KOBJECT_UEVENT), until ctx ends. what is named in the error.
func WaitDevice(ctx context.Context, what string, found func() (bool, error)) error {
	// Subscribed before the first look, so that no event falls between.
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("device events: %w", err)
	}
	events := os.NewFile(uintptr(fd), "uevents")
	defer events.Close()
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return fmt.Errorf("device events: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buffer := make([]byte, 16<<10)
	for {
		ok, err := found()
		if ok || err != nil {
			return err
		}
		// ENOBUFS: events were lost, which is a reason to look again as good as an event.
		if _, err := events.Read(buffer); err != nil && !errors.Is(err, unix.ENOBUFS) {
			if ctx.Err() != nil {
				return fmt.Errorf("%s did not appear: %w", what, ctx.Err())
			}
			return fmt.Errorf("device events: %w", err)
		}
	}
}
