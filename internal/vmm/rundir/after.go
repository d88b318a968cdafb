package rundir

import (
	"context"
	"errors"
	"io/fs"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/process"
)

// CleanAfter cleans the directory at path after the process of a VMM has ended, unless another one has been started in it
// since: one that the pidfile and the marker tell of (process.Open). Fine if there is no such directory any more.
func CleanAfter(ctx context.Context, path, pidfile, marker string, clean func(*Dir) error) error {
	dir, err := Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Lock(ctx); err != nil {
		return err
	}
	p, err := process.Open(ctx, dir.Name()+"/"+pidfile, marker)
	if err == nil {
		return p.Close()
	}
	if !fault.Is(err, fault.NotFound) {
		return err
	}
	return clean(dir)
}
