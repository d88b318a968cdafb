package qemu

import (
	"context"
	"fmt"
	"sync"

	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// monitor is the one connection that this program has to the monitor of one QEMU. A monitor serves
// a single client, so all machines of this program that stand for the same process share it.
type monitor struct {
	key string

	connecting sync.Mutex // held while a connection is made, so that there is one

	mu    sync.Mutex
	users map[*machine]struct{}
	q     *qmp // nil before the first connection; may be broken
}

// monitors holds those that have users. It is global because the rule is QEMU's, for the whole
// program: two drivers in it must not lock each other out.
var monitors = struct {
	sync.Mutex
	byKey map[string]*monitor
}{byKey: map[string]*monitor{}}

// join makes m a user of its process's monitor. leave ends that.
func join(m *machine) *monitor {
	key := fmt.Sprintf("%d %s", m.process.PID(), m.spec.Marker())
	monitors.Lock()
	defer monitors.Unlock()
	o := monitors.byKey[key]
	if o == nil {
		o = &monitor{key: key, users: map[*machine]struct{}{}}
		monitors.byKey[key] = o
	}
	o.mu.Lock()
	o.users[m] = struct{}{}
	o.mu.Unlock()
	return o
}

// leave closes the connection with its last user. Fine to call twice.
func (o *monitor) leave(m *machine) {
	monitors.Lock()
	o.mu.Lock()
	delete(o.users, m)
	q := o.q
	last := len(o.users) == 0
	if last && monitors.byKey[o.key] == o {
		delete(monitors.byKey, o.key)
	}
	o.mu.Unlock()
	monitors.Unlock()
	if last && q != nil {
		q.close()
	}
}

// current is the connection, nil if there is none that works.
func (o *monitor) current() *qmp {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.q == nil {
		return nil
	}
	select {
	case <-o.q.gone:
		return nil
	default:
		return o.q
	}
}

// connect returns the connection, after dialling if there is none that works.
func (o *monitor) connect(ctx context.Context, dir *rundir.Dir) (*qmp, error) {
	if q := o.current(); q != nil {
		return q, nil
	}
	o.connecting.Lock()
	defer o.connecting.Unlock()
	if q := o.current(); q != nil {
		return q, nil
	}
	conn, err := dir.Dial(ctx, monitorSocket)
	if err != nil {
		return nil, err
	}
	q, err := newQMP(ctx, conn, o.event)
	if err != nil {
		return nil, err
	}
	o.mu.Lock()
	abandoned := len(o.users) == 0
	o.q = q
	o.mu.Unlock()
	if abandoned { // the last user left meanwhile, and saw no connection to close
		q.close()
		return nil, errQMPClosed
	}
	return q, nil
}

// event passes an event to each user. Called by the connection's reader.
func (o *monitor) event(e event) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for m := range o.users {
		m.event(e)
	}
}
