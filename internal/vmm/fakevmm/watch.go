package fakevmm

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// watcher calls back after each change of the world, while it has anyone to call. It runs one
// goroutine on one inotify descriptor, however many machines there are.
type watcher struct {
	world *World

	mu   sync.Mutex
	file *os.File // nil while there are no subscribers
	subs map[*subscription]struct{}
}

// subscription is called with the watcher unlocked, one call at a time, after its file changed.
type subscription struct {
	file string // base name in machines/, or "faults"; the only changes it is told of
	call func()
}

// add starts to tell s of changes. Whoever subscribes looks at the state after that, not before.
func (w *watcher) add(s *subscription) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
		if err != nil {
			return fmt.Errorf("inotify: %w", err)
		}
		const events = unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_CLOSE_WRITE
		for _, dir := range []string{w.world.dir, filepath.Join(w.world.dir, "machines")} {
			if _, err := unix.InotifyAddWatch(fd, dir, events|unix.IN_ONLYDIR); err != nil {
				_ = unix.Close(fd)
				return fmt.Errorf("inotify: %s: %w", dir, err)
			}
		}
		w.file = os.NewFile(uintptr(fd), "inotify")
		w.subs = map[*subscription]struct{}{}
		go w.run(w.file)
	}
	w.subs[s] = struct{}{}
	return nil
}

// remove stops telling s. A call that has begun may still be under way.
func (w *watcher) remove(s *subscription) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.subs[s]; !ok {
		return
	}
	delete(w.subs, s)
	if len(w.subs) == 0 {
		_ = w.file.Close() // ends run
		w.file = nil
	}
}

func (w *watcher) run(file *os.File) {
	buf := make([]byte, 64*1024)
	for {
		n, err := file.Read(buf)
		if err != nil {
			return // closed by remove: nobody listens any more
		}
		changed := map[string]bool{}
		all := false
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			mask := hostUint32(b[4:])
			size := unix.SizeofInotifyEvent + int(hostUint32(b[12:]))
			changed[unix.ByteSliceToString(b[unix.SizeofInotifyEvent:size])] = true
			all = all || mask&unix.IN_Q_OVERFLOW != 0
			b = b[size:]
		}
		w.mu.Lock()
		var calls []func()
		if w.file == file {
			for s := range w.subs {
				if all || changed[s.file] {
					calls = append(calls, s.call)
				}
			}
		}
		w.mu.Unlock()
		for _, call := range calls {
			call()
		}
	}
}
