package sandbox

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/kernel"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/store"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// defaultImage is the name under which the bundle's root filesystem is registered by itself.
const defaultImage = "default"

// images owns captured artifacts: root filesystems, work seeds and kernels, each in a directory
// named by its content id, kept as long as an image or a VM refers to it.
type images struct {
	store *store.Store
	cfg   config.Config
	paths config.Paths

	// mu guards what follows, and every capture and removal: what is looked up must not be taken
	// away before it is used.
	mu      ctxLock
	sources map[string]source // where content that was registered can be captured from, by content id
	seen    string            // fingerprint of what refresh saw last
}

// source is a file that holds content of a known id.
type source struct {
	path string
	size int64
}

func (im *images) baseDir(id string) string { return filepath.Join(im.paths.State, "images", id) }
func (im *images) basePath(id string) string {
	return filepath.Join(im.baseDir(id), "rootfs.ext4")
}
func (im *images) kernelDir(id string) string {
	return filepath.Join(im.paths.State, "kernels", id)
}

// seedPath is where the captured work seed of a VM's image lies, "" if it has none.
func (im *images) seedPath(p vm.Pins) string {
	if p.Seed == "" {
		return ""
	}
	return filepath.Join(im.baseDir(p.Seed), "work-seed.ext4")
}

// The files of a captured kernel.
const (
	kernelFile  = "vmlinux"
	initrdFile  = "initrd.img"  // ours: guest program and modules
	foreignFile = "foreign.img" // default_initrd, put before ours
	modulesFile = "modules.ext4"
)

// identity is the path of the installation's private SSH key.
func (im *images) identity() (string, error) {
	dir, err := bundle.Locate(im.cfg.RuntimeDir)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, bundle.SSHKey), nil
}

// pins resolves an image name to the content that a VM of it is made from.
func (im *images) pins(ctx context.Context, name string) (vm.Pins, error) {
	if name == "" {
		name = defaultImage
	}
	if err := im.refresh(ctx); err != nil {
		// Without a bundle other images still work, and a wrong name is still a wrong name.
		if name == defaultImage {
			return vm.Pins{}, err
		}
	}
	list, err := im.store.Images(ctx)
	if err != nil {
		return vm.Pins{}, err
	}
	var known []string
	for _, img := range list {
		if img.Name == name {
			return vm.Pins{Image: img.Name, ImageID: img.ID, Base: img.Base, Seed: img.Seed, Kernel: img.Kernel}, nil
		}
		known = append(known, img.Name)
	}
	return vm.Pins{}, fault.New(fault.NotFound, name, "there is no image of this name").
		WithHint("choose one of: %s (banger image list)", strings.Join(known, ", "))
}

// refresh registers the bundle's image, or what default_rootfs and its fellows name instead, again
// if any of the files changed since it looked last. Existing VMs keep what they were made from.
func (im *images) refresh(ctx context.Context) error {
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	dir, err := bundle.Locate(im.cfg.RuntimeDir)
	if err != nil {
		return err
	}
	b, err := bundle.Load(dir)
	if err != nil {
		return err
	}
	if err := b.Check(); err != nil {
		return err
	}
	c := im.cfg
	print := fingerprint(append([]string{filepath.Join(dir, bundle.ManifestName)},
		c.DefaultRootfs, c.DefaultWorkSeed, c.DefaultKernel, c.DefaultInitrd, c.DefaultModulesDir)...)
	if print == im.seen {
		return nil
	}
	sources := map[string]source{}
	take := func(path string, known bundle.Artifact) (string, error) {
		id := known.SHA256
		if path == "" {
			path = filepath.Join(dir, known.Path)
		} else if id, err = im.hash(ctx, path); err != nil {
			return "", err
		}
		st, err := os.Stat(path)
		if err != nil {
			return "", fault.Wrap(err, fault.NotFound, path, "the file cannot be read")
		}
		sources[id] = source{path: path, size: allocated(st)}
		return id, nil
	}
	img := image.Image{Name: defaultImage, Source: filepath.Join(dir, b.Rootfs.Path), Packages: filepath.Join(dir, b.Packages.Path), CreatedAt: time.Now()}
	if c.DefaultRootfs != "" {
		img.Source = c.DefaultRootfs
	}
	if c.DefaultPackagesFile != "" {
		img.Packages = c.DefaultPackagesFile
	}
	if img.Base, err = take(c.DefaultRootfs, b.Rootfs); err != nil {
		return err
	}
	// The bundle's seed is /root of the bundle's root filesystem: no other one's.
	if c.DefaultWorkSeed != "" || c.DefaultRootfs == "" && b.WorkSeed.Path != "" {
		if img.Seed, err = take(c.DefaultWorkSeed, b.WorkSeed); err != nil {
			return err
		}
	}
	st, err := os.Stat(img.Source)
	if err != nil {
		return fault.Wrap(err, fault.NotFound, img.Source, "the root filesystem cannot be read")
	}
	img.SizeBytes = st.Size()
	k, err := im.kernelSources(ctx, dir, b, take)
	if err != nil {
		return err
	}
	img.Kernel = k.ID
	sum := sha256.Sum256([]byte(img.Base + img.Seed + img.Kernel))
	img.ID = hex.EncodeToString(sum[:16])
	if err := im.store.PutKernel(ctx, k); err != nil {
		return err
	}
	if err := im.store.PutImage(ctx, img); err != nil {
		return err
	}
	im.sources, im.seen = sources, print
	return im.collect(ctx)
}

