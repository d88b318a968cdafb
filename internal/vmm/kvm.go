package vmm

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// KVMUsable tells whether this host runs stock kernels with hardware virtualisation, and if not why,
// in one line for people. /dev/kvm alone proves nothing: nested hosts offer it without the CPU's
// extensions, and a stock kernel hangs on them. The extensions prove nothing either: another hypervisor
// may hold them. So it tries to create a VM as well.
func KVMUsable() (usable bool, reason string) {
	return kvmUsable("/dev/kvm", "/proc/cpuinfo", createVM)
}

// createVM asks KVM for a VM and gives it back: KVM_CREATE_VM with the default type (the kernel's
// Documentation/virt/kvm/api.rst).
func createVM(kvm *os.File) error {
	const kvmCreateVM = 0xae01 // _IO(KVMIO, 0x01)
	fd, err := unix.IoctlRetInt(int(kvm.Fd()), kvmCreateVM)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func kvmUsable(device, cpuinfo string, create func(*os.File) error) (bool, string) {
	kvm, err := os.OpenFile(device, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, fmt.Sprintf("this host has no %s: its CPU or firmware offers no virtualisation, or the kvm module is not loaded", device)
	case errors.Is(err, fs.ErrPermission):
		return false, fmt.Sprintf("this user may not open %s (sudo usermod -aG kvm $USER, then log in again)", device)
	case err != nil:
		return false, fmt.Sprintf("%s cannot be opened: %v", device, err)
	}
	defer kvm.Close()
	info, err := os.Open(cpuinfo)
	if err != nil {
		return false, fmt.Sprintf("%s cannot be read: %v", cpuinfo, err)
	}
	defer info.Close()
	lines := bufio.NewScanner(info)
	for lines.Scan() {
		key, flags, _ := strings.Cut(lines.Text(), ":")
		if strings.TrimSpace(key) != "flags" {
			continue
		}
		if f := strings.Fields(flags); slices.Contains(f, "vmx") || slices.Contains(f, "svm") {
			err := create(kvm)
			switch {
			case err == nil:
				return true, ""
			case errors.Is(err, unix.EBUSY):
				return false, fmt.Sprintf("%s creates no VM: another hypervisor (VirtualBox, perhaps) holds the CPU's extensions", device)
			}
			return false, fmt.Sprintf("%s creates no VM: %v", device, err)
		}
		break // the CPUs of a host are alike in this
	}
	return false, fmt.Sprintf("the CPU shows neither vmx nor svm, so %s cannot run a stock kernel", device)
}
