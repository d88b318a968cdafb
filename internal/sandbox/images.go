package sandbox

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/cachedir"
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

// images owns captured artifacts: root filesystems, work seeds and the parts of kernels, each a file
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
	held    map[vm.Pins]int   // what VMs that have no record yet are made from

	loaded atomic.Pointer[loadedBundle] // the bundle as it was read last
}

// loadedBundle is a bundle, and the fingerprint that its manifest had before it was read.
type loadedBundle struct {
	*bundle.Bundle
	mark string
}

// source is a file that holds content of a known id.
type source struct {
	path string
	size int64
}

// content is where captured content lies: one file an id.
func (im *images) content(id string) string { return filepath.Join(im.paths.Images(), id) }

// kernelPart is where a captured part of a kernel lies.
func (im *images) kernelPart(id string) string { return filepath.Join(im.paths.Kernels(), id) }

// The parts of a kernel, as indices of image.Kernel.Files.
const (
	partKernel  = iota
	partInitrd  // ours: guest program and modules
	partModules // ext4
	partForeign // default_initrd, if there is one
)

// bundle is the bundle that the settings or the program's place lead to. Its manifest is read when it is another one than last time.
func (im *images) bundle() (*bundle.Bundle, error) {
	l, err := im.load()
	return l.Bundle, err
}

// load is bundle with the fingerprint of what was read: a manifest that is replaced meanwhile is seen as another one next time.
func (im *images) load() (loadedBundle, error) {
	where, err := bundle.Locate(im.cfg.RuntimeDir)
	if err != nil {
		return loadedBundle{}, err
	}
	mark := fingerprint(filepath.Join(where.Dir, bundle.ManifestName))
	if last := im.loaded.Load(); last != nil && last.mark == mark { // it has the path as well
		return *last, nil
	}
	b, err := bundle.Load(where.Dir)
	if err != nil {
		return loadedBundle{}, err
	}
	l := loadedBundle{b, mark}
	im.loaded.Store(&l)
	return l, nil
}

// identity is the path of the private SSH key by which this user enters VMs: the bundle's, or the user's own where the bundle is the
// system's.
func (im *images) identity() (string, error) {
	b, err := im.bundle()
	if err != nil {
		return "", err
	}
	return b.KeyFor(im.paths.State)
}

// agentPath is the guest program that VMs boot with.
func (im *images) agentPath() (string, error) {
	if im.cfg.VsockAgentPath != "" {
		return im.cfg.VsockAgentPath, nil
	}
	b, err := im.bundle()
	if err != nil {
		return "", err
	}
	return b.Path(bundle.Agent), nil
}

// pins resolves an image name to the content that a VM of it is made from. The content is kept
// until release: by then the VM has a record, or will have none.
func (im *images) pins(ctx context.Context, name string) (p vm.Pins, release func(), err error) {
	if name == "" {
		name = defaultImage
	}
	if err := im.refresh(ctx); err != nil {
		// Without a bundle other images still work, and a wrong name is still a wrong name.
		if name == defaultImage {
			return vm.Pins{}, nil, err
		}
	}
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return vm.Pins{}, nil, err
	}
	defer unlock()
	img, err := im.find(ctx, name)
	if err != nil {
		return vm.Pins{}, nil, err
	}
	p = vm.Pins{Image: img.Name, ImageID: img.ID, Base: img.Base, Seed: img.Seed, Kernel: img.Kernel}
	if p.Kernel == "" {
		if p.Kernel, err = im.defaultKernel(ctx, img.Name); err != nil {
			return vm.Pins{}, nil, err
		}
	}
	return p, im.hold(p), nil
}

// hold keeps content from collect until it is released. Call it with mu held.
func (im *images) hold(p vm.Pins) (release func()) {
	if im.held == nil {
		im.held = map[vm.Pins]int{}
	}
	im.held[p]++
	return func() {
		unlock, err := im.mu.lock(context.Background()) // it is held for as long as a file takes to copy
		if err != nil {
			return
		}
		defer unlock()
		if im.held[p]--; im.held[p] == 0 {
			delete(im.held, p)
		}
	}
}

