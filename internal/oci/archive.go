package oci

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// archive is what docker save writes: a tar with manifest.json, a config for each image, and its layers as
// members, some of which are links to others. It is read where it is, by the members' offsets.
type archive struct {
	file    string
	members map[string]member
}

type member struct {
	offset, size int64
	link         string
}

// maxMembers bounds an archive's members: each layer has three at most.
const maxMembers = 100_000

func fromArchive(file, tag string) (resolved, error) {
	f, err := os.Open(file)
	if err != nil {
		return resolved{}, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return resolved{}, errors.Join(fault.New(fault.Invalid, file, "is no regular file"), err)
	}
	a := archive{file: file, members: map[string]member{}}
	for t := tar.NewReader(f); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return resolved{}, fault.Wrap(err, fault.Corrupt, file, "is no archive of docker save, or not a whole one").
				WithHint("a compressed one must be decompressed first, for instance: gunzip %s", file)
		}
		if len(a.members) >= maxMembers {
			return resolved{}, fault.New(fault.Exhausted, file, "has more than %d members", maxMembers)
		}
		// The reader has read headers only, so the file stands where the content begins.
		at, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return resolved{}, err
		}
		m := member{offset: at, size: h.Size}
		switch h.Typeflag {
		case tar.TypeSymlink:
			m.link = path.Join(path.Dir(path.Clean(h.Name)), h.Linkname)
		case tar.TypeLink:
			m.link = path.Clean(h.Linkname)
		}
		a.members[path.Clean(h.Name)] = m
	}
	return a.choose(f, tag)
}

func (a archive) choose(f *os.File, tag string) (resolved, error) {
	raw, err := a.document(f, "manifest.json")
	if err != nil {
		return resolved{}, err
	}
	var manifest []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(raw, &manifest); err != nil {
		return resolved{}, corrupt("manifest.json of %s cannot be read: %v", a.file, err)
	}
	chosen := -1
	var have []string
	for i, m := range manifest {
		have = append(have, m.RepoTags...)
		if tag == "" && len(manifest) == 1 {
			chosen = i
		}
		for _, t := range m.RepoTags {
			if tag != "" && sameReference(t, tag) {
				chosen = i
			}
		}
	}
	if chosen < 0 && tag == "" {
		return resolved{}, fault.New(fault.Ambiguous, a.file, "holds %d images", len(manifest)).
			WithHint("name one: docker-archive:%s:REFERENCE, of %s", a.file, strings.Join(have, ", "))
	}
	if chosen < 0 {
		return resolved{}, fault.New(fault.NotFound, a.file, "has no image %s", tag).WithHint("it has: %s", strings.Join(have, ", "))
	}
	m := manifest[chosen]
	rawConfig, err := a.document(f, m.Config)
	if err != nil {
		return resolved{}, err
	}
	// The config's name is its digest, in both of the forms that docker save has had.
	if sum := strings.TrimSuffix(path.Base(m.Config), ".json"); len(sum) == 64 {
		if err := checkDigest(rawConfig, v1.Hash{Algorithm: "sha256", Hex: sum}, "config"); err != nil {
			return resolved{}, err
		}
	}
	config, err := parseConfig(rawConfig, a.file)
	if err != nil {
		return resolved{}, err
	}
	if len(m.Layers) != len(config.RootFS.DiffIDs) {
		return resolved{}, corrupt("manifest.json of %s has %d layers, and the config %d", a.file, len(m.Layers), len(config.RootFS.DiffIDs))
	}
	r := resolved{name: a.file, config: *config}
	if len(m.RepoTags) > 0 {
		r.name = m.RepoTags[0] + " of " + a.file
	}
	for i, l := range m.Layers {
		at, err := a.find(l)
		if err != nil {
			return resolved{}, err
		}
		r.layers = append(r.layers, &layer{diffID: config.RootFS.DiffIDs[i], size: at.size, open: func() (io.ReadCloser, error) {
			f, err := os.Open(a.file)
			if err != nil {
				return nil, err
			}
			return section{io.NewSectionReader(f, at.offset, at.size), f}, nil
		}})
	}
	return r, nil
}

// section is a part of a file, which is closed with it.
type section struct {
	io.Reader
	io.Closer
}

// find follows links between members, of which there is one in a row in what docker save writes.
func (a archive) find(name string) (member, error) {
	at := path.Clean(name)
	for range 8 {
		m, ok := a.members[at]
		if !ok {
			break
		}
		if m.link == "" {
			return m, nil
		}
		at = m.link
	}
	return member{}, fault.New(fault.Corrupt, a.file, "is no whole archive of docker save: it has no %s", name).
		WithHint("an OCI archive must be unpacked first; then: banger image pull oci:DIR")
}

func (a archive) document(f *os.File, name string) ([]byte, error) {
	m, err := a.find(name)
	if err != nil {
		return nil, err
	}
	return readDocument(io.NewSectionReader(f, m.offset, m.size), name)
}

// sameReference compares by what references mean: alpine is docker.io/library/alpine:latest.
func sameReference(a, b string) bool {
	x, err1 := name.ParseReference(a)
	y, err2 := name.ParseReference(b)
	return err1 == nil && err2 == nil && x.Name() == y.Name()
}
