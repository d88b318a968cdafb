package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/operation"
)

// buildLogs are the logs of builds that run. The zero value is ready. Safe for concurrent use.
type buildLogs struct {
	mu   sync.Mutex
	byOp map[string]*buildLog
}

// maxBuildLog bounds a log, in bytes: a guest chooses how much it says.
const maxBuildLog = 64 << 20

// buildLog is the file that a build's output is kept in, and its followers.
type buildLog struct {
	path string

	mu    sync.Mutex
	file  *os.File
	size  int64
	ended bool
	next  chan struct{} // closed and replaced whenever there is more
}

// open makes the log of a build. Its name tells when and for which image; the operation's id keeps two apart.
func (b *buildLogs) open(dir, image string, op operation.Operation) (*buildLog, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fault.Wrap(err, fault.Internal, dir, "cannot be made")
	}
	path := filepath.Join(dir, buildLogName(image, op))
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, path, "cannot be made")
	}
	log := &buildLog{path: path, file: f, next: make(chan struct{})}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.byOp == nil {
		b.byOp = map[string]*buildLog{}
	}
	b.byOp[op.ID] = log
	return log, nil
}

func buildLogName(image string, op operation.Operation) string {
	return fmt.Sprintf("%s-%s-%s.log", op.CreatedAt.UTC().Format("20060102-150405"), image, op.ID)
}

// end closes a log. Its followers get the rest.
func (b *buildLogs) end(opID string) error {
	b.mu.Lock()
	log := b.byOp[opID]
	delete(b.byOp, opID)
	b.mu.Unlock()
	if log == nil {
		return nil
	}
	log.mu.Lock()
	defer log.mu.Unlock()
	log.ended = true
	close(log.next)
	return log.file.Close()
}

// Write appends to the log. What the disk has no room for is dropped: a build does not fail of its log.
func (l *buildLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended || l.size >= maxBuildLog {
		return len(p), nil
	}
	n, err := l.file.Write(p)
	if l.size += int64(n); err == nil && l.size >= maxBuildLog {
		_, _ = l.file.WriteString("\n... the rest is not kept\n")
	}
	close(l.next)
	l.next = make(chan struct{})
	return len(p), nil
}

// say appends a line of banger's own.
func (l *buildLog) say(format string, args ...any) {
	_, _ = fmt.Fprintf(l, "%s "+format+"\n", append([]any{time.Now().UTC().Format("15:04:05")}, args...)...)
}

// lines is a writer of a guest's output, of which the last line is told.
func (l *buildLog) lines(tell func(string)) *buildLines {
	return &buildLines{log: l, tell: tell, cut: lines{ends: "\n\r"}}
}

// buildLines passes output on, line by line, without anything that a terminal acts upon.
type buildLines struct {
	log  *buildLog
	tell func(string)

	mu     sync.Mutex // a command's output and errors come at once
	cut    lines
	latest string
	told   time.Time
}

func (b *buildLines) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cut.take(p, b.line)
	return len(p), nil
}

func (b *buildLines) line(raw []byte) {
	text := boot.Visible(string(bytes.TrimRight(raw, "\r\n")))
	if text == "" {
		return
	}
	b.latest = text
	_, _ = io.WriteString(b.log, text+"\n")
	// Watchers of the operation get a line now and then; all of them are in the log.
	if now := time.Now(); now.Sub(b.told) > 250*time.Millisecond {
		b.told = now
		b.tell(shortened(text, 100))
	}
}

// rest passes a last line on that does not end.
func (b *buildLines) rest() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cut.rest(b.line)
}

// last is the last line that was not empty.
func (b *buildLines) last() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return shortened(b.latest, 300)
}

func shortened(text string, most int) string {
	if r := []rune(text); len(r) > most {
		return string(r[:most-1]) + "…"
	}
	return text
}

// BuildLog sends the log of a build from its begin, and goes on with what is written until the build ends or ctx does.
// fault.NotFound if there is none.
func (s *Service) BuildLog(ctx context.Context, opID string, send func([]byte) error) error {
	s.builds.mu.Lock()
	log := s.builds.byOp[opID]
	s.builds.mu.Unlock()
	var path string
	if log != nil {
		path = log.path
	} else {
		op, err := s.ops.Get(opID)
		if err != nil {
			return err
		}
		if op.Kind != operation.ImageBuild {
			return fault.New(fault.NotFound, opID, "this operation builds no image")
		}
		path = filepath.Join(s.paths.BuildLogs(), buildLogName(op.Image, op))
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.Wrap(err, fault.NotFound, opID, "the log of this build is gone")
	}
	if err != nil {
		return fault.Wrap(err, fault.Internal, path, "cannot be read")
	}
	defer f.Close()
	buf := make([]byte, 64<<10)
	for {
		var next chan struct{}
		ended := true
		if log != nil { // before it is read: what comes after that wakes us
			log.mu.Lock()
			next, ended = log.next, log.ended
			log.mu.Unlock()
		}
		for {
			n, err := f.Read(buf)
			if n > 0 {
				if err := send(buf[:n]); err != nil {
					return err
				}
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return fault.Wrap(err, fault.Internal, path, "cannot be read")
			}
		}
		if ended {
			return nil
		}
		select {
		case <-next:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
