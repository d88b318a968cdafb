package operation

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// keepEnded is how many ended operations stay in memory for those who ask late.
const keepEnded = 200

// ErrCancelled is the cause of a context that CancelOperation ended.
var ErrCancelled = errors.New("it was cancelled by request")

// NewID returns a fresh random operation id: 12 hex digits.
func NewID() string {
	var b [6]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// Runner runs operations and lets them be watched and cancelled. Safe for concurrent use.
type Runner struct {
	base    context.Context
	stop    context.CancelCauseFunc
	save    func(context.Context, Operation) error
	changed func(Operation)
	failed  func(Operation, error) // recording an end failed
	wg      sync.WaitGroup

	mu      sync.Mutex
	ops     map[string]*running
	byVM    map[string][]string // the operations of a VM that run, oldest first
	ended   []string
	stopped bool
}

type running struct {
	op     Operation
	cancel context.CancelCauseFunc
	// next is closed and replaced at every change: whoever waits sees the latest value, not each one.
	next chan struct{}
}

// NewRunner returns a runner. save records an operation that ended; changed is told of every
// change and must not block; failed is told when save could not.
func NewRunner(save func(context.Context, Operation) error, changed func(Operation), failed func(Operation, error)) *Runner {
	base, stop := context.WithCancelCause(context.Background())
	return &Runner{base: base, stop: stop, save: save, changed: changed, failed: failed, ops: map[string]*running{}, byVM: map[string][]string{}}
}

// Remember puts ended operations of an earlier daemon back, so that they can be asked for.
func (r *Runner) Remember(ops []Operation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, op := range slices.Backward(ops) {
		if op.State != Running {
			r.ops[op.ID] = &running{op: op, cancel: func(error) {}, next: make(chan struct{})}
			r.ended = append(r.ended, op.ID)
		}
	}
}

// Go runs fn as the operation op, which the caller has recorded, and returns at once. fn's context
// ends by Cancel or Stop only. A nil error ends the operation as succeeded; if fn's error matches
// suspended, its record is left as running for the next daemon. After Stop nothing is run, and the
// record is left to the next daemon as well.
func (r *Runner) Go(op Operation, suspended error, fn func(context.Context, *Handle) error) {
	ctx, cancel := context.WithCancelCause(r.base)
	op.State = Running
	run := &running{op: op, cancel: cancel, next: make(chan struct{})}
	r.mu.Lock()
	if r.stopped {
		r.mu.Unlock()
		cancel(nil)
		return
	}
	r.ops[op.ID] = run
	r.byVM[op.VMID] = append(r.byVM[op.VMID], op.ID)
	r.wg.Add(1) // under mu: Stop must not begin to wait in between
	r.mu.Unlock()
	r.changed(op)
	go func() {
		defer r.wg.Done()
		defer cancel(nil)
		h := &Handle{r: r, run: run}
		err := fn(ctx, h)
		if err != nil && errors.Is(err, suspended) {
			return
		}
		end := h.update(func(op *Operation) {
			now := time.Now()
			closeStage(op, now)
			op.FinishedAt = now
			switch {
			case err == nil:
				op.State = Succeeded
			case ctx.Err() != nil:
				op.State = Cancelled
				op.Fault = fault.Wrap(context.Cause(ctx), fault.Cancelled, op.Subject(), "the operation did not finish")
			default:
				op.State = Failed
				op.Fault = asFault(err, op.Subject())
			}
		}, false)
		saveCtx, done := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer done()
		if err := r.save(saveCtx, end); err != nil {
			r.failed(end, err)
		}
		// Told only when it is on record: who saw the end may ask any later daemon.
		r.finish(run, end)
	}()
}

func asFault(err error, subject string) *fault.Error {
	var f *fault.Error
	if errors.As(err, &f) {
		c := *f
		if c.Subject == "" {
			c.Subject = subject
		}
		return &c
	}
	return fault.Wrap(err, fault.CodeOf(err), subject, "the operation failed")
}

// finish tells the end of an operation and files it under the ended ones, at once: who sees the end
// does not find it among the running ones any more.
func (r *Runner) finish(run *running, op Operation) {
	r.mu.Lock()
	if left := slices.DeleteFunc(r.byVM[op.VMID], func(id string) bool { return id == op.ID }); len(left) > 0 {
		r.byVM[op.VMID] = left
	} else {
		delete(r.byVM, op.VMID)
	}
	r.ended = append(r.ended, op.ID)
	if len(r.ended) > keepEnded {
		delete(r.ops, r.ended[0])
		r.ended = r.ended[1:]
	}
	r.set(run, op)
	r.mu.Unlock()
	r.changed(op)
}

// set replaces what is known of an operation. Call it with mu held.
func (r *Runner) set(run *running, op Operation) {
	run.op = op
	close(run.next)
	run.next = make(chan struct{})
}

func (r *Runner) publish(run *running, op Operation) {
	r.mu.Lock()
	r.set(run, op)
	r.mu.Unlock()
	r.changed(op)
}

// Get returns an operation as it is. fault.NotFound.
func (r *Runner) Get(id string) (Operation, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	run, ok := r.ops[id]
	if !ok {
		return Operation{}, unknown(id)
	}
	return clone(run.op), nil
}

func unknown(id string) error {
	return fault.New(fault.NotFound, id, "there is no such operation").WithHint("see `banger operation list`")
}

// List returns what is known, newest first.
func (r *Runner) List() []Operation {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Operation, 0, len(r.ops))
	for _, run := range r.ops {
		out = append(out, clone(run.op))
	}
	slices.SortFunc(out, func(a, b Operation) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), strings.Compare(a.ID, b.ID))
	})
	return out
}

