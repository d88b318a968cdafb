package sandbox

import (
	"context"
	"math"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
)

// guestWith is a fake guest whose agent has what change gives it.
func guestWith(change func(g *agentd.Guest)) fakevmm.Agent {
	return func(ctx context.Context, g *fakevmm.Guest, conn net.Conn) {
		defer conn.Close()
		guest := &agentd.Guest{Version: "fake", Stages: &agentd.Stages{},
			Facts:    func() agentd.Facts { return agentd.Facts{Userspace: "running"} },
			Shutdown: func(context.Context, bool) error { return g.PowerOff() }}
		change(guest)
		_ = agentd.ServeConn(ctx, conn, false, secretOf(g), guest)
	}
}

// secretOf reads the secret from the machine's config drive, as the guest program does.
func secretOf(g *fakevmm.Guest) string {
	for _, d := range g.Spec().Drives {
		if d.Role != vmm.RoleConfig {
			continue
		}
		if f, err := os.Open(d.Path); err == nil {
			defer f.Close()
			if c, err := boot.ReadDrive(f); err == nil {
				return c.Secret
			}
		}
	}
	return ""
}

func TestStats(t *testing.T) {
	r := newRig(t).start()
	v, stopped := r.create("web"), r.create("down")
	r.done(r.s.Stop(r.ctx(), stopped.ID, false))
	all := r.s.Stats(r.ctx(), nil)
	if len(all) != 1 || all[0].VM.ID != v.ID || all[0].Err != nil || all[0].GuestErr != nil {
		t.Fatalf("without references: %+v", all)
	}
	if g := all[0].Guest; g.Cpus != 2 || g.MemoryTotalBytes != 2048*vm.MiB || len(g.Disks) != 2 || len(g.Interfaces) != 1 {
		t.Errorf("guest: %v", g)
	}
	if h := all[0].Host; h == nil || h.DiskAllocated <= 0 || h.SystemAllocated <= 0 {
		t.Errorf("host: %+v", h)
	}
	all = r.s.Stats(r.ctx(), []string{"down", "nobody", "web"})
	if len(all) != 3 || all[0].Host != nil || !fault.Is(all[0].GuestErr, fault.Precondition) ||
		!fault.Is(all[1].Err, fault.NotFound) || all[2].Guest == nil {
		t.Errorf("%+v", all)
	}
}

