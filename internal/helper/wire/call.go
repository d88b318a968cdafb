package wire

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// answerTime bounds one call: the helper's own bound for a verb, and something for the way.
const answerTime = 35 * time.Second

// Call asks the helper at a socket one thing. Its faults are the helper's; fault.Unavailable if there is no
// helper, fault.Permission if it is another user's, fault.VersionSkew if it is of another revision, each with what to
// type. ctx ends the wait, not always the work.
func Call(ctx context.Context, socket string, r Request) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	var answer Answer
	err := talk(ctx, socket, r, func(a Answer) bool { answer = a; return false })
	return answer, err
}

// Stream asks for something that is answered again and again, and calls each for every answer until ctx ends, which
// is no error.
func Stream(ctx context.Context, socket string, r Request, each func()) error {
	err := talk(ctx, socket, r, func(Answer) bool { each(); return true })
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// talk hands on the answers until it is told that there will be no more.
func talk(ctx context.Context, socket string, r Request, more func(Answer) bool) error {
	r.Revision = Revision
	conn, hangUp, err := connect(ctx, socket)
	if err != nil {
		return err
	}
	defer hangUp()
	// A helper that refuses a caller answers without having read anything: what it says counts more than that
	// the request could not be sent.
	sent := Write(conn, r)
	for {
		a, err := ReadAnswer(conn)
		if err := judge(ctx, r, a, err, sent); err != nil {
			return err
		}
		if !more(a) {
			return nil
		}
	}
}

// connect reaches a helper. What is under way on the connection ends with ctx, or when it is hung up.
func connect(ctx context.Context, socket string) (conn *net.UnixConn, hangUp func(), err error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, nil, unreachable(ctx, socket, err)
	}
	conn = c.(*net.UnixConn) // as the network is
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	return conn, func() { stop(); _ = conn.Close() }, nil
}

// judge says what an answer comes to: err is what reading it came to, sent what sending the request did.
func judge(ctx context.Context, r Request, a Answer, err, sent error) error {
	switch {
	case ctx.Err() != nil:
		return fault.Wrap(context.Cause(ctx), fault.CodeOf(ctx.Err()), Subject, "it did not answer %s in time", r.Verb)
	case err != nil && !isFault(err):
		if errors.Is(err, io.EOF) && sent != nil {
			err = sent
		}
		return fault.Wrap(err, fault.Unavailable, Subject, "it hung up").WithHint("sudo journalctl -u 'banger-helper@*' says why")
	case a.Revision != Revision && r.Verb != Version:
		return Skew(a)
	}
	return err
}

func isFault(err error) bool {
	var f *fault.Error
	return errors.As(err, &f)
}

// Skew is the fault for a helper that answers so, and is of another revision than this program.
func Skew(a Answer) error {
	return fault.New(fault.VersionSkew, Subject, "the one that is installed (%s, revision %d) does not fit this banger (revision %d)", a.Release, a.Revision, Revision).
		WithHint("%s", InstallCommand())
}

func unreachable(ctx context.Context, socket string, err error) error {
	switch {
	case ctx.Err() != nil:
		return fault.Wrap(err, fault.CodeOf(ctx.Err()), Subject, "it could not be reached in time").
			WithHint("sudo systemctl restart banger-helper@%d.socket", os.Geteuid())
	case errors.Is(err, fs.ErrNotExist):
		return fault.Wrap(err, fault.Unavailable, Subject, "it is not installed for user %d", os.Geteuid()).WithHint("%s", InstallCommand())
	case errors.Is(err, fs.ErrPermission):
		return fault.Wrap(err, fault.Permission, Subject, "%s is not for user %d", socket, os.Geteuid()).WithHint("%s", InstallCommand())
	case errors.Is(err, unix.ECONNREFUSED):
		return fault.Wrap(err, fault.Unavailable, Subject, "nobody listens at %s", socket).
			WithHint("sudo systemctl restart banger-helper@%d.socket", os.Geteuid())
	}
	return fault.Wrap(err, fault.Unavailable, Subject, "it cannot be reached").WithHint("%s", InstallCommand())
}

// probeTime bounds a look at whether there is a helper: it may have to be started.
const probeTime = 5 * time.Second

// Probe asks a helper which it is. fault.VersionSkew if it is of another revision; otherwise the faults are Call's.
func Probe(ctx context.Context, socket string) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	a, err := Call(ctx, socket, Request{Verb: Version})
	if err == nil && a.Revision != Revision {
		err = Skew(a)
	}
	return a, err
}
