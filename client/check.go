package client

import (
	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// ParseMemory reads the memory of a VM as every part of banger does: 4G, 512M; a bare number is MiB. The
// result is MiB. fault.Invalid with a hint otherwise.
func ParseMemory(s string) (int64, error) { return vm.ParseMemory("memory", s) }

// ParseDiskSize reads the size of a disk: 16G, 512M. The result is bytes. fault.Invalid with a hint otherwise.
func ParseDiskSize(s string) (int64, error) { return vm.ParseDiskSize("size", s) }

// FormatSize writes bytes in the form that ParseDiskSize reads.
func FormatSize(bytes int64) string { return vm.FormatSize(bytes) }

// CheckCreate says what the daemon would refuse of a create, as far as the request tells, so that people learn
// it while they type. What is zero counts as d, the daemon's own defaults. Whether the name is taken, the image
// there and the disk large enough for it is not looked at. fault.Invalid.
func CheckCreate(r *bangerv1.CreateVMRequest, d *bangerv1.GetDefaultsResponse) error {
	if r.GetName() != "" {
		if err := vm.ValidateName(r.GetName()); err != nil {
			return err
		}
	}
	or := func(a, b int64) int64 {
		if a == 0 {
			return b
		}
		return a
	}
	return vm.Spec{
		VCPU: int(or(int64(r.GetVcpu()), int64(d.GetVcpu()))), MemoryMiB: or(r.GetMemoryMib(), d.GetMemoryMib()),
		DiskSize: or(r.GetDiskBytes(), d.GetDiskBytes()), SystemSize: or(r.GetSystemBytes(), d.GetSystemBytes()),
		Labels: r.GetLabels(),
	}.Validate(vm.Host{CPUs: int(d.GetHostCpus()), MemoryMiB: d.GetHostMemoryMib()})
}
