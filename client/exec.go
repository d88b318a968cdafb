package client

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/exec"
)

// Command is what Exec runs: a program with arguments (no shell), what is added to the environment of
// a log-in, a working directory, a user (name or number, ":group" may follow; empty: root), and whether
// it has a terminal of its own. Paths and names are the guest's.
type Command = exec.Request

// CommandStreams are what a command is connected to here. Without Stdin its input is empty. Signals are
// passed to it by number.
type CommandStreams = exec.Streams

// CommandStatus is how a command ended; its Exit is the exit code that a shell would have for it.
type CommandStatus = exec.Status

// TerminalSize is a terminal's size in characters.
type TerminalSize = exec.Size

// Exec runs a command in a running VM through its agent, without SSH, and returns when it has ended and
// its output is written. If ctx ends, or this process, the command gets SIGHUP, and is killed if it does
// not go. Where the VMM has vsock the command outlives the daemon, elsewhere the daemon's end is taken
// as this process's. fault.Unavailable if the guest or the daemon is lost on the way, fault.Internal if its output cannot
// be written here, fault.VersionSkew if the VM's agent is of a version that cannot do it.
func (c *Client) Exec(ctx context.Context, vmID string, command Command, s CommandStreams) (CommandStatus, error) {
	if _, err := command.Encode(); err != nil {
		return CommandStatus{}, fault.Wrap(err, fault.Invalid, "", "the command cannot be sent").
			WithHint("give it what is long as its input, or as a file that `banger vm cp` brings there")
	}
	stream, err := c.dialService(ctx, vmID, bangerv1.DialExec)
	if err != nil {
		return CommandStatus{}, err
	}
	status, err := exec.Run(ctx, stream, command, s)
	switch {
	case err == nil:
		return status, nil
	case ctx.Err() != nil:
		return status, fault.Wrap(err, fault.CodeOf(ctx.Err()), "", "the command was left before it ended")
	case errors.Is(err, exec.ErrLost):
		return status, fault.Wrap(err, fault.Unavailable, "", "lost the connection to the guest before the command ended").
			WithHint("banger vm list shows whether the VM runs; where the daemon carries the stream, its end ends the command")
	case errors.Is(err, exec.ErrOutput):
		return status, fault.Wrap(err, fault.Internal, "", "the command ended, but not all that it printed could be written here")
	}
	return status, fault.Wrap(err, fault.Unavailable, "", "the command was cut off")
}

// dialService opens a stream of a service of a guest's agent. Its reads and writes end with its Close.
func (c *Client) dialService(ctx context.Context, vmID, service string) (*os.File, error) {
	return c.polled(c.dialStream(ctx, bangerv1.DialRequest{VMID: vmID, Service: service}))
}

// polled gives a stream as a file of its own that the runtime polls, whatever mode the descriptor came
// in: only then does Close end a read.
func (*Client) polled(f *os.File, err error) (*os.File, error) {
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Exhausted, "", "cannot keep the stream's descriptor")
	}
	return os.NewFile(uintptr(fd), "guest stream"), nil
}
