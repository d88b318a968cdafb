package containerinit

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
)

// boundedLog is a file that is put aside when it is full. Safe for concurrent use.
type boundedLog struct {
	path string
	most int64

	mu   sync.Mutex
	f    *os.File
	size int64
}

func openLog(path string, most int64) (*boundedLog, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	l := &boundedLog{path: path, most: most}
	return l, l.open()
}

func (l *boundedLog) open() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.f, l.size = f, st.Size()
	return nil
}

// Write appends. It says that all was written even where the disk is full: a command must not end, or wait,
// because its log cannot be kept.
func (l *boundedLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size+int64(len(b)) > l.most && l.size > 0 {
		// If it cannot be put aside it is begun anew: the bound counts.
		if os.Rename(l.path, l.path+".1") != nil {
			_ = os.Truncate(l.path, 0)
		}
		_ = l.f.Close()
		if err := l.open(); err != nil {
			l.f, l.size = nil, 0
		}
	}
	if l.f == nil {
		if l.open() != nil {
			return len(b), nil
		}
	}
	n, _ := l.f.Write(b)
	l.size += int64(n)
	return len(b), nil
}

// Close ends the log.
func (l *boundedLog) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	return l.f.Close()
}
