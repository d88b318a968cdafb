package console

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// pause is the least time between two looks at a log: what a guest can print in it is what a log may
// hold beyond Max, and a guest that never stops costs four looks a second.
const pause = 250 * time.Millisecond

// Keeper bounds logs while they are written to. It sleeps until one is (inotify(7)), looks at that
// one, and not again before pause has passed: a quiet log costs nothing. Safe for concurrent use.
type Keeper struct {
	inotify *os.File
	fd      int
	failed  func(path string, err error)
	read    chan struct{} // closed when the reader is gone

	looks sync.WaitGroup // planned or under way

	mu     sync.Mutex
	closed bool
	logs   map[string]*log
	byWD   map[int32]*log // those that wait for a write
}

type log struct {
	path   string
	users  int
	timer  *time.Timer // of the next look, nil if none is planned
	watch  int32       // its watch, -1 if it has none
	failed bool
}

// NewKeeper returns a Keeper. failed is told of a log that cannot be bounded, once for each Add; it
// must not call the Keeper.
func NewKeeper(failed func(path string, err error)) (*Keeper, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	k := &Keeper{
		inotify: os.NewFile(uintptr(fd), "inotify"), fd: fd, failed: failed, read: make(chan struct{}),
		logs: map[string]*log{}, byWD: map[int32]*log{},
	}
	go k.reader()
	return k, nil
}

// Add bounds a log from now on until remove is called as often as Add was. It does not wait for the
// log. One that does not exist is not waited for.
func (k *Keeper) Add(path string) (remove func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.logs[path]
	if l == nil {
		l = &log{path: path, watch: -1}
		k.logs[path] = l
		k.plan(l, 0)
	}
	l.users++
	return sync.OnceFunc(func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 && !k.closed {
			k.forget(l)
		}
	})
}

// forget ends the watch of a log. Called with the lock.
func (k *Keeper) forget(l *log) {
	delete(k.logs, l.path)
	if l.timer != nil && l.timer.Stop() {
		k.looks.Done()
	}
	if l.watch >= 0 {
		delete(k.byWD, l.watch)
		_, _ = unix.InotifyRmWatch(k.fd, uint32(l.watch)) // EINVAL: it fired or its file is gone, and so is the watch
	}
}

// plan has a log looked at after a time, unless that is planned. Called with the lock.
func (k *Keeper) plan(l *log, after time.Duration) {
	if k.closed || l.timer != nil {
		return
	}
	k.looks.Add(1)
	l.timer = time.AfterFunc(after, func() {
		defer k.looks.Done()
		k.look(l)
	})
}

// look cuts a log back if it has to be, and waits for the next write.
func (k *Keeper) look(l *log) {
	err := Bound(l.path) // without the lock: a busy disk may take its time
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.logs[l.path] != l {
		return // forgotten meanwhile
	}
	l.timer = nil
	var wd int
	if err == nil {
		// One event, then the watch is gone: while the log is left alone for a pause, nothing is queued.
		wd, err = unix.InotifyAddWatch(k.fd, l.path, unix.IN_MODIFY|unix.IN_ONESHOT)
	}
	switch {
	case err == nil:
		l.watch = int32(wd)
		k.byWD[l.watch] = l
		// What was written since Bound looked has no event.
		if st, err := os.Stat(l.path); err == nil && st.Size() > Max {
			k.plan(l, pause)
		}
	case !errors.Is(err, os.ErrNotExist) && !l.failed:
		l.failed = true
		k.failed(l.path, err)
	}
}

// reader turns events into looks. It ends with Close.
func (k *Keeper) reader() {
	defer close(k.read)
	buf := make([]byte, 64<<10)
	for {
		n, err := k.inotify.Read(buf)
		if err != nil {
			return // closed
		}
		k.mu.Lock()
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			wd, mask := int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:])
			b = b[min(len(b), unix.SizeofInotifyEvent+int(binary.NativeEndian.Uint32(b[12:]))):]
			l := k.byWD[wd]
			if l == nil {
				continue
			}
			// IN_IGNORED follows: the watch is gone, with its event or with the file.
			delete(k.byWD, wd)
			l.watch = -1
			if mask&unix.IN_MODIFY != 0 {
				k.plan(l, pause)
			}
		}
		k.mu.Unlock()
	}
}

// Close ends all watches. Logs are bounded no more.
func (k *Keeper) Close() error {
	k.mu.Lock()
	if k.closed {
		k.mu.Unlock()
		return nil
	}
	k.closed = true
	for _, l := range k.logs {
		k.forget(l)
	}
	k.mu.Unlock()
	k.looks.Wait()
	err := k.inotify.Close()
	<-k.read
	return err
}
