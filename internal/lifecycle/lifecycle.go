// Package lifecycle owns the order in which the parts of a VM are made and taken away, and the
// journal that lets a crash at any moment be finished or undone. It is the only code that knows the order.
//
// It knows no disk, VMM, guest or SQL: it drives Steps and writes to a Journal. It starts no
// goroutine and holds no lock: the caller lets at most one call per VM run at a time.
//
// A step goes through these states; a VM's journal holds one record per step that is not absent:
//
//	absent -> preparing -> ready -> cleaning -> absent
//
// Up records preparing before and ready after each Prepare, in the list's order; several steps may share a record of either kind.
// Down records cleaning before and absent after each Cleanup, in reverse. A record that says preparing or
// cleaning after a restart is a crash in the middle, or before: Settle says what is left to do, and Up takes
// such steps down before it goes on.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// StepState is a step's state in the journal.
type StepState string

// The states of a step.
const (
	Absent    StepState = "absent"
	Preparing StepState = "preparing"
	Ready     StepState = "ready"
	Cleaning  StepState = "cleaning"
)

// StepRecord is one journal entry.
type StepRecord struct {
	Step  string
	State StepState
}

// How tells a Cleanup how much time there is for manners.
type How int

const (
	// Orderly asks first: a guest is shut down before its VMM is ended.
	Orderly How = iota
	// Hard takes away at once: undo of a failed start, delete, forced stop.
	Hard
)

// Step owns one kind of host resource of a VM. The resource's name derives from the VM's id alone,
// so that it is found again after a crash. Steps allocate nothing: what must be chosen was chosen
// when the VM was admitted.
type Step interface {
	// Name is the step's name in the journal and on screens.
	Name() string
	// Prepare makes the resource ready. It measures, then acts: what is there already is kept, a
	// half-made rest of a crash is completed or replaced. It may set observed facts in v (never its
	// identity, spec or lease); they are saved with the ready record. An error means the engine
	// calls Cleanup, unless the step is Durable.
	Prepare(ctx context.Context, v *vm.VM) error
	// Cleanup takes the resource away. Absent or half-made is fine. It may clear facts in v.
	Cleanup(ctx context.Context, v *vm.VM, how How) error
}

// Durable steps hold what a stop must keep. Only delete cleans them up; a failed start never
// touches them, so their Prepare must itself leave nothing torn behind. One that is an Observer is
// prepared again only if it says that its resource is gone; if that must not be made anew, it says
// so by an error.
type Durable interface {
	Durable()
}

// Waiting steps make nothing that stays, and take long: what was made before one is on record as ready when it begins, so that a
// crash meanwhile does not take it down.
type Waiting interface {
	Waiting()
}

// Observer is a step that can look whether its resource, recorded as ready, still is there, and
// repair it without disturbing the guest. A step without it counts as there.
type Observer interface {
	// Observe returns false if the resource is gone for good (the VMM ended). An error means it
	// could not tell; nothing is taken down then.
	Observe(ctx context.Context, v *vm.VM) (bool, error)
}

// Journal is where records go. internal/store implements it with one transaction a call.
type Journal interface {
	// Save stores the VM's record together with journal entries, atomically and durably.
	Save(ctx context.Context, v vm.VM, steps ...StepRecord) error
	// Steps returns what is recorded; steps that are absent have no entry.
	Steps(ctx context.Context, id vm.ID) (map[string]StepState, error)
	// Forget removes the VM's record and journal.
	Forget(ctx context.Context, id vm.ID) error
}

// Progress is told which step begins; "" ends the last one.
type Progress func(step string)

// ErrSuspended as the cause of a cancelled context stops Up and Down at the next boundary without
// undoing anything, exactly as a crash would: the next daemon goes on from the journal.
var ErrSuspended = errors.New("the daemon is stopping")

// ErrNotUndone is in the chain of Up's error if not everything could be taken down again: the
// journal says what is left.
var ErrNotUndone = errors.New("it could not be undone")

// cleanupBound limits one step's Cleanup when it undoes a failed Prepare, and every Hard one.
const cleanupBound = 30 * time.Second

