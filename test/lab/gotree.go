package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"unicode"
)

// goPackages are what can be built in the lab: banger itself, and what tests build.
var goPackages = []string{"./cmd/...", "./tools/mkruntime", "./tools/man", "./internal/vmm/qemu/testdata/guest"}

// placeGo brings Go to the lab, as it is on the machine of somebody who has built banger before: the
// toolchain in go, the modules in home/go, and a build cache in home/cache/go-build. There are just the files
// that goPackages take. The
// cache is one of its own, filled here with the standard library, or with all of goPackages.
func placeGo(ctx context.Context, checkout, tree string, all bool) error {
	warm, err := cacheDir()
	if err != nil {
		return err
	}
	warm = filepath.Join(warm, "lab-go-build")
	goCommand := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir, cmd.Env = checkout, append(os.Environ(), "CGO_ENABLED=0", "GOCACHE="+warm)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, stderr.String())
		}
		return string(out), err
	}
	out, err := goCommand("env", "GOROOT", "GOMODCACHE")
	if err != nil {
		return err
	}
	goroot, modcache, _ := strings.Cut(strings.TrimSpace(out), "\n")

	// The sources of what is built, the toolchain's and the modules'.
	list := `{{$d := .Dir}}{{range .GoFiles}}{{$d}}/{{.}}{{"\n"}}{{end}}{{range .SFiles}}{{$d}}/{{.}}{{"\n"}}{{end}}` +
		`{{range .HFiles}}{{$d}}/{{.}}{{"\n"}}{{end}}{{range .EmbedFiles}}{{$d}}/{{.}}{{"\n"}}{{end}}{{with .Module}}{{with .Dir}}{{.}}/go.mod{{"\n"}}{{end}}{{end}}`
	files, err := goCommand(append([]string{"list", "-deps", "-f", list}, goPackages...)...)
	if err != nil {
		return err
	}
	modules := filepath.Join(tree, "home/go/pkg/mod")
	seen := map[string]bool{}
	for file := range strings.Lines(files) {
		file = strings.TrimSpace(file)
		var dst string
		if rel, ok := strings.CutPrefix(file, goroot+"/"); ok {
			dst = filepath.Join(tree, "go", rel)
		} else if rel, ok := strings.CutPrefix(file, modcache+"/"); ok {
			dst = filepath.Join(modules, rel)
		}
		if dst == "" || seen[dst] {
			continue
		}
		seen[dst] = true
		if err := placeFile(file, dst, true); err != nil && !errors.Is(err, fs.ErrNotExist) { // a module without go.mod
			return err
		}
	}
	for _, name := range []string{"VERSION", "go.env", "bin/go", "pkg/include", "src/runtime/cgo/abi_amd64.h", "pkg/tool/linux_amd64/asm", "pkg/tool/linux_amd64/compile", "pkg/tool/linux_amd64/link"} {
		if err := placeTree(filepath.Join(goroot, name), filepath.Join(tree, "go", name), true); err != nil {
			return err
		}
	}
	if err := placeChecksums(checkout, modcache, modules); err != nil {
		return err
	}

	what := []string{"std"}
	if all {
		what = append(what, goPackages...)
	}
	if _, err := goCommand(append([]string{"build", "-trimpath"}, what...)...); err != nil {
		return err
	}
	return placeTree(warm, filepath.Join(tree, "home/cache/go-build"), true)
}

// placeChecksums copies what Go's module cache knows of every module that go.sum names, less the archives.
func placeChecksums(checkout, from, to string) error {
	sums, err := os.Open(filepath.Join(checkout, "go.sum"))
	if err != nil {
		return err
	}
	defer sums.Close()
	lines := bufio.NewScanner(sums)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) != 3 {
			continue
		}
		version, modOnly := strings.CutSuffix(f[1], "/go.mod")
		kinds := []string{".mod"}
		if !modOnly {
			kinds = []string{".info", ".ziphash"}
		}
		for _, kind := range kinds {
			name := filepath.Join("cache/download", escapePath(f[0]), "@v", version+kind)
			if err := placeFile(filepath.Join(from, name), filepath.Join(to, name), true); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return lines.Err()
}

// escapePath is a module's path as a directory: capitals by an exclamation mark (go.dev/ref/mod, module cache).
func escapePath(path string) string {
	var b strings.Builder
	for _, r := range path {
		if unicode.IsUpper(r) {
			b.WriteByte('!')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

// openTree lets every user of the lab write to the directories: each has a layer of their own over them.
func openTree(dir string) error {
	return filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		return os.Chmod(p, 0o777)
	})
}
