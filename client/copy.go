package client

import (
	"context"
	"errors"
	"os"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/files"
)

// CopyOptions say what beside content, permissions and times of modification is kept.
type CopyOptions = files.Options

// CopyProgress is how far a copy has come; it may be read while it goes on.
type CopyProgress = files.Progress

// CopyResult is what was copied, and what was left out.
type CopyResult = files.Result

// CopyTo copies a file or a directory of this host to a path in a running VM, relative to /root. A
// destination that is a directory gets it under its own name; of a source that ends in "/." the
// contents go. The result counts also what was made before an error. fault.Invalid if source or
// destination do not allow it, with the side that says so in the message; otherwise as Exec.
func (c *Client) CopyTo(ctx context.Context, vmID, source, target string, o CopyOptions) (CopyResult, error) {
	return c.copy(ctx, vmID, files.Put, source, target, o)
}

// CopyFrom copies a file or a directory of a running VM to a path of this host, as CopyTo does the
// other way. Nothing is written outside of target: whatever the guest sends, names are those below the
// source, no symbolic link is followed, and setuid, setgid and sticky bits are left out.
func (c *Client) CopyFrom(ctx context.Context, vmID, source, target string, o CopyOptions) (CopyResult, error) {
	return c.copy(ctx, vmID, files.Get, source, target, o)
}

func (c *Client) copy(ctx context.Context, vmID string, do func(context.Context, files.Conn, string, string, files.Options) (files.Result, error), source, target string, o CopyOptions) (CopyResult, error) {
	stream, err := c.dialService(ctx, vmID, bangerv1.DialCopy)
	if err != nil {
		return CopyResult{}, err
	}
	r, err := do(ctx, stream, source, target, o)
	var f *files.Error
	switch {
	case err == nil:
		return r, nil
	case ctx.Err() != nil:
		return r, fault.Wrap(err, fault.CodeOf(ctx.Err()), "", "the copy was left before it was complete")
	case errors.As(err, &f) && f.Guest:
		return r, fault.New(fault.Invalid, "", "in the guest: %s", f)
	case errors.As(err, &f) && !f.Lost:
		return r, fault.New(fault.Invalid, "", "here: %s", f)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return r, fault.Wrap(err, fault.Timeout, "", "the guest took and sent nothing for %s, and the copy was left", files.Silence).
			WithHint("banger vm list shows whether the VM runs; what is complete stays, and the same command starts over")
	}
	return r, fault.Wrap(err, fault.Unavailable, "", "lost the connection to the guest before the copy was complete").
		WithHint("banger vm list shows whether the VM runs; what is complete stays, and the same command starts over")
}
