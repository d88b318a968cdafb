//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/disk"
)

// TestLifeOfAVM is one VM from its making to its end. The parts build on each other: a boot under
// emulation is what costs here.
func TestLifeOfAVM(t *testing.T) {
	h := newHost(t)
	const name = "calm-otter"

	made := h.try("vm", "create", "--name", name, "--memory", "1G")
	if made.code != 0 {
		t.Fatal(made)
	}
	t.Logf("%s", made)
	if got, want := made.stdout, "banger vm ssh "+name+"\n"; got != want {
		t.Errorf("create printed %q, want %q", got, want)
	}
	if !strings.Contains(made.stderr, name+": booting ") {
		t.Error("create did not show that the guest boots")
	}
	for _, stage := range []string{"system disk", "work disk", "guest config", "vmm", "agent"} {
		if r := h.try("operation", "list", "-o", "json"); !strings.Contains(r.stdout, `"name": "`+stage+`"`) {
			t.Errorf("the create did not go through the stage %q: %s", stage, r)
		}
	}

	// The agent takes commands long before there are any services: the first one waits for them.
	if r := h.try("vm", "exec", name, "--", "systemctl", "is-active", "dbus.socket", "docker.socket"); r.stdout != "active\nactive\n" {
		t.Errorf("the first command: %s", r)
	}

	t.Run("enter", func(t *testing.T) {
		h := h.with(t)
		if got := h.in(name, "hostname; id -un; pwd; cat /proc/1/comm"); got != name+"\nroot\n/root\nsystemd" {
			t.Errorf("got %q", got)
		}
		h.until("all of userspace is up", bootTime, func() bool {
			return strings.HasPrefix(h.in(name, "systemctl is-system-running --wait || true"), "running")
		})
		if failed := h.in(name, "systemctl list-units --failed --no-legend --plain"); failed != "" {
			t.Errorf("failed units:\n%s", failed)
		}
		if got := h.in(name, "cat /sys/class/misc/hw_random/rng_current; head -c 64 /dev/hwrng | wc -c"); got != "virtio_rng.0\n64" {
			t.Errorf("the entropy device: %q", got)
		}
	})

	t.Run("exit codes", func(t *testing.T) {
		h := h.with(t)
		for _, code := range []int{0, 1, 42, 254} {
			if r := h.try("vm", "ssh", name, "--", "exit", strconv.Itoa(code)); r.code != code || r.stdout+r.stderr != "" {
				t.Errorf("%s\nwant exit code %d and no word", r, code)
			}
		}
		if r := h.try("vm", "ssh", name, "--", "kill -9 $$"); r.code != 255 && r.code != 137 {
			t.Errorf("%s\nwant the code of a killed command", r)
		}
		if r := h.try("vm", "ssh", name, "--", "echo out; echo err >&2; exit 3"); r.stdout != "out\n" || r.stderr != "err\n" || r.code != 3 {
			t.Errorf("%s", r)
		}
	})

	t.Run("binary data", func(t *testing.T) {
		h := h.with(t)
		const size = 20 << 20
		data := make([]byte, size)
		r := rand.NewChaCha8([32]byte{1})
		_, _ = r.Read(data)
		sum := fmt.Sprintf("%x", sha256.Sum256(data))
		in := h.tryInput(string(data), "vm", "ssh", name, "--", "tee /var/tmp/data | sha256sum")
		if in.code != 0 || !strings.HasPrefix(in.stdout, sum) {
			t.Errorf("what arrived in the guest has another checksum: %s, want %s", in, sum)
		}
		out := h.try("vm", "ssh", name, "--", "cat /var/tmp/data; rm /var/tmp/data")
		if out.code != 0 || !bytes.Equal([]byte(out.stdout), data) {
			t.Errorf("what came back from the guest differs: %d bytes of %d, exit code %d, %s", len(out.stdout), size, out.code, out.stderr)
		}
		t.Logf("20 MiB in %.1fs, out %.1fs", in.took.Seconds(), out.took.Seconds())
	})

	t.Run("kill -9 of the daemon", func(t *testing.T) {
		h := h.with(t)
		before, daemon := h.show(name), h.daemon()
		up := uptime(t, h, name)
		if err := syscall.Kill(daemon, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		gone(t, daemon)
		after := h.show(name)
		if after.State != "running" || after.PID != before.PID {
			t.Errorf("after the daemon was killed: %+v, before: %+v", after, before)
		}
		if again := uptime(t, h, name); again < up {
			t.Errorf("the guest is up for %.0fs, before it was %.0fs: it was restarted", again, up)
		}
		if h.daemon() == daemon {
			t.Error("the daemon is the one that was killed")
		}
	})

	t.Run("docker run of an imported image", func(t *testing.T) {
		h := h.with(t)
		got := h.in(name, `set -e
mkdir /var/tmp/tree && cd /var/tmp/tree
cp --parents -L /bin/bash /bin/cat /lib64/ld-linux-x86-64.so.2 $(ldd /bin/bash /bin/cat | sed -n 's/.*=> \([^ ]*\) .*/\1/p' | sort -u) .
tar c . | docker import --change 'CMD ["/bin/bash"]' - own/image:1 >/dev/null
docker run --rm own/image:1 /bin/bash -c 'echo "process $$"; cat /proc/1/comm; true'
docker run --rm -v /root:/data own/image:1 /bin/bash -c 'echo from the container > /data/left'
cat /root/left; docker info --format '{{.Driver}}'; docker image ls --format '{{.Repository}}'`)
		lines := strings.Split(got, "\n")
		if len(lines) != 5 || lines[0] != "process 1" || lines[1] != "bash" || lines[2] != "from the container" || lines[4] != "own/image" {
			t.Errorf("got %q", got)
		}
		if lines := strings.Join(lines, " "); !strings.Contains(lines, "overlay") {
			t.Errorf("docker's storage driver is not an overlay: %q", got)
		}
	})

	t.Run("files stay over stop and start", func(t *testing.T) {
		h := h.with(t)
		dirs := []string{"/root", "/", "/etc", "/var/lib/docker"}
		for _, dir := range dirs {
			h.in(name, fmt.Sprintf("echo synced > %s/synced && sync %[1]s/synced", dir))
		}
		h.in(name, "rm /etc/debian_version; mv /usr/share/doc /usr/share/papers") // of the shared base
		command := ""
		for _, dir := range dirs {
			command += fmt.Sprintf("echo just now > %s/fresh; ", dir)
		}
		h.in(name, command)
		h.do("vm", "stop", name)
		stopped := h.show(name)
		if stopped.State != "stopped" || stopped.Note != "" {
			t.Errorf("after stop: %+v", stopped)
		}
		if pids := h.machines(); len(pids) > 0 {
			t.Errorf("VMMs still run: %v", pids)
		}
		h.disksAreClean(stopped)
		if r := h.try("vm", "stop", name); r.code != 0 || !strings.Contains(r.stdout+r.stderr, "already stopped") {
			t.Errorf("%s", r)
		}
		h.refused(4, []string{"vm", "ssh", name}, "is stopped", "banger vm start "+name)
		h.do("vm", "start", name)
		for _, dir := range dirs {
			if got := h.in(name, fmt.Sprintf("cat %s/synced %[1]s/fresh", dir)); got != "synced\njust now" {
				t.Errorf("%s: %q", dir, got)
			}
		}
		if got := h.in(name, "ls /etc/debian_version 2>&1; ls -d /usr/share/papers /usr/share/doc 2>&1; true"); !strings.Contains(got, "'/etc/debian_version': No such file") ||
			!strings.Contains(got, "'/usr/share/doc': No such file") || !strings.Contains(got, "/usr/share/papers") {
			t.Errorf("what was removed and renamed: %q", got)
		}
		if got := h.in(name, "ls /var/lib/docker/image/overlay2/imagedb/content/sha256 | wc -l"); got == "0" {
			t.Error("docker has lost its image")
		}
		if r := h.try("vm", "start", name); r.code != 0 || !strings.Contains(r.stdout+r.stderr, "already running") {
			t.Errorf("%s", r)
		}
	})

	t.Run("the guest reboots", func(t *testing.T) {
		h := h.with(t)
		before := h.show(name)
		h.in(name, "echo before > /root/rebooted; cat /proc/sys/kernel/random/boot_id > /root/boot_id")
		h.try("vm", "ssh", name, "--", "systemctl reboot")
		h.until("it runs again", bootTime, func() bool {
			now := h.show(name)
			return now.State == "running" && now.PID != before.PID
		})
		if got := h.in(name, "cat /root/rebooted; cmp -s /root/boot_id /proc/sys/kernel/random/boot_id || echo another boot"); got != "before\nanother boot" {
			t.Errorf("got %q", got)
		}
	})

	t.Run("the guest powers itself off", func(t *testing.T) {
		h := h.with(t)
		h.try("vm", "ssh", name, "--", "echo last > /root/last; systemctl poweroff")
		h.until("it is stopped", bootTime, func() bool { return h.show(name).State == "stopped" })
		m := h.show(name)
		if !strings.Contains(m.Note, "powered itself off") {
			t.Errorf("note %q", m.Note)
		}
		h.disksAreClean(m)
	})

	t.Run("delete", func(t *testing.T) {
		h := h.with(t)
		dir := h.show(name).Directory
		h.do("vm", "delete", name)
		if found, _ := filepath.Glob(dir); len(found) > 0 {
			t.Errorf("%s is still there", dir)
		}
		h.refused(3, []string{"vm", "show", name}, "no such VM")
	})
}

// with is the host in a part of a test.
func (h *host) with(t *testing.T) *host {
	part := *h
	part.t = t
	return &part
}

// disksAreClean looks at the disks of a stopped VM: a filesystem that was not unmounted, or has errors,
// fails the test.
func (h *host) disksAreClean(m machine) {
	h.t.Helper()
	for _, name := range []string{"system.ext4", "work.ext4"} {
		state, err := disk.FilesystemState(filepath.Join(m.Directory, name))
		if err != nil || state != disk.Clean {
			h.t.Errorf("%s after the stop: %s, %v; want %s", name, state, err, disk.Clean)
		}
		check := command(context.Background(), "e2fsck", "-fn", filepath.Join(m.Directory, name))
		if out, err := check.CombinedOutput(); err != nil {
			h.t.Errorf("e2fsck of %s: %v\n%s", name, err, out)
		}
	}
}

func uptime(t *testing.T, h *host, name string) float64 {
	t.Helper()
	first, _, _ := strings.Cut(h.in(name, "cat /proc/uptime"), " ")
	seconds, err := strconv.ParseFloat(first, 64)
	if err != nil {
		t.Fatal(err)
	}
	return seconds
}
