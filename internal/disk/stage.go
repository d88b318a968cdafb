package disk

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Progress is told how many bytes of a total have been copied or checked; what is the word for it. It is
// called often and must return at once. nil is nobody.
type Progress func(what string, done, total int64)

func (p Progress) tell(what string, done, total int64) {
	if p != nil {
		p(what, done, total)
	}
}

// Staged is content that lies in the directory of captured content, complete, and has no name there yet. So what
// takes long is over before anything is locked, recorded or replaced. Exactly one goroutine uses it.
type Staged struct {
	ID   string // of its bytes, as Captured.ID
	Size int64
	Copied

	dir   string
	out   *temp
	taken bool // out is the caller's file, not a copy
}

// Stage copies a file into dir, which is made if need be, as Capture does, without giving it its name yet.
// Discard it. Errors are Capture's.
func Stage(ctx context.Context, src, dir string, progress Progress) (*Staged, error) {
	in, err := openSource(src)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	fi, err := in.Stat()
	if err != nil {
		return nil, wrap(err, src)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, wrap(err, dir)
	}
	out, err := newTemp(dir)
	if err != nil {
		return nil, err
	}
	s := &Staged{Size: fi.Size(), dir: dir, out: out}
	if s.Copied, err = copyInto(ctx, in, out.File, progress); err == nil {
		// The copy is hashed, not the source: what is kept is what was looked at.
		s.ID, err = contentID(ctx, out.File, s.Size, progress)
	}
	if err != nil {
		out.discard()
		return nil, wrap(err, filepath.Join(dir, "x"))
	}
	return s, nil
}

// StageOwn is Stage for a file that the caller made and that nobody writes any more: Publish moves it, instead of a
// copy, if it lies on the filesystem of dir. Discard leaves it where it is.
func StageOwn(ctx context.Context, path, dir string, progress Progress) (*Staged, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, wrap(err, dir)
	}
	f, err := openSource(path)
	if err != nil {
		return nil, err
	}
	same, err := sameFilesystem(f, dir)
	if err == nil && !same {
		if err := f.Close(); err != nil {
			return nil, wrap(err, path)
		}
		return Stage(ctx, path, dir, progress)
	}
	s := &Staged{dir: dir, out: &temp{File: f, published: true}, taken: true, Copied: Copied{Way: Present}}
	var id identity
	if err == nil {
		id, err = identify(f)
		s.Size = id.size
	}
	if err == nil {
		s.ID, err = contentID(ctx, f, s.Size, progress)
	}
	if err != nil {
		s.Discard()
		return nil, wrap(err, path)
	}
	return s, nil
}

func sameFilesystem(f *os.File, dir string) (bool, error) {
	var a, b unix.Stat_t
	if err := errors.Join(unix.Fstat(int(f.Fd()), &a), unix.Stat(dir, &b)); err != nil {
		return false, err
	}
	return a.Dev == b.Dev, nil
}

// Path is where the content lies until it is published.
func (s *Staged) Path() string { return s.out.Name() }

// Publish gives the content its name, dir/<ID>, 0400, and makes it durable. If the content is there already, that
// is returned and nothing is changed.
func (s *Staged) Publish() (Captured, error) {
	defer s.Discard()
	if have, ok := present(s.dir, s.ID, s.Size); ok {
		if s.taken {
			return have, wrap(os.Remove(s.out.Name()), s.out.Name())
		}
		return have, nil
	}
	c := Captured{ID: s.ID, Path: filepath.Join(s.dir, s.ID), Size: s.Size, Copied: s.Copied}
	if err := s.out.Chmod(0o400); err != nil {
		return Captured{}, wrap(err, c.Path)
	}
	if err := s.out.publish(c.Path); err != nil {
		if have, ok := present(s.dir, s.ID, s.Size); ok && fault.Is(err, fault.Exists) {
			return have, nil // another capture of the same content was quicker
		}
		return Captured{}, err
	}
	return c, nil
}

// Discard removes a copy that was not published. It is for defer, and may be called twice.
func (s *Staged) Discard() {
	if s.out != nil {
		s.out.discard()
		s.out = nil
	}
}
