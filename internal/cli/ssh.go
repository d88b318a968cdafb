package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

const (
	sshPort = 22
	sshWait = 2 * time.Minute // an emulated guest needs most of a minute on a busy host
)

func (a *app) sshCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ssh VM [-- COMMAND...]",
		Short: "Enter a VM, or run a command in it",
		Long: `Enter a VM as root, or run a command in it. Runs the system's ssh over the VM's agent: no IP
network is needed. Waits for the SSH server for up to two minutes. Your own ssh configuration is
not read; the exit code is the remote command's.`,
		Example: `  banger vm ssh calm-otter
  banger vm ssh calm-otter -- uname -a
  echo hello | banger vm ssh calm-otter -- 'cat > greeting'`,
		Args: func(cmd *cobra.Command, args []string) error {
			if dash := cmd.ArgsLenAtDash(); dash >= 0 {
				return oneRef(cmd, args[:dash])
			}
			if len(args) > 1 {
				return usage(cmd, "a command is given after --: banger vm ssh %s -- %s", args[0], args[1])
			}
			return oneRef(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error { return a.ssh(cmd.Context(), args[0], args[1:], true) },
	}
}

// ssh enters a VM, or runs a command in it. reminds: say after a session that the VM still runs.
func (a *app) ssh(ctx context.Context, ref string, command []string, reminds bool) error {
	program, err := exec.LookPath("ssh")
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "ssh", "the system's SSH client is not installed").
			WithHint("apt install openssh-client")
	}
	c, err := a.connect()
	if err != nil {
		return err
	}
	resp, err := c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Id: ref})
	if err != nil {
		return err
	}
	v := resp.GetVm()
	if err := enterable(v); err != nil {
		return err
	}
	target, err := c.VMs.GetSSHTarget(ctx, &bangerv1.GetSSHTargetRequest{Id: v.GetId()})
	if err != nil {
		return err
	}
	if err := a.waitForSSH(ctx, c, v); err != nil {
		return err
	}
	if len(command) > 0 {
		if err := a.settle(ctx, c, v); err != nil {
			return err
		}
	}
	reminds = reminds && len(command) == 0
	raw := len(command) == 0 && isatty.IsTerminal(a.stdin.Fd()) // as ssh makes it
	leave := "Ctrl-C"
	if raw {
		leave = "Enter, ~ and ."
	}
	watch := a.watchPulse(ctx, c, v, leave, saying(a.stderr, func() bool { return raw }))
	err = a.runSSH(program, v, target, command)
	watch.end()
	if err != nil {
		var code passed
		if reminds && errors.As(err, &code) && code != sshFailed {
			a.remind(ctx, c, v, target) // a shell ends with the code of its last command
		}
		return err
	}
	if reminds {
		a.remind(ctx, c, v, target)
	}
	return nil
}

// sshFailed is ssh's own exit code.
const sshFailed = 255

// remindTime bounds what a session's end may wait for.
const remindTime = 3 * time.Second

// remind says after a session that the VM goes on, if it does: it still exists, and its guest answers.
func (a *app) remind(ctx context.Context, c *client.Client, v *bangerv1.VM, target *bangerv1.GetSSHTargetResponse) {
	if !target.GetRemind() || a.json {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), remindTime)
	defer cancel()
	resp, err := c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Id: v.GetId()})
	if err != nil || resp.GetVm().GetState() != "running" || !strings.HasPrefix(resp.GetVm().GetAgent(), "answers") {
		return
	}
	name := resp.GetVm().GetName()
	fmt.Fprintf(a.stderr, "%s still runs; stop it with: banger vm stop %s\n", name, name)
}

// enterable says what to do first if the VM is in no state to be entered.
func enterable(v *bangerv1.VM) error {
	if v.GetVmmState() == "paused" {
		why := v.GetNote() // says so, and why
		if why == "" {
			why = "is paused"
		}
		return fault.New(fault.Precondition, v.GetName(), "%s", why).WithHint("banger vm start %s", v.GetName())
	}
	switch v.GetState() {
	case "running", "starting":
		return nil
	case "failed":
		why, _, _ := strings.Cut(without(v.GetFailure().GetFault().GetMessage(), v.GetName()), "\n")
		return fault.New(fault.Precondition, v.GetName(), "its last start failed: %s", why).
			WithHint("banger vm show %s says more, banger vm start %s tries again", v.GetName(), v.GetName())
	}
	return fault.New(fault.Precondition, v.GetName(), "is %s, not running", v.GetState()).
		WithHint("banger vm start %s", v.GetName())
}

// waitForSSH returns when the guest's SSH server accepts. A guest that stamped it already is not asked.
func (a *app) waitForSSH(ctx context.Context, c *client.Client, v *bangerv1.VM) error {
	for _, s := range v.GetBoot() {
		if s.GetName() == "ssh" && v.GetState() == "running" {
			return nil
		}
	}
	p := a.progress(v.GetName(), false)
	p.wait("waiting for its SSH server, at most %s", formatTook(sshWait))
	stream, err := c.DialGuest(ctx, v.GetId(), sshPort, sshWait)
	p.end()
	if err == nil {
		return stream.Close()
	}
	if fault.Is(err, fault.Timeout) {
		return fault.Wrap(err, fault.Timeout, v.GetName(), "its SSH server does not answer").
			WithHint("banger vm show %s, and its console: %s", v.GetName(), v.GetLog())
	}
	return err
}

