package sandbox

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/kernel"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/oci"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/rootfs"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// ImageDetail is an image with what costs system calls to find out.
type ImageDetail struct {
	Image         image.Image
	KernelVersion string
	VMs           []string // names of those that were made from it, as it is now
	Default       bool
	BaseAllocated int64 // bytes of the host's disk; 0: not captured yet
	SeedAllocated int64
	SeedBytes     int64 // the least that a work disk of its VMs has
	Filesystem    string
}

// find resolves a reference to an image: its name, its id, a unique start of its id. fault.NotFound, Ambiguous.
func (im *images) find(ctx context.Context, ref string) (image.Image, error) {
	list, err := im.store.Images(ctx)
	if err != nil {
		return image.Image{}, err
	}
	var found []image.Image
	var known []string
	for _, img := range list {
		if img.Name == ref || img.ID == ref {
			return img, nil
		}
		if len(ref) >= minPrefix && strings.HasPrefix(img.ID, ref) {
			found = append(found, img)
		}
		known = append(known, img.Name)
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return image.Image{}, fault.New(fault.Ambiguous, ref, "this id prefix matches %s and %s", found[0].Name, found[1].Name).
			WithHint("type the name, or more digits of the id")
	case len(known) == 0:
		return image.Image{}, fault.New(fault.NotFound, ref, "there is no image of this name, nor any other").
			WithHint("make the default one: make runtime")
	}
	return image.Image{}, fault.New(fault.NotFound, ref, "there is no image of this name").
		WithHint("choose one of: %s (banger image list)", strings.Join(known, ", "))
}

// defaultKernel is the kernel that VMs of an image without one of its own boot with.
func (im *images) defaultKernel(ctx context.Context, name string) (string, error) {
	img, err := im.find(ctx, defaultImage)
	if err != nil {
		return "", fault.Wrap(err, fault.NotFound, name, "it has no kernel of its own, and there is no default image, whose kernel it would use").
			WithHint("make the default image: make runtime")
	}
	return img.Kernel, nil
}

// users are the names of the VMs that were made from an image, as it is now, and whether one is being made.
func (im *images) users(img image.Image) (names []string, making bool) {
	for _, v := range im.store.VMs() {
		if v.Pins.ImageID == img.ID {
			names = append(names, v.Name)
		}
	}
	slices.Sort(names)
	for p, n := range im.held {
		making = making || n > 0 && p.ImageID == img.ID
	}
	return names, making
}

// refreshed is refresh for those to whom images that do not come from a bundle are as good.
func (im *images) refreshed(ctx context.Context) error {
	if err := im.refresh(ctx); err != nil && !fault.Is(err, fault.NotFound) {
		return err
	}
	return nil
}

// detail looks at an image's files. Call it with mu held.
func (im *images) detail(ctx context.Context, img image.Image) (ImageDetail, error) {
	d := ImageDetail{Image: img, Default: img.Name == defaultImage}
	d.VMs, _ = im.users(img)
	id := img.Kernel
	if id == "" {
		if byDefault, err := im.find(ctx, defaultImage); err == nil {
			id = byDefault.Kernel
		}
	}
	if k, err := im.kernelRecord(ctx, id); err == nil {
		d.KernelVersion = k.Version
	}
	if info, err := rootfs.Detect(im.content(img.Base)); err == nil {
		d.Filesystem = info.Filesystem
	}
	if img.Seed == "" {
		return d, nil
	}
	path := im.content(img.Seed)
	if !exists(path) {
		path = im.sources[img.Seed].path
	}
	if fi, err := os.Stat(path); err == nil {
		d.SeedBytes = fi.Size()
	}
	return d, nil
}

// Image tells all about an image, by a reference. fault.NotFound, Ambiguous.
func (s *Service) Image(ctx context.Context, ref string) (ImageDetail, error) {
	if err := s.images.refreshed(ctx); err != nil && ref == defaultImage {
		return ImageDetail{}, err
	}
	unlock, err := s.images.mu.lock(ctx)
	if err != nil {
		return ImageDetail{}, err
	}
	defer unlock()
	img, err := s.images.find(ctx, ref)
	if err != nil {
		return ImageDetail{}, err
	}
	d, err := s.images.detail(ctx, img)
	d.BaseAllocated, d.SeedAllocated = s.ImageAllocated(img)
	return d, err
}