// refresh registers the bundle's image, or what default_rootfs and its fellows name instead, again
// if any of the files changed since it looked last. Existing VMs keep what they were made from.
func (im *images) refresh(ctx context.Context) error {
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	b, err := im.load()
	if err != nil {
		return err
	}
	if err := b.Check(); err != nil {
		return err
	}
	c := im.cfg
	mark := b.mark + "|" + fingerprint(b.Path(bundle.RootFS), b.Path(bundle.WorkSeed),
		c.DefaultRootfs, c.DefaultWorkSeed, c.DefaultKernel, c.DefaultInitrd, c.DefaultModulesDir, indexOf(c.DefaultModulesDir))
	if mark == im.seen && im.complete() {
		return nil
	}
	sources := map[string]source{}
	// take names the content of a file by its path, or of the bundle's artifact where there is none:
	// that one's id is known without reading it.
	take := func(path string, role bundle.Role) (string, error) {
		id := b.Artifacts[role].SHA256
		if path == "" {
			path = b.Path(role)
		} else if id, err = im.hash(ctx, path); err != nil {
			return "", configured(c, path, err)
		}
		size, err := disk.Allocated(path)
		if err != nil {
			return "", err
		}
		sources[id] = source{path: path, size: size}
		return id, nil
	}
	img := image.Image{Name: defaultImage, Source: b.Path(bundle.RootFS), Packages: b.Path(bundle.Packages), CreatedAt: time.Now()}
	if c.DefaultRootfs != "" {
		img.Source = c.DefaultRootfs
	}
	if c.DefaultPackagesFile != "" {
		img.Packages = c.DefaultPackagesFile
	}
	if img.Base, err = take(c.DefaultRootfs, bundle.RootFS); err != nil {
		return err
	}
	// The bundle's seed is /root of the bundle's root filesystem: no other one's.
	if c.DefaultWorkSeed != "" || c.DefaultRootfs == "" {
		if img.Seed, err = take(c.DefaultWorkSeed, bundle.WorkSeed); err != nil {
			return err
		}
	}
	st, err := os.Stat(img.Source)
	if err != nil {
		return fault.Wrap(err, fault.NotFound, img.Source, "the root filesystem cannot be read")
	}
	img.SizeBytes = st.Size()
	k, err := im.kernelSources(ctx, b.Bundle, configuredFiles(c), take)
	if err != nil {
		return err
	}
	img.Kernel = k.ID
	sum := sha256.Sum256([]byte(img.Base + img.Seed + img.Kernel))
	img.ID = hex.EncodeToString(sum[:16])
	im.sources = sources
	registered, err := im.store.Images(ctx)
	if err != nil {
		return err
	}
	for _, r := range registered {
		if r.Name == img.Name && r.ID == img.ID && r.Source == img.Source && r.Packages == img.Packages {
			im.seen = mark
			return nil // the same content, seen by an earlier daemon
		}
	}
	if err := im.store.PutKernel(ctx, k); err != nil {
		return err
	}
	if err := im.store.PutImage(ctx, img); err != nil {
		return err
	}
	im.seen = mark // only when it is on record
	return im.collect(ctx)
}

// complete says whether all that is to be captured is where it was: what was made of somebody's own kernel is in the cache, which
// anyone may empty. Call it with mu held.
func (im *images) complete() bool {
	for _, src := range im.sources {
		if !exists(src.path) {
			return false
		}
	}
	return true
}

// configured adds the key that names a file to an error about it.
func configured(c config.Config, path string, err error) error {
	for key, value := range map[string]string{"default_rootfs": c.DefaultRootfs, "default_work_seed": c.DefaultWorkSeed, "default_initrd": c.DefaultInitrd, "vsock_agent_path": c.VsockAgentPath} {
		if value == path {
			return fault.Wrap(err, fault.CodeOf(err), key, "the file that it names in config.toml cannot be used").
				WithHint("correct or remove %s in config.toml, then: banger daemon stop", key)
		}
	}
	return err
}

// indexOf is the file of a module tree that changes when any module does; "" without a tree.
func indexOf(modules string) string {
	if modules == "" {
		return ""
	}
	return filepath.Join(modules, "modules.dep")
}

// bootFiles are files of somebody's own to boot with instead of the bundle's, by path; "" is the bundle's.
type bootFiles struct {
	kernel, initrd, modules string
	// What the user knows them by, and where they are set.
	kernelKey, modulesKey, where string
}

