package client

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Follower is told what happens to the daemon's VMs, one call at a time.
type Follower struct {
	// Event gets the whole state first, and again after each loss of the daemon; then each change.
	Event func(*bangerv1.WatchResponse)
	// Gone is called when there is no daemon to follow, before one is waited for.
	Gone func(error)
}

// Follow follows the daemon over its end and its next start, until ctx ends. It starts none, and polls
// nothing: a daemon that comes is noticed by its socket. The error is ctx's, or that this client and the
// daemon do not fit together (fault.VersionSkew).
func (c *Client) Follow(ctx context.Context, f Follower) error {
	for tries := 0; ; {
		running, err := c.Running(ctx)
		if err == nil && running {
			heard := false
			err = c.followOnce(ctx, func(e *bangerv1.WatchResponse) { heard = true; f.Event(e) })
			if heard {
				tries = 0
			}
		} else if err == nil {
			err = fault.New(fault.Unavailable, "", "the daemon does not run")
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if fault.Is(err, fault.VersionSkew) {
			return err
		}
		f.Gone(err)
		if err := c.Await(ctx); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return err
		}
		// One that is just being killed takes connections for a moment longer.
		if !pause(ctx, min(tries, dyingTries)) {
			return ctx.Err()
		}
		tries++
	}
}

// Lost reports whether err says that there is no daemon to talk to any more: nobody listens on its socket, or the
// connection broke. What Follow then tells is the way back.
func Lost(err error) bool {
	return fault.Is(err, fault.Unavailable) && (errors.Is(err, errLost) || absent(err))
}

func (c *Client) followOnce(ctx context.Context, event func(*bangerv1.WatchResponse)) error {
	stream, err := c.Daemon.Watch(ctx, &bangerv1.WatchRequest{})
	if err != nil {
		return FromConnect(err)
	}
	defer stream.Close()
	for stream.Receive() {
		event(stream.Msg())
	}
	c.transport.CloseIdleConnections() // they lead to the daemon that is lost
	if err := stream.Err(); err != nil {
		return FromConnect(err)
	}
	return fault.New(fault.Unavailable, "", "the daemon ended")
}

// Await returns when a daemon takes connections on the socket, or ctx ends. It starts none and sleeps until
// something happens where the socket lies (inotify(7)).
func (c *Client) Await(ctx context.Context) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fault.Wrap(err, fault.Exhausted, "inotify", "cannot watch for the daemon's socket: %v", err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	stop := context.AfterFunc(ctx, func() { _ = events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		if err := watchFor(fd, filepath.Dir(c.opts.Socket)); err != nil {
			return err
		}
		// A socket has its name a moment before somebody listens on it.
		for tries := 0; tries <= dyingTries; tries++ {
			if running, err := c.Running(ctx); err != nil || running {
				return err
			}
			if !pause(ctx, tries) {
				return ctx.Err()
			}
		}
		if _, err := events.Read(make([]byte, 4096)); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fault.Wrap(err, fault.Internal, "inotify", "cannot watch for the daemon's socket: %v", err)
		}
	}
}

// watchFor adds a watch of a directory, or of the nearest one above that is there.
func watchFor(fd int, dir string) error {
	for {
		_, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_ATTRIB|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF)
		if !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			if err != nil {
				return fault.Wrap(err, fault.Permission, dir, "cannot watch for the daemon's socket: %v", err)
			}
			return nil
		}
		dir = filepath.Dir(dir)
	}
}