// ImageUsers are the names of the VMs of each image, by the image's id.
func (s *Service) ImageUsers() map[string][]string {
	users := map[string][]string{}
	for _, v := range s.store.VMs() {
		users[v.Pins.ImageID] = append(users[v.Pins.ImageID], v.Name)
	}
	return users
}

// ImageAllocated is what the captured root filesystem and work seed of an image take of the host's disk, in bytes; 0 for
// what is not captured yet. Blocks that files share are counted for each.
func (s *Service) ImageAllocated(img image.Image) (base, seed int64) {
	allocated := func(id string) int64 {
		if id == "" {
			return 0
		}
		n, err := disk.Allocated(s.images.content(id))
		if err != nil {
			return 0 // not captured, or taken away just now
		}
		return n
	}
	return allocated(img.Base), allocated(img.Seed)
}

// DeleteImage takes an image away by a reference, and content that was its alone. fault.Precondition if VMs were made
// from it, which it names, or if it is the default one, fault.Busy if one is being made.
func (s *Service) DeleteImage(ctx context.Context, ref string) (image.Image, error) {
	im := s.images
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return image.Image{}, err
	}
	defer unlock()
	img, err := im.find(ctx, ref)
	if err != nil {
		return img, err
	}
	if err := im.deletable(img); err != nil {
		return img, err
	}
	if err := im.store.DeleteImage(ctx, img.Name); err != nil {
		return img, err
	}
	// The image is gone whatever becomes of its content; that is tried again at the next change.
	if err := im.collect(context.WithoutCancel(ctx)); err != nil {
		s.log.Warn("captured artifacts that nothing refers to could not be removed", "err", err)
	}
	return img, nil
}

// deletable refuses what must stay. Call it with mu held.
func (im *images) deletable(img image.Image) error {
	if img.Name == defaultImage {
		return fault.New(fault.Precondition, img.Name, "the default image comes with the runtime bundle, and would be back at once").
			WithHint("to have another one, set default_rootfs in config.toml")
	}
	names, making := im.users(img)
	switch {
	case len(names) > 0:
		return fault.New(fault.Precondition, img.Name, "the image is in use by %s", someNames(names)).
			WithHint("delete what was made from it first: banger vm delete %s", strings.Join(names[:min(len(names), 8)], " "))
	case making:
		return fault.New(fault.Busy, img.Name, "a VM is being made from the image").WithHint("try again in a moment")
	}
	return nil
}

// diskIsFull says whether an error is that of a full disk or quota.
func diskIsFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// someNames lists names for people, not all of a thousand.
func someNames(names []string) string {
	const most = 8
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

// PromoteImage makes a registered image one of banger's own, which a registration does not replace. What it is made of was
// captured when it was registered, so nothing is copied. It says whether it was one already.
func (s *Service) PromoteImage(ctx context.Context, ref string) (img image.Image, already bool, err error) {
	im := s.images
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return img, false, err
	}
	defer unlock()
	if img, err = im.find(ctx, ref); err != nil || img.Managed {
		return img, err == nil, err
	}
	if img.Name == defaultImage {
		return img, false, fault.New(fault.Precondition, img.Name, "the default image follows the runtime bundle, and is not kept when that changes").
			WithHint("keep what it is now under another name: banger image export %s FILE, banger image import FILE --name NAME", img.Name)
	}
	img.Managed, img.Source = true, ""
	return img, false, im.store.PutImage(ctx, img)
}

// RegisterRequest names the files of an image: absolute paths of the user's own.
type RegisterRequest struct {
	Name                                                        string
	Rootfs, WorkSeed, Kernel, Initrd, Modules, PackagesManifest string
}

// RegisterImage takes files in by content, in an operation, and names them. An unmanaged image of the name is
// replaced; VMs that were made from it keep what they have. fault.Invalid with the reason for what could not boot.
func (s *Service) RegisterImage(ctx context.Context, r RegisterRequest) (operation.Operation, error) {
	if err := s.nameForRegistration(ctx, r.Name); err != nil {
		return operation.Operation{}, err
	}
	if r.Rootfs == "" {
		return operation.Operation{}, fault.New(fault.Invalid, r.Name, "no root filesystem is given").WithHint("banger image register --name %s --rootfs FILE", r.Name)
	}
	for _, path := range []string{r.Rootfs, r.WorkSeed, r.Kernel, r.Initrd, r.Modules, r.PackagesManifest} {
		if path == "" {
			continue
		}
		if !filepath.IsAbs(path) {
			return operation.Operation{}, fault.New(fault.Invalid, path, "is no absolute path")
		}
		if _, err := os.Stat(path); err != nil {
			return operation.Operation{}, fault.Wrap(err, fault.NotFound, path, "cannot be read").WithHint("check it: ls -l %s", path)
		}
	}
	if err := s.checkFiles(r); err != nil {
		return operation.Operation{}, err
	}
	return s.beginImage(ctx, operation.ImageRegister, r.Name, func(ctx context.Context, h *operation.Handle) error {
		return s.register(ctx, h, r)
	})
}

