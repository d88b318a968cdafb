//go:build e2e

package e2e

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

// bundleFile is a file of the runtime bundle.
func bundleFile(name string) string { return filepath.Join(checkout, "runtime", name) }

// bundleCopy is a runtime bundle like the checkout's, in a checkout of its own as far as hints go.
type bundleCopy struct {
	t   *testing.T
	dir string
}

func newBundle(t *testing.T) bundleCopy {
	t.Helper()
	root, err := os.MkdirTemp("", "b")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	b := bundleCopy{t, filepath.Join(root, "runtime")}
	if err := os.Mkdir(b.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(checkout, "go.mod"), filepath.Join(root, "go.mod")); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(bundleFile("*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := os.Symlink(f, filepath.Join(b.dir, filepath.Base(f))); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// remove takes a file away; the checkout's stays.
func (b bundleCopy) remove(name string) {
	b.t.Helper()
	if err := os.Remove(filepath.Join(b.dir, name)); err != nil {
		b.t.Fatal(err)
	}
}

// replace puts another content in a file's place; the manifest goes on saying what was there.
func (b bundleCopy) replace(name string, content []byte) {
	b.t.Helper()
	b.remove(name)
	if err := os.WriteFile(filepath.Join(b.dir, name), content, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// forge replaces a file and has the manifest say so: a bundle that is whole, and no good.
func (b bundleCopy) forge(role, name string, content []byte) {
	b.t.Helper()
	b.replace(name, content)
	text, err := os.ReadFile(bundleFile("bundle.json"))
	if err != nil {
		b.t.Fatal(err)
	}
	var manifest map[string]any
	if err := json.Unmarshal(text, &manifest); err != nil {
		b.t.Fatal(err)
	}
	entry := manifest["artifacts"].(map[string]any)[role].(map[string]any)
	entry["size"], entry["sha256"] = len(content), fmt.Sprintf("%x", sha256.Sum256(content))
	if text, err = json.Marshal(manifest); err != nil {
		b.t.Fatal(err)
	}
	b.replace("bundle.json", text)
}

// damaged is the content of a file with a part of it overwritten.
func damaged(t *testing.T, path string, from, to int) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := from; i < min(to, len(content)); i++ {
		content[i] = 0xa5
	}
	return content
}

// static builds a program that needs nothing but a kernel.
func static(t *testing.T, source string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "program")
	// -trimpath as in the Makefile: the lab has the standard library built so.
	cmd := exec.Command("go", "build", "-trimpath", "-o", program, filepath.Join(dir, "main.go"))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return program
}

// TestUnbootable creates VMs that cannot boot. The error says why, soon, with what the console said;
// the VM is failed, nothing of it runs, and it can be deleted.
func TestUnbootable(t *testing.T) {
	const timeout = 20 * time.Second
	refused := "the VM could not be started"
	if underFirecracker() { // whose own words are the cause
		refused = "Invalid Elf magic number"
	}
	for _, c := range []struct {
		name  string
		harm  func(t *testing.T, b bundleCopy) (settings []string)
		bound time.Duration
		code  int
		words []string
		slow  bool
	}{
		{"no kernel at all", func(t *testing.T, b bundleCopy) []string {
			b.forge("kernel", "vmlinux", damaged(t, bundleFile("vmlinux"), 0, 1<<20))
			return nil
		}, callTime, 7, []string{"the VM could not be started", refused}, false},
		{"kernel that crashes at once", func(t *testing.T, b bundleCopy) []string {
			b.forge("kernel", "vmlinux", damaged(t, bundleFile("vmlinux"), 8<<20, 24<<20))
			return []string{fmt.Sprintf("boot_timeout = %q", timeout)}
		}, timeout + callTime, 0, []string{"the VM could not be started", "console"}, true},
		{"initrd", func(t *testing.T, b bundleCopy) []string {
			b.forge("initrd", "initrd.img", damaged(t, bundleFile("initrd.img"), 0, 1<<30))
			return nil
		}, callTime, 1, []string{"no initrd can be made"}, false},
		{"root filesystem", func(t *testing.T, b bundleCopy) []string {
			b.forge("rootfs", "rootfs-docker.ext4", damaged(t, bundleFile("rootfs-docker.work-seed.ext4"), 4096, 1<<30))
			return nil
		}, bootTime, 7, []string{"the guest could not boot: root: the ext4 filesystem on the base drive (/dev/vda) is damaged"}, false},
		{"agent that never answers", func(t *testing.T, b bundleCopy) []string {
			return []string{
				"vsock_agent_path = " + strconv.Quote(static(t, `package main

import ("fmt"; "os"; "time")

func main() {
	if f, err := os.OpenFile("/dev/console", os.O_WRONLY, 0); err == nil {
		fmt.Fprintln(f, "an init that only sleeps")
	}
	time.Sleep(time.Hour)
}
`)),
				fmt.Sprintf("boot_timeout = %q", timeout)}
		}, timeout + callTime, 6, []string{"did not answer within 20s", "console: an init that only sleeps"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.slow {
				slow(t)
			}
			b := newBundle(t)
			h := newHost(t, c.harm(t, b)...)
			h.setenv("BANGER_RUNTIME_DIR", b.dir)
			r := h.try("vm", "create", "--name", "broken", "--memory", "512M")
			t.Logf("%s", r)
			if r.code == 0 || c.code != 0 && r.code != c.code || r.took > c.bound {
				t.Errorf("exit code %d after %v; want %d within %v", r.code, r.took, c.code, c.bound)
			}
			for _, w := range append(c.words, "hint: ") {
				if !strings.Contains(r.stderr, w) {
					t.Errorf("the error does not say %q", w)
				}
			}
			for _, noise := range []string{"context ", "agent.sock", "i/o timeout"} {
				if strings.Contains(r.stderr, noise) {
					t.Errorf("the error has %q in it, which tells a user nothing", noise)
				}
			}
			if pids := h.machines(); len(pids) > 0 {
				t.Errorf("VMMs are left running: %v", pids)
			}
			if len(h.list()) == 0 {
				return // refused before anything was made
			}
			if m := h.show("broken"); m.State != "failed" || m.Failure == nil || m.Failure.Error.Hint == "" {
				t.Errorf("show says %+v", m)
			}
			h.refused(4, []string{"vm", "ssh", "broken"}, "its last start failed", "banger vm start broken")
			h.do("vm", "delete", "broken")
		})
	}
}

// TestBrokenBundle damages a bundle in the ways that accidents do. Creating says what is wrong and
// what to type, and makes nothing.
func TestBrokenBundle(t *testing.T) {
	for _, c := range []struct {
		name string
		harm func(t *testing.T, b bundleCopy)
		says string
	}{
		{"missing", func(_ *testing.T, b bundleCopy) { b.remove("vmlinux") }, "vmlinux: is missing"},
		{"cut short", func(_ *testing.T, b bundleCopy) { b.replace("initrd.img", []byte("cut")) }, "initrd.img: is damaged"},
		{"a bit has tipped over", func(t *testing.T, b bundleCopy) {
			b.replace("vmlinux", damaged(t, bundleFile("vmlinux"), 1<<20, 1<<20+1))
		}, "vmlinux"},
		{"no manifest", func(_ *testing.T, b bundleCopy) { b.remove("bundle.json") }, "no runtime bundle"},
		{"a manifest of the future", func(_ *testing.T, b bundleCopy) { b.replace("bundle.json", []byte(`{"format": 99}`)) }, "format"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBundle(t)
			c.harm(t, b)
			h := newHost(t)
			h.forget() // or the damage is in what it need not read
			h.setenv("BANGER_RUNTIME_DIR", b.dir)
			r := h.try("vm", "create", "--name", "broken")
			t.Logf("%s", r)
			if r.code == 0 || !strings.Contains(r.stderr, c.says) || !strings.Contains(r.stderr, "hint: ") {
				t.Errorf("%s\ndoes not say %q with a hint", r, c.says)
			}
			if left := h.list(); len(left) > 0 {
				t.Errorf("a VM was made: %+v", left)
			}
		})
	}
}

// TestConfiguredArtifacts boots what the settings name instead of what is in the bundle: another
// kernel file, a tree of modules, an initrd that somebody else made, and a guest program.
func TestConfiguredArtifacts(t *testing.T) {
	slow(t)
	dir, err := os.MkdirTemp("", "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	kernel := filepath.Join(dir, "vmlinux-own")
	run(t, "cp", bundleFile("vmlinux"), kernel)
	// The tree of modules is what the bundle's image holds, under its version's name.
	var manifest struct {
		KernelVersion string `json:"kernel_version"`
	}
	text, err := os.ReadFile(bundleFile("bundle.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &manifest); err != nil {
		t.Fatal(err)
	}
	version := manifest.KernelVersion
	modules := filepath.Join(dir, version)
	if err := os.Mkdir(modules, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "debugfs", "-R", "rdump / "+modules, bundleFile("modules.ext4"))
	// A root filesystem without a work seed, whose /root has something.
	rootfs, note := filepath.Join(dir, "rootfs.ext4"), filepath.Join(dir, "note")
	withHome := func(t *testing.T) {
		if underFirecracker() {
			t.Skip("the lab's disk takes minutes for a copy of a root filesystem; what copies /root is the same guest program")
		}
		run(t, "cp", "--sparse=always", bundleFile("rootfs-docker.ext4"), rootfs)
		write(t, note, "of the image\n")
		write(t, filepath.Join(dir, "commands"), "cd /root\nwrite "+note+" note\n")
		run(t, "debugfs", "-w", "-f", filepath.Join(dir, "commands"), rootfs)
	}
	agent := filepath.Join(dir, "agent-own")
	run(t, "env", "CGO_ENABLED=0", "go", "build", "-C", checkout, "-o", agent,
		"-ldflags", "-X git.thaloco.com/thaloco/banger/internal/version.release=own-agent", "./cmd/banger-vsock-agent")

	for _, c := range []struct {
		name     string
		prepare  func(*testing.T) // nil: nothing
		settings []string
		look     string // in the guest
		want     string
	}{
		{"default_kernel and default_modules_dir", nil, []string{
			"default_kernel = " + strconv.Quote(kernel), "default_modules_dir = " + strconv.Quote(modules),
		}, "uname -r; modprobe dummy && lsmod | grep -c '^dummy '", version + "\n1"},
		{"default_rootfs", withHome, []string{"default_rootfs = " + strconv.Quote(rootfs)}, "cat note; stat -c '%U %a' . note; ls -A | grep -c banger-seed || true", "of the image\nroot 700\nroot 644\n0"},
		{"default_initrd", nil, []string{"default_initrd = " + strconv.Quote(bundleFile("initrd.img"))}, "hostname", "own"},
		{"vsock_agent_path", nil, []string{"vsock_agent_path = " + strconv.Quote(agent)},
			"grep -qsa own-agent /proc/[0-9]*/exe && echo the own agent runs", "the own agent runs"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.prepare != nil {
				c.prepare(t)
			}
			h := newHost(t, c.settings...)
			h.create("own", "--memory", "512M")
			if got := h.in("own", c.look); got != c.want {
				t.Errorf("the guest says %q, want %q", got, c.want)
			}
			h.do("vm", "stop", "own")
			h.disksAreClean(h.show("own"))
		})
	}
}

// TestBootsUnderLoad starts a VM many times in a row while every CPU is busy with something else: no
// boot may fail. `make test-boots N=20` runs it.
func TestBootsUnderLoad(t *testing.T) {
	boots, err := strconv.Atoi(os.Getenv("BANGER_E2E_BOOTS"))
	if err != nil {
		t.Skip("takes many boots: make test-boots N=20 runs it")
	}
	h := newHost(t)
	h.do("vm", "create", "--name", "busy", "--no-start")
	stop := make(chan struct{})
	defer close(stop)
	for range runtime.NumCPU() {
		load := exec.Command("sh", "-c", "while :; do :; done")
		if err := load.Start(); err != nil {
			t.Fatal(err)
		}
		go func() {
			<-stop
			_ = load.Process.Kill()
		}()
		t.Cleanup(func() { _ = load.Wait() })
	}
	for i := 1; i <= boots; i++ {
		t.Run(fmt.Sprintf("boot %d", i), func(t *testing.T) {
			h := h.with(t)
			if h.show("busy").State == "running" { // it could not be stopped, and a start would boot nothing
				h.do("vm", "kill", "busy")
			}
			start := time.Now()
			r := h.try("vm", "start", "busy")
			agent := time.Since(start)
			if r.code != 0 {
				t.Fatal(r)
			}
			in := h.try("vm", "ssh", "busy", "--", "cut -d ' ' -f 1-3 /proc/loadavg")
			entered := time.Since(start)
			if in.code != 0 {
				t.Error(in)
			}
			var stages []string
			for _, s := range h.show("busy").Boot {
				stages = append(stages, fmt.Sprintf("%s %.1f", s.Name, s.AtMS/1000))
			}
			load, _ := os.ReadFile("/proc/loadavg")
			t.Logf("agent %.1fs, entered %.1fs; in the guest: %s; load %s", agent.Seconds(), entered.Seconds(),
				strings.Join(stages, ", "), strings.Fields(string(load))[0])
			if r := h.try("vm", "stop", "busy"); r.code != 0 {
				t.Error(r)
			}
			h.disksAreClean(h.show("busy"))
		})
	}
}