// runSSH runs ssh as a child, so that there is somebody left to explain its end.
//
// What ssh opens by name it gets as /proc/<this process>/...: no path of the user's, however odd,
// has to survive the quoting of ssh_config(5) and of the shell that runs a ProxyCommand, the pinned
// host key needs no file that could be left behind, and the proxy is this very program even if an
// upgrade replaces it meanwhile.
func (a *app) runSSH(program string, v *bangerv1.VM, target *bangerv1.GetSSHTargetResponse, command []string) error {
	identity, err := os.Open(target.GetIdentityFile())
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, target.GetIdentityFile(), "the key that VMs accept cannot be read: %v", err).
			WithHint("banger doctor")
	}
	defer identity.Close()
	known, err := memoryFile("known_hosts", target.GetHostKeyAlias()+" "+target.GetHostKey()+"\n")
	if err != nil {
		return fault.Wrap(err, fault.Exhausted, v.GetName(), "cannot hand the host key to ssh: %v", err)
	}
	defer known.Close()

	self := "/proc/" + strconv.Itoa(os.Getpid())
	file := func(f *os.File) string { return self + "/fd/" + strconv.Itoa(int(f.Fd())) }
	args := []string{
		"-F", "none", // nothing in the user's configuration may send this somewhere else
		"-o", fmt.Sprintf("ProxyCommand=%s/exe internal ssh-proxy %s %d", self, v.GetId(), sshPort),
		"-o", "ProxyUseFdpass=yes",
		"-o", "IdentityFile=" + file(identity),
		"-o", "IdentitiesOnly=yes",
		"-o", "IdentityAgent=none",
		"-o", "PreferredAuthentications=publickey",
		"-o", "UserKnownHostsFile=" + file(known),
		"-o", "GlobalKnownHostsFile=none",
		"-o", "HostKeyAlias=" + target.GetHostKeyAlias(),
		"-o", "StrictHostKeyChecking=yes",
		"-o", "UpdateHostKeys=no",
		"-o", "CheckHostIP=no",
		"-o", "ForwardAgent=no",
		"-o", "LogLevel=ERROR",
		"-o", "ConnectTimeout=" + strconv.Itoa(int(sshWait.Seconds())), // until the server's greeting: a guest that hangs takes the connection
		"-l", target.GetUser(),
		"--", v.GetName(),
	}
	cmd := exec.Command(program, append(args, command...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.stdin, a.out, a.stderr
	// ssh runs the ProxyCommand with $SHELL, which may be anything.
	cmd.Env = append(os.Environ(), "SHELL=/bin/sh")

	// Ctrl-C belongs to ssh, which has the terminal. Caught, not ignored: a child would inherit that.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return fault.Wrap(err, fault.Unavailable, program, "cannot run ssh: %v", err)
	}
	ended := make(chan struct{})
	go func() {
		for {
			select {
			case s := <-signals:
				// The terminal sends its own to the whole group; these two come to us alone.
				if s == syscall.SIGTERM || s == syscall.SIGHUP {
					_ = cmd.Process.Signal(s)
				}
			case <-ended:
				return
			}
		}
	}()
	err = cmd.Wait()
	close(ended)
	if err == nil {
		return nil
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return fault.Wrap(err, fault.Internal, program, "lost track of ssh: %v", err)
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return passed(128 + int(status.Signal())) // as shells have it
	}
	if exit.ExitCode() == sshFailed {
		fmt.Fprintf(a.stderr, "banger: ssh ended with 255: it lost or never got its connection to %s, or the command itself ended so\n  hint: banger vm show %s\n", v.GetName(), v.GetName())
	}
	return passed(exit.ExitCode())
}

// memoryFile is a file without a name, gone with its descriptor.
func memoryFile(name, content string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteString(content); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// internalCommand holds what banger runs of itself.
func (a *app) internalCommand() *cobra.Command {
	cmd := group(&cobra.Command{Use: "internal", Short: "What banger runs of itself", Hidden: true})
	cmd.AddCommand(&cobra.Command{
		Use: "ssh-proxy ID PORT", Short: "Connect to a guest's port and pass the connection to ssh on stdout",
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			port, err := strconv.Atoi(args[1])
			if err != nil {
				return usage(cmd, "%q is no port", args[1])
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			stream, err := c.DialGuest(cmd.Context(), args[0], port, sshWait)
			if err != nil {
				return err
			}
			defer stream.Close()
			return passDescriptor(os.Stdout, stream)
		},
	}, a.unitsCommand())
	return cmd
}

// passDescriptor sends stream over the socket that ssh made our stdout (ProxyUseFdpass in
// ssh_config(5)): one byte with the descriptor.
func passDescriptor(stdout, stream *os.File) error {
	conn, err := net.FileConn(stdout)
	if err != nil {
		return fault.Wrap(err, fault.Invalid, "stdout", "is no socket: this is run by ssh with ProxyUseFdpass=yes")
	}
	defer conn.Close()
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return fault.New(fault.Invalid, "stdout", "is no unix socket: this is run by ssh with ProxyUseFdpass=yes")
	}
	_, _, err = socket.WriteMsgUnix([]byte{0}, unix.UnixRights(int(stream.Fd())), nil)
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "ssh", "is gone: %v", err)
	}
	return nil
}