// kernelSources finds the files of the kernel that new VMs boot with: the bundle's, or what the
// configuration puts in their place. What has to be made of them is made in the cache.
func (im *images) kernelSources(ctx context.Context, dir string, b *bundle.Bundle, take func(string, bundle.Artifact) (string, error)) (image.Kernel, error) {
	c := im.cfg
	k := image.Kernel{Version: b.KernelVersion, ForeignInitrd: c.DefaultInitrd != "", CreatedAt: time.Now()}
	var own ownKernel
	if c.DefaultKernel != "" || c.DefaultModulesDir != "" {
		var err error
		if own, err = im.makeKernel(ctx, dir, b); err != nil {
			return k, err
		}
		k.Version = own.version
	}
	parts := []struct {
		path  string
		known bundle.Artifact
	}{{own.vmlinux, b.Kernel}, {own.initrd, b.Initrd}, {own.modules, b.Modules}}
	var ids []string
	for _, p := range parts {
		id, err := take(p.path, p.known)
		if err != nil {
			return k, err
		}
		ids = append(ids, id)
	}
	if c.DefaultInitrd != "" {
		id, err := take(c.DefaultInitrd, bundle.Artifact{})
		if err != nil {
			return k, err
		}
		ids = append(ids, id)
	}
	// The id names its parts, so that a kernel can be captured by it alone.
	sum := sha256.Sum256([]byte("kernel\n" + strings.Join(ids, "\n")))
	k.ID = hex.EncodeToString(sum[:])
	k.Files = ids
	return k, nil
}

type ownKernel struct{ vmlinux, initrd, modules, version string }

// makeKernel makes boot artifacts of default_kernel and default_modules_dir, once per content, in
// the cache.
func (im *images) makeKernel(ctx context.Context, dir string, b *bundle.Bundle) (ownKernel, error) {
	c := im.cfg
	if c.DefaultModulesDir == "" || c.DefaultKernel == "" {
		return ownKernel{}, fault.New(fault.Invalid, "default_kernel", "default_kernel and default_modules_dir go together: modules fit one kernel only").
			WithHint("set both in config.toml, or neither")
	}
	tree, err := kernel.OpenTree(c.DefaultModulesDir)
	if err != nil {
		return ownKernel{}, err
	}
	raw, err := os.ReadFile(c.DefaultKernel)
	if err != nil {
		return ownKernel{}, fault.Wrap(err, fault.NotFound, c.DefaultKernel, "the kernel cannot be read").WithHint("see default_kernel in config.toml")
	}
	vmlinux, err := kernel.Unpack(raw, c.DefaultKernel)
	if err != nil {
		return ownKernel{}, err
	}
	version, err := tree.Version()
	if err != nil {
		return ownKernel{}, err
	}
	sum := sha256.Sum256([]byte(fingerprint(c.DefaultKernel, c.DefaultModulesDir, filepath.Join(c.DefaultModulesDir, "modules.dep"))))
	out := filepath.Join(im.paths.Cache, "kernels", hex.EncodeToString(sum[:16]))
	if err := os.MkdirAll(out, 0o700); err != nil {
		return ownKernel{}, fault.Wrap(err, fault.Internal, out, "the cache cannot be written")
	}
	own := ownKernel{vmlinux: filepath.Join(out, kernelFile), initrd: filepath.Join(out, initrdFile), modules: filepath.Join(out, modulesFile), version: version}
	if _, err := os.Stat(own.initrd); err == nil { // written last
		return own, nil
	}
	if err := disk.WriteFile(own.vmlinux, vmlinux, 0o400); err != nil {
		return own, err
	}
	if err := kernel.WriteModulesImage(ctx, tree, own.modules); err != nil {
		return own, err
	}
	agent, err := im.agentProgram(dir)
	if err != nil {
		return own, err
	}
	initrd, err := kernel.BuildInitrd(agent, tree)
	if err != nil {
		return own, err
	}
	return own, disk.WriteFile(own.initrd, initrd, 0o400)
}

