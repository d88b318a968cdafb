package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/ext4"
)

// Suite is a package whose tests are run in the lab.
type Suite struct {
	Package string // relative to the checkout
	Binary  string // name of its test program in /payload/bin
}

// Suites are what a payload holds if its package exists.
var Suites = []Suite{
	{"internal/vmm/firecracker", "firecracker.test"},
	{"test/e2e", "e2e.test"},
	{"internal/hostclock", "hostclock.test"}, // TestVerbs runs it in a guest
}

// Content says what a payload holds beside the source, the programs and the runtime bundle.
type Content struct {
	Cover  bool // programs and tests that say what they ran of the source (GOCOVERDIR)
	Suites bool // the test programs of Suites
	Bench  bool // tools/bench, and the untrimmed guest in /payload/stock
	Go     bool // Go with a build cache that has the standard library
	Fresh  bool // no programs and no bundle, but caches that have them: a machine on which they were built before
}

// MakePayload makes the read-only disk of a lab in dir: /payload/banger is the checkout with the programs and
// the runtime bundle, /payload/bin holds test programs. Returns the image's name. The bundle must be there.
func MakePayload(ctx context.Context, checkout, dir string, c Content) (image string, err error) {
	tree, err := os.MkdirTemp(dir, "payload-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tree)) }()
	if err := os.Chmod(tree, 0o755); err != nil {
		return "", err
	}
	root := filepath.Join(tree, "banger")
	if err := placeSource(ctx, checkout, root); err != nil {
		return "", err
	}
	home := filepath.Join(tree, "home")
	if c.Bench {
		stock, err := filepath.EvalSymlinks(filepath.Join(checkout, StockDir))
		if err != nil {
			return "", fmt.Errorf("no untrimmed guest: make bench-floor builds it (%w)", err)
		}
		if err := placeTree(stock, filepath.Join(tree, "stock"), true); err != nil {
			return "", err
		}
	}
	if c.Go || c.Fresh {
		err = placeGo(ctx, checkout, tree, c.Fresh)
	}
	if c.Fresh {
		err = errors.Join(err, placeBuilds(home))
	} else {
		err = errors.Join(err, build(ctx, checkout, tree, c), placeTree(filepath.Join(checkout, "runtime"), filepath.Join(root, "runtime"), true))
	}
	for _, dir := range []string{"cache/go-build", "go"} { // banger's own cache is its user's alone
		dir = filepath.Join(home, dir)
		err = errors.Join(err, os.MkdirAll(dir, 0o755), openTree(dir))
	}
	if err != nil {
		return "", err
	}
	size, err := measure(tree)
	if err != nil {
		return "", err
	}
	tool, err := ext4.FindTool(ctx)
	if err != nil {
		return "", err
	}
	image = tree + ".ext4"
	return image, tool.Make(ctx, image, ext4.Format{Kind: ext4.ReadOnly, Size: size, Label: "payload", Root: tree})
}

// cacheDir is banger's cache, where tools/mkruntime keeps what it built.
func cacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "banger"), err
}

// placeBuilds brings what `make runtime` built along, so that nothing is fetched in the lab.
func placeBuilds(home string) error {
	dir, err := cacheDir()
	if err != nil {
		return err
	}
	for _, kind := range []string{"kernel", "image", "firecracker"} {
		found, err := filepath.Glob(filepath.Join(dir, "build", kind+"-*"))
		if err != nil || len(found) == 0 {
			return fmt.Errorf("nothing of kind %s is built in %s (make runtime): %w", kind, dir, err)
		}
		for _, entry := range found {
			if err := placeTree(entry, filepath.Join(home, "cache/banger/build", filepath.Base(entry)), true); err != nil {
				return err
			}
		}
	}
	return nil
}

// placeSource copies what belongs to the source; without git, an unpacked archive, all but what is built.
func placeSource(ctx context.Context, checkout, root string) error {
	cmd := exec.CommandContext(ctx, "git", "ls-files", "-co", "--exclude-standard", "-z")
	cmd.Dir = checkout
	out, err := cmd.Output()
	if err != nil {
		cmd = exec.CommandContext(ctx, "find", ".", "(", "-path", "./dist", "-o", "-path", "./runtime", ")", "-prune", "-o", "-type", "f", "-printf", `%P\0`)
		cmd.Dir = checkout
		if out, err = cmd.Output(); err != nil {
			return err
		}
	}
	for name := range bytes.SplitSeq(bytes.TrimRight(out, "\x00"), []byte{0}) {
		err := placeFile(filepath.Join(checkout, string(name)), filepath.Join(root, string(name)), false)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // removed, and not yet committed
			return err
		}
	}
	return nil
}

// placeTree copies a directory, or links its files where that is possible.
func placeTree(src, dst string, link bool) error {
	return filepath.WalkDir(src, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, p)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(dst, rel), 0o755)
		}
		return placeFile(p, filepath.Join(dst, rel), link)
	})
}

func placeFile(src, dst string, link bool) error {
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	info, err := os.Lstat(src)
	if err != nil {
		return err
	}
	if info.Mode().Type() == fs.ModeSymlink {
		target, err := os.Readlink(src)
		if err != nil {
			return err
		}
		return os.Symlink(target, dst)
	}
	if link && os.Link(src, dst) == nil {
		return nil
	}
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// build makes programs and test programs, and what of Go goes with them.
func build(ctx context.Context, checkout, tree string, c Content) error {
	run := func(env []string, args ...string) error {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir, cmd.Env = checkout, append(append(os.Environ(), "CGO_ENABLED=0"), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	cover := []string{}
	if c.Cover {
		cover = []string{"-cover", "-covermode=set", "-coverpkg=./..."}
	}
	// The version that the bundle's agent has: doctor compares them.
	b, err := bundle.Load(filepath.Join(checkout, "runtime"))
	if err != nil {
		return err
	}
	flags := "-s -w -X git.thaloco.com/thaloco/banger/internal/version.release=" + b.CreatedBy
	into := func(out, pkg string, more ...string) error {
		args := append([]string{"build", "-trimpath", "-ldflags", flags, "-o", out}, more...)
		return run(nil, append(args, pkg)...)
	}
	root := filepath.Join(tree, "banger")
	for _, p := range []string{"banger", "bangerd", "banger-helper"} {
		if err := into(filepath.Join(root, p), "./cmd/"+p, cover...); err != nil {
			return err
		}
	}
	if err := into(filepath.Join(root, "dist/mkruntime"), "./tools/mkruntime"); err != nil {
		return err
	}
	if c.Bench {
		if err := into(filepath.Join(root, "dist/bench"), "./tools/bench"); err != nil {
			return err
		}
	}
	if c.Suites {
		for _, s := range Suites {
			if _, err := os.Stat(filepath.Join(checkout, s.Package)); err != nil {
				continue // the caller misses it if it must be there
			}
			args := append([]string{"test", "-c", "-trimpath", "-tags", "e2e", "-o", filepath.Join(tree, "bin", s.Binary)}, cover...)
			if err := run(nil, append(args, "./"+s.Package)...); err != nil {
				return err
			}
		}
	}
	return nil
}

// measure gives a size for a filesystem that takes the tree, in bytes: holes take nothing, but mke2fs gives
// one inode for 16 KiB.
func measure(tree string) (int64, error) {
	var bytes, files int64
	err := filepath.WalkDir(tree, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		files++
		bytes += info.Sys().(*syscall.Stat_t).Blocks * 512
		return nil
	})
	size := max(bytes+bytes/8, files*20<<10) + 128<<20
	return size / ext4.BlockSize * ext4.BlockSize, err
}
