package sandbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"go.uber.org/goleak"

	"git.thaloco.com/thaloco/banger/internal/console"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
)

// Not parallel: it looks at all goroutines of the process.
func TestNoGoroutineOutlivesTheDaemon(t *testing.T) {
	before := goleak.IgnoreCurrent()
	r := newRig(t)
	if err := r.open(); err != nil {
		t.Fatal(err)
	}
	v, w := r.create("calm-otter"), r.create("still-there")
	watching := make(chan error, 2)
	for range 2 {
		go func() { watching <- r.s.Watch(context.Background(), func(Event) error { return nil }) }()
	}
	r.done(r.s.Restart(r.ctx(), v.ID))
	if err := r.world.End("calm-otter", vmm.GuestShutdown); err != nil {
		t.Fatal(err)
	}
	r.untilVM(v.ID, "its end", func(v vm.VM) bool { return v.State == vm.Stopped })
	r.faults("calm-otter hold")
	op, err := r.s.Start(r.ctx(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	r.untilStage(op.ID, stepVMM)
	r.stop()
	for range 2 {
		if err := <-watching; err != nil {
			t.Errorf("a watcher ended with %v", err)
		}
	}
	goleak.VerifyNone(t, before)

	// The guest that runs on belongs to nobody; the next daemon takes it in, and ends it.
	r.faults()
	if err := r.open(); err != nil {
		t.Fatal(err)
	}
	r.settled()
	r.done(r.s.Delete(r.ctx(), v.ID))
	r.done(r.s.Delete(r.ctx(), w.ID))
	r.nothing()
	r.stop()
	goleak.VerifyNone(t, before)
}

func TestEvents(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	old := r.create("old")
	type told struct {
		what  string
		event Event
	}
	var mu sync.Mutex
	var seen []told
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	first, ended := make(chan struct{}), make(chan error, 1)
	var once sync.Once
	go func() {
		ended <- r.s.Watch(ctx, func(e Event) error {
			mu.Lock()
			defer mu.Unlock()
			switch {
			case e.Snapshot != nil:
				seen = append(seen, told{"snapshot", e})
				once.Do(func() { close(first) })
			case e.VM != nil:
				seen = append(seen, told{string(e.VM.State), e})
			case e.Operation != nil:
				seen = append(seen, told{string(e.Operation.Kind) + " " + string(e.Operation.State), e})
			case e.Deleted != "":
				seen = append(seen, told{"deleted", e})
			default:
				t.Error("an empty event")
			}
			return nil
		})
	}()
	<-first
	v := r.create("calm-otter")
	r.done(r.s.Stop(r.ctx(), v.ID, false))
	r.done(r.s.Delete(r.ctx(), v.ID))
	last := r.done(r.s.Stop(r.ctx(), old.ID, false))
	for { // until the last event has come
		mu.Lock()
		n := len(seen)
		got := n > 0 && seen[n-1].event.Operation != nil && seen[n-1].event.Operation.ID == last.ID && seen[n-1].event.Operation.State == operation.Succeeded
		mu.Unlock()
		if got {
			break
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	if s := seen[0].event.Snapshot; s == nil || len(s.VMs) != 1 || len(s.Operations) != 1 || len(s.Images) != 1 {
		t.Fatalf("first: %+v", seen[0])
	}
	var order []string
	for _, s := range seen[1:] {
		if s.event.Snapshot != nil {
			t.Error("a second snapshot")
		}
		if s.event.VM != nil && s.event.VM.ID == old.ID || s.event.Operation != nil && s.event.Operation.VMID == string(old.ID) {
			continue
		}
		if len(order) == 0 || order[len(order)-1] != s.what {
			order = append(order, s.what)
		}
	}
	// The record changes before the operation that changes it is said to have ended.
	text := strings.Join(order, ", ")
	at := 0
	for _, want := range []string{"defined", "create running", "starting", "running", "create succeeded", "stop running", "stopping", "stopped", "stop succeeded",
		"delete running", "deleting", "deleted", "delete succeeded"} {
		i := strings.Index(text[at:], want)
		if i < 0 {
			t.Fatalf("no %s in its place: %s", want, text)
		}
		at += i
	}
}

func TestASlowWatcherIsGivenAFreshSnapshot(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	v := r.create("calm-otter")
	r.done(r.s.Stop(r.ctx(), v.ID, false))
	entered, release := make(chan struct{}), make(chan struct{})
	done := errors.New("done")
	snapshots := 0
	var last vm.VM
	ended := make(chan error, 1)
	go func() {
		ended <- r.s.Watch(r.ctx(), func(e Event) error {
			if e.VM != nil {
				last = *e.VM
			}
			if e.Snapshot != nil {
				snapshots++
				last = e.Snapshot.VMs[0]
				if snapshots == 1 {
					close(entered)
					<-release
				}
			}
			if last.Note == "the last" {
				return done
			}
			return nil
		})
	}()
	<-entered
	for i := range 3 * watchBuffer {
		v = r.vm(v.ID)
		v.Note = fmt.Sprint(i)
		if i == 3*watchBuffer-1 {
			v.Note = "the last"
		}
		if err := r.s.store.Save(r.ctx(), v); err != nil {
			t.Fatal(err)
		}
	}
	close(release)
	if err := <-ended; !errors.Is(err, done) || snapshots != 2 {
		t.Errorf("%v, %d snapshots", err, snapshots)
	}
}

func TestCancel(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	_, err := r.s.Cancel(r.ctx(), "nope")
	wants(t, "unknown", err, fault.NotFound, "nope", "banger operation list")
	v := r.create("calm-otter")
	if op, err := r.s.Cancel(r.ctx(), r.s.ops.List()[0].ID); err != nil || op.State != operation.Succeeded {
		t.Errorf("one that ended: %s, %v", op.State, err)
	}
	r.faults("* deaf")
	op, err := r.s.Stop(r.ctx(), v.ID, false)
	if err != nil {
		t.Fatal(err)
	}
	r.untilStage(op.ID, "shutdown")
	_, err = r.s.Cancel(r.ctx(), op.ID)
	wants(t, "a stop", err, fault.Precondition, "a stop cannot be cancelled", "banger operation watch "+op.ID)
	r.done(r.s.Stop(r.ctx(), v.ID, true))
	ended(t, r.wait(op, nil), operation.Cancelled, fault.Cancelled, "took over", "")
	r.check()
}

// hostile is a guest whose agent says what it should not.
func hostile(ctx context.Context, g *fakevmm.Guest, conn net.Conn) {
	defer conn.Close()
	f, err := os.Open(g.Spec().Drives[len(g.Spec().Drives)-1].Path)
	if err != nil {
		return
	}
	config, err := boot.ReadDrive(f)
	f.Close()
	if err != nil {
		return
	}
	const evil = "\x1b[2J\x1b]0;owned\x07\u202ered\r\n"
	stages := &agentd.Stages{}
	for i := range 500 {
		if i == maxStages/2 { // without it nothing is recorded
			stages.Reach(agentd.Stage{Name: boot.StageAgent})
		}
		stages.Reach(agentd.Stage{Name: fmt.Sprint(evil, i, strings.Repeat("x", 1000)), At: time.Duration(i)})
	}
	_ = agentd.ServeConn(ctx, conn, false, config.Secret, &agentd.Guest{
		Version: evil, Stages: stages,
		Facts:    func() agentd.Facts { return agentd.Facts{BootID: evil, Userspace: evil} },
		Shutdown: func(context.Context, bool) error { return errors.New(evil) },
		DialTCP:  func(context.Context, int) (net.Conn, error) { return nil, errors.New(evil) },
	})
}

func TestAHostileGuestCannotWriteToTerminals(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.agent = hostile
	r.cfg.StopTimeout = 2 * time.Second
	r.start()
	op := r.wait(r.s.Create(r.ctx(), CreateRequest{Name: "calm-otter"}))
	id := vm.ID(op.VMID)
	plain := func(what, text string) {
		t.Helper()
		if !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }) || strings.Contains(text, "owned") {
			t.Errorf("%s: %q", what, text)
		}
	}
	v := r.untilVM(id, "with its boot", func(v vm.VM) bool { return len(v.Boot) > 0 })
	if len(v.Boot) > maxStages {
		t.Errorf("%d stages are remembered", len(v.Boot))
	}
	for _, s := range v.Boot {
		plain("a stage", s.Name)
		if len(s.Name) > 310 {
			t.Errorf("a stage's name of %d bytes", len(s.Name))
		}
	}
	if op.Fault != nil {
		plain("create", op.Fault.Error())
	}
	if v.State == vm.Running {
		d, err := r.s.Show(r.ctx(), "calm-otter")
		if err != nil {
			t.Fatal(err)
		}
		plain("the agent's health", d.Agent)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, err := r.s.DialGuest(ctx, id, 22, true); err == nil {
			t.Error("connected")
		} else {
			plain("a refused connection", strings.ReplaceAll(err.Error(), "owned", "")) // it is quoted
		}
		op = r.done(r.s.Stop(r.ctx(), id, false))
		for _, n := range op.Notices {
			plain("a notice", n)
		}
		if note := r.vm(id).Note; !strings.HasPrefix(note, "forced off: ") {
			t.Errorf("note %q", note)
		} else {
			plain("the note", note)
		}
	}
	r.check()
}

func TestTheEndOfALog(t *testing.T) {
	t.Parallel()
	if got := string(console.SinceStart([]byte("old\n" + console.StartMark + "one\nfirst\n\n" + console.StartMark + "two\nsecond\n"))); got != "second\n" {
		t.Errorf("this boot: %q", got)
	}
	if got := lastLines([]byte("1\n2\n\n3\n\x1b[0m\n4\n5\n6\r\n\n")); got != "\n  console: 2\n  console: 3\n  console: 4\n  console: 5\n  console: 6" {
		t.Errorf("last lines: %q", got)
	}
	if got := lastLines([]byte("\x00\n\x1b[31m\n")); got != "; its console is empty" {
		t.Errorf("an empty console: %q", got)
	}
}

func FuzzLastLines(f *testing.F) {
	for _, s := range []string{"", "\n", "a\nb", "\x1b[31mred\x1b[0m\n", "\xff\xfe\n\xc3", strings.Repeat("x", 5000), "\x9b2J", "\u202e\n", "\n" + console.StartMark + "x\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, tail []byte) {
		got := lastLines(console.SinceStart(tail))
		if !utf8.ValidString(got) || len(got) > 5*(320) || strings.Count(got, "\n") > 5 {
			t.Errorf("%q", got)
		}
		if i := strings.IndexFunc(got, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }); i >= 0 {
			t.Errorf("%q at %d", got, i)
		}
	})
}

