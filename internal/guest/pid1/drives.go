package pid1

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// driveTime bounds the wait for the drives. All are probed while their driver loads, so it is
// only ever used up by a drive that does not come.
const driveTime = 20 * time.Second

// attachOrder is how drives without serials are told apart (vmm.Role).
var attachOrder = []vmm.Role{vmm.RoleBase, vmm.RoleSystem, vmm.RoleWork, vmm.RoleModules, vmm.RoleConfig}

// drives maps the role of each drive that is there to its device.
type drives map[vmm.Role]string

// findDrives looks at the block devices that sysfs lists: by serial where any is a role
// (QEMU), else by order. Firecracker gives each drive a serial of its own making, from the device and inode
// number of its file (build_device_id in its src/vmm/src/devices/virtio/block/virtio/device.rs).
func findDrives(sysBlock string) (drives, error) {
	found := drives{}
	entries, err := os.ReadDir(sysBlock)
	if err != nil {
		return nil, err
	}
	ordered := drives{}
	for _, e := range entries {
		letter, ok := strings.CutPrefix(e.Name(), "vd")
		if !ok || len(letter) != 1 {
			continue
		}
		device := "/dev/" + e.Name()
		serial, err := os.ReadFile(filepath.Join(sysBlock, e.Name(), "serial"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if role := vmm.Role(strings.TrimSpace(string(serial))); slices.Contains(attachOrder, role) {
			found[role] = device
		}
		if i := int(letter[0] - 'a'); i < len(attachOrder) {
			ordered[attachOrder[i]] = device
		}
	}
	if len(found) == 0 {
		return ordered, nil
	}
	return found, nil
}

// waitDrives waits until each of the roles has its drive.
func waitDrives(roles ...vmm.Role) (drives, error) {
	ctx, cancel := context.WithTimeout(context.Background(), driveTime)
	defer cancel()
	var have drives
	var missing []string
	err := system.WaitDevice(ctx, "drive", func() (bool, error) {
		var err error
		if have, err = findDrives("/sys/block"); err != nil {
			return false, err
		}
		missing = missing[:0]
		for _, role := range roles {
			if device, ok := have[role]; !ok {
				missing = append(missing, string(role))
			} else if _, err := os.Stat(device); err != nil {
				missing = append(missing, string(role))
			}
		}
		return len(missing) == 0, nil
	})
	if err != nil && len(missing) > 0 {
		return have, fmt.Errorf("no %s drive within %s", strings.Join(missing, ", no "), driveTime)
	}
	return have, err
}

func readConfig(device string) (boot.Config, error) {
	f, err := os.Open(device)
	if err != nil {
		return boot.Config{}, err
	}
	defer f.Close()
	return boot.ReadDrive(f)
}

// loadModules loads what the initrd carries, in the order it says. A module that cannot be loaded is
// no failure of the boot in itself (its device may not be there): the errors are kept, to explain a
// drive that does not come.
func loadModules(dir string) error {
	return loadInOrder(dir, "order", func(name string) bool { return wanted(name, virtioDevices) })
}

// loadFilesystem loads the modules of a filesystem that not every guest has, if the initrd carries them.
func loadFilesystem(dir, fs string) error {
	return loadInOrder(dir, "order-"+fs, func(string) bool { return true })
}

func loadInOrder(dir, list string, wanted func(name string) bool) error {
	order, err := os.ReadFile(filepath.Join(dir, list))
	if errors.Is(err, os.ErrNotExist) {
		return nil // everything built in
	}
	var failed error
	for line := range bytes.Lines(order) {
		name := strings.TrimSpace(string(line))
		if name == "" || !wanted(name) {
			continue
		}
		if err := loadModule(filepath.Join(dir, name)); err != nil {
			failed = errors.Join(failed, fmt.Errorf("module %s: %w", name, err))
		}
	}
	return errors.Join(err, failed)
}

// virtioDevices is where sysfs lists the devices of the virtio bus.
const virtioDevices = "/sys/bus/virtio/devices"

// tapModule is the module with the kernel's TAP devices.
const tapModule = "tun"

// vsockDevice is the virtio device type of vsock, as sysfs writes it.
const vsockDevice = "0x0013"

// drivenDevice is the device type (VIRTIO specification, "Device Types") that a module drives, alone or
// for another. Loading a module takes an emulated CPU 20 to 80 ms, most of it for its signature, so those
// whose device is not there are left to modprobe.
var drivenDevice = map[string]string{
	"virtio_net": "0x0001", "net_failover": "0x0001", "failover": "0x0001",
	"virtio_blk": "0x0002", "virtio_rng": "0x0004",
	"vsock": vsockDevice, "vmw_vsock_virtio_transport_common": vsockDevice, "vmw_vsock_virtio_transport": vsockDevice,
}

// wanted says whether a module file is of use in this machine, by the devices that sysfs lists at
// this moment. While it lists none, every module is: one of them brings the bus.
func wanted(file, devices string) bool {
	name := strings.ReplaceAll(strings.TrimSuffix(file, ".ko"), "-", "_")
	if name == tapModule {
		return false // by makeTunnel, if at all
	}
	if !hasDevice(devices, "") {
		return true
	}
	if name == "virtio_mmio" {
		return false // the devices came over PCI
	}
	device, known := drivenDevice[name]
	return !known || hasDevice(devices, device)
}

// hasDevice says whether there is a virtio device of a type, or any if the type is "".
func hasDevice(devices, kind string) bool {
	types, err := filepath.Glob(filepath.Join(devices, "*", "device"))
	if err != nil {
		return false // a malformed pattern: it is ours
	}
	for _, file := range types {
		if id, err := os.ReadFile(file); kind == "" || err == nil && strings.TrimSpace(string(id)) == kind {
			return true
		}
	}
	return false
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// copyFile copies a file's content into a new one with mode.
func copyFile(from, to string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
