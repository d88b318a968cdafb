package daemon

import (
	"log/slog"
	"os"
	"sync"

	"golang.org/x/sys/unix"
	"gopkg.in/natefinch/lumberjack.v2"
)

const (
	logMegabytes = 10
	logBackups   = 3
)

// logFile is the rotated log. With stdio set, the process's stdout and stderr follow it over each
// rotation, so that what the Go runtime prints when it dies is found in the log that people look at.
type logFile struct {
	mu    sync.Mutex
	file  lumberjack.Logger
	stdio bool
	inode uint64
}

func openLog(path string, stdio bool) (*logFile, error) {
	// lumberjack opens on the first write; opening here finds out now whether it can.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	l := &logFile{file: lumberjack.Logger{Filename: path, MaxSize: logMegabytes, MaxBackups: logBackups}, stdio: stdio}
	return l, l.follow()
}

// Write appends one record.
func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := l.file.Write(p)
	if err == nil {
		err = l.follow()
	}
	return n, err
}

func (l *logFile) follow() error {
	if !l.stdio {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(l.file.Filename, &st); err != nil {
		return err
	}
	if st.Ino == l.inode {
		return nil
	}
	f, err := os.OpenFile(l.file.Filename, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for fd := 1; fd <= 2; fd++ {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return err
		}
	}
	l.inode = st.Ino
	return nil
}

// Close closes the log file.
func (l *logFile) Close() error { return l.file.Close() }

func newLogger(w *logFile, level slog.Level) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
}
