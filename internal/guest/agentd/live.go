package agentd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// Run is the agent of a real guest. It serves until ctx ends, on the virtio-serial port if the
// machine has one and on vsock if it was given a CID.
func Run(ctx context.Context, version string, restarts int) error {
	state, err := system.ReadState()
	if err != nil {
		return err
	}
	// What is freed goes back soon: an idle agent is to cost the guest little, and it is never busy
	// enough for the collector's time to matter.
	debug.SetGCPercent(25)
	// The supervisor ignores SIGHUP, and what is ignored stays so in everything that is started: a command
	// could not be hung up. A signal that is caught is not passed on. Nobody reads it here.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP)
	live := &live{state: state, restarts: restarts, userspace: "starting", listening: make(chan struct{})}
	live.bootID, err = bootID()
	if err != nil {
		return err
	}
	guest := &Guest{
		Version: version, Stages: &live.stages,
		Answered: live.answered, Facts: live.facts, Shutdown: live.shutdown, Grow: live.grow, DialTCP: DialLoopback, DialAddress: DialAddress, Exec: StartProcess, Files: LocalPath,
		Stats: live.stats, Ports: live.ports, FollowPorts: followPorts, Trim: live.trim, Now: time.Now, SetNow: setNow,
		Idle: debug.FreeOSMemory,
		Sync: func(context.Context) error { unix.Sync(); return nil },
	}
	for _, s := range state.Stages {
		live.stages.Reach(s)
	}
	server := NewServer(state.Secret, guest)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var serving sync.WaitGroup
	if state.Tunnel != nil { // before anything else: the guest's first packets wait for it
		serving.Go(func() { live.serveTunnel(ctx) })
	}
	if state.CID != 0 {
		serving.Go(func() { cancel(live.serveVsock(ctx, server)) })
	}
	serving.Go(func() { cancel(live.servePort(ctx, server)) })
	serving.Go(func() { live.watchUserspace(ctx) })
	serving.Go(func() { live.watchSSH(ctx) })
	<-ctx.Done()
	err = server.Close()
	serving.Wait()
	return errors.Join(context.Cause(ctx), err)
}

// live is the guest the agent runs in.
type live struct {
	state    system.State
	restarts int
	bootID   string
	stages   Stages

	listens   sync.Once // the listening stage: the first transport is ready
	listening chan struct{}

	mu        sync.Mutex
	userspace string
	failed    []string
}

func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}

func (l *live) ready() {
	l.listens.Do(func() {
		l.stages.Reach(system.Now(boot.StageListening, ""))
		close(l.listening)
	})
}

// answered takes the first time only: a stage that was reached stays as it was.
func (l *live) answered(o wire.Opened) {
	stage := system.Now(boot.StageAgent, fmt.Sprintf("waited %.1f ms for the host", o.Waited.Seconds()*1000))
	stage.At -= time.Since(o.At)
	l.stages.Reach(stage)
}

func (l *live) facts() Facts {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Facts{BootID: l.bootID, Uptime: system.BootTime(), Userspace: l.userspace, FailedUnits: l.failed,
		RSS: residentBytes(), Restarts: l.restarts}
}

// residentBytes is this process's resident memory (proc_pid_statm(5), second field, in pages).
func residentBytes() int64 {
	content, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(content))
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseInt(fields[1], 10, 64) // 0 for what is no number
	return pages * int64(os.Getpagesize())
}

