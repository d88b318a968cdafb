package pid1

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

// Backoff of the supervisor: an agent that lived long is started again at once.
const (
	firstBackoff = 100 * time.Millisecond
	mostBackoff  = 5 * time.Second
	goodLife     = time.Minute
)

// RestartsVariable tells an agent how often it was started again.
const RestartsVariable = "BANGER_AGENT_RESTARTS"

// Supervise runs the agent and starts it again whenever it ends, until SIGTERM, which systemd sends
// to everyone when the machine stops.
func Supervise() error {
	runtime.LockOSThread() // Pdeathsig means the thread that started the agent (prctl(2))
	// The host must be able to stop a guest that is out of memory; the agent gives its children back
	// the ordinary score.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		return err
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM, unix.SIGINT)
	signal.Ignore(unix.SIGHUP)
	time.AfterFunc(goodLife, debug.FreeOSMemory) // once: what its start took, when the guest is not busy starting, too
	backoff := firstBackoff
	for restarts := 0; ; restarts++ {
		agent := exec.Cmd{
			Path: system.Binary, Args: []string{AgentName}, Dir: "/",
			Env:         append(os.Environ(), RestartsVariable+"="+strconv.Itoa(restarts)),
			SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
		}
		began := time.Now()
		if err := agent.Start(); err != nil {
			return fmt.Errorf("start the agent: %w", err)
		}
		ended := make(chan error, 1)
		go func() { ended <- agent.Wait() }()
		select {
		case <-ended:
		case <-stop:
			return errors.Join(ignoreDone(agent.Process.Signal(unix.SIGTERM)), ignoreExit(<-ended))
		}
		if time.Since(began) > goodLife {
			backoff = firstBackoff
		}
		select {
		case <-time.After(backoff):
		case <-stop:
			return nil
		}
		backoff = min(2*backoff, mostBackoff)
	}
}

func ignoreDone(err error) error {
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

func ignoreExit(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}
