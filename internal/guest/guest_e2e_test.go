//go:build e2e

// Package guest_test boots real guests with plain QEMU, without any driver of ours: it shows what
// the guest program itself does. It needs a runtime bundle (BANGER_RUNTIME_DIR) and no privilege.
package guest_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// Bounds under emulation on a busy machine of two cores.
const (
	bootTime = 3 * time.Minute
	stopTime = 2 * time.Minute
	failTime = 90 * time.Second
)

const secret = "0123456789abcdef0123456789abcdef"

var buildAgent = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "banger-guest-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "agent")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X git.thaloco.com/thaloco/banger/internal/version.release=e2e", "-o", path,
		"git.thaloco.com/thaloco/banger/cmd/banger-vsock-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	return os.ReadFile(path)
})

// artifact is a file of the runtime bundle.
func artifact(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("BANGER_RUNTIME_DIR")
	if dir == "" {
		t.Fatal("BANGER_RUNTIME_DIR is not set: it names the runtime bundle whose kernel and image are booted")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("the runtime bundle is incomplete: %v", err)
	}
	return path
}

// cpio renders regular files as an initramfs (newc, kernel documentation,
// driver-api/early-userspace/buffer-format.rst).
func cpio(files map[string][]byte) []byte {
	var b bytes.Buffer
	pad := func() { b.Write(make([]byte, -b.Len()&3)) }
	entry := func(name string, mode int, content []byte) {
		fmt.Fprintf(&b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
			b.Len()+1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
		b.WriteString(name + "\x00")
		pad()
		b.Write(content)
		pad()
	}
	for name, content := range files {
		entry(name, 0o100755, content)
	}
	entry("TRAILER!!!", 0, nil)
	return b.Bytes()
}

// initrd is the bundle's, with the guest program of this tree put over the one in it: of two
// archives in one initramfs the later one's files win.
func initrd(t *testing.T, dir string) string {
	t.Helper()
	program, err := buildAgent()
	if err != nil {
		t.Fatal(err)
	}
	image, err := os.ReadFile(artifact(t, "initrd.img"))
	if err != nil {
		t.Fatal(err)
	}
	image = append(image, make([]byte, -len(image)&3)...)
	path := filepath.Join(dir, "initrd.img")
	if err := os.WriteFile(path, append(image, cpio(map[string][]byte{"init": program})...), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// ext4 makes an ext4 image, from a directory's content if one is given.
func ext4(t *testing.T, path string, size int64, from string) {
	t.Helper()
	args := []string{"-q", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"}
	if from != "" {
		args = append(args, "-d", from)
	}
	run(t, "mke2fs", append(args, path, fmt.Sprintf("%dk", size>>10))...)
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// clean fails the test if the filesystem was not unmounted, or is damaged.
func clean(t *testing.T, image string) {
	t.Helper()
	header := run(t, "dumpe2fs", "-h", image)
	if strings.Contains(header, "needs_recovery") {
		t.Errorf("%s was not unmounted: its journal needs recovery", filepath.Base(image))
	}
	if !strings.Contains(header, "Filesystem state:         clean\n") {
		t.Errorf("%s is not clean:\n%s", filepath.Base(image), header)
	}
	run(t, "e2fsck", "-fn", image)
}

// sshKey makes an ed25519 key pair: the private half as OpenSSH writes it.
func sshKey(t *testing.T) (private []byte, signer ssh.Signer) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	if signer, err = ssh.NewSignerFromKey(key); err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(block), signer
}

// machine is one set of disks, booted any number of times.
type machine struct {
	dir    string
	config boot.Config
	drives map[vmm.Role]string
	raw    []byte // config drive instead of config
	user   ssh.Signer
}

func newMachine(t *testing.T, base string) *machine {
	t.Helper()
	dir := t.TempDir()
	host, _ := sshKey(t)
	_, user := sshKey(t)
	m := &machine{dir: dir, user: user, drives: map[vmm.Role]string{
		vmm.RoleBase:    base,
		vmm.RoleSystem:  filepath.Join(dir, "system.ext4"),
		vmm.RoleWork:    filepath.Join(dir, "work.ext4"),
		vmm.RoleModules: artifact(t, "modules.ext4"),
		vmm.RoleConfig:  filepath.Join(dir, "config.tar"),
	}}
	ext4(t, m.drives[vmm.RoleSystem], 512<<20, "")
	ext4(t, m.drives[vmm.RoleWork], 256<<20, "")
	m.config = boot.Config{
		Version: boot.ConfigVersion, VMID: "e2e", Hostname: "calm-otter.vm",
		MachineID: "0123456789abcdef0123456789abcdef", Secret: secret,
		Mounts:      []boot.Mount{{Role: "work", Target: "/root", Options: "noatime", Grow: true}},
		Native:      []string{"/var/lib/docker", "/var/lib/containerd", "/var/lib/dpkg"},
		Environment: map[string]string{"BANGER_E2E": "1"},
		Files: []boot.File{
			{Path: "/etc/ssh/ssh_host_ed25519_key", Mode: 0o600, Content: host},
			{Path: "/root/.ssh/authorized_keys", Mode: 0o600, Content: ssh.MarshalAuthorizedKey(user.PublicKey())},
		},
	}
	return m
}

// guest is one run of a machine.
type guest struct {
	t       *testing.T
	cmd     *exec.Cmd
	exited  chan struct{}
	err     error
	console string
	dir     string
	link    vmm.Link
}

func (m *machine) start(t *testing.T) *guest {
	t.Helper()
	m.config.TimeUnixMS = time.Now().UnixMilli()
	if m.drives[vmm.RoleConfig] == "" {
		t.Log("no config drive")
	} else if m.raw != nil {
		if err := os.WriteFile(m.drives[vmm.RoleConfig], m.raw, 0o600); err != nil {
			t.Fatal(err)
		}
	} else if err := boot.WriteDrive(m.drives[vmm.RoleConfig], m.config); err != nil {
		t.Fatal(err)
	}
	// Socket paths are short: 108 bytes at most.
	sockets, err := os.MkdirTemp("", "bg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	g := &guest{t: t, dir: sockets, console: filepath.Join(sockets, "console"), exited: make(chan struct{})}
	args := []string{"-M", "q35", "-accel", "tcg,thread=single,tb-size=256", "-cpu", "max,-cx16", "-smp", "2", "-m", "1024",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "file:" + g.console, "-qmp", "unix:" + sockets + "/qmp,server=on,wait=off",
		"-kernel", artifact(t, "vmlinux"), "-initrd", initrd(t, m.dir),
		"-append", "console=ttyS0 reboot=t panic=-1 mitigations=off net.ifnames=0 quiet random.trust_cpu=on",
		"-device", "virtio-rng-pci",
		"-chardev", "socket,id=ag,path=" + sockets + "/agent,server=on,wait=off", "-device", "virtio-serial-pci,id=vs0",
		"-device", "virtserialport,chardev=ag,bus=vs0.0,name=" + vmm.AgentPortName}
	for _, role := range []vmm.Role{vmm.RoleBase, vmm.RoleSystem, vmm.RoleWork, vmm.RoleModules, vmm.RoleConfig} {
		path, ok := m.drives[role]
		if !ok {
			continue
		}
		readonly := "on"
		if role == vmm.RoleSystem || role == vmm.RoleWork || m.config.Direct && role == vmm.RoleBase {
			readonly = "off"
		}
		args = append(args, "-drive", fmt.Sprintf("if=none,id=%s,file=%s,format=raw,readonly=%s", role, path, readonly),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s", role, role))
	}
	g.cmd = exec.Command("qemu-system-x86_64", args...)
	var stderr bytes.Buffer
	g.cmd.Stderr = &stderr
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		g.err = g.cmd.Wait()
		if said := strings.ReplaceAll(stderr.String(), poweredOff, ""); said != "" {
			g.err = errors.Join(g.err, errors.New(said))
		}
		close(g.exited)
	}()
	t.Cleanup(func() {
		_ = g.cmd.Process.Kill() // gone already in a test that passed
		<-g.exited
		if t.Failed() {
			t.Logf("QEMU: %v", g.err)
			t.Logf("console:\n%s", g.log())
		}
	})
	g.link = vmm.Link{Mux: true, Dial: func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", sockets+"/agent")
	}}
	return g
}

// poweredOff is what QEMU says, and nothing more comes of it, when its guest's kernel takes a disk from the bus at
// power-off before QEMU has looked at the last notification: it finds no ring then. On a busy machine that was seen
// in one of twenty. What matters by then is whether the disks are clean, which the tests check.
const poweredOff = "qemu-system-x86_64: virtio-blk missing headers\n"

func (g *guest) log() []byte {
	console, _ := os.ReadFile(g.console)
	return console
}

// gone waits until QEMU has ended by itself.
func (g *guest) gone(bound time.Duration) {
	g.t.Helper()
	began := time.Now()
	select {
	case <-g.exited:
		if g.err != nil {
			g.t.Errorf("QEMU: %v", g.err)
		}
		g.t.Logf("QEMU ended after %s", time.Since(began).Round(10*time.Millisecond))
	case <-time.After(bound):
		g.t.Fatalf("QEMU still runs after %s", bound)
	}
}

func (g *guest) open() *agent.Session {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), bootTime)
	defer cancel()
	go func() {
		select {
		case <-g.exited: // nobody will answer any more
			cancel()
		case <-ctx.Done():
		}
	}()
	s, err := agent.Open(ctx, g.link, secret)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { s.Close() })
	return s
}

// boot waits until userspace has started and logs the stages.
func (g *guest) boot(s *agent.Session) {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), bootTime)
	defer cancel()
	stream, err := s.Client().WatchBoot(ctx, &agentv1.WatchBootRequest{})
	if err != nil {
		g.t.Fatal(err)
	}
	defer stream.Close()
	for stream.Receive() { // to its end it would take an SSH server, which not every guest here has
		stage := stream.Msg().Stage
		g.t.Logf("%-10s %7.0f ms %s", stage.Name, stage.AtMs, stage.Detail)
		if stage.Name == boot.StageUserspace {
			return
		}
	}
	g.t.Fatalf("the boot ended without userspace: %v", stream.Err())
}

