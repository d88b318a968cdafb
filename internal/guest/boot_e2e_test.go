//go:build e2e

package guest_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// overlayScript fails where an overlay with the kernel's default options, or a plain one, differs
// from one filesystem.
const overlayScript = `
python3 - <<'EOF'
import os, glob
# A directory of the base is renamed, not copied: EXDEV without redirect_dir.
os.rename("/etc/systemd", "/etc/systemd.moved")
assert os.path.exists("/etc/systemd.moved/system.conf") or os.listdir("/etc/systemd.moved")
os.rename("/etc/systemd.moved", "/etc/systemd")
# Hard links of the base stay one file when one of them is written: needs index.
links = {}
for p in glob.glob("/usr/bin/*"):
    st = os.lstat(p)
    if st.st_nlink > 1 and not os.path.islink(p):
        links.setdefault(st.st_ino, []).append(p)
pair = next(v for v in links.values() if len(v) > 1)
before = os.stat(pair[0])
with open(pair[0], "ab") as f: f.write(b"#")
a, b = os.stat(pair[0]), os.stat(pair[1])
assert a.st_size == b.st_size == before.st_size + 1, (pair, a, b)
assert a.st_ino == b.st_ino == before.st_ino, "an inode number changed by copy-up"
# All of the root is one device to programs that compare st_dev (xino).
assert os.stat("/etc/hostname").st_dev == os.stat("/usr/bin").st_dev == os.stat("/").st_dev
EOF
`

const nativeScript = `
for d in /var/lib/docker /var/lib/containerd /var/lib/dpkg; do test "$(findmnt -no FSTYPE $d)" = ext4; done
list() { (cd $1; find . -printf '%P %y %m %U %G %T@ %l\n' | grep -v ' d ' | sort); }
list /run/banger/base/var/lib/dpkg > /tmp/a; list /var/lib/dpkg > /tmp/b; test $(wc -l < /tmp/a) -gt 100; cmp /tmp/a /tmp/b
cmp /var/lib/dpkg/status /run/banger/base/var/lib/dpkg/status
test "$(stat -c '%a %U' /run/banger/state.json)" = "600 root"; test "$(stat -c %a /run/banger)" = 700
test "$(hostname)" = calm-otter.vm; test "$(cat /etc/machine-id)" = 0123456789abcdef0123456789abcdef
grep -qx BANGER_E2E=1 /etc/environment
modprobe dummy; lsmod | grep -q dummy
`