// nameForRegistration refuses names that a registration may not take.
func (s *Service) nameForRegistration(ctx context.Context, name string) error {
	if err := image.ValidateName(name); err != nil {
		return err
	}
	if name == defaultImage {
		return fault.New(fault.Invalid, name, "this is the name of the runtime bundle's image").
			WithHint("choose another name; to have another default image, set default_rootfs in config.toml")
	}
	list, err := s.store.Images(ctx)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(list, func(img image.Image) bool { return img.Name == name && img.Managed }) {
		return fault.New(fault.Exists, name, "an image of this name exists that banger made or that was promoted").
			WithHint("choose another name, or delete it first: banger image delete %s", name)
	}
	return nil
}

// checkFiles looks at files before anything is copied. They are looked at again when they are captured.
func (s *Service) checkFiles(r RegisterRequest) error {
	if _, err := rootfs.Check(r.Rootfs); err != nil {
		return err
	}
	if r.WorkSeed != "" {
		if err := checkSeed(r.WorkSeed); err != nil {
			return err
		}
	}
	return checkInitrd(r.Initrd)
}

// checkSeed refuses what work disks cannot be cloned from.
func checkSeed(path string) error {
	sb, err := disk.Inspect(path)
	if fault.Is(err, fault.Corrupt) {
		return fault.Wrap(err, fault.Invalid, path, "is no work seed: that is an ext4 filesystem, whose root becomes /root")
	}
	if err != nil {
		return err
	}
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return fault.Wrap(err, fault.NotFound, path, "cannot be read")
	case !sb.Clean():
		return fault.New(fault.Invalid, path, "was not unmounted in order: it is mounted now, or its journal has to be replayed").WithHint("unmount it, then: e2fsck -f %s", path)
	case fi.Size() < sb.Bytes():
		return fault.New(fault.Corrupt, path, "is cut off: its filesystem is %s, the file %s", vm.FormatSize(sb.Bytes()), vm.FormatSize(fi.Size())).WithHint("copy it again")
	case max(sb.Bytes(), fi.Size()) > vm.MaxDiskBytes:
		return fault.New(fault.Invalid, path, "is larger than a work disk may be")
	}
	return nil
}

// initrdMagics begin the archives that a kernel takes as an initrd (its init/initramfs.c and lib/decompress.c).
var initrdMagics = []string{"070701", "070702", "\x1f\x8b", "\xfd7zXZ", "\x28\xb5\x2f\xfd", "BZh", "\x5d\x00\x00", "\x89LZO", "\x02\x21\x4c\x18"}

// checkInitrd refuses a file that no kernel would take as an initrd; "" is none.
func checkInitrd(path string) error {
	if path == "" {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return fault.Wrap(err, fault.NotFound, path, "cannot be read")
	}
	defer f.Close()
	head := make([]byte, 8)
	n, _ := f.Read(head) // an empty file is no initrd either
	if slices.ContainsFunc(initrdMagics, func(m string) bool { return strings.HasPrefix(string(head[:n]), m) }) {
		return nil
	}
	return fault.New(fault.Invalid, path, "is no initrd: it is neither a cpio archive nor a compressed one")
}

// register is the body of a registration.
func (s *Service) register(ctx context.Context, h *operation.Handle, r RegisterRequest) error {
	p := publication{Name: r.Name, Rootfs: r.Rootfs, Seed: r.WorkSeed, Source: r.Rootfs, Packages: r.PackagesManifest,
		Check: rootfs.Check}
	if r.Kernel != "" || r.Initrd != "" || r.Modules != "" {
		h.Stage("kernel")
		files := bootFiles{r.Kernel, r.Initrd, r.Modules, "--kernel", "--modules", "in the command"}
		k, release, err := s.captureKernel(ctx, h, files)
		if err != nil {
			return err
		}
		defer release()
		p.Kernel = k.ID
	}
	_, err := s.publish(ctx, h, p)
	return err
}

