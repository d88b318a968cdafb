package vmm

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
)

// KVMUsable tells whether this host runs stock kernels with hardware virtualisation, and if not why,
// in one line for people. /dev/kvm alone proves nothing: nested hosts offer it without the CPU's
// extensions, and a stock kernel hangs on them.
func KVMUsable() (usable bool, reason string) { return kvmUsable("/dev/kvm", "/proc/cpuinfo") }

func kvmUsable(device, cpuinfo string) (bool, string) {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, fmt.Sprintf("this host has no %s: its CPU or firmware offers no virtualisation, or the kvm module is not loaded", device)
	case errors.Is(err, fs.ErrPermission):
		return false, fmt.Sprintf("this user may not open %s (sudo usermod -aG kvm $USER, then log in again)", device)
	case err != nil:
		return false, fmt.Sprintf("%s cannot be opened: %v", device, err)
	}
	_ = f.Close()
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
			return true, ""
		}
		break // the CPUs of a host are alike in this
	}
	return false, fmt.Sprintf("the CPU shows neither vmx nor svm, so %s cannot run a stock kernel", device)
}
