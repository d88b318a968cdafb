package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/exec"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/imagebuild"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/rootfs"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// BuildRequest is what an image is to be built of. Zero values mean the default.
type BuildRequest struct {
	Name     string
	From     string // image to begin with: the default one, or default_base_rootfs
	Docker   bool
	Packages []string // nil: the default list
	Steps    []BuildStep
	Size     int64 // of the root filesystem, bytes
	// KeepOnFailure leaves the VM in which a build failed, for the user to look.
	KeepOnFailure bool
}

// BuildStep is one of the user's own, after what every image gets: packages or a script of sh.
type BuildStep struct {
	Name     string
	Packages []string
	Script   string
}

const (
	// buildSpare is what a root filesystem gets beyond its base's size if no size is asked for. It is sparse.
	buildSpare = 4 * vm.GiB
	// buildSeed is the size of a new work seed, and so the least that a work disk of the image's VMs has. It is no larger than
	// the work disk that VMs get by default.
	buildSeed = 1 * vm.GiB
	// buildTime bounds one step of a build.
	buildTime = 2 * time.Hour
	// undoTime bounds taking a builder away.
	undoTime = 2 * time.Minute
	// maxSteps and maxScript bound what is asked for.
	maxSteps  = 100
	maxScript = 256 << 10
)

// BuildImage builds an image in a VM of its own, in an operation whose output BuildLog sends. The image appears complete or
// not at all; a failure or a cancellation leaves nothing but the log, unless the VM is to be kept. A managed image of the name
// is replaced, its VMs keep what they have. fault.Invalid, NotFound, Exists, Exhausted: nothing was begun.
func (s *Service) BuildImage(ctx context.Context, r BuildRequest) (op operation.Operation, log string, err error) {
	if len(r.Packages) == 0 {
		if r.Packages, err = s.defaultPackages(); err != nil {
			return op, "", err
		}
	}
	if err := s.checkBuild(ctx, r); err != nil {
		return op, "", err
	}
	v, release, err := s.builder(ctx, r)
	if err != nil {
		return op, "", err
	}
	// The base is pinned by the builder's record from here on.
	defer release()
	op = newOperation(operation.ImageBuild, v)
	op.Image = r.Name
	out, err := s.builds.open(s.paths.BuildLogs(), r.Name, op)
	if err != nil {
		return op, "", err
	}
	if _, err = s.store.AdmitVM(ctx, v, op); err != nil {
		return op, "", errors.Join(err, s.builds.end(op.ID))
	}
	s.run(op, func(ctx context.Context, h *operation.Handle, v *vm.VM) error {
		err := s.build(ctx, h, v, r, out)
		if err != nil {
			out.say("the build failed: %v", err)
			if hint := fault.HintOf(err); hint != "" {
				out.say("  %s", hint)
			}
		} else {
			out.say("%s is built", r.Name)
		}
		if closeErr := s.builds.end(op.ID); closeErr != nil {
			s.log.Warn("the log of an image build could not be closed", "op", op.ID, "err", closeErr)
		}
		return err
	})
	return op, out.path, nil
}

// defaultPackages are those of the list that the settings name, or of the runtime bundle's.
func (s *Service) defaultPackages() ([]string, error) {
	path := s.cfg.DefaultPackagesFile
	if path == "" {
		b, err := s.images.bundle()
		if err != nil {
			return nil, err
		}
		path = b.Path(bundle.Packages)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fault.Wrap(err, fault.NotFound, path, "the list of packages cannot be read").WithHint("see default_packages_file in config.toml, or use --packages")
	}
	return imagebuild.ParsePackages(string(text)), nil
}

func (s *Service) checkBuild(ctx context.Context, r BuildRequest) error {
	if err := image.ValidateName(r.Name); err != nil {
		return err
	}
	if r.Name == defaultImage {
		return fault.New(fault.Invalid, r.Name, "this is the name of the runtime bundle's image").WithHint("choose another name")
	}
	list, err := s.store.Images(ctx)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(list, func(img image.Image) bool { return img.Name == r.Name && !img.Managed }) {
		return fault.New(fault.Exists, r.Name, "an image of this name was registered").
			WithHint("choose another name, or delete it first: banger image delete %s", r.Name)
	}
	if len(r.Steps) > maxSteps {
		return fault.New(fault.Invalid, r.Name, "%d steps are too many, %d are allowed", len(r.Steps), maxSteps)
	}
	if err := imagebuild.ValidatePackages(r.Packages); err != nil {
		return err
	}
	for _, step := range r.Steps {
		if err := imagebuild.ValidatePackages(step.Packages); err != nil {
			return err
		}
		if (len(step.Packages) == 0) == (step.Script == "") {
			return fault.New(fault.Invalid, step.Name, "a step has either packages or a script")
		}
		if len(step.Script) > maxScript || strings.ContainsRune(step.Script, 0) {
			return fault.New(fault.Invalid, step.Name, "the script of this step is no text of at most %s", vm.FormatSize(maxScript))
		}
	}
	if err := s.driver.Check(ctx); err != nil {
		return err
	}
	return nil
}

