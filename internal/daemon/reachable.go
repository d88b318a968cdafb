package daemon

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/privatedir"
)

// watchReachable calls lost, at most once, when a name in the socket directory or the directory
// itself is removed or renamed: at logout, or by a cleaner of /tmp. Call stop before removing one
// on purpose.
func watchReachable(sockets *privatedir.Dir, names []string, lost func(what string)) (stop func(), err error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	const mask = unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	if _, err := unix.InotifyAddWatch(fd, sockets.Path(), mask|unix.IN_ONLYDIR); err != nil {
		_ = events.Close()
		return nil, fmt.Errorf("inotify on %s: %w", sockets.Path(), err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 4096)
		for {
			if _, err := events.Read(buf); err != nil {
				return // closed by stop
			}
			// Which event it was matters less than what is there now: a removed directory whose
			// name was taken by another one is as lost as the socket in it.
			if what := missing(sockets, names); what != "" {
				lost(what)
				return
			}
		}
	}()
	return func() { _ = events.Close(); <-done }, nil
}

// missing names what a client would not find, "" if all is in place.
func missing(sockets *privatedir.Dir, names []string) string {
	var open, named unix.Stat_t
	if err := unix.Stat(sockets.Address("."), &open); err != nil {
		return sockets.Path()
	}
	if err := unix.Stat(sockets.Path(), &named); err != nil || named.Ino != open.Ino || named.Dev != open.Dev {
		return sockets.Path()
	}
	for _, n := range names {
		if _, err := os.Lstat(sockets.Address(n)); err != nil {
			return n
		}
	}
	return ""
}
