package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/imagebuild"
)

// What is added comes with the directories that lead to it, once each, and texts come to the ends of files that are there; only
// Debian's bash reads /etc/bash.bashrc.
func TestRewriteTarAdds(t *testing.T) {
	for _, debian := range []bool{true, false} {
		var in, image, seed bytes.Buffer
		w := tar.NewWriter(&in)
		for _, name := range []string{"./", "./etc/", "./root/", "./usr/", "./usr/local/"} {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}); err != nil {
				t.Fatal(err)
			}
		}
		if debian {
			if err := w.WriteHeader(&tar.Header{Name: "./etc/bash.bashrc", Mode: 0o644, Size: 6}); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(w, "# rc.\n"); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		add := addition{
			more: map[string]string{imagebuild.BashrcPath: "more\n", imagebuild.TmuxPath: "tmux\n"},
			archive: func(_ context.Context, out *tar.Writer) error {
				for name, text := range map[string]string{"usr/local/bin/mise": "program", "root/.tmux/plugins/a": "plugin"} {
					if err := out.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(text))}); err != nil {
						return err
					}
					if _, err := io.WriteString(out, text); err != nil {
						return err
					}
				}
				return nil
			},
		}
		size, _, err := rewriteTar(t.Context(), &in, &image, &seed, nil, nil, add, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		got, order := members(t, &image)
		if int(size.inodes) != len(order) {
			t.Errorf("%d inodes counted of %q", size.inodes, order)
		}
		if m := got["./usr/local/bin/mise"]; m.body != "program" || m.h.Mode != 0o755 || got["./usr/local/bin/"].h == nil {
			t.Errorf("the program: %+v of %q", m, order)
		}
		if m := got["./etc/bash.bashrc"]; debian && (m.body != "# rc.\nmore\n" || m.h.Size != 11) || !debian && m.h != nil {
			t.Errorf("Debian %v: bash.bashrc is %+v", debian, m)
		}
		home, _ := members(t, &seed)
		if home["./.tmux.conf"].body != "tmux\n" || home["./.tmux/plugins/a"].body != "plugin" {
			t.Errorf("the seed has %v", home)
		}
	}
}

// An addition that fails fails the whole, with its error.
func TestRewriteTarTellsWhyNothingIsAdded(t *testing.T) {
	why := errors.New("the archive is damaged")
	add := addition{archive: func(context.Context, *tar.Writer) error { return why }}
	if _, _, err := rewriteTar(t.Context(), packagesTar(t), io.Discard, io.Discard, nil, nil, add, time.Now()); !errors.Is(err, why) {
		t.Errorf("%v", err)
	}
}

func TestToolSourcesOfTheManifest(t *testing.T) {
	sources := func(text string) (imagebuild.Sources, error) {
		t.Helper()
		return toolSources(write(t, filepath.Join(t.TempDir(), "m.toml"), text))
	}
	pinned := imagebuild.Sources{Mise: imagebuild.DefaultMise, Opencode: imagebuild.DefaultOpencode, TmuxResurrect: imagebuild.DefaultTmuxResurrect, TmuxContinuum: imagebuild.DefaultTmuxContinuum}
	template, err := os.ReadFile("../../runtime-bundle.toml")
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", string(template)} {
		if got, err := sources(text); err != nil || got != pinned {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if got, err := sources(noTools); err != nil || got != (imagebuild.Sources{}) {
		t.Errorf("none: %+v, %v", got, err)
	}
	want := pinned
	want.Mise, want.TmuxContinuum = "/opt/mise", ""
	if got, err := sources("[tools]\nmise_source = \"/opt/mise\"\ntmux_continuum_source = \"none\"\n"); err != nil || got != want {
		t.Errorf("some: %+v, %v", got, err)
	}
	if _, err := sources("[tools]\nmise_source = \"https://example.org/mise\"\n"); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "not pinned") || fault.HintOf(err) == "" {
		t.Errorf("not pinned: %v", err)
	}
}

// What is out of reach is left out and named; what is something else than its checksum says is an error.
func TestFetchTools(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	script := write(t, filepath.Join(t.TempDir(), "opencode"), "#!/bin/sh\n")
	o := options{manifest: "m.toml", patience: usualPatience}
	s := imagebuild.Sources{Mise: server.URL + "/mise#sha256=" + strings.Repeat("0", 64), Opencode: script}
	add, without, err := fetchTools(t.Context(), quiet(), o, s)
	if err != nil || add.archive == nil || len(add.more) != 0 || len(without) != 1 || !strings.HasPrefix(without[0], "mise: "+server.URL+"/mise cannot be fetched: ") || !strings.Contains(without[0], "404") {
		t.Errorf("%v, %q, %v", add.more, without, err)
	}
	s.Opencode += "#sha256=" + strings.Repeat("0", 64)
	if _, _, err := fetchTools(t.Context(), quiet(), o, s); !fault.Is(err, fault.Corrupt) || !strings.Contains(fault.HintOf(err), "[tools]") {
		t.Errorf("another checksum: %v (%s)", err, fault.HintOf(err))
	}
	if add, without, err := fetchTools(t.Context(), quiet(), o, imagebuild.Sources{}); err != nil || add.archive != nil || without != nil {
		t.Errorf("none wanted: %v, %v", without, err)
	}
}

// A bundle made of an image of the cache says again what that lacks, and that it was asked for another one makes another.
func TestWhatAnImageLacksIsSaidAgain(t *testing.T) {
	o := warmCache(t, "git\n")
	found, err := filepath.Glob(filepath.Join(os.Getenv("XDG_CACHE_HOME"), "banger/build/image-*"))
	if err != nil || len(found) != 1 {
		t.Fatal(found, err)
	}
	write(t, filepath.Join(found[0], fileWithout), "mise: out of reach")
	var said bytes.Buffer
	p := &progress{w: &said, now: time.Now, start: time.Now()}
	if err := makeRuntime(t.Context(), p, o, false); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(said.String(), "without mise: out of reach") || !strings.Contains(said.String(), "make rootfs") {
		t.Errorf("said: %s", said.String())
	}
	one, _ := imageKey([]string{"git"}, "")
	other, _ := imageKey([]string{"git"}, "mise")
	if one == other {
		t.Error("an image with mise has the same key")
	}
}
