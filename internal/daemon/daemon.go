// Package daemon owns the process life of bangerd: one instance a state directory, the sockets, the
// log, readiness, and an orderly end.
//
// It knows no VM and no driver: what the daemon does is the Backend that cmd/bangerd wires. A VM
// never ends because the daemon does.
package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/privatedir"
	"git.thaloco.com/thaloco/banger/internal/server"
	"git.thaloco.com/thaloco/banger/internal/version"
)

const (
	callGrace    = 5 * time.Second  // for calls in flight when the daemon is told to end
	backendGrace = 20 * time.Second // for operations to reach a boundary
)

// Backend is what a daemon serves. Close is called once, after the last call: it lets running
// operations reach a boundary where a successor can take over, and releases what Open took.
type Backend interface {
	server.Service
	Close(ctx context.Context) error
}

// Options say where a daemon lives and what it does.
type Options struct {
	Paths    config.Paths
	LogLevel slog.Level
	Warnings []string // about the settings, for status and log
	// MetricsAddr is where the metrics are, beside the API socket: IP address and port; "" for nowhere.
	MetricsAddr string

	Revision int // 0: bangerv1.Revision; tests of version skew set another

	// Ready, if set, is the write end of the pipe of the process that started this daemon: it gets
	// one line (see Report), and stdout and stderr then go to the log.
	Ready *os.File

	// Open makes the backend. It runs with the lock held: no other daemon touches the state.
	Open func(ctx context.Context, log *slog.Logger) (Backend, error)
}

// Report writes the line that the starting process waits for: "ready", or err as JSON of a
// bangerv1.Fault. A nil pipe is fine.
func Report(ready *os.File, err error) {
	if ready == nil {
		return
	}
	line := []byte("ready")
	if err != nil {
		line = faultLine(err)
	}
	// The reader may be gone: a client that was interrupted. The daemon goes on without it.
	_, _ = ready.Write(append(line, '\n'))
	_ = ready.Close()
}

func faultLine(err error) []byte {
	line, err := json.Marshal(server.FaultMessage(err))
	if err != nil {
		return []byte(`{"code":"internal","message":"the daemon cannot say why it failed"}`)
	}
	return line
}

// Run is a daemon's life. It returns nil after an orderly end, and when another daemon of the same
// state directory serves already and Ready is set (the starting process got what it wanted).
func Run(ctx context.Context, o Options) error {
	err := run(ctx, &o)
	if errors.Is(err, errRunning) {
		if o.Ready != nil {
			Report(o.Ready, nil)
			return nil
		}
		err = fault.New(fault.Exists, o.Paths.State, "another bangerd serves this state directory").
			WithHint("banger daemon status")
	}
	if err != nil {
		Report(o.Ready, err)
	}
	return err
}

func run(ctx context.Context, o *Options) (err error) {
	unix.Umask(0o077)
	started := time.Now()
	ctx, stopSignals := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer stopSignals()

	if err := o.Paths.EnsureState(); err != nil {
		return err
	}
	if err := o.Paths.EnsureRuntime(); err != nil {
		return err
	}
	socketName := filepath.Base(o.Paths.Socket())
	sockets, err := privatedir.Open(o.Paths.Runtime)
	if err != nil {
		return err
	}
	defer sockets.Close()

	lock, err := lockUntilUnwanted(ctx, o, sockets)
	if err != nil {
		return err
	}
	defer lock.Close() // last: gives the lock to a successor

	logPath := o.Paths.DaemonLog()
	logs, err := openLog(logPath, o.Ready != nil)
	if err != nil {
		return fault.Wrap(err, fault.Permission, logPath, "cannot write the daemon's log")
	}
	defer logs.Close()
	log := newLogger(logs, o.LogLevel)
	log.Info("starting", "pid", os.Getpid(), "version", version.String(), "state_dir", o.Paths.State)
	for _, w := range o.Warnings {
		log.Warn(w)
	}
	defer func() {
		if err != nil {
			log.Error("ended", "error", err)
		}
	}()

	backend, err := o.Open(ctx, log)
	if err != nil {
		return err
	}
	closeBackend := sync.OnceValue(func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), backendGrace)
		defer cancel()
		return backend.Close(ctx)
	})
	defer func() { err = errors.Join(err, closeBackend()) }()

	api, dial, err := openSockets(o.Paths, sockets)
	if err != nil {
		return err
	}
	for _, l := range []*socket{api, dial} {
		defer l.Close()
		defer l.remove()
	}

	asked, ending := make(chan struct{}), make(chan struct{})
	revision := o.Revision
	if revision == 0 {
		revision = bangerv1.Revision
	}
	info := server.Info{
		PID: os.Getpid(), Version: version.String(), Revision: revision,
		Socket: o.Paths.Socket(), Log: logPath,
		StateDir:  o.Paths.State,
		StartedAt: started, Warnings: o.Warnings, Ending: ending, Shutdown: sync.OnceFunc(func() { close(asked) }),
	}
	endMetrics := serveMetrics(o.MetricsAddr, backend, &info, log)
	defer endMetrics()
	srv := &http.Server{
		Handler:           server.New(backend, info, log),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 2)
	go func() { served <- srv.Serve(api) }()
	dialCtx, endDials := context.WithCancel(context.WithoutCancel(ctx))
	defer endDials()
	dials := make(chan struct{})
	go func() {
		defer close(dials)
		if err := server.ServeDial(dialCtx, dial.UnixListener, backend, log); err != nil {
			served <- fmt.Errorf("dial socket: %w", err)
		}
	}()

	lost := make(chan string, 1)
	stopWatching, err := watchReachable(sockets, []string{bangerv1.DialSocketName, socketName}, func(what string) { lost <- what })
	if err != nil {
		return fault.Wrap(err, fault.Internal, sockets.Path(), "cannot watch the socket")
	}
	stopWatching = sync.OnceFunc(stopWatching)
	defer stopWatching()

	log.Info("ready", "socket", o.Paths.Socket(), "took", time.Since(started))
	Report(o.Ready, nil)
	o.Ready = nil
	if err := notify("READY=1"); err != nil {
		log.Warn("the service manager was not told that the daemon is ready", "error", err)
	}

	select {
	case <-ctx.Done():
		log.Info("ending", "why", "signal")
	case <-asked:
		log.Info("ending", "why", "asked to")
	case what := <-lost:
		// Nobody can reach this daemon any more, and it holds the lock that a reachable one needs.
		log.Warn("ending", "why", "its socket was removed", "missing", what)
	case err := <-served:
		return fault.Wrap(err, fault.Internal, "", "the daemon cannot serve")
	}
	// A second signal ends the process at once: the journal is made for that.
	stopSignals()

	// From here on clients find no socket and start a successor, which waits for the lock. Only then
	// are watchers told: they are to find the successor, not this daemon again.
	// What systemd listens on stays: it starts the successor.
	for _, l := range []*socket{api, dial} {
		l.remove()
	}
	_ = api.Close()
	if err := notify("STOPPING=1"); err != nil {
		log.Warn("the service manager was not told of the end", "error", err)
	}
	close(ending)
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), callGrace)
	defer cancel()
	if err := srv.Shutdown(grace); err != nil {
		log.Warn("calls cut off", "error", err)
		_ = srv.Close()
	}
	endDials()
	<-dials
	if err := closeBackend(); err != nil {
		return fault.Wrap(err, fault.CodeOf(err), "", "the daemon did not end cleanly")
	}
	log.Info("ended", "served", time.Since(started))
	return nil
}

