package agentd

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"runtime/debug"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/files"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
)

// copy takes files from the host, or gives it some.
func (s *Server) copy(ctx context.Context, stream net.Conn) {
	if s.guest.Files == nil {
		_ = wire.WriteAnswer(stream, errors.New("this guest copies no files"))
		return
	}
	if wire.WriteAnswer(stream, nil) != nil {
		return
	}
	stop := context.AfterFunc(ctx, func() { _ = stream.Close() })
	defer stop()
	defer debug.FreeOSMemory() // the buffers of a copy are more than all else that an agent holds
	if files.Serve(stream, s.guest.Files) != nil {
		return // the stream is over
	}
	// What was sent last must not be lost in this end being closed, with what nobody read on it.
	if stream.SetReadDeadline(time.Now().Add(partTime)) == nil {
		_, _ = io.Copy(io.Discard, stream)
	}
}

// LocalPath is a Guest's Files: relative paths are below /root, as those of commands are.
func LocalPath(path string) string {
	if filepath.IsAbs(path) {
		return path // as it is: a slash at its end means something
	}
	return "/root/" + path
}
