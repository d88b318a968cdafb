// Package lab runs an emulated AMD host with hardware virtualisation, so that Firecracker is run for real
// on machines without KVM: Debian 12 under QEMU's emulation, which offers svm, so that the host's own
// kernel gives it /dev/kvm (docs/lab.md).
//
// It owns that host's life: boot, commands in it, reboot, power cut. It never changes the built disk
// (`make lab`), and never leaves a QEMU behind: the kernel ends it with the program that started it.
package lab

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// HostDir is where `make lab` puts a link to the built host, relative to the checkout.
const HostDir = "dist/lab/host"

// StockDir is where `make bench-floor` puts a link to the untrimmed guest, relative to the checkout.
const StockDir = "dist/lab/stock"

// Bounds for a machine of two cores that others use as well; quiet, a boot takes 15 s.
const (
	BootTime = 5 * time.Minute
	dialTime = time.Minute

	probePause = 5 * time.Second // between two looks at whether the host still lives
	probeTime  = 30 * time.Second
	// silenceTime is how long its SSH server may say nothing: a host with eight guests, which had two emulated
	// CPUs then, has taken twenty seconds for a banner.
	silenceTime = 2 * time.Minute
)

// ready is what the host prints on its console when it has booted; customize.sh has the other end.
const ready = "lab: ready"

// Options say what to boot.
type Options struct {
	Host    string    // directory that `make lab` made
	Payload string    // image file for the second disk, read-only; "" for none
	Disk    string    // the host's disk; "" is a layer over the built one that goes away with the machine
	Console io.Writer // gets what the host prints on its serial console
	Memory  int       // MiB
	CPUs    int       // 0 is one. Guests of several are safe on a host of one alone (docs/lab.md)
	Code    int       // MiB for what QEMU has translated, 0 is 1024. It is thrown away as a whole when there is no room for more
}

// Machine is a host that runs. Its methods may be called from several goroutines.
type Machine struct {
	opt     Options
	port    int
	config  *ssh.ClientConfig
	cmd     *exec.Cmd
	exited  chan struct{} // closed when QEMU has ended
	err     error         // why, after exited
	lost    chan struct{} // closed when the host itself is of no use any more
	lostWhy error         // after lost
	console *console

	mu      sync.Mutex
	clients map[string]*ssh.Client // by user
}

// Boot starts a host and waits until it is ready. The caller ends it with Kill.
func Boot(ctx context.Context, o Options) (*Machine, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, BootTime, fmt.Errorf("the lab was not ready within %v", BootTime))
	defer cancel()
	m := &Machine{opt: o, console: newConsole(o.Console), lost: make(chan struct{}), clients: map[string]*ssh.Client{}}
	var err error
	if m.config, err = clientConfig(o.Host); err != nil {
		return nil, err
	}
	for range 3 { // somebody else may take the port in between
		if err = m.start(); err != nil {
			return nil, err
		}
		if err = m.waitReady(ctx, 1); err == nil {
			go m.watch()
			return m, nil
		}
		m.Kill()
		if !strings.Contains(m.console.tail(), "Could not set up host forwarding") {
			break
		}
	}
	return nil, err
}

func clientConfig(dir string) (*ssh.ClientConfig, error) {
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil
		}
		return b
	}
	key, err := ssh.ParsePrivateKey(read("id_ed25519"))
	if err != nil {
		return nil, fmt.Errorf("no lab in %s: make lab builds it (%w)", dir, err)
	}
	server, _, _, _, err := ssh.ParseAuthorizedKey(read("ssh_host_key.pub"))
	if err != nil {
		return nil, fmt.Errorf("the lab in %s has no host key: make lab builds it (%w)", dir, err)
	}
	return &ssh.ClientConfig{
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(key)},
		HostKeyCallback:   ssh.FixedHostKey(server),
		HostKeyAlgorithms: []string{server.Type()},
		Timeout:           dialTime,
	}, nil
}

// emulator is the command that runs the host's own QEMU, with the dynamic linker, the libraries and the firmware
// that it came with: the machine's may be older, or have none.
func (m *Machine) emulator() []string {
	root := filepath.Join(m.opt.Host, "qemu/usr")
	lib := filepath.Join(root, "lib/x86_64-linux-gnu")
	return []string{filepath.Join(lib, "ld-linux-x86-64.so.2"), "--library-path", lib, "--argv0", "qemu-system-x86_64",
		filepath.Join(root, "bin/qemu-system-x86_64"), "-L", filepath.Join(root, "share/qemu"), "-L", filepath.Join(root, "share/seabios")}
}