// captureKernel captures and records a kernel made of somebody's own files, and keeps it until release.
func (s *Service) captureKernel(ctx context.Context, h *operation.Handle, files bootFiles) (k image.Kernel, release func(), err error) {
	im := s.images
	b, err := im.bundle()
	if err != nil {
		return k, nil, err
	}
	var staged []*disk.Staged
	defer func() {
		for _, st := range staged {
			st.Discard()
		}
	}()
	take := func(path string, role bundle.Role) (string, error) {
		if path == "" {
			path = b.Path(role)
		}
		st, err := disk.Stage(ctx, path, im.paths.Kernels(), told(h, filepath.Base(path)))
		if err != nil {
			return "", err
		}
		staged = append(staged, st)
		return st.ID, nil
	}
	if k, err = im.kernelSources(ctx, b, files, take); err != nil {
		return k, nil, err
	}
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return k, nil, err
	}
	defer unlock()
	for _, st := range staged {
		if _, err := st.Publish(); err != nil {
			return k, nil, err
		}
	}
	if err := im.store.PutKernel(ctx, k); err != nil {
		return k, nil, err
	}
	return k, im.hold(vm.Pins{Kernel: k.ID}), nil
}

// checkVersion is here so that modules of another kernel are told before a guest has none that load.
func checkVersion(vmlinux []byte, path, modules, version string) error {
	have, err := kernel.Version(vmlinux, path)
	if err != nil || have == version { // a kernel that does not tell is taken at its word
		return nil
	}
	return fault.New(fault.Invalid, modules, "these modules are for kernel %s, and %s is %s", version, path, have).
		WithHint("take the modules of that kernel: /lib/modules/%s", have)
}

// publication is what becomes an image.
type publication struct {
	Name     string
	Rootfs   string // file with the root filesystem
	Seed     string // file with the work seed, "" for none
	Own      bool   // the files are banger's own and nobody writes them any more: they are moved, not copied
	Kernel   string // id of a kernel on record that is held, "" for the default image's
	Managed  bool
	Source   string        // for people: what it was made from
	Packages string        // likewise
	Config   *image.Config // what the root filesystem says of its programs, if it was looked at
	// Check looks at the root filesystem once it is captured; nil: it was made here, and was looked at.
	Check func(path string) (rootfs.Info, error)
}

// publish makes an image of finished files: captured by content, complete or not at all, and named in one transaction.
// What is under the name already is replaced if it is of the same sort (registered, or made by banger): its VMs keep what they have.
// fault.Exists if it is of the other sort. It is the one way by which images come to be, but for the bundle's own.
func (s *Service) publish(ctx context.Context, h *operation.Handle, p publication) (image.Image, error) {
	im := s.images
	img := image.Image{Name: p.Name, Kernel: p.Kernel, Managed: p.Managed, Source: p.Source, Packages: p.Packages, Config: p.Config, CreatedAt: time.Now()}
	if err := image.ValidateName(p.Name); err != nil {
		return img, err
	}
	stage := disk.Stage
	if p.Own {
		stage = disk.StageOwn
	}
	var staged []*disk.Staged
	defer func() {
		for _, st := range staged {
			st.Discard()
		}
	}()
	for _, part := range []struct {
		path, what string
		id         *string
	}{{p.Rootfs, "root filesystem", &img.Base}, {p.Seed, "work seed", &img.Seed}} {
		if part.path == "" {
			continue
		}
		h.Stage(part.what)
		if !p.Own {
			need, err := disk.Allocated(part.path)
			if err == nil {
				err = disk.CheckRoom(s.paths.State, need)
			}
			if err != nil {
				return img, err
			}
		}
		st, err := stage(ctx, part.path, im.paths.Images(), told(h, ""))
		if err != nil {
			return img, err
		}
		staged = append(staged, st)
		*part.id = st.ID
		if part.what == "root filesystem" {
			img.SizeBytes = st.Size
			if p.Check != nil {
				info, err := p.Check(st.Path())
				if err != nil {
					return img, fault.Wrap(err, fault.CodeOf(err), part.path, "what was captured of it is not what was looked at: it changed meanwhile").
						WithHint("wait until whatever writes it is done, then try again")
				}
				img.Config = configOf(info.Container)
			}
		}
	}
	h.Stage("publish")
	sum := sha256.Sum256(fmt.Appendf(nil, "image\n%s\n%s\n%s\n%s\n", img.Name, img.Base, img.Seed, img.Kernel))
	img.ID = hex.EncodeToString(sum[:16])
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return img, err
	}
	defer unlock()
	list, err := im.store.Images(ctx)
	if err != nil {
		return img, err
	}
	for _, old := range list {
		if old.Name == img.Name && old.Managed != img.Managed {
			return img, fault.New(fault.Exists, img.Name, "an image of this name was made meanwhile, or was there and is not to be replaced").
				WithHint("choose another name, or delete it first: banger image delete %s", img.Name)
		}
	}
	for _, st := range staged {
		if _, err := st.Publish(); err != nil {
			return img, err
		}
	}
	// From here on a crash leaves content that nothing refers to, which the next collection takes.
	if err := im.store.PutImage(ctx, img); err != nil {
		return img, errors.Join(err, im.collect(context.WithoutCancel(ctx)))
	}
	if err := im.collect(context.WithoutCancel(ctx)); err != nil { // of the image that was replaced
		s.log.Warn("captured artifacts that nothing refers to could not be removed", "err", err)
	}
	return img, nil
}

