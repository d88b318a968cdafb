// Package imagebuild owns what an image build puts into its builder: where each part comes from, pinned and checked, and the
// scripts that provision.
//
// It fetches onto the host, where what was fetched is checked before any guest sees it, and writes nothing but its
// cache. It never talks to a guest: internal/sandbox does, and it knows no VM, image or store.
package imagebuild

import (
	"archive/tar"
	"bytes"
	"context"
	_ "embed" // the scripts
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Pinned sources of what every build installs. The checksum is of what is fetched; a git commit is one itself.
const (
	DefaultMise          = "npm:@jdxcode/mise-linux-x64@2026.9.15#sha256=b51f2463bc4fcdc3b0959b1454792f64be3612e73d856cbca4a062e39e070e74"
	DefaultOpencode      = "npm:opencode-linux-x64-baseline@1.18.33#sha256=76f56feba203ed24ff855129de316959847b7af0a7095011d2d5145f6988c940" // without AVX2, which not every CPU has
	DefaultTmuxResurrect = "git+https://github.com/tmux-plugins/tmux-resurrect#cff343cf9e81983d3da0c8562b01616f12e8d548"
	DefaultTmuxContinuum = "git+https://github.com/tmux-plugins/tmux-continuum#0698e8f4b17d6454c71bf5212895ec055c578da0"
)

// Sources are where the parts come from, as the settings of the same names say. An empty one leaves its part out.
type Sources struct {
	Mise, Opencode, TmuxResurrect, TmuxContinuum string
}

// Places in the guest. Programs lie in the image, which all VMs share; what is a user's own lies in /root.
const (
	misePath = "usr/local/bin/mise"
	// opencodeInstalls is where mise has the versions of opencode that all users of a machine share, each a directory with the
	// program: tried with mise 2026.9.15, which finds it in no bin directory of such.
	opencodeInstalls = "usr/local/share/mise/installs/opencode"
	opencodeLink     = "usr/local/bin/opencode"
	miseConfig       = "etc/mise/config.toml"
	profilePath      = "etc/profile.d/banger-mise.sh"
	tmuxPlugins      = "root/.tmux/plugins"
	// stampPath names what the tools are, so that a base that has the same ones is not given them again. It comes last.
	stampPath = "usr/local/share/banger/tools"
)

// profile activates mise in shells that people log in to. It is read by interactive ones as well, by way of what Appended adds,
// and may be read twice.
const profile = `# Written by banger.
if [ -n "${BASH_VERSION-}" ] && [ -z "${_banger_mise-}" ] && [ -x /usr/local/bin/mise ]; then
  _banger_mise=1
  eval "$(/usr/local/bin/mise activate bash)"
fi
`

const bashrcMore = `
# Written by banger.
if [ -r /etc/profile.d/banger-mise.sh ]; then . /etc/profile.d/banger-mise.sh; fi
`

// What is read besides by tmux, for the plugins that are there.
const (
	tmuxIntro = `# Written by banger: sessions are saved every 15 minutes, prefix Ctrl-S saves now, prefix Ctrl-R restores.
`
	tmuxResurrect = `run-shell /root/.tmux/plugins/tmux-resurrect/resurrect.tmux
`
	tmuxContinuum = `set -g @continuum-save-interval '15'
set -g @continuum-restore 'off'
run-shell /root/.tmux/plugins/tmux-continuum/continuum.tmux
`
)

// Step is one thing that a build does in the guest: a script of sh, which gets Input, if there is any.
type Step struct {
	Name   string
	Script string
	Input  func(ctx context.Context, w io.Writer) error // nil: none
}

// Recipe is what a build is to make.
type Recipe struct {
	Packages []string // of the distribution
	Docker   bool
	Custom   []Step // the user's own, last
}

//go:embed prepare.sh
var prepareScript string

//go:embed packages.sh
var packagesScript string

//go:embed tools.sh
var toolsScript string

//go:embed finish.sh
var finishScript string

// dockerPackages are what Docker needs. docker-cli is a package of its own in some releases only.
var dockerPackages = []string{"docker.io", "?docker-cli", "containerd", "iptables", "nftables", "ca-certificates"}

// toolPackages are what the tools need.
var toolPackages = []string{"bash", "git", "tmux", "ca-certificates"}

// ValidatePackages refuses what is no name of a Debian package: names go into a script. fault.Invalid.
func ValidatePackages(names []string) error {
	for _, name := range names {
		if name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789+-.:") != "" || strings.ContainsAny(name[:1], "+-.:") || strings.ContainsFunc(name, notOfAPackage) {
			return fault.New(fault.Invalid, name, "is no name of a package").WithHint("one package a line or comma, in lower case, such as postgresql-client")
		}
	}
	return nil
}

func notOfAPackage(r rune) bool {
	return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789+-.:", r)
}

