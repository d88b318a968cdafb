package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/cachedir"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/filelock"
)

// keepEntries is how many results of each kind the cache keeps: today's, and the one to go back to.
const keepEntries = 2

// cache holds what is slow to make, each under a key of all that decides its content. An entry is a
// directory that was renamed into place when complete.
type cache struct {
	dir  string
	lock *os.File
}

// cacheRoot is the directory of all that banger caches.
func cacheRoot() (string, error) {
	base := os.Getenv("XDG_CACHE_HOME")
	if !filepath.IsAbs(base) { // the XDG specification: a relative path is to be ignored
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fault.Wrap(err, fault.Invalid, "cache", "has no place").WithHint("set HOME or XDG_CACHE_HOME")
		}
		base = filepath.Join(home, ".cache")
	}
	return filepath.Join(base, "banger"), nil
}

// openCache opens the cache and waits until no other build uses it.
func openCache(ctx context.Context, p *progress) (*cache, error) {
	root, err := cacheRoot()
	if err != nil {
		return nil, err
	}
	c := &cache{dir: filepath.Join(root, "build")}
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return nil, fault.Wrap(err, fault.Permission, c.dir, "cannot be made")
	}
	lock, err := os.OpenFile(filepath.Join(c.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fault.Wrap(err, fault.Permission, c.dir, "cannot be locked")
	}
	c.lock = lock
	if err := waitForLock(ctx, p, lock, "waiting for another build to finish"); err != nil {
		return nil, err
	}
	// What a killed build left behind is nobody's now that we have the lock.
	return c, c.removeAll(".tmp-")
}

// waitForLock locks an open file against other processes. It says title, and waits for as long as ctx lasts, if
// another one has it.
func waitForLock(ctx context.Context, p *progress, f *os.File, title string) error {
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		return nil
	}
	p.begin("%s", title)
	err := filelock.Wait(ctx, f, unix.LOCK_EX)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return fault.Wrap(err, fault.Internal, f.Name(), "cannot be locked")
}

func (c *cache) close() error { return c.lock.Close() }

func (c *cache) removeAll(prefix string) error {
	entries, err := os.ReadDir(c.dir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(c.dir, e.Name())))
		}
	}
	return err
}

// contentKey hashes everything that decides an artifact's content.
func contentKey(parts ...any) string {
	h := sha256.New()
	for _, p := range parts {
		raw, err := json.Marshal(p)
		if err != nil {
			panic(err) // only strings and lists of them come here
		}
		fmt.Fprintf(h, "%d:%s;", len(raw), raw)
	}
	return hex.EncodeToString(h.Sum(nil))[:32]
}

// manifestName lists an entry's files with their checksums: a damaged cache is noticed when it is used.
const manifestName = "manifest.json"

// peek returns the entry kind-key if it is there, and errNotCached if not.
func (c *cache) peek(ctx context.Context, kind, key string) (string, map[string]bundle.Artifact, error) {
	return c.get(ctx, kind, key, false, func(string) ([]string, error) { return nil, errNotCached })
}

var errNotCached = errors.New("not in the cache")

// get returns the entry kind-key, made by build in a scratch directory if it is not there or, with
// fresh, in any case. build returns the names of the files that are artifacts.
func (c *cache) get(ctx context.Context, kind, key string, fresh bool, build func(dir string) ([]string, error)) (string, map[string]bundle.Artifact, error) {
	dir := filepath.Join(c.dir, kind+"-"+key)
	if !fresh {
		if files, err := readManifest(dir); err == nil {
			_, err := cachedir.Use(ctx, dir)
			return dir, files, err
		}
	}
	tmp, err := os.MkdirTemp(c.dir, ".tmp-"+kind+"-")
	if err != nil {
		return "", nil, fault.Wrap(err, fault.Permission, c.dir, "cannot be written")
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", nil, err
	}
	names, err := build(tmp)
	if err != nil {
		return "", nil, err
	}
	files := map[string]bundle.Artifact{}
	for _, n := range names {
		if files[n], err = bundle.Describe(ctx, tmp, n); err != nil {
			return "", nil, err
		}
	}
	raw, err := json.MarshalIndent(files, "", "  ")
	if err != nil {
		return "", nil, err
	}
	if err := os.WriteFile(filepath.Join(tmp, manifestName), raw, 0o644); err != nil {
		return "", nil, fault.Wrap(err, fault.Exhausted, c.dir, "cannot be written")
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", nil, err
	}
	return dir, files, os.Rename(tmp, dir)
}

func readManifest(dir string) (map[string]bundle.Artifact, error) {
	raw, err := os.ReadFile(filepath.Join(dir, manifestName))
	if err != nil {
		return nil, err
	}
	var files map[string]bundle.Artifact
	if err := json.Unmarshal(raw, &files); err != nil {
		return nil, err
	}
	for name, f := range files {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		if info.Size() != f.Size {
			return nil, fmt.Errorf("%s has another size than when it was made", name)
		}
	}
	return files, nil
}

// prune removes all but the entries of a kind that were used last.
func (c *cache) prune(ctx context.Context, kind string) error {
	return cachedir.Keep(ctx, c.dir, keepEntries, 0, func(name string) bool { return strings.HasPrefix(name, kind+"-") })
}

// tools are those that come with the bundle's kernel, which is built first if it is not there.
func (c *cache) tools(ctx context.Context, p *progress) (toolchain, error) {
	dir, _, err := c.get(ctx, "kernel", kernelKey(), false, func(dir string) ([]string, error) {
		mode, err := debootstrapMode()
		if err != nil {
			return nil, err
		}
		return buildKernel(ctx, p, mode, dir)
	})
	return toolchain{filepath.Join(dir, dirTools)}, err
}
