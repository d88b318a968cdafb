// Package fakebundle owns runtime bundles for tests that boot nothing: everything a daemon checks is
// there and in form, and no file is larger than it must be.
//
// It is not a bundle that any VMM could boot.
package fakebundle

import (
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/kernel"
)

// Make makes a bundle in dir, which is made if need be. It runs mke2fs for the work seed.
func Make(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	initrd, err := initrd()
	if err != nil {
		return err
	}
	content := map[bundle.Role]string{
		bundle.Kernel: "a kernel", bundle.Initrd: string(initrd), bundle.Modules: "modules",
		bundle.RootFS: "a root filesystem", bundle.Agent: "an agent", bundle.Packages: "# none\n",
	}
	for role, text := range content {
		if err := os.WriteFile(filepath.Join(dir, bundle.FileName(role)), []byte(text), 0o644); err != nil {
			return err
		}
	}
	tool, err := ext4.FindTool(context.Background())
	if err != nil {
		return err
	}
	seed := filepath.Join(dir, bundle.FileName(bundle.WorkSeed))
	if err := tool.Make(context.Background(), seed, ext4.Format{Kind: ext4.Growing, Size: 256 << 20, Label: "banger-work"}); err != nil {
		return err
	}
	if err := cutDown(seed); err != nil {
		return err
	}
	if err := bundle.EnsureSSHKey(dir); err != nil {
		return err
	}
	b := &bundle.Bundle{CreatedBy: "test", Arch: "amd64", KernelVersion: "6.12.0-test", Artifacts: map[bundle.Role]bundle.Artifact{
		bundle.SSHKey: {Path: bundle.FileName(bundle.SSHKey)},
	}}
	for _, role := range bundle.Required() {
		if role == bundle.SSHKey {
			continue
		}
		if b.Artifacts[role], err = bundle.Describe(context.Background(), dir, bundle.FileName(role)); err != nil {
			return err
		}
	}
	return b.Write(dir)
}

// cutDown makes a filesystem of 4 MiB of a larger one, as far as its superblock goes, and nobody looks
// further: a seed is hashed at each capture, and the smallest that can grow has 256 MiB.
func cutDown(seed string) error {
	const size = 4 << 20
	f, err := os.OpenFile(seed, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	super := make([]byte, 1024)
	if _, err = f.ReadAt(super, 1024); err == nil {
		binary.LittleEndian.PutUint32(super[4:], size/ext4.BlockSize) // s_blocks_count_lo; the high half is 0 already
		// s_checksum: crc32c of what is before it, without the last inversion (ext4's crc32c_le).
		binary.LittleEndian.PutUint32(super[1020:], ^crc32.Checksum(super[:1020], crc32.MakeTable(crc32.Castagnoli)))
		_, err = f.WriteAt(super, 1024)
	}
	return errors.Join(err, f.Truncate(size), f.Close())
}

// initrd is one of ours for a kernel that has everything built in.
func initrd() ([]byte, error) {
	dir, err := os.MkdirTemp("", "fakebundle-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	var builtin strings.Builder
	for _, m := range kernel.InitrdModules() {
		builtin.WriteString("kernel/" + m.Name + ".ko\n")
	}
	for name, text := range map[string]string{"modules.dep": "", "modules.builtin": builtin.String()} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	tree, err := kernel.OpenTree(dir)
	if err != nil {
		return nil, err
	}
	return kernel.BuildInitrd([]byte("the bundle's agent"), tree)
}
