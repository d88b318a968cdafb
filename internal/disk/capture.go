package disk

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"os"
	"path/filepath"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Captured is an artifact that was taken in. ID is the SHA-256 of its bytes (64 hex digits), so that
// it can be compared with the checksum of a bundle and with sha256sum.
type Captured struct {
	ID   string
	Path string
	Size int64
	Copied
}

// Capture takes a file in by content: dir/<ID>, 0400, which nobody changes after that. Whatever happens
// to src later, VMs keep what they were made from. dir is made if need be.
//
// want is the expected ID, or "". If it is given and captured already, src is not read. If the content
// is captured already, that is returned and nothing is changed.
//
// fault.Corrupt if the content is not want's, fault.Busy if src changes meanwhile, NotFound, Exhausted.
func Capture(ctx context.Context, src, dir, want string) (Captured, error) {
	if want != "" {
		in, err := openSource(src)
		if err != nil {
			return Captured{}, err
		}
		fi, err := in.Stat()
		if err := errors.Join(err, in.Close()); err != nil {
			return Captured{}, wrap(err, src)
		}
		if c, ok := present(dir, want, fi.Size()); ok {
			return c, nil
		}
	}
	s, err := Stage(ctx, src, dir, nil)
	if err != nil {
		return Captured{}, err
	}
	defer s.Discard()
	if want != "" && s.ID != want {
		return Captured{}, fault.New(fault.Corrupt, src, "is damaged: its SHA-256 is %s, the bundle says %s", s.ID, want).
			WithHint("build the runtime bundle again: make runtime")
	}
	return s.Publish()
}

func present(dir, id string, size int64) (Captured, bool) {
	path := filepath.Join(dir, id)
	fi, err := os.Lstat(path)
	if err != nil || !fi.Mode().IsRegular() || fi.Size() != size {
		return Captured{}, false
	}
	return Captured{ID: id, Path: path, Size: size, Copied: Copied{Way: Present}}, true
}

// ContentID is the SHA-256 of a file, as Capture computes it.
func ContentID(ctx context.Context, path string) (string, error) {
	f, err := openSource(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", wrap(err, path)
	}
	id, err := contentID(ctx, f, fi.Size(), nil)
	return id, wrap(err, path)
}

// contentID hashes size bytes of f. Holes are hashed from memory instead of being read.
func contentID(ctx context.Context, f *os.File, size int64, progress Progress) (string, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	var done int64
	err := extents(f, size, func(offset, length int64) error {
		if err := hashZeros(ctx, h, offset-done); err != nil {
			return err
		}
		for end := offset + length; offset < end; {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n, err := f.ReadAt(buf[:min(end-offset, int64(len(buf)))], offset)
			if n == 0 {
				return errors.Join(err, io.ErrUnexpectedEOF)
			}
			h.Write(buf[:n])
			offset += int64(n)
			progress.tell("checked", offset, size)
		}
		done = offset
		return nil
	})
	if err == nil {
		err = hashZeros(ctx, h, size-done)
	}
	return hex.EncodeToString(h.Sum(nil)), err
}

var zeros [1 << 20]byte

func hashZeros(ctx context.Context, h hash.Hash, n int64) error {
	for ; n > 0; n -= min(n, int64(len(zeros))) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h.Write(zeros[:min(n, int64(len(zeros)))])
	}
	return nil
}