// builder is the VM that an image is built in, checked and not on record yet.
func (s *Service) builder(ctx context.Context, r BuildRequest) (v vm.VM, release func(), err error) {
	pins, free, err := s.images.buildBase(ctx, r.From)
	if err != nil {
		return v, nil, err
	}
	defer func() {
		if err != nil {
			free()
		}
	}()
	base, err := s.images.place(ctx, pins.Base)
	if err != nil {
		return v, nil, err
	}
	info, err := rootfs.Detect(base)
	if err != nil {
		return v, nil, err
	}
	if info.Filesystem != rootfs.Ext4 {
		return v, nil, fault.New(fault.Invalid, pins.Image, "it is %s, which cannot be written to: images are built on ext4", info.Filesystem).WithHint("choose another image with --from")
	}
	size := r.Size
	if size == 0 {
		super, err := disk.Inspect(base)
		if err != nil {
			return v, nil, err
		}
		size = max(info.Bytes, min(info.Bytes+buildSpare, super.GrowLimit))
	}
	if err := disk.ValidateSize("the root filesystem's size", base, size); err != nil {
		return v, nil, err
	}
	spec := vm.Spec{VCPU: s.cfg.DefaultVCPU, MemoryMiB: s.cfg.DefaultMemoryMiB, DiskSize: min(buildSeed, s.cfg.DefaultDiskSize), SystemSize: vm.MinDiskBytes, NAT: true}
	if pins.Seed != "" {
		seed, err := s.images.place(ctx, pins.Seed)
		if err != nil {
			return v, nil, err
		}
		super, err := disk.Inspect(seed)
		if err != nil {
			return v, nil, err
		}
		spec.DiskSize = max(super.Bytes(), min(spec.DiskSize, super.GrowLimit))
	}
	if err := spec.Validate(s.host); err != nil {
		return v, nil, err
	}
	need, err := s.images.captureNeed(ctx, pins)
	if err != nil {
		return v, nil, err
	}
	own, err := disk.Allocated(base) // the private clone, where blocks are not shared
	if err != nil {
		return v, nil, err
	}
	if err := disk.CheckRoom(s.paths.State, need+own); err != nil {
		return v, nil, err
	}
	v = vm.VM{ID: vm.NewID(), State: vm.Defined, Desired: vm.WantRunning, CreatedAt: time.Now(), Spec: spec, Pins: pins, Build: &vm.Build{Image: r.Name, RootSize: size}}
	v.Name = "build-" + v.ID.Short()[:8]
	v.Secrets, err = newSecrets()
	return v, free, err
}

// buildBase resolves what an image is to be built on. The content is kept until release.
func (im *images) buildBase(ctx context.Context, ref string) (p vm.Pins, release func(), err error) {
	path := im.cfg.DefaultBaseRootfs
	if path == "" { // a base of the bundle's own
		if b, err := im.bundle(); err == nil {
			path = b.Path(bundle.BaseRootFS)
		}
	}
	if ref != "" || path == "" {
		return im.pins(ctx, ref)
	}
	if _, err := rootfs.Check(path); err != nil {
		return p, nil, fault.Wrap(err, fault.CodeOf(err), "default_base_rootfs", "images cannot be built on this file, which the settings or the runtime bundle name").
			WithHint("set default_base_rootfs in config.toml to another one, or use --from")
	}
	byDefault, free, err := im.pins(ctx, defaultImage) // whose kernel it boots with
	if err != nil {
		return p, nil, err
	}
	defer free()
	st, err := disk.Stage(ctx, path, im.paths.Images(), nil)
	if err != nil {
		return p, nil, err
	}
	defer st.Discard()
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return p, nil, err
	}
	defer unlock()
	c, err := st.Publish()
	if err != nil {
		return p, nil, err
	}
	p = vm.Pins{Image: filepath.Base(path), Base: c.ID, Kernel: byDefault.Kernel}
	return p, im.hold(p), nil
}

