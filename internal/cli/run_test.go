package cli

import (
	"testing"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
)

func TestUnlike(t *testing.T) {
	v := &bangerv1.VM{Image: "default", ImageId: "825a", Vcpu: 2, MemoryMib: 512, DiskBytes: 8 << 30, SystemBytes: 16 << 30, Labels: map[string]string{"team": "web"}}
	yes, no := true, false
	for _, tt := range []struct {
		r    *bangerv1.CreateVMRequest
		want string
	}{
		{&bangerv1.CreateVMRequest{}, ""},
		{&bangerv1.CreateVMRequest{Image: "default", Vcpu: 2, MemoryMib: 512, DiskBytes: 8 << 30, SystemBytes: 16 << 30, Labels: map[string]string{"team": "web"}, Nat: &no}, ""},
		{&bangerv1.CreateVMRequest{Image: "825a"}, ""},
		{&bangerv1.CreateVMRequest{Image: "void"}, "image default and not void"},
		{&bangerv1.CreateVMRequest{Vcpu: 4}, "2 virtual CPUs and not 4"},
		{&bangerv1.CreateVMRequest{MemoryMib: 1024}, "memory of 512 MiB and not 1 GiB"},
		{&bangerv1.CreateVMRequest{DiskBytes: 1 << 30}, "a work disk of 8 GiB and not 1 GiB"},
		{&bangerv1.CreateVMRequest{SystemBytes: 1 << 30}, "a system disk of 16 GiB and not 1 GiB"},
		{&bangerv1.CreateVMRequest{Nat: &yes}, "no NAT"},
		{&bangerv1.CreateVMRequest{Labels: map[string]string{"team": ""}}, "no label team="},
		{&bangerv1.CreateVMRequest{Labels: map[string]string{"other": "web"}}, "no label other=web"},
	} {
		if got := unlike(v, tt.r); got != tt.want {
			t.Errorf("%v: %q, want %q", tt.r, got, tt.want)
		}
	}
}
