package qemu

import (
	"context"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/vmm"
)

const patience = 60 * time.Second

// specIn is a machine with the tiny kernel, whose files are in dir.
func specIn(dir string) vmm.Spec {
	return vmm.Spec{
		ID: "0123456789abcdef0123456789abcdef", Owner: fmt.Sprintf("test-%08x", crc32.ChecksumIEEE([]byte(dir))), Name: "vm",
		RunDir: filepath.Join(dir, "run"), Log: filepath.Join(dir, "log"),
		Kernel: filepath.Join(dir, "vmlinux"), Initrd: filepath.Join(dir, "initrd.img"), Cmdline: "sleep", VCPU: 1, MemoryMiB: 32, CID: 4711,
		Drives: []vmm.Drive{
			{Role: vmm.RoleBase, Path: filepath.Join(dir, "a, b: base"), ReadOnly: true},
			{Role: vmm.RoleSystem, Path: filepath.Join(dir, "a, b: system")},
		},
	}
}

// newSpec is specIn with its files made. Its owner is the test's own.
func newSpec(t *testing.T) vmm.Spec {
	t.Helper()
	s := specIn(t.TempDir())
	if err := os.Mkdir(s.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	tinyKernel(t, s.Kernel)
	if err := os.WriteFile(s.Initrd, []byte("initrd"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, d := range s.Drives {
		if err := os.WriteFile(d.Path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func start(t *testing.T, s vmm.Spec) vmm.Machine {
	t.Helper()
	begin := time.Now()
	m, err := New(false).Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("started in %v", time.Since(begin))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := m.Kill(ctx); err != nil {
			t.Error(err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// TestExit lets guests end in their ways, and compares the reasons.
func TestExit(t *testing.T) {
	for _, c := range []struct{ cmdline, want string }{
		{"poweroff", vmm.GuestShutdown},
		{"reset", vmm.GuestReset},
	} {
		t.Run(c.cmdline, func(t *testing.T) {
			t.Parallel()
			s := newSpec(t)
			s.Cmdline = c.cmdline
			m := start(t, s)
			select {
			case <-m.Done():
			case <-time.After(patience):
				t.Fatal("still running")
			}
			if got := m.Exit().Reason; got != c.want {
				t.Errorf("exit reason %q, want %q", got, c.want)
			}
			b, err := os.ReadFile(s.Log)
			if err != nil || !strings.Contains(string(b), c.cmdline+" console=ttyS0") {
				t.Errorf("log %q, %v", b, err)
			}
		})
	}
}
