package sandbox

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
)

// Looks come for what runs, a VM that stops has none, and one that goes ends the watch when it was the last.
func TestWatchUsage(t *testing.T) {
	var asked atomic.Int32
	r := newRig(t)
	r.agent = guestWith(func(g *agentd.Guest) {
		g.Stats = func(context.Context) (*agentv1.StatsResponse, error) { return &agentv1.StatsResponse{Cpus: 3}, nil }
		g.Ports = func(context.Context) (*agentv1.PortsResponse, error) {
			return &agentv1.PortsResponse{Listeners: []*agentv1.Listener{{Protocol: "tcp", Address: "0.0.0.0", Port: 80, Pid: 7}}}, nil
		}
		g.DialTCP = func(context.Context, int) (net.Conn, error) {
			asked.Add(1)
			return nil, errors.New("nobody")
		}
	})
	r.start()
	v := r.create("web")
	looks := make(chan Usage)
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(r.ctx())
	defer cancel()
	go func() {
		ended <- r.s.WatchUsage(ctx, UsageRequest{Refs: []string{"web", string(v.ID)}, Every: minUsageEvery, Ports: true}, func(u Usage) error {
			select {
			case looks <- u:
			case <-ctx.Done():
			}
			return nil
		})
	}()
	next := func() Usage {
		t.Helper()
		select {
		case u := <-looks:
			return u
		case err := <-ended:
			t.Fatalf("it ended: %v", err)
		case <-time.After(20 * time.Second):
			t.Fatal("no look came")
		}
		panic("unreachable")
	}
	if u := next(); u.Stats.VM.ID != v.ID || u.Stats.Guest.GetCpus() != 3 || u.Stats.Host == nil || u.Ports == nil || len(u.Ports.Ports) != 1 {
		t.Fatalf("first look: %+v", u)
	}
	for i := 1; i < portsLook; i++ {
		if u := next(); u.Ports != nil || u.Stats.Guest == nil {
			t.Fatalf("look %d: %+v", i, u)
		}
	}
	if u := next(); u.Ports == nil {
		t.Fatal("listeners are looked at once only")
	}
	r.done(r.s.Delete(r.ctx(), v.ID))
	for {
		select {
		case <-looks:
			continue
		case err := <-ended:
			if err != nil {
				t.Errorf("the watch of a VM that is gone ends with %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("it does not end")
		}
		break
	}
}

// A listener that answered is not asked again, one that did not is asked some times: servers listen before
// they answer. Another process on the same port is another listener.
func TestAnswersAreKept(t *testing.T) {
	var none *answers
	p := Port{Protocol: "tcp", Port: 80, PID: 1}
	if none.fill(&p) {
		t.Error("nothing knows something")
	}
	none.keep(nil)
	a := &answers{}
	for i := range askAgain {
		if a.fill(&p) {
			t.Fatalf("a listener that said nothing is not asked a %d. time", i+1)
		}
		a.keep([]Port{p})
	}
	if !a.fill(&p) {
		t.Error("one that says nothing is asked for ever")
	}
	web := Port{Protocol: "tcp", Port: 81, PID: 2, Scheme: "http", Status: 200, Title: "hi"}
	a.keep([]Port{web})
	got := Port{Protocol: "tcp", Port: 81, PID: 2}
	if !a.fill(&got) || got != web {
		t.Errorf("kept %+v", got)
	}
	if got.PID = 3; a.fill(&got) {
		t.Error("another process has its answer")
	}
	if a.fill(&p) {
		t.Error("what is gone is remembered")
	}
}

func TestWatchUsageRefuses(t *testing.T) {
	r := newRig(t).start()
	r.create("web")
	send := func(Usage) error { return errors.New("enough") }
	for name, c := range map[string]struct {
		r    UsageRequest
		code fault.Code
	}{
		"no refs": {UsageRequest{}, fault.Invalid},
		"many":    {UsageRequest{Refs: make([]string, maxUsageRefs+1)}, fault.Invalid},
		"hurry":   {UsageRequest{Refs: []string{"web"}, Every: time.Millisecond}, fault.Invalid},
		"nobody":  {UsageRequest{Refs: []string{"nobody"}}, fault.NotFound},
	} {
		if err := r.s.WatchUsage(r.ctx(), c.r, send); !fault.Is(err, c.code) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := r.s.WatchUsage(r.ctx(), UsageRequest{Refs: []string{"web"}}, send); err == nil || err.Error() != "enough" {
		t.Errorf("an error of send's: %v", err)
	}
}
