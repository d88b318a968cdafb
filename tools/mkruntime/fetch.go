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
	"runtime"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

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
	// Tools are what the default image has beside its packages: "" is the pinned source, leftOut is without it.
	Tools struct {
		Mise          string `toml:"mise_source"`
		Opencode      string `toml:"opencode_source"`
		TmuxResurrect string `toml:"tmux_resurrect_source"`
		TmuxContinuum string `toml:"tmux_continuum_source"`
	} `toml:"tools"`
	// Metadata is what the archive is said to hold; a manifest without it says nothing.
	Metadata struct {
		Format    int                    `toml:"format"`
		Arch      string                 `toml:"arch"`
		Artifacts map[bundle.Role]string `toml:"artifacts"` // file names
	} `toml:"bundle_metadata"`
}

// checkMetadata refuses an archive by what the manifest says of it, before a gigabyte is fetched.
func (m manifest) checkMetadata(file string) error {
	d := m.Metadata
	switch {
	case d.Format > bundle.Format:
		return fault.New(fault.VersionSkew, file, "is for bundles of format %d; this checkout reads up to %d", d.Format, bundle.Format).WithHint("update the checkout, or make a bundle that fits it: make runtime")
	case d.Arch != "" && d.Arch != runtime.GOARCH:
		return fault.New(fault.Unsupported, file, "is for bundles for %s, and this machine is %s", d.Arch, runtime.GOARCH).WithHint("make runtime")
	}
	for role, name := range d.Artifacts {
		if bundle.FileName(role) != name {
			return fault.New(fault.Invalid, file, "[bundle_metadata.artifacts] says that %s is %q, and banger has no such", role, name).
				WithHint("copy the table from this checkout's runtime-bundle.toml")
		}
	}
	return nil
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

// fetch puts the bundle of an archive into place of the one that is there. Nothing is changed before the whole archive
// has the manifest's checksum, and every artifact that of its bundle.json. An SSH key that is there stays; one that
// the archive brings is taken where there is none.
func fetch(ctx context.Context, p *progress, o options) error {
	m, err := readRuntimeManifest(o.manifest)
	if err != nil {
		return err
	}
	if m.URL == "" || m.SHA256 == "" {
		return fault.New(fault.Invalid, o.manifest, "has no url or no sha256").
			WithHint("fill them in (make runtime-package prints the checksum), or run 'make runtime' to build the bundle here")
	}
	if err := m.checkMetadata(o.manifest); err != nil {
		return err
	}
	want := strings.ToLower(m.SHA256)
	if raw, err := hex.DecodeString(want); err != nil || len(raw) != sha256.Size {
		return fault.New(fault.Invalid, o.manifest, "has an sha256 that is none: %q", m.SHA256).WithHint("it has 64 hexadecimal digits; make runtime-package prints it")
	}
	s, err := newStaging(ctx, p, o.runtime)
	if err != nil {
		return err
	}
	defer s.discard()
	root, err := os.OpenRoot(s.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	p.begin("fetching %s", m.URL)
	src, err := openURL(ctx, o.patience, m.URL, filepath.Dir(o.manifest))
	if err != nil {
		return err
	}
	defer src.Close()
	archive, err := root.OpenFile(archiveName, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fault.Wrap(err, fault.Permission, s.dir, "cannot be written")
	}
	defer archive.Close()
	h := sha256.New()
	in := &bounded{r: &counted{ctx: ctx, r: src, p: p}, left: maxBundle, what: m.URL}
	if _, err := io.Copy(io.MultiWriter(archive, h), in); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return wrapWrite(err, fault.Unavailable, m.URL, "cannot be fetched")
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return fault.New(fault.Corrupt, m.URL, "has SHA256 %s, and %s says %s", got, o.manifest, want).WithHint("get the archive again, or correct the manifest")
	}
	p.begin("unpacking the runtime bundle into %s", o.runtime)
	if _, err := archive.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if err := unpack(ctx, archive, root); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return wrapWrite(err, fault.Corrupt, m.URL, "is no archive of a runtime bundle")
	}
	if err := root.Remove(archiveName); err != nil {
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
	if err := s.settleKey(p, m.URL); err != nil {
		return err
	}
	if err := s.stamp(); err != nil {
		return err
	}
	return s.commit(b)
}

// settleKey decides about a key that came with an archive: the installation's own stays.
func (s *staging) settleKey(p *progress, from string) error {
	name := bundle.FileName(bundle.SSHKey)
	came := filepath.Join(s.dir, name)
	switch {
	case !fileExists(came):
		return nil
	case fileExists(filepath.Join(s.target, name)):
		return os.Remove(came)
	}
	p.say("The SSH key is the one in %s: whoever has that archive can enter the sandboxes of this bundle if they reach them.", from)
	return nil
}

// archiveName is where an archive lies while it is unpacked. No artifact is named like that.
const archiveName = ".archive"

// Bounds on what an archive may be and hold, in bytes: well over what a bundle has, and little enough to notice a bomb
// before it has cost hours. Zeros cost no space, but they do cost time.
const (
	maxBundle   = 32 << 30
	maxImage    = 64 << 30
	maxArtifact = 1 << 30
	maxText     = 1 << 20
)

// maxSize is the bound on one file of an archive, 0 for what does not belong there.
func maxSize(name string) int64 {
	if name == bundle.ManifestName {
		return maxText
	}
	for _, r := range append(bundle.Required(), bundle.Optional()...) {
		if bundle.FileName(r) != name {
			continue
		}
		switch r {
		case bundle.RootFS, bundle.BaseRootFS, bundle.WorkSeed, bundle.Modules:
			return maxImage
		case bundle.Packages, bundle.SSHKey:
			return maxText
		}
		return maxArtifact
	}
	return 0
}

// bounded fails when more comes than may.
type bounded struct {
	r    io.Reader
	left int64
	what string
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, fault.New(fault.Exhausted, b.what, "is larger than a runtime bundle can be")
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left+1)])
	if b.left -= int64(n); b.left < 0 {
		return n, fault.New(fault.Exhausted, b.what, "is larger than a runtime bundle can be")
	}
	return n, err
}

// wrapWrite tells a full disk from what else went wrong while something was written.
func wrapWrite(err error, code fault.Code, subject, text string) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fault.Wrap(err, fault.Exhausted, subject, "does not fit on the disk").WithHint("free some space: a bundle takes about 1.5 GiB, and its archive as much as it is long")
	}
	if fault.Is(err, fault.Exhausted) {
		return err
	}
	return fault.Wrap(err, code, subject, "%s", text)
}

// unpack extracts the files of a bundle, and only those, into a directory; zeros become holes. Names are those of
// regular files right in it: no link is made, and none is followed out of it. "./" before a name is fine, as tar makes it
// of a directory.
func unpack(ctx context.Context, r io.Reader, dir *os.Root) error {
	gz, err := gzip.NewReader(r)
	if err != nil {
		return err
	}
	for tr := tar.NewReader(gz); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(h.Name, "./")
		if h.Typeflag == tar.TypeDir && name == "" {
			continue
		}
		limit := maxSize(name)
		if h.Typeflag != tar.TypeReg || limit == 0 {
			return fault.New(fault.Corrupt, h.Name, "does not belong into a runtime bundle")
		}
		if h.Size > limit {
			return fault.New(fault.Corrupt, h.Name, "has %d bytes, more than it can have", h.Size)
		}
		f, err := dir.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, modeOf(name))
		if err != nil {
			return err
		}
		_, _, err = sparseCopy(ctx, tr, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
}
