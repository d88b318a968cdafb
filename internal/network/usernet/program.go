package usernet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Program is the name by which a daemon's executable is started to be a user network: its argv[0].
const Program = "banger-usernet"

// Descriptors that a program is started with: sockets that listen already, so that nobody waits for them to appear.
const (
	vmmFD     = 3
	controlFD = 4
)

// alone is how long a program stays without a VMM. It is started just before one; the daemon that would end it may
// have been killed.
const alone = 2 * time.Minute

// guestAlone is the same where the guest itself connects: it has to boot before, and may be stopped.
const guestAlone = 15 * time.Minute

// memoryLimit is where the garbage collector works harder, in bytes (runtime/debug.SetMemoryLimit).
const memoryLimit = 256 << 20

// start is the program's second argument, as JSON; the first one is its marker, by which it is found again.
type start struct {
	Config   Config   `json:"config"`
	Settings Settings `json:"settings"`
}

// Main is the main function of a program: args is argv. It returns the exit code.
func Main(args []string) int {
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	if err := run(args, log, TheHost()); err != nil {
		log.Error("ended", "err", err)
		return 1
	}
	return 0
}

func run(args []string, log *slog.Logger, outside Outside) (err error) {
	if len(args) != 3 {
		return fmt.Errorf("%s is started by bangerd, with two arguments", Program)
	}
	var s start
	if err := json.Unmarshal([]byte(args[2]), &s); err != nil {
		return fmt.Errorf("the second argument: %w", err)
	}
	vmm, err := inherited(vmmFD, "vmm")
	if err != nil {
		return err
	}
	defer vmm.Close()
	control, err := inherited(controlFD, "control")
	if err != nil {
		return err
	}
	defer control.Close()
	debug.SetMemoryLimit(memoryLimit)
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil { // it would have what guests sent
		return err
	}
	unconfined := confineProgram()
	if unconfined != nil && !errors.Is(unconfined, errNoLandlock) {
		return unconfined
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	n, err := New(s.Config, outside, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	n.Set(s.Settings)
	log.Info("ready", "landlock", unconfined == nil, "guest", s.Config.Guest4, "publish", s.Config.Publish, "nat", s.Settings.NAT, "failed", n.Status().Failed)
	go func() {
		if err := n.serveControl(control); err != nil {
			log.Error("the control socket ended", "err", err)
		}
	}()
	closeBoth := context.AfterFunc(ctx, func() { _, _ = vmm.Close(), control.Close() })
	defer closeBoth()
	if s.Config.KeyHash != "" {
		return serveGuests(ctx, n, vmm, guestAlone)
	}
	return serveVMMs(ctx, n, vmm, alone)
}

// inherited is a listening unix socket that the process was started with.
func inherited(fd uintptr, name string) (*net.UnixListener, error) {
	f := os.NewFile(fd, name)
	if f == nil {
		return nil, fmt.Errorf("descriptor %d is not open", fd)
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d: %w", fd, err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("descriptor %d is no unix socket", fd), l.Close())
	}
	return u, nil
}

// serveVMMs serves one VMM after another, until none has come for so long or ctx ends.
func serveVMMs(ctx context.Context, n *Network, l *net.UnixListener, patience time.Duration) error {
	for {
		if err := l.SetDeadline(time.Now().Add(patience)); err != nil && ctx.Err() == nil {
			return err
		}
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			n.log.Info("there is no VMM any more")
			return nil
		case err != nil:
			return err
		}
		n.log.Info("the VMM is connected")
		if err := n.Serve(ctx, conn); err != nil && ctx.Err() == nil {
			n.log.Warn("the connection to the VMM broke", "err", err)
		} else {
			n.log.Info("the VMM is gone")
		}
	}
}