// A guest can say anything, and say nothing.
func TestStatsOfAHostileGuest(t *testing.T) {
	for name, c := range map[string]struct {
		stats func(context.Context) (*agentv1.StatsResponse, error)
		check func(t *testing.T, st Stats)
	}{
		"older": {nil, func(t *testing.T, st Stats) {
			wants(t, "an older agent", st.GuestErr, fault.VersionSkew, "its agent is older than this daemon and has no stats", "banger vm restart web")
		}},
		"refuses": {func(context.Context) (*agentv1.StatsResponse, error) {
			return nil, fault.New(fault.Internal, "", "no\x1b[2J\x07way")
		}, func(t *testing.T, st Stats) {
			wants(t, "a refusal", st.GuestErr, fault.Unavailable, "noway", "")
		}},
		"lies": {func(context.Context) (*agentv1.StatsResponse, error) {
			r := &agentv1.StatsResponse{UptimeMs: -1, Cpus: -5, CpuBusyMs: math.MinInt64, MemoryTotalBytes: -1, Load1Milli: -3}
			for range 1000 {
				r.Disks = append(r.Disks, &agentv1.DiskStats{Target: "\x1b]0;evil\x07/\u202eroot", UsedBytes: -1})
				r.Interfaces = append(r.Interfaces, &agentv1.InterfaceStats{Name: "eth\x00\n0", SentBytes: -1})
			}
			return r, nil
		}, func(t *testing.T, st Stats) {
			g := st.Guest
			if st.GuestErr != nil || g.UptimeMs != 0 || g.Cpus != 0 || g.CpuBusyMs != 0 || g.MemoryTotalBytes != 0 || g.Load1Milli != 0 {
				t.Errorf("%v, %v", g, st.GuestErr)
			}
			if len(g.Disks) != guestList || len(g.Interfaces) != guestList || g.Disks[0].Target != "/root" || g.Disks[0].UsedBytes != 0 ||
				g.Interfaces[0].Name != "eth 0" || g.Interfaces[0].SentBytes != 0 {
				t.Errorf("%d disks, %d interfaces, %q, %q", len(g.Disks), len(g.Interfaces), g.Disks[0], g.Interfaces[0])
			}
		}},
		"floods": {func(context.Context) (*agentv1.StatsResponse, error) {
			return &agentv1.StatsResponse{Disks: []*agentv1.DiskStats{{Target: strings.Repeat("x", 2<<20)}}}, nil
		}, func(t *testing.T, st Stats) {
			if st.Guest != nil || st.GuestErr == nil || len(st.GuestErr.Error()) > 1000 {
				t.Errorf("%d bytes of error, guest %v", len(st.GuestErr.Error()), st.Guest != nil)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.agent = guestWith(func(g *agentd.Guest) { g.Stats = c.stats })
			r.start()
			r.create("web")
			c.check(t, r.s.Stats(r.ctx(), []string{"web"})[0])
		})
	}
}

// A guest that hangs or is paused is told of within a bound, and keeps no other from its answer.
// A hundred who ask at once cost the guest a few answers.
func TestStatsOfManyCallers(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	var asked, listed atomic.Int32
	r.agent = guestWith(func(g *agentd.Guest) {
		g.Stats = func(context.Context) (*agentv1.StatsResponse, error) {
			asked.Add(1)
			return &agentv1.StatsResponse{Cpus: 2}, nil
		}
		g.Ports = func(context.Context) (*agentv1.PortsResponse, error) {
			listed.Add(1)
			return &agentv1.PortsResponse{Listeners: []*agentv1.Listener{{Protocol: "udp", Address: "0.0.0.0", Port: 53}}}, nil
		}
	})
	r.start()
	r.create("web")
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			if st := r.s.Stats(r.ctx(), []string{"web"})[0]; st.GuestErr != nil || st.Guest.Cpus != 2 || st.Host == nil || st.VM.Name != "web" {
				t.Errorf("%+v", st)
			}
			if p := r.s.Ports(r.ctx(), []string{"web"})[0]; p.Err != nil || len(p.Ports) != 1 || p.Ref != "web" {
				t.Errorf("%+v", p)
			}
		})
	}
	all.Wait()
	if asked.Load() > 50 || listed.Load() > 50 {
		t.Errorf("the guest was asked %d and %d times", asked.Load(), listed.Load())
	}
	t.Logf("the guest was asked %d and %d times", asked.Load(), listed.Load())
}

func TestStatsOfAGuestThatHangs(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	hold := make(chan struct{})
	r.agent = guestWith(func(g *agentd.Guest) {
		g.Stats = func(ctx context.Context) (*agentv1.StatsResponse, error) {
			select {
			case <-hold:
				return &agentv1.StatsResponse{}, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	})
	r.start()
	r.create("web")
	defer close(hold)
	began := time.Now()
	st := r.s.Stats(r.ctx(), nil)[0]
	wants(t, "a guest that hangs", st.GuestErr, fault.Timeout, "did not answer in time", "banger vm show web")
	if took := time.Since(began); took > askTime+5*time.Second {
		t.Errorf("took %s", took)
	}
	if err := r.world.Pause("web", vmm.NoRoom); err != nil {
		t.Fatal(err)
	}
	st = r.s.Stats(r.ctx(), []string{"web"})[0]
	wants(t, "a paused guest", st.GuestErr, fault.Precondition, "paused", "banger vm start web")
}
