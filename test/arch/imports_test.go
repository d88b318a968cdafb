// Package arch holds the architecture to what docs/architecture.md says: which folder may import
// which, and that every package says what it owns and never does.
package arch

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "git.thaloco.com/thaloco/banger/"

// ban says that packages under From (a path prefix) import nothing under To, except what Except names.
type ban struct {
	from, to string
	except   []string
	why      string
}

var bans = []ban{
	{"internal/fault", module, nil, "faults are what everything else speaks in: they know nothing of it"},
	{"internal/vm", module, []string{"internal/fault"}, "the domain is free of technology"},
	{"internal/image", module, []string{"internal/fault"}, "the domain is free of technology"},
	{"internal/operation", module, []string{"internal/fault"}, "an operation does not know what it does"},
	{"internal/doctor", module, []string{"internal/fault"}, "checks belong to capabilities; doctor is their form"},
	{"internal/lifecycle", module, []string{"internal/fault", "internal/vm"}, "the engine knows the order of steps and nothing of what they are"},
	{"internal/vmm", module + "internal/", []string{"internal/fault", "internal/vmm", "internal/process", "internal/console", "internal/guest", "internal/jail", "internal/filelock"}, "drivers run machines: they know no use case, store or API"},
	{"internal/process", module, []string{"internal/fault"}, "a process is a process"},
	{"internal/disk", module, []string{"internal/fault", "internal/ext4", "internal/vm"}, "disks are files: who they belong to is not theirs to know"},
	{"internal/oci", module, []string{"internal/fault", "internal/ext4", "internal/disk", "internal/vm", "internal/guest/boot", "internal/filelock"}, "an image becomes a filesystem without knowing for whom"},
	{"internal/guest", "github.com/google/go-containerregistry", nil, "guests fetch no images"},
	{"cmd/banger-vsock-agent", module + "internal/guest/sshd", nil, "every guest holds the agent's program in memory"},
	{"internal/cli", "github.com/google/go-containerregistry", nil, "the daemon fetches images"},
	{"internal/network/bridge", module + "internal/", []string{"internal/fault", "internal/vm", "internal/network", "internal/hostnet", "internal/doctor"}, "a network knows VMs, and no use case, VMM or store"},
	{"internal/hostnet", module + "internal/", []string{"internal/fault", "internal/network"}, "what runs with privileges knows no more than it must"},
	{"internal/helper", module + "internal/", []string{"internal/fault", "internal/vm", "internal/version", "internal/network", "internal/hostnet", "internal/dns", "internal/helper", "internal/jail", "internal/process", "internal/cgroup", "internal/filelock"}, "what runs with privileges knows no more than it must"},
	{"internal/jail", module + "internal/", []string{"internal/fault", "internal/process", "internal/filelock"}, "what runs with privileges knows no more than it must"},
	{"internal/helper/wire", module, []string{"internal/fault"}, "messages are known on both sides, and neither side's business is in them"},
	{"internal/helper/record", module, []string{"internal/fault", "internal/filelock"}, "records are read by what installs the helper, too"},
	{"internal/helper/install", module, []string{"internal/fault", "internal/helper/wire", "internal/helper/record"}, "the command line links it, and nothing that takes privileges"},
	{"internal/network/usernet", module, []string{"internal/fault", "internal/vm", "internal/doctor", "internal/process", "internal/vmm/rundir", "internal/network", "internal/dns"}, "a network knows VMs, and no use case, VMM or store"},
	{"internal/dns", module, []string{"internal/fault"}, "the server is asked names: whose they are is not its to know"},
	{"internal/store", module + "internal/", []string{"internal/fault", "internal/vm", "internal/image", "internal/operation", "internal/lifecycle"}, "the store keeps records, it runs nothing"},
	{"internal/guest/pid1", module + "internal/", []string{"internal/fault", "internal/guest", "internal/vmm"}, "the guest program stays small"},
	{"internal/guest/agentd", module + "internal/", []string{"internal/fault", "internal/guest", "internal/vmm"}, "the guest program stays small"},
	{"internal/guest", module + "api/banger/v1", nil, "the guest does not know the public API"},
	{"internal/sandbox", module + "internal/server", nil, "use cases do not know their front ends"},
	{"internal/sandbox", module + "internal/cli", nil, "use cases do not know their front ends"},
	{"internal/sandbox", module + "client", nil, "use cases do not know their front ends"},
	{"internal/sandbox", module + "api/banger/v1", nil, "the public contract is internal/server's to speak"},
	{"internal/cli", module + "internal/sandbox", nil, "the command line goes through the API, as any other program does"},
	{"internal/cli", module + "internal/store", nil, "the command line goes through the API, as any other program does"},
	{"internal/cli", module + "internal/lifecycle", nil, "the command line goes through the API, as any other program does"},
	{"internal/cli", module + "internal/vmm", nil, "the command line goes through the API, as any other program does"},
	{"internal/cli", module + "internal/disk", nil, "the command line goes through the API, as any other program does"},
	{"internal/cli", module + "internal/server", nil, "the command line goes through the API, as any other program does"},
	{"internal/cli", module + "internal/hostnet", nil, "the command line goes through the API, as any other program does"},
	{"internal/cli", "modernc.org/sqlite", nil, "a CLI that starts in milliseconds links no database"},
	{"internal/filelock", module, nil, "a lock does not know what it is for"},
	{"internal/cachedir", module, []string{"internal/filelock"}, "a cache does not know what it keeps"},
	{"internal/age", module, nil, "words about time are about nothing else"},
	{"internal/tui", module, []string{"client", "api/banger/v1", "internal/age"}, "the screen goes through the client alone, as any other program does"},
	{"internal/tui", "charm.land/lipgloss", nil, "it looks at the terminal when it is loaded, which every command would pay for"},
	{"client", module + "internal/tui", nil, "the client is for programs, whatever they show"},
	{"client", module + "internal/sandbox", nil, "the client is for programs outside of the daemon"},
	{"client", module + "internal/store", nil, "the client is for programs outside of the daemon"},
	{"client", module + "internal/server", nil, "the client is for programs outside of the daemon"},
	{"internal", module + "cmd", nil, "commands wire; nothing depends on them"},
}

