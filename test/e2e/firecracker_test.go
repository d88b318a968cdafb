//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestBrokenFirecracker puts what cannot be used in Firecracker's place, and a real one that is killed at some of its first system calls.
// Creating says what is wrong and what to do, and leaves nothing that runs; with a good one the same VM starts.
func TestBrokenFirecracker(t *testing.T) {
	if !underFirecracker() {
		t.Skip("takes KVM and Firecracker: the lab runs it")
	}
	program := filepath.Join(t.TempDir(), "firecracker")
	good := bundleFile("firecracker")
	put := func(text string, mode os.FileMode) {
		t.Helper()
		next := program + ".new" // one that runs cannot be written to
		must(0, os.WriteFile(next, []byte(text), mode))
		must(0, os.Chmod(next, mode))
		must(0, os.Rename(next, program))
	}
	// A script has an interpreter, which a jail has not.
	h := newHost(t, fmt.Sprintf("firecracker_bin = %q", program), `jailer = "off"`)
	fails := func(t *testing.T, code int, args []string, words ...string) {
		t.Helper()
		h := h.with(t)
		t.Logf("%s", h.refused(code, args, append(words, "hint: ")...))
		if left := h.machines(); len(left) > 0 {
			t.Errorf("VMMs are left running: %v", left)
		}
		for _, dir := range []string{"run", "net"} { // of each VM, if it has one at all
			if left := must(filepath.Glob(filepath.Join(h.state, dir, "*/*"))); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		}
	}

	for _, c := range []struct {
		name  string
		put   func()
		code  int
		words []string
	}{
		{"missing", func() {}, 7, []string{program, "no such file"}},
		{"not executable", func() { put("#!/bin/sh\n", 0o644) }, 1, []string{program, "cannot be executed"}},
		{"not for this machine", func() { put("\x7fELF, of another machine", 0o755) }, 7, []string{program, "does not run"}},
		{"another program", func() { put("#!/bin/sh\necho hello\n", 0o755) }, 1, []string{program, "no Firecracker"}},
		{"too old", func() { put("#!/bin/sh\necho Firecracker v1.11.0\n", 0o755) }, 1, []string{"1.11.0", "1.12"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.put()
			fails(t, c.code, []string{"vm", "create", "--name", "broken"}, c.words...)
			h := h.with(t)
			if left := h.list(); len(left) > 0 {
				t.Errorf("a VM was made: %+v", left)
			}
			var findings []struct{ Code, Severity, Detail, Fix string }
			if err := json.Unmarshal([]byte(h.try("doctor", "--output", "json").stdout), &findings); err != nil {
				t.Fatal(err)
			}
			said := false
			for _, f := range findings {
				said = said || f.Code == "vmm" && f.Severity == "fail" && strings.Contains(f.Detail, c.words[len(c.words)-1]) && f.Fix != ""
			}
			if !said {
				t.Errorf("doctor says %+v", findings)
			}
		})
	}

	// strace(1) traces it from beside, so that what is killed is the daemon's own child. It counts the calls of each thread; which of
	// them does what is so in 1.12.1.
	dies := func(call, signal string, when int) {
		put(fmt.Sprintf("#!/bin/sh\n[ \"$1\" = --version ] && exec %[1]s --version\n"+
			"exec strace -D -qqq -f -o /dev/null -e trace=%[2]s -e inject=%[2]s:signal=%[3]s:when=%[4]d %[1]s \"$@\"\n", good, call, signal, when), 0o755)
	}
	put("#!/bin/sh\nexec "+good+" \"$@\"\n", 0o755)
	h.do("vm", "create", "--name", "broken", "--memory", "512M", "--no-start")
	for _, c := range []struct {
		name, call, signal string
		when               int
		words              string
	}{
		{"before it has an API", "bind", "KILL", 1, "Firecracker"},
		{"at the first connection", "accept4", "KILL", 1, "Firecracker"},
		{"at the vsock, with words of its own", "bind", "SEGV", 2, "intercepting signal 11"},
		{"when it asks for KVM's version", "ioctl", "KILL", 2, "Firecracker"},
		{"when it makes the machine", "ioctl", "KILL", 18, "Firecracker"},
		{"when it makes the guest's CPU", "clone", "ABRT", 2, "Firecracker"},
	} {
		t.Run("ends "+c.name, func(t *testing.T) {
			dies(c.call, c.signal, c.when)
			fails(t, 7, []string{"vm", "start", "broken"}, "broken: the VM could not be started", "before its guest ran", c.words)
			h := h.with(t)
			if m := h.show("broken"); m.State != "failed" || m.PID != 0 || m.Failure == nil || m.Failure.Step != "vmm" || m.Failure.Error.Hint == "" {
				t.Errorf("show says %+v", m)
			}
		})
	}
	must(0, os.Remove(program))
	must(0, os.Symlink(good, program))
	h.do("vm", "start", "broken")
	if got := h.in("broken", "hostname"); got != "broken" {
		t.Errorf("it says it is %q", got)
	}
}
