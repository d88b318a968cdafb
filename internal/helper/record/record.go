// Package record owns the root helper's records: whose the network of each installation is. It never touches a
// network, and asks nobody.
package record

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/filelock"
)

// Record says whose the network of an installation is. It is written before the first thing of it is made and
// removed after the last, and goes with a reboot, as they do.
type Record struct {
	UID          int            `json:"uid"`
	Installation string         `json:"installation"`
	Bridge       string         `json:"bridge"`
	Addresses    []netip.Prefix `json:"addresses"` // of the bridge
	Guarded      bool           `json:"guarded"`   // there are rules: TAPs may be made
}

// Dir is a directory with a file for each installation, of all users: their helpers are processes of their own.
type Dir string

// ID is what installations' ids are.
var ID = regexp.MustCompile(`^[0-9a-f]{12}$`)

// Lock keeps the helpers of other users from changing records, until it is released.
func (r Dir) Lock(ctx context.Context) (release func(), err error) {
	if err := os.MkdirAll(string(r), 0o700); err != nil {
		return nil, broken(err, string(r))
	}
	f, err := os.OpenFile(filepath.Join(string(r), "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, broken(err, string(r))
	}
	if err := filelock.Wait(ctx, f, unix.LOCK_EX); err != nil {
		_ = f.Close()
		if ctx.Err() != nil { // which other helpers hold for some seconds at most
			return nil, fault.Wrap(ctx.Err(), fault.CodeOf(ctx.Err()), "root helper", "the helper of another user is changing the host's network, and did not end in time")
		}
		return nil, broken(err, f.Name())
	}
	return func() { _ = f.Close() }, nil
}

func broken(err error, path string) error {
	return fault.Wrap(err, fault.Internal, path, "the root helper's records cannot be used")
}

// All returns every user's.
func (r Dir) All() ([]Record, error) {
	entries, err := os.ReadDir(string(r))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, broken(err, string(r))
	}
	var out []Record
	for _, e := range entries {
		if !ID.MatchString(e.Name()) {
			continue
		}
		c, err := r.Get(e.Name())
		if err != nil {
			return nil, err
		}
		if c != nil {
			out = append(out, *c)
		}
	}
	return out, nil
}

// Get returns one, nil if there is none.
func (r Dir) Get(installation string) (*Record, error) {
	path := filepath.Join(string(r), installation)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, broken(err, path)
	}
	var out Record
	if err := json.Unmarshal(b, &out); err != nil || out.Installation != installation {
		return nil, fault.Wrap(err, fault.Corrupt, path, "this record of the root helper is damaged").WithHint("sudo rm %s", path)
	}
	return &out, nil
}

// Put writes one.
func (r Dir) Put(c Record) error {
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	path := filepath.Join(string(r), c.Installation)
	// /run is memory: what a rename would need on a disk, it does not.
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return broken(err, path)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return broken(err, path)
	}
	return nil
}

// Drop removes one; fine if there is none.
func (r Dir) Drop(installation string) error {
	path := filepath.Join(string(r), installation)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return broken(err, path)
	}
	return nil
}
