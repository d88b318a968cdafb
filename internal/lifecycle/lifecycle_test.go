package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/vm"
)

// world is a journal and a host in memory; what happens is written to its diary.
type world struct {
	steps   map[string]StepState
	saved   vm.VM
	made    map[string]bool
	diary   []string
	failing string // "prepare x", "cleanup x", "save N", or several of them
	saves   int
}

func (w *world) fails(what string) bool {
	return slices.Contains(strings.Split(w.failing, ", "), what)
}

func newWorld() *world { return &world{steps: map[string]StepState{}, made: map[string]bool{}} }

func (w *world) Save(_ context.Context, v vm.VM, steps ...StepRecord) error {
	w.saves++
	if w.fails(fmt.Sprintf("save %d", w.saves)) {
		return errors.New("the disk is full")
	}
	w.saved = v
	for _, s := range steps {
		if s.State == Absent {
			delete(w.steps, s.Step)
		} else {
			w.steps[s.Step] = s.State
		}
	}
	return nil
}

func (w *world) Steps(context.Context, vm.ID) (map[string]StepState, error) {
	out := map[string]StepState{}
	for k, v := range w.steps {
		out[k] = v
	}
	return out, nil
}

func (w *world) Forget(context.Context, vm.ID) error { return nil }

func (w *world) say(format string, args ...any) {
	w.diary = append(w.diary, fmt.Sprintf(format, args...))
}

func (w *world) told() string {
	s := strings.Join(w.diary, "; ")
	w.diary = nil
	return s
}

type step struct {
	w    *world
	name string
}

func (s step) Name() string { return s.name }

func (s step) Prepare(_ context.Context, v *vm.VM) error {
	if s.w.steps[s.name] != Preparing {
		s.w.say("UNANNOUNCED")
	}
	s.w.say("+%s", s.name)
	s.w.made[s.name] = true
	if s.w.fails("prepare " + s.name) {
		return errors.New("no")
	}
	v.Note += s.name
	return nil
}

func (s step) Cleanup(_ context.Context, _ *vm.VM, how How) error {
	if s.w.steps[s.name] != Cleaning {
		s.w.say("UNANNOUNCED")
	}
	s.w.say("-%s", s.name)
	if s.w.fails("cleanup " + s.name) {
		return errors.New("busy")
	}
	delete(s.w.made, s.name)
	return nil
}

type durableStep struct{ step }

func (durableStep) Durable() {}

// watchedStep says whether what it made is there.
type watchedStep struct{ step }

func (s watchedStep) Observe(context.Context, *vm.VM) (bool, error) { return s.w.made[s.name], nil }

type waitingStep struct{ step }

func (waitingStep) Waiting() {}

func engine(w *world) *Engine {
	return New(w, durableStep{step{w, "disk"}}, watchedStep{step{w, "vmm"}}, waitingStep{step{w, "agent"}})
}

func quiet(string) {}

func TestUpAndDown(t *testing.T) {
	w := newWorld()
	e, v := engine(w), vm.VM{ID: "x"}
	if err := e.Up(t.Context(), &v, quiet); err != nil {
		t.Fatal(err)
	}
	if got := w.told(); got != "+disk; +vmm; +agent" {
		t.Errorf("up: %s", got)
	}
	if w.saved.State != vm.Running || w.saved.Note != "diskvmmagent" {
		t.Errorf("record after up: %+v", w.saved)
	}
	if w.saves != 3 {
		t.Errorf("%d transactions, want one for what is made, one before what waits for it, and one to end", w.saves)
	}
	if err := e.Down(t.Context(), &v, Orderly, false, quiet); err != nil {
		t.Fatal(err)
	}
	if got := w.told(); got != "-agent; -vmm" {
		t.Errorf("down: %s", got)
	}
	if diff := cmp.Diff(map[string]StepState{"disk": Ready}, w.steps); diff != "" {
		t.Error(diff)
	}
	if err := e.Down(t.Context(), &v, Hard, true, quiet); err != nil || w.told() != "-disk" || len(w.steps) != 0 {
		t.Errorf("delete: %v %v", err, w.steps)
	}
}

