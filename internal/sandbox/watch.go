package sandbox

import (
	"context"
	"sync"
)

// watchBuffer is how many changes a watcher may be behind before it is sent a fresh snapshot instead.
const watchBuffer = 256

// hub hands changes to watchers without ever waiting for one. The zero value is ready.
type hub struct {
	mu       sync.Mutex
	watchers map[*watcher]struct{}
}

type watcher struct {
	events chan Event
	lagged bool // guarded by hub.mu; events were dropped since the last snapshot
}

func (h *hub) publish(e Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for w := range h.watchers {
		if w.lagged {
			continue
		}
		select {
		case w.events <- e:
		default:
			w.lagged = true
		}
	}
}

func (h *hub) join() *watcher {
	w := &watcher{events: make(chan Event, watchBuffer)}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.watchers == nil {
		h.watchers = map[*watcher]struct{}{}
	}
	h.watchers[w] = struct{}{}
	return w
}

func (h *hub) leave(w *watcher) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.watchers, w)
}

// catchUp empties what is queued if changes were dropped, so that a snapshot can take their place.
func (h *hub) catchUp(w *watcher) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !w.lagged {
		return false
	}
	for len(w.events) > 0 {
		<-w.events
	}
	w.lagged = false
	return true
}

// Watch calls send with a snapshot, then with each change, until ctx ends or send fails. A watcher
// that is too slow is sent a fresh snapshot instead of the changes it missed.
func (s *Service) Watch(ctx context.Context, send func(Event) error) error {
	w := s.hub.join() // before the snapshot: a change may come twice, never not at all
	defer s.hub.leave(w)
	fresh := true
	for {
		if s.hub.catchUp(w) || fresh {
			snapshot, err := s.snapshot(ctx)
			if err != nil {
				return err
			}
			if err := send(Event{Snapshot: &snapshot}); err != nil {
				return err
			}
			fresh = false
			continue
		}
		select {
		case e := <-w.events:
			if e.imagesChanged {
				list, err := s.store.Images(ctx)
				if err != nil {
					return err
				}
				e = Event{Images: &list}
			}
			if err := send(e); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		case <-s.bg.Done():
			return nil
		}
	}
}

func (s *Service) snapshot(ctx context.Context) (Snapshot, error) {
	list, err := s.store.Images(ctx)
	return Snapshot{VMs: s.store.VMs(), Operations: s.ops.List(), Images: list}, err
}
