package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// pack writes a bundle's artifacts to one archive and prints its checksum. The same artifacts make the same archive,
// bit by bit, whenever and wherever it is packed by a program built with the same Go. The SSH key is left out unless it is asked for.
func pack(ctx context.Context, p *progress, o options) (err error) {
	b, err := bundle.Load(o.runtime)
	if err != nil {
		return err
	}
	file := o.to
	if file == "" {
		file = filepath.Join(filepath.Dir(o.runtime), "dist", "banger-runtime.tar.gz")
	}
	p.begin("checking the bundle")
	if err := b.Verify(ctx); err != nil {
		return err
	}
	p.begin("packing %s", file)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return fault.Wrap(err, fault.Permission, file, "cannot be written")
	}
	out, err := os.CreateTemp(filepath.Dir(file), stagingPrefix(file))
	if err != nil {
		return fault.Wrap(err, fault.Permission, file, "cannot be written")
	}
	defer func() {
		if err != nil {
			_ = os.Remove(out.Name())
		}
	}()
	h := sha256.New()
	gz, err := gzip.NewWriterLevel(io.MultiWriter(out, h), gzip.BestSpeed)
	if err != nil {
		return err
	}
	tw := tar.NewWriter(gz)
	names := []string{bundle.ManifestName}
	for _, r := range append(bundle.Required(), bundle.Optional()...) {
		if a, ok := b.Artifacts[r]; ok && (r != bundle.SSHKey || o.withKey) {
			names = append(names, a.Path)
		}
	}
	for _, name := range names {
		p.note(name)
		if err := packOne(ctx, tw, o.runtime, name); err != nil {
			return err
		}
	}
	if err := errors.Join(tw.Close(), gz.Close(), out.Chmod(0o644), out.Sync(), out.Close()); err != nil {
		return fault.Wrap(err, fault.Exhausted, file, "cannot be written")
	}
	if err := os.Rename(out.Name(), file); err != nil {
		return err
	}
	p.end()
	fmt.Printf("%s  %s\n", hex.EncodeToString(h.Sum(nil)), file)
	return nil
}

// modeOf is the mode of a bundle's file, whatever it is on the disk.
func modeOf(name string) fs.FileMode {
	switch name {
	case bundle.FileName(bundle.Agent), bundle.FileName(bundle.Firecracker), bundle.FileName(bundle.Jailer), bundle.FileName(bundle.GuestSSHD):
		return 0o755
	case bundle.FileName(bundle.SSHKey):
		return 0o600
	}
	return 0o644
}

func packOne(ctx context.Context, tw *tar.Writer, dir, name string) error {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	// Nothing of this machine but the content: no owner, no time, no umask.
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: int64(modeOf(name)), Size: info.Size(), ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for {
		n, err := f.Read(buf)
		if _, err := tw.Write(buf[:n]); err != nil {
			return err
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
	}
}

// install copies a bundle to where the installed programs look for it. A key that is there stays;
// where there is none the source's goes along, so that VMs made before can be entered. A shared one has no key:
// each of its users makes their own.
func install(ctx context.Context, p *progress, o options) error {
	if o.to == "" {
		return fault.New(fault.Invalid, "-to", "is missing")
	}
	b, err := bundle.Load(o.runtime)
	if err != nil {
		return err
	}
	if err := b.Check(); err != nil {
		return err
	}
	p.begin("installing the runtime bundle in %s", o.to)
	s, err := newStaging(ctx, p, o.to)
	if err != nil {
		return err
	}
	defer s.discard()
	key := bundle.FileName(bundle.SSHKey)
	s.keyless = o.shared
	if !o.shared && !fileExists(filepath.Join(o.to, key)) {
		if _, err := placeFile(ctx, b.Path(bundle.SSHKey), filepath.Join(s.dir, key), 0o600); err != nil {
			return err
		}
	}
	for _, r := range append(bundle.Required(), bundle.Optional()...) {
		a, ok := b.Artifacts[r]
		if !ok || r == bundle.SSHKey {
			continue
		}
		p.note(a.Path)
		if err := s.add(ctx, r, b.Path(r), modeOf(bundle.FileName(r))); err != nil {
			return err
		}
		if s.done[r].SHA256 != a.SHA256 {
			return fault.New(fault.Corrupt, b.Path(r), "is damaged: its checksum is not that of the bundle's %s", r).WithHint("%s", bundle.Repair(o.runtime))
		}
	}
	if err := s.stamp(); err != nil {
		return err
	}
	return s.commit(b)
}

// uninstall removes a bundle from where install put it, but for the SSH key, by which VMs that are left can still be entered, and
// for what somebody else put there. Without a bundle there is nothing to do.
func uninstall(ctx context.Context, p *progress, o options) error {
	if o.to == "" {
		return fault.New(fault.Invalid, "-to", "is missing")
	}
	if !fileExists(o.to) {
		return nil
	}
	s, err := newStaging(ctx, p, o.to) // for its lock
	if err != nil {
		return err
	}
	defer s.discard()
	names := []string{bundle.ManifestName, bundle.FileName(bundle.RootFS) + stampSuffix} // bundle.json first: what is left is no bundle
	for _, r := range append(bundle.Required(), bundle.Optional()...) {
		if r != bundle.SSHKey {
			names = append(names, bundle.FileName(r))
		}
	}
	for _, name := range names {
		if err := os.Remove(filepath.Join(s.target, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fault.Wrap(err, fault.Permission, filepath.Join(s.target, name), "cannot be removed")
		}
	}
	left, err := os.ReadDir(s.target)
	if err != nil {
		return err
	}
	if len(left) == 0 {
		return os.Remove(s.target)
	}
	var keep []string
	for _, e := range left {
		keep = append(keep, e.Name())
	}
	p.say("%s stays, with %s; VMs that are left are entered by the key", s.target, strings.Join(keep, ", "))
	return nil
}