// args are QEMU's. The CPU is one whose extensions QEMU emulates well, with svm. cmpxchg16b is hidden:
// QEMU 7.2's emulation of it corrupted memory in newer kernels, and a later one's has not been tried for long. There is one CPU if not asked:
// what the threads of two do at once takes guests down, and the host with them (docs/lab.md). AppArmor is off, since its
// user's half is not among the host's packages: Docker would miss it.
func (m *Machine) args() []string {
	disk, snapshot := m.opt.Disk, "off"
	if disk == "" {
		disk, snapshot = filepath.Join(m.opt.Host, "disk.ext4"), "on"
	}
	escape := func(path string) string { return strings.ReplaceAll(path, ",", ",,") }
	args := []string{"-M", "q35", "-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", cmp.Or(m.opt.Code, 1024)), "-cpu", "EPYC-Rome,+svm,+npt,-cx16",
		"-smp", fmt.Sprint(max(1, m.opt.CPUs)), "-m", fmt.Sprint(m.opt.Memory), "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio",
		"-kernel", filepath.Join(m.opt.Host, "vmlinuz"), "-initrd", filepath.Join(m.opt.Host, "initrd.img"),
		"-append", "console=ttyS0 quiet root=/dev/vda rw mitigations=off apparmor=0 net.ifnames=0 random.trust_cpu=on systemd.show_status=false",
		"-drive", "if=none,id=disk,format=raw,discard=unmap,snapshot=" + snapshot + ",file=" + escape(disk),
		"-device", "virtio-blk-pci,drive=disk",
	}
	if m.opt.Payload != "" {
		args = append(args, "-drive", "if=none,id=payload,format=raw,readonly=on,file="+escape(m.opt.Payload), "-device", "virtio-blk-pci,drive=payload")
	}
	return append(args,
		"-netdev", fmt.Sprintf("user,id=net,hostfwd=tcp:127.0.0.1:%d-:22", m.port), "-device", "virtio-net-pci,netdev=net",
		"-device", "virtio-rng-pci")
}

func (m *Machine) start() error {
	// The port is free now; QEMU says so if it is not any more.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	m.port = l.Addr().(*net.TCPAddr).Port
	if err := l.Close(); err != nil {
		return err
	}
	argv := append(m.emulator(), m.args()...)
	m.cmd = exec.Command(argv[0], argv[1:]...)
	m.cmd.Stdout, m.cmd.Stderr = m.console, m.console
	m.cmd.WaitDelay = 10 * time.Second
	// In a group of its own, so that Ctrl-C reaches it by way of us; killed with the thread that started
	// it, which therefore stays as long as it runs.
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	exited := make(chan struct{})
	m.exited = exited
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := m.cmd.Start()
		started <- err
		if err == nil {
			m.err = m.cmd.Wait()
		}
		close(exited)
	}()
	return <-started
}

// waitReady waits until the console has said so n times.
func (m *Machine) waitReady(ctx context.Context, n int) error {
	select {
	case <-m.console.said(n):
		return nil
	case <-m.exited:
		return fmt.Errorf("the lab's QEMU ended: %w\n%s", m.err, m.console.tail())
	case <-m.console.panicked:
		return m.panicError()
	case <-ctx.Done():
		return fmt.Errorf("%w; its console:\n%s", context.Cause(ctx), m.console.tail())
	}
}

// NoVerdict is in the error of everything that failed because the host itself did.
const NoVerdict = "this is no verdict about banger"

func (m *Machine) panicError() error {
	return fmt.Errorf("the lab's own kernel panicked: %s; its console:\n%s", NoVerdict, m.console.tail())
}

// watch notices a host that panicked, or hangs, which the emulation makes it do now and then (docs/lab.md):
// nothing else would end before its bound.
func (m *Machine) watch() {
	lose := func(why error) {
		m.lostWhy = why
		close(m.lost)
	}
	answered := time.Now()
	look := time.NewTicker(probePause)
	defer look.Stop()
	for {
		select {
		case <-m.exited:
			return
		case <-m.console.panicked:
			lose(m.panicError())
			return
		case <-look.C:
		}
		if m.answers() {
			answered = time.Now()
		} else if silent := time.Since(answered); silent > silenceTime {
			lose(fmt.Errorf("the lab hangs: its SSH server has said nothing for %v: %s; its console:\n%s", silent.Round(time.Second), NoVerdict, m.console.tail()))
			return
		}
	}
}

// answers tells whether the host's SSH server greets. That QEMU takes the connection means nothing.
func (m *Machine) answers() bool {
	conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", m.port), probeTime)
	if err != nil {
		return false
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(probeTime)); err != nil {
		return false
	}
	_, err = conn.Read(make([]byte, 1))
	return err == nil
}

// Kill is a power cut: what the host has not written to its disk is lost. Returns when QEMU has
// ended; a machine that has ended already is fine.
func (m *Machine) Kill() {
	_ = m.cmd.Process.Kill() // it has ended already
	<-m.exited
	// What waits for an answer of the host, with the lock held, has seen the end of its connection.
	m.mu.Lock()
	defer m.mu.Unlock()
	for user, c := range m.clients {
		_ = c.Close() // the machine is gone
		delete(m.clients, user)
	}
}