// told tells an operation's watchers how far work on bytes is, and how fast it goes, a few times a second.
func told(h *operation.Handle, subject string) disk.Progress {
	const every = 250 * time.Millisecond
	var phase string
	var began, said time.Time
	return func(what string, done, total int64) {
		now := time.Now()
		if what != phase {
			phase, began, said = what, now, now
			return
		}
		if now.Sub(said) < every || total <= 0 {
			return
		}
		said = now
		rate := int64(float64(done) / now.Sub(began).Seconds())
		text := fmt.Sprintf("%s of %s %s, %s/s", vm.FormatSize(done), vm.FormatSize(total), what, vm.FormatSize(rate))
		if subject != "" {
			text = subject + ": " + text
		}
		h.Detail(text)
	}
}

// beginImage records an operation about an image that has no VM, and runs fn in it. One that a daemon's end interrupts
// is ended by the next daemon: nothing is half made.
func (s *Service) beginImage(ctx context.Context, kind operation.Kind, name string, fn func(context.Context, *operation.Handle) error) (operation.Operation, error) {
	op := operation.Operation{ID: operation.NewID(), Kind: kind, Image: name, State: operation.Running, CreatedAt: time.Now()}
	if err := s.store.SaveOperation(ctx, op); err != nil {
		return op, err
	}
	s.ops.Go(op, lifecycle.ErrSuspended, func(ctx context.Context, h *operation.Handle) error {
		log := s.log.With("op", op.ID, "kind", op.Kind, "image", op.Image)
		log.Info("operation begins")
		err := fn(ctx, h)
		if err != nil && suspended(ctx) {
			return lifecycle.ErrSuspended
		}
		if err != nil {
			log.Warn("operation ends with an error", "code", fault.CodeOf(err), "err", err)
			return err
		}
		log.Info("operation ends")
		return nil
	})
	return op, nil
}

// PruneRequest says what to remove beyond content that nothing refers to.
type PruneRequest struct {
	Unused bool // images that no VM was made from, except the default one
	DryRun bool
}

// Pruned is what was removed, or would be.
type Pruned struct {
	Images []image.Image
	Files  int
	Bytes  int64     // of the host's disk
	Layers oci.Swept // of pulled images, in the cache
}

// PruneImages removes captured content that nothing refers to, the layers of pulled images in the cache, and, if asked to, images
// that no VM was made from.
func (s *Service) PruneImages(ctx context.Context, r PruneRequest) (Pruned, error) {
	im := s.images
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return Pruned{}, err
	}
	defer unlock()
	var p Pruned
	list, err := im.store.Images(ctx)
	if err != nil {
		return p, err
	}
	var kept []image.Image
	for _, img := range list {
		if r.Unused && im.deletable(img) == nil {
			p.Images = append(p.Images, img)
		} else {
			kept = append(kept, img)
		}
	}
	files, err := im.unreferenced(ctx, kept)
	if err != nil {
		return p, err
	}
	for _, path := range files {
		n, err := disk.Allocated(path)
		if fault.Is(err, fault.NotFound) {
			continue
		}
		if err != nil {
			return p, err
		}
		p.Files++
		p.Bytes += n
	}
	if p.Layers, err = oci.Sweep(s.layers(), oci.Keep{}, r.DryRun); err != nil || r.DryRun {
		return p, err
	}
	for _, img := range p.Images {
		if err := im.store.DeleteImage(ctx, img.Name); err != nil {
			return p, err
		}
	}
	return p, im.collect(ctx)
}
