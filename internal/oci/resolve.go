package oci

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// The forms of references that mean something on this machine.
const (
	layoutPrefix  = "oci:"
	archivePrefix = "docker-archive:"
)

// maxDocument bounds manifests, indexes and configs, in bytes. Registries take manifests of 4 MiB.
const maxDocument = 8 << 20

// maxNesting is how deep indexes may lie in each other.
const maxNesting = 4

// resolved is what a reference means.
type resolved struct {
	name   string
	digest string
	config v1.ConfigFile
	layers []*layer
}

// place is where an image's parts are: a registry or a layout.
type place interface {
	// document reads a manifest, an index or a config that a descriptor names, whole, and at most
	// maxDocument bytes of it. Whether it is what the digest says is for the caller to check.
	document(ctx context.Context, d v1.Descriptor) ([]byte, error)
	// layer gives the way to a layer.
	layer(d v1.Descriptor, diffID v1.Hash) *layer
}

// resolve finds the image that a reference means, with all that is small of it.
func (p *Puller) resolve(ctx context.Context, reference string) (resolved, error) {
	reference = strings.TrimSpace(reference)
	switch {
	case reference == "":
		return resolved{}, fault.New(fault.Invalid, "image reference", "is empty").WithHint("name an image, as in: banger image pull debian:13")
	case strings.HasPrefix(reference, layoutPrefix):
		dir, tag := splitTag(strings.TrimPrefix(reference, layoutPrefix))
		return fromLayout(ctx, dir, tag)
	case strings.HasPrefix(reference, archivePrefix):
		file, tag := splitTag(strings.TrimPrefix(reference, archivePrefix))
		return fromArchive(file, tag)
	case filepath.IsAbs(reference):
		st, err := os.Stat(reference)
		if err != nil {
			return resolved{}, err
		}
		if st.IsDir() {
			return fromLayout(ctx, reference, "")
		}
		return fromArchive(reference, "")
	}
	ref, err := name.ParseReference(reference)
	if err != nil {
		return resolved{}, fault.Wrap(err, fault.Invalid, reference, "is no image reference").
			WithHint("a reference is [REGISTRY/]NAME[:TAG][@DIGEST], oci:DIR[:TAG] or docker-archive:FILE[:REFERENCE]")
	}
	return p.fromRegistry(ctx, ref)
}

// splitTag divides PATH[:TAG]. A path that exists with all its colons is one without a tag.
func splitTag(s string) (path, tag string) {
	if _, err := os.Lstat(s); err == nil {
		return s, ""
	}
	for i, c := range s {
		if c != ':' {
			continue
		}
		if _, err := os.Lstat(s[:i]); err == nil {
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}

// display is a reference as people write it.
func display(ref name.Reference) string {
	return strings.Replace(ref.Name(), name.DefaultRegistry+"/", "docker.io/", 1)
}

// choose goes from a descriptor to the image for this platform.
func choose(ctx context.Context, at place, subject string, d v1.Descriptor, depth int) (resolved, error) {
	raw, err := at.document(ctx, d)
	if err != nil {
		return resolved{}, err
	}
	if err := checkDigest(raw, d.Digest, "manifest"); err != nil {
		return resolved{}, err
	}
	// What it is, is told by the document itself as well: descriptors of older layouts say nothing.
	media := d.MediaType
	if m, err := v1.ParseManifest(bytes.NewReader(raw)); err == nil && m.MediaType != "" {
		media = m.MediaType
	}
	switch {
	case media.IsIndex():
		return chooseOf(ctx, at, subject, raw, depth)
	case media.IsSchema1():
		return resolved{}, fault.New(fault.Unsupported, subject, "is an image of the first format (schema 1), which is not made any more").
			WithHint("push it again with a present tool, for instance: docker pull, docker push")
	}
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return resolved{}, corrupt("the manifest of %s cannot be read: %v", subject, err)
	}
	if t := m.Config.MediaType; t != types.OCIConfigJSON && t != types.DockerConfigJSON {
		return resolved{}, fault.New(fault.Unsupported, subject, "is no container image but something else that registries keep (%s)", t)
	}
	rawConfig, err := at.document(ctx, m.Config)
	if err != nil {
		return resolved{}, err
	}
	if err := checkDigest(rawConfig, m.Config.Digest, "config"); err != nil {
		return resolved{}, err
	}
	config, err := parseConfig(rawConfig, subject)
	if err != nil {
		return resolved{}, err
	}
	if len(m.Layers) != len(config.RootFS.DiffIDs) {
		return resolved{}, corrupt("the manifest of %s has %d layers, and its config %d", subject, len(m.Layers), len(config.RootFS.DiffIDs))
	}
	r := resolved{name: subject, digest: d.Digest.String(), config: *config}
	for i, l := range m.Layers {
		if !isLayer(l.MediaType) {
			return resolved{}, fault.New(fault.Unsupported, subject, "has a layer of a kind that cannot be read (%s)", l.MediaType)
		}
		if l.Size < 0 {
			return resolved{}, corrupt("layer %s claims %d bytes", l.Digest, l.Size)
		}
		r.layers = append(r.layers, at.layer(l, config.RootFS.DiffIDs[i]))
	}
	return r, nil
}

func isLayer(t types.MediaType) bool {
	// How it is compressed is seen by its first bytes: media types are often wrong about it.
	return t.IsLayer() || t == "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
}

// chooseOf takes the entry of an index that is for this platform.
func chooseOf(ctx context.Context, at place, subject string, raw []byte, depth int) (resolved, error) {
	if depth >= maxNesting {
		return resolved{}, corrupt("indexes lie %d deep in each other", depth+1)
	}
	index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
	if err != nil {
		return resolved{}, corrupt("the index of %s cannot be read: %v", subject, err)
	}
	var others []string
	var unknown []v1.Descriptor
	for _, d := range index.Manifests {
		switch {
		case d.Platform == nil:
			unknown = append(unknown, d)
		case d.Platform.OS == platformOS && d.Platform.Architecture == platformArch:
			return choose(ctx, at, subject, d, depth+1)
		case d.Platform.OS != "unknown": // attestations are
			others = append(others, d.Platform.String())
		}
	}
	if len(unknown) == 1 && len(others) == 0 {
		return choose(ctx, at, subject, unknown[0], depth+1) // its config says what it is for
	}
	if len(others) == 0 {
		return resolved{}, fault.New(fault.Unsupported, subject, "names %d images and does not say which is for %s/%s", len(unknown), platformOS, platformArch).
			WithHint("name one by its tag or digest")
	}
	slices.Sort(others)
	return resolved{}, fault.New(fault.Unsupported, subject, "is there for %s, and not for %s/%s", strings.Join(slices.Compact(others), ", "), platformOS, platformArch)
}

// parseConfig reads an image's config and refuses one that does not run here.
func parseConfig(raw []byte, subject string) (*v1.ConfigFile, error) {
	c, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return nil, corrupt("the config of %s cannot be read: %v", subject, err)
	}
	if c.OS != "" && c.OS != platformOS || c.Architecture != "" && c.Architecture != platformArch {
		return nil, fault.New(fault.Unsupported, subject, "is for %s/%s, and VMs are %s/%s", c.OS, c.Architecture, platformOS, platformArch)
	}
	return c, nil
}

