package qemu

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/vmm"
)

var update = flag.Bool("update", false, "write testdata/*.args")

// TestArguments compares whole command lines with golden files, one argument a line.
func TestArguments(t *testing.T) {
	spec := vmm.Spec{
		ID: "0123456789abcdef0123456789abcdef", Owner: "cafe", Name: "calm-otter", RunDir: "/state/run/0123456789ab",
		Kernel: "/state/kernels/a, b/vmlinux", Initrd: "/state/initrd.img", Cmdline: "quiet net.ifnames=0",
		VCPU: 2, MemoryMiB: 1024, CID: 42, Log: "/state/a, b/qemu.log",
		Drives: []vmm.Drive{
			{Role: vmm.RoleBase, Path: "/state/a, \"b\"/base.ext4", ReadOnly: true},
			{Role: vmm.RoleSystem, Path: "/state/system.ext4"},
		},
		NICs: []vmm.NIC{
			{MAC: "02:00:00:00:00:01", MTU: 1420, TAP: "bgr012345-1"},
			{MAC: "02:00:00:00:00:02", Socket: "/state/run/0123456789ab/net.sock"},
			{MAC: "02:00:00:00:00:03", Socket: "/else, where/net.sock"},
		},
	}
	for name, p := range map[string]platform{"tcg-serial": {}, "tcg-parallel": {parallel: true}, "kvm-vsock": {kvm: true, vsock: true}} {
		t.Run(name, func(t *testing.T) {
			args, err := arguments(spec, p)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(args, "\n") + "\n"
			path := filepath.Join("testdata", name+".args")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("%s (-want +got), -update writes it:\n%s", path, diff)
			}
		})
	}
}
