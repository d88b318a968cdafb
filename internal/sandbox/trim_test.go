package sandbox

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
)

// TestStopTrims: an orderly stop asks the guest to discard what it does not use, before it asks it to shut down. A guest that cannot, or
// that never comes to an end of it, is stopped in order all the same; one that is forced off is not asked.
func TestStopTrims(t *testing.T) {
	t.Parallel()
	const bound = 20 * time.Second
	for name, c := range map[string]struct {
		trim  func(ctx context.Context) (*agentv1.TrimResponse, error)
		force bool
		want  []string
		atMin time.Duration // that a stop takes
	}{
		"it trims": {want: []string{"trim", "shutdown"}, trim: func(context.Context) (*agentv1.TrimResponse, error) {
			return &agentv1.TrimResponse{Trimmed: []*agentv1.Trimmed{{Target: "/", Bytes: 1 << 20}}}, nil
		}},
		"its VMM takes no discards": {want: []string{"trim", "shutdown"}, trim: func(context.Context) (*agentv1.TrimResponse, error) {
			return &agentv1.TrimResponse{Trimmed: []*agentv1.Trimmed{{Target: "/", Unsupported: true}}}, nil
		}},
		"it fails": {want: []string{"trim", "shutdown"}, trim: func(context.Context) (*agentv1.TrimResponse, error) {
			return nil, errors.New("input/output error")
		}},
		"it never ends": {want: []string{"trim", "shutdown"}, atMin: bound / 8, trim: func(ctx context.Context) (*agentv1.TrimResponse, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}},
		"forced off": {force: true, trim: func(context.Context) (*agentv1.TrimResponse, error) { return &agentv1.TrimResponse{}, nil }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.cfg.StopTimeout = bound
			var mu sync.Mutex
			var asked []string
			ask := func(what string) { mu.Lock(); defer mu.Unlock(); asked = append(asked, what) }
			r.agent = func(ctx context.Context, g *fakevmm.Guest, conn net.Conn) {
				guestWith(func(guest *agentd.Guest) {
					guest.Trim = func(ctx context.Context) (*agentv1.TrimResponse, error) { ask("trim"); return c.trim(ctx) }
					guest.Shutdown = func(context.Context, bool) error { ask("shutdown"); return g.PowerOff() }
				})(ctx, g, conn)
			}
			r.start()
			v := r.create("web")
			began := time.Now()
			r.done(r.s.Stop(r.ctx(), v.ID, c.force))
			took := time.Since(began)
			if after := r.vm(v.ID); after.State != vm.Stopped || after.Note != "" && !c.force {
				t.Errorf("left %s", brief([]vm.VM{after}))
			}
			if took < c.atMin || took > bound {
				t.Errorf("the stop took %s, want %s to %s", took, c.atMin, bound)
			}
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(asked, c.want) {
				t.Errorf("the guest was asked to %q, want %q", asked, c.want)
			}
			r.check()
		})
	}
}