// lockUntilUnwanted acquires the lock, and gives up when the process that waits for readiness is
// gone: otherwise each interrupted client would leave a waiting daemon behind.
func lockUntilUnwanted(ctx context.Context, o *Options, sockets *privatedir.Dir) (*os.File, error) {
	if o.Ready != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		fd := int(o.Ready.Fd())
		go func() {
			// POLLERR on a pipe's write end: no reader is left (poll(2)). The reader closes its end
			// once it has its line, at the latest, which ends this wait.
			set := []unix.PollFd{{Fd: int32(fd)}}
			for {
				if _, err := unix.Poll(set, -1); err != unix.EINTR {
					cancel()
					return
				}
			}
		}()
	}
	return acquire(ctx, o.Paths, sockets)
}

// socket is one that the daemon listens on.
type socket struct {
	*net.UnixListener
	remove func() // its name; nothing for one that systemd listens on
}

// openSockets gives the sockets that systemd passed, or listens itself. The caller holds the lock.
func openSockets(paths config.Paths, sockets *privatedir.Dir) (api, dial *socket, err error) {
	socketName := filepath.Base(paths.Socket())
	passed, err := passedSockets()
	if err != nil {
		return nil, nil, err
	}
	if len(passed) > 0 {
		a, d := passed[paths.Socket()], passed[filepath.Join(filepath.Dir(paths.Socket()), bangerv1.DialSocketName)]
		if a == nil || d == nil || len(passed) != 2 {
			for _, l := range passed {
				_ = l.Close()
			}
			return nil, nil, fault.New(fault.Invalid, "bangerd.socket", "systemd listens on other sockets than %s and %s beside it", paths.Socket(), bangerv1.DialSocketName).
				WithHint("banger daemon install writes the unit anew")
		}
		return &socket{a, func() {}}, &socket{d, func() {}}, nil
	}
	own := func(name string) (*socket, error) {
		l, err := listen(sockets, name)
		return &socket{l, func() { _ = os.Remove(sockets.Address(name)) }}, err
	}
	if api, err = own(socketName); err != nil {
		return nil, nil, err
	}
	if dial, err = own(bangerv1.DialSocketName); err != nil {
		_ = api.Close()
		return nil, nil, err
	}
	// The API socket comes last: whoever can call the API finds the dial socket, too.
	for _, name := range []string{bangerv1.DialSocketName, socketName} {
		if err := os.Rename(sockets.Address(unready(name)), sockets.Address(name)); err != nil {
			_ = errors.Join(api.Close(), dial.Close())
			return nil, nil, fault.Wrap(err, fault.Internal, name, "cannot move the socket into place")
		}
	}
	return api, dial, nil
}

// unready is a socket's name until it listens, so that a client never meets one that does not.
func unready(name string) string { return "." + name + ".new" }

// listen binds and listens under the unready name. The caller holds the lock, so that a leftover
// of that name is stale.
func listen(sockets *privatedir.Dir, name string) (*net.UnixListener, error) {
	address := sockets.Address(unready(name))
	if err := os.Remove(address); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fault.Wrap(err, fault.Permission, name, "cannot remove a stale socket")
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: address, Net: "unix"})
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, filepath.Join(sockets.Path(), name), "cannot listen")
	}
	l.SetUnlinkOnClose(false) // it will have another name by then
	if err := os.Chmod(address, 0o600); err != nil {
		_ = l.Close()
		return nil, fault.Wrap(err, fault.Internal, filepath.Join(sockets.Path(), name), "cannot make the socket private")
	}
	return l, nil
}