// ParsePackages reads a list of packages: one a line, or several with commas between, # begins a comment.
func ParsePackages(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		for name := range strings.FieldsFuncSeq(line, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' || r == '\n' || r == '\r' }) {
			if !slices.Contains(out, name) {
				out = append(out, name)
			}
		}
	}
	return out
}

// Tools are fetched parts; some may be left out.
type Tools struct{ mise, opencode, resurrect, continuum fetched }

// opencodeAt is where the program of a version lies.
func opencodeAt(version string) string { return opencodeInstalls + "/" + version + "/opencode" }

// version is opencode's as mise knows it.
func (t Tools) version() string {
	if t.opencode.version == "" {
		return "local" // a file or a URL tells none
	}
	return t.opencode.version
}

// Stamp names the parts and what each is, a line for each.
func (t Tools) Stamp() string {
	var b strings.Builder
	for _, part := range []struct {
		name string
		fetched
	}{{"mise", t.mise}, {"opencode " + t.version(), t.opencode}, {"tmux-resurrect", t.resurrect}, {"tmux-continuum", t.continuum}} {
		if part.path != "" {
			b.WriteString(part.name + " " + part.content + "\n")
		}
	}
	return b.String()
}

// Appended are texts that belong at the end of files of the distribution, by path: shells read the one, tmux the other. A file
// that is not there consists of it, but for /etc/bash.bashrc, which only Debian's bash reads.
func (t Tools) Appended() map[string]string {
	out := map[string]string{}
	if t.mise.path != "" {
		out[BashrcPath] = bashrcMore
	}
	if t.resurrect.path+t.continuum.path == "" {
		return out
	}
	text := tmuxIntro
	if t.resurrect.path != "" {
		text += tmuxResurrect
	}
	if t.continuum.path != "" {
		text += tmuxContinuum
	}
	out[TmuxPath] = text
	return out
}

// Files that Appended adds to.
const (
	BashrcPath = "etc/bash.bashrc"
	TmuxPath   = "root/.tmux.conf"
)

// Steps are what a build does, in order.
func (r Recipe) Steps(t Tools) []Step {
	packages := slices.Concat(toolPackages, r.Packages)
	if r.Docker {
		packages = slices.Concat(packages, dockerPackages)
	}
	more := t.Appended()
	steps := []Step{
		{Name: "prepare", Script: prepareScript},
		{Name: "packages", Script: setting("PACKAGES", strings.Join(packages, " ")) + setting("DOCKER", yes(r.Docker)) + packagesScript},
		{Name: "tools", Script: setting("STAMP", strings.TrimSuffix(t.Stamp(), "\n")) + setting("BASHRC", more[BashrcPath]) + setting("TMUX", more[TmuxPath]) + toolsScript, Input: t.input},
	}
	steps = append(steps, r.Custom...)
	return append(steps, Step{Name: "finish", Script: finishScript})
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return ""
}

// setting is a line of sh that sets a variable. Values come from lists that were checked.
func setting(name, value string) string {
	return name + "='" + strings.ReplaceAll(value, "'", `'\''`) + "'\n"
}

// input is a tar of the tools, for the guest.
func (t Tools) input(ctx context.Context, w io.Writer) error {
	out := tar.NewWriter(w)
	if err := t.Archive(ctx, out); err != nil {
		return err
	}
	return out.Close()
}

// Archive writes the tools as they lie on a machine, root's, by paths below its root directory; no directories come before what is in
// them. All that is missing then is what Appended says.
func (t Tools) Archive(ctx context.Context, out *tar.Writer) error {
	text := func(name, text string) error { return put(out, name, 0o644, int64(len(text)), strings.NewReader(text)) }
	if t.mise.path != "" {
		if err := t.mise.program(ctx, out, "mise", misePath); err != nil {
			return err
		}
		if err := text(profilePath, profile); err != nil {
			return err
		}
	}
	if t.opencode.path != "" {
		program := opencodeAt(t.version())
		if err := t.opencode.program(ctx, out, "opencode", program); err != nil {
			return err
		}
		if err := link(out, opencodeLink, "/"+program); err != nil {
			return err
		}
		if err := text(miseConfig, "# Written by banger.\n[tools]\nopencode = \""+t.version()+"\"\n"); err != nil {
			return err
		}
	}
	for _, plugin := range []struct {
		fetched
		name string
	}{{t.resurrect, "resurrect"}, {t.continuum, "continuum"}} {
		if plugin.path == "" {
			continue
		}
		if err := plugin.tree(ctx, out, tmuxPlugins+"/tmux-"+plugin.name, plugin.name+".tmux"); err != nil {
			return err
		}
	}
	return text(stampPath, t.Stamp())
}

func link(out *tar.Writer, name, target string) error {
	return out.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: time.Unix(0, 0), Format: tar.FormatPAX})
}

// put writes one file of root's.
func put(out *tar.Writer, name string, mode, size int64, r io.Reader) error {
	if err := out.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}); err != nil {
		return err
	}
	n, err := io.Copy(out, r)
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// maxProgram and maxTree bound what is read of an archive, in bytes: archives can unpack to any size.
const (
	maxProgram = 1 << 30
	maxTree    = 256 << 20
)

