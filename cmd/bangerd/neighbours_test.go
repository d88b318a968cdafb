package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/network/networktest"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// labDisk is the root filesystem of the lab's host (`make lab`), which has Docker and firewalld as Debian packages them.
const labDisk = "../../dist/lab/host/disk.ext4"

// neighbours is a host that other programs keep rules on: their root directory, in the namespaces that the test is in.
type neighbours struct {
	t    *testing.T
	root string
}

// newNeighbours mounts the lab's root filesystem, with what is written to it in memory, in namespaces that go with the test's
// process. It returns nil in the process that is outside.
func newNeighbours(t *testing.T) *neighbours {
	t.Helper()
	if testing.Short() {
		t.Skip("slow: make test-full runs it")
	}
	disk, err := filepath.Abs(labDisk)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(disk); err != nil {
		t.Skip("no Docker and no firewalld: make lab brings them")
	}
	if !networktest.Inside(t) {
		return nil
	}
	networktest.World(t, 1500)
	dir := t.TempDir()
	n := &neighbours{t: t, root: filepath.Join(dir, "root")}
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for _, d := range []string{"disk", "memory", "root"} {
		must("make a directory", os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	lower, memory := filepath.Join(dir, "disk"), filepath.Join(dir, "memory")
	out, err := exec.Command("mount", "-o", "loop,ro,noload", disk, lower).CombinedOutput()
	if err != nil {
		t.Fatalf("mount the lab's disk: %v\n%s", err, out)
	}
	must("mount memory", unix.Mount("tmpfs", memory, "tmpfs", 0, "mode=755"))
	for _, d := range []string{"upper", "work"} {
		must("make a directory", os.Mkdir(filepath.Join(memory, d), 0o755))
	}
	must("join them", unix.Mount("overlay", n.root, "overlay", 0, "lowerdir="+lower+",upperdir="+memory+"/upper,workdir="+memory+"/work"))
	must("mount proc", unix.Mount("proc", n.root+"/proc", "proc", 0, ""))
	for _, d := range []string{"/sys", "/dev"} {
		must("mount "+d, unix.Mount(d, n.root+d, "", unix.MS_BIND|unix.MS_REC, ""))
	}
	must("make Docker's directory", os.MkdirAll(n.root+"/var/lib/docker", 0o755))
	for _, d := range []string{"/run", "/tmp", "/var/lib/docker"} {
		must("mount "+d, unix.Mount("tmpfs", n.root+d, "tmpfs", 0, "mode=755"))
	}
	t.Cleanup(func() { // before the directory is removed
		for _, d := range []string{n.root, memory, lower} {
			if err := unix.Unmount(d, unix.MNT_DETACH); err != nil {
				t.Errorf("unmount %s: %v", d, err)
			}
		}
	})
	return n
}

// command is a program of theirs.
func (n *neighbours) command(ctx context.Context, args ...string) *exec.Cmd {
	path, err := exec.LookPath("chroot")
	if err != nil {
		path = "/usr/sbin/chroot"
	}
	cmd := exec.CommandContext(ctx, path, append([]string{n.root}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	return cmd
}

// try runs one to its end.
func (n *neighbours) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := n.command(ctx, args...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (n *neighbours) do(args ...string) string {
	n.t.Helper()
	out, err := n.try(args...)
	if err != nil {
		n.t.Fatalf("%q: %v\n%s", args, err, out)
	}
	return out
}

// start starts a service of theirs and waits until ready works. stop ends it as systemd does.
func (n *neighbours) start(ready []string, env []string, args ...string) (stop func()) {
	n.t.Helper()
	var log bytes.Buffer
	cmd := n.command(context.Background(), args...)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stopped := false
	stop = func() {
		n.t.Helper()
		if stopped {
			return
		}
		stopped = true
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
			n.t.Errorf("%s does not end\n%s", args[0], log.String())
		}
	}
	n.t.Cleanup(stop)
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		select {
		case err := <-ended:
			stopped = true
			n.t.Fatalf("%s ended: %v\n%s", args[0], err, log.String())
		default:
		}
		if _, err := n.try(ready...); err == nil {
			return stop
		}
		if time.Now().After(end) {
			n.t.Fatalf("%s is not ready after a minute\n%s", args[0], log.String())
		}
	}
}

// docker starts Docker's daemon. legacy: on a host whose iptables is the older one.
func (n *neighbours) docker(legacy bool) (stop func()) {
	n.t.Helper()
	var env []string
	if legacy {
		dir := "/tmp/legacy"
		for _, name := range []string{"iptables", "ip6tables", "iptables-save", "iptables-restore"} {
			n.do("mkdir", "-p", dir)
			n.do("ln", "-sf", "/usr/sbin/xtables-legacy-multi", dir+"/"+name)
		}
		env = []string{"PATH=" + dir + ":/usr/sbin:/usr/bin:/sbin:/bin"}
	}
	// Control groups are in no namespace of ours. A parent of its own for them can be taken away in the end.
	parent := fmt.Sprintf("banger-test-%d", os.Getpid())
	n.t.Cleanup(func() {
		for _, pattern := range []string{"/sys/fs/cgroup/" + parent, "/sys/fs/cgroup/*/" + parent} {
			left, _ := filepath.Glob(pattern)
			for _, dir := range left {
				if err := os.Remove(dir); err != nil {
					n.t.Error(err)
				}
			}
		}
	})
	stop = n.start([]string{"docker", "version"}, env, "dockerd", "--storage-driver=vfs", "--cgroup-parent=/"+parent)
	n.do("sh", "-c", "mkdir -p /tmp/image/bin && cp /bin/busybox /tmp/image/bin/ && tar -C /tmp/image -c . | docker import - box")
	return stop
}

// container wants a container of Docker's to get out.
func (n *neighbours) container(when string) {
	n.t.Helper()
	out, err := n.try("docker", "run", "--rm", "box", "/bin/busybox", "sh", "-c",
		fmt.Sprintf("echo hello | /bin/busybox timeout 10 /bin/busybox nc %s %d", networktest.WorldAddr, networktest.EchoPort))
	if first, _, _ := strings.Cut(out, "\n"); first != networktest.HostAddr.String() {
		n.t.Errorf("%s, a container of Docker's gets %q of the world, %v", when, out, err)
	}
}

// eventually is what the world sees of a guest, when rules had time to settle.
func eventually(t *testing.T, g *networktest.Guest) (from string) {
	t.Helper()
	for end := time.Now().Add(networktest.Patience); from == "" && time.Now().Before(end); {
		from = world(t, g, networktest.Silence)
	}
	return from
}

// reaches wants what VMs on the bridge have: out by NAT, a name of the world, in from the host.
func (in *installation) reaches(when string, id vm.ID) {
	in.t.Helper()
	g := in.guests[id]
	if from := eventually(in.t, g); from != networktest.HostAddr.String() {
		in.t.Errorf("%s, the world sees %q of a guest", when, from)
	}
	if got := resolves(in.t, g, networktest.WorldName); got != networktest.WorldAddr.String() {
		in.t.Errorf("%s, a guest finds %s for a name of the world", when, got)
	}
	conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(g.Interface.IPv4.Addr(), 3000).String(), networktest.Patience)
	if err != nil {
		in.t.Errorf("%s, the host does not reach a guest: %v", when, err)
		return
	}
	defer conn.Close()
	if _, err := talk(conn, "hello"); err != nil {
		in.t.Errorf("%s, a guest does not answer the host: %v", when, err)
	}
}

// firewall is what doctor says of others' rules.
func (in *installation) firewall() (found []doctor.Finding) {
	in.t.Helper()
	for _, f := range in.s.Doctor(in.ctx(), false) {
		if f.Code == doctor.Firewall {
			found = append(found, f)
		}
	}
	return found
}

// serve has a guest listen on the port that reaches asks.
func serve(t *testing.T, g *networktest.Guest) {
	t.Helper()
	l, err := g.Listen(3000)
	if err != nil {
		t.Fatal(err)
	}
	go networktest.Echo(l)
}

func onBridge(c *config.Config) { c.Network = config.NetworkBridge }

// fix types what doctor says.
func (n *neighbours) fix(found []doctor.Finding) {
	n.t.Helper()
	for _, f := range found {
		n.t.Logf("doctor: %s: %s", f.Detail, f.Fix)
		if f.Severity != doctor.Warn {
			n.t.Errorf("it is no warning: %+v", f)
		}
		n.do("sh", "-c", "set -e; "+strings.ReplaceAll(f.Fix, "sudo ", ""))
	}
}

// quiet wants doctor to have nothing to say of others' rules.
func (in *installation) quiet(when string) {
	in.t.Helper()
	if found := in.firewall(); len(found) > 0 {
		in.t.Errorf("%s, doctor says: %+v", when, found)
	}
}

// forwarding is whether the host forwards: Docker drops what is not its own where it had to turn it on itself.
func forwarding(t *testing.T, value string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte(value), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestBesideDocker has a real Docker beside VMs: started before them, restarted under them, and left when they are gone; on a host whose
// iptables makes rules of nftables, and on one whose makes the older kind, which is nobody's but the user's to change.
func TestBesideDocker(t *testing.T) {
	for name, legacy := range map[string]bool{"nftables": false, "legacy": true} {
		t.Run(name, func(t *testing.T) {
			n := newNeighbours(t)
			if n == nil {
				return
			}
			forwarding(t, "0")
			stop := n.docker(legacy)
			n.container("before VMs")
			in := install(t, onBridge)
			in.quietUnless(legacy, "before VMs")
			id, g := in.create("web", "store", true)
			serve(t, g)
			if legacy {
				if from := world(t, g, networktest.Silence); from != "" {
					t.Errorf("the world sees %q of a guest: Docker drops nothing, and this test shows nothing", from)
				}
				found := in.firewall()
				if len(found) != 1 {
					t.Fatalf("doctor says: %+v\n%s", found, n.do("sh", "-c", "iptables-legacy -S; iptables -S; cat /proc/net/ip_tables_names"))
				}
				n.fix(found)
			}
			in.reaches("beside Docker", id)
			in.quiet("beside Docker")
			n.container("beside VMs")
			stop()
			in.reaches("with Docker ended", id)
			stop = n.docker(legacy)
			in.reaches("with Docker started again", id)
			in.quiet("with Docker started again")
			n.container("started again")

			// Bridged packets pass Docker's rules as well where br_netfilter is loaded.
			other, og := in.create("db", "store", true)
			if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte("1"), 0o644); err != nil {
				t.Logf("no br_netfilter: %v", err)
			}
			conn, err := og.Dial(netip.AddrPortFrom(g.Interface.IPv4.Addr(), 3000), networktest.Patience)
			if err != nil {
				t.Errorf("VMs of a group do not reach each other beside Docker: %v", err)
			} else {
				_ = conn.Close()
			}
			for guest, id := range map[*networktest.Guest]vm.ID{g: id, og: other} {
				guest.Leave()
				in.done(in.s.Delete(in.ctx(), id))
			}
			in.close()
			if left := n.do("iptables", "-S"); strings.Contains(left, "banger") {
				t.Errorf("rules of ours are left:\n%s", left)
			}
			n.container("with no VM any more")
			stop()
		})
	}
}

func (in *installation) quietUnless(loud bool, when string) {
	in.t.Helper()
	if !loud {
		in.quiet(when)
	}
}

// TestDockerAfterVMs starts Docker beside VMs that run.
func TestDockerAfterVMs(t *testing.T) {
	n := newNeighbours(t)
	if n == nil {
		return
	}
	in := install(t, onBridge)
	id, g := in.create("web", "", true)
	serve(t, g)
	in.reaches("before Docker", id)
	forwarding(t, "0") // or Docker would find a host that forwards, and drop nothing
	stop := n.docker(false)
	in.reaches("with Docker", id)
	n.container("after VMs")
	stop()
}

// TestBesideFirewalld has a real firewalld beside VMs: what doctor says to type is enough, and stays so when firewalld is loaded
// again, and started again.
func TestBesideFirewalld(t *testing.T) {
	n := newNeighbours(t)
	if n == nil {
		return
	}
	n.bus()
	stop := n.firewalld()
	in := install(t, onBridge)
	id, g := in.create("web", "", true)
	serve(t, g)
	if from := world(t, g, networktest.Silence); from != "" {
		t.Errorf("the world sees %q of a guest: firewalld drops nothing, and this test shows nothing", from)
	}
	found := in.firewall()
	if len(found) != 1 {
		t.Fatalf("doctor says: %+v", found)
	}
	n.fix(found)
	in.reaches("with firewalld told", id)
	in.quiet("with firewalld told")
	n.do("firewall-cmd", "--reload")
	in.reaches("with firewalld loaded again", id)
	stop()
	in.reaches("with firewalld ended", id)
	stop = n.firewalld()
	in.reaches("with firewalld started again", id)
	in.quiet("with firewalld started again")
	g.Leave()
	in.done(in.s.Delete(in.ctx(), id))
	in.close()
	stop()
}

// TestBesideUfw has a real ufw beside VMs, which drops what it was not told of: what doctor says to type is enough, and stays so when ufw
// is loaded again.
func TestBesideUfw(t *testing.T) {
	n := newNeighbours(t)
	if n == nil {
		return
	}
	n.do("ufw", "--force", "enable")
	in := install(t, onBridge)
	id, g := in.create("web", "", true)
	serve(t, g)
	if from := world(t, g, networktest.Silence); from != "" {
		t.Errorf("the world sees %q of a guest: ufw drops nothing, and this test shows nothing", from)
	}
	found := in.firewall()
	if len(found) != 2 { // what goes through the host, and what goes to it
		t.Fatalf("doctor says: %+v", found)
	}
	n.fix(found)
	in.reaches("with ufw told", id)
	in.quiet("with ufw told")
	n.do("ufw", "reload")
	in.reaches("with ufw loaded again", id)
	in.quiet("with ufw loaded again")
	g.Leave()
	in.done(in.s.Delete(in.ctx(), id))
	in.close()
}

// bus starts the system's bus of theirs.
func (n *neighbours) bus() {
	n.t.Helper()
	n.do("mkdir", "-p", "/run/dbus")
	n.start([]string{"test", "-S", "/run/dbus/system_bus_socket"}, nil, "dbus-daemon", "--system", "--nofork", "--nopidfile")
}

func (n *neighbours) firewalld() (stop func()) {
	n.t.Helper()
	return n.start([]string{"firewall-cmd", "--state"}, nil, "firewalld", "--nofork", "--nopid")
}
