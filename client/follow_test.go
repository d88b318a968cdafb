package client

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

const patience = 20 * time.Second

// A daemon is noticed whatever of its socket's path was there before, and none is started.
func TestAwait(t *testing.T) {
	for name, prepare := range map[string]func(dir string) error{
		"no directory": func(string) error { return nil },
		"no socket":    func(dir string) error { return os.MkdirAll(dir, 0o700) },
		"a stale one":  stale,
		"another file": func(dir string) error {
			return errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "x"), nil, 0o600))
		},
		"daemon is there": func(dir string) error { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "run", "banger")
			socket := filepath.Join(dir, "bangerd.sock")
			c := New(Options{Socket: socket, StateDir: t.TempDir(), Daemon: "/nonexistent/bangerd"})
			if err := prepare(dir); err != nil {
				t.Fatal(err)
			}
			listen := func() {
				t.Helper()
				if err := errors.Join(os.MkdirAll(dir, 0o700), os.RemoveAll(socket)); err != nil {
					t.Fatal(err)
				}
				l, err := net.Listen("unix", socket)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = l.Close() })
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if name == "daemon is there" {
				listen()
				if err := c.Await(ctx); err != nil {
					t.Fatal(err)
				}
				return
			}
			if running, err := c.Running(ctx); running || err != nil {
				t.Fatalf("nobody listens, and it says %v, %v", running, err)
			}
			came := make(chan error, 1)
			go func() { came <- c.Await(ctx) }()
			listen()
			if err := <-came; err != nil {
				t.Fatal(err)
			}
		})
	}
	t.Run("given up", func(t *testing.T) {
		c := New(Options{Socket: filepath.Join(t.TempDir(), "banger", "bangerd.sock")})
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(20*time.Millisecond, cancel)
		if err := c.Await(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("it ended with %v", err)
		}
	})
}

// stale leaves a socket that nobody listens on.
func stale(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "bangerd.sock")})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	return l.Close()
}

func TestCheckCreate(t *testing.T) {
	d := &bangerv1.GetDefaultsResponse{Vcpu: 2, MemoryMib: 1024, DiskBytes: 8 << 30, SystemBytes: 16 << 30, HostCpus: 2, HostMemoryMib: 2048}
	for name, c := range map[string]struct {
		r  *bangerv1.CreateVMRequest
		ok bool
	}{
		"defaults":            {&bangerv1.CreateVMRequest{}, true},
		"a name":              {&bangerv1.CreateVMRequest{Name: "otter"}, true},
		"a bad name":          {&bangerv1.CreateVMRequest{Name: "Otter"}, false},
		"more than there is":  {&bangerv1.CreateVMRequest{MemoryMib: 4096}, false},
		"a small disk":        {&bangerv1.CreateVMRequest{DiskBytes: 1 << 20}, false},
		"a small system disk": {&bangerv1.CreateVMRequest{SystemBytes: 1 << 20}, false},
		"minus one CPU":       {&bangerv1.CreateVMRequest{Vcpu: -1}, false},
	} {
		if err := CheckCreate(c.r, d); (err == nil) != c.ok || err != nil && !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestStageText(t *testing.T) {
	if StageText("agent") != "booting" || StageText("new\x1b[31m stage") != "new stage" {
		t.Errorf("%q, %q", StageText("agent"), StageText("new\x1b[31m stage"))
	}
}
