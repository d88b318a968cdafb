package usernet

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// Files of a program in its directory.
const (
	pidfile       = "net.pid"
	controlSocket = "control.sock"
	logFile       = "net.log"
)

// Host starts programs and finds them again. Safe for concurrent use, with one call a VM at a time.
type Host struct {
	dir          string
	installation string
}

// NewHost returns the programs of an installation. dir is for them alone, and is made when it is needed.
func NewHost(dir, installation string) *Host { return &Host{dir: dir, installation: installation} }

// prefix is how the markers of the installation's programs begin. It is not how VMMs' do: they are looked for by theirs.
func (h *Host) prefix() string { return "bangernet-" + h.installation + "-" }

func (h *Host) marker(id string) string { return h.prefix() + id }

func (h *Host) of(id string) string { return filepath.Join(h.dir, id) }

// Log is where the program of a VM writes.
func (h *Host) Log(id string) string { return filepath.Join(h.of(id), logFile) }

// Start starts the program of a VM, with the socket for its VMM bound at socket. One that runs already is ended: it may have been
// started with other addresses. The program is this one under another name. An error means that nothing
// runs.
func (h *Host) Start(ctx context.Context, id, socket string, c Config, s Settings, cgroup process.Cgroup) (err error) {
	if err := c.Validate(); err != nil {
		return err
	}
	if err := h.Stop(ctx, id); err != nil {
		return err
	}
	failed := func(err error) error {
		return errors.Join(fault.Wrap(err, fault.Internal, "user network", "its program cannot be started"), os.RemoveAll(h.of(id)))
	}
	if err := os.MkdirAll(h.of(id), 0o700); err != nil {
		return failed(err)
	}
	argument, err := json.Marshal(start{Config: c, Settings: s})
	if err != nil {
		return failed(err)
	}
	vmm, err := listenAt(socket)
	if err != nil {
		return failed(err)
	}
	defer vmm.Close()
	control, err := listenAt(filepath.Join(h.of(id), controlSocket))
	if err != nil {
		return failed(err)
	}
	defer control.Close()
	p, err := process.Start(ctx, process.Command{
		// Not its path: the file may have been replaced by an upgrade.
		Path: "/proc/self/exe", Args: []string{Program, h.marker(id), string(argument)}, Marker: h.marker(id),
		Env: []string{"LC_ALL=C"}, Dir: h.of(id), Log: h.Log(id), Pidfile: filepath.Join(h.of(id), pidfile),
		Files: []*os.File{vmm, control}, Cgroup: cgroup,
	})
	if err != nil {
		return failed(err)
	}
	return p.Close()
}

// listenAt binds a unix socket in place of one that was left behind.
func listenAt(path string) (*os.File, error) {
	dir, err := rundir.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := dir.Remove(filepath.Base(path)); err != nil {
		return nil, err
	}
	return dir.Listen(filepath.Base(path))
}

// find returns the running program of a VM. fault.NotFound if there is none.
func (h *Host) find(ctx context.Context, id string) (*process.Process, error) {
	return process.Open(ctx, filepath.Join(h.of(id), pidfile), h.marker(id))
}

// Running says whether the program of a VM runs.
func (h *Host) Running(ctx context.Context, id string) (bool, error) {
	p, err := h.find(ctx, id)
	switch {
	case fault.Is(err, fault.NotFound):
		return false, nil
	case err != nil:
		return false, err
	}
	return true, p.Close()
}

// Set puts settings in force, and returns what came of it. fault.Unavailable if the program does not answer.
func (h *Host) Set(ctx context.Context, id string, s Settings) (Status, error) {
	return h.call(ctx, id, request{Set: &s})
}

// Publish makes ports those that are published. fault.Unavailable if the program does not answer.
func (h *Host) Publish(ctx context.Context, id string, ports []uint16) (Status, error) {
	return h.call(ctx, id, request{Publish: append([]uint16{}, ports...)})
}

// Status asks a program. fault.Unavailable if it does not answer.
func (h *Host) Status(ctx context.Context, id string) (Status, error) {
	return h.call(ctx, id, request{})
}

func (h *Host) call(ctx context.Context, id string, r request) (Status, error) {
	s, err := func() (Status, error) {
		ctx, cancel := context.WithTimeout(ctx, controlTime)
		defer cancel()
		dir, err := rundir.Open(h.of(id))
		if err != nil {
			return Status{}, err
		}
		defer dir.Close()
		conn, err := dir.Dial(ctx, controlSocket)
		if err != nil {
			return Status{}, err
		}
		defer conn.Close()
		return exchange(ctx, conn, r)
	}()
	if err != nil {
		return s, fault.Wrap(err, fault.Unavailable, "user network", "its program does not answer").WithHint("see %s; a restart of the VM starts it anew", h.Log(id))
	}
	return s, nil
}

// Stop ends the program of a VM, with all connections, and removes what it had. Fine if there is none.
func (h *Host) Stop(ctx context.Context, id string) error {
	p, err := h.find(ctx, id)
	switch {
	case fault.Is(err, fault.NotFound):
	case err != nil:
		return err
	default:
		if err := p.Kill(ctx); err != nil {
			return err
		}
		_ = p.Close()
	}
	if err := os.RemoveAll(h.of(id)); err != nil {
		return fault.Wrap(err, fault.Internal, h.of(id), "the directory of the VM's network cannot be removed")
	}
	return nil
}

// Sweep ends the programs of VMs that known refuses, and removes what they had. It returns the VMs' ids.
func (h *Host) Sweep(ctx context.Context, known func(id string) bool) ([]string, error) {
	ended, err := process.EndAll(ctx, h.prefix(), h.dir, func(marker string) bool { return !known(strings.TrimPrefix(marker, h.prefix())) })
	for i, marker := range ended {
		ended[i] = strings.TrimPrefix(marker, h.prefix())
	}
	if err != nil {
		return ended, err
	}
	list, err := os.ReadDir(h.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return ended, err
	}
	for _, e := range list {
		if !known(e.Name()) {
			if err := os.RemoveAll(h.of(e.Name())); err != nil {
				return ended, err
			}
		}
	}
	return ended, nil
}
