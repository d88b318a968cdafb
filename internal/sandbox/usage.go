package sandbox

import (
	"context"
	"sync"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// UsageRequest says what to measure.
type UsageRequest struct {
	Refs  []string      // 1 to 256
	Every time.Duration // between two looks at a VM; 0: two seconds. Half a second is the least
	Ports bool          // list what listens, too
}

// Usage is one look at a VM that runs.
type Usage struct {
	Stats Stats
	Ports *Ports // nil: not looked at this time
}

const (
	usageEvery    = 2 * time.Second
	minUsageEvery = 500 * time.Millisecond
	maxUsageRefs  = 256
	// portsLook is every how many looks at a VM its listeners are listed: a guest reads its /proc for that.
	portsLook = 3
	// askAgain is how often a listener that gave no page is asked: a server may listen before it answers.
	askAgain = 3
)

// WatchUsage measures VMs for as long as ctx goes on, and calls send with each look, one call at a time. Every
// VM has looks of its own, so that a guest that hangs keeps none of the others from being shown; one that
// does not run has none, and one that is gone no more. Nothing is measured when nobody watches.
//
// fault.Invalid if the request is out of bounds, fault.NotFound or fault.Ambiguous for a bad reference; otherwise
// the error is ctx's or send's. It ends without one when the daemon does, or the last of the VMs is gone.
func (s *Service) WatchUsage(ctx context.Context, r UsageRequest, send func(Usage) error) error {
	if r.Every == 0 {
		r.Every = usageEvery
	}
	switch {
	case len(r.Refs) == 0 || len(r.Refs) > maxUsageRefs:
		return fault.New(fault.Invalid, "refs", "%d VMs; it takes 1 to %d", len(r.Refs), maxUsageRefs)
	case r.Every < minUsageEvery:
		return fault.New(fault.Invalid, "every", "%v is less than %v", r.Every, minUsageEvery)
	}
	ids := map[vm.ID]string{}
	for _, ref := range r.Refs {
		v, err := s.Resolve(ctx, ref)
		if err != nil {
			return err
		}
		ids[v.ID] = ref
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(s.bg, func() { cancel(nil) })
	defer stop()
	var one sync.Mutex
	slots := make(chan struct{}, asksAtOnce)
	var all sync.WaitGroup
	for id, ref := range ids {
		all.Go(func() {
			s.watchUsageOf(ctx, id, ref, r, slots, func(u Usage) {
				one.Lock()
				defer one.Unlock()
				if ctx.Err() != nil {
					return
				}
				if err := send(u); err != nil {
					cancel(err)
				}
			})
		})
	}
	all.Wait()
	if s.bg.Err() != nil {
		return nil
	}
	return context.Cause(ctx) // nil: all the VMs are gone
}

func (s *Service) watchUsageOf(ctx context.Context, id vm.ID, ref string, r UsageRequest, slots chan struct{}, send func(Usage)) {
	ticker := time.NewTicker(r.Every)
	defer ticker.Stop()
	known := &answers{}
	for look := 0; ; {
		v, ok := s.store.VM(id)
		if !ok {
			return
		}
		if v.State == vm.Running {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			u := Usage{Stats: Stats{Ref: ref, VM: v}}
			s.measure(ctx, &u.Stats)
			if r.Ports && look%portsLook == 0 {
				u.Ports = &Ports{Ref: ref, VM: v}
				s.listPorts(ctx, u.Ports, known)
			}
			<-slots
			send(u)
			look++
		} else {
			look, known = 0, &answers{} // another boot has other listeners
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// answers are what one guest's listeners said when they were asked. The zero value is empty; a nil one never
// knows anything.
type answers struct {
	said map[listenerKey]answer
}

type listenerKey struct {
	protocol, address string
	port, pid         int
}

type answer struct {
	scheme string
	status int
	title  string
	asked  int
}

func (p *Port) key() listenerKey { return listenerKey{p.Protocol, p.Address, p.Port, p.PID} }

// fill sets what a listener said, and reports whether it need not be asked.
func (a *answers) fill(p *Port) bool {
	if a == nil {
		return false
	}
	last, ok := a.said[p.key()]
	if !ok || last.status == 0 && last.asked < askAgain {
		return false
	}
	p.Scheme, p.Status, p.Title = last.scheme, last.status, last.title
	return true
}

// keep remembers what these listeners said, and forgets all others.
func (a *answers) keep(ports []Port) {
	if a == nil {
		return
	}
	now := map[listenerKey]answer{}
	for i := range ports {
		p := &ports[i]
		now[p.key()] = answer{p.Scheme, p.Status, p.Title, a.said[p.key()].asked + 1}
	}
	a.said = now
}