// measured is the next member of an archive, as long as it and those before it are within a bound. total counts them, with the block that
// each has for its header: files of nothing are not nothing.
func measured(archive *tar.Reader, total *int64, most int64) (*tar.Header, error) {
	h, err := archive.Next()
	if err != nil {
		return nil, err
	}
	const block = 512
	if h.Size > most-block-*total { // not the sum, which may be more than an int64 takes
		return nil, fmt.Errorf("it unpacks to more than %d bytes", most)
	}
	*total += block + h.Size
	return h, nil
}

// program puts a program into out: what was fetched, or the file of that name in it.
func (f fetched) program(ctx context.Context, out *tar.Writer, name, to string) error {
	plain, archive, err := f.open(ctx)
	if err != nil {
		return err
	}
	defer plain.Close()
	if archive == nil {
		if err := f.checkELF(plain.head(), name); err != nil {
			return err
		}
		return put(out, to, 0o755, plain.size, plain)
	}
	for total := int64(0); ; {
		h, err := measured(archive, &total, maxProgram)
		if errors.Is(err, io.EOF) {
			return fault.New(fault.Invalid, f.setting, "there is no program %s in %s", name, f.from).WithHint("correct %s in config.toml, or remove it to have the pinned one", f.setting)
		}
		if err != nil {
			return f.damaged(err)
		}
		if base := h.Name[strings.LastIndexByte(h.Name, '/')+1:]; h.Typeflag != tar.TypeReg || base != name || h.Mode&0o111 == 0 {
			continue
		}
		head := make([]byte, min(h.Size, 20))
		if _, err := io.ReadFull(archive, head); err != nil {
			return f.damaged(err)
		}
		if err := f.checkELF(head, name); err != nil {
			return err
		}
		return put(out, to, 0o755, h.Size, io.MultiReader(bytes.NewReader(head), archive))
	}
}

// checkELF refuses what the guest could not run: ELF of 64 bits, little-endian, for x86-64, or a script.
func (f fetched) checkELF(head []byte, name string) error {
	script := bytes.HasPrefix(head, []byte("#!"))
	if !script && (len(head) < 20 || !bytes.HasPrefix(head, []byte("\x7fELF\x02\x01")) || head[18] != 62 || head[19] != 0) {
		return fault.New(fault.Invalid, f.setting, "%s of %s is no program for amd64", name, f.from).WithHint("correct %s in config.toml, or remove it to have the pinned one", f.setting)
	}
	return nil
}

// tree puts all files of an archive into out, below to, without the directory that all of them are in, if there is one
// such. want must be among them.
func (f fetched) tree(ctx context.Context, out *tar.Writer, to, want string) error {
	plain, archive, err := f.open(ctx)
	if err != nil {
		return err
	}
	defer plain.Close()
	if archive == nil {
		return fault.New(fault.Invalid, f.setting, "%s is no archive", f.from).WithHint("correct %s in config.toml, or remove it to have the pinned one", f.setting)
	}
	type file struct {
		name, link string
		mode       int64
		content    []byte
	}
	var files []file
	var total int64
	for {
		h, err := measured(archive, &total, maxTree)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return f.damaged(err)
		}
		if h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeSymlink {
			continue
		}
		name := strings.TrimPrefix(h.Name, "./")
		if name == "" || strings.HasPrefix(name, "/") || slices.Contains(strings.Split(name, "/"), "..") {
			return f.damaged(fmt.Errorf("it has a file %q", h.Name))
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			return f.damaged(err)
		}
		files = append(files, file{name, h.Linkname, 0o644 | h.Mode&0o111, content})
	}
	top := ""
	for i, x := range files {
		first, _, ok := strings.Cut(x.name, "/")
		if !ok || i > 0 && first+"/" != top {
			top = ""
			break
		}
		top = first + "/"
	}
	found := false
	for _, x := range files {
		name := strings.TrimPrefix(x.name, top)
		found = found || name == want
		if x.link != "" {
			// Only within the tree: an absolute one, or one that climbs, would lead somewhere else in the guest.
			if strings.HasPrefix(x.link, "/") || slices.Contains(strings.Split(x.link, "/"), "..") {
				continue
			}
			if err := link(out, to+"/"+name, x.link); err != nil {
				return err
			}
			continue
		}
		if err := put(out, to+"/"+name, x.mode, int64(len(x.content)), bytes.NewReader(x.content)); err != nil {
			return err
		}
	}
	if !found {
		return fault.New(fault.Invalid, f.setting, "there is no %s in %s", want, f.from).WithHint("correct %s in config.toml, or remove it to have the pinned one", f.setting)
	}
	return nil
}

// PackageStep installs more packages of the distribution.
func PackageStep(name string, packages []string) Step {
	return Step{Name: name, Script: setting("PACKAGES", strings.Join(packages, " ")) + setting("DOCKER", "") + packagesScript}
}