// StepError says which step gave up.
type StepError struct {
	Step string
	Err  error
}

// Error names the step and its error.
func (e *StepError) Error() string { return fmt.Sprintf("step %s: %v", e.Step, e.Err) }

// Unwrap gives the step's own error.
func (e *StepError) Unwrap() error { return e.Err }

// Engine drives a list of steps. It holds no state of its own.
type Engine struct {
	steps   []Step
	journal Journal
	// atStep is called after every Prepare; the crash test ends the process in it.
	atStep func()
}

// New returns an engine over the steps, in order.
func New(journal Journal, steps ...Step) *Engine {
	return &Engine{steps: steps, journal: journal, atStep: func() {}}
}

// AtStep sets what is called after every Prepare that did not fail. For tests that end the process there.
func (e *Engine) AtStep(f func()) { e.atStep = f }

// Steps returns the list, in order.
func (e *Engine) Steps() []Step { return e.steps }

func durable(s Step) bool { _, ok := s.(Durable); return ok }

func suspended(ctx context.Context) bool { return errors.Is(context.Cause(ctx), ErrSuspended) }

// Up makes every step ready and ends in vm.Running. What a crash left in the middle is taken down
// first. On a failure it cleans up, in reverse, every step that is not durable and returns a
// *StepError; the record's state is then the caller's to set. v is updated as the record is.
func (e *Engine) Up(ctx context.Context, v *vm.VM, progress Progress) error {
	if err := e.clearTorn(ctx, v); err != nil {
		return err
	}
	have, err := e.journal.Steps(ctx, v.ID)
	if err != nil {
		return err
	}
	v.State = vm.Starting
	// What is made in any case is recorded as preparing in one transaction, and as ready in one with the next intent: each is a wait
	// for the disk. A crash in between finds preparing, whether the step had begun or not: Cleanup takes either.
	var done []StepRecord
	intended := map[string]bool{}
	anew := false // a step was made again: what stood on the old one is worth nothing
	for i, s := range e.steps {
		ready := have[s.Name()] == Ready || mutation == "ignored-preparing" && have[s.Name()] == Preparing
		if ready && (durable(s) && observes(s) || !durable(s) && !anew) {
			there, err := observe(ctx, s, v)
			switch {
			case err != nil && durable(s):
				return e.undo(ctx, v, s, errors.Unwrap(err), done)
			case err != nil: // it may run: nothing is taken down
				return err
			case there:
				continue
			}
		}
		progress(s.Name())
		if suspended(ctx) {
			return e.suspend(ctx, v, s, append(done, e.takenBack(i, intended)...))
		}
		if !intended[s.Name()] {
			next := e.together(i, have)
			if err := e.intend(ctx, v, done, next...); err != nil {
				return e.undo(ctx, v, s, err, done)
			}
			done = nil
			for _, n := range next {
				intended[n.Step] = true
			}
		}
		if err := s.Prepare(ctx, v); err != nil {
			return e.undo(ctx, v, s, err, append(done, e.takenBack(i+1, intended)...))
		}
		e.atStep()
		anew = anew || !durable(s)
		done = append(done, StepRecord{s.Name(), Ready})
		if suspended(ctx) {
			return e.suspend(ctx, v, s, append(done, e.takenBack(i+1, intended)...))
		}
	}
	progress("")
	v.State, v.Failure = vm.Running, nil
	if err := e.journal.Save(context.WithoutCancel(ctx), *v, done...); err != nil {
		return e.undo(ctx, v, e.steps[len(e.steps)-1], err, done)
	}
	return nil
}

// UpDurable makes only the durable steps ready: a VM that is made but not started. It undoes nothing
// on a failure and leaves v.State alone.
func (e *Engine) UpDurable(ctx context.Context, v *vm.VM, progress Progress) error {
	var done []StepRecord
	for _, s := range e.steps {
		if !durable(s) {
			continue
		}
		progress(s.Name())
		if err := e.intend(ctx, v, done, StepRecord{s.Name(), Preparing}); err != nil {
			return &StepError{s.Name(), err}
		}
		if err := s.Prepare(ctx, v); err != nil {
			if suspended(ctx) {
				err = ErrSuspended
			}
			return &StepError{s.Name(), err}
		}
		e.atStep()
		done = []StepRecord{{s.Name(), Ready}}
	}
	progress("")
	return e.journal.Save(context.WithoutCancel(ctx), *v, done...)
}

