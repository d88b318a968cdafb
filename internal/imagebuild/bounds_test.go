package imagebuild

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// header is the one of a tar's member, without what follows it.
func header(t *testing.T, name string, size int64) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: size}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestWhatUnpacksToTooMuch: a small file that becomes a large one, or very many, is refused where it passes the bound, and not unpacked to
// its end.
func TestWhatUnpacksToTooMuch(t *testing.T) {
	const mebibyte = 1 << 20
	var empties []byte
	for i := range mebibyte / 512 {
		empties = append(empties, header(t, fmt.Sprintf("top/%d", i), 0)...)
	}
	program := func(f fetched) error {
		return f.program(context.Background(), tar.NewWriter(io.Discard), "mise", misePath)
	}
	tree := func(f fetched) error {
		return f.tree(context.Background(), tar.NewWriter(io.Discard), tmuxPlugins, "p.tmux")
	}
	for name, c := range map[string]struct {
		content []byte
		take    func(fetched) error
	}{
		"a program":                  {zipped(t, header(t, "bin/mise", maxProgram+1)), program},
		"a file before the program":  {zipped(t, header(t, "share/mise.txt", maxProgram+1)), program},
		"a file of a tree":           {zipped(t, header(t, "top/p.tmux", maxTree+1)), tree},
		"a file without an end":      {zipped(t, header(t, "top/p.tmux", math.MaxInt64)), tree},
		"files of a tree":            {zipped(t, slices.Concat(header(t, "top/1", mebibyte), make([]byte, mebibyte), header(t, "top/p.tmux", maxTree-mebibyte+1))), tree},
		"very many files of nothing": {zipped(t, append(empties, header(t, "top/p.tmux", maxTree-mebibyte)...)), tree},
	} {
		err := c.take(fetched{setting: "some_source", from: name, path: write(t, "x", c.content)})
		if !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "unpacks to more than") || !strings.Contains(fault.HintOf(err), "some_source in config.toml") {
			t.Errorf("%s: %v (hint %q)", name, err, fault.HintOf(err))
		}
	}
}

// TestASourceAtAURL: a setting may name a plain URL. What comes is checked, kept under its checksum, and fetched once.
func TestASourceAtAURL(t *testing.T) {
	good := archive(t, "mise/bin/mise", elf("mise of a URL"))
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if r.URL.Path != "/mirror/mise.tar.gz" {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(zipped(t, good))
	}))
	defer server.Close()
	url := server.URL + "/mirror/mise.tar.gz"
	pinned := Sources{Mise: url + "#sha256=" + sum(zipped(t, good))}
	if err := Check(pinned); err != nil {
		t.Fatal(err)
	}
	f := Fetcher{Cache: filepath.Join(t.TempDir(), "cache")}
	for _, want := range []string{"fetching " + url, "have " + pinned.Mise} {
		var said []string
		tools, err := f.Fetch(t.Context(), pinned, func(line string) { said = append(said, line) })
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(said, "\n"); got != want {
			t.Errorf("said %q, want %q", got, want)
		}
		if got := unpacked(t, tools)[misePath]; got != elf("mise of a URL") {
			t.Errorf("the guest is given %q", got)
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("it was fetched %d times", n)
	}
	// A cache that was changed is not believed.
	kept, err := os.ReadDir(f.Cache)
	if err != nil || len(kept) != 1 {
		t.Fatalf("the cache has %v, %v", kept, err)
	}
	if err := os.WriteFile(filepath.Join(f.Cache, kept[0].Name()), []byte("another"), 0o600); err != nil {
		t.Fatal(err)
	}
	tools, err := f.Fetch(t.Context(), pinned, func(string) {})
	if err != nil || unpacked(t, tools)[misePath] != elf("mise of a URL") || asked.Load() != 2 {
		t.Errorf("after the cache was changed: %v, fetched %d times", err, asked.Load())
	}
}
