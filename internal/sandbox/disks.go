package sandbox

import (
	"context"
	"os"
	"path/filepath"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

func (s *Service) systemDisk(id vm.ID) string { return filepath.Join(s.vmDir(id), "system.ext4") }
func (s *Service) workDisk(id vm.ID) string   { return filepath.Join(s.vmDir(id), "work.ext4") }

// Labels of blank filesystems.
const (
	systemLabel = "banger-system"
	workLabel   = "banger-work"
)

// ensureBlanks makes the blank filesystems that VMs of the default sizes are cloned from. It runs
// mke2fs, once, so that making a VM need not.
func (s *Service) ensureBlanks(ctx context.Context) error {
	t := disk.Templates{Dir: s.paths.Templates()}
	for label, size := range map[string]int64{systemLabel: s.cfg.DefaultSystemSize, workLabel: s.cfg.DefaultDiskSize} {
		for _, size := range []int64{vm.MinDiskBytes, size} {
			if _, err := t.Ensure(ctx, label, size); err != nil {
				return err
			}
		}
	}
	return nil
}

// blank is the filesystem to clone for a disk of a size. What the daemon made at its start is
// normally there; the cache may have been emptied since.
func (s *Service) blank(ctx context.Context, label string, size int64) (string, error) {
	t := disk.Templates{Dir: s.paths.Templates()}
	path, err := t.Best(label, size)
	if fault.Is(err, fault.NotFound) {
		path, err = t.Ensure(ctx, label, vm.MinDiskBytes)
	}
	return path, err
}

// systemDisk owns the VM's directory and its system overlay.
type systemDisk struct{ service *Service }

func (d *systemDisk) Name() string { return stepSystem }

// Durable: everything the guest wrote outside /root is on it.
func (d *systemDisk) Durable() {}

// Observe refuses to make a disk that was there anew: an empty one in its place would pass for it.
func (d *systemDisk) Observe(_ context.Context, v *vm.VM) (bool, error) {
	return d.service.diskThere(v, d.service.systemDisk(v.ID), "system disk")
}

func (s *Service) diskThere(v *vm.VM, path, what string) (bool, error) {
	if _, err := os.Stat(path); err != nil {
		return false, fault.Wrap(err, fault.Corrupt, v.Name, "its %s is gone: %s", what, path).
			WithHint("put the file back from a backup, or delete the VM with `banger vm delete %s`", v.Name)
	}
	return true, nil
}

// Prepare makes the directory and clones the blank overlay.
func (d *systemDisk) Prepare(ctx context.Context, v *vm.VM) error {
	s := d.service
	if err := os.MkdirAll(s.vmDir(v.ID), 0o700); err != nil {
		return fault.Wrap(err, fault.Internal, s.vmDir(v.ID), "the VM's directory cannot be made")
	}
	template, err := s.blank(ctx, systemLabel, v.Spec.SystemSize)
	if err != nil {
		return err
	}
	if _, err = disk.NewFromTemplate(ctx, template, s.systemDisk(v.ID), v.Spec.SystemSize); err != nil || v.Build == nil {
		return err
	}
	// A VM that an image is built in writes its root itself. It has the overlay's disk nevertheless: drives are told apart
	// by their order where they have no serials.
	_, err = disk.NewFromTemplate(ctx, s.images.content(v.Pins.Base), rootDisk(s.paths, v.ID), v.Build.RootSize)
	return err
}

// rootDisk is the private root filesystem of a VM that an image is built in.
func rootDisk(p config.Paths, id vm.ID) string { return filepath.Join(p.VM(string(id)), "root.ext4") }

// Cleanup removes the directory with all that is in it.
func (d *systemDisk) Cleanup(_ context.Context, v *vm.VM, _ lifecycle.How) error {
	if err := os.RemoveAll(d.service.vmDir(v.ID)); err != nil {
		return fault.Wrap(err, fault.Internal, d.service.vmDir(v.ID), "the VM's directory cannot be removed")
	}
	return nil
}

// GuestConfig names the directories that do not work on overlayfs: Docker's and containerd's own
// overlays cannot be stacked on one.
func (d *systemDisk) GuestConfig(_ *vm.VM, c *boot.Config) error {
	c.Native = append(c.Native, "/var/lib/docker", "/var/lib/containerd")
	return nil
}

// Machine attaches the overlay.
func (d *systemDisk) Machine(_ context.Context, v *vm.VM, spec *vmm.Spec) error {
	spec.Drives = append(spec.Drives, vmm.Drive{Role: vmm.RoleSystem, Path: d.service.systemDisk(v.ID)})
	return nil
}

// Check makes the blank template, once: it needs mke2fs.
func (d *systemDisk) Check(ctx context.Context) []doctor.Finding {
	if err := d.service.ensureBlanks(ctx); err != nil {
		return []doctor.Finding{doctor.FromError("mke2fs", "Blank disks", err, seeDir(d.service.paths.Templates()))}
	}
	return []doctor.Finding{{Code: "mke2fs", Severity: doctor.Pass, Title: "Blank disks", Detail: "can be made"}}
}

// workDisk owns the disk that is mounted at /root.
type workDisk struct{ service *Service }

func (d *workDisk) Name() string { return stepWork }

// Durable: it is what people keep a VM for.
func (d *workDisk) Durable() {}

// Observe is the system disk's.
func (d *workDisk) Observe(_ context.Context, v *vm.VM) (bool, error) {
	return d.service.diskThere(v, d.service.workDisk(v.ID), "work disk")
}

// Prepare clones the image's work seed, or a blank disk if the image has none.
func (d *workDisk) Prepare(ctx context.Context, v *vm.VM) error {
	s := d.service
	template := s.images.content(v.Pins.Seed)
	if v.Pins.Seed == "" {
		var err error
		if template, err = s.blank(ctx, workLabel, v.Spec.DiskSize); err != nil {
			return err
		}
	}
	_, err := disk.NewFromTemplate(ctx, template, s.workDisk(v.ID), v.Spec.DiskSize)
	return err
}

// Cleanup removes the disk.
func (d *workDisk) Cleanup(_ context.Context, v *vm.VM, _ lifecycle.How) error {
	return disk.Remove(d.service.workDisk(v.ID))
}

// GuestConfig mounts it at /root, grown to the drive, and begun with the image's /root if no work seed did that.
func (d *workDisk) GuestConfig(v *vm.VM, c *boot.Config) error {
	c.Mounts = append(c.Mounts, boot.Mount{Role: string(vmm.RoleWork), Target: "/root", Grow: true, Seed: v.Pins.Seed == ""})
	return nil
}

// Machine attaches the disk.
func (d *workDisk) Machine(_ context.Context, v *vm.VM, spec *vmm.Spec) error {
	spec.Drives = append(spec.Drives, vmm.Drive{Role: vmm.RoleWork, Path: d.service.workDisk(v.ID)})
	return nil
}

// Check has nothing of its own: seeds come with images, blank disks are the system disk's.
func (d *workDisk) Check(context.Context) []doctor.Finding { return nil }