// configuredFiles are those that the settings name.
func configuredFiles(c config.Config) bootFiles {
	return bootFiles{c.DefaultKernel, c.DefaultInitrd, c.DefaultModulesDir, "default_kernel", "default_modules_dir", "in config.toml"}
}

// kernelSources finds the files of the kernel to boot with: the bundle's, or what is given in their place. What
// has to be made of them is made in the cache. take names the content of a file, or of the bundle's part where there is
// none.
func (im *images) kernelSources(ctx context.Context, b *bundle.Bundle, files bootFiles, take func(string, bundle.Role) (string, error)) (image.Kernel, error) {
	k := image.Kernel{Version: b.KernelVersion, ForeignInitrd: files.initrd != "", CreatedAt: time.Now()}
	var own ownKernel
	if files.kernel != "" || files.modules != "" {
		var err error
		if own, err = im.makeKernel(ctx, files); err != nil {
			return k, err
		}
		k.Version = own.version
	}
	parts := []struct {
		path string
		role bundle.Role
	}{{own.vmlinux, bundle.Kernel}, {own.initrd, bundle.Initrd}, {own.modules, bundle.Modules}}
	if files.initrd != "" {
		parts = append(parts, parts[partInitrd])
		parts[partForeign].path = files.initrd
	}
	var ids []string
	for _, p := range parts {
		id, err := take(p.path, p.role)
		if err != nil {
			return k, err
		}
		ids = append(ids, id)
	}
	k.ID, k.Files = kernelID(ids), ids
	return k, nil
}

// kernelID names a kernel by its parts, so that it can be captured by its id alone.
func kernelID(files []string) string {
	sum := sha256.Sum256([]byte("kernel\n" + strings.Join(files, "\n")))
	return hex.EncodeToString(sum[:])
}

type ownKernel struct{ vmlinux, initrd, modules, version string }

// makeKernel makes boot artifacts of a kernel and its modules, once per content, in the cache.
func (im *images) makeKernel(ctx context.Context, files bootFiles) (ownKernel, error) {
	if files.modules == "" || files.kernel == "" {
		return ownKernel{}, fault.New(fault.Invalid, files.kernelKey, "%s and %s go together: modules fit one kernel only", files.kernelKey, files.modulesKey).
			WithHint("set both %s, or neither", files.where)
	}
	tree, err := kernel.OpenTree(files.modules)
	if err != nil {
		return ownKernel{}, err
	}
	raw, err := os.ReadFile(files.kernel)
	if err != nil {
		return ownKernel{}, fault.Wrap(err, fault.NotFound, files.kernel, "the kernel cannot be read").WithHint("see %s %s", files.kernelKey, files.where)
	}
	vmlinux, err := kernel.Unpack(raw, files.kernel)
	if err != nil {
		return ownKernel{}, err
	}
	version, err := tree.Version()
	if err != nil {
		return ownKernel{}, err
	}
	if err := checkVersion(vmlinux, files.kernel, files.modules, version); err != nil {
		return ownKernel{}, err
	}
	sum := sha256.Sum256([]byte(fingerprint(files.kernel, files.modules, indexOf(files.modules))))
	dir := filepath.Join(im.paths.Cache, "kernels")
	out := filepath.Join(dir, hex.EncodeToString(sum[:16]))
	own := ownKernel{vmlinux: filepath.Join(out, "vmlinux"), initrd: filepath.Join(out, "initrd.img"), modules: filepath.Join(out, "modules.ext4"), version: version}
	if _, err := cachedir.Use(ctx, out); err != nil {
		return own, uncached(err, out)
	}
	if exists(own.initrd) { // written last
		return own, nil
	}
	if err := writeCache(own.vmlinux, vmlinux); err != nil {
		return own, err
	}
	if err := kernel.WriteModulesImage(ctx, tree, own.modules); err != nil {
		return own, err
	}
	agent, err := im.agentProgram()
	if err != nil {
		return own, err
	}
	initrd, err := kernel.BuildInitrd(agent, tree)
	if err != nil {
		return own, err
	}
	if err := writeCache(own.initrd, initrd); err != nil {
		return own, err
	}
	return own, uncached(cachedir.Keep(ctx, dir, kernelsKept, cacheYoung, nil), dir)
}

