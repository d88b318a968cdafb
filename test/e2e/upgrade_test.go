//go:build e2e

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// older makes what lies in prefix an installation of another version: programs, and the guest program of the bundle.
func older(t *testing.T, prefix, version string) {
	t.Helper()
	build := func(to, program string) {
		run(t, "go", "build", "-C", checkout, "-trimpath", "-ldflags", "-s -w -X git.thaloco.com/thaloco/banger/internal/version.release="+version, "-o", to, "./cmd/"+program)
	}
	t.Setenv("CGO_ENABLED", "0")
	for _, program := range []string{"banger", "bangerd"} {
		build(filepath.Join(prefix, "bin", program), program)
	}
	agent := filepath.Join(prefix, "lib/banger/banger-vsock-agent")
	build(agent, "banger-vsock-agent")
	content := must(os.ReadFile(agent))
	sum := sha256.Sum256(content)
	manifest := filepath.Join(prefix, "lib/banger/bundle.json")
	var bundle map[string]any
	if err := json.Unmarshal(must(os.ReadFile(manifest)), &bundle); err != nil {
		t.Fatal(err)
	}
	artifact := bundle["artifacts"].(map[string]any)["agent"].(map[string]any)
	artifact["sha256"], artifact["size"] = hex.EncodeToString(sum[:]), len(content)
	if err := os.WriteFile(manifest, must(json.Marshal(bundle)), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestUpgrade puts a newer banger over an older one while a VM runs, as docs/daemon.md says: nothing happens to it before the
// daemon is restarted, it runs on over that, and its agent is the new one after its own restart.
func TestUpgrade(t *testing.T) {
	slow(t)
	h := newHost(t)
	prefix := filepath.Join(filepath.Dir(h.state), "prefix")
	install := func() { run(t, "make", "-C", checkout, "-o", "build", "install", "PREFIX="+prefix) }
	install()
	const version = "v0.0.1-older"
	older(t, prefix, version)
	h.program = filepath.Join(prefix, "bin/banger")
	h.env = slices.DeleteFunc(h.env, func(kv string) bool { return strings.HasPrefix(kv, "BANGER_RUNTIME_DIR=") })

	h.create("kept")
	h.in("kept", "echo written >/root/file; cat /proc/sys/kernel/random/boot_id >/root/boot; setsid sleep 1000000 </dev/null >/dev/null 2>&1 &")
	before := h.show("kept")
	type status struct {
		Version  string
		PID      int
		Warnings []string
	}
	// There may be other warnings: another daemon of this machine answers names.
	asksForRestart := func(s status) bool {
		return slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.Contains(w, "banger daemon restart") })
	}
	var s status
	h.json(&s, "daemon", "status")
	if s.Version != version || asksForRestart(s) {
		t.Fatalf("the older daemon says %+v", s)
	}
	old := s.PID

	install()
	// Programs are replaced; what runs does not notice, and the new command line works with the older daemon.
	s = status{}
	h.json(&s, "daemon", "status")
	if s.PID != old || s.Version != version || !asksForRestart(s) {
		t.Errorf("after the installation: %+v", s)
	}
	if got := h.in("kept", "cat /root/file"); got != "written" {
		t.Errorf("with the older daemon: %q", got)
	}

	if out := h.do("daemon", "restart"); !strings.Contains(out, "1 running") {
		t.Errorf("restart says %q", out)
	}
	s = status{}
	h.json(&s, "daemon", "status")
	if s.PID == old || s.Version == version || asksForRestart(s) {
		t.Errorf("after the restart: %+v", s)
	}
	after := h.show("kept")
	if after.PID != before.PID || after.State != "running" || after.ID != before.ID || !strings.Contains(after.Agent, "answers") {
		t.Errorf("the VM was %+v, and is %+v", before, after)
	}
	if got := h.in("kept", "cat /root/file; cmp /root/boot /proc/sys/kernel/random/boot_id && pgrep -xc sleep"); got != "written\n1" {
		t.Errorf("in the VM after the restart of the daemon: %q", got)
	}
	agents := func() (severity, fix string) {
		var findings []struct{ Code, Severity, Fix string }
		if err := json.Unmarshal([]byte(h.try("doctor", "--output", "json").stdout), &findings); err != nil {
			t.Fatal(err)
		}
		for _, f := range findings {
			if f.Code == "agents" {
				return f.Severity, f.Fix
			}
		}
		t.Fatalf("doctor says nothing of agents: %+v", findings)
		return "", ""
	}
	if severity, fix := agents(); severity != "warn" || fix != "banger vm restart kept" {
		t.Errorf("doctor on the older agent: %s, %q", severity, fix)
	}
	h.do("vm", "restart", "kept")
	if severity, _ := agents(); severity != "pass" {
		t.Errorf("doctor on the new agent: %s", severity)
	}
	if got := h.in("kept", "cat /root/file"); got != "written" {
		t.Errorf("after its restart: %q", got)
	}
	h.do("vm", "delete", "kept")
	h.do("daemon", "stop")
	h.program = filepath.Join(checkout, "banger") // for the end of the test
}
