package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Started is a process that somebody else has started for us.
type Started struct {
	PID   int
	Start uint64 // StartTime; 0 to have it looked up, which fails if it has ended
	PIDFD *os.File
	// Exit gets the status of its end from who reaps it, and is closed then; nil if nobody tells.
	Exit <-chan syscall.WaitStatus
}

// StartElsewhere has somebody else start a program, which may be another user's then, and keeps its pidfile as Start does: the intent
// before, the process after. What start returns is this package's from then on. An error of start means that nothing runs; no pidfile is
// left of an error. Like one that Start started it is watched until its end, also after Close.
func StartElsewhere(ctx context.Context, pidfile, marker string, start func(context.Context) (Started, error)) (*Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if err := writePidfile(pidfile, record{PID: starting, Boot: boot, Marker: marker, Elsewhere: true}); err != nil {
		return nil, errors.Join(err, Forget(pidfile))
	}
	s, err := start(ctx)
	if err != nil {
		return nil, errors.Join(err, Forget(pidfile))
	}
	p, err := takeIn(pidfile, marker, s, true)
	if err != nil {
		return nil, errors.Join(err, Forget(pidfile))
	}
	return p, nil
}

// TakeIn makes a Process of one that somebody else started and vouches for, and writes its pidfile. The pidfd is this package's from then on.
// It is known by the pidfd alone until then: who started it may still be putting it into its user's shoes.
func TakeIn(pidfile, marker string, pid int, pidfd *os.File) (*Process, error) {
	return takeIn(pidfile, marker, Started{PID: pid, PIDFD: pidfd}, false)
}

func takeIn(pidfile, marker string, s Started, kept bool) (*Process, error) {
	fd, err := unix.FcntlInt(s.PIDFD.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err := errors.Join(err, s.PIDFD.Close()); err != nil {
		return nil, fmt.Errorf("the pidfd of process %d: %w", s.PID, err)
	}
	p, err := begin(&Process{pid: s.PID, start: s.Start, elsewhere: true, kept: kept, exit: s.Exit}, fd)
	if err != nil {
		return nil, err
	}
	if err := p.note(pidfile, marker); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// Elsewhere says whether somebody else started it, as another user perhaps.
func (p *Process) Elsewhere() bool { return p.elsewhere }

// SignalBy names who sends the signals that this user may not send to it. fault.NotFound says that it is gone.
func (p *Process) SignalBy(send func(sig int) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.signal = send
}
