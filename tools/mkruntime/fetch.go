package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/pelletier/go-toml/v2"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// manifest is runtime-bundle.toml: where an archive made by pack is, and what it must hash to; likewise
// where a release archive of Firecracker is, if it is not to be the project's own release page.
type manifest struct {
	URL         string `toml:"url"` // or a path, relative to the manifest
	SHA256      string `toml:"sha256"`
	Firecracker struct {
		URL    string `toml:"url"` // likewise
		SHA256 string `toml:"sha256"`
	} `toml:"firecracker"`
}

func readRuntimeManifest(file string) (manifest, error) {
	var m manifest
	f, err := os.Open(file)
	if err != nil {
		return m, fault.Wrap(err, fault.NotFound, file, "cannot be read").WithHint("name a copy of runtime-bundle.toml: RUNTIME_MANIFEST=<file>")
	}
	defer f.Close()
	if err := toml.NewDecoder(f).DisallowUnknownFields().Decode(&m); err != nil {
		return m, fault.Wrap(err, fault.Invalid, file, "is no runtime manifest")
	}
	if (m.Firecracker.URL == "") != (m.Firecracker.SHA256 == "") {
		return m, fault.New(fault.Invalid, file, "[firecracker] has only one of url and sha256").
			WithHint("fill in both, or neither: then Firecracker comes from its project's release page")
	}
	return m, nil
}

// fetch puts the bundle of an archive into place of the one that is there, but for its SSH key. Nothing is
// changed before the whole archive has the manifest's checksum, and every artifact that of its bundle.json.
func fetch(ctx context.Context, p *progress, o options) error {
	m, err := readRuntimeManifest(o.manifest)
	if err != nil {
		return err
	}
	if m.URL == "" || m.SHA256 == "" {
		return fault.New(fault.Invalid, o.manifest, "has no url or no sha256").
			WithHint("fill them in (make runtime-package prints the checksum), or run 'make runtime' to build the bundle here")
	}
	if err := os.MkdirAll(o.runtime, 0o755); err != nil {
		return fault.Wrap(err, fault.Permission, o.runtime, "cannot be made")
	}
	s, err := newStaging(o.runtime)
	if err != nil {
		return err
	}
	defer s.discard()
	p.begin("fetching %s", m.URL)
	src, err := openURL(ctx, o.patience, m.URL, filepath.Dir(o.manifest))
	if err != nil {
		return err
	}
	defer src.Close()
	archive, err := os.Create(filepath.Join(s.dir, "archive"))
	if err != nil {
		return fault.Wrap(err, fault.Permission, o.runtime, "cannot be written")
	}
	defer archive.Close()
	h := sha256.New()
	if _, err := io.Copy(io.MultiWriter(archive, h), &counted{ctx: ctx, r: src, p: p}); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fault.Wrap(err, fault.Unavailable, m.URL, "cannot be fetched")
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != m.SHA256 {
		return fault.New(fault.Corrupt, m.URL, "has SHA256 %s, and %s says %s", got, o.manifest, m.SHA256).WithHint("get the archive again, or correct the manifest")
	}
	p.begin("unpacking the runtime bundle into %s", o.runtime)
	if _, err := archive.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if err := unpack(ctx, archive, s.dir); err != nil {
		return fault.Wrap(err, fault.Corrupt, m.URL, "is no archive of a runtime bundle")
	}
	if err := os.Remove(archive.Name()); err != nil {
		return err
	}
	b, err := bundle.Load(s.dir)
	if err != nil {
		return err
	}
	for r, a := range b.Artifacts {
		if a.Path != bundle.FileName(r) {
			return fault.New(fault.Corrupt, m.URL, "names its %s %q", r, a.Path)
		}
		if r == bundle.SSHKey {
			continue
		}
		if s.done[r], err = bundle.Describe(ctx, s.dir, a.Path); err != nil {
			return err
		}
		if s.done[r] != a {
			return fault.New(fault.Corrupt, m.URL, "holds a damaged %s", a.Path)
		}
		s.staged = append(s.staged, r)
	}
	return s.commit(b)
}

// unpack extracts the files of a bundle, and only those, into dir; zeros become holes.
func unpack(ctx context.Context, r io.Reader, dir string) error {
	gz, err := gzip.NewReader(r)
	if err != nil {
		return err
	}
	known := []string{bundle.ManifestName}
	for _, role := range append(bundle.Required(), bundle.Optional()...) {
		if role != bundle.SSHKey {
			known = append(known, bundle.FileName(role))
		}
	}
	for tr := tar.NewReader(gz); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg || !slices.Contains(known, h.Name) {
			return fault.New(fault.Corrupt, h.Name, "does not belong into a runtime bundle")
		}
		f, err := os.OpenFile(filepath.Join(dir, h.Name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644|os.FileMode(h.Mode&0o111))
		if err != nil {
			return err
		}
		_, _, err = sparseCopy(ctx, tr, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
}
