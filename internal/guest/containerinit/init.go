// Package containerinit owns banger's own init: process 1 of guests whose image, made for containers, has none.
// It mounts what a distribution's init would, reaps whatever is orphaned, and keeps two programs running: the SSH
// server, and the supervisor of the image's command, which is a life of the guest program itself.
//
// It is no service manager: it reads nothing but boot.ContainerPath, starts nothing else, and never restarts the
// machine by itself. Process 1 does as little as it can, since the kernel panics when it ends.
package containerinit

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

// CommandName is argv[0] of the command's supervisor, which is the guest program itself.
const CommandName = "banger-command"

// loginPath is where programs are looked for, as in the agent.
const loginPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Backoff of what ends: a program that lived long is started again at once.
const (
	firstBackoff = 200 * time.Millisecond
	mostBackoff  = 30 * time.Second
	goodLife     = time.Minute
)

// commandStopTime is what the image's command has to end by itself before everything else is ended.
const commandStopTime = 10 * time.Second

// Run is process 1. It never returns: it ends with the machine.
func Run() {
	for _, err := range mountRest() {
		system.Say(fmt.Sprintf("banger: init: %v\n", err)) // a guest without /dev/shm is better than none
	}
	content, err := os.ReadFile(boot.ContainerPath)
	var c boot.Container
	if err == nil {
		c, err = boot.ParseContainer(content)
	}
	if err != nil {
		system.Say(fmt.Sprintf("banger: init: the image's command is unknown: %v\n", err))
	}
	_, err = os.Stat(boot.SSHServerPath) // an image that was pulled without one is entered by the agent alone
	newSupervisor(childrenOf(c, err == nil)).run()
}

// childrenOf are the programs to keep running. An image whose command is an SSH server has port 22 for itself.
func childrenOf(c boot.Container, sshServer bool) []*child {
	var all []*child
	if sshServer && (len(c.Command) == 0 || path.Base(c.Command[0]) != "sshd") {
		all = append(all, &child{name: boot.SSHServerPath, program: boot.SSHServerPath})
	}
	if len(c.Command) > 0 {
		all = append(all, &child{name: CommandName, program: system.Binary})
	}
	return all
}

// mountRest mounts what early boot has not: what programs expect that were written for a whole system.
func mountRest() []error {
	var errs []error
	for _, m := range []struct {
		fs, at string
		flags  uintptr
		data   string
	}{
		{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"mqueue", "/dev/mqueue", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"cgroup2", "/sys/fs/cgroup", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "nsdelegate"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			errs = append(errs, err)
			continue
		}
		if err := unix.Mount(m.fs, m.at, m.fs, m.flags, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			errs = append(errs, system.PathError("mount", m.at, err))
		}
	}
	for link, target := range map[string]string{"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, os.ErrExist) {
			errs = append(errs, err)
		}
	}
	return errs
}

// child is a program that is kept running.
type child struct {
	name    string // argv[0]
	program string // its file
	pid     int    // 0 while it does not run
	began   time.Time
	backoff time.Duration
}

type supervisor struct {
	children []*child
	signals  chan os.Signal
	again    chan *child
	stopping bool
	// start, wait and stop are the kernel's; tests replace them.
	start func(program, name string) (int, error)
	wait  func() (pid int, status syscall.WaitStatus)
	stop  func(command int, reboot bool)
}

func newSupervisor(children []*child) *supervisor {
	return &supervisor{children: children, signals: make(chan os.Signal, 16), again: make(chan *child, len(children)),
		start: startProgram, wait: reapOne, stop: end}
}

// run starts the children and reaps until the machine ends.
func (s *supervisor) run() {
	signal.Notify(s.signals, unix.SIGCHLD, system.SignalPowerOff, system.SignalReboot, system.SignalHalt, unix.SIGINT, unix.SIGPWR)
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	for _, c := range s.children {
		s.launch(c)
	}
	for {
		select {
		case sig := <-s.signals:
			s.handle(sig)
		case c := <-s.again:
			if !s.stopping {
				s.launch(c)
			}
		}
	}
}

func (s *supervisor) handle(sig os.Signal) {
	if sig == unix.SIGCHLD {
		s.reap()
		return
	}
	if s.stopping {
		return
	}
	s.stopping = true
	command := 0
	for _, c := range s.children {
		if c.name == CommandName {
			command = c.pid
		}
	}
	// SIGINT is the kernel's for Ctrl-Alt-Del. Reaping goes on meanwhile.
	reboot := sig == system.SignalReboot || sig == unix.SIGINT
	go s.stop(command, reboot)
}

// reap takes the status of every process that ended: orphans', which are nobody's to know, and the children's.
// One signal may stand for several.
func (s *supervisor) reap() {
	for {
		pid, status := s.wait()
		if pid <= 0 {
			return
		}
		for _, c := range s.children {
			if c.pid == pid {
				c.pid = 0
				s.ended(c, status)
			}
		}
	}
}

// ended starts a child again, ever later if it ends soon. One that ends by itself with 0 is done: the command's
// supervisor when the command is.
func (s *supervisor) ended(c *child, status syscall.WaitStatus) {
	if s.stopping || status.Exited() && status.ExitStatus() == 0 {
		return
	}
	if time.Since(c.began) > goodLife {
		c.backoff = 0
	}
	s.later(c)
}

func (s *supervisor) later(c *child) {
	c.backoff = min(max(2*c.backoff, firstBackoff), mostBackoff)
	time.AfterFunc(c.backoff, func() { s.again <- c })
}

func (s *supervisor) launch(c *child) {
	c.began = time.Now()
	pid, err := s.start(c.program, c.name)
	if err != nil {
		system.Say(fmt.Sprintf("banger: init: %s: %v\n", c.name, err))
		s.later(c)
		return
	}
	c.pid = pid
}

// startProgram starts a program. It is not waited for here: reap does.
func startProgram(program, name string) (int, error) {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	p, err := os.StartProcess(program, []string{name}, &os.ProcAttr{Dir: "/", Env: []string{"PATH=" + loginPath},
		Files: []*os.File{null, null, null}, Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		return 0, err
	}
	return p.Pid, p.Release()
}

func reapOne() (int, syscall.WaitStatus) {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if !errors.Is(err, unix.EINTR) {
			return pid, status
		}
	}
}

// end stops the image's command in the way that it asks for, then everything else, then the machine.
func end(command int, reboot bool) {
	if command != 0 && unix.Kill(command, unix.SIGTERM) == nil {
		system.WaitGone([]int{command}, commandStopTime)
	}
	system.Stop(reboot)
}
