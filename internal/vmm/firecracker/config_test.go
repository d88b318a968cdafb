package firecracker

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/vmm"
)

var update = flag.Bool("update", false, "write testdata/requests.golden")

// TestRequests compares the arguments and every call that makes a machine with a golden file.
func TestRequests(t *testing.T) {
	spec := vmm.Spec{
		ID: "0123456789abcdef0123456789abcdef", Owner: "cafe", Name: "calm-otter", RunDir: "/state/run/0123456789ab",
		Kernel: "/state/kernels/a, b/vmlinux", Initrd: "/state/initrd.img", Cmdline: "quiet net.ifnames=0",
		VCPU: 2, MemoryMiB: 1024, CID: 42, Log: "/state/a, b/firecracker.log",
		Drives: []vmm.Drive{
			{Role: vmm.RoleBase, Path: "/state/a, \"b\"/base.ext4", ReadOnly: true},
			{Role: vmm.RoleSystem, Path: "/state/system.ext4"},
			{Role: vmm.RoleWork, Path: "/state/work.ext4"},
			{Role: vmm.RoleModules, Path: "/state/modules.ext4", ReadOnly: true},
			{Role: vmm.RoleConfig, Path: "/state/config.tar", ReadOnly: true},
		},
		NICs: []vmm.NIC{{MAC: "02:00:00:00:00:01", MTU: 1420, TAP: "bgr012345-1"}},
	}
	var out strings.Builder
	for _, a := range arguments(spec) {
		fmt.Fprintln(&out, a)
	}
	for _, r := range requests(spec) {
		b, err := json.Marshal(r.body)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "%s %s %s\n", r.method, r.path, b)
	}
	const path = "testdata/requests.golden"
	if *update {
		if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), out.String()); diff != "" {
		t.Errorf("%s (-want +got), -update writes it:\n%s", path, diff)
	}
}
