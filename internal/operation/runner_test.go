package operation

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

var errSuspended = errors.New("suspended")

// world records what a runner tells.
type world struct {
	t *testing.T
	r *Runner

	mu      sync.Mutex
	saved   []Operation
	changes []Operation
	failed  []error
	saving  error
}

func newWorld(t *testing.T) *world {
	w := &world{t: t}
	w.r = NewRunner(
		func(_ context.Context, op Operation) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.saved = append(w.saved, op)
			return w.saving
		},
		func(op Operation) {
			w.mu.Lock()
			defer w.mu.Unlock()
			if op.State != Running && (len(w.saved) == 0 || w.saved[len(w.saved)-1].State == Running) {
				t.Errorf("%s was told to be %s before that was recorded", op.ID, op.State)
			}
			w.changes = append(w.changes, op)
		},
		func(_ Operation, err error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.failed = append(w.failed, err)
		})
	t.Cleanup(func() { w.stop() })
	return w
}

func (w *world) stop() {
	w.t.Helper()
	if err := w.r.Stop(w.ctx(), errSuspended); err != nil {
		w.t.Error(err)
	}
}

func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	w.t.Cleanup(cancel)
	return ctx
}

func (w *world) run(vmID string, fn func(context.Context, *Handle) error) string {
	op := Operation{ID: NewID(), Kind: Start, VMID: vmID, VMName: "calm-otter", State: Running, CreatedAt: time.Now()}
	w.r.Go(op, errSuspended, fn)
	return op.ID
}

func (w *world) end(id string) Operation {
	w.t.Helper()
	var last Operation
	if err := w.r.Watch(w.ctx(), id, func(op Operation) error { last = op; return nil }); err != nil {
		w.t.Fatal(err)
	}
	return last
}

// untilCancelled is an operation that waits for its end.
func untilCancelled(ctx context.Context, _ *Handle) error { <-ctx.Done(); return ctx.Err() }

func TestHowOperationsEnd(t *testing.T) {
	for _, c := range []struct {
		name   string
		fn     func(context.Context, *Handle) error
		cancel error
		state  State
		code   fault.Code
		text   string
		hint   string
	}{
		{"success", func(context.Context, *Handle) error { return nil }, nil, Succeeded, "", "", ""},
		{"plain error", func(context.Context, *Handle) error { return errors.New("no luck") }, nil, Failed, fault.Internal, "no luck", ""},
		{"fault", func(context.Context, *Handle) error {
			return fmt.Errorf("step: %w", fault.New(fault.Exhausted, "", "full").WithHint("df"))
		}, nil, Failed, fault.Exhausted, "calm-otter: full", "df"},
		{"cancelled", untilCancelled, ErrCancelled, Cancelled, fault.Cancelled, "by request", ""},
		{"cancelled and done all the same", func(ctx context.Context, _ *Handle) error { <-ctx.Done(); return nil }, ErrCancelled, Succeeded, "", "", ""},
	} {
		w := newWorld(t)
		id := w.run("vm", c.fn)
		if c.cancel != nil {
			if err := w.r.Cancel(id, c.cancel); err != nil {
				t.Fatal(err)
			}
		}
		op := w.end(id)
		if op.State != c.state || op.FinishedAt.IsZero() || (op.Fault == nil) != (c.code == "") {
			t.Errorf("%s: %+v", c.name, op)
		}
		if op.Fault != nil && (op.Fault.Code != c.code || !strings.Contains(op.Fault.Error(), c.text) || fault.HintOf(op.Fault) != c.hint) {
			t.Errorf("%s: %s %v, hint %q", c.name, op.Fault.Code, op.Fault, fault.HintOf(op.Fault))
		}
		if len(w.saved) != 1 || w.saved[0].State != c.state {
			t.Errorf("%s: recorded %+v", c.name, w.saved)
		}
		// What ended cannot be cancelled any more, and says so to nobody.
		if err := w.r.Cancel(id, ErrCancelled); err != nil {
			t.Errorf("%s: cancelling what ended: %v", c.name, err)
		}
		if again, err := w.r.Get(id); err != nil || again.State != c.state {
			t.Errorf("%s: afterwards %s, %v", c.name, again.State, err)
		}
	}
}

