package sandbox

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/test/fakeguest"
)

// publishing is a network that notes what is published.
type publishing struct {
	*fakeNetwork
	mu    sync.Mutex
	ports map[vm.ID][]uint16
	fail  error
}

func (p *publishing) Publishes() bool { return true }

func (p *publishing) Publish(_ context.Context, v vm.VM, ports []uint16) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ports[v.ID] = ports
	return p.fail
}

func (p *publishing) Published(_ context.Context, v vm.VM) ([]uint16, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ports[v.ID], p.fail
}

func (p *publishing) until(t *testing.T, when string, id vm.ID, want ...uint16) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		got, told := p.ports[id]
		p.mu.Unlock()
		if told && slices.Equal(got, want) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s, %v are published, want %v", when, got, want)
		}
	}
}

// TestPublishedPortsFollowTheGuest: over changes, over a publication that fails, the end of a daemon, and the VM's own end.
func TestPublishedPortsFollowTheGuest(t *testing.T) {
	r := newRig(t)
	var p *publishing
	r.networks = func(h NetworkHost) []Network {
		p = &publishing{fakeNetwork: &fakeNetwork{dir: filepath.Join(r.dir, "network"), host: h}, ports: map[vm.ID][]uint16{}}
		return []Network{p}
	}
	r.start()
	listen := func(v vm.VM, ports ...uint16) {
		t.Helper()
		if err := fakeguest.Listen(r.paths.Run(v.ID.Short()), ports...); err != nil {
			t.Fatal(err)
		}
	}
	v, other := r.create("web"), r.create("db")
	p.until(t, "at first", v.ID)
	listen(v, 22, 3000)
	listen(other, 5432)
	p.until(t, "listening", v.ID, 22, 3000)
	p.until(t, "another VM", other.ID, 5432)
	p.mu.Lock()
	p.fail = fmt.Errorf("not now")
	p.mu.Unlock()
	listen(v, 22)
	p.until(t, "after one less", v.ID, 22)
	listen(v, 22, 8080)
	p.until(t, "after a failure", v.ID, 22, 8080)

	r.restart()
	p.until(t, "with the next daemon", v.ID, 22, 8080)
	listen(v)
	p.until(t, "with none", v.ID)
	r.done(r.s.Stop(r.ctx(), v.ID, false))
	r.done(r.s.Start(r.ctx(), v.ID))
	listen(v, 80)
	p.until(t, "started again", v.ID, 80)
	for _, id := range []vm.ID{v.ID, other.ID} {
		r.done(r.s.Delete(r.ctx(), id))
	}
	if left, err := os.ReadDir(p.dir); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
}