// TestStorm asks for everything at once and in any order.
func TestStorm(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.cfg.StopTimeout = 5 * time.Second
	r.start()
	const vms, rounds = 20, 6
	var ids [vms]vm.ID
	var wg sync.WaitGroup
	var mu sync.Mutex
	var ops []operation.Operation
	note := func(op operation.Operation, err error) {
		if err != nil && !fault.Is(err, fault.NotFound) && !fault.Is(err, fault.Precondition) {
			t.Error(err)
		}
		if err == nil && op.ID != "" {
			mu.Lock()
			ops = append(ops, op)
			mu.Unlock()
		}
	}
	ctx := r.ctx()
	for i := range vms {
		wg.Go(func() {
			op, err := r.s.Create(ctx, CreateRequest{Name: fmt.Sprintf("vm-%d", i)})
			note(op, err)
			ids[i] = vm.ID(op.VMID)
			rnd := rand.New(rand.NewPCG(uint64(i), 1))
			for range rounds {
				switch id := ids[i]; rnd.IntN(10) {
				case 0, 1:
					note(r.s.Start(ctx, id))
				case 2:
					note(r.s.Stop(ctx, id, false))
				case 3:
					note(r.s.Stop(ctx, id, true))
				case 4, 5:
					note(r.s.Restart(ctx, id))
				case 6:
					if i%4 == 0 {
						note(r.s.Delete(ctx, id))
					}
				case 7:
					_ = r.world.End(string(id), []string{vmm.Crashed, vmm.GuestReset, vmm.GuestShutdown}[rnd.IntN(3)]) // it may not run
				case 8:
					if op := r.s.RunningOperation(id); op != "" {
						_, err := r.s.Cancel(ctx, op)
						note(operation.Operation{}, err)
					}
				case 9:
					_, _ = r.s.Show(ctx, string(id)) // it may be gone
					_, err := r.s.Kill(ctx, id, 0)
					note(operation.Operation{}, err)
				}
			}
		})
	}
	wg.Wait()
	for _, op := range ops {
		r.wait(op, nil)
	}
	// What ended by itself may still be followed by a stop or restart of its own.
	r.until("calm", func(s Snapshot) bool {
		machines := map[string]bool{}
		for _, m := range r.machines() {
			machines[m.Spec.ID] = true
		}
		for _, op := range s.Operations {
			if op.State == operation.Running {
				return false
			}
		}
		for _, v := range s.VMs {
			if (v.State == vm.Running) != machines[string(v.ID)] {
				return false
			}
		}
		return true
	})
	r.check()
	r.restart()
	r.check()
	for _, v := range r.s.store.VMs() {
		note(r.s.Delete(ctx, v.ID))
	}
	r.settled()
	r.nothing()
}