// place is where content lies: captured, or where it would be captured from.
func (im *images) place(ctx context.Context, id string) (string, error) {
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	if path := im.content(id); exists(path) {
		return path, nil
	}
	if src, ok := im.sources[id]; ok {
		return src.path, nil
	}
	return "", fault.New(fault.Corrupt, im.content(id), "the captured artifact is gone, and nothing on this machine holds its content any more").
		WithHint("put the file back from a backup, or take another image with --from")
}

// build is the body of a build.
func (s *Service) build(ctx context.Context, h *operation.Handle, v *vm.VM, r BuildRequest, out *buildLog) (err error) {
	began := time.Now()
	defer func() {
		if err != nil {
			err = s.endBuild(ctx, h, v, r, err)
		}
	}()
	if s.notice != "" {
		h.Notice(s.notice)
	}
	if len(s.networks) == 0 {
		h.Notice("VMs have no network here: packages that the base lacks cannot be installed")
	}
	h.Stage("fetch")
	tools, err := imagebuild.Fetcher{Cache: filepath.Join(s.paths.Cache, "downloads")}.Fetch(ctx, s.sources(), func(line string) {
		out.say("%s", line)
		h.Detail(line)
	})
	if err != nil {
		return err
	}
	out.say("building %s on %s, in the VM %s", r.Name, v.Pins.Image, v.Name)
	if err := s.engine.Up(ctx, v, h.Stage); err != nil {
		return explainBuild(err, "the VM to build in could not be started")
	}
	steps := imagebuild.Recipe{Packages: r.Packages, Docker: r.Docker, Custom: customSteps(r.Steps)}.Steps(tools)
	for _, step := range steps {
		h.Stage(step.Name)
		out.say("== %s", step.Name)
		if err := s.provision(ctx, h, v, step, out); err != nil {
			return err
		}
	}
	h.Stage("trim")
	trim, cancel := context.WithTimeout(ctx, trimTime)
	err = s.machines.trim(trim, v)
	cancel()
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil { // it takes more room, and is as good
		out.say("what is free in it could not be given back to the host: %v", err)
	}
	// Cancelled or not, a guest that was told to power off does; what comes then is quick, or looks at ctx.
	if err := s.takeDown(ctx, h, v, lifecycle.Orderly); err != nil {
		return err
	}
	if v.Note != "" {
		return fault.New(fault.Internal, r.Name, "the VM that it was built in did not shut down in order (%s), and its disks are not whole", v.Note).
			WithHint("see the log, and try again")
	}
	for _, path := range []string{rootDisk(s.paths, v.ID), s.workDisk(v.ID)} {
		if st, err := disk.FilesystemState(path); err != nil || st != disk.Clean {
			return fault.Wrap(err, fault.Internal, r.Name, "%s was not left in order by the VM that it was built in (%s)", filepath.Base(path), st).
				WithHint("see the log, and try again")
		}
	}
	p := publication{Name: r.Name, Rootfs: rootDisk(s.paths, v.ID), Seed: s.workDisk(v.ID), Own: true, Managed: true,
		Source: "built on " + v.Pins.Image + s.with(r), Kernel: s.ownKernelOf(ctx, v.Pins)}
	info, err := rootfs.Check(p.Rootfs)
	if err != nil {
		return fault.Wrap(err, fault.CodeOf(err), r.Name, "what was built could not boot")
	}
	p.Config = configOf(info.Container)
	if _, err := s.publish(ctx, h, p); err != nil {
		return err
	}
	out.say("built in %s", time.Since(began).Round(time.Second))
	// The image is there whatever becomes of the builder, which the next daemon would take away.
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	if err := s.remove(undo, h, v); err != nil {
		s.log.Error("the VM that an image was built in could not be removed", "vm", v.ID, "err", err)
		h.Notice(fmt.Sprintf("the VM %s that it was built in could not be removed: banger vm delete %s", v.Name, v.Name))
	}
	return nil
}

// ownKernelOf is the kernel that an image built on another one is bound to: that one's own, "" if it has none.
func (s *Service) ownKernelOf(ctx context.Context, p vm.Pins) string {
	if p.Image == defaultImage || p.ImageID == "" {
		return ""
	}
	if img, err := s.images.find(ctx, p.Image); err == nil && img.Kernel == "" {
		return ""
	}
	return p.Kernel
}