// clearTorn takes down, in reverse, everything from the lowest step that is recorded as being
// prepared or cleaned: it may be half there, and what stands on it is worth nothing. Durable steps
// are left to their own Prepare.
func (e *Engine) clearTorn(ctx context.Context, v *vm.VM) error {
	if mutation == "ignored-preparing" {
		return nil
	}
	have, err := e.journal.Steps(ctx, v.ID)
	if err != nil {
		return err
	}
	for i, s := range e.steps {
		if st := have[s.Name()]; !durable(s) && (st == Preparing || st == Cleaning) {
			above := &Engine{steps: e.steps[i:], journal: e.journal}
			return above.Down(ctx, v, Hard, false, func(string) {})
		}
	}
	return nil
}

// together are the intents of the step at i and of those behind it that are made in any case, up to one that waits.
func (e *Engine) together(i int, have map[string]StepState) []StepRecord {
	next := []StepRecord{{e.steps[i].Name(), Preparing}}
	for _, s := range e.steps[i+1:] {
		if _, waits := s.(Waiting); waits {
			break
		}
		if have[s.Name()] != Ready {
			next = append(next, StepRecord{s.Name(), Preparing})
		}
	}
	return next
}

// takenBack are records for the intents of the steps from the one at i on, which have not begun.
func (e *Engine) takenBack(i int, intended map[string]bool) (records []StepRecord) {
	for _, s := range e.steps[i:] {
		if intended[s.Name()] {
			records = append(records, StepRecord{s.Name(), Absent})
		}
	}
	return records
}

// intend records what is about to be done, together with what was.
func (e *Engine) intend(ctx context.Context, v *vm.VM, done []StepRecord, next ...StepRecord) error {
	if suspended(ctx) {
		return e.keep(ctx, v, done)
	}
	if mutation == "late-intent" {
		return e.journal.Save(ctx, *v, done...)
	}
	return e.journal.Save(ctx, *v, append(done, next...)...)
}

// suspend records what was done and stops without undoing.
func (e *Engine) suspend(ctx context.Context, v *vm.VM, at Step, done []StepRecord) error {
	return &StepError{at.Name(), e.keep(ctx, v, done)}
}

// keep records what was done for the next daemon. It returns ErrSuspended, or why it could not.
func (e *Engine) keep(ctx context.Context, v *vm.VM, done []StepRecord) error {
	if len(done) > 0 {
		if err := e.journal.Save(context.WithoutCancel(ctx), *v, done...); err != nil {
			return err
		}
	}
	return ErrSuspended
}

// undo takes down what Up made, from step at downwards, and returns why. unsaved is what the journal does not know yet: what is
// ready, and intents that are taken back.
func (e *Engine) undo(ctx context.Context, v *vm.VM, at Step, why error, unsaved []StepRecord) error {
	if suspended(ctx) {
		return &StepError{at.Name(), ErrSuspended}
	}
	failed := &StepError{at.Name(), why}
	if len(unsaved) > 0 {
		// If that fails, what has not begun is cleaned up as if it had, and the journal's fault is told by what Down records.
		_ = e.journal.Save(context.WithoutCancel(ctx), *v, unsaved...)
	}
	if err := e.Down(context.WithoutCancel(ctx), v, Hard, false, func(string) {}); err != nil {
		return errors.Join(failed, fmt.Errorf("%w: %w", ErrNotUndone, err))
	}
	return failed
}

