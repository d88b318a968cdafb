//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// pluginRepository is a git repository with what a plugin of tmux is, as far as it is seen here.
func pluginRepository(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tmux-"+name)
	run(t, "git", "init", "--quiet", dir)
	text := fmt.Sprintf("#!/usr/bin/env bash\ntmux set-environment -g LOADED_%s yes\n", strings.ToUpper(name))
	if err := os.WriteFile(filepath.Join(dir, name+".tmux"), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "git", "-C", dir, "add", ".")
	run(t, "git", "-C", dir, "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false", "commit", "--quiet", "-m", "one")
	return dir
}

// buildTime bounds a build, in which an emulated guest is given some hundred MiB.
const buildTime = 15 * time.Minute

// tryFor is try for what takes longer than a boot.
func (h *host) tryFor(bound time.Duration, args ...string) result {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	defer cancel()
	cmd := h.command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	r := result{"banger " + strings.Join(args, " "), stdout.String(), stderr.String(), cmd.ProcessState.ExitCode(), time.Since(start)}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		h.t.Fatalf("%s: %v", r, errors.Join(err, ctx.Err()))
	}
	return r
}

// TestImageBuild builds an image with Docker and a script, looks at what it leaves on the host, and at what is in a VM of it.
// mise and opencode are the real ones, of the npm registry, and packages are Debian's; the plugins of tmux are the test's.
func TestImageBuild(t *testing.T) {
	slow(t)
	h := newHost(t, fmt.Sprintf("tmux_resurrect_source = %q", pluginRepository(t, "resurrect")), fmt.Sprintf("tmux_continuum_source = %q", pluginRepository(t, "continuum")))
	script := filepath.Join(t.TempDir(), "setup.sh")
	if err := os.WriteFile(script, []byte("set -e\necho hello from the script\nid -u > /opt/by-script\necho seeded > /root/seeded\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	// Two packages that the base has not: apt fetches them from Debian's archive, over the builder's own network.
	built := h.tryFor(buildTime, "image", "build", "--name", "docker-dev", "--docker", "--packages", "tree,jq,libpq5", "--script", script)
	t.Logf("%s", built)
	if built.code != 0 || built.stdout != "docker-dev: built\n" || !strings.Contains(built.stderr, "\nhello from the script\n") ||
		!strings.Contains(built.stderr, "installing tree libpq5\n") {
		t.Fatalf("%s", built)
	}
	t.Logf("built in %s", built.took.Round(time.Second))
	if left := h.list(); len(left) != 0 {
		t.Errorf("VMs are left: %+v", left)
	}
	logs, err := filepath.Glob(filepath.Join(h.state, "image-build", "*-docker-dev-*.log"))
	if err != nil || len(logs) != 1 {
		t.Errorf("logs: %v, %v", logs, err)
	}
	var img struct {
		Base      string `json:"base"`
		WorkSeed  string `json:"work_seed"`
		Allocated int64  `json:"base_allocated_bytes"`
		Size      int64  `json:"size_bytes"`
	}
	h.json(&img, "image", "show", "docker-dev")
	for _, id := range []string{img.Base, img.WorkSeed} {
		run(t, "e2fsck", "-fn", filepath.Join(h.state, "images", id))
	}
	if img.Allocated > img.Size/2 {
		t.Errorf("the root filesystem takes %d bytes of the host, of %d", img.Allocated, img.Size)
	}
	// What is in the image has nothing of the machine that it was built in.
	for _, path := range []string{"/etc/ssh/ssh_host_ed25519_key", "/etc/ssh/banger_authorized_keys"} {
		if out := run(t, "debugfs", "-R", "stat "+path, filepath.Join(h.state, "images", img.Base)); strings.Contains(out, "Inode:") {
			t.Errorf("the image has %s", path)
		}
	}

	h.create("dd", "--image", "docker-dev", "--memory", "1G")
	for command, want := range map[string]string{
		"cat /opt/by-script /root/seeded": "0\nseeded",
		"tree -i --noreport /opt | grep script; dpkg-query -W -f '${Status}\n' libpq5; find /var/lib/apt/lists /var/cache/apt/archives -name '*.deb' -o -name '*Packages*'": "by-script\ninstall ok installed",
		"bash -lc 'type -P mise; type -t mise'":           "/usr/local/bin/mise\nfunction",
		"bash -ic 'type -t mise' 2>/dev/null":             "function",
		"bash -lc 'mise which opencode'":                  "/usr/local/share/mise/installs/opencode/1.18.33/opencode",
		"readlink -f /usr/local/bin/opencode":             "/usr/local/share/mise/installs/opencode/1.18.33/opencode",
		"systemctl is-enabled docker.socket":              "enabled",
		"stat -c '%a %U' /root":                           "700 root",
		"findmnt -no FSTYPE /; findmnt -no FSTYPE /root":  "overlay\next4",
		"grep -c continuum-restore..off /root/.tmux.conf": "1",
		"tmux new-session -d -s s && sleep 2 && tmux show-environment -g LOADED_RESURRECT && tmux show-environment -g LOADED_CONTINUUM": "LOADED_RESURRECT=yes\nLOADED_CONTINUUM=yes",
	} {
		if got := h.in("dd", command); got != want {
			t.Errorf("%s: %q, want %q", command, got, want)
		}
	}
	got := h.in("dd", `set -e
tar -C "$(dirname "$(readlink -f /sbin/ldconfig)")" -c ldconfig | docker import - own/image:1 >/dev/null
docker run --rm own/image:1 /ldconfig --version | head -n 1`)
	if !strings.HasPrefix(got, "ldconfig (") {
		t.Errorf("docker run: %q", got)
	}
	h.refused(4, []string{"image", "delete", "docker-dev"}, "in use by dd")
}

func shellScript(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	write(t, path, "#!/bin/sh\n"+text+"\n")
	return path
}

// toolsOfFiles are settings by which all tools of a build lie on this machine.
func toolsOfFiles(t *testing.T, dir string) []string {
	t.Helper()
	return []string{
		fmt.Sprintf("mise_source = %q", shellScript(t, dir, "mise", "echo mise of a file")),
		fmt.Sprintf("opencode_source = %q", shellScript(t, dir, "opencode", "echo opencode of a file")),
		fmt.Sprintf("tmux_resurrect_source = %q", pluginRepository(t, "resurrect")),
		fmt.Sprintf("tmux_continuum_source = %q", pluginRepository(t, "continuum")),
	}
}

// TestImageBuildOfFiles builds an image of what lies on this machine alone, which takes no network: so it runs in the lab as well, where
// Firecracker runs the builder. A VM of it has what was built, in its root and in its work disk.
func TestImageBuildOfFiles(t *testing.T) {
	slow(t)
	dir := t.TempDir()
	script := func(name, text string) string { return shellScript(t, dir, name, text) }
	h := newHost(t, toolsOfFiles(t, dir)...)
	good := script("good", "set -e\nid -u > /opt/by-script\necho seeded > /root/seeded")
	bad := script("bad", "echo about to fail >&2\nexit 7")

	r := h.tryFor(buildTime, "image", "build", "--name", "files", "--script", bad)
	if r.code == 0 || !strings.Contains(r.stderr, "about to fail") || !strings.Contains(r.stderr, "exit code 7") {
		t.Errorf("a script that fails: %s", r)
	}
	h.refused(3, []string{"image", "show", "files"}, "files")
	if left := h.list(); len(left) != 0 {
		t.Errorf("VMs are left: %+v", left)
	}

	if r := h.tryFor(buildTime, "image", "build", "--name", "files", "--script", good); r.code != 0 || r.stdout != "files: built\n" {
		t.Fatalf("%s", r)
	}
	if left := h.list(); len(left) != 0 {
		t.Errorf("VMs are left: %+v", left)
	}
	var img struct {
		Base     string `json:"base"`
		WorkSeed string `json:"work_seed"`
	}
	h.json(&img, "image", "show", "files")
	for _, id := range []string{img.Base, img.WorkSeed} {
		run(t, "e2fsck", "-fn", filepath.Join(h.state, "images", id))
	}
	h.create("of-files", "--image", "files")
	const want = "0\nseeded\nmise of a file\nopencode of a file\ncontinuum.tmux\nresurrect.tmux"
	if got := h.sh("of-files", "cd /root/.tmux/plugins; cat /opt/by-script /root/seeded; /usr/local/bin/mise; /usr/local/bin/opencode; basename -a tmux-*/*.tmux"); got != want {
		t.Errorf("it has %q, want %q", got, want)
	}
	h.do("vm", "delete", "of-files")
	h.do("image", "delete", "files")
}

// TestImageBuildOfSteps builds an image of a file of several steps. Before that the last of them fails, and the VM is kept as it was asked for; then
// it takes long, and Ctrl-C ends the build, of which nothing is left but the log.
func TestImageBuildOfSteps(t *testing.T) {
	slow(t)
	dir := t.TempDir()
	h := newHost(t, toolsOfFiles(t, dir)...)
	steps := filepath.Join(dir, "steps.toml")
	write(t, steps, "[[step]]\nname = \"note\"\nrun = \"echo by a line >/opt/note\"\n\n[[step]]\nscript = \"setup.sh\"\n")
	build := []string{"image", "build", "--name", "steps", "--file", steps, "--size", "6G"}
	logs := func(want int) {
		t.Helper()
		if logs := must(filepath.Glob(filepath.Join(h.state, "image-build", "*-steps-*.log"))); len(logs) != want {
			t.Errorf("the logs are %v, want %d", logs, want)
		}
	}

	shellScript(t, dir, "setup.sh", "exit 7")
	r := h.tryFor(buildTime, append(build, "--keep-on-failure")...)
	all := h.list()
	if r.code != 1 || len(all) != 1 || !strings.Contains(r.stderr, "banger vm exec "+all[0].Name+" -- bash") {
		t.Fatalf("%s\nVMs: %+v", r, all)
	}
	if got := h.sh(all[0].Name, "cat /opt/note"); got != "by a line" {
		t.Errorf("the VM that was kept has %q", got)
	}
	h.do("vm", "delete", all[0].Name)
	logs(1)

	shellScript(t, dir, "setup.sh", "echo it takes long; sleep 1000")
	ctx, cancel := context.WithTimeout(t.Context(), buildTime)
	defer cancel()
	cmd := h.command(ctx, build...)
	lines := bufio.NewScanner(must(cmd.StderrPipe()))
	must(0, cmd.Start())
	var said []string
	for lines.Scan() {
		if said = append(said, lines.Text()); lines.Text() == "it takes long" {
			must(0, cmd.Process.Signal(syscall.SIGINT))
		}
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 130 {
		t.Errorf("after Ctrl-C it ended with %v, and said\n%s", err, strings.Join(said, "\n"))
	}
	if left := h.list(); len(left) != 0 {
		t.Errorf("VMs are left: %+v", left)
	}
	if left := names(filepath.Join(h.state, "vms")); len(left) != 0 {
		t.Errorf("disks are left: %v", left)
	}
	h.refused(3, []string{"image", "show", "steps"}, "steps")
	logs(2)

	shellScript(t, dir, "setup.sh", "echo by a script >>/opt/note")
	if r := h.tryFor(buildTime, build...); r.code != 0 || r.stdout != "steps: built\n" {
		t.Fatalf("%s", r)
	}
	var img struct {
		Size int64 `json:"size_bytes"`
	}
	if h.json(&img, "image", "show", "steps"); img.Size != 6<<30 {
		t.Errorf("the root filesystem has %d bytes", img.Size)
	}
	h.create("of-steps", "--image", "steps")
	if got := h.sh("of-steps", "cat /opt/note"); got != "by a line\nby a script" {
		t.Errorf("the image has %q", got)
	}
}

// TestImageBuildWithoutItsSources wants the setting named, and nothing left.
func TestImageBuildWithoutItsSources(t *testing.T) {
	slow(t)
	h := newHost(t, fmt.Sprintf("tmux_resurrect_source = %q", pluginRepository(t, "resurrect")), "tmux_continuum_source = \"/nowhere/at-all\"")
	h.refused(3, []string{"image", "build", "--name", "bad"}, "tmux_continuum_source", "/nowhere/at-all cannot be read")
	if left := h.list(); len(left) != 0 {
		t.Errorf("VMs are left: %+v", left)
	}
	if left, err := os.ReadDir(filepath.Join(h.state, "vms")); err == nil && len(left) != 0 {
		t.Errorf("disks are left: %v", left)
	}
}
