package usernet

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Pauses before a program that ended is started again; one that lived for longer than the longest is at once.
const (
	firstRevival = 100 * time.Millisecond
	mostRevival  = time.Minute
)

// reviveTime bounds one start of a program.
const reviveTime = 30 * time.Second

// keeper starts programs again that end while their VM is attached: killed by somebody, or by a host that is out of
// memory. It is for VMs whose agent connects again.
type keeper struct {
	host  *Host
	start func(context.Context, vm.VM) error
	log   *slog.Logger

	mu   sync.Mutex
	kept map[vm.ID]*kept
}

// kept is one VM's program.
type kept struct {
	stop context.CancelFunc
	done chan struct{}

	mu sync.Mutex // held while the program is looked for or started
	v  vm.VM      // as it was last told of
}

// keep begins to watch over the program of a VM, which runs.
func (k *keeper) keep(v vm.VM) {
	ctx, stop := context.WithCancel(context.Background())
	e := &kept{v: v, stop: stop, done: make(chan struct{})}
	k.mu.Lock()
	k.kept[v.ID] = e
	k.mu.Unlock()
	go func() {
		defer close(e.done)
		k.watch(ctx, e, string(v.ID))
	}()
}

// forget ends that and returns when nothing starts the program any more. Fine for one that is not watched over.
func (k *keeper) forget(id vm.ID) {
	k.mu.Lock()
	e := k.kept[id]
	delete(k.kept, id)
	k.mu.Unlock()
	if e != nil {
		e.stop()
		<-e.done
	}
}

// close forgets all.
func (k *keeper) close() {
	k.mu.Lock()
	ids := make([]vm.ID, 0, len(k.kept))
	for id := range k.kept {
		ids = append(ids, id)
	}
	k.mu.Unlock()
	for _, id := range ids {
		k.forget(id)
	}
}

// revive starts the program of a VM unless it runs, and watches over it from then on, with the VM as it is now.
func (k *keeper) revive(ctx context.Context, v vm.VM) error {
	k.mu.Lock()
	e := k.kept[v.ID]
	k.mu.Unlock()
	if e == nil { // this daemon has just found it
		if err := k.run(ctx, v); err != nil {
			return err
		}
		k.keep(v)
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.v = v
	return k.run(ctx, v)
}

// run starts the program unless it runs.
func (k *keeper) run(ctx context.Context, v vm.VM) error {
	up, err := k.host.Running(ctx, string(v.ID))
	if err != nil || up {
		return err
	}
	k.log.Warn("the program of a VM's network had ended and is started again", "vm", v.ID, "log", k.host.Log(string(v.ID)))
	return k.start(ctx, v)
}

// watch starts the program whenever it has ended, until ctx ends.
func (k *keeper) watch(ctx context.Context, e *kept, id string) {
	for pause := firstRevival; ctx.Err() == nil; {
		began := time.Now()
		p, err := k.host.find(ctx, id)
		switch {
		case err == nil:
			select {
			case <-p.Done():
			case <-ctx.Done():
			}
			_ = p.Close()
		case !fault.Is(err, fault.NotFound):
			k.log.Error("the program of a VM's network cannot be looked for", "vm", id, "err", err)
		}
		if time.Since(began) > mostRevival {
			pause = firstRevival
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, mostRevival)
		if err := k.again(ctx, e); err != nil && ctx.Err() == nil {
			k.log.Error("the program of a VM's network cannot be started again", "vm", id, "err", err)
		}
	}
}

// again is run, within a bound of its own, for a VM that is watched over.
func (k *keeper) again(ctx context.Context, e *kept) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, reviveTime)
	defer cancel()
	return k.run(ctx, e.v)
}