// agentProgram reads the guest program that VMs boot with.
func (im *images) agentProgram(dir string) ([]byte, error) {
	path := im.cfg.VsockAgentPath
	if path == "" {
		path = filepath.Join(dir, bundle.Agent)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fault.Wrap(err, fault.NotFound, path, "the guest program cannot be read").WithHint("make build, or see vsock_agent_path in config.toml")
	}
	return b, nil
}

// hash is a file's content id. It is remembered with the file's size, inode and time of change, so
// that a gigabyte is read once.
func (im *images) hash(ctx context.Context, path string) (string, error) {
	print := fingerprint(path)
	key := "sha256:" + path
	if known, err := im.store.Meta(ctx, key); err != nil {
		return "", err
	} else if id, ok := strings.CutPrefix(known, print+" "); ok {
		return id, nil
	}
	id, err := disk.Hash(ctx, path)
	if err != nil {
		return "", err
	}
	return id, im.store.SetMeta(ctx, key, print+" "+id)
}

// fingerprint changes when one of the files does.
func fingerprint(paths ...string) string {
	var out []string
	for _, p := range paths {
		if p == "" {
			continue
		}
		st, err := os.Stat(p)
		if err != nil {
			out = append(out, p+":missing")
			continue
		}
		sys := st.Sys().(*syscall.Stat_t)
		out = append(out, fmt.Sprintf("%s:%d:%d:%d:%d", p, sys.Ino, st.Size(), sys.Mtim.Nano(), sys.Ctim.Nano()))
	}
	return strings.Join(out, "|")
}

func allocated(st fs.FileInfo) int64 { return st.Sys().(*syscall.Stat_t).Blocks * 512 } // stat(2): in 512-byte units

// captureNeed is how many bytes capturing what a VM needs may take.
func (im *images) captureNeed(ctx context.Context, p vm.Pins) (int64, error) {
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return 0, err
	}
	defer unlock()
	if exists(im.basePath(p.Base)) {
		return 0, nil
	}
	return im.sources[p.Base].size, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// capture makes sure that what a VM is made from is captured.
