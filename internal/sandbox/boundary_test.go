package sandbox

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// do begins an operation on the rig's only VM.
func (r *rig) do(kind operation.Kind) (operation.Operation, error) {
	var id vm.ID
	for _, v := range r.s.store.VMs() {
		id = v.ID
	}
	switch kind {
	case operation.Create:
		return r.s.Create(r.ctx(), CreateRequest{Name: "calm-otter"})
	case "create without start":
		return r.s.Create(r.ctx(), CreateRequest{Name: "calm-otter", NoStart: true})
	case operation.Start:
		return r.s.Start(r.ctx(), id)
	case operation.Stop:
		return r.s.Stop(r.ctx(), id, false)
	case operation.Restart:
		return r.s.Restart(r.ctx(), id)
	case operation.Set, setRestart:
		return r.s.Set(r.ctx(), id, SetRequest{Change: crashChange(kind == setRestart), Restart: kind == setRestart})
	default:
		return r.s.Delete(r.ctx(), id)
	}
}

// boundaries runs a case with act called at the first boundary of its operation, then with act at
// the second, and so on, until the operation has fewer. A boundary is a moment before or after a
// commit, or after a step. check finds no boundary armed.
func boundaries(t *testing.T, before []operation.Kind, kind operation.Kind, act func(r *rig), check func(t *testing.T, r *rig, op operation.Operation)) {
	t.Helper()
	var armed, did atomic.Bool
	var passed, at atomic.Int64
	r := newRig(t)
	r.commit = func() {
		if armed.Load() && passed.Add(1) == at.Load() {
			did.Store(true)
			act(r)
		}
	}
	r.start()
	for {
		for _, k := range before {
			r.done(r.do(k))
		}
		at.Add(1)
		passed.Store(0)
		did.Store(false)
		armed.Store(true)
		op, err := r.do(kind)
		if err != nil {
			t.Fatalf("boundary %d: %v", at.Load(), err)
		}
		// To its end, or until it is suspended.
		_ = r.s.WatchOperation(r.ctx(), op.ID, func(operation.Operation) error { return nil })
		armed.Store(false)
		check(t, r, op)
		if t.Failed() {
			t.Fatalf("at boundary %d of %s", at.Load(), kind)
		}
		for _, v := range r.s.store.VMs() {
			r.done(r.s.Delete(r.ctx(), v.ID))
		}
		r.nothing()
		if !did.Load() {
			break
		}
	}
	if n := at.Load() - 1; n < 4 {
		t.Errorf("only %d boundaries", n)
	}
}

type boundaryCase struct {
	before []operation.Kind
	kind   operation.Kind
}

func (c boundaryCase) name() string { return fmt.Sprintf("%s-after-%d", c.kind, len(c.before)) }

// Whenever an operation is cancelled, it either went through or it is undone, and the VM is in a
// state that its record, the journal and the host agree on.
func TestCancelAtEveryBoundary(t *testing.T) {
	for _, c := range []boundaryCase{
		{nil, operation.Create},
		{nil, "create without start"},
		{[]operation.Kind{operation.Create, operation.Stop}, operation.Start},
		{[]operation.Kind{operation.Create}, operation.Restart},
		{[]operation.Kind{operation.Create}, setRestart},
	} {
		t.Run(c.name(), func(t *testing.T) {
			t.Parallel()
			act := func(r *rig) {
				// The operation that runs, or, at the boundaries of its admission, none yet.
				for _, v := range r.s.store.VMs() {
					if id := r.s.RunningOperation(v.ID); id != "" {
						_ = r.s.ops.Cancel(id, operation.ErrCancelled)
					}
				}
			}
			boundaries(t, c.before, c.kind, act, func(t *testing.T, r *rig, op operation.Operation) {
				op = r.wait(op, nil)
				r.check()
				vms := r.s.store.VMs()
				switch {
				case op.State == operation.Succeeded:
					want := vm.Running
					if c.kind == "create without start" {
						want = vm.Stopped
					}
					if len(vms) != 1 || vms[0].State != want {
						t.Errorf("succeeded, and left %s", brief(vms))
					}
				case op.State != operation.Cancelled:
					t.Errorf("%s: %v", op.State, op.Fault)
				case len(c.before) == 0 && len(vms) != 0:
					t.Errorf("a cancelled create left %s", brief(vms))
				case len(c.before) > 0 && (len(vms) != 1 || vms[0].State != vm.Stopped):
					t.Errorf("a cancelled %s left %+v", op.Kind, vms)
				}
			})
		})
	}
}

// Whenever a daemon is told to end, nothing is undone and nothing is given up: the next one
// finishes what was begun.
func TestSuspendAtEveryBoundary(t *testing.T) {
	for _, c := range []struct {
		boundaryCase
		want vm.State // "" for gone
	}{
		{boundaryCase{nil, operation.Create}, vm.Running},
		{boundaryCase{nil, "create without start"}, vm.Stopped},
		{boundaryCase{[]operation.Kind{operation.Create, operation.Stop}, operation.Start}, vm.Running},
		{boundaryCase{[]operation.Kind{operation.Create}, operation.Stop}, vm.Stopped},
		{boundaryCase{[]operation.Kind{operation.Create}, operation.Restart}, vm.Running},
		{boundaryCase{[]operation.Kind{operation.Create}, operation.Set}, vm.Running},
		{boundaryCase{[]operation.Kind{operation.Create, operation.Stop}, operation.Set}, vm.Stopped},
		{boundaryCase{[]operation.Kind{operation.Create}, setRestart}, vm.Running},
		{boundaryCase{[]operation.Kind{operation.Create}, operation.Delete}, ""},
	} {
		t.Run(c.name(), func(t *testing.T) {
			t.Parallel()
			act := func(r *rig) {
				ctx, cancel := context.WithCancel(context.Background())
				cancel()
				_ = r.s.ops.Stop(ctx, lifecycle.ErrSuspended) // does not wait: this is inside of an operation
			}
			boundaries(t, c.before, c.kind, act, func(t *testing.T, r *rig, op operation.Operation) {
				r.restart()
				r.check()
				vms := r.s.store.VMs()
				if c.want == "" {
					if len(vms) != 0 {
						t.Errorf("left %s", brief(vms))
					}
				} else if len(vms) != 1 || vms[0].State != c.want {
					t.Errorf("left %s", brief(vms))
				}
				if op, err := r.s.Operation(context.Background(), op.ID); err != nil || op.State != operation.Succeeded {
					t.Errorf("the operation: %s, %v, %v", op.State, op.Fault, err)
				}
			})
		})
	}
}
