package oci

import (
	"archive/tar"
	"path"
	"slices"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
)

// inits are where a distribution's init is, in the order in which a guest looks.
var inits = []string{"/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/etc/init", "/bin/init"}

// Container is what the image says of the programs that run in it, and whether it can boot by itself.
func (img *Image) Container() boot.Container {
	c := img.Config.Config
	return boot.Container{
		Version: boot.ContainerVersion, Reference: img.Reference, Digest: img.Digest, NoInit: !img.boots(),
		Command:     slices.Concat(c.Entrypoint, c.Cmd),
		Environment: c.Env, User: c.User, WorkingDir: c.WorkingDir, StopSignal: c.StopSignal,
	}
}

// boots says whether the image has an init that brings a system up. Busybox's counts only with the OpenRC that
// its inittab calls: images of Alpine, and of busybox itself, have the program because it is one of many that
// busybox is, and nothing that it would start.
func (img *Image) boots() bool {
	for _, p := range inits {
		n := img.root.find(p)
		if n == nil || n.kind != tar.TypeReg || n.mode&0o111 == 0 {
			continue
		}
		if !img.isBusybox(n, p) {
			return true
		}
		openrc := img.root.find("/sbin/openrc")
		return openrc != nil && openrc.kind == tar.TypeReg && img.root.find("/etc/inittab") != nil
	}
	return false
}

// isBusybox says whether a file is busybox by one of the names that it has in images.
func (img *Image) isBusybox(n *node, name string) bool {
	for _, p := range []string{"/bin/busybox", "/usr/bin/busybox", "/sbin/busybox", "/bin/busybox.static"} {
		if img.root.find(p) == n {
			return true
		}
	}
	// An image of nothing but busybox may have hard links only.
	return path.Base(name) == "init" && img.root.find("/bin/[") == n
}

// AddContainer puts what Container says into the tree, for the guest.
func (img *Image) AddContainer() error {
	content, err := img.Container().Encode()
	if err != nil {
		return err
	}
	return img.add(boot.ContainerPath, 0o644, content, img.created())
}

// AddSSHServer puts an SSH server into the tree, for a guest whose image has no init that would start one.
func (img *Image) AddSSHServer(program []byte) error {
	return img.add(boot.SSHServerPath, 0o755, program, img.created())
}

// created is the image's own time, so that one image makes one filesystem, whenever it is pulled.
func (img *Image) created() time.Time {
	if t := img.Config.Created.Time; t.Unix() > 0 {
		return t
	}
	return time.Unix(0, 0)
}