func (im *images) capture(ctx context.Context, p vm.Pins) error {
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := im.captureFile(ctx, p.Base, im.basePath(p.Base)); err != nil {
		return err
	}
	if p.Seed != "" {
		if err := im.captureFile(ctx, p.Seed, im.seedPath(p)); err != nil {
			return err
		}
	}
	k, err := im.kernelRecord(ctx, p.Kernel)
	if err != nil {
		return err
	}
	for i, name := range []string{kernelFile, initrdFile, modulesFile, foreignFile} {
		if i < len(k.Files) {
			if err := im.captureFile(ctx, k.Files[i], filepath.Join(im.kernelDir(p.Kernel), name)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (im *images) captureFile(ctx context.Context, id, dst string) error {
	if exists(dst) {
		return nil
	}
	src, ok := im.sources[id]
	if !ok {
		return fault.New(fault.Corrupt, dst, "the captured artifact is gone, and nothing on this machine holds its content any more").
			WithHint("put the file back from a backup, or delete the VM and make a new one")
	}
	if err := os.MkdirAll(filepath.Dir(dst), 0o700); err != nil {
		return fault.Wrap(err, fault.Internal, dst, "the directory cannot be made")
	}
	return disk.Capture(ctx, src.path, dst, id)
}

func (im *images) kernelRecord(ctx context.Context, id string) (image.Kernel, error) {
	list, err := im.store.Kernels(ctx)
	if err != nil {
		return image.Kernel{}, err
	}
	for _, k := range list {
		if k.ID == id {
			return k, nil
		}
	}
	return image.Kernel{}, fault.New(fault.Corrupt, id, "the kernel has no record")
}

func (im *images) kernelVersion(ctx context.Context, id string) (string, error) {
	k, err := im.kernelRecord(ctx, id)
	return k.Version, err
}

// initrd returns the path of the initrd to boot a kernel with: its own modules, today's guest
// program. It is made once per pair, in the cache.
func (im *images) initrd(ctx context.Context, id string) (string, error) {
	dir, err := bundle.Locate(im.cfg.RuntimeDir)
	if err != nil {
		return "", err
	}
	agentPath := im.cfg.VsockAgentPath
	if agentPath == "" {
		agentPath = filepath.Join(dir, bundle.Agent)
	}
	agentID, err := im.hash(ctx, agentPath)
	if err != nil {
		return "", err
	}
	out := filepath.Join(im.paths.Cache, "initrd", id[:16]+"-"+agentID[:16]+".img")
	if exists(out) {
		return out, nil
	}
	agent, err := im.agentProgram(dir)
	if err != nil {
		return "", err
	}
	ownPath := filepath.Join(im.kernelDir(id), initrdFile)
	own, err := os.ReadFile(ownPath)
	if err != nil {
		return "", fault.Wrap(err, fault.Corrupt, ownPath, "the captured initrd cannot be read")
	}
	var made []byte
	foreign, err := os.ReadFile(filepath.Join(im.kernelDir(id), foreignFile))
	switch {
	case err == nil:
		made, err = kernel.JoinForeign(foreign, agent, own, ownPath)
	case errors.Is(err, fs.ErrNotExist):
		made, err = kernel.RegenerateInitrd(own, agent, ownPath)
	}
	if err != nil {
		return "", fault.Wrap(err, fault.Corrupt, ownPath, "no initrd can be made")
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o700); err != nil {
		return "", fault.Wrap(err, fault.Internal, out, "the cache cannot be written")
	}
	return out, disk.WriteFile(out, made, 0o400)
}

// collectUnused is collect for callers that do not hold mu.
func (im *images) collectUnused(ctx context.Context) error {
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return im.collect(ctx)
}

// collect removes captured content that neither an image nor a VM refers to. Call it with mu held.
func (im *images) collect(ctx context.Context) error {
	keep := map[string]bool{}
	list, err := im.store.Images(ctx)
	if err != nil {
		return err
	}
	for _, img := range list {
		keep[img.Base], keep[img.Seed], keep[img.Kernel] = true, true, true
	}
	for _, v := range im.store.VMs() {
		keep[v.Pins.Base], keep[v.Pins.Seed], keep[v.Pins.Kernel] = true, true, true
	}
	for _, kind := range []string{"images", "kernels"} {
		dir := filepath.Join(im.paths.State, kind)
		have, err := names(dir)
		if err != nil {
			return err
		}
		for _, id := range have {
			// Only names of the form that capture makes: what else lies there is not ours to judge.
			if raw, err := hex.DecodeString(id); err != nil || len(raw) != sha256.Size || keep[id] {
				continue
			}
			if err := os.RemoveAll(filepath.Join(dir, id)); err != nil {
				return fault.Wrap(err, fault.Internal, id, "a captured artifact that nothing refers to cannot be removed")
			}
		}
	}
	kernels, err := im.store.Kernels(ctx)
	if err != nil {
		return err
	}
	for _, k := range kernels {
		if !keep[k.ID] {
			if err := im.store.DeleteKernel(ctx, k.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

// sweep removes half-written captures of a crash.
func (im *images) sweep(ctx context.Context) error {
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	for _, kind := range []string{"images", "kernels"} {
		dir := filepath.Join(im.paths.State, kind)
		have, err := names(dir)
		if err != nil {
			return err
		}
		for _, id := range have {
			if err := disk.SweepTemporary(filepath.Join(dir, id)); err != nil {
				return err
			}
		}
	}
	return nil
}

// imageCapability owns that what a VM was made from is there: base, work seed, kernel.
type imageCapability struct{ images *images }

func (c *imageCapability) Name() string { return stepImage }

// Durable: a stopped VM keeps its base.
func (c *imageCapability) Durable() {}

// Prepare captures what is not captured yet.
func (c *imageCapability) Prepare(ctx context.Context, v *vm.VM) error {
	return c.images.capture(ctx, v.Pins)
}

// Cleanup leaves the content to the next collection: other VMs may use it.
func (c *imageCapability) Cleanup(context.Context, *vm.VM, lifecycle.How) error { return nil }

// Machine names kernel and initrd and attaches base and modules.
func (c *imageCapability) Machine(ctx context.Context, v *vm.VM, spec *vmm.Spec) (err error) {
	dir := c.images.kernelDir(v.Pins.Kernel)
	spec.Kernel = filepath.Join(dir, kernelFile)
	if spec.Initrd, err = c.images.initrd(ctx, v.Pins.Kernel); err != nil {
		return err
	}
	if exists(filepath.Join(dir, foreignFile)) {
		spec.Cmdline += " rdinit=/" + kernel.ForeignAgentPath
	}
	spec.Drives = append(spec.Drives,
		vmm.Drive{Role: vmm.RoleBase, Path: c.images.basePath(v.Pins.Base), ReadOnly: true},
		vmm.Drive{Role: vmm.RoleModules, Path: filepath.Join(dir, modulesFile), ReadOnly: true})
	return nil
}

// Check looks at the bundle.
func (c *imageCapability) Check(ctx context.Context) []doctor.Finding {
	dir, err := bundle.Locate(c.images.cfg.RuntimeDir)
	if err == nil {
		err = c.images.refresh(ctx)
	}
	if err != nil {
		return []doctor.Finding{doctor.FromError("bundle", "Runtime bundle", err)}
	}
	return []doctor.Finding{{Code: "bundle", Severity: doctor.Pass, Title: "Runtime bundle", Detail: dir}}
}