// RunningOf returns the id of the latest operation that runs for a VM, "" if none does.
func (r *Runner) RunningOf(vmID string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if ids := r.byVM[vmID]; len(ids) > 0 {
		return ids[len(ids)-1]
	}
	return ""
}

// AllRunningOf returns the operations that run for a VM, oldest first: one of them is at work, the
// others wait for it.
func (r *Runner) AllRunningOf(vmID string) []Operation {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []Operation
	for _, id := range r.byVM[vmID] {
		out = append(out, clone(r.ops[id].op))
	}
	return out
}

// Watch calls send with the operation as it is, then after changes, the final state last. Changes
// that follow faster than send returns are skipped, never the last one.
func (r *Runner) Watch(ctx context.Context, id string, send func(Operation) error) error {
	r.mu.Lock()
	run, ok := r.ops[id] // kept: an operation that is watched may be forgotten meanwhile
	r.mu.Unlock()
	if !ok {
		return unknown(id)
	}
	for {
		r.mu.Lock()
		op, next := clone(run.op), run.next
		r.mu.Unlock()
		if err := send(op); err != nil {
			return err
		}
		if op.State != Running {
			return nil
		}
		select {
		case <-next:
		case <-ctx.Done():
			return ctx.Err()
		case <-r.base.Done():
			return fault.New(fault.Unavailable, op.Subject(), "the daemon is stopping; the operation goes on with the next one").
				WithHint("banger operation watch %s", id)
		}
	}
}

// Cancel asks an operation to stop, with ErrCancelled or another cause. No effect on one that
// ended. fault.NotFound.
func (r *Runner) Cancel(id string, cause error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	run, ok := r.ops[id]
	if !ok {
		return unknown(id)
	}
	run.cancel(cause)
	return nil
}

// Stop ends all contexts with cause and waits until every operation has returned or ctx ends.
func (r *Runner) Stop(ctx context.Context, cause error) error {
	r.mu.Lock()
	r.stopped = true
	r.mu.Unlock()
	r.stop(cause)
	done := make(chan struct{})
	go func() { r.wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fault.Wrap(ctx.Err(), fault.Timeout, "operations", "some did not stop in time")
	}
}

// Handle is what a running operation tells about itself with.
type Handle struct {
	r   *Runner
	run *running
}

// Stage ends the running stage and begins one; "" only ends.
func (h *Handle) Stage(name string) {
	h.update(func(op *Operation) {
		now := time.Now()
		closeStage(op, now)
		if name != "" {
			op.Stages = append(op.Stages, Stage{Name: name, StartedAt: now})
		}
	}, true)
}

// Detail says more of the running stage, replacing what was said.
func (h *Handle) Detail(text string) {
	h.update(func(op *Operation) {
		if n := len(op.Stages); n > 0 {
			op.Stages[n-1].Detail = text
		}
	}, true)
}

// Notice adds a line for the user that is neither result nor error.
func (h *Handle) Notice(text string) {
	h.update(func(op *Operation) { op.Notices = append(op.Notices, text) }, true)
}

func (h *Handle) update(change func(*Operation), tell bool) Operation {
	h.r.mu.Lock()
	op := clone(h.run.op)
	h.r.mu.Unlock()
	change(&op) // only the operation's own goroutine writes it
	if tell {
		h.r.publish(h.run, op)
	}
	return op
}

func closeStage(op *Operation, now time.Time) {
	if n := len(op.Stages); n > 0 && op.Stages[n-1].FinishedAt.IsZero() {
		op.Stages[n-1].FinishedAt = now
	}
}

// clone copies what a later change would write to.
func clone(op Operation) Operation {
	op.Stages = slices.Clone(op.Stages)
	op.Notices = slices.Clone(op.Notices)
	return op
}