// with says for people what a build adds.
func (s *Service) with(r BuildRequest) string {
	if r.Docker {
		return ", with Docker"
	}
	return ""
}

// sources are the settings', or the pinned ones.
func (s *Service) sources() imagebuild.Sources {
	or := func(set, pinned string) string {
		if set != "" {
			return set
		}
		return pinned
	}
	c := s.cfg
	return imagebuild.Sources{
		Mise:          or(c.MiseSource, imagebuild.DefaultMise),
		Opencode:      or(c.OpencodeSource, imagebuild.DefaultOpencode),
		TmuxResurrect: or(c.TmuxResurrectSource, imagebuild.DefaultTmuxResurrect),
		TmuxContinuum: or(c.TmuxContinuumSource, imagebuild.DefaultTmuxContinuum),
	}
}

func customSteps(steps []BuildStep) []imagebuild.Step {
	var out []imagebuild.Step
	for _, step := range steps {
		if step.Script == "" {
			out = append(out, imagebuild.PackageStep(step.Name, step.Packages))
			continue
		}
		out = append(out, imagebuild.Step{Name: step.Name, Script: step.Script})
	}
	return out
}

func explainBuild(err error, what string) error {
	return fault.Wrap(err, fault.CodeOf(err), "", "%s", what)
}

// endBuild takes a builder away after its build failed, or keeps it if the user wants to look, and returns the
// error to tell.
func (s *Service) endBuild(ctx context.Context, h *operation.Handle, v *vm.VM, r BuildRequest, err error) error {
	if suspended(ctx) {
		return err // the next daemon takes it away
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	if r.KeepOnFailure && ctx.Err() == nil && v.State != vm.Stopping && s.machines.get(v.ID) != nil {
		v.Build.Kept = true
		if saveErr := s.store.Save(undo, *v); saveErr != nil {
			return errors.Join(err, saveErr)
		}
		h.Notice(fmt.Sprintf("the VM is kept: look with `banger vm exec %s -- bash`, then `banger vm delete %s`", v.Name, v.Name))
		return err
	}
	h.Stage("undo")
	return errors.Join(err, s.remove(undo, h, v))
}

// provision runs one step in the guest, as root, with its output in the log.
func (s *Service) provision(ctx context.Context, h *operation.Handle, v *vm.VM, step imagebuild.Step, out *buildLog) error {
	ctx, cancel := context.WithTimeoutCause(ctx, buildTime, fault.New(fault.Timeout, step.Name, "this step of the build did not end within %s", buildTime))
	defer cancel()
	lost := func(err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fault.Wrap(err, fault.Unavailable, step.Name, "the VM was lost in this step of the build").WithHint("see what it said: %s", out.path)
	}
	m := s.machines.get(v.ID)
	if m == nil {
		return lost(nil)
	}
	alive, stop := m.whileAlive(ctx)
	defer stop()
	conn, err := s.DialAgent(alive, v.ID, wire.KindExec)
	if err != nil {
		return lost(err)
	}
	lines := out.lines(h.Detail)
	request := exec.Request{Args: []string{"/bin/sh", "-c", step.Script}, Env: []string{"HOME=/root", "LC_ALL=C.UTF-8"}, Dir: "/root"}
	streams := exec.Streams{Stdout: lines, Stderr: lines}
	var fed chan error
	if step.Input != nil {
		r, w := io.Pipe()
		fed = make(chan error, 1)
		go func() {
			err := step.Input(ctx, w)
			_ = w.CloseWithError(err) // returns nil
			fed <- err
		}()
		defer r.Close() // ends the writer if the command is gone
		streams.Stdin = r
	}
	status, err := exec.Run(ctx, conn, request, streams)
	lines.rest()
	if fed != nil {
		if r, ok := streams.Stdin.(io.Closer); ok {
			_ = r.Close()
		}
		// What kept the input from coming explains the command's end.
		if inputErr := <-fed; inputErr != nil && !errors.Is(inputErr, io.ErrClosedPipe) {
			return inputErr
		}
	}
	switch {
	case err != nil:
		return lost(err)
	case status.Failed != "":
		return fault.New(fault.Failed, step.Name, "this step of the build could not be run: %s", guestText(status.Failed))
	case status.Exit() != 0:
		text := fmt.Sprintf("this step of the build ended with exit code %d", status.Exit())
		if last := lines.last(); last != "" {
			text += ": " + last
		}
		return fault.New(fault.Failed, step.Name, "%s", text).WithHint("see all that it said: %s", out.path)
	}
	return nil
}