// shell runs a shell script in the guest over SSH and returns its output.
func (g *guest) shell(s *agent.Session, m *machine, script string) string {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), bootTime)
	defer cancel()
	conn, err := s.DialTCP(ctx, 22, true)
	if err != nil {
		g.t.Fatal(err)
	}
	defer conn.Close()
	c, chans, reqs, err := ssh.NewClientConn(conn, "guest", &ssh.ClientConfig{
		User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(m.user)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		g.t.Fatal(err)
	}
	client := ssh.NewClient(c, chans, reqs)
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		g.t.Fatal(err)
	}
	session.Stdin = strings.NewReader(script)
	out, err := session.CombinedOutput("sh -eu")
	if err != nil {
		g.t.Errorf("in the guest: %v\n%s\n%s", err, script, out)
	}
	return string(out)
}

// qmp runs one QMP command.
func (g *guest) qmp(command string, arguments any) {
	g.t.Helper()
	conn, err := net.Dial("unix", g.dir+"/qmp")
	if err != nil {
		g.t.Fatal(err)
	}
	defer conn.Close()
	in, out := json.NewDecoder(conn), json.NewEncoder(conn)
	for _, c := range []map[string]any{{"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}} {
		if err := out.Encode(c); err != nil {
			g.t.Fatal(err)
		}
		for {
			var reply map[string]any
			if err := in.Decode(&reply); err != nil {
				g.t.Fatal(err)
			}
			if reply["error"] != nil {
				g.t.Fatalf("%s: %v", command, reply["error"])
			}
			if reply["return"] != nil {
				break
			}
		}
	}
}

func (g *guest) health(s *agent.Session) *agentv1.HealthResponse {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 30*time.Second)
	defer cancel()
	h, err := s.Client().Health(ctx, &agentv1.HealthRequest{})
	if err != nil {
		g.t.Fatal(err)
	}
	return h
}

func (g *guest) shutdown(s *agent.Session, reboot bool) {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 30*time.Second)
	defer cancel()
	if _, err := s.Client().Shutdown(ctx, &agentv1.ShutdownRequest{Reboot: reboot}); err != nil {
		g.t.Fatal(err)
	}
}
