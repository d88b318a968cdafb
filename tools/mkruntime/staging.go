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
	"syscall"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/kernel"
)

// stagingInfix is in the name of the directory in which a bundle is put together, beside the bundle's own, on
// the same filesystem: .runtime.new-123 for runtime.
const stagingInfix = ".new-"

// staging is the next state of a bundle: a directory beside the bundle's own, which takes its place in one step. Until
// then the bundle is what it was, afterwards it is the new one as a whole, also after a crash and for whoever reads it
// meanwhile. One process at a time changes a bundle.
type staging struct {
	target string // the bundle's directory; it may not exist yet
	dir    string
	lock   *os.File
	done   map[bundle.Role]bundle.Artifact
	staged []bundle.Role

	keyless bool // for all users of the system, who have a key each (bundle.KeyFor)
}

// newStaging begins a change of the bundle in target, and waits while another process changes it. A link to a
// bundle that lies elsewhere stays a link.
func newStaging(ctx context.Context, p *progress, target string) (_ *staging, err error) {
	if info, err := os.Lstat(target); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		if target, err = filepath.EvalSymlinks(target); err != nil {
			return nil, fault.Wrap(err, fault.NotFound, target, "is a link to a place that does not exist").WithHint("make that directory, or remove the link")
		}
	}
	parent := filepath.Dir(target)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return nil, fault.Wrap(err, fault.Permission, parent, "cannot be made")
	}
	// The directory above is locked and not a file of ours: it stays the same one, and nothing is left behind.
	lock, err := os.Open(parent)
	if err != nil {
		return nil, fault.Wrap(err, fault.Permission, parent, "cannot be read")
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	if err := waitForLock(ctx, p, lock, "waiting for another change of "+target); err != nil {
		return nil, err
	}
	old, err := filepath.Glob(filepath.Join(parent, stagingPrefix(target)+"*"))
	for _, d := range old { // of a process that was killed
		err = errors.Join(err, os.RemoveAll(d))
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Permission, parent, "cannot be cleaned up")
	}
	dir, err := os.MkdirTemp(parent, stagingPrefix(target))
	if err != nil {
		return nil, fault.Wrap(err, fault.Permission, parent, "cannot be written")
	}
	return &staging{target: target, dir: dir, lock: lock, done: map[bundle.Role]bundle.Artifact{}}, nil
}

func stagingPrefix(target string) string { return "." + filepath.Base(target) + stagingInfix }

// discard ends the change. After commit there is nothing left to throw away.
func (s *staging) discard() {
	_ = os.RemoveAll(s.dir) // the next change removes what stays
	_ = s.lock.Close()
}

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

// stampSuffix ends the name of the file beside the default image that says of which packages.apt it was made: its SHA256.
const stampSuffix = ".packages.sha256"

// stamp stages that file, for the list that is staged.
func (s *staging) stamp() error {
	file := filepath.Join(s.dir, bundle.FileName(bundle.RootFS)+stampSuffix)
	if err := os.WriteFile(file, []byte(s.done[bundle.Packages].SHA256+"\n"), 0o644); err != nil {
		return fault.Wrap(err, fault.Exhausted, file, "cannot be written")
	}
	return nil
}

// addAgent stages the guest program and the initrd that carries it, made from an older initrd of ours, and the
// guests' SSH server.
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
	staged := []bundle.Role{bundle.Agent, bundle.Initrd}
	has, err := buildSSHD(ctx, o, filepath.Join(s.dir, bundle.FileName(bundle.GuestSSHD)))
	if err != nil {
		return err
	}
	if has {
		staged = append(staged, bundle.GuestSSHD)
	} else {
		delete(s.done, bundle.GuestSSHD) // one of another guest program
	}
	for _, r := range staged {
		a, err := bundle.Describe(ctx, s.dir, bundle.FileName(r))
		if err != nil {
			return err
		}
		s.done[r] = a
		s.staged = append(s.staged, r)
	}
	return nil
}

// commit completes the directory (what the bundle has and the change does not concern, the SSH key, bundle.json),
// makes it durable, and puts it in place of the bundle's.
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
	if err := s.carry(s.target, s.dir); err != nil {
		return err
	}
	if !s.keyless {
		if err := bundle.EnsureSSHKey(s.dir); err != nil {
			return err
		}
		s.done[bundle.SSHKey] = bundle.Artifact{Path: bundle.FileName(bundle.SSHKey)}
	}
	b.Artifacts = s.done
	if err := b.Write(s.dir); err != nil {
		return err
	}
	return s.swap()
}

// swap exchanges the two directories, so that there is no moment without a bundle.
func (s *staging) swap() error {
	mode, parent := fs.FileMode(0o755), filepath.Dir(s.target)
	old, err := os.Stat(s.target)
	exists := err == nil
	if exists {
		mode = old.Mode().Perm()
		if sys, ok := old.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 {
			if err := os.Chown(s.dir, int(sys.Uid), int(sys.Gid)); err != nil {
				return fault.Wrap(err, fault.Permission, s.dir, "cannot be given to the owner of %s", s.target)
			}
		}
	}
	if err := os.Chmod(s.dir, mode); err != nil {
		return err
	}
	if !exists {
		if err := os.Rename(s.dir, s.target); err != nil {
			return fault.Wrap(err, fault.Permission, s.target, "cannot be put in place")
		}
		return bundle.SyncDir(parent)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, s.dir, unix.AT_FDCWD, s.target, unix.RENAME_EXCHANGE); err != nil {
		return fault.Wrap(err, fault.Unsupported, s.target, "cannot be replaced as a whole").
			WithHint("it must not be a mount point, and its filesystem must exchange directories (ext4, xfs, btrfs, tmpfs and overlayfs do): choose a directory below it")
	}
	if err := bundle.SyncDir(parent); err != nil {
		return err
	}
	// What somebody put there between the first look and the exchange.
	return s.carry(s.dir, s.target)
}

// carry brings what lies in one directory and not in the other there, as links to the same files.
func (s *staging) carry(from, to string) error {
	err := filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			if p == from && errors.Is(err, fs.ErrNotExist) {
				return nil // the first bundle here
			}
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil || rel == "." {
			return err
		}
		dst := filepath.Join(to, rel)
		if d.IsDir() {
			info, err := d.Info()
			if err != nil {
				return err
			}
			err = os.Mkdir(dst, info.Mode().Perm())
			if errors.Is(err, fs.ErrExist) {
				if there, err := os.Lstat(dst); err == nil && !there.IsDir() {
					return fs.SkipDir // an artifact where a directory was
				}
				return nil
			}
			return err
		}
		err = os.Link(p, dst)
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		if errors.Is(err, fs.ErrPermission) && d.Type().IsRegular() { // somebody else's file, which no link may name (proc(5), protected_hardlinks)
			info, err := d.Info()
			if err != nil {
				return err
			}
			_, err = placeFile(context.Background(), p, dst, info.Mode().Perm())
			return err
		}
		return err
	})
	if err != nil {
		return fault.Wrap(err, fault.Permission, s.target, "holds what cannot be taken over into the new bundle")
	}
	return nil
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