// Reboot asks the host to reboot and waits until it is ready again.
func (m *Machine) Reboot(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*BootTime, fmt.Errorf("the lab did not reboot within %v", 2*BootTime))
	defer cancel()
	before := m.console.count()
	// The connection may end before the command's answer.
	if _, err := m.Output(ctx, "root", "systemctl reboot"); err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := m.waitReady(ctx, before+1); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for user, c := range m.clients {
		_ = c.Close() // to the boot before
		delete(m.clients, user)
	}
	return nil
}

// client is the connection as that user, made when first needed.
func (m *Machine) client(user string) (*ssh.Client, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.clients[user]; c != nil {
		return c, nil
	}
	conf := *m.config
	conf.User = user
	c, err := ssh.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", m.port), &conf)
	if err != nil {
		return nil, fmt.Errorf("entering the lab as %s: %w", user, err)
	}
	m.clients[user] = c
	return c, nil
}

// Run runs a shell command as that user. Its error is an *ssh.ExitError if the command failed; when
// ctx ends, the connection is cut and the command gets SIGHUP.
func (m *Machine) Run(ctx context.Context, user, command string, stdin io.Reader, stdout, stderr io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	// Every step waits for an answer, and a host that hangs gives none.
	go func() {
		c, err := m.client(user)
		if err != nil {
			ended <- err
			return
		}
		s, err := c.NewSession()
		if err != nil {
			ended <- fmt.Errorf("the lab answers no more: %w", err)
			return
		}
		stop := context.AfterFunc(ctx, func() { _ = s.Close() })
		defer stop()
		s.Stdin, s.Stdout, s.Stderr = stdin, stdout, stderr
		ended <- s.Run(command)
		_ = s.Close() // it has ended
	}()
	select {
	case err := <-ended:
		return err
	case <-m.exited:
		return errors.New("the lab's QEMU has ended")
	case <-m.lost:
		return m.lostWhy
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Output runs a shell command as that user and returns what it printed, both outputs; a failed one's
// is in the error as well.
func (m *Machine) Output(ctx context.Context, user, command string) (string, error) {
	var out lockedBuffer
	err := m.Run(ctx, user, command, nil, &out, &out)
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", command, err, out.String())
	}
	return out.String(), err
}

// lockedBuffer takes both outputs of a command.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// SSH gives the argv of ssh(1) for a session as that user.
func (m *Machine) SSH(user string, args ...string) []string {
	return append([]string{"ssh", "-i", filepath.Join(m.opt.Host, "id_ed25519"), "-p", fmt.Sprint(m.port),
		"-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
		user + "@127.0.0.1"}, args...)
}

// Lost is closed when the host itself has panicked or hangs; Err says which.
func (m *Machine) Lost() <-chan struct{} { return m.lost }

// Err is valid after Lost.
func (m *Machine) Err() error { return m.lostWhy }

// console passes on what the host prints, and counts how often it said that it is ready.
type console struct {
	mu      sync.Mutex
	w       io.Writer
	last    []byte
	n       int
	waiters map[int]chan struct{}

	panicked chan struct{} // closed when the host's kernel gave up
	gaveUp   bool
}

func newConsole(w io.Writer) *console {
	if w == nil {
		w = io.Discard
	}
	return &console{w: w, waiters: map[int]chan struct{}{}, panicked: make(chan struct{})}
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := bytes.Count(c.last, []byte(ready))
	c.last = append(c.last, p...)
	c.n += bytes.Count(c.last, []byte(ready)) - before
	if !c.gaveUp && bytes.Contains(c.last, []byte("Kernel panic - not syncing")) {
		c.gaveUp = true
		close(c.panicked)
	}
	// What is cut off ends a line, so that no mark is counted twice or halved.
	for len(c.last) > 8<<10 {
		i := bytes.IndexByte(c.last, '\n')
		if i < 0 {
			i = len(c.last) - 1
		}
		c.last = c.last[i+1:]
	}
	for n, ch := range c.waiters {
		if c.n >= n {
			close(ch)
			delete(c.waiters, n)
		}
	}
	return c.w.Write(p)
}

func (c *console) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// said is closed when the host has said n times that it is ready.
func (c *console) said(n int) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch := c.waiters[n]
	if ch == nil {
		ch = make(chan struct{})
		if c.n >= n {
			close(ch)
			return ch
		}
		c.waiters[n] = ch
	}
	return ch
}

func (c *console) tail() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.TrimSpace(string(c.last[max(0, len(c.last)-3000):]))
}

// CopyDisk makes a host's disk of one's own, to keep what is written to it; one that is there is kept.
func CopyDisk(ctx context.Context, host, disk string) error {
	if _, err := os.Stat(disk); err == nil {
		return nil
	}
	out, err := exec.CommandContext(ctx, "cp", "--sparse=always", "--reflink=auto", filepath.Join(host, "disk.ext4"), disk).CombinedOutput()
	if err != nil {
		return errors.Join(fmt.Errorf("copying the lab's disk: %w\n%s", err, out), os.Remove(disk))
	}
	return nil
}
