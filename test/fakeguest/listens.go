package fakeguest

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// listensFile says, in the machine's run directory, what the guest listens on.
const listensFile = "guest/listens"

// Listen has the guest of a machine that runs listen on ports, and on no others.
func Listen(runDir string, ports ...uint16) error {
	b, err := json.Marshal(ports)
	if err != nil {
		return err
	}
	path := filepath.Join(runDir, listensFile)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// followPorts is an agentd.Guest's.
func followPorts(ctx context.Context, runDir string, send func([]uint16) error) error {
	var last []uint16
	for first := true; ; first = false {
		var ports []uint16
		b, err := os.ReadFile(filepath.Join(runDir, listensFile))
		if err == nil {
			err = json.Unmarshal(b, &ports)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if first || !slices.Equal(ports, last) {
			if err := send(ports); err != nil {
				return err
			}
			last = ports
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}
