package docs

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/test/fakeinstall"
)

const root = "../.."

var (
	update  = flag.Bool("update", false, "rewrite testdata/skips.golden")
	install fakeinstall.Install
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "banger-docs-*")
		if err == nil {
			defer os.RemoveAll(dir)
			install, err = fakeinstall.Build(root, dir)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// pages reads all documentation for users and contributors.
func pages(t *testing.T) []page {
	t.Helper()
	var names []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/*/*.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			name, err := filepath.Rel(root, f)
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, name)
		}
	}
	if len(names) < 8 {
		t.Fatalf("only %d pages: %v", len(names), names)
	}
	var out []page
	for _, name := range names {
		p, err := readPage(root, name)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

func runnable(b block) bool { return b.lang == "console" || b.lang == "sh" }

// Every command that a page shows works, in the page's order, and prints what the page says.
func TestCommands(t *testing.T) {
	ran := 0
	for _, p := range pages(t) {
		var todo []block
		for _, b := range p.blocks {
			if runnable(b) && !b.real && b.skip == "" {
				todo = append(todo, b)
			}
		}
		if ran += len(todo); len(todo) == 0 {
			continue
		}
		t.Run(strings.ReplaceAll(p.name, "/", "-"), func(t *testing.T) {
			t.Parallel()
			work := t.TempDir()
			env, err := install.Env(work)
			if err != nil {
				t.Fatal(err)
			}
			// Pages are read in a checkout, where the program lies in the current directory.
			checkout := filepath.Join(work, "banger")
			if err := os.Mkdir(checkout, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(filepath.Join(install.Bin, "banger"), filepath.Join(checkout, "banger")); err != nil {
				t.Fatal(err)
			}
			s, err := startShell(checkout, append(os.Environ(), env...), time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := s.close(); err != nil {
					t.Error(err)
				}
				if err := install.EndDaemons(work); err != nil {
					t.Error(err)
				}
			})
			for _, b := range todo {
				if err := s.runBlock(b); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	if ran < 20 {
		t.Errorf("only %d blocks were run", ran)
	}
}

// A block that nobody runs is a decision: the list is in testdata/skips.golden.
func TestSkips(t *testing.T) {
	var got strings.Builder
	for _, p := range pages(t) {
		for _, b := range p.blocks {
			if b.skip != "" {
				first, _, _ := strings.Cut(b.text, "\n")
				fmt.Fprintf(&got, "%s: %s: %s\n", b.page, strings.TrimPrefix(first, "$ "), b.skip)
			}
			if b.skip != "" && b.real {
				t.Errorf("%s: real and skipped", b.at())
			}
			if !slices.Contains([]string{"", "console", "sh", "toml", "text", "json"}, b.lang) {
				t.Errorf("%s: %q is no language of a block: console, sh, toml, json, text, none", b.at(), b.lang)
			}
		}
	}
	const golden = "testdata/skips.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got.String()); diff != "" {
		t.Errorf("blocks that are not run changed; if that is meant: go test ./test/docs -update\n%s", diff)
	}
}

// A config.toml that a page shows, or that lies in examples, is one that is accepted.
func TestSettings(t *testing.T) {
	accepted := func(where, text string) {
		t.Helper()
		file := filepath.Join(t.TempDir(), "config.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		e := config.Environment{Home: "/home/user", UID: os.Geteuid(), Tmp: "/tmp", Getenv: func(name string) string {
			if name == "BANGER_CONFIG" {
				return file
			}
			return ""
		}}
		paths, err := config.ResolvePaths(e)
		if err != nil {
			t.Fatal(err)
		}
		_, warnings, err := config.Load(e, paths, vm.Host{CPUs: 4, MemoryMiB: 8192})
		if err != nil || len(warnings) > 0 {
			t.Errorf("%s: %v %v", where, err, warnings)
		}
	}
	for _, p := range pages(t) {
		for _, b := range p.blocks {
			if b.lang == "toml" && b.skip == "" {
				accepted(b.at(), b.text)
			}
		}
	}
	examples, err := filepath.Glob(filepath.Join(root, "examples", "*.toml"))
	if err != nil || len(examples) == 0 {
		t.Fatalf("there are no examples (%v)", err)
	}
	for _, name := range examples {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		accepted(name, string(text))
	}
}

var (
	invocation = regexp.MustCompile(`(?:^|[\s(;&|"])(?:\./)?(banger(?: +[^\s|;&)>]+)+)`)
	codeSpan   = regexp.MustCompile("`([^`\n]+)`")
	makeTarget = regexp.MustCompile(`(?:^|[\s;&])make ([a-z][a-z0-9-]*)`)
)

// Commands, flags and targets that a page names exist, whether they are run or not.
func TestNames(t *testing.T) {
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	help := helpPages{}
	seen := 0
	for _, p := range pages(t) {
		check := func(where, text string) {
			for _, m := range invocation.FindAllStringSubmatch(text, -1) {
				seen++
				if err := help.check(strings.Fields(m[1])); err != nil {
					t.Errorf("%s: %s: %v", where, m[1], err)
				}
			}
			for _, m := range makeTarget.FindAllStringSubmatch(text, -1) {
				if !regexp.MustCompile(`(?m)^` + m[1] + `:|^[a-z -]*\b` + m[1] + `(?: [a-z -]+)?:`).Match(makefile) {
					t.Errorf("%s: the Makefile has no target %s", where, m[1])
				}
			}
		}
		for _, b := range p.blocks {
			if !runnable(b) {
				continue
			}
			commands, err := b.commands()
			if err != nil {
				t.Error(err)
			}
			for _, c := range commands {
				for line := range strings.Lines(c.typed) {
					if !strings.HasPrefix(strings.TrimSpace(line), "#") {
						check(b.at(), line)
					}
				}
			}
		}
		for i, line := range strings.Split(p.prose, "\n") {
			where := fmt.Sprintf("%s:%d", p.name, i+1)
			for _, m := range codeSpan.FindAllStringSubmatch(line, -1) {
				check(where, m[1])
			}
			if strings.HasPrefix(line, "    ") { // an indented block: read, not run
				typed, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "$ "), " #")
				check(where, typed)
				if p.name != "README.md" && regexp.MustCompile(`^(\./)?(banger|make) [a-z]`).MatchString(typed) {
					t.Errorf("%s: a command outside of a fenced block is not run: use ```console", where)
				}
			}
		}
	}
	if seen < 60 {
		t.Errorf("only %d commands were found in the documentation", seen)
	}
}

// helpPages holds what `banger ... --help` says, by command.
type helpPages map[string]helpPage

type helpPage struct {
	commands map[string]string // by name and alias
	flags    map[string]bool
}

func (h helpPages) of(path string) (helpPage, error) {
	if p, ok := h[path]; ok {
		return p, nil
	}
	out, err := exec.Command(filepath.Join(install.Bin, "banger"), append(strings.Fields(path), "--help")...).Output()
	if err != nil {
		return helpPage{}, fmt.Errorf("banger %s --help: %w", path, err)
	}
	p := helpPage{map[string]string{}, map[string]bool{}}
	section := ""
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSuffix(line, "\n")
		words := strings.Fields(line)
		switch {
		case line != "" && line[0] != ' ':
			section = strings.TrimSuffix(line, ":")
		case len(words) == 0:
		case strings.HasSuffix(section, "Flags"):
			for _, w := range words[:min(2, len(words))] {
				if strings.HasPrefix(w, "-") {
					p.flags[strings.TrimSuffix(w, ",")] = true
				}
			}
		case strings.HasSuffix(section, "ommands"):
			p.commands[words[0]] = words[0]
		}
	}
	h[path] = p
	for name := range p.commands {
		sub := strings.TrimSpace(path + " " + name)
		if out, err := exec.Command(filepath.Join(install.Bin, "banger"), append(strings.Fields(sub), "--help")...).Output(); err == nil {
			if _, rest, ok := strings.Cut(string(out), "Aliases:\n"); ok {
				line, _, _ := strings.Cut(rest, "\n")
				for _, alias := range strings.Split(line, ",") {
					p.commands[strings.TrimSpace(alias)] = name
				}
			}
		}
	}
	return p, nil
}

// check follows one command line: its words must be commands as long as there are any to choose
// from, and its flags must be theirs.
func (h helpPages) check(words []string) error {
	path := ""
	p, err := h.of(path)
	if err != nil {
		return err
	}
	var flags []string
	value := false
	for _, w := range words[1:] {
		w = strings.Trim(w, `"'.,:`)
		switch {
		case w == "--" || strings.HasPrefix(w, "COMMAND") || w == "...":
			return h.known(path, flags)
		case value:
			value = false
		case strings.HasPrefix(w, "-"):
			name, _, joined := strings.Cut(w, "=")
			flags = append(flags, name)
			value = !joined && (name == "-o" || name == "--output")
		case len(p.commands) > 0:
			name, ok := p.commands[w]
			if !ok {
				return fmt.Errorf("there is no command %q", w)
			}
			path = strings.TrimSpace(path + " " + name)
			if p, err = h.of(path); err != nil {
				return err
			}
		}
	}
	return h.known(path, flags)
}

func (h helpPages) known(path string, flags []string) error {
	p, err := h.of(path)
	if err != nil {
		return err
	}
	for _, f := range flags {
		if !p.flags[f] {
			return fmt.Errorf("banger %s has no flag %s", path, f)
		}
	}
	return nil
}

var (
	link     = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading  = regexp.MustCompile(`(?m)^#+ +(.*)$`)
	repoPath = regexp.MustCompile("^(docs|internal|tools|test|cmd|client|api|scripts)/[A-Za-z0-9_./-]+$")
)

// Files and sections that a page refers to exist.
func TestLinks(t *testing.T) {
	for _, p := range pages(t) {
		for _, m := range link.FindAllStringSubmatch(p.prose, -1) {
			if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
				continue
			}
			file, anchor, _ := strings.Cut(m[1], "#")
			target := p.text
			if file != "" {
				b, err := os.ReadFile(filepath.Join(root, filepath.Dir(p.name), file))
				if info, serr := os.Stat(filepath.Join(root, filepath.Dir(p.name), file)); serr == nil && info.IsDir() {
					continue
				}
				if err != nil {
					t.Errorf("%s: the link %s leads nowhere", p.name, m[1])
					continue
				}
				target = string(b)
			}
			if anchor != "" && !slices.ContainsFunc(heading.FindAllStringSubmatch(target, -1), func(h []string) bool { return slug(h[1]) == anchor }) {
				t.Errorf("%s: %s has no such section", p.name, m[1])
			}
		}
		for _, m := range codeSpan.FindAllStringSubmatch(p.prose, -1) {
			if repoPath.MatchString(m[1]) {
				if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
					t.Errorf("%s: there is no %s", p.name, m[1])
				}
			}
		}
	}
}

// slug is the anchor of a heading, as forges make it.
func slug(s string) string {
	var b strings.Builder
	for _, r := range strings.ToLower(s) {
		switch {
		case r == ' ':
			b.WriteByte('-')
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '-', r == '_':
			b.WriteRune(r)
		}
	}
	return b.String()
}

// The comparison itself: what it lets pass and what it does not.
func TestMatches(t *testing.T) {
	for _, tt := range []struct {
		shown, output string
		want          bool
	}{
		{"a  b\n", "a b\n", true},
		{"a b\n", "a b\nc\n", false},
		{"a b\n...\n", "a b\nc\nd\n", true},
		{"...\nd\n", "a b\nc\nd\n", true},
		{"x ... y\n", "x 12 34 y\n", true},
		{"x ... y\n", "x 12\n34 y\n", false},
		{"pid ...\n", "pid\n", false},
		{"a.b\n", "axb\n", false},
	} {
		c := command{shown: strings.Split(strings.TrimSuffix(tt.shown, "\n"), "\n")}
		if got := c.matches(tt.output); got != tt.want {
			t.Errorf("%q shown, %q printed: %v", tt.shown, tt.output, got)
		}
	}
	for _, tt := range []struct {
		shown, output string
		want          bool
	}{
		{"otter: booting 2.8 s\n", "otter: vmm 130 ms\notter: booting ... 4.0 s\notter: booting 912 ms\n", true},
		{"otter: booting 2.8 s\n", "otter: vmm 130 ms\n", false},
		{"otter: booting 2.8 s\n", "otter: booting 2m05s\n", true},
		{"otter: running after 5.2 s\n", "otter: waiting, at most 2m00s ... 9.0 s\notter: failed after 5.2 s\n", false},
		{"otter  ec34eeec1296  2 GiB  18s ago\n", "otter 0123456789ab 512 MiB 7s ago\n", true},
		{"otter  ec34eeec1296  2 GiB  18s ago\n", "otter beef 512 MiB 7s ago\n", false},
		{"kept\n", "lost\n", false},
		{"kept\n", "kept\nno way out\n", false},
	} {
		c := command{shown: strings.Split(strings.TrimSuffix(tt.shown, "\n"), "\n"), record: true}
		if got := c.matches(tt.output); got != tt.want {
			t.Errorf("%q recorded, %q printed: %v", tt.shown, tt.output, got)
		}
	}
	if !(command{shown: []string{"otter: x", "banger: otter: is stopped"}}).fails() || (command{shown: []string{"banger vm ssh otter"}}).fails() {
		t.Error("an error is not told from a result")
	}
}

// Wrong documentation is found: each kind of mistake, once.
func TestMistakesAreFound(t *testing.T) {
	help := helpPages{}
	for typed, want := range map[string]string{
		"banger vm list":                             "",
		"banger -o json vm ls":                       "",
		"banger vm ssh otter -- ls --color":          "",
		"banger vm create --name otter --vcpu 4":     "",
		"banger COMMAND --help":                      "",
		"banger vm create --nme otter":               "no flag --nme",
		"banger vm lst":                              `no command "lst"`,
		"banger machine list":                        `no command "machine"`,
		"banger vm list --vcpu 4":                    "no flag --vcpu",
		"banger operation watch 0b9f2c4d --nonsense": "no flag --nonsense",
	} {
		err := help.check(strings.Fields(typed))
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", typed, err)
		}
	}
}
