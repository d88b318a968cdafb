package console

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"regexp"
	"time"

	"golang.org/x/sys/unix"
)

// markSize is how many bytes a follower remembers of what it read last, to find its place again in a
// log that was cut back.
const markSize = 512

// cutNotice stands where a follower was slower than the log.
const cutNotice = "\nbanger: the log was cut back here\n"

// Read sends a log from its last lines on (negative: all of it), then, with follow, what is written,
// until its file is removed, which is no error, or ctx ends. It finds its place again in a log that is
// cut back meanwhile, and sleeps until something is written (inotify(7)). b is send's until it returns.
// fs.ErrNotExist if there is no log.
func Read(ctx context.Context, path string, lines int, follow bool, send func(b []byte) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r := &reader{f: f, send: send}
	var events *os.File
	if follow { // before the first look: nothing is missed
		if events, err = watch(path); err != nil {
			return err
		}
		defer events.Close()
		stop := context.AfterFunc(ctx, func() { _ = events.SetReadDeadline(time.Unix(1, 0)) })
		defer stop()
	}
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 2*Max))
	if err != nil {
		return err
	}
	r.at, r.mark = int64(len(b)), bytes.Clone(b[max(0, len(b)-markSize):])
	if lines >= 0 {
		b = LastLines(b, lines)
	}
	if len(b) > 0 {
		if err := send(b); err != nil {
			return err
		}
	}
	for follow {
		if err := r.more(); err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Nlink == 0 {
			return err
		}
		if _, err := events.Read(make([]byte, 4096)); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return err
		}
	}
	return nil
}

func watch(path string) (*os.File, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	// IN_ATTRIB comes when the last name of an open file goes.
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_MODIFY|unix.IN_ATTRIB|unix.IN_MOVE_SELF|unix.IN_DELETE_SELF); err != nil {
		return nil, errors.Join(os.NewSyscallError("inotify_add_watch", err), events.Close())
	}
	return events, nil
}

// reader follows a log.
type reader struct {
	f    *os.File
	send func([]byte) error
	at   int64  // where it goes on
	mark []byte // what stands before at
}

// more sends what was written since.
func (r *reader) more() error {
	buffer := make([]byte, markSize+64<<10)
	for {
		// Mark and news in one read: a cut between two would not be seen.
		n, err := r.f.ReadAt(buffer[:len(r.mark)+64<<10], r.at-int64(len(r.mark)))
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		news, ok := bytes.CutPrefix(buffer[:n], r.mark)
		if !ok {
			if err := r.relocate(); err != nil {
				return err
			}
			continue
		}
		if len(news) == 0 {
			return nil
		}
		if err := r.send(news); err != nil {
			return err
		}
		r.at += int64(len(news))
		r.mark = bytes.Clone(buffer[max(0, n-markSize):n])
	}
}

// relocate finds the place in a log that was cut back.
func (r *reader) relocate() error {
	b, err := io.ReadAll(io.NewSectionReader(r.f, 0, 2*Max))
	if err != nil {
		return err
	}
	if i := bytes.LastIndex(b, r.mark); i >= 0 {
		r.at = int64(i + len(r.mark))
		return nil
	}
	r.at, r.mark = 0, nil
	return r.send([]byte(cutNotice))
}

// LastLines is the end of a log: its last n lines, of which the last may have no end.
func LastLines(log []byte, n int) []byte {
	at := len(log)
	if at > 0 && log[at-1] == '\n' {
		at--
	}
	for ; n > 0; n-- {
		i := bytes.LastIndexByte(log[:at], '\n')
		if i < 0 {
			return log
		}
		at = i
	}
	if at == len(log) {
		return nil
	}
	return log[at+1:]
}

// own is how VMMs and banger begin their lines: Firecracker's logger ("2026-01-02T03:04:05.6 [id:thread]"),
// QEMU's error_report, and StartMark.
var own = regexp.MustCompile(`^(?:\d{4}-\d{2}-\d{2}T[0-9:.]+ \[|qemu-system-[a-z0-9_]+: |banger: )`)

// Own says whether a line has the form of the VMM's own, or of banger's. A guest can print such lines.
func Own(line []byte) bool { return own.Match(line) }
