package oci

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// cacheLock is the file in a cache that every pull holds a shared lock on until its image is closed, and a sweep an exclusive
// one: no layer goes away between being checked and being written to a filesystem.
const cacheLock = ".lock"

// blobName is what layers are called in a cache, whole and in part.
var blobName = regexp.MustCompile(`^[a-z0-9]+-[0-9a-f]{32,}(` + regexp.QuoteMeta(partSuffix) + `)?$`)

// holdCache keeps layers from being swept until the file is closed.
func holdCache(ctx context.Context, cache string) (*os.File, error) {
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(cache, cacheLock), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	return f, lock(ctx, f, unix.LOCK_SH)
}

// Swept is what a sweep removed from a cache, or would.
type Swept struct {
	Layers int
	Bytes  int64 // of the host's disk
	// Busy says that images are being pulled into the cache, by this process or another: nothing was removed.
	Busy bool
}

// Keep says what a sweep leaves: layers that were used since a time, and of those the ones used last, up to a number of bytes.
type Keep struct {
	Since time.Time
	Bytes int64
}

// Sweep removes what need not be kept from a cache of layers, those that were not fetched to their end included. With dryRun it
// only looks, pulls or not. A cache that does not exist is empty.
func Sweep(cache string, keep Keep, dryRun bool) (out Swept, err error) {
	if !dryRun {
		f, err := os.OpenFile(filepath.Join(cache, cacheLock), os.O_RDWR|unix.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return out, nil // nothing was ever pulled
		}
		if err != nil {
			return out, fault.Wrap(err, fault.Permission, cache, "the cache of layers cannot be locked")
		}
		defer f.Close()
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			return Swept{Busy: true}, nil
		} else if err != nil {
			return out, os.NewSyscallError("flock", err)
		}
	}
	type blob struct {
		path  string
		used  time.Time
		bytes int64
	}
	var blobs []blob
	entries, err := os.ReadDir(cache)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return out, fault.Wrap(err, fault.Permission, cache, "the cache of layers cannot be read")
	}
	for _, e := range entries {
		if !blobName.MatchString(e.Name()) || !e.Type().IsRegular() {
			continue
		}
		b := blob{path: filepath.Join(cache, e.Name())}
		fi, err := e.Info()
		if err == nil {
			b.used = fi.ModTime()
			b.bytes, err = disk.Allocated(b.path)
		}
		if errors.Is(err, fs.ErrNotExist) || fault.Is(err, fault.NotFound) {
			continue // who looks without the lock sees others at work
		}
		if err != nil {
			return out, fault.Wrap(err, fault.Permission, b.path, "the cache of layers cannot be looked at")
		}
		blobs = append(blobs, b)
	}
	slices.SortFunc(blobs, func(a, b blob) int { return cmp.Or(b.used.Compare(a.used), cmp.Compare(a.path, b.path)) })
	var kept int64
	for _, b := range blobs {
		if !b.used.Before(keep.Since) && kept+b.bytes <= keep.Bytes {
			kept += b.bytes
			continue
		}
		if !dryRun {
			if err := os.Remove(b.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return out, fault.Wrap(err, fault.Permission, b.path, "the layer cannot be removed")
			}
		}
		out.Layers++
		out.Bytes += b.bytes
	}
	return out, nil
}
