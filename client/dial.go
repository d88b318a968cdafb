package client

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// DialGuest opens a stream to a TCP port on a guest's loopback, waiting up to wait until something
// listens there (0: no wait beyond a connection attempt). The file is a connected socket: the
// guest's own where the VMM has vsock, so that the stream outlives the daemon, else one to the
// daemon, which copies. Close it when done; it is blocking and may be handed to another process.
func (c *Client) DialGuest(ctx context.Context, vmID string, port int, wait time.Duration) (*os.File, error) {
	return c.dialStream(ctx, bangerv1.DialRequest{VMID: vmID, Port: port, Wait: wait > 0, WaitMS: wait.Milliseconds()})
}

func (c *Client) dialStream(ctx context.Context, r bangerv1.DialRequest) (*os.File, error) {
	// The dial socket starts no daemon, and an API call does.
	if _, err := c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{}); err != nil {
		return nil, err
	}
	generic, err := c.connect(ctx, bangerv1.DialSocketName)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, bangerv1.DialSocketName, "cannot connect to the daemon's socket for guest streams").
			WithHint("banger daemon status")
	}
	conn := generic.(*net.UnixConn) // DialContext of network unix documents this type
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	line, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(append(line, '\n')); err != nil {
		return nil, streamFault(ctx, err)
	}
	answer, descriptor, err := readAnswer(conn)
	if err != nil {
		return nil, streamFault(ctx, err)
	}
	if answer.Fault != nil {
		return nil, FromFault(answer.Fault)
	}
	if answer.Descriptor {
		if descriptor == nil {
			return nil, fault.New(fault.Internal, "", "the daemon's answer came without its descriptor")
		}
		return descriptor, nil
	}
	if !stop() {
		return nil, streamFault(ctx, ctx.Err())
	}
	f, err := conn.File()
	if err != nil {
		return nil, fault.Wrap(err, fault.Exhausted, "", "cannot keep the stream's descriptor")
	}
	return f, nil
}

func streamFault(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	code := fault.CodeOf(err)
	if code == fault.Internal {
		code = fault.Unavailable
	}
	return fault.Wrap(err, code, "", "lost the connection to the daemon").WithHint("banger daemon status")
}

// readAnswer reads one line, a byte at a time: what follows it belongs to the stream. A descriptor
// comes with the first byte.
func readAnswer(conn *net.UnixConn) (answer bangerv1.DialAnswer, descriptor *os.File, err error) {
	defer func() {
		if err != nil && descriptor != nil {
			_ = descriptor.Close()
			descriptor = nil
		}
	}()
	line := make([]byte, 0, 256)
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := conn.ReadMsgUnix(b[:], oob)
		if err != nil {
			return answer, descriptor, err
		}
		if oobn > 0 && descriptor == nil {
			if descriptor, err = received(oob[:oobn]); err != nil {
				return answer, descriptor, err
			}
		}
		if n == 0 || b[0] == '\n' || len(line) >= bangerv1.MaxDialLine {
			break
		}
		line = append(line, b[0])
	}
	return answer, descriptor, json.Unmarshal(line, &answer)
}

func received(oob []byte) (*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil || len(fds) == 0 {
			continue
		}
		// net sets MSG_CMSG_CLOEXEC: no child can inherit them.
		for _, extra := range fds[1:] {
			_ = unix.Close(extra)
		}
		return os.NewFile(uintptr(fds[0]), "guest stream"), nil
	}
	return nil, nil
}
