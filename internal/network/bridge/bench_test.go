package bridge

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"

	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/network/networktest"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// TestRealHost runs what follows on a real host, in a network namespace of its own: many VMs that come and go,
// and what one more costs. BANGER_BENCH=1 measures with 1, 100 and 1000 VMs; without it fewer.
//
// It is a test, not a benchmark of package testing, because each measurement needs a host of so many VMs.
func TestRealHost(t *testing.T) {
	if !networktest.Inside(t, "-test.timeout=9m") {
		return
	}
	sizes, rounds := []int{1, 30}, 5
	if os.Getenv("BANGER_BENCH") != "" {
		sizes, rounds = []int{1, 100, 1000}, 50
	}
	plan := network.Plan{Installation: "a1b2c3d4e5f6", IPv4: netip.MustParsePrefix("172.16.88.0/21"), IPv6: network.UniqueLocal("a1b2c3d4e5f6")}
	for _, pool := range []int{0, 4} {
		host, err := hostnet.Open(hostnet.Settings{Plan: plan, Bridge: "banger0"})
		if err != nil {
			t.Fatal(err)
		}
		next := make(chan int, 1)
		next <- 0
		free := func(count int) (out []int) {
			first := <-next
			next <- first
			for i := range count {
				out = append(out, first+i)
			}
			return out
		}
		n := New(host, Options{Plan: plan, Bridge: "banger0", Pool: pool, Free: free, Log: slog.New(slog.DiscardHandler)})
		have := 0
		come := func() time.Duration {
			<-next
			next <- have + 1
			start := time.Now()
			attach(t, n, machine(have, vm.Spec{NAT: have%2 == 0, NetworkGroup: []string{"", "web", "db"}[have%3]}))
			took := time.Since(start)
			have++
			return took
		}
		come()
		flushed(t, plan)
		for _, size := range sizes {
			for have < size {
				come()
			}
			var add, drop []time.Duration
			for range rounds {
				if pool > 0 {
					// As far apart as creates are: the pool is filled meanwhile.
					time.Sleep(10 * time.Millisecond)
				}
				add = append(add, come())
				have--
				start := time.Now()
				if err := n.Detach(t.Context(), machine(have, vm.Spec{})); err != nil {
					t.Fatal(err)
				}
				drop = append(drop, time.Since(start))
			}
			t.Logf("beside %4d VMs, pool of %d: attach %s, detach %s", size, pool, percentiles(add), percentiles(drop))
		}
		// All at once: one batch, or two.
		many := min(have, 100)
		start, done := time.Now(), make(chan error, many)
		for i := range many {
			go func() { done <- n.Detach(t.Context(), machine(have-1-i, vm.Spec{})) }()
		}
		for range many {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		have -= many
		t.Logf("%d VMs that go at once: %v", many, time.Since(start).Round(100*time.Microsecond))
		for have > 0 {
			have--
			n.mu.Lock()
			delete(n.attached, machine(have, vm.Spec{}).ID)
			n.mu.Unlock()
		}
		if err := n.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		links, err := os.ReadFile("/proc/net/dev")
		if err != nil || strings.Contains(string(links), "bgr") || strings.Contains(string(links), "banger0") {
			t.Errorf("something is left: %v\n%s", err, links)
		}
	}
}

// flushed takes all rules away, as a firewall does that is loaded again, and wants ours back.
func flushed(t *testing.T, plan network.Plan) {
	t.Helper()
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	c.FlushRuleset()
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	for {
		tables, err := c.ListTables()
		if err != nil {
			t.Fatal(err)
		}
		ours := slices.DeleteFunc(tables, func(x *nftables.Table) bool { return x.Name != network.TableName(plan.Installation) })
		if len(ours) == 2 {
			t.Logf("rules that were flushed are back after %v", time.Since(start).Round(time.Millisecond))
			return
		}
		if time.Since(start) > 20*time.Second {
			t.Fatal("rules that were flushed stay away")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func percentiles(d []time.Duration) string {
	slices.Sort(d)
	at := func(p int) time.Duration { return d[min(len(d)-1, len(d)*p/100)].Round(10 * time.Microsecond) }
	return fmt.Sprintf("p50 %v p95 %v", at(50), at(95))
}