// imports maps each package's folder to what its files import; test files only if tests is true.
func imports(t *testing.T, root string, tests bool) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && p != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "runtime" || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go") != tests {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), p, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, filepath.Dir(p))
		if err != nil {
			return err
		}
		for _, imp := range f.Imports {
			name, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				return err
			}
			out[filepath.ToSlash(rel)] = append(out[filepath.ToSlash(rel)], name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func under(p, prefix string) bool {
	prefix = strings.TrimSuffix(prefix, "/")
	return p == prefix || strings.HasPrefix(p, prefix+"/")
}

func broken(b ban, pkg, imp string) bool {
	return under(pkg, b.from) && under(imp, b.to) &&
		!slices.ContainsFunc(b.except, func(e string) bool { return under(imp, module+e) })
}

func TestImportDirections(t *testing.T) {
	all := imports(t, "../..", false)
	if len(all) < 20 {
		t.Fatalf("only %d packages found: the test looks in the wrong place", len(all))
	}
	for _, b := range bans {
		found := false
		for pkg, imps := range all {
			found = found || under(pkg, b.from)
			for _, imp := range imps {
				if broken(b, pkg, imp) {
					t.Errorf("%s imports %s: %s", pkg, imp, b.why)
				}
			}
		}
		if !found {
			t.Errorf("a ban is about %s, which does not exist", b.from)
		}
	}
}

// TestABanBites shows that the test can fail.
func TestABanBites(t *testing.T) {
	if !broken(bans[1], "internal/vm", module+"internal/store") || broken(bans[1], "internal/vm", module+"internal/fault") || broken(bans[1], "internal/vmm", module+"internal/store") {
		t.Error("bans do not do what they say")
	}
}

// TestEveryPackageSaysWhatItOwns wants a doc comment on every package, with what it owns or is for
// and what it never does.
func TestEveryPackageSaysWhatItOwns(t *testing.T) {
	for pkg := range imports(t, "../..", false) {
		if strings.HasPrefix(pkg, "api/") { // generated
			continue
		}
		files, err := filepath.Glob(path.Join("../..", pkg, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		doc := ""
		for _, f := range files {
			if strings.HasSuffix(f, "_test.go") {
				continue
			}
			src, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			parsed, err := parser.ParseFile(token.NewFileSet(), f, src, parser.ParseComments|parser.PackageClauseOnly)
			if err != nil {
				t.Fatal(err)
			}
			if parsed.Doc != nil {
				doc += parsed.Doc.Text()
			}
		}
		switch low := strings.ToLower(doc); {
		case doc == "":
			t.Errorf("%s has no package comment", pkg)
		case strings.HasPrefix(pkg, "internal/") || pkg == "client":
			if !strings.Contains(low, "never") && !strings.Contains(low, " no ") && !strings.Contains(low, "not ") && !strings.Contains(low, "nothing") {
				t.Errorf("%s does not say what it never does:\n%s", pkg, doc)
			}
		}
	}
}
