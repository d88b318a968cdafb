package qemu

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/vmm"
)

const patience = 60 * time.Second

// newSpec is a machine with the tiny kernel.
func newSpec(t *testing.T) vmm.Spec {
	t.Helper()
	dir := t.TempDir()
	s := vmm.Spec{
		ID: "0123456789abcdef0123456789abcdef", Owner: "qemutest", Name: "vm", RunDir: filepath.Join(dir, "run"), Log: filepath.Join(dir, "log"),
		Kernel: filepath.Join(dir, "vmlinux"), Initrd: filepath.Join(dir, "initrd.img"), Cmdline: "sleep", VCPU: 1, MemoryMiB: 32, CID: 4711,
	}
	if err := os.Mkdir(s.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	tinyKernel(t, s.Kernel)
	if err := os.WriteFile(s.Initrd, []byte("initrd"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, role := range []vmm.Role{vmm.RoleBase, vmm.RoleSystem} {
		d := vmm.Drive{Role: role, Path: filepath.Join(dir, "a, b: "+string(role)), ReadOnly: role == vmm.RoleBase}
		if err := os.WriteFile(d.Path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		s.Drives = append(s.Drives, d)
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
