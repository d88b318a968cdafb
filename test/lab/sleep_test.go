//go:build e2e

package lab

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestHostSleep sends the host to sleep (ACPI S3, until an alarm of its clock) under a running VM. The VM and what was open in it go on, and its
// clock is right again within seconds.
func TestHostSleep(t *testing.T) {
	slow(t)
	alongside(t)
	m := boot(t, Options{})
	p := person{t, m, "user"}
	p.do("./banger vm create --name sleeper --vcpu 1 --memory 512M")
	p.wantDriver("sleeper")
	before := p.show("sleeper")
	// by how much the guest's clock is outside of the host's time before and after it was asked
	off := func() time.Duration {
		t.Helper()
		var from, guest, to float64
		out := p.do("from=$(date +%s.%N); guest=$(./banger vm exec sleeper -- date +%s.%N); echo $from $guest $(date +%s.%N)")
		if _, err := fmt.Sscan(out, &from, &guest, &to); err != nil {
			t.Fatalf("%q: %v", out, err)
		}
		return time.Duration(max(from-guest, guest-to, 0) * float64(time.Second))
	}
	t.Logf("before the sleep the guest's clock is off by %s", off())
	// A command that is open: what it reads comes after the sleep.
	p.do(`mkfifo /tmp/input && (sleep 1000 >/tmp/input & ./banger vm exec sleeper -- sh -c 'echo begun; read line; echo read $line' </tmp/input >/tmp/output 2>&1 &) >/dev/null 2>&1
until grep -q begun /tmp/output; do sleep 0.5; done`)

	const asleep = 40
	began := time.Now()
	out, err := m.Output(t.Context(), "root", fmt.Sprintf("rtcwake --mode mem --seconds %d && cat /sys/power/suspend_stats/success", asleep))
	words := strings.Fields(out)
	if err != nil || len(words) == 0 || words[len(words)-1] != "1" {
		t.Fatalf("the host did not sleep once: %q, %v", out, err)
	}
	woke := time.Now()
	t.Logf("%5.1fs  the host goes to sleep and wakes", woke.Sub(began).Seconds())
	for {
		d := off()
		if took := time.Since(woke); d < 2*time.Second {
			t.Logf("%5.1fs  after it the guest's clock is off by %s", took.Seconds(), d)
			break
		} else if took > time.Minute {
			t.Fatalf("a minute after the sleep the guest's clock is off by %s", d)
		}
	}
	if after := p.show("sleeper"); after.State != "running" || after.PID != before.PID {
		t.Errorf("after the sleep: %+v, before: %+v", after, before)
	}
	if out := p.do(`echo hello >/tmp/input; until grep -q read /tmp/output; do sleep 0.5; done; cat /tmp/output`); out != "begun\nread hello\n" {
		t.Errorf("a command that was open says %q", out)
	}
	if log := p.do("grep -c 'clock jumped' ~/.local/state/banger/bangerd.log"); strings.TrimSpace(log) == "0" {
		t.Error("the daemon did not notice")
	}
	p.do("./banger vm stop sleeper")
	p.disksAreClean("sleeper")
	p.leave()
}
