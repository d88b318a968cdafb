//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// timed is an output that remembers its longest silence.
type timed struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	last    time.Time
	silence time.Duration
	before  string // what was said last before the longest silence
}

func (w *timed) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if gap := time.Since(w.last); gap > w.silence {
		w.silence, w.before = gap, tail(w.buf.Bytes(), 1)
	}
	w.last = time.Now()
	return w.buf.Write(p)
}

// makeSandbox runs `make sandbox` in the checkout, as README says, on a terminal or not.
func makeSandbox(t *testing.T, h *host, terminal bool) (*timed, time.Duration) {
	t.Helper()
	args := []string{"make", "-C", checkout, "--no-print-directory", "sandbox"}
	if terminal { // util-linux's script(1) runs it on one of its own
		args = []string{"script", "--quiet", "--return", "--command", strings.Join(args, " "), "/dev/null"}
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(slices.Clone(h.env), "TERM=xterm")
	out := &timed{last: time.Now()}
	cmd.Stdout, cmd.Stderr = out, out
	start := time.Now()
	err := cmd.Run()
	took := time.Since(start)
	if err != nil {
		t.Fatalf("make sandbox: %v\n%s", err, out.buf.String())
	}
	return out, took
}

// TestReadme types README's first command, twice: on a terminal with no VM there, and without a
// terminal when there is one.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile(checkout + "/README.md")
	if err != nil || !bytes.Contains(readme, []byte("\n    make sandbox ")) {
		t.Fatalf("README does not say make sandbox any more: %v", err)
	}
	h := newHost(t)
	out, took := makeSandbox(t, h, true)
	text := out.buf.String()
	t.Logf("first: %.1fs, longest silence %.1fs after %q", took.Seconds(), out.silence.Seconds(), out.before)
	for _, want := range []string{"Debian GNU/Linux 13", "/dev/vdc", "./banger vm ssh sandbox", "./banger vm stop sandbox", "./banger vm list", "./banger vm delete sandbox"} {
		if !strings.Contains(text, want) {
			t.Errorf("it does not say %q:\n%s", want, text)
		}
	}
	// Two seconds are promised; the rest is for a machine that is too busy to draw.
	if out.silence > 4*time.Second {
		t.Errorf("silent for %v after %q", out.silence, out.before)
	}

	out, took = makeSandbox(t, h, false)
	text = out.buf.String()
	start := time.Now()
	h.in("sandbox", "true")
	ssh := time.Since(start)
	t.Logf("again: %.1fs, of which entering the VM takes %.1fs\n%s", took.Seconds(), ssh.Seconds(), text)
	if !strings.Contains(text, "already running") || !strings.Contains(text, "Debian GNU/Linux 13") {
		t.Errorf("the second run:\n%s", text)
	}
	for _, not := range []string{"building", "putting"} {
		if strings.Contains(text, not) {
			t.Errorf("the second run builds again:\n%s", text)
		}
	}
	h.do("vm", "stop", "sandbox")
	out, took = makeSandbox(t, h, false)
	t.Logf("from stopped: %.1fs", took.Seconds())
	if text := out.buf.String(); !strings.Contains(text, "sandbox: running") || !strings.Contains(text, "Debian GNU/Linux 13") {
		t.Errorf("the run after a stop:\n%s", text)
	}
	if got := len(h.list()); got != 1 {
		t.Errorf("there are %d VMs", got)
	}
}

// TestManyAtOnce lets ten commands race: one daemon, ten VMs.
func TestManyAtOnce(t *testing.T) {
	h := newHost(t)
	var all sync.WaitGroup
	for range 10 {
		all.Go(func() {
			if r := h.try("vm", "list"); r.code != 0 {
				t.Error(r)
			}
		})
	}
	all.Wait()
	daemons := 0
	for _, line := range h.processes() {
		if strings.Contains(line, "bangerd") {
			daemons++
		}
	}
	if daemons != 1 {
		t.Errorf("%d daemons run: %v", daemons, h.processes())
	}
	for i := range 10 {
		all.Go(func() {
			args := []string{"vm", "create", "--name", fmt.Sprintf("vm-%d", i), "--memory", "512M"}
			if i >= 2 { // two boot: two cores emulate them
				args = append(args, "--no-start")
			}
			if r := h.try(args...); r.code != 0 {
				t.Error(r)
			}
		})
	}
	all.Wait()
	running, stopped := 0, 0
	for _, m := range h.list() {
		switch m.State {
		case "running":
			running++
		case "stopped":
			stopped++
		}
	}
	if running != 2 || stopped != 8 {
		t.Errorf("%d run and %d are stopped, want 2 and 8\n%s", running, stopped, h.do("vm", "list"))
	}
	for i := range 2 {
		name := fmt.Sprintf("vm-%d", i)
		if got := h.in(name, "hostname"); got != name {
			t.Errorf("%s says it is %q", name, got)
		}
	}
	// One command for all of them, good and bad: each has its own result.
	args := []string{"vm", "delete"}
	for i := range 10 {
		args = append(args, fmt.Sprintf("vm-%d", i))
	}
	h.refused(3, append(args, "nobody"), "nobody: there is no such VM")
	if left := h.list(); len(left) != 0 {
		t.Errorf("%d VMs are left", len(left))
	}
}

// TestTwoInstallations runs a daemon each on two state directories, with VMs of the same name.
func TestTwoInstallations(t *testing.T) {
	one, two := newHost(t), newHost(t)
	one.create("twin", "--memory", "512M")
	two.create("twin", "--memory", "512M", "--no-start")
	before := one.show("twin")
	if other := two.show("twin"); other.ID == before.ID || other.State != "stopped" {
		t.Errorf("the other one is %+v", other)
	}
	// A daemon that starts sweeps what is left of its own installation, and nothing else.
	two.do("daemon", "stop")
	two.do("vm", "list")
	two.do("vm", "delete", "twin")
	two.refused(3, []string{"vm", "ssh", before.ID, "--", "true"}, "no such VM")
	one.do("daemon", "stop")
	if after := one.show("twin"); after.State != "running" || after.PID != before.PID {
		t.Errorf("the first one's VM was touched: %+v, before %+v", after, before)
	}
	if got := one.in("twin", "hostname"); got != "twin" {
		t.Errorf("it says it is %q", got)
	}
}