func TestUnknownOperations(t *testing.T) {
	w := newWorld(t)
	_, err := w.r.Get("nope")
	for what, err := range map[string]error{
		"get": err, "cancel": w.r.Cancel("nope", ErrCancelled), "watch": w.r.Watch(t.Context(), "nope", func(Operation) error { return nil }),
	} {
		if !fault.Is(err, fault.NotFound) || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestAnEndThatCannotBeRecordedIsStillTold(t *testing.T) {
	w := newWorld(t)
	w.saving = errors.New("the disk is full")
	if op := w.end(w.run("vm", func(context.Context, *Handle) error { return nil })); op.State != Succeeded {
		t.Errorf("%+v", op)
	}
	if len(w.failed) != 1 {
		t.Errorf("told of %v", w.failed)
	}
}

func TestStagesDetailsAndNotices(t *testing.T) {
	w := newWorld(t)
	op := w.end(w.run("vm", func(_ context.Context, h *Handle) error {
		h.Detail("of nothing")
		h.Stage("one")
		h.Detail("half")
		h.Notice("look")
		h.Stage("two")
		h.Stage("")
		h.Notice("here")
		h.Stage("three")
		return errors.New("no")
	}))
	if len(op.Stages) != 3 || op.Stages[0].Detail != "half" || strings.Join(op.Notices, " ") != "look here" {
		t.Fatalf("%+v", op)
	}
	for _, s := range op.Stages {
		if s.FinishedAt.Before(s.StartedAt) {
			t.Errorf("stage %s: %+v", s.Name, s)
		}
	}
	w.stop() // so that nobody tells anything any more
	// Values that were handed out do not change under their readers.
	for _, c := range w.changes {
		if len(c.Stages) == 1 && !c.Stages[0].FinishedAt.IsZero() {
			t.Error("a change that was told has changed since")
		}
	}
}

func TestWatchers(t *testing.T) {
	w := newWorld(t)
	goOn := make(chan struct{})
	id := w.run("vm", func(_ context.Context, h *Handle) error {
		<-goOn
		for i := range 100 {
			h.Stage(fmt.Sprint(i))
		}
		return nil
	})
	// A slow one misses changes, but neither the first nor the last.
	blocked, release := make(chan struct{}), make(chan struct{})
	slow := make(chan []Operation, 1)
	go func() {
		var seen []Operation
		_ = w.r.Watch(w.ctx(), id, func(op Operation) error {
			if seen = append(seen, op); len(seen) == 1 {
				close(blocked)
				<-release
			}
			return nil
		})
		slow <- seen
	}()
	<-blocked
	// One whose reader fails gets its error back, one whose context ends that.
	bad := errors.New("bad")
	if err := w.r.Watch(w.ctx(), id, func(Operation) error { return bad }); !errors.Is(err, bad) {
		t.Errorf("got %v", err)
	}
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	if err := w.r.Watch(gone, id, func(Operation) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(goOn)
	w.end(id)
	// Hundreds of others end before the slow one looks again: it still learns how its own ended.
	for range keepEnded + 5 {
		w.end(w.run("other", func(context.Context, *Handle) error { return nil }))
	}
	if _, err := w.r.Get(id); !fault.Is(err, fault.NotFound) {
		t.Errorf("the oldest of %d is still known: %v", keepEnded+6, err)
	}
	close(release)
	seen := <-slow
	if len(seen) != 2 || seen[0].State != Running || seen[1].State != Succeeded || len(seen[1].Stages) != 100 {
		t.Errorf("the slow watcher saw %d", len(seen))
	}
	if n := len(w.r.List()); n != keepEnded {
		t.Errorf("%d are kept", n)
	}
	// A late one sees the end at once.
	late := w.run("vm", func(context.Context, *Handle) error { return nil })
	w.end(late)
	if op := w.end(late); op.State != Succeeded {
		t.Errorf("late: %+v", op)
	}
}

func TestList(t *testing.T) {
	w := newWorld(t)
	at := time.Now()
	for i, id := range []string{"b", "a", "c"} {
		w.r.Go(Operation{ID: id, VMID: id, CreatedAt: at.Add(time.Duration(i/2) * time.Second)}, errSuspended, func(context.Context, *Handle) error { return nil })
		w.end(id)
	}
	w.r.Remember([]Operation{{ID: "old", State: Failed, CreatedAt: at.Add(-time.Hour)}, {ID: "running", State: Running}})
	var ids []string
	for _, op := range w.r.List() {
		ids = append(ids, op.ID)
	}
	if got := strings.Join(ids, " "); got != "c a b old" {
		t.Errorf("%s", got)
	}
	if err := w.r.Cancel("old", ErrCancelled); err != nil {
		t.Error(err)
	}
}

func TestOperationsOfOneVM(t *testing.T) {
	w := newWorld(t)
	if w.r.RunningOf("vm") != "" || len(w.r.AllRunningOf("vm")) != 0 {
		t.Error("something runs")
	}
	one, two := w.run("vm", untilCancelled), w.run("vm", untilCancelled)
	w.run("other", untilCancelled)
	if w.r.RunningOf("vm") != two {
		t.Error("the latest is another")
	}
	if all := w.r.AllRunningOf("vm"); len(all) != 2 || all[0].ID != one || all[1].ID != two {
		t.Errorf("%+v", all)
	}
	// The latest ends first: the other one still runs.
	_ = w.r.Cancel(two, ErrCancelled)
	w.end(two)
	w.until(func() bool { return w.r.RunningOf("vm") == one })
	_ = w.r.Cancel(one, ErrCancelled)
	w.end(one)
	w.until(func() bool { return w.r.RunningOf("vm") == "" })
}

// until waits for what follows the end of an operation within microseconds, and is told by nothing.
func (w *world) until(ok func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatal("it never came")
		}
	}
}

func TestStop(t *testing.T) {
	w := newWorld(t)
	id := w.run("vm", func(ctx context.Context, _ *Handle) error {
		<-ctx.Done()
		return fmt.Errorf("step: %w", context.Cause(ctx))
	})
	watching := make(chan error, 1)
	started := make(chan struct{})
	var once sync.Once
	go func() {
		watching <- w.r.Watch(w.ctx(), id, func(Operation) error { once.Do(func() { close(started) }); return nil })
	}()
	<-started
	w.stop()
	if err := <-watching; !fault.Is(err, fault.Unavailable) || !strings.Contains(fault.HintOf(err), id) {
		t.Errorf("the watcher got %v", err)
	}
	if len(w.saved) != 0 {
		t.Errorf("the record of a suspended operation was changed: %+v", w.saved)
	}
	// What comes after the stop is left to the next daemon.
	w.run("vm", func(context.Context, *Handle) error { t.Error("it ran"); return nil })
	w.stop()

	// One that does not end in time is said.
	w = newWorld(t)
	stuck := make(chan struct{})
	w.run("vm", func(context.Context, *Handle) error { <-stuck; return nil })
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	if err := w.r.Stop(gone, errSuspended); !fault.Is(err, fault.Timeout) {
		t.Errorf("got %v", err)
	}
	close(stuck)
}
