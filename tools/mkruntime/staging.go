package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/kernel"
)

// stagingPrefix begins the name of the directory, within the bundle's, in which artifacts are made.
const stagingPrefix = ".new-"

// staging collects the artifacts of a bundle until they can all be put in place.
type staging struct {
	target string
	dir    string
	done   map[bundle.Role]bundle.Artifact
	staged []bundle.Role
}

func newStaging(target string) (*staging, error) {
	old, err := filepath.Glob(filepath.Join(target, stagingPrefix+"*"))
	for _, d := range old { // of a build that was killed
		err = errors.Join(err, os.RemoveAll(d))
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Permission, target, "cannot be cleaned up")
	}
	dir, err := os.MkdirTemp(target, stagingPrefix)
	if err != nil {
		return nil, fault.Wrap(err, fault.Permission, target, "cannot be written")
	}
	return &staging{target: target, dir: dir, done: map[bundle.Role]bundle.Artifact{}}, nil
}

func (s *staging) discard() { _ = os.RemoveAll(s.dir) } // the next build removes what stays

// addCached stages an artifact of the cache, unless the bundle holds it already. One whose content is
// not what it was when it was made is fault.Corrupt, and its cache entry is removed.
func (s *staging) addCached(ctx context.Context, r bundle.Role, src string, want bundle.Artifact) error {
	name := bundle.FileName(r)
	if info, err := os.Lstat(filepath.Join(s.target, name)); err == nil && info.Mode().IsRegular() && info.Size() == want.Size {
		if got, err := bundle.Describe(ctx, s.target, name); err == nil && got.SHA256 == want.SHA256 {
			s.done[r] = got
			return nil
		}
	}
	if err := s.add(ctx, r, src, 0o644); err != nil {
		return err
	}
	if s.done[r].SHA256 != want.SHA256 {
		return fault.Wrap(os.RemoveAll(filepath.Dir(src)), fault.Corrupt, src, "was damaged after it was built; it is removed").
			WithHint("run the same command again to build it anew")
	}
	return nil
}

func (s *staging) add(ctx context.Context, r bundle.Role, src string, mode fs.FileMode) error {
	name := bundle.FileName(r)
	sum, err := placeFile(ctx, src, filepath.Join(s.dir, name), mode)
	if err != nil {
		return err
	}
	sum.Path = name
	s.done[r] = sum
	s.staged = append(s.staged, r)
	return nil
}

// keep describes an artifact that somebody else put into the bundle.
func (s *staging) keep(ctx context.Context, r bundle.Role) error {
	a, err := bundle.Describe(ctx, s.target, bundle.FileName(r))
	s.done[r] = a
	return err
}

// addAgent stages the guest program and the initrd that carries it, made from an older initrd of ours.
func (s *staging) addAgent(ctx context.Context, o options, initrd string) error {
	agent := filepath.Join(s.dir, bundle.FileName(bundle.Agent))
	if err := buildAgent(ctx, o, agent); err != nil {
		return err
	}
	program, err := os.ReadFile(agent)
	if err != nil {
		return err
	}
	old, err := os.ReadFile(initrd)
	if err != nil {
		return fault.Wrap(err, fault.NotFound, initrd, "cannot be read").WithHint("%s", bundle.Repair(s.target))
	}
	renewed, err := kernel.RegenerateInitrd(old, program, initrd)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.dir, bundle.FileName(bundle.Initrd)), renewed, 0o644); err != nil {
		return fault.Wrap(err, fault.Exhausted, initrd, "cannot be written")
	}
	for _, r := range []bundle.Role{bundle.Agent, bundle.Initrd} {
		a, err := bundle.Describe(ctx, s.dir, bundle.FileName(r))
		if err != nil {
			return err
		}
		s.done[r] = a
		s.staged = append(s.staged, r)
	}
	return nil
}

// commit makes the staged files durable, renames them into the bundle, sees to the SSH key, and
// writes bundle.json.
func (s *staging) commit(b *bundle.Bundle) error {
	for _, r := range s.staged {
		f, err := os.Open(filepath.Join(s.dir, bundle.FileName(r)))
		if err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return fault.Wrap(err, fault.Exhausted, bundle.FileName(r), "cannot be written")
		}
	}
	for _, r := range s.staged {
		if err := os.Rename(filepath.Join(s.dir, bundle.FileName(r)), filepath.Join(s.target, bundle.FileName(r))); err != nil {
			return fault.Wrap(err, fault.Permission, s.target, "%s cannot be put in place", bundle.FileName(r))
		}
	}
	if err := bundle.SyncDir(s.target); err != nil {
		return err
	}
	if err := bundle.EnsureSSHKey(s.target); err != nil {
		return err
	}
	s.done[bundle.SSHKey] = bundle.Artifact{Path: bundle.FileName(bundle.SSHKey)}
	b.Artifacts = s.done
	return b.Write(s.target)
}

// placeFile copies src to dst, sharing its blocks where the filesystem can, else leaving holes
// where src has holes or zeros, and gives size and checksum of what is there now.
func placeFile(ctx context.Context, src, dst string, mode fs.FileMode) (bundle.Artifact, error) {
	in, err := os.Open(src)
	if err != nil {
		return bundle.Artifact{}, fault.Wrap(err, fault.NotFound, src, "cannot be read")
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_RDWR|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return bundle.Artifact{}, fault.Wrap(err, fault.Permission, dst, "cannot be written")
	}
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil {
		if err := out.Close(); err != nil {
			return bundle.Artifact{}, err
		}
		return bundle.Describe(ctx, filepath.Dir(dst), filepath.Base(dst))
	}
	sum, n, err := sparseCopy(ctx, in, out)
	if err := errors.Join(err, out.Close()); err != nil {
		if ctx.Err() != nil {
			return bundle.Artifact{}, ctx.Err()
		}
		return bundle.Artifact{}, fault.Wrap(err, fault.Exhausted, dst, "cannot be written")
	}
	return bundle.Artifact{Path: filepath.Base(dst), Size: n, SHA256: sum}, nil
}

// holeSize is the granularity at which zeros become holes, in bytes.
const holeSize = 64 << 10

// sparseCopy copies all of in and hashes it on the way, leaving holes for zeros.
func sparseCopy(ctx context.Context, in io.Reader, out *os.File) (sum string, n int64, err error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	zero := strings.Repeat("\x00", holeSize)
	for {
		if err := ctx.Err(); err != nil {
			return "", n, err
		}
		k, err := io.ReadFull(in, buf)
		h.Write(buf[:k])
		for at := 0; at < k; at += holeSize {
			piece := buf[at:min(at+holeSize, k)]
			if string(piece) == zero[:len(piece)] {
				continue
			}
			if _, err := out.WriteAt(piece, n+int64(at)); err != nil {
				return "", n, err
			}
		}
		n += int64(k)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return hex.EncodeToString(h.Sum(nil)), n, out.Truncate(n)
		}
		if err != nil {
			return "", n, err
		}
	}
}