func TestAFailedUpUndoesAllButDisks(t *testing.T) {
	for _, c := range []struct{ failing, want, step string }{
		{"prepare disk", "+disk", "disk"},
		{"prepare vmm", "+disk; +vmm; -vmm", "vmm"},
		{"prepare agent", "+disk; +vmm; +agent; -agent; -vmm", "agent"},
		{"save 1", "", "disk"},
		{"save 2", "+disk; +vmm; -vmm", "agent"},
		{"save 3", "+disk; +vmm; +agent; -agent; -vmm", "agent"},
		{"prepare disk, save 2", "+disk; -vmm", "disk"}, // that the VMM has not begun cannot be recorded
	} {
		w := newWorld()
		w.failing = c.failing
		v := vm.VM{ID: "x"}
		err := engine(w).Up(t.Context(), &v, quiet)
		var se *StepError
		if !errors.As(err, &se) || se.Step != c.step {
			t.Errorf("%s: %v, want step %s", c.failing, err, c.step)
		}
		if got := w.told(); got != c.want {
			t.Errorf("%s: %s, want %s", c.failing, got, c.want)
		}
		delete(w.steps, "disk")
		if len(w.steps) != 0 {
			t.Errorf("%s: the journal still says %v", c.failing, w.steps)
		}
	}
}

func TestDownStopsAtTheFirstFailure(t *testing.T) {
	w := newWorld()
	e, v := engine(w), vm.VM{ID: "x"}
	if err := e.Up(t.Context(), &v, quiet); err != nil {
		t.Fatal(err)
	}
	w.told()
	w.failing = "cleanup vmm"
	if err := e.Down(t.Context(), &v, Hard, true, quiet); err == nil {
		t.Fatal("no error")
	}
	if got := w.told(); got != "-agent; -vmm" {
		t.Errorf("went on after a failure: %s", got)
	}
	if diff := cmp.Diff(map[string]StepState{"disk": Ready, "vmm": Cleaning}, w.steps); diff != "" {
		t.Error(diff)
	}
	// What is left is taken down before anything is made again.
	w.failing = ""
	if err := e.Up(t.Context(), &v, quiet); err != nil {
		t.Fatal(err)
	}
	if got := w.told(); got != "-vmm; +disk; +vmm; +agent" {
		t.Errorf("up after a failed down: %s", got)
	}
}

func TestUpKeepsWhatIsThere(t *testing.T) {
	w := newWorld()
	e, v := engine(w), vm.VM{ID: "x"}
	w.steps = map[string]StepState{"disk": Ready, "vmm": Ready, "agent": Preparing}
	w.made["vmm"] = true
	if err := e.Up(t.Context(), &v, quiet); err != nil {
		t.Fatal(err)
	}
	if got := w.told(); got != "-agent; +disk; +agent" {
		t.Errorf("a VMM that runs was disturbed: %s", got)
	}
	// And makes again what is gone, with all that stood on it.
	w.steps = map[string]StepState{"disk": Ready, "vmm": Ready, "agent": Ready}
	delete(w.made, "vmm")
	if err := e.Up(t.Context(), &v, quiet); err != nil {
		t.Fatal(err)
	}
	if got := w.told(); got != "+disk; +vmm; +agent" {
		t.Errorf("a VMM that is gone was not made again: %s", got)
	}
}

func TestSuspendStopsAtABoundaryAndUndoesNothing(t *testing.T) {
	w := newWorld()
	ctx, cancel := context.WithCancelCause(t.Context())
	e, v := engine(w), vm.VM{ID: "x"}
	err := e.Up(ctx, &v, func(name string) {
		if name == "vmm" {
			cancel(ErrSuspended)
		}
	})
	if !errors.Is(err, ErrSuspended) {
		t.Fatalf("got %v", err)
	}
	if got := w.told(); strings.Contains(got, "-") {
		t.Errorf("something was undone: %s", got)
	}
	if diff := cmp.Diff(map[string]StepState{"disk": Ready}, w.steps); diff != "" {
		t.Errorf("what was done is not recorded, or what was not is: %s", diff)
	}
	todo, err := e.Settle(t.Context(), &vm.VM{ID: "x", State: vm.Starting, Desired: vm.WantRunning}, false)
	if err != nil || todo != GoUp {
		t.Errorf("the next daemon would %s, %v", todo, err)
	}
}

