package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func (a *app) daemonLogsCommand() *cobra.Command {
	var follow bool
	tail := &lineCount{}
	cmd := &cobra.Command{
		Use: "logs", Short: "Show the daemon's log",
		Long: `Show the daemon's log: a line of text for each entry, or with --output json the entries as they are written, an object
a line. It needs no daemon. log_level in config.toml says how much is written.`,
		Example: `  banger daemon logs --tail 50
  banger daemon logs --follow
  banger daemon logs -o json | jq 'select(.level == "ERROR")'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := a.place()
			if err != nil {
				return err
			}
			ctx, cancel := a.whileRead(cmd.Context())
			defer cancel()
			return a.daemonLog(ctx, p.log(), tail.value, follow)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on with what is written, until Ctrl-C")
	f.VarP(tail, "tail", "n", "so many lines from the end (default all)")
	return cmd
}

func (a *app) daemonLog(ctx context.Context, path string, tail *int32, follow bool) error {
	// Watched before it is read: what is written in between is an event, too.
	events, err := watchDirectory(filepath.Dir(path), follow)
	if err != nil {
		return err
	}
	defer events.Close()
	defer context.AfterFunc(ctx, func() { _ = events.Close() })()
	file, err := os.Open(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !follow:
		return fault.Wrap(err, fault.NotFound, path, "no daemon has written a log yet").WithHint("banger vm list starts one")
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fault.Wrap(err, fault.Permission, path, "the log cannot be read: %v", err)
	}
	out := &logPrinter{a: a}
	if file != nil && tail != nil {
		if err := seekTail(file, int(*tail)); err != nil {
			return err
		}
	}
	buf := make([]byte, 4096)
	for {
		if file != nil {
			if _, err := io.Copy(out, file); err != nil {
				return err
			}
		}
		if !follow {
			return file.Close()
		}
		if now, err := os.Stat(path); err == nil && (file == nil || !same(file, now)) {
			// It was turned over: what is left of the old one was just read.
			if file != nil {
				_ = file.Close()
			}
			if file, err = os.Open(path); err == nil {
				continue
			}
			file = nil
		}
		if _, err := events.Read(buf); err != nil {
			if ctx.Err() != nil {
				return nil // Ctrl-C is how it ends
			}
			return fault.Wrap(err, fault.Internal, path, "cannot be watched any more: %v", err)
		}
	}
}

func same(f *os.File, now os.FileInfo) bool {
	st, err := f.Stat()
	return err == nil && os.SameFile(st, now)
}

// watchDirectory gives a file that becomes readable when something in dir is written or appears (inotify(7)). Closing it
// ends a read.
func watchDirectory(dir string, watch bool) (*os.File, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err == nil && watch {
		_, err = unix.InotifyAddWatch(fd, dir, unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVED_TO)
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, dir, "the log cannot be followed: %v", err).WithHint("banger vm list makes the directory, if it is not there yet")
	}
	return os.NewFile(uintptr(fd), "inotify"), nil
}

// seekTail goes to where the last n lines begin.
func seekTail(f *os.File, n int) error {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	const block = 32 << 10
	lines := 0
	for at := end; at > 0; {
		size := min(block, at)
		at -= size
		buf := make([]byte, size)
		if _, err := f.ReadAt(buf, at); err != nil {
			return err
		}
		for i := len(buf) - 1; i >= 0; i-- {
			if buf[i] != '\n' || at+int64(i) == end-1 && n > 0 { // the last line's own end
				continue
			}
			if lines++; lines >= n {
				_, err := f.Seek(at+int64(i)+1, io.SeekStart)
				return err
			}
		}
	}
	_, err = f.Seek(0, io.SeekStart)
	return err
}

// logPrinter prints the log's entries for people, a line each, or as they are.
type logPrinter struct {
	a    *app
	rest []byte // of a line whose end was not written yet
}

func (p *logPrinter) Write(b []byte) (int, error) {
	if p.a.json {
		return p.a.stdout.Write(b)
	}
	p.rest = append(p.rest, b...)
	out := bufio.NewWriter(p.a.stdout)
	for {
		line, rest, whole := bytes.Cut(p.rest, []byte("\n"))
		if !whole {
			return len(b), out.Flush()
		}
		p.rest = rest
		fmt.Fprintln(out, p.a.entry(line))
	}
}

// entry is one of the log, as slog's JSONHandler writes it; what is none is shown as it is (a panic of the runtime).
func (a *app) entry(line []byte) string {
	var e map[string]any
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.UseNumber()
	if err := dec.Decode(&e); err != nil {
		return string(line)
	}
	at, _ := e["time"].(string)
	if t, err := time.Parse(time.RFC3339Nano, at); err == nil {
		at = t.Local().Format("2006-01-02 15:04:05.000")
	}
	level, _ := e["level"].(string)
	message, _ := e["msg"].(string)
	for _, key := range []string{"time", "level", "msg"} {
		delete(e, key)
	}
	color := map[string]string{"ERROR": red, "WARN": yellow, "DEBUG": dim}[level]
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s", a.paint(dim, at), a.paint(color, fmt.Sprintf("%-5s", level)), message)
	for _, key := range slices.Sorted(maps.Keys(e)) {
		value, ok := e[key].(string)
		if !ok || strings.ContainsAny(value, " \"\n\t=") || value == "" {
			if text, err := asJSON(e[key], false); err == nil {
				value = strings.TrimSpace(string(text))
			}
		}
		fmt.Fprintf(&b, " %s%s", a.paint(dim, key+"="), value)
	}
	return b.String()
}
