package imagebuild

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func TestPinnedSourcesAreInForm(t *testing.T) {
	for _, s := range []string{DefaultMise, DefaultOpencode, DefaultTmuxResurrect, DefaultTmuxContinuum} {
		if err := ValidateSource(s); err != nil {
			t.Errorf("%s %v", s, err)
		}
	}
}

func TestSourcesThatAreRefused(t *testing.T) {
	sum := "#sha256=" + strings.Repeat("0", 64)
	for text, want := range map[string]string{
		"":                               "none of",
		"mise":                           "none of",
		"ftp://example.org/x" + sum:      "none of",
		"https://example.org/x":          "not pinned",
		"https://example.org/x#sha256=0": "not pinned",
		"https://example.org/x#" + strings.Repeat("0", 64): "not pinned",
		"npm:mise" + sum:                                     "with a version",
		"npm:a/../b@1" + sum:                                 "with a version",
		"npm:@a/b@1.0.0":                                     "not pinned",
		"git+https://example.org/x":                          "pins no commit",
		"git+https://example.org/x#main":                     "pins no commit",
		"git+ssh://example.org/x#" + strings.Repeat("0", 40): "neither",
		"git+file://x":                                       "neither",
		"git+file:///x#--upload":                             "names no commit",
		"git+file:///x#a b":                                  "names no commit",
		"/some/file#sha256=short":                            "not pinned",
	} {
		if err := ValidateSource(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	for _, text := range []string{"/some/file", "/some/file" + sum, "file:///some/file", "git+file:///some/repository", "git+file:///x#v1.0/x", "npm:@a/b@1.0.0-rc.1+x" + sum} {
		if err := ValidateSource(text); err != nil {
			t.Errorf("%q %v", text, err)
		}
	}
}

// archive makes a tar archive; a value that begins with "->" is a symbolic link.
func archive(t *testing.T, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		h := &tar.Header{Name: files[i], Mode: 0o755, Size: int64(len(files[i+1]))}
		if target, ok := strings.CutPrefix(files[i+1], "->"); ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, target, 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := io.WriteString(w, files[i+1]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err := w.Write(b)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func write(t *testing.T, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func elf(text string) string {
	return "\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 11) + "\x3e\x00" + text
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// unpacked is what the guest is given.
func unpacked(t *testing.T, tools Tools) map[string]string {
	t.Helper()
	var b bytes.Buffer
	if err := tools.input(context.Background(), &b); err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	r := tar.NewReader(&b)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 {
			t.Errorf("%s belongs to %d:%d", h.Name, h.Uid, h.Gid)
		}
		out[h.Name] = string(content) + h.Linkname
	}
}

func TestToolsComeFromEveryPlace(t *testing.T) {
	mise := zipped(t, archive(t, "package/README", "x", "package/bin/mise", elf("mise")))
	served := 0
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		served++
		if r.URL.Path != "/@scope/mise/-/mise-1.2.3.tgz" {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(mise)
	}))
	defer registry.Close()
	t.Setenv("npm_config_registry", registry.URL+"/")
	repository := t.TempDir()
	git(t, repository, "init", "--quiet")
	if err := os.WriteFile(filepath.Join(repository, "resurrect.tmux"), []byte("one"), 0o755); err != nil {
		t.Fatal(err)
	}
	git(t, repository, "add", ".")
	git(t, repository, "commit", "--quiet", "-m", "one")
	git(t, repository, "tag", "v1")
	if err := os.WriteFile(filepath.Join(repository, "resurrect.tmux"), []byte("two"), 0o755); err != nil {
		t.Fatal(err)
	}
	git(t, repository, "commit", "--quiet", "-am", "two")

	sources := Sources{
		Mise:          "npm:@scope/mise@1.2.3#sha256=" + sum(mise),
		Opencode:      write(t, "opencode", []byte(elf("opencode"))),
		TmuxResurrect: "git+file://" + repository + "#v1",
		TmuxContinuum: write(t, "continuum.tar", archive(t, "top-1/continuum.tmux", "c", "top-1/scripts/link", "->../continuum.tmux", "top-1/near", "->continuum.tmux")),
	}
	f := Fetcher{Cache: filepath.Join(t.TempDir(), "cache")}
	for range 2 { // the second time nothing is fetched
		tools, err := f.Fetch(context.Background(), sources, func(string) {})
		if err != nil {
			t.Fatal(err)
		}
		have := unpacked(t, tools)
		for name, want := range map[string]string{
			"usr/local/bin/mise": elf("mise"),
			"usr/local/share/mise/installs/opencode/local/opencode": elf("opencode"),
			"usr/local/bin/opencode":                                "/usr/local/share/mise/installs/opencode/local/opencode",
			"etc/mise/config.toml":                                  "# Written by banger.\n[tools]\nopencode = \"local\"\n",
			"etc/profile.d/banger-mise.sh":                          profile,
			"usr/local/share/banger/tools":                          tools.Stamp(),
			"root/.tmux/plugins/tmux-resurrect/resurrect.tmux":      "one",
			"root/.tmux/plugins/tmux-continuum/continuum.tmux":      "c",
			"root/.tmux/plugins/tmux-continuum/near":                "continuum.tmux",
		} {
			if have[name] != want {
				t.Errorf("%s: %q", name, have[name])
			}
		}
		if want := "mise " + sum(mise) + "\nopencode local " + sum([]byte(elf("opencode"))) + "\ntmux-resurrect "; !strings.HasPrefix(tools.Stamp(), want) || strings.Count(tools.Stamp(), "\n") != 4 {
			t.Errorf("the stamp is %q", tools.Stamp())
		}
		if len(have) != 9 {
			t.Errorf("the guest is given %v", have)
		}
	}
	if served != 1 {
		t.Errorf("the registry was asked %d times", served)
	}
	// A directory is its repository, at what is checked out.
	sources.TmuxResurrect = repository
	tools, err := f.Fetch(context.Background(), sources, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	if got := unpacked(t, tools)["root/.tmux/plugins/tmux-resurrect/resurrect.tmux"]; got != "two" {
		t.Errorf("of the directory: %q", got)
	}
	// What lies damaged in the cache is fetched again, and what nobody has used for long makes room for it.
	old := time.Now().Add(-2 * downloadYoung)
	for i := range 2 * downloadsKept {
		path := filepath.Join(f.Cache, "old-"+strconv.Itoa(i))
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, old, old)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(f.Cache, sum(mise)), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Fetch(context.Background(), sources, func(string) {}); err != nil || served != 2 {
		t.Errorf("after damage: %v, asked %d times", err, served)
	}
	if have, err := os.ReadDir(f.Cache); err != nil || len(have) != downloadsKept {
		t.Errorf("the cache keeps %d downloads, not %d: %v", len(have), downloadsKept, err)
	}
}

// A tool that is welcome and not needed is left out where it is out of reach; what is wrong with it is an error all the same. One
// that nobody wants is asked for nowhere.
func TestFetchReachable(t *testing.T) {
	zeros := strings.Repeat("0", 64)
	s := Sources{Mise: write(t, "mise", []byte(elf("mise"))), Opencode: "http://127.0.0.1:1/x#sha256=" + zeros, TmuxResurrect: "git+http://127.0.0.1:1/x#" + zeros[:40]}
	f := Fetcher{Cache: filepath.Join(t.TempDir(), "cache")}
	tools, without, err := f.FetchReachable(t.Context(), s, func(string) {})
	if err != nil || len(without) != 2 || without[0].Tool() != "opencode" || without[1].Tool() != "tmux-resurrect" || !fault.Is(without[1].Err, fault.Unavailable) {
		t.Fatalf("without %v, %v", without, err)
	}
	if why := without[1].Err.Error(); !strings.Contains(why, "cannot be fetched: ") || strings.Contains(why, "fatal:") || strings.Contains(why, "exit status") {
		t.Errorf("git's own words for people: %s", why)
	}
	have := unpacked(t, tools)
	if len(have) != 3 || have[misePath] != elf("mise") || have[profilePath] == "" || have[stampPath] != tools.Stamp() {
		t.Errorf("the guest is given %v", have)
	}
	if more := tools.Appended(); len(more) != 1 || more[BashrcPath] != bashrcMore {
		t.Errorf("more: %q", more)
	}
	s.Opencode = write(t, "opencode", []byte(elf("x"))) + "#sha256=" + zeros
	if _, _, err := f.FetchReachable(t.Context(), s, func(string) {}); !fault.Is(err, fault.Corrupt) {
		t.Errorf("with another checksum: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := f.FetchReachable(ended, s, func(string) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// A repository that does not answer is given up when patience is at its end, not before all others were waited for.
func TestPatienceWithRepositories(t *testing.T) {
	silent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer silent.Close()
	f := Fetcher{Cache: filepath.Join(t.TempDir(), "cache"), Patience: 300 * time.Millisecond}
	began := time.Now()
	_, err := f.Fetch(t.Context(), Sources{TmuxContinuum: "git+" + silent.URL + "/x#" + strings.Repeat("0", 40)}, func(string) {})
	if !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "did not come within 300ms") || time.Since(began) > 20*time.Second {
		t.Errorf("%v after %s", err, time.Since(began))
	}
}

// Identity changes with the pin of what is fetched and with the content of what lies here.
func TestIdentity(t *testing.T) {
	file := write(t, "mise", []byte("one"))
	of := func(s Sources) string {
		t.Helper()
		id, err := s.Identity(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	s := Sources{Mise: file, Opencode: DefaultOpencode}
	before := of(s)
	if err := os.WriteFile(file, []byte("two"), 0o600); err != nil {
		t.Fatal(err)
	}
	changed := of(s)
	s.Opencode = ""
	if without := of(s); before == changed || without == changed || of(Sources{}) != "" {
		t.Errorf("%q, %q, %q", before, changed, without)
	}
	if _, err := (Sources{Mise: "/nowhere"}).Identity(t.Context()); !fault.Is(err, fault.NotFound) {
		t.Errorf("what is not there: %v", err)
	}
}

// What makes shells find the tools is read by a shell, more than once without harm, and tmux's settings come before what reads
// them.
func TestWhatIsWrittenForShellsAndTmux(t *testing.T) {
	for _, script := range []string{profile, bashrcMore} {
		if out, err := exec.Command("/bin/sh", "-n", "-c", script).CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
	both := Tools{resurrect: fetched{path: "/x"}, continuum: fetched{path: "/y"}}.Appended()[TmuxPath]
	settings, reads := strings.Index(both, "@continuum-restore 'off'"), strings.Index(both, "continuum.tmux")
	if settings < 0 || reads < settings || !strings.Contains(both, "resurrect.tmux") || !strings.Contains(both, "@continuum-save-interval '15'") {
		t.Errorf("tmux is told %q", both)
	}
	if one := (Tools{resurrect: fetched{path: "/x"}}).Appended()[TmuxPath]; strings.Contains(one, "continuum.tmux") || !strings.Contains(one, "resurrect.tmux") {
		t.Errorf("of one plugin: %q", one)
	}
}

// The step of a build that installs the tools, in a directory in place of the guest: a base that has them is not given them again,
// one that has others is; files of the distribution are added to once.
func TestToolsStep(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"etc", "root", "usr/local"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, BashrcPath), []byte("# Debian's\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	build := func(content string, given bool) string {
		t.Helper()
		s := Sources{Mise: write(t, "mise", []byte("#!/bin/sh\n# "+content+"\n")), Opencode: write(t, "opencode", []byte("#!/bin/sh\n")),
			TmuxResurrect: write(t, "r.tar", archive(t, "resurrect.tmux", "r"))}
		tools, err := Fetcher{Cache: filepath.Join(t.TempDir(), "cache")}.Fetch(t.Context(), s, func(string) {})
		if err != nil {
			t.Fatal(err)
		}
		step := Recipe{}.Steps(tools)[2]
		script := strings.NewReplacer("/usr/local/share", root+"/usr/local/share", "/root/.tmux", root+"/root/.tmux", "/etc/bash", root+"/etc/bash", "-C / ", "-C "+root+" ").Replace(step.Script)
		var input bytes.Buffer
		if given {
			if err := step.Input(t.Context(), &input); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.Command("/bin/sh", "-c", script)
		cmd.Stdin = &input
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	read := func(name string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if out := build("one", true); strings.Contains(out, "already") || read(misePath) != "#!/bin/sh\n# one\n" {
		t.Errorf("the first build says %q, and mise is %q", out, read(misePath))
	}
	if out := build("one", false); !strings.Contains(out, "already") {
		t.Errorf("the second build says %q", out)
	}
	if out := build("two", true); strings.Contains(out, "already") || read(misePath) != "#!/bin/sh\n# two\n" {
		t.Errorf("a build with another mise says %q, and it is %q", out, read(misePath))
	}
	if got := read(BashrcPath); strings.Count(got, "banger-mise.sh ]") != 1 || !strings.HasPrefix(got, "# Debian's\n") {
		t.Errorf("bash reads %q", got)
	}
	if got := read(TmuxPath); strings.Count(got, "run-shell") != 1 {
		t.Errorf("tmux reads %q", got)
	}
}

func git(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, out)
	}
}

func TestWhatCannotBeFetchedNamesItsSetting(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/good":
			_, _ = io.WriteString(w, "good")
		case "/short":
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, "good")
		default:
			http.NotFound(w, r)
		}
	}))
	defer server.Close()
	good, zeros := sum([]byte("good")), strings.Repeat("0", 64)
	for text, code := range map[string]fault.Code{
		server.URL + "/good#sha256=" + zeros:            fault.Corrupt,
		server.URL + "/short#sha256=" + good:            fault.Unavailable,
		server.URL + "/none#sha256=" + good:             fault.Unavailable,
		"http://127.0.0.1:1/x#sha256=" + good:           fault.Unavailable,
		"git+http://127.0.0.1:1/x#" + zeros[:40]:        fault.Unavailable,
		"/nowhere":                                      fault.NotFound,
		"git+file:///nowhere":                           fault.NotFound,
		"nonsense":                                      fault.Invalid,
		write(t, "x", []byte("x")) + "#sha256=" + zeros: fault.Corrupt,
	} {
		cache := filepath.Join(t.TempDir(), "cache")
		_, err := Fetcher{Cache: cache}.fetch(context.Background(), "mise_source", text, func(string) {})
		if !fault.Is(err, code) || !strings.Contains(err.Error(), "mise_source") {
			t.Errorf("%s: %v, want %s", text, err, code)
		}
		if code == fault.Unavailable && !strings.Contains(fault.HintOf(err), "mise_source in config.toml") {
			t.Errorf("%s: hint %q", text, fault.HintOf(err))
		}
		if left, _ := os.ReadDir(cache); len(left) != 0 {
			t.Errorf("%s leaves %v in the cache", text, left)
		}
	}
}

func TestWhatIsNoToolIsRefused(t *testing.T) {
	for name, content := range map[string][]byte{
		"text":               []byte("hello"),
		"another machine":    []byte(strings.Replace(elf(""), "\x3e", "\xb7", 1)),
		"nothing":            {},
		"an archive without": archive(t, "a/b", "x"),
		"cut off":            zipped(t, archive(t, "a/mise", elf("mise")))[:40],
		"not executable":     archive(t, "mise/", ""),
	} {
		f := fetched{setting: "mise_source", from: name, path: write(t, "x", content)}
		err := f.program(context.Background(), tar.NewWriter(io.Discard), "mise", misePath)
		if err == nil || !strings.Contains(err.Error(), "mise_source") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, content := range map[string][]byte{
		"no archive": []byte("hello"),
		"without it": archive(t, "top/other", "x"),
		"climbs":     archive(t, "top/../../etc/passwd", "x", "top/p.tmux", "x"),
		"absolute":   archive(t, "/etc/passwd", "x", "p.tmux", "x"),
		"too much":   zipped(t, bytes.Repeat([]byte{0}, 1024)),
	} {
		f := fetched{setting: "tmux_resurrect_source", from: name, path: write(t, "x", content)}
		var out bytes.Buffer
		err := f.tree(context.Background(), tar.NewWriter(&out), tmuxPlugins, "p.tmux")
		if err == nil || !strings.Contains(err.Error(), "tmux_resurrect_source") {
			t.Errorf("%s: %v", name, err)
		}
		if strings.Contains(out.String(), "passwd") {
			t.Errorf("%s: the guest would be given a file outside of its place", name)
		}
	}
}

func TestPackages(t *testing.T) {
	got := ParsePackages("# a list\nvim git # why\n\nlibstdc++6,vim\r\n")
	if strings.Join(got, " ") != "vim git libstdc++6" {
		t.Errorf("%q", got)
	}
	for _, bad := range []string{"", "Vim", "a b", "a;b", "-x", "a'b", "$(x)", "ä"} {
		if err := ValidatePackages([]string{"vim", bad}); err == nil {
			t.Errorf("%q passes for the name of a package", bad)
		}
	}
	if err := ValidatePackages([]string{"g++", "libc6:amd64", "python3.13"}); err != nil {
		t.Error(err)
	}
}

// Settings reach the scripts as they are, whatever is in them.
func TestSettingsAreQuoted(t *testing.T) {
	for _, value := range []string{"", "a b", "it's", "$(touch x)", "`x`", "a\\'b"} {
		out, err := exec.Command("/bin/sh", "-c", setting("V", value)+`printf %s "$V"`).Output()
		if err != nil || string(out) != value {
			t.Errorf("%q became %q, %v", value, out, err)
		}
	}
}

// TestScriptsAreSh wants every script to be one that a shell reads, and steps in their order.
func TestScriptsAreSh(t *testing.T) {
	steps := Recipe{Docker: true, Packages: []string{"vim"}, Custom: []Step{PackageStep("more", []string{"less"})}}.Steps(Tools{})
	var names []string
	for _, s := range steps {
		names = append(names, s.Name)
		if out, err := exec.Command("/bin/sh", "-n", "-c", s.Script).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", s.Name, err, out)
		}
	}
	if strings.Join(names, " ") != "prepare packages tools more finish" {
		t.Errorf("steps %v", names)
	}
}

// Check says what is wrong with a source before anything is fetched.
func TestCheck(t *testing.T) {
	programs := t.TempDir() // git and npm, as far as they are looked for
	for _, name := range []string{"git", "npm"} {
		if err := os.WriteFile(filepath.Join(programs, name), []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", programs)
	t.Setenv("HOME", t.TempDir())
	t.Setenv("npm_config_registry", "")
	t.Setenv("NPM_CONFIG_REGISTRY", "")
	good := Sources{Mise: DefaultMise, Opencode: DefaultOpencode, TmuxResurrect: DefaultTmuxResurrect, TmuxContinuum: DefaultTmuxContinuum}
	if err := Check(good); err != nil {
		t.Errorf("the pinned sources: %v", err)
	}
	here := good
	here.Mise = t.TempDir()
	if err := Check(here); err != nil {
		t.Errorf("a directory of this machine: %v", err)
	}
	for name, c := range map[string]struct {
		change  func(*Sources)
		code    fault.Code
		subject string
	}{
		"no form":     {func(s *Sources) { s.Opencode = "latest" }, fault.Invalid, "opencode_source"},
		"not there":   {func(s *Sources) { s.TmuxContinuum = "/nonexistent/plugin.tar" }, fault.NotFound, "tmux_continuum_source"},
		"not pinned":  {func(s *Sources) { s.Mise = "https://mise.example/mise" }, fault.Invalid, "mise_source"},
		"no such git": {func(s *Sources) { s.TmuxResurrect = "git+file:///nonexistent/repository" }, fault.NotFound, "tmux_resurrect_source"},
	} {
		s := good
		c.change(&s)
		var f *fault.Error
		if err := Check(s); !errors.As(err, &f) || f.Code != c.code || f.Subject != c.subject {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, c := range []struct{ without, subject string }{{"npm", "mise_source"}, {"git", "git"}} {
		if err := os.Remove(filepath.Join(programs, c.without)); err != nil {
			t.Fatal(err)
		}
		var f *fault.Error
		if err := Check(good); !errors.As(err, &f) || f.Code != fault.Unavailable || f.Subject != c.subject || f.Hint == "" {
			t.Errorf("without %s: %v", c.without, err)
		}
		t.Setenv("npm_config_registry", "https://npm.example") // npm need not be asked
	}
}

// Where packages come from is what npm is configured for, and npm's own to say where nothing is.
func TestRegistry(t *testing.T) {
	home, programs := t.TempDir(), t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("PATH", programs)
	t.Setenv("npm_config_registry", "")
	t.Setenv("NPM_CONFIG_REGISTRY", "")
	var f *fault.Error
	if at, err := registry(t.Context(), "mise_source"); !errors.As(err, &f) || f.Code != fault.Unavailable || f.Subject != "mise_source" || f.Hint == "" {
		t.Errorf("without npm: %q, %v", at, err)
	}
	npm := "#!/bin/sh\n[ \"$*\" = 'config get registry' ] && echo https://npm.example/packages\n"
	if err := os.WriteFile(filepath.Join(programs, "npm"), []byte(npm), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ rc, env, want string }{
		{"", "", "https://npm.example/packages/"},
		{"color=true\nregistry = https://rc.example/\n", "", "https://rc.example/"},
		{"registry=https://rc.example/\n", "https://env.example", "https://env.example/"},
	} {
		if err := os.WriteFile(filepath.Join(home, ".npmrc"), []byte(c.rc), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("npm_config_registry", c.env)
		if at, err := registry(t.Context(), "mise_source"); at != c.want || err != nil {
			t.Errorf("%+v: %q, %v", c, at, err)
		}
	}
}
