package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/kernel"
)

// stockPackages make the guest that `make bench-floor` holds banger's own against: what debootstrap
// installs by itself, an SSH server, and the very kernel package that banger's guests boot, with the initrd
// that Debian makes for it.
var stockPackages = []string{"systemd-sysv", "openssh-server", "initramfs-tools", "zstd", kernelPackages[0]}

// stockCustomize tells that guest what its disk is, and has its SSH service say on the console when it
// listens: sshd reports that to systemd itself (Type=notify). Nothing else is changed, and nothing masked.
const stockCustomize = `set -eu
echo stock >"$1/etc/hostname"
echo '/dev/vda / ext4 errors=remount-ro 0 1' >"$1/etc/fstab"
mkdir -p "$1/etc/systemd/system/ssh.service.d"
printf '[Service]\nExecStartPost=/bin/sh -c "echo stock: sshd listens >/dev/ttyS0"\n' >"$1/etc/systemd/system/ssh.service.d/said.conf"
`

// stockVariant is mmdebstrap's name for what debootstrap installs by default.
const stockVariant = "important"

// stockBlocks is the size of its disk, 4 GiB; the file is sparse.
const stockBlocks = 4 << 30 / ext4.BlockSize

// makeStock builds the untrimmed guest and makes -to a link to it: disk.ext4, vmlinux and initrd.img. The
// same packages are built once.
func makeStock(ctx context.Context, p *progress, o options) error {
	if o.to == "" {
		return fault.New(fault.Invalid, "-to", "says where the link to the guest is made").WithHint("make bench-floor")
	}
	c, err := openCache(ctx, p)
	if err != nil {
		return err
	}
	defer c.close()
	tools, err := c.tools(ctx, p)
	if err != nil {
		return err
	}
	key := contentKey("stock", recipeVersion, suite, runtime.GOARCH, stockVariant, stockPackages, stockCustomize, stockBlocks, ext4.MkfsArgs(ext4.Growing))
	dir, _, err := c.get(ctx, "stock", key, false, func(dir string) ([]string, error) {
		mode, err := debootstrapMode()
		if err != nil {
			return nil, err
		}
		return buildStock(ctx, p, mode, dir, tools)
	})
	if err != nil {
		return err
	}
	if err := replaceLink(dir, o.to); err != nil {
		return err
	}
	return c.prune(ctx, "stock")
}

func buildStock(ctx context.Context, p *progress, mode, dir string, tools toolchain) ([]string, error) {
	if free, err := freeBytes(dir); err != nil || free < cacheNeed {
		return nil, fault.Wrap(err, fault.Exhausted, dir, "building the untrimmed guest takes %s, and there are %s", gib(cacheNeed), gib(free)).
			WithHint("free some space, or set XDG_CACHE_HOME to a directory with more")
	}
	p.begin("building an untrimmed guest")
	tarFile := filepath.Join(dir, "disk.tar")
	var size imageSize
	args := debootstrapArgs(mode, stockVariant, suite, stockPackages, "--customize-hook="+stockCustomize)
	err := debootstrap(ctx, p, args, func(r io.Reader) (err error) {
		out, err := os.Create(tarFile)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, out.Close()) }()
		size, err = takeBoot(io.TeeReader(r, out), dir)
		return err
	})
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(filepath.Join(dir, labKernel))
	if err != nil {
		return nil, err
	}
	vmlinux, err := kernel.Unpack(raw, labKernel)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, fileVmlinux), vmlinux, 0o644); err != nil {
		return nil, err
	}
	p.begin("writing its disk")
	if err := makeImage(ctx, tools, ext4.Growing, "stock", tarFile, filepath.Join(dir, labDisk), size, stockBlocks); err != nil {
		return nil, err
	}
	return []string{labDisk, fileVmlinux, labInitrd}, os.Remove(tarFile)
}
