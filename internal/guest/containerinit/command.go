package containerinit

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/exec"
)

// LogPath is the log of the image's command: its output, and when it began and ended. At LogBytes it becomes
// LogPath.1, and what that was is lost.
const (
	LogPath  = "/var/log/banger/command.log"
	LogBytes = 8 << 20
)

// stopTime is what the command has to end by itself, from its own signal to SIGKILL. It is less than what init
// waits for the supervisor.
const stopTime = 8 * time.Second

// RunCommand is the supervisor of the image's command: it runs it as the image's user, in its directory, with its
// environment, and again when it fails. It returns when the command has ended with status 0, or was stopped.
func RunCommand() error {
	content, err := os.ReadFile(boot.ContainerPath)
	if err != nil {
		return err
	}
	c, err := boot.ParseContainer(content)
	if err != nil {
		return err
	}
	if path.IsAbs(c.WorkingDir) {
		// As Docker does; if it cannot be made, the command's start says that it is missing.
		_ = os.MkdirAll(c.WorkingDir, 0o755)
	}
	log, err := openLog(LogPath, LogBytes)
	if err != nil {
		return err
	}
	defer log.Close()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM)
	return supervise(c, log, stop, agentd.StartProcess)
}

// supervise runs the command until it is done or stop says so.
func supervise(c boot.Container, log io.Writer, stop <-chan os.Signal, start func(exec.Request) (*agentd.Process, error)) error {
	request := exec.Request{Args: c.Command, Env: c.Environment, Dir: "/", User: c.User}
	if c.WorkingDir != "" {
		request.Dir = c.WorkingDir
	}
	say := func(format string, args ...any) {
		// Who reads the log knows whose line it is by its form; the disk may be full, which is nothing to end for.
		_, _ = fmt.Fprintf(log, "%s banger: "+format+"\n", append([]any{time.Now().UTC().Format(time.RFC3339)}, args...)...)
	}
	for backoff := firstBackoff; ; backoff = min(2*backoff, mostBackoff) {
		began := time.Now()
		p, err := start(request)
		if err != nil {
			say("%q cannot be started: %v", c.Command, err)
		} else {
			say("%q begins", c.Command)
			status, stopped := follow(p, log, stop, stopSignal(c.StopSignal))
			say("%q ended %s", c.Command, describe(status))
			if stopped || status.Code == 0 && status.Signal == 0 && status.Failed == "" {
				return nil
			}
		}
		if time.Since(began) > goodLife {
			backoff = firstBackoff
		}
		say("it is started again in %s", backoff)
		select {
		case <-time.After(backoff):
		case <-stop:
			return nil
		}
	}
}

// follow copies a command's output to the log until it ends, or ends it.
func follow(p *agentd.Process, log io.Writer, stop <-chan os.Signal, signal unix.Signal) (status exec.Status, stopped bool) {
	defer p.Close()
	_ = p.Stdin.Close() // nobody is there to type
	copied := make(chan struct{}, 2)
	for _, r := range []io.Reader{p.Stdout, p.Stderr} {
		go func() {
			_, _ = io.Copy(log, r)
			copied <- struct{}{}
		}()
	}
	ended := make(chan exec.Status, 1)
	go func() { ended <- p.Wait() }()
	select {
	case status = <-ended:
	case <-stop:
		stopped = true
		_ = p.Signal(int(signal)) // gone just now: what was wanted
		select {
		case status = <-ended:
		case <-time.After(stopTime):
			p.HangUp()
			status = <-ended
		}
	}
	<-copied
	<-copied
	return status, stopped
}

func describe(s exec.Status) string {
	switch {
	case s.Failed != "":
		return "and was lost: " + s.Failed
	case s.Signal != 0:
		return "by " + unix.SignalName(unix.Signal(s.Signal))
	}
	return "with status " + strconv.Itoa(s.Code)
}

// stopSignal reads the name or number of an image's STOPSIGNAL. What is none is SIGTERM.
func stopSignal(s string) unix.Signal {
	if n, err := strconv.Atoi(s); err == nil && n > 0 && n < 65 {
		return unix.Signal(n)
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if sig := unix.SignalNum(name); sig != 0 {
		return sig
	}
	if rest, ok := strings.CutPrefix(name, "SIGRTMIN+"); ok { // signal(7): the C library's first is 34
		if n, err := strconv.Atoi(rest); err == nil && n >= 0 && n <= 30 {
			return unix.Signal(34 + n)
		}
	}
	return unix.SIGTERM
}