func checkDigest(content []byte, want v1.Hash, what string) error {
	got, _, err := v1.SHA256(bytes.NewReader(content))
	if err != nil {
		return err
	}
	if want.Algorithm != "sha256" {
		return fault.New(fault.Unsupported, "", "the digest of the image's %s is a %s, and only sha256 is known", what, want.Algorithm)
	}
	if got != want {
		return corrupt("the image's %s is not what its digest says: it is %s, and should be %s", what, got, want)
	}
	return nil
}

// readDocument reads what is left of r, unless it is too much.
func readDocument(r io.Reader, what string) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err == nil && len(b) > maxDocument {
		err = corrupt("%s has more than %d bytes", what, maxDocument)
	}
	return b, err
}

// layout is a directory of the OCI image layout specification.
type layout struct{ dir string }

func fromLayout(ctx context.Context, dir, tag string) (resolved, error) {
	at := layout{dir}
	f, err := os.Open(filepath.Join(dir, "index.json"))
	if err != nil {
		if _, statErr := os.Stat(dir); statErr != nil {
			return resolved{}, statErr
		}
		return resolved{}, fault.Wrap(err, fault.Invalid, dir, "is no OCI layout: it has no index.json")
	}
	defer f.Close()
	raw, err := readDocument(f, f.Name())
	if err != nil {
		return resolved{}, err
	}
	index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
	if err != nil {
		return resolved{}, corrupt("%s cannot be read: %v", f.Name(), err)
	}
	if tag == "" {
		if len(index.Manifests) == 1 {
			return choose(ctx, at, dir, index.Manifests[0], 1)
		}
		return chooseOf(ctx, at, dir, raw, 0)
	}
	var have []string
	for _, d := range index.Manifests {
		ref := d.Annotations["org.opencontainers.image.ref.name"]
		if ref == tag || d.Digest.String() == tag {
			return choose(ctx, at, dir+":"+tag, d, 1)
		}
		if ref != "" {
			have = append(have, ref)
		}
	}
	return resolved{}, fault.New(fault.NotFound, dir, "has no image %q", tag).WithHint("it has: %s", strings.Join(have, ", "))
}

func (l layout) path(h v1.Hash) (string, error) {
	// The digest is the image's own text: it must not lead anywhere else.
	if _, err := v1.NewHash(h.String()); err != nil {
		return "", corrupt("%q is no digest", h)
	}
	return filepath.Join(l.dir, "blobs", h.Algorithm, h.Hex), nil
}

func (l layout) document(_ context.Context, d v1.Descriptor) ([]byte, error) {
	f, err := l.open(d.Digest)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readDocument(f, f.Name())
}

func (l layout) open(h v1.Hash) (*os.File, error) {
	path, err := l.path(h)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fault.Wrap(err, fault.Corrupt, l.dir, "the layout is not whole: %s is missing", h)
	}
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s is no regular file", path), err, f.Close())
	}
	return f, nil
}

func (l layout) layer(d v1.Descriptor, diffID v1.Hash) *layer {
	return &layer{digest: d.Digest, diffID: diffID, size: d.Size, open: func() (io.ReadCloser, error) { return l.open(d.Digest) }}
}