func TestSettle(t *testing.T) {
	all := map[string]StepState{"disk": Ready, "vmm": Ready, "agent": Ready}
	disks := map[string]StepState{"disk": Ready}
	for _, c := range []struct {
		state    vm.State
		desired  vm.Desired
		steps    map[string]StepState
		alive    bool
		rebooted bool
		want     Todo
	}{
		{vm.Running, vm.WantRunning, all, true, false, Nothing},
		{vm.Running, vm.WantRunning, all, false, false, GoDown},
		{vm.Running, vm.WantRunning, all, false, true, GoDown},
		{vm.Running, vm.WantStopped, all, true, false, GoDown},
		{vm.Starting, vm.WantRunning, map[string]StepState{"disk": Preparing}, false, false, GoUp},
		{vm.Starting, vm.WantRunning, map[string]StepState{"disk": Ready, "vmm": Preparing}, true, false, GoUp},
		{vm.Starting, vm.WantRunning, map[string]StepState{"disk": Ready, "vmm": Preparing}, false, true, GoDown},
		{vm.Starting, vm.WantStopped, map[string]StepState{"disk": Ready, "vmm": Preparing}, true, false, GoDown},
		{vm.Starting, vm.WantStopped, disks, false, false, Nothing},
		{vm.Defined, vm.WantRunning, nil, false, false, GoUp},
		{vm.Defined, vm.WantStopped, nil, false, false, Nothing},
		{vm.Stopping, vm.WantStopped, map[string]StepState{"disk": Ready, "vmm": Cleaning}, true, false, GoDown},
		{vm.Stopping, vm.WantRunning, map[string]StepState{"disk": Ready, "vmm": Ready}, true, false, Cycle},
		{vm.Stopping, vm.WantStopped, disks, false, false, GoDown},
		{vm.Stopped, vm.WantStopped, disks, false, false, Nothing},
		{vm.Stopped, vm.WantStopped, disks, false, true, Nothing},
		{vm.Failed, vm.WantStopped, disks, false, false, Nothing},
		{vm.Failed, vm.WantStopped, map[string]StepState{"disk": Ready, "vmm": Cleaning}, true, false, GoDown},
		{vm.Deleting, vm.WantDeleted, all, true, false, Remove},
		{vm.Deleting, vm.WantDeleted, nil, false, true, Remove},
	} {
		w := newWorld()
		w.steps, w.made["vmm"] = c.steps, c.alive
		v := vm.VM{ID: "x", State: c.state, Desired: c.desired}
		got, err := engine(w).Settle(t.Context(), &v, c.rebooted)
		if err != nil || got != c.want {
			t.Errorf("%s wanted %s, %v, alive %v, rebooted %v: %s %v, want %s", c.state, c.desired, c.steps, c.alive, c.rebooted, got, err, c.want)
		}
		if w.saves != 0 || len(w.diary) != 0 {
			t.Errorf("%s: settling changed something: %v", c.state, w.diary)
		}
	}
}

func TestProgressTellsEachStepAndTheEnd(t *testing.T) {
	w := newWorld()
	var told []string
	v := vm.VM{ID: "x"}
	if err := engine(w).Up(t.Context(), &v, func(s string) { told = append(told, s) }); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(told, []string{"disk", "vmm", "agent", ""}) {
		t.Errorf("told %q", told)
	}
}

// A stop of the daemon that comes while something is taken down leaves no failure behind, however
// the step that is cut off says so.
func TestSuspendOfADownIsNoFailure(t *testing.T) {
	w := newWorld()
	e, v := engine(w), vm.VM{ID: "x"}
	if err := e.Up(t.Context(), &v, quiet); err != nil {
		t.Fatal(err)
	}
	for _, failing := range []string{"cleanup vmm", ""} {
		w.failing = failing
		ctx, cancel := context.WithCancelCause(t.Context())
		err := e.Down(ctx, &v, Orderly, false, func(name string) {
			if name == "vmm" && failing == "" || name == "agent" {
				cancel(ErrSuspended)
			}
		})
		if !errors.Is(err, ErrSuspended) {
			t.Errorf("%q: got %v", failing, err)
		}
	}
}

func TestWhatCouldNotBeUndoneIsSaid(t *testing.T) {
	w := newWorld()
	cancelled, cancel := context.WithCancel(t.Context())
	e := New(w, watchedStep{step{w, "vmm"}}, step{w, "agent"})
	w.failing = "prepare agent"
	v := vm.VM{ID: "x"}
	err := e.Up(cancelled, &v, func(name string) {
		if name == "agent" {
			cancel()
		}
	})
	if err == nil || errors.Is(err, ErrNotUndone) {
		t.Errorf("undone in order: %v", err)
	}
	w.failing = "cleanup vmm"
	w.steps = map[string]StepState{"vmm": Preparing}
	w.made["vmm"] = true
	if err := New(w, failingStep{step{w, "vmm"}}).Up(t.Context(), &v, quiet); err == nil {
		t.Error("a torn step that cannot be taken down was built upon")
	}
	w.steps = map[string]StepState{}
	if err := New(w, failingStep{step{w, "vmm"}}).Up(t.Context(), &v, quiet); !errors.Is(err, ErrNotUndone) {
		t.Errorf("got %v, want ErrNotUndone", err)
	}
}

// failingStep fails to be made.
type failingStep struct{ step }

func (s failingStep) Prepare(ctx context.Context, v *vm.VM) error {
	return errors.Join(errors.New("no"), s.step.Prepare(ctx, v))
}
