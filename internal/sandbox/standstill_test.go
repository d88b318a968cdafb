package sandbox

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// TestVerbsOfAGuestThatStandsStill: a guest whose CPUs stand still, before it is asked or while it answers, holds each verb for its bound
// and not longer, and what is said then names what was waited for. TestStandstill of package agentd stops at each byte.
func TestVerbsOfAGuestThatStandsStill(t *testing.T) {
	t.Parallel()
	const grace = 5 * time.Second // of a busy machine
	dialled := func(conn net.Conn, err error) error {
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	type verb struct {
		bound time.Duration
		says  string // "": it succeeds all the same
		do    func(r *rig, v vm.VM) error
	}
	op := func(r *rig, begin func() (string, error)) error {
		id, err := begin()
		if err == nil {
			err = r.s.WatchOperation(r.ctx(), id, func(o operation.Operation) error {
				if o.Fault != nil {
					return o.Fault
				}
				return nil
			})
		}
		return err
	}
	short := func(r *rig) context.Context { // what the daemon's front door does
		ctx, cancel := context.WithTimeout(r.ctx(), 3*time.Second)
		r.t.Cleanup(cancel)
		return ctx
	}
	verbs := map[string]verb{
		"stats": {askTime, "did not answer", func(r *rig, v vm.VM) error { return r.s.Stats(r.ctx(), []string{v.Name})[0].GuestErr }},
		"ports": {askTime + probesTime, "did not answer", func(r *rig, v vm.VM) error { return r.s.Ports(r.ctx(), []string{v.Name})[0].Err }},
		"show":  {2 * time.Second, "", func(r *rig, v vm.VM) error { _, err := r.s.Show(r.ctx(), v.Name); return err }},
		"trim": {askTime, "did not answer", func(r *rig, v vm.VM) error {
			return op(r, func() (string, error) { o, err := r.s.Trim(r.ctx(), v.ID); return o.ID, err })
		}},
		"set": {applyTime, "", func(r *rig, v vm.VM) error {
			size := v.Spec.DiskSize + vm.GiB
			return op(r, func() (string, error) {
				o, err := r.s.Set(r.ctx(), v.ID, SetRequest{Change: vm.Change{DiskSize: &size}})
				return o.ID, err
			})
		}},
		"stop": {4 * time.Second, "", func(r *rig, v vm.VM) error {
			return op(r, func() (string, error) { o, err := r.s.Stop(r.ctx(), v.ID, false); return o.ID, err })
		}},
		"dial":    {3 * time.Second, "cannot be reached", func(r *rig, v vm.VM) error { return dialled(r.s.DialGuest(short(r), v.ID, 80, false)) }},
		"wait":    {3 * time.Second, "cannot be reached", func(r *rig, v vm.VM) error { return dialled(r.s.DialGuest(short(r), v.ID, 80, true)) }},
		"forward": {3 * time.Second, "cannot be reached", func(r *rig, v vm.VM) error { return dialled(r.s.DialForward(short(r), v.ID, 80)) }},
		"exec":    {3 * time.Second, "the guest's agent did not", func(r *rig, v vm.VM) error { return dialled(r.s.DialAgent(short(r), v.ID, wire.KindExec)) }},
		"cp":      {3 * time.Second, "the guest's agent did not", func(r *rig, v vm.VM) error { return dialled(r.s.DialAgent(short(r), v.ID, wire.KindCopy)) }},
	}
	for name, early := range map[string]bool{"before": true, "while it answers": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.cfg.StopTimeout = 4 * time.Second
			var freezes sync.Once
			freeze := func() {
				time.Sleep(200 * time.Millisecond)
				freezes.Do(func() { r.faults("* freeze") })
			}
			r.agent = guestWith(func(g *agentd.Guest) {
				g.Stats = func(context.Context) (*agentv1.StatsResponse, error) { freeze(); return &agentv1.StatsResponse{}, nil }
				g.Ports = func(context.Context) (*agentv1.PortsResponse, error) {
					return &agentv1.PortsResponse{Listeners: []*agentv1.Listener{{Protocol: "tcp", Address: "0.0.0.0", Port: 80}, {Protocol: "tcp", Address: "0.0.0.0", Port: 81}}}, nil
				}
				g.Trim = func(context.Context) (*agentv1.TrimResponse, error) { return &agentv1.TrimResponse{}, nil }
				g.Grow = func(context.Context) ([]agentd.Grown, error) { freeze(); return nil, nil }
				g.Shutdown = func(context.Context, bool) error { freeze(); return nil }
				g.DialTCP = func(ctx context.Context, _ int) (net.Conn, error) { freeze(); <-ctx.Done(); return nil, ctx.Err() }
			})
			r.start()
			vms := map[string]vm.VM{}
			for name := range verbs {
				vms[name] = r.create(name)
			}
			if early {
				r.faults("* freeze")
			}
			var all sync.WaitGroup
			for name, v := range verbs {
				if name == "trim" && !early {
					continue // once begun it may take trimTime, whose guest is asked before how it is
				}
				all.Go(func() {
					began := time.Now()
					err := v.do(r, vms[name])
					if took := time.Since(began); took > v.bound+grace {
						t.Errorf("%s took %s, its bound is %s", name, took, v.bound)
					}
					if early && v.says != "" && (err == nil || !strings.Contains(err.Error(), v.says) || fault.HintOf(err) == "") {
						t.Errorf("%s: %v (hint %q), want %q", name, err, fault.HintOf(err), v.says)
					}
				})
			}
			all.Wait()
			r.faults()
		})
	}
}
