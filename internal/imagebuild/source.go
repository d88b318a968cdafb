package imagebuild

import (
	"archive/tar"
	"bufio"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"git.thaloco.com/thaloco/banger/internal/cachedir"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// A source says where something comes from and what it must be:
//
//	npm:<package>@<version>#sha256=<hex>   the package's archive, of the registry that npm is configured for
//	https://<host>/<path>#sha256=<hex>     a program or an archive
//	/<path>[#sha256=<hex>]                 likewise, of this machine
//	git+https://<host>/<path>#<commit>     a commit of a repository
//	git+file:///<path>[#<commit>]          likewise, of this machine; /<path> of a directory is the same
//
// What comes from elsewhere must be pinned, by the SHA-256 of what is fetched or by the commit.
type source struct {
	kind string // npm, url, file, git
	at   string
	pin  string // SHA-256 or commit; "" only for what is the user's own
}

const (
	kindNPM  = "npm"
	kindURL  = "url"
	kindFile = "file"
	kindGit  = "git"
)

var (
	commitForm  = regexp.MustCompile(`^[0-9a-f]{40}([0-9a-f]{24})?$`)
	sumForm     = regexp.MustCompile(`^[0-9a-f]{64}$`)
	packageForm = regexp.MustCompile(`^(@[a-z0-9._-]+/)?[a-z0-9._-]+@[A-Za-z0-9.+-]+$`)
	refForm     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]*$`)
)

// ValidateSource checks the form of a source; nothing is fetched. The error says what is allowed.
func ValidateSource(text string) error {
	_, err := parseSource(text)
	return err
}

func parseSource(text string) (source, error) {
	at, pin, _ := strings.Cut(text, "#")
	sum := strings.TrimPrefix(pin, "sha256=")
	s := source{at: at, pin: sum}
	switch {
	case strings.HasPrefix(at, "npm:"):
		s.kind, s.at = kindNPM, strings.TrimPrefix(at, "npm:")
		if !packageForm.MatchString(s.at) {
			return s, errors.New("names no npm package with a version, such as npm:left-pad@1.3.0")
		}
	case strings.HasPrefix(at, "git+"):
		s.kind, s.at = kindGit, strings.TrimPrefix(at, "git+")
		local, isLocal := strings.CutPrefix(s.at, "file://")
		switch {
		case isLocal && filepath.IsAbs(local):
			s.at = local
		case !strings.HasPrefix(s.at, "https://") && !strings.HasPrefix(s.at, "http://"):
			return s, errors.New("is a git repository at neither https:// nor file:///")
		case !commitForm.MatchString(pin):
			return s, errors.New("pins no commit: append # and all digits of it")
		}
	case strings.HasPrefix(at, "https://"), strings.HasPrefix(at, "http://"):
		s.kind = kindURL
	case strings.HasPrefix(at, "file:///"), filepath.IsAbs(at):
		s.kind, s.at = kindFile, strings.TrimPrefix(at, "file://")
		if fi, err := os.Stat(s.at); err == nil && fi.IsDir() {
			s.kind = kindGit
		}
	default:
		return s, errors.New("is none of npm:<package>@<version>, an https:// URL, git+https:// with a commit, an absolute path")
	}
	if s.kind == kindGit {
		if s.pin != "" && !refForm.MatchString(s.pin) {
			return s, errors.New("names no commit, branch or tag")
		}
		return s, nil
	}
	if pin == "" && s.kind == kindFile {
		return s, nil
	}
	if !strings.HasPrefix(pin, "sha256=") || !sumForm.MatchString(sum) {
		return s, errors.New("is not pinned: append #sha256= and the 64 digits that sha256sum prints for it")
	}
	return s, nil
}

// Fetcher fetches sources into a cache by what they are pinned to, so that each is fetched once.
type Fetcher struct {
	Cache string       // directory, made if need be
	HTTP  *http.Client // nil: the default one, which minds the proxy of the environment
	// Patience bounds the fetch of a git repository, which says nothing while it goes on; 0: as long as any download may take.
	Patience time.Duration
}

// fetched is a source that lies on this machine.
type fetched struct {
	setting string // that names it
	from    string // for people
	path    string
	version string // if its name tells
	content string // the SHA-256 of it, or the commit that it is a tree of
}

const (
	// fetchTime bounds one download: some hundred MiB over a slow line.
	fetchTime = 30 * time.Minute
	// stallTime is how long a download may go without a byte.
	stallTime = time.Minute
	maxFetch  = 2 << 30 // bytes
	// What the cache keeps: the sources of some images, each up to 60 MiB. One that is younger may be on its way into an image.
	downloadsKept = 16
	downloadYoung = 24 * time.Hour
	// askTime bounds the question to npm about its settings: a second or two on a busy machine.
	askTime = 30 * time.Second
)

// part is one of the tools: the setting that names its source, that source, and what becomes of it.
type part struct {
	setting, source string
	to              *fetched
}

// parts are those that are not left out.
func (s Sources) parts(t *Tools) []part {
	all := []part{
		{"mise_source", s.Mise, &t.mise}, {"opencode_source", s.Opencode, &t.opencode},
		{"tmux_resurrect_source", s.TmuxResurrect, &t.resurrect}, {"tmux_continuum_source", s.TmuxContinuum, &t.continuum},
	}
	return slices.DeleteFunc(all, func(p part) bool { return p.source == "" })
}

// Identity says what the tools are going to be, without fetching anything: what is written for them, sources with the pins that they
// have, and of what lies on this machine the content. Errors name the setting, as Fetch's.
func (s Sources) Identity(ctx context.Context) (string, error) {
	if s == (Sources{}) {
		return "", nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%x\n", sha256.Sum256([]byte(opencodeAt("")+profile+bashrcMore+tmuxIntro+tmuxResurrect+tmuxContinuum)))
	for _, p := range s.parts(&Tools{}) {
		at, err := parseSource(p.source)
		if err != nil {
			return "", fault.New(fault.Invalid, p.setting, "%q %s", p.source, err)
		}
		content := at.pin
		switch {
		case at.kind == kindFile:
			if content, err = sumOf(ctx, at.at); err != nil {
				return "", unreadable(err, p.setting, at.at)
			}
		case at.kind == kindGit && filepath.IsAbs(at.at):
			if content, err = commitOf(ctx, p.setting, at); err != nil {
				return "", err
			}
		}
		fmt.Fprintf(&b, "%s %s %s\n", p.setting, at.at, content)
	}
	return b.String(), nil
}

// commitOf resolves what a source names in a repository on this machine.
func commitOf(ctx context.Context, setting string, s source) (string, error) {
	if err := needGit(setting); err != nil {
		return "", err
	}
	ref := s.pin
	if ref == "" {
		ref = "HEAD"
	}
	commit, err := run(ctx, "git", "-C", s.at, "rev-parse", "--verify", "--quiet", "--end-of-options", ref+"^{commit}")
	if err != nil || !commitForm.MatchString(commit) {
		return "", fault.Wrap(err, fault.NotFound, setting, "%s has no commit %s, or is no git repository of yours", s.at, ref).WithHint("correct %s in config.toml", setting)
	}
	return commit, nil
}

// Fetch gets all tools, and tells what it does in lines. A source out of reach or with other content is an error that names
// its setting: fault.Unavailable, Corrupt, NotFound, Invalid.
func (f Fetcher) Fetch(ctx context.Context, s Sources, say func(string)) (t Tools, err error) {
	for _, p := range s.parts(&t) {
		if *p.to, err = f.fetch(ctx, p.setting, p.source, say); err != nil {
			return Tools{}, err
		}
	}
	return t, nil
}

// Missing is a tool that could not be had: the setting that names its source, and why.
type Missing struct {
	Setting string
	Err     error
}

// Tool is the name of what is missing.
func (m Missing) Tool() string {
	return strings.ReplaceAll(strings.TrimSuffix(m.Setting, "_source"), "_", "-")
}

// FetchReachable is Fetch for those to whom tools are welcome and not needed: one whose source is out of reach is left out, and
// told of.
func (f Fetcher) FetchReachable(ctx context.Context, s Sources, say func(string)) (t Tools, without []Missing, err error) {
	for _, p := range s.parts(&t) {
		got, err := f.fetch(ctx, p.setting, p.source, say)
		switch {
		case err == nil:
			*p.to = got
		case ctx.Err() == nil && fault.Is(err, fault.Unavailable):
			without = append(without, Missing{p.setting, err})
		default:
			return Tools{}, nil, err
		}
	}
	return t, without, nil
}

// Check looks whether Fetch can begin: at the form of each source, at those on this machine, and for git and npm if one takes
// them. Nothing is fetched and no program run. The error names the setting, as Fetch's.
func Check(s Sources) error {
	for _, p := range s.parts(&Tools{}) {
		at, err := parseSource(p.source)
		if err != nil {
			return fault.New(fault.Invalid, p.setting, "%q %s", p.source, err).WithHint("correct %s in config.toml", p.setting)
		}
		if filepath.IsAbs(at.at) {
			if _, err := os.Stat(at.at); err != nil {
				return unreadable(err, p.setting, at.at)
			}
		}
		switch at.kind {
		case kindGit:
			err = needGit(p.setting)
		case kindNPM:
			if configuredRegistry() == "" {
				_, err = findNPM(p.setting)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func unreadable(err error, setting, path string) error {
	return fault.Wrap(err, fault.NotFound, setting, "%s cannot be read", path).WithHint("correct %s in config.toml", setting)
}

func needGit(setting string) error {
	if _, err := exec.LookPath("git"); err != nil {
		return fault.Wrap(err, fault.Unavailable, "git", "is not installed, and %s is a git repository", setting).WithHint("sudo apt install git")
	}
	return nil
}

func (f Fetcher) fetch(ctx context.Context, setting, text string, say func(string)) (fetched, error) {
	out := fetched{setting: setting, from: text}
	s, err := parseSource(text)
	if err != nil {
		return out, fault.New(fault.Invalid, setting, "%q %s", text, err)
	}
	if err := os.MkdirAll(f.Cache, 0o700); err != nil {
		return out, fault.Wrap(err, fault.Internal, f.Cache, "the cache cannot be written")
	}
	switch s.kind {
	case kindNPM:
		_, out.version = splitPackage(s.at)
	case kindFile:
		sum, err := sumOf(ctx, s.at)
		if err != nil {
			return out, unreadable(err, setting, s.at)
		}
		out.path, out.content = s.at, sum
		if s.pin == "" {
			return out, nil
		}
		return out, checkSum(sum, s.pin, setting, text)
	case kindGit:
		return f.git(ctx, s, out, say)
	}
	out.path, out.content = filepath.Join(f.Cache, s.pin), s.pin
	there, err := f.have(ctx, out.path)
	if err != nil {
		return out, err
	}
	if sum, err := sumOf(ctx, out.path); there && err == nil && sum == s.pin { // a cache may be anything
		say("have " + text)
		return out, nil
	}
	url := s.at
	if s.kind == kindNPM {
		name, version := splitPackage(s.at)
		at, err := registry(ctx, setting)
		if err != nil {
			return out, err
		}
		url = at + name + "/-/" + name[strings.LastIndexByte(name, '/')+1:] + "-" + version + ".tgz"
	}
	say("fetching " + url)
	return out, f.download(ctx, url, s.pin, out)
}

// have says whether an entry of the cache is there, which is used then.
func (f Fetcher) have(ctx context.Context, path string) (bool, error) {
	there, err := cachedir.Use(ctx, path)
	if err != nil {
		return false, fault.Wrap(err, fault.CodeOf(err), path, "the cache cannot be used")
	}
	return there, nil
}

// splitPackage splits name@version; the name may begin with an @ itself.
func splitPackage(text string) (name, version string) {
	at := strings.LastIndexByte(text, '@')
	return text[:at], text[at+1:]
}

// configuredRegistry is the npm registry that the environment names, else ~/.npmrc; "" if neither does.
func configuredRegistry() string {
	for _, name := range []string{"npm_config_registry", "NPM_CONFIG_REGISTRY"} {
		if v := os.Getenv(name); v != "" {
			return v
		}
	}
	if home, err := os.UserHomeDir(); err == nil {
		if b, err := os.ReadFile(filepath.Join(home, ".npmrc")); err == nil {
			for line := range strings.Lines(string(b)) {
				if key, value, ok := strings.Cut(line, "="); ok && strings.TrimSpace(key) == "registry" {
					return strings.TrimSpace(value)
				}
			}
		}
	}
	return ""
}

// findNPM finds npm. fault.Unavailable without it, with the setting that wants it.
func findNPM(setting string) (string, error) {
	path, err := exec.LookPath("npm")
	if err != nil {
		return "", fault.Wrap(err, fault.Unavailable, setting, "names an npm package, and npm, which knows where packages come from, is not installed").
			WithHint("sudo apt install npm, or name another source with %s in config.toml", setting)
	}
	return path, nil
}

// registry is the npm registry of the user's configuration, with a slash at its end: the configured one, else what npm says
// itself, which knows the public one. fault.Unavailable without any, with the setting that wants it.
func registry(ctx context.Context, setting string) (string, error) {
	at := configuredRegistry()
	if at == "" {
		npm, err := findNPM(setting)
		if err != nil {
			return "", err
		}
		ctx, cancel := context.WithTimeout(ctx, askTime)
		defer cancel()
		said, err := exec.CommandContext(ctx, npm, "config", "get", "registry").Output()
		at = strings.TrimSpace(string(said))
		if err != nil || !strings.HasPrefix(at, "https://") && !strings.HasPrefix(at, "http://") {
			return "", fault.Wrap(err, fault.Unavailable, setting, "names an npm package, and npm does not say where packages come from").
				WithHint("see: npm config get registry; or name another source with %s in config.toml", setting)
		}
	}
	return strings.TrimRight(at, "/") + "/", nil
}

func checkSum(got, want, setting, from string) error {
	if got == want {
		return nil
	}
	return fault.New(fault.Corrupt, setting, "what is at %s has the SHA-256 %s", from, got).
		WithHint("it is another version, was damaged or tampered with: correct %s in config.toml if it is what you want", setting)
}

func sumOf(ctx context.Context, path string) (string, error) {
	in, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer in.Close()
	h := sha256.New()
	if _, err := io.Copy(h, &bounded{ctx: ctx, r: in}); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// bounded is a reader that ends with its context.
type bounded struct {
	ctx context.Context
	r   io.Reader
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.ctx.Err() != nil {
		return 0, context.Cause(b.ctx)
	}
	return b.r.Read(p)
}

// download fetches a URL into the cache, whole or not at all.
func (f Fetcher) download(ctx context.Context, url, pin string, out fetched) (err error) {
	limited, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	stalled := time.AfterFunc(stallTime, cancel)
	defer stalled.Stop()
	unreachable := func(err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fault.Wrap(err, fault.Unavailable, out.setting, "%s cannot be fetched", url).
			WithHint("set %s in config.toml to a place that this machine reaches: another URL, a local file or git repository (docs/images.md)", out.setting)
	}
	r, err := http.NewRequestWithContext(limited, http.MethodGet, url, nil)
	if err != nil {
		return fault.Wrap(err, fault.Invalid, out.setting, "%s is no URL", url)
	}
	client := f.HTTP
	if client == nil {
		client = http.DefaultClient
	}
	resp, err := client.Do(r)
	if err != nil {
		return unreachable(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return unreachable(errors.New(resp.Status))
	}
	temp, err := os.CreateTemp(f.Cache, ".new-*")
	if err != nil {
		return fault.Wrap(err, fault.Internal, f.Cache, "the cache cannot be written")
	}
	defer func() {
		if err != nil {
			_ = os.Remove(temp.Name()) // the failure that led here is being returned
		}
		_ = temp.Close() // synced where it matters
	}()
	h := sha256.New()
	body := bufio.NewReaderSize(&wakeful{resp.Body, stalled}, 1<<20)
	n, err := io.Copy(temp, io.TeeReader(io.LimitReader(body, maxFetch+1), h))
	switch {
	case err != nil:
		return unreachable(err)
	case n > maxFetch:
		return unreachable(fmt.Errorf("it has more than %d bytes", int64(maxFetch)))
	}
	if err := checkSum(hex.EncodeToString(h.Sum(nil)), pin, out.setting, url); err != nil {
		return err
	}
	return f.publish(ctx, temp, out.path)
}

// publish makes a file that was written under another name an entry of the cache, which keeps those that were used last.
func (f Fetcher) publish(ctx context.Context, temp *os.File, path string) error {
	err := errors.Join(temp.Sync(), os.Rename(temp.Name(), path))
	if err == nil {
		err = cachedir.Keep(ctx, f.Cache, downloadsKept, downloadYoung, nil)
	}
	if err != nil {
		return fault.Wrap(err, fault.CodeOf(err), path, "the cache cannot be written")
	}
	return nil
}

// wakeful puts an alarm off while bytes come.
type wakeful struct {
	r     io.Reader
	alarm *time.Timer
}

func (w *wakeful) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if n > 0 {
		w.alarm.Reset(stallTime)
	}
	return n, err
}

// git makes an archive of a commit, of a repository of this machine or of one that is fetched.
func (f Fetcher) git(ctx context.Context, s source, out fetched, say func(string)) (fetched, error) {
	patience := f.Patience
	if patience == 0 {
		patience = fetchTime
	}
	whole := ctx
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := needGit(out.setting); err != nil {
		return out, err
	}
	remote := strings.Contains(s.at, "://")
	repository := s.at
	if remote {
		out.path, out.content = filepath.Join(f.Cache, "git-"+s.pin+".tar"), s.pin
		switch there, err := f.have(ctx, out.path); {
		case err != nil:
			return out, err
		case there: // made whole or not at all
			say("have " + out.from)
			return out, nil
		}
		say("fetching " + out.from)
		dir, err := os.MkdirTemp(f.Cache, ".git-*")
		if err != nil {
			return out, fault.Wrap(err, fault.Internal, f.Cache, "the cache cannot be written")
		}
		defer os.RemoveAll(dir)
		repository = dir
		for _, args := range [][]string{{"init", "--quiet", "--bare", dir}, {"-C", dir, "fetch", "--quiet", "--depth", "1", s.at, s.pin}} {
			if message, err := run(ctx, "git", args...); err != nil {
				if whole.Err() != nil {
					return out, context.Cause(whole)
				}
				if ctx.Err() != nil {
					message = "it did not come within " + patience.String()
				}
				why := cmp.Or(strings.TrimPrefix(message, "fatal: "), err.Error()) // git says more than its exit status does
				return out, fault.New(fault.Unavailable, out.setting, "%s cannot be fetched: %s", s.at, why).
					WithHint("set %s in config.toml to a place that this machine reaches: another URL, a local file or git repository (docs/images.md)", out.setting)
			}
		}
	}
	commit, err := commitOf(ctx, out.setting, source{kind: s.kind, at: repository, pin: s.pin})
	if err != nil {
		return out, err
	}
	if !remote {
		say("taking commit " + commit + " of " + s.at)
		out.path, out.content = filepath.Join(f.Cache, "git-"+commit+".tar"), commit
		if there, err := f.have(ctx, out.path); there || err != nil {
			return out, err
		}
	}
	temp, err := os.CreateTemp(f.Cache, ".new-*")
	if err != nil {
		return out, fault.Wrap(err, fault.Internal, f.Cache, "the cache cannot be written")
	}
	defer os.Remove(temp.Name()) // gone if it was renamed
	defer temp.Close()
	message, err := run(ctx, "git", "-C", repository, "archive", "--format=tar", "--output="+temp.Name(), commit)
	if err != nil {
		return out, fault.Wrap(err, fault.Corrupt, out.setting, "commit %s of %s cannot be read: %s", commit, s.at, message).WithHint("check it: git -C %s fsck", s.at)
	}
	return out, f.publish(ctx, temp, out.path)
}

// run runs a program and returns its first line. It asks nobody anything.
func run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "GIT_TERMINAL_PROMPT=0", "LC_ALL=C")
	// git waits for its helpers, which go on without it: all of them are ended.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second // a helper of git's may hold its output open
	out, err := cmd.CombinedOutput()
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line, err
}

// opened is an open file of the host, at its begin.
type opened struct {
	*os.File
	size  int64
	first []byte
	ends  []func()
}

func (o *opened) head() []byte { return o.first }

func (o *opened) Close() error {
	for _, end := range o.ends {
		end()
	}
	return o.File.Close()
}

// open opens what was fetched: as an archive, if it is a tar one, compressed or not.
func (f fetched) open(ctx context.Context) (*opened, *tar.Reader, error) {
	file, err := os.Open(f.path)
	if err != nil {
		return nil, nil, fault.Wrap(err, fault.NotFound, f.setting, "%s cannot be read", f.path)
	}
	o := &opened{File: file, first: make([]byte, 512)}
	fi, err := file.Stat()
	if err == nil {
		o.size = fi.Size()
		var n int
		n, err = io.ReadFull(file, o.first)
		if o.first = o.first[:n]; errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			err = nil
		}
	}
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, nil, errors.Join(f.damaged(err), o.Close())
	}
	var r io.Reader = &bounded{ctx: ctx, r: file}
	head := string(o.first)
	switch {
	case strings.HasPrefix(head, "\x1f\x8b"):
		r, err = gzip.NewReader(r)
	case strings.HasPrefix(head, "\xfd7zXZ"):
		r, err = xz.NewReader(r)
	case strings.HasPrefix(head, "\x28\xb5\x2f\xfd"):
		var z *zstd.Decoder
		if z, err = zstd.NewReader(r, zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderConcurrency(1)); err == nil {
			o.ends = append(o.ends, z.Close)
			r = z
		}
	case len(head) == 512 && head[257:262] == "ustar":
	default:
		return o, nil, nil
	}
	if err != nil {
		return nil, nil, errors.Join(f.damaged(err), o.Close())
	}
	return o, tar.NewReader(r), nil
}

func (f fetched) damaged(cause error) error {
	return fault.Wrap(cause, fault.Corrupt, f.setting, "what is at %s cannot be read", f.from).WithHint("check it, and correct %s in config.toml", f.setting)
}
