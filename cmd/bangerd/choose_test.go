package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/firecracker"
)

// script writes a program that says what --version is told to say.
func script(t *testing.T, dir, says string) string {
	t.Helper()
	path := filepath.Join(dir, "firecracker")
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho '"+says+"'\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestChoose(t *testing.T) {
	t.Setenv("BANGER_RUNTIME_DIR", t.TempDir()) // no bundle
	t.Setenv("PATH", t.TempDir())               // and none there
	good := script(t, t.TempDir(), "Firecracker v1.12.1")
	old := script(t, t.TempDir(), "Firecracker v1.4.0")
	yes := func() (bool, string) { return true, "" }
	no := func() (bool, string) { return false, "the CPU shows neither" }
	for _, c := range []struct {
		name, setting, program string
		kvm                    func() (bool, string)
		want, accel, notice    string
	}{
		{"both are there", config.VMMAuto, good, yes, "firecracker", "kvm", ""},
		{"no KVM", config.VMMAuto, good, no, "qemu", "tcg", "the CPU shows neither"},
		{"no Firecracker", config.VMMAuto, "", yes, "qemu", "kvm", "neither in the runtime bundle nor in PATH"},
		{"an old Firecracker", config.VMMAuto, old, yes, "qemu", "kvm", "1.4.0"},
		{"QEMU is wanted", config.VMMQEMU, good, yes, "qemu", "kvm", ""},
		{"QEMU is wanted, no KVM", config.VMMQEMU, good, no, "qemu", "tcg", "emulation"},
		{"Firecracker is wanted", config.VMMFirecracker, good, yes, "firecracker", "kvm", ""},
		{"Firecracker is wanted, nothing is there", config.VMMFirecracker, "", no, "firecracker", "kvm", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			// The driver looks at KVM itself: what the host has is not this test's.
			if usable, _ := vmm.KVMUsable(); !usable && c.want == "firecracker" && c.setting == config.VMMAuto {
				t.Skip("this host has no usable KVM: the driver refuses")
			}
			got := choose(t.Context(), config.Config{VMM: c.setting, FirecrackerBin: c.program}, firecracker.Jails{}, c.kvm)
			if got.driver.Name() != c.want || got.driver.Features().Accel != c.accel {
				t.Errorf("%s with %s, want %s with %s", got.driver.Name(), got.driver.Features().Accel, c.want, c.accel)
			}
			if (got.notice == "") != (c.notice == "") || !strings.Contains(got.notice, c.notice) || strings.Contains(got.notice, "\n") {
				t.Errorf("notice %q, want %q", got.notice, c.notice)
			}
			if len(got.others) != 1 || got.others[0].Name() == c.want {
				t.Errorf("others %v", got.others)
			}
		})
	}
}

func TestFindFirecracker(t *testing.T) {
	t.Setenv("BANGER_RUNTIME_DIR", t.TempDir())
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	for _, name := range []string{"", "firecracker"} {
		if path, err := findFirecracker(config.Config{FirecrackerBin: name}); !fault.Is(err, fault.Unavailable) || fault.HintOf(err) == "" {
			t.Errorf("%q: %s, %v; want unavailable with a hint", name, path, err)
		}
	}
	inPath := script(t, dir, "")
	for name, want := range map[string]string{"": inPath, "firecracker": inPath, "/opt/fc": "/opt/fc"} {
		if path, err := findFirecracker(config.Config{FirecrackerBin: name}); err != nil || path != want {
			t.Errorf("%q: %s, %v; want %s", name, path, err, want)
		}
	}
}