// agentProgram reads the guest program.
func (im *images) agentProgram() ([]byte, error) {
	path, err := im.agentPath()
	if err != nil {
		return nil, err
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
	mark := fingerprint(path)
	key := "sha256:" + path
	if known, err := im.store.Meta(ctx, key); err != nil {
		return "", err
	} else if id, ok := strings.CutPrefix(known, mark+" "); ok {
		return id, nil
	}
	id, err := disk.ContentID(ctx, path)
	if err != nil {
		return "", err
	}
	return id, im.store.SetMeta(ctx, key, mark+" "+id)
}

// fingerprint changes when one of the files does; "" stands for none.
func fingerprint(paths ...string) string {
	var out []string
	for _, p := range paths {
		if p == "" {
			continue
		}
		mark, err := disk.Fingerprint(p)
		if err != nil {
			mark = "missing" // whoever needs the file will say so
		}
		out = append(out, p+":"+mark)
	}
	return strings.Join(out, "|")
}

// What the cache keeps of what is made of kernels: a handful of the user's own, 90 MiB each, and initrds of 8 to 25 MiB, of which
// every new guest program has one for each kernel. What was used within cacheYoung may be on its way to a VMM, or to a capture.
const (
	kernelsKept = 4
	initrdsKept = 16
	cacheYoung  = time.Hour
)

// writeCache writes a file of the cache whole or not at all.
func writeCache(path string, b []byte) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return uncached(err, path)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return uncached(err, path)
	}
	defer func() {
		if err != nil {
			err = uncached(errors.Join(err, os.Remove(f.Name())), path)
		}
	}()
	_, werr := f.Write(b)
	// Without the sync a power cut could leave the name on an empty file.
	if err := errors.Join(werr, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// uncached is the error of a cache that cannot be used, nil for nil.
func uncached(err error, path string) error {
	if err == nil {
		return nil
	}
	return fault.Wrap(err, fault.CodeOf(err), path, "the cache cannot be written")
}

// captureNeed is how many bytes capturing what a VM needs may take.
func (im *images) captureNeed(ctx context.Context, p vm.Pins) (int64, error) {
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return 0, err
	}
	defer unlock()
	files, err := im.filesOf(ctx, p)
	if err != nil {
		return 0, err
	}
	var need int64
	for id, dir := range files {
		if !exists(filepath.Join(dir, id)) {
			need += im.sources[id].size
		}
	}
	return need, nil
}

// checkWorkSize tells whether a work disk of size can be made from the pinned seed.
func (im *images) checkWorkSize(ctx context.Context, p vm.Pins, size int64) error {
	if p.Seed == "" {
		return nil // a blank disk can have any size that a spec may
	}
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	seed := im.content(p.Seed)
	if !exists(seed) {
		seed = im.sources[p.Seed].path
	}
	return disk.ValidateSize("disk size", seed, size)
}

// filesOf lists the content that a VM is made from, by id, with the directory in which it is kept.
func (im *images) filesOf(ctx context.Context, p vm.Pins) (map[string]string, error) {
	files := map[string]string{p.Base: im.paths.Images()}
	if p.Seed != "" {
		files[p.Seed] = im.paths.Images()
	}
	k, err := im.kernelRecord(ctx, p.Kernel)
	for _, id := range k.Files {
		files[id] = im.paths.Kernels()
	}
	return files, err
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
	files, err := im.filesOf(ctx, p)
	if err != nil {
		return err
	}
	for id, dir := range files {
		if err := im.captureFile(ctx, id, dir); err != nil {
			return err
		}
	}
	return nil
}

// captured says whether all that a VM is made from is captured.
func (im *images) captured(ctx context.Context, p vm.Pins) (bool, error) {
	files, err := im.filesOf(ctx, p)
	for id, dir := range files {
		if !exists(filepath.Join(dir, id)) {
			return false, err
		}
	}
	return true, err
}

func (im *images) captureFile(ctx context.Context, id, dir string) error {
	if exists(filepath.Join(dir, id)) {
		return nil
	}
	src, ok := im.sources[id]
	if !ok {
		return fault.New(fault.Corrupt, filepath.Join(dir, id), "the captured artifact is gone, and nothing on this machine holds its content any more").
			WithHint("put the file back from a backup, or delete the VM and make a new one")
	}
	_, err := disk.Capture(ctx, src.path, dir, id)
	return err
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
	return image.Kernel{}, fault.New(fault.Corrupt, id, "the kernel has no record").
		WithHint("put the state directory back from a backup, or delete the VM and make a new one")
}