// TestGuest boots the bundle's image three times and stops it in three ways.
func TestGuest(t *testing.T) {
	m := newMachine(t, artifact(t, "rootfs-docker.ext4"))
	t.Run("first boot", func(t *testing.T) {
		g := m.start(t)
		if _, err := agent.Open(t.Context(), g.link, "another secret, as long as that"); !fault.Is(err, fault.Permission) {
			t.Errorf("with a wrong secret: %v, want a permission fault", err)
		}
		s := g.open()
		g.boot(s)
		h := g.health(s)
		t.Logf("agent RSS %.1f MiB, userspace %s, failed %v", float64(h.AgentRssBytes)/(1<<20), h.Userspace, h.FailedUnits)
		if h.Userspace != "running" || h.AgentVersion != "e2e" {
			t.Errorf("health: %v", h)
		}
		g.shell(s, m, overlayScript+nativeScript+"echo persists > /root/file; echo persists > /etc/file; echo persists > /var/lib/docker/file")

		t.Run("idle agent costs nothing", func(t *testing.T) {
			t.Log(g.shell(s, m, `
pid=$(pgrep -f ^banger-vsock-agent)
ticks() { awk '{print $14+$15}' /proc/$pid/stat; }
sleep 3 # this session's own beginning goes through the agent
before=$(ticks); sleep 10; spent=$(($(ticks)-before))
echo $spent ticks of 10 ms in 10 s; test $spent -le 2
grep -E 'Rss|Threads' /proc/$pid/status /proc/$(pgrep -f ^banger-supervisor)/status
grep -E '^(Rss|Pss):' /proc/$pid/smaps_rollup
test $(awk '/^Rss:/{print $2}' /proc/$pid/smaps_rollup) -lt 12288`))
		})

		t.Run("health calls", func(t *testing.T) {
			took := make([]time.Duration, 200)
			for i := range took {
				began := time.Now()
				g.health(s)
				took[i] = time.Since(began)
			}
			slices.Sort(took)
			t.Logf("a health call takes %v p50, %v p95, %v at most", took[len(took)/2], took[len(took)*95/100], took[len(took)-1])
		})

		t.Run("a hundred calls at once", func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			began := time.Now()
			var all sync.WaitGroup
			for range 100 {
				all.Go(func() {
					if r, err := s.Client().Stats(ctx, &agentv1.StatsRequest{}); err != nil || r.GetUptimeMs() == 0 {
						t.Errorf("%v, %v", r, err)
					}
				})
			}
			all.Wait()
			t.Logf("a hundred answers after %s", time.Since(began))
			t.Log(g.shell(s, m, "grep Rss: /proc/$(pgrep -f ^banger-vsock-agent)/smaps_rollup"))
		})

		t.Run("grow while running", func(t *testing.T) {
			for _, drive := range []string{"system", "work"} {
				g.qmp("block_resize", map[string]any{"device": drive, "size": 1 << 30})
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			r, err := s.Client().GrowFilesystems(ctx, &agentv1.GrowFilesystemsRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Grown) != 2 || r.Grown[0].AfterBytes != 1<<30 || r.Grown[1].AfterBytes != 1<<30 {
				t.Errorf("grown: %v", r.Grown)
			}
			g.shell(s, m, "test $(df --output=size -B1M /root | tail -1) -gt 900; test $(df --output=size -B1M / | tail -1) -gt 900")
		})

		t.Run("killed agent comes back", func(t *testing.T) {
			g.shell(s, m, "pid=$(pgrep -f ^banger-vsock-agent); test \"$(cat /proc/$pid/oom_score_adj)\" = -1000; (sleep 1; kill -9 $pid) >/dev/null 2>&1 &")
			select {
			case <-s.Done():
			case <-time.After(30 * time.Second):
				t.Fatal("the session outlived the agent")
			}
			s = g.open()
			if h := g.health(s); h.Restarts != 1 {
				t.Errorf("restarts: %d, want 1", h.Restarts)
			}
		})

		t.Run("20 hard cuts", func(t *testing.T) {
			g.shell(s, m, `systemd-run -q --unit=zeros python3 -c '
import socket, threading
def serve(c):
    try:
        while True: c.sendall(bytes(65536))
    except OSError: pass
l = socket.create_server(("127.0.0.1", 9000))
while True: threading.Thread(target=serve, args=(l.accept()[0],)).start()'`)
			s.Close()
			var wire net.Conn
			link := vmm.Link{Mux: true, Dial: func(ctx context.Context) (_ net.Conn, err error) {
				wire, err = g.link.Dial(ctx)
				return wire, err
			}}
			for i := range 20 {
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				began := time.Now()
				cut, err := agent.Open(ctx, link, secret)
				if err != nil {
					t.Fatalf("after %d cuts: %v", i, err)
				}
				if took := time.Since(began); took > 2*time.Second {
					t.Logf("cut %d: the session took %s", i, took)
				}
				conn, err := cut.DialTCP(ctx, 9000, true)
				if err != nil {
					t.Fatalf("after %d cuts: %v", i, err)
				}
				if _, err := io.CopyN(io.Discard, conn, int64(100_000+i*7919)); err != nil {
					t.Fatal(err)
				}
				wire.Close() // in the middle of a frame, with more on the way
				<-cut.Done()
				cut.Close()
				cancel()
			}
			s = g.open()
			g.shell(s, m, "systemctl stop zeros")
		})

		g.shutdown(s, false)
		g.gone(stopTime)
		clean(t, m.drives[vmm.RoleSystem])
		clean(t, m.drives[vmm.RoleWork])
		if strings.Contains(string(g.log()), "Failed unmounting") {
			t.Errorf("systemd pulled at our mounts:\n%s", g.log())
		}
	})
	t.Run("second boot", func(t *testing.T) {
		for _, role := range []vmm.Role{vmm.RoleSystem, vmm.RoleWork} {
			if err := os.Truncate(m.drives[role], 3<<29); err != nil {
				t.Fatal(err)
			}
		}
		g := m.start(t)
		s := g.open()
		g.boot(s)
		g.shell(s, m, "grep -q persists /root/file; grep -q persists /etc/file; grep -q persists /var/lib/docker/file")
		g.shell(s, m, "test $(df --output=size -B1M /root | tail -1) -gt 1400; test $(df --output=size -B1M / | tail -1) -gt 1400")
		g.shell(s, m, "systemctl --no-block poweroff")
		g.gone(stopTime)
		clean(t, m.drives[vmm.RoleSystem])
		clean(t, m.drives[vmm.RoleWork])
	})
	t.Run("third boot", func(t *testing.T) {
		g := m.start(t)
		s := g.open()
		g.boot(s)
		g.shutdown(s, true) // -no-reboot: a reset ends QEMU
		g.gone(stopTime)
		clean(t, m.drives[vmm.RoleSystem])
		clean(t, m.drives[vmm.RoleWork])
	})
}

// tinyInit is an init that is not systemd: it holds a file open for writing and reaps.
const tinyInit = `package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	f, err := os.Create("/var/held")
	if err != nil {
		panic(err)
	}
	f.WriteString("held open")
	children := make(chan os.Signal, 8)
	signal.Notify(children, syscall.SIGCHLD)
	for range children {
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}
`