// serveVsock accepts connections of the host, and of nobody else.
func (l *live) serveVsock(ctx context.Context, server *Server) error {
	listener, err := vsock.Listen(vmm.AgentPort, nil)
	if err != nil {
		return fmt.Errorf("listen on vsock: %w", err)
	}
	defer listener.Close()
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	l.ready()
	go sayUp()
	// Connections that have not passed the handshake have only its ten seconds: few at a time will do.
	slots := make(chan struct{}, wire.MaxStreams)
	for {
		conn, err := listener.Accept()
		if err != nil {
			return fmt.Errorf("accept on vsock: %w", err)
		}
		stream, ok := conn.(*vsock.Conn)
		if from, known := conn.RemoteAddr().(*vsock.Addr); !ok || !known || from.ContextID != vsock.Host {
			_ = conn.Close()
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		go func() {
			defer func() { <-slots }()
			_ = server.Serve(ctx, &packets{Conn: stream}, false) // the peer's failure is the peer's to report
		}()
	}
}

// sayUp tells the host that the agent listens. A host that does not want to know refuses.
func sayUp() {
	if conn, err := vsock.Dial(vsock.Host, vmm.UpPort, nil); err == nil { // bounded by the kernel: two seconds
		_ = conn.Close()
	}
}

// servePort serves one session after another on the virtio-serial port. A machine may have none.
func (l *live) servePort(ctx context.Context, server *Server) error {
	var device string
	err := system.WaitDevice(ctx, "virtio-serial port "+vmm.AgentPortName, func() (found bool, err error) {
		device, err = findPort("/sys/class/virtio-ports")
		return device != "", err
	})
	if err != nil {
		if l.state.CID != 0 && ctx.Err() != nil {
			return nil
		}
		return err
	}
	for first := l.restarts == 0; ctx.Err() == nil; first = false {
		if err := l.servePortOnce(ctx, server, device, first); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// findPort returns the device of the port with our name, "" if there is none (yet).
func findPort(class string) (string, error) {
	names, err := filepath.Glob(class + "/*/name")
	if err != nil {
		return "", err
	}
	for _, name := range names {
		content, err := os.ReadFile(name)
		if err == nil && strings.TrimSpace(string(content)) == vmm.AgentPortName {
			device := "/dev/" + filepath.Base(filepath.Dir(name))
			if _, err := os.Stat(device); err == nil {
				return device, nil
			}
		}
	}
	return "", nil
}

// servePortOnce opens the port, waits for a host, and serves it until it goes. Except the first
// time in a boot, the host may be one that still talks to an earlier session.
func (l *live) servePortOnce(ctx context.Context, server *Server, device string, first bool) error {
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err // EBUSY: somebody else holds the port; the supervisor tries again
	}
	port := &portConn{File: f}
	l.ready()
	stop := context.AfterFunc(ctx, func() { _ = f.Close() })
	defer stop()
	if err := port.waitHost(); err != nil {
		return errors.Join(err, port.Close())
	}
	if !first {
		if err := wire.Break(port); err != nil {
			return port.Close() // the host went again, or reads nothing: from the beginning
		}
	}
	_ = server.Serve(ctx, port, true) // ends with the host's end; closes the port
	return nil
}

// portConn is a virtio-serial port as a connection.
type portConn struct{ *os.File }

// waitHost waits until the host's end is open. A read would not wait: without a host it is at its
// end at once. The runtime's poller is edge-triggered, and the port announces each change, so this
// sleeps until the host comes.
func (p *portConn) waitHost() error {
	raw, err := p.SyscallConn()
	if err != nil {
		return err
	}
	var pollErr error
	err = raw.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, pollErr = unix.Poll(fds, 0); pollErr != nil {
			return true
		}
		return fds[0].Revents&unix.POLLHUP == 0
	})
	return errors.Join(err, pollErr)
}

func (p *portConn) LocalAddr() net.Addr  { return &net.UnixAddr{Name: vmm.AgentPortName} }
func (p *portConn) RemoteAddr() net.Addr { return &net.UnixAddr{Name: vmm.AgentPortName} }

// grow enlarges what init mounted with growth.
func (l *live) grow(context.Context) ([]Grown, error) {
	var grown []Grown
	for _, m := range l.state.Mounted {
		before, after, err := system.Grow(m.Device, m.Path)
		if err != nil {
			return grown, fmt.Errorf("grow %s: %w", m.Target, err)
		}
		if after > before {
			grown = append(grown, Grown{Target: m.Target, Before: before, After: after})
		}
	}
	return grown, nil
}

// shutdown asks systemd or runit, which stop every service and come to our shutdown program at the end.
// Other inits would leave the overlay's filesystem mounted: there the agent stops the guest itself.
func (l *live) shutdown(ctx context.Context, reboot bool) error {
	if l.state.Runit != "" {
		return stopRunit(ctx, l.state.Runit, reboot)
	}
	if !l.state.Systemd {
		go stopWithoutSystemd(l.state.OwnInit, reboot)
		return nil
	}
	verb := "poweroff"
	if reboot {
		verb = "reboot"
	}
	if _, err := os.Lstat(systemdSocket); errors.Is(err, os.ErrNotExist) {
		// The agent is up seconds before systemd takes requests. A guest that is told to stop by then is not to be forced off.
		go func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), userspaceTime)
			defer cancel()
			if waitPath(ctx, systemdSocket) == nil {
				_ = askSystemd(ctx, verb) // the host waits for the end of the machine, and says if it does not come
			}
		}()
		return nil
	}
	return askSystemd(ctx, verb)
}

// askSystemd asks systemd to end the machine. It may just be about to listen on its socket.
func askSystemd(ctx context.Context, verb string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for tries := 0; ; tries++ {
		_, err := systemctl(ctx, "--no-block", verb)
		if err == nil || tries == 3 {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// systemctl runs systemctl and returns what it says.
func systemctl(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "systemctl", args...)
	var output strings.Builder
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := asOthers(cmd.Start); err != nil {
		return "", err
	}
	err := cmd.Wait()
	if err != nil {
		return output.String(), fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(output.String()))
	}
	return output.String(), nil
}
