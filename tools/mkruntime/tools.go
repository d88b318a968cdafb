package main

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/imagebuild"
)

// leftOut is what the manifest says of a tool that is not wanted.
const leftOut = "none"

// fileWithout is the file of an image's entry in the cache that says, a line each, which tools it lacks and why.
const fileWithout = "without"

// gitPatience bounds the fetch of a plugin's repository, of which each has some hundred KiB.
const gitPatience = 30 * time.Second

// toolSources says where the default image's tools come from: as the manifest in that file says, or as image builds have them.
func toolSources(file string) (s imagebuild.Sources, err error) {
	m, err := readRuntimeManifest(file)
	if err != nil {
		return s, err
	}
	for _, part := range []struct {
		name, set, pinned string
		to                *string
	}{
		{"mise_source", m.Tools.Mise, imagebuild.DefaultMise, &s.Mise},
		{"opencode_source", m.Tools.Opencode, imagebuild.DefaultOpencode, &s.Opencode},
		{"tmux_resurrect_source", m.Tools.TmuxResurrect, imagebuild.DefaultTmuxResurrect, &s.TmuxResurrect},
		{"tmux_continuum_source", m.Tools.TmuxContinuum, imagebuild.DefaultTmuxContinuum, &s.TmuxContinuum},
	} {
		switch part.set {
		case leftOut:
			continue
		case "":
			*part.to = part.pinned
			continue
		}
		if err := imagebuild.ValidateSource(part.set); err != nil {
			return s, fault.New(fault.Invalid, file, "%s = %q %s", part.name, part.set, err).
				WithHint("docs/images.md lists the forms; %q leaves it out, and \"\" takes the pinned one", leftOut)
		}
		*part.to = part.set
	}
	return s, nil
}

// addition is what a tree gets beside what is in it.
type addition struct {
	archive func(ctx context.Context, out *tar.Writer) error // more entries, root's; nil: none
	more    map[string]string                                // texts for the ends of files
}

// fetchTools gets what can be had of the tools, and says which cannot, with the reason.
func fetchTools(ctx context.Context, p *progress, o options, s imagebuild.Sources) (addition, []string, error) {
	if s == (imagebuild.Sources{}) {
		return addition{}, nil, nil
	}
	cache, err := cacheRoot()
	if err != nil {
		return addition{}, nil, err
	}
	p.begin("fetching the tools of the default image")
	f := imagebuild.Fetcher{Cache: filepath.Join(cache, "downloads"), HTTP: o.patience.client(), Patience: gitPatience}
	t, missing, err := f.FetchReachable(ctx, s, p.note)
	if err != nil {
		return addition{}, nil, fault.Wrap(err, fault.CodeOf(err), o.manifest, "a tool of the default image is not what it should be").
			WithHint("correct it under [tools] in a copy of runtime-bundle.toml, and name that: RUNTIME_MANIFEST=<file>; %q leaves a tool out", leftOut)
	}
	var without []string
	for _, m := range missing {
		// Not the setting before it, which is an image build's.
		why := strings.TrimPrefix(m.Err.Error(), m.Setting+": ")
		without = append(without, m.Tool()+": "+strings.ReplaceAll(why, "\n", " "))
	}
	if t.Stamp() == "" {
		return addition{}, without, nil
	}
	return addition{t.Archive, t.Appended()}, without, nil
}

// sayWithout tells which tools an image lacks.
func sayWithout(p *progress, without []string) {
	for _, line := range without {
		p.say("the default image is without %s", line)
	}
	if len(without) > 0 {
		p.say("to have what is missing, name a place within reach under [tools] in a copy of runtime-bundle.toml (RUNTIME_MANIFEST=<file>); to try again: rm -f ./runtime/rootfs-docker.ext4%s && make rootfs", stampSuffix)
	}
}

// readWithout is what sayWithout is told of an image of the cache.
func readWithout(dir string) ([]string, error) {
	b, err := os.ReadFile(filepath.Join(dir, fileWithout))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return strings.FieldsFunc(string(b), func(r rune) bool { return r == '\n' }), err
}

// entries is an addition's archive to be read.
func (a addition) entries(ctx context.Context) (*tar.Reader, io.Closer) {
	r, w := io.Pipe()
	go func() {
		out := tar.NewWriter(w)
		err := a.archive(ctx, out)
		if err == nil {
			err = out.Close()
		}
		_ = w.CloseWithError(err) // returns nil
	}()
	return tar.NewReader(r), r
}