// Down cleans steps up in reverse: with durable, all of them; otherwise all but the durable ones.
// It stops at the first failure, leaving the journal to say how far it came, and returns a
// *StepError. The record's state is the caller's to set.
func (e *Engine) Down(ctx context.Context, v *vm.VM, how How, all bool, progress Progress) error {
	have, err := e.journal.Steps(ctx, v.ID)
	if err != nil {
		return err
	}
	var done []StepRecord
	order := slices.Clone(e.steps)
	if mutation != "forward-cleanup" {
		slices.Reverse(order)
	}
	for _, s := range order {
		if have[s.Name()] == "" || durable(s) && !all {
			continue
		}
		progress(s.Name())
		if err := e.intend(ctx, v, done, StepRecord{s.Name(), Cleaning}); err != nil {
			return &StepError{s.Name(), err}
		}
		if err := cleanup(ctx, s, v, how); err != nil {
			if suspended(ctx) {
				err = ErrSuspended
			}
			return &StepError{s.Name(), err}
		}
		done = []StepRecord{{s.Name(), Absent}}
		if suspended(ctx) {
			return e.suspend(ctx, v, s, done)
		}
	}
	progress("")
	if len(done) == 0 {
		return nil
	}
	return e.journal.Save(context.WithoutCancel(ctx), *v, done...)
}

func cleanup(ctx context.Context, s Step, v *vm.VM, how How) error {
	if how == Hard {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, cleanupBound)
		defer cancel()
	}
	return s.Cleanup(ctx, v, how)
}

// Todo is what Settle found to be left.
type Todo string

// What is left to do for a VM after a restart of the daemon.
const (
	Nothing Todo = "nothing" // as desired
	GoUp    Todo = "up"      // it was being started, and still is wanted
	GoDown  Todo = "down"    // a stop is to be finished, or its VMM ended while nobody looked
	Cycle   Todo = "cycle"   // a restart was half-way down: down, then up
	Remove  Todo = "remove"  // a delete is to be finished
)

// Settle compares one VM's record with its resources after a restart of the daemon and says what is
// left to do. It changes nothing and never disturbs a VMM that is as recorded; where it returns
// Nothing, every ready step was observed and so is known to the process again.
//
// Rebooted says that the host was booted anew since the record was written: nothing can run.
func (e *Engine) Settle(ctx context.Context, v *vm.VM, rebooted bool) (Todo, error) {
	have, err := e.journal.Steps(ctx, v.ID)
	if err != nil {
		return Nothing, err
	}
	up := false // some step that a stop takes away has a record
	for _, s := range e.steps {
		up = up || have[s.Name()] != "" && !durable(s)
	}
	switch {
	case v.Desired == vm.WantDeleted:
		return Remove, nil
	case rebooted && (up || v.Desired == vm.WantRunning):
		return GoDown, nil
	case v.State == vm.Starting, v.State == vm.Defined:
		if v.Desired == vm.WantRunning {
			return GoUp, nil
		}
	case v.State == vm.Stopping:
		if v.Desired == vm.WantRunning {
			return Cycle, nil
		}
		return GoDown, nil
	case v.State == vm.Running:
		if v.Desired != vm.WantRunning {
			return GoDown, nil
		}
		for _, s := range e.steps {
			if durable(s) {
				continue
			}
			if have[s.Name()] != Ready {
				return GoDown, nil
			}
			if there, err := observe(ctx, s, v); err != nil {
				return Nothing, err
			} else if !there {
				return GoDown, nil
			}
		}
		return Nothing, nil
	}
	// defined or starting and not wanted, stopped, failed: only durable steps may be there.
	if up {
		return GoDown, nil
	}
	return Nothing, nil
}

func observes(s Step) bool { _, ok := s.(Observer); return ok }

func observe(ctx context.Context, s Step, v *vm.VM) (bool, error) {
	o, ok := s.(Observer)
	if !ok {
		return true, nil
	}
	there, err := o.Observe(ctx, v)
	if err != nil {
		return false, &StepError{s.Name(), err}
	}
	return there, nil
}

// FailureOf makes the record of why an operation gave up.
func FailureOf(err error, at time.Time) *vm.Failure {
	f := &vm.Failure{Code: string(fault.CodeOf(err)), Message: err.Error(), Hint: fault.HintOf(err), At: at}
	var se *StepError
	if errors.As(err, &se) {
		f.Step, f.Message = se.Step, se.Err.Error()
	}
	return f
}
