package firecracker

import (
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
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
		NICs: []vmm.NIC{{MAC: "02:00:00:00:00:01", MTU: 1420, TAP: "bgr012345-1"}, {MAC: "02:00:00:00:00:02", Socket: "/state/run/0123456789ab/net.sock"}},
	}
	var out strings.Builder
	for _, a := range arguments(spec) {
		fmt.Fprintln(&out, a)
	}
	for _, c := range []struct {
		title   string
		layout  layout
		version version
	}{
		{"", layout{}, oldest},
		{"\nin a jail:", layout{jailed: true}, oldest},
		{"\n1.16:", layout{}, version{1, 16}},
	} {
		if c.title != "" {
			fmt.Fprintln(&out, c.title)
		}
		for _, r := range requests(spec, c.layout, c.version) {
			b, err := json.Marshal(r.body)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&out, "%s %s %s\n", r.method, r.path, b)
		}
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

// TestNetworkSocket connects as Firecracker does for a guest that connects to its host, to the vsock's path with the port behind it, and wants
// to get to the network's socket, wherever that is.
func TestNetworkSocket(t *testing.T) {
	if got, want := nicSocket+" "+upSocket, fmt.Sprintf("%s_%d %[1]s_%[3]d", agentSocket, vmm.NICPort, vmm.UpPort); got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	run, elsewhere := t.TempDir(), t.TempDir()
	dir, err := rundir.Open(run)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, at := range []string{filepath.Join(run, "net.sock"), filepath.Join(elsewhere, "net.sock")} {
		l, err := net.Listen("unix", at)
		if err != nil {
			t.Fatal(err)
		}
		spec := vmm.Spec{RunDir: run, NICs: []vmm.NIC{{TAP: "tap0"}, {Socket: at}}}
		if err := linkNIC(dir, spec); err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("unix", dir.Path(nicSocket))
		if err != nil {
			t.Errorf("%s: %v", at, err)
		} else {
			_ = conn.Close()
		}
		if _, err := dir.Dial(t.Context(), nicSocket); err == nil {
			t.Errorf("the daemon follows a link to %s", at)
		}
		_ = l.Close()
		if err := clean(dir); err != nil { // as after the machine's end
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(run); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	spec := vmm.Spec{ID: "a", Owner: "b", Name: "two", RunDir: run, Log: "/l", Kernel: "/k", Initrd: "/i", VCPU: 1, MemoryMiB: 128, CID: 3,
		NICs: []vmm.NIC{{MAC: "02:00:00:00:00:01", Socket: "/s"}, {MAC: "02:00:00:00:00:02", Socket: "/t"}}}
	if _, err := New(func() (string, error) { return "/nowhere", nil }).Start(t.Context(), spec); !fault.Is(err, fault.Unsupported) {
		t.Errorf("two sockets: %v", err)
	}
}
