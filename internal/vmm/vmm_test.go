package vmm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func TestValidate(t *testing.T) {
	good := Spec{
		ID: "0123456789abcdef0123456789abcdef", Owner: "one-two", Name: "calm-otter", RunDir: "/run/x", Kernel: "/k", Initrd: "/i",
		VCPU: 1, MemoryMiB: 64, Log: "/l", Drives: []Drive{{Role: RoleBase, Path: "/b"}, {Role: RoleWork, Path: "/w"}},
	}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	if got, want := good.Marker(), "banger-one-two-0123456789abcdef0123456789abcdef"; got != want {
		t.Errorf("marker %q, want %q", got, want)
	}
	for _, c := range []struct {
		want   string // part of the message
		change func(*Spec)
	}{
		{"machine id", func(s *Spec) { s.ID = "" }},
		{"machine id", func(s *Spec) { s.ID = "a-b" }}, // two markers could be alike
		{"machine id", func(s *Spec) { s.ID = "../x" }},
		{"machine id", func(s *Spec) { s.ID = strings.Repeat("x", 65) }},
		{"owner", func(s *Spec) { s.Owner = "" }},
		{"owner", func(s *Spec) { s.Owner = "a b" }},
		{"0 virtual CPUs", func(s *Spec) { s.VCPU = 0 }},
		{"-1 MiB", func(s *Spec) { s.MemoryMiB = -1 }},
		{"run directory", func(s *Spec) { s.RunDir = "run" }},
		{"kernel", func(s *Spec) { s.Kernel = "" }},
		{"initrd", func(s *Spec) { s.Initrd = "./i" }},
		{"log", func(s *Spec) { s.Log = "" }},
		{"drive work", func(s *Spec) { s.Drives[1].Path = "w" }},
		{"two drives", func(s *Spec) { s.Drives[1].Role = RoleBase }},
		{"no role", func(s *Spec) { s.Drives[1].Role = "" }},
	} {
		s := good
		s.Drives = append([]Drive(nil), good.Drives...)
		c.change(&s)
		if err := s.Validate(); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want invalid with %q", err, c.want)
		}
	}
}

func TestKVMUsable(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	device := write("kvm", "")
	for _, c := range []struct {
		name, device, cpuinfo string
		want                  bool
		reason                string
	}{
		{"intel", device, "processor\t: 0\nflags\t\t: fpu vmx sse\n", true, ""},
		{"amd", device, "flags\t\t: fpu svm sse\n", true, ""},
		{"device without extensions", device, "flags\t\t: fpu vmxnet sse\nvmx flags\t: x\n", false, "neither vmx nor svm"},
		{"no device", filepath.Join(dir, "none"), "flags\t\t: vmx\n", false, "has no"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, reason := kvmUsable(c.device, write("cpuinfo", c.cpuinfo))
			if got != c.want || !strings.Contains(reason, c.reason) || got != (reason == "") || strings.Contains(reason, "\n") {
				t.Errorf("%v, %q; want %v, %q", got, reason, c.want, c.reason)
			}
		})
	}
}