// tinyTree makes a root filesystem's content with tinyInit as /sbin/init.
func tinyTree(t *testing.T) string {
	t.Helper()
	tree := t.TempDir()
	for _, dir := range []string{"sbin", "etc", "usr/lib", "var"} {
		if err := os.MkdirAll(filepath.Join(tree, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// Absolute, as some images have it: it must be followed inside the root.
	if err := os.Symlink("/usr/lib", filepath.Join(tree, "lib")); err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(t.TempDir(), "init.go")
	if err := os.WriteFile(source, []byte(tinyInit), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(tree, "sbin/init"), source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return tree
}

// TestOtherInit stops a guest whose init cannot be asked.
func TestOtherInit(t *testing.T) {
	base := filepath.Join(t.TempDir(), "base.ext4")
	ext4(t, base, 64<<20, tinyTree(t))
	for _, direct := range []bool{false, true} {
		name := "overlay"
		if direct {
			name = "direct"
		}
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, base)
			m.config.Direct = direct
			if direct {
				delete(m.drives, vmm.RoleSystem)
			}
			g := m.start(t)
			s := g.open()
			g.boot(s)
			g.shutdown(s, false)
			g.gone(stopTime)
			clean(t, m.drives[vmm.RoleWork])
			if direct {
				clean(t, base)
			} else {
				clean(t, m.drives[vmm.RoleSystem])
			}
		})
	}
}

// TestUnbootable wants each reason on the console, and QEMU gone by itself.
func TestUnbootable(t *testing.T) {
	tree := tinyTree(t)
	good := filepath.Join(t.TempDir(), "base.ext4")
	ext4(t, good, 64<<20, tree)
	if err := os.Remove(filepath.Join(tree, "sbin/init")); err != nil {
		t.Fatal(err)
	}
	noInit := filepath.Join(t.TempDir(), "no-init.ext4")
	ext4(t, noInit, 64<<20, tree)
	if err := os.WriteFile(filepath.Join(tree, "sbin/init"), []byte("not a program\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	badInit := filepath.Join(t.TempDir(), "bad-init.ext4")
	ext4(t, badInit, 64<<20, tree)

	zero := func(t *testing.T, path string, offset, length int64) {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteAt(make([]byte, length), offset)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name, stage, reason string
		base                string
		spoil               func(t *testing.T, m *machine)
	}{
		{name: "no init", stage: "root", reason: "has no init", base: noInit},
		{name: "init is no program", stage: "init", reason: "exec format error", base: badInit},
		{name: "no system drive", stage: "config", reason: "no system drive",
			spoil: func(_ *testing.T, m *machine) { delete(m.drives, vmm.RoleSystem) }},
		{name: "no config drive", stage: "drives", reason: "no config drive",
			spoil: func(_ *testing.T, m *machine) { delete(m.drives, vmm.RoleConfig) }},
		{name: "config is no tar", stage: "config", reason: "does not hold a tar archive",
			spoil: func(_ *testing.T, m *machine) { m.raw = []byte(strings.Repeat("x", 4096)) }},
		{name: "base is no filesystem", stage: "root", reason: "the base drive (/dev/vda) holds no filesystem",
			spoil: func(t *testing.T, m *machine) {
				m.drives[vmm.RoleBase] = filepath.Join(m.dir, "empty")
				if err := os.WriteFile(m.drives[vmm.RoleBase], make([]byte, 1<<20), 0o600); err != nil {
					t.Fatal(err)
				}
			}},
		{name: "system disk damaged", stage: "root", reason: "filesystem on the system drive (/dev/vdb) is damaged",
			// The group descriptors follow the superblock's block: no mount without them.
			spoil: func(t *testing.T, m *machine) { zero(t, m.drives[vmm.RoleSystem], 4096, 64<<10) }},
		{name: "system disk of another base", stage: "root", reason: "belongs to another base image",
			spoil: func(t *testing.T, m *machine) {
				g := m.start(t)
				s := g.open()
				g.shutdown(s, false)
				g.gone(stopTime)
				other := filepath.Join(m.dir, "other.ext4")
				ext4(t, other, 64<<20, tree)
				m.drives[vmm.RoleBase] = other
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			base := c.base
			if base == "" {
				base = good
			}
			m := newMachine(t, base)
			if c.spoil != nil {
				c.spoil(t, m)
			}
			g := m.start(t)
			g.gone(failTime)
			stage, reason, ok := boot.FatalReason(g.log())
			if !ok || stage != c.stage || !strings.Contains(reason, c.reason) {
				t.Errorf("got %q: %q (%v), want %q: ...%q...\n%s", stage, reason, ok, c.stage, c.reason, g.log())
			}
			t.Logf("%s: %s", stage, reason)
		})
	}
}
