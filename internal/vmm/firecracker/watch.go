package firecracker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// pathWatch waits for a socket that another program binds, by inotify(7).
type pathWatch struct {
	dir    *rundir.Dir
	name   string
	events *os.File
}

// watchFor begins to watch; whatever is made from then on is seen.
func watchFor(dir *rundir.Dir, name string) (*pathWatch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify_init1: %w", err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, dir.Path("."), unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
		return nil, errors.Join(fmt.Errorf("inotify_add_watch: %w", err), events.Close())
	}
	return &pathWatch{dir: dir, name: name, events: events}, nil
}

func (w *pathWatch) close() { _ = w.events.Close() }

// dial returns a connection to the socket as soon as it takes one, or ctx's error. A path that is bound and does not
// listen yet refuses, for the microseconds between two system calls, and nothing tells when it does:
// hence the pause.
func (w *pathWatch) dial(ctx context.Context) (net.Conn, error) {
	const pause = time.Millisecond
	stop := context.AfterFunc(ctx, func() { _ = w.events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		conn, err := w.dir.Dial(ctx, w.name)
		switch {
		case err == nil:
			return conn, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, unix.ENOENT):
			if _, err := w.events.Read(make([]byte, 4096)); err != nil && ctx.Err() == nil {
				return nil, err
			}
		case errors.Is(err, unix.ECONNREFUSED):
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		default:
			return nil, err
		}
	}
}