func (im *images) kernelVersion(ctx context.Context, id string) (string, error) {
	k, err := im.kernelRecord(ctx, id)
	return k.Version, err
}

// initrd returns the path of the initrd to boot a kernel with: its own modules, today's guest
// program. It is made once per pair, in the cache.
func (im *images) initrd(ctx context.Context, id string) (string, error) {
	agentPath, err := im.agentPath()
	if err != nil {
		return "", err
	}
	agentID, err := im.hash(ctx, agentPath)
	if err != nil {
		return "", fault.Wrap(err, fault.CodeOf(err), agentPath, "the guest program cannot be read").
			WithHint("make build, or see vsock_agent_path in config.toml")
	}
	dir := filepath.Join(im.paths.Cache, "initrd")
	out := filepath.Join(dir, id[:16]+"-"+agentID[:16]+".img")
	if there, err := cachedir.Use(ctx, out); there || err != nil {
		return out, uncached(err, out)
	}
	agent, err := im.agentProgram()
	if err != nil {
		return "", err
	}
	if sum := sha256.Sum256(agent); hex.EncodeToString(sum[:]) != agentID {
		return "", fault.New(fault.Busy, agentPath, "the guest program was replaced just now").WithHint("try again")
	}
	k, err := im.kernelRecord(ctx, id)
	if err != nil {
		return "", err
	}
	if len(k.Files) <= partModules {
		return "", fault.New(fault.Corrupt, id, "the kernel's record is incomplete")
	}
	ownPath := im.kernelPart(k.Files[partInitrd])
	own, err := os.ReadFile(ownPath)
	if err != nil {
		return "", fault.Wrap(err, fault.Corrupt, ownPath, "the captured initrd cannot be read")
	}
	var made []byte
	if k.ForeignInitrd {
		var foreign []byte
		if foreign, err = os.ReadFile(im.kernelPart(k.Files[partForeign])); err == nil {
			made, err = kernel.JoinForeign(foreign, agent, own, ownPath)
		}
	} else {
		made, err = kernel.RegenerateInitrd(own, agent, ownPath)
	}
	if err != nil {
		return "", fault.Wrap(err, fault.Corrupt, ownPath, "no initrd can be made")
	}
	if err := writeCache(out, made); err != nil {
		return "", err
	}
	return out, uncached(cachedir.Keep(ctx, dir, initrdsKept, cacheYoung, nil), dir)
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
	list, err := im.store.Images(ctx)
	if err != nil {
		return err
	}
	files, err := im.unreferenced(ctx, list)
	if err != nil {
		return err
	}
	// Records first: content without one is collected again, a record without its content is a broken VM.
	kernels, err := im.store.Kernels(ctx)
	if err != nil {
		return err
	}
	keep, complete, err := im.referenced(list)
	if err != nil || !complete {
		return err
	}
	for _, k := range kernels {
		if !keep[k.ID] {
			if err := im.store.DeleteKernel(ctx, k.ID); err != nil {
				return err
			}
		}
	}
	for _, path := range files {
		if err := disk.Remove(path); err != nil {
			return err
		}
	}
	return nil
}

// referenced are the ids that images, VMs and holds refer to. It is not complete if there are disks without a record:
// one is kept, and is worth nothing without the base that it was made from, which only the lost record names.
func (im *images) referenced(list []image.Image) (keep map[string]bool, complete bool, err error) {
	keep = map[string]bool{}
	for _, img := range list {
		keep[img.Base], keep[img.Seed], keep[img.Kernel] = true, true, true
	}
	known := map[string]bool{}
	for _, v := range im.store.VMs() {
		known[string(v.ID)] = true
		keep[v.Pins.Base], keep[v.Pins.Seed], keep[v.Pins.Kernel] = true, true, true
	}
	for p := range im.held {
		keep[p.Base], keep[p.Seed], keep[p.Kernel] = true, true, true
	}
	disks, err := names(im.paths.VMs())
	if err != nil {
		return nil, false, err
	}
	for _, id := range disks {
		if !known[id] {
			return keep, false, nil
		}
	}
	return keep, true, nil
}

