package vmm

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// TestCreateVM asks the real KVM of this host, if there is one.
func TestCreateVM(t *testing.T) {
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	defer kvm.Close()
	if err := createVM(kvm); err != nil {
		t.Error(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if err := createVM(null); !errors.Is(err, unix.ENOTTY) {
		t.Errorf("what is no KVM: %v", err)
	}
}

func TestValidate(t *testing.T) {
	good := Spec{
		ID: "0123456789abcdef0123456789abcdef", Owner: "one-two", Name: "calm-otter", RunDir: "/run/x", Kernel: "/k", Initrd: "/i",
		VCPU: 1, MemoryMiB: 64, Log: "/l", Drives: []Drive{{Role: RoleBase, Path: "/b"}, {Role: RoleWork, Path: "/w"}},
		NICs: []NIC{{MAC: "02:00:00:00:00:01", MTU: 1500, TAP: "tap0"}, {MAC: "02:00:00:00:00:02", Socket: "/s"}},
	}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	if got, want := good.Marker(), "banger-one-two-0123456789abcdef0123456789abcdef"; got != want {
		t.Errorf("marker %q, want %q", got, want)
	}
	longest := good
	longest.ID, longest.Owner = strings.Repeat("x", 32), strings.Repeat("x", 24)
	if err := longest.Validate(); err != nil || len(longest.Marker()) != 64 {
		t.Errorf("the longest marker has %d bytes (%v), want 64: Firecracker's --id takes no more", len(longest.Marker()), err)
	}
	for _, c := range []struct {
		want   string // part of the message
		change func(*Spec)
	}{
		{"machine id", func(s *Spec) { s.ID = "" }},
		{"machine id", func(s *Spec) { s.ID = "a-b" }}, // two markers could be alike
		{"machine id", func(s *Spec) { s.ID = "../x" }},
		{"machine id", func(s *Spec) { s.ID = "a_b" }}, // Firecracker's --id takes none
		{"machine id", func(s *Spec) { s.ID = strings.Repeat("x", 33) }},
		{"owner", func(s *Spec) { s.Owner = strings.Repeat("x", 25) }},
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
		{"\"02:0:0:0:0:1\"", func(s *Spec) { s.NICs[0].MAC = "02:0:0:0:0:1" }},
		{"hardware address", func(s *Spec) { s.NICs[0].MAC = "03:00:00:00:00:01" }}, // a group's
		{"two network interfaces", func(s *Spec) { s.NICs[1].MAC = s.NICs[0].MAC }},
		{"MTU", func(s *Spec) { s.NICs[0].MTU = 67 }},
		{"exactly one", func(s *Spec) { s.NICs[0].Socket = "/s" }},
		{"exactly one", func(s *Spec) { s.NICs[1].Socket = "" }},
		{"name of a network device", func(s *Spec) { s.NICs[0].TAP = "tap0,script=/bin/sh" }},
		{"name of a network device", func(s *Spec) { s.NICs[0].TAP = "a-name-too-long0" }},
		{"socket of network interface", func(s *Spec) { s.NICs[1].Socket = "net.sock" }},
	} {
		s := good
		s.Drives = append([]Drive(nil), good.Drives...)
		s.NICs = append([]NIC(nil), good.NICs...)
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
		creates               error
		want                  bool
		reason                string
	}{
		{"intel", device, "processor\t: 0\nflags\t\t: fpu vmx sse\n", nil, true, ""},
		{"amd", device, "flags\t\t: fpu svm sse\n", nil, true, ""},
		{"held by another hypervisor", device, "flags\t\t: vmx\n", unix.EBUSY, false, "another hypervisor"},
		{"creates nothing", device, "flags\t\t: vmx\n", unix.EIO, false, "creates no VM: input/output error"},
		{"device without extensions", device, "flags\t\t: fpu vmxnet sse\nvmx flags\t: x\n", nil, false, "neither vmx nor svm"},
		{"no device", filepath.Join(dir, "none"), "flags\t\t: vmx\n", nil, false, "has no"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, reason := kvmUsable(c.device, write("cpuinfo", c.cpuinfo), func(*os.File) error { return c.creates })
			if got != c.want || !strings.Contains(reason, c.reason) || got != (reason == "") || strings.Contains(reason, "\n") {
				t.Errorf("%v, %q; want %v, %q", got, reason, c.want, c.reason)
			}
		})
	}
}

// TestKVMOfOthers has a user open a /dev/kvm that is root's and a group's, as on a host where nobody was added to the group.
func TestKVMOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	device := filepath.Join(t.TempDir(), "kvm")
	if err := os.WriteFile(device, nil, 0o660); err != nil {
		t.Fatal(err)
	}
	// The thread's own, which is thrown away with its goroutine (setfsuid(2)).
	type answer struct {
		usable bool
		reason string
	}
	said := make(chan answer)
	go func() {
		runtime.LockOSThread()
		_, _ = unix.SetfsuidRetUid(65534)
		usable, reason := kvmUsable(device, "/proc/cpuinfo", func(*os.File) error { return nil })
		said <- answer{usable, reason}
	}()
	if got, want := <-said, "this user may not open "+device+" (sudo usermod -aG kvm $USER, then log in again)"; got.usable || got.reason != want {
		t.Errorf("%+v, want %q", got, want)
	}
}
