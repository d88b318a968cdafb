// Package fakebundle owns runtime bundles for tests that boot nothing: everything a daemon checks is
// there and in form, and no file is larger than it must be.
//
// It is not a bundle that any VMM could boot.
package fakebundle

import (
	"context"
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