// unreferenced are the files of captured content that nothing would refer to if list were the images there are.
func (im *images) unreferenced(ctx context.Context, list []image.Image) ([]string, error) {
	keep, complete, err := im.referenced(list)
	if err != nil || !complete {
		return nil, err
	}
	kernels, err := im.store.Kernels(ctx)
	if err != nil {
		return nil, err
	}
	for _, k := range kernels {
		if keep[k.ID] {
			for _, id := range k.Files {
				keep[id] = true
			}
		}
	}
	var files []string
	for _, dir := range []string{im.paths.Images(), im.paths.Kernels()} {
		have, err := names(dir)
		if err != nil {
			return nil, err
		}
		for _, id := range have {
			// Only names of the form that capture makes: what else lies there is not ours to judge.
			if raw, err := hex.DecodeString(id); err == nil && len(raw) == sha256.Size && !keep[id] {
				files = append(files, filepath.Join(dir, id))
			}
		}
	}
	return files, nil
}

// sweep removes half-written captures and unpacked imports of a crash.
func (im *images) sweep(ctx context.Context) error {
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	for _, dir := range []string{im.paths.Images(), im.paths.Kernels(), im.paths.Templates()} {
		if _, err := disk.Sweep(dir); err != nil {
			return err
		}
	}
	left, err := names(im.paths.Images())
	if err != nil {
		return err
	}
	for _, name := range left {
		if strings.HasPrefix(name, importPrefix) {
			if err := os.RemoveAll(filepath.Join(im.paths.Images(), name)); err != nil {
				return fault.Wrap(err, fault.Internal, name, "what is left of an import cannot be removed")
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

// Observe looks whether everything still is captured; what is not is captured again, if the bundle
// still has it.
func (c *imageCapability) Observe(ctx context.Context, v *vm.VM) (bool, error) {
	return c.images.captured(ctx, v.Pins)
}

// Prepare captures what is not captured yet.
func (c *imageCapability) Prepare(ctx context.Context, v *vm.VM) error {
	return c.images.capture(ctx, v.Pins)
}

// Cleanup leaves the content to the next collection: other VMs may use it.
func (c *imageCapability) Cleanup(context.Context, *vm.VM, lifecycle.How) error { return nil }

// Machine names kernel and initrd and attaches base and modules.
func (c *imageCapability) Machine(ctx context.Context, v *vm.VM, spec *vmm.Spec) error {
	initrd, err := c.images.initrd(ctx, v.Pins.Kernel)
	if err != nil {
		return err
	}
	k, err := c.images.kernelRecord(ctx, v.Pins.Kernel)
	if err != nil {
		return err
	}
	spec.Kernel, spec.Initrd = c.images.kernelPart(k.Files[partKernel]), initrd
	if k.ForeignInitrd {
		spec.Cmdline += " rdinit=/" + kernel.ForeignAgentPath
	}
	base := vmm.Drive{Role: vmm.RoleBase, Path: c.images.content(v.Pins.Base), ReadOnly: true}
	if v.Build != nil {
		base.Path, base.ReadOnly = rootDisk(c.images.paths, v.ID), false
	}
	spec.Drives = append(spec.Drives, base,
		vmm.Drive{Role: vmm.RoleModules, Path: c.images.kernelPart(k.Files[partModules]), ReadOnly: true})
	return nil
}

// Check looks at the bundle.
func (c *imageCapability) Check(ctx context.Context) []doctor.Finding {
	b, err := c.images.bundle()
	if err == nil {
		err = c.images.refresh(ctx)
	}
	if err != nil {
		fix := doctor.ShowLog
		if b != nil {
			fix = bundle.Repair(b.Dir())
		}
		f := doctor.FromError("bundle", "Runtime bundle", err, fix)
		// The one fault of a bundle that is mended without building anything: a key that others may read, which ssh refuses.
		if key, keyErr := c.images.identity(); keyErr == nil {
			if st, statErr := os.Stat(key); statErr == nil && st.Mode().Perm()&0o077 != 0 {
				f.Repair = func(context.Context) error { return os.Chmod(key, 0o600) }
			}
		}
		return []doctor.Finding{f}
	}
	return []doctor.Finding{{Code: "bundle", Severity: doctor.Pass, Title: "Runtime bundle", Detail: b.Dir()}}
}
