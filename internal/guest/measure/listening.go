package measure

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/wire"
)

const (
	// settleTime is how long a change is given to be followed by others: a server that starts opens several ports, and the
	// kernel tells of a socket before it is there to be found.
	settleTime = 50 * time.Millisecond
	// lookTime is between two looks where the kernel tells of no changes.
	lookTime = 2 * time.Second
)

// FollowPorts calls send with the TCP ports that somebody listens on for others than this machine itself, sorted, wire.MaxPorts at most:
// at once, and whenever they are others than before, until ctx ends or send fails. The kernel tells of changes, by a tracepoint;
// one that does not is looked at every two seconds. One call at a time.
func FollowPorts(ctx context.Context, proc string, send func([]uint16) error) error {
	return followPorts(ctx, proc, watchListeners, lookTime, send)
}

func followPorts(ctx context.Context, proc string, watch func() (*changes, error), look time.Duration, send func([]uint16) error) error {
	wait := func() error { return pause(ctx, look) }
	if c, err := watch(); err == nil { // before the first look: what changes from then on is told
		defer c.close()
		stop := context.AfterFunc(ctx, func() { _ = c.pipe.SetReadDeadline(time.Unix(1, 0)) })
		defer stop()
		wait = func() error {
			if err := c.wait(); err != nil {
				return err
			}
			return pause(ctx, settleTime)
		}
	}
	var last []uint16
	for first := true; ; first = false {
		ports, err := openPorts(ctx, proc)
		if err != nil {
			return err
		}
		if first || !slices.Equal(ports, last) {
			if err := send(ports); err != nil {
				return err
			}
			last = ports
		}
		if err := wait(); err != nil {
			return errors.Join(ctx.Err(), err)
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// openPorts are the ports of sockets that listen at an address by which others reach the machine over IPv4.
func openPorts(ctx context.Context, proc string) ([]uint16, error) {
	ports := []uint16{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		list, err := listening(ctx, proc, "tcp", family)
		if err != nil {
			return nil, err
		}
		for _, s := range list {
			if a := s.address.Unmap(); a.IsUnspecified() || a.Is4() && !a.IsLoopback() {
				ports = append(ports, s.port)
			}
		}
	}
	slices.Sort(ports)
	ports = slices.Compact(ports)
	return ports[:min(len(ports), wire.MaxPorts)], nil
}

// changes are what the kernel tells when a TCP socket begins or ceases to listen: the tracepoint sock:inet_sock_set_state, in a
// buffer of our own (Documentation/trace/ftrace.rst and events.rst of the kernel, "instances").
type changes struct {
	fs   int // tracefs, which is mounted nowhere
	pipe *os.File
}

const (
	tracing      = "instances/banger"
	tracedEvent  = tracing + "/events/sock/inet_sock_set_state"
	tracedStates = "oldstate == 10 || newstate == 10" // TCP_LISTEN of net/tcp_states.h
)

// watchListeners begins to collect changes. An error is the kernel's: it has no tracing, or lets nobody use it.
func watchListeners() (*changes, error) {
	ctx, err := unix.Fsopen("tracefs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigCreate(ctx); err != nil {
		return nil, os.NewSyscallError("fsconfig", err)
	}
	tree, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fsmount", err)
	}
	if err := unix.Mkdirat(tree, tracing, 0o700); err != nil && !errors.Is(err, fs.ErrExist) { // an agent before this one may have left it
		return nil, errors.Join(&os.PathError{Op: "mkdir", Path: tracing, Err: err}, unix.Close(tree))
	}
	// One reader at a time has it: from here on the buffer is ours.
	fd, err := unix.Openat(tree, tracing+"/trace_pipe", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(&os.PathError{Op: "open", Path: tracing + "/trace_pipe", Err: err}, unix.Close(tree))
	}
	c := &changes{fs: tree, pipe: os.NewFile(uintptr(fd), "trace_pipe")}
	err = c.pipe.SetReadDeadline(time.Time{}) // fails for what cannot be waited for
	for _, set := range []struct{ file, value string }{
		{tracing + "/buffer_size_kb", "4"}, // for each CPU; an event has some hundred bytes, and one is enough
		{tracing + "/buffer_percent", "0"}, // the first event wakes the reader
		{tracedEvent + "/filter", tracedStates},
		{tracedEvent + "/enable", "1"},
	} {
		if err == nil {
			err = c.write(set.file, set.value)
		}
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *changes) write(file, value string) error {
	fd, err := unix.Openat(c.fs, file, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: file, Err: err}
	}
	_, err = unix.Write(fd, []byte(value))
	if err = errors.Join(err, unix.Close(fd)); err != nil {
		return fmt.Errorf("write %q to %s: %w", value, file, err)
	}
	return nil
}

// wait returns when there was a change since the last call, or the pipe's deadline has passed.
func (c *changes) wait() error {
	buf := make([]byte, 4<<10)
	n, err := c.pipe.Read(buf)
	if n > 0 {
		return nil
	}
	return err
}

// close ends it, and takes the buffer away.
func (c *changes) close() {
	_ = c.pipe.Close()
	_ = c.write(tracedEvent+"/enable", "0") // or it would go on for nobody, if the next fails
	_ = unix.Unlinkat(c.fs, tracing, unix.AT_REMOVEDIR)
	_ = unix.Close(c.fs)
}
