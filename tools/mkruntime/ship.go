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
	"os"
	"path/filepath"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// pack writes a bundle's artifacts, without its SSH key, to one archive and prints its checksum.
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
	out, err := os.CreateTemp(filepath.Dir(file), stagingPrefix)
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
		if a, ok := b.Artifacts[r]; ok && r != bundle.SSHKey {
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
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: int64(info.Mode().Perm()), Size: info.Size(), ModTime: info.ModTime()}
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
// where there is none the source's goes along, so that VMs made before can be entered.
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
	if err := os.MkdirAll(o.to, 0o755); err != nil {
		return fault.Wrap(err, fault.Permission, o.to, "cannot be made")
	}
	s, err := newStaging(o.to)
	if err != nil {
		return err
	}
	defer s.discard()
	key := filepath.Join(o.to, bundle.FileName(bundle.SSHKey))
	if !fileExists(key) {
		if _, err := placeFile(ctx, b.Path(bundle.SSHKey), key, 0o600); err != nil {
			return err
		}
	}
	for _, r := range append(bundle.Required(), bundle.Optional()...) {
		a, ok := b.Artifacts[r]
		if !ok || r == bundle.SSHKey {
			continue
		}
		p.note(a.Path)
		info, err := os.Stat(b.Path(r))
		if err != nil {
			return err
		}
		if err := s.add(ctx, r, b.Path(r), info.Mode().Perm()); err != nil {
			return err
		}
		if s.done[r].SHA256 != a.SHA256 {
			return fault.New(fault.Corrupt, b.Path(r), "is damaged: its checksum is not that of the bundle's %s", r).WithHint("%s", bundle.Repair(o.runtime))
		}
	}
	return s.commit(b)
}
