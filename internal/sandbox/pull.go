package sandbox

import (
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/oci"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// PullImage makes an image of a container image, in an operation: reference is what oci.Puller takes, name that of
// the image, "" for one made of the reference. An image of the name that banger made is replaced, and its VMs keep
// what they have. fault.Invalid, Exists; the operation ends as oci's Pull and Flatten do.
func (s *Service) PullImage(ctx context.Context, reference, name string) (operation.Operation, error) {
	if strings.TrimSpace(reference) == "" {
		return operation.Operation{}, fault.New(fault.Invalid, "image reference", "is empty").WithHint("banger image pull debian:13")
	}
	if name == "" {
		name = nameOfReference(reference)
		if err := image.ValidateName(name); err != nil {
			return operation.Operation{}, fault.Wrap(err, fault.Invalid, reference, "no name for the image can be made of it").
				WithHint("give one: banger image pull %s --name NAME", reference)
		}
	}
	if err := s.nameForPull(ctx, name); err != nil {
		return operation.Operation{}, err
	}
	return s.beginImage(ctx, operation.ImagePull, name, func(ctx context.Context, h *operation.Handle) error {
		return s.pull(ctx, h, reference, name)
	})
}

// nameForPull refuses names that a pulled image may not take.
func (s *Service) nameForPull(ctx context.Context, name string) error {
	if err := image.ValidateName(name); err != nil {
		return err
	}
	if name == defaultImage {
		return fault.New(fault.Invalid, name, "this is the name of the runtime bundle's image").WithHint("choose another one with --name")
	}
	if img, err := s.images.find(ctx, name); err == nil && img.Name == name && !img.Managed {
		return fault.New(fault.Exists, name, "there is an image of this name that was registered from files").
			WithHint("choose another one with --name, or delete it first: banger image delete %s", name)
	}
	return nil
}

// nameOfReference makes a name of a reference: debian-13 of debian:13, app of registry/team/app:latest@sha256:...
func nameOfReference(reference string) string {
	for _, prefix := range []string{"oci:", "docker-archive:"} {
		reference = strings.TrimPrefix(reference, prefix)
	}
	reference, _, _ = strings.Cut(reference, "@")
	base := path.Base(reference)
	repo, tag, _ := strings.Cut(base, ":")
	repo = strings.TrimSuffix(repo, ".tar")
	if tag != "" && tag != "latest" {
		repo += "-" + tag
	}
	return strings.Trim(strings.Map(func(r rune) rune {
		switch {
		case r >= 'A' && r <= 'Z':
			return r + 'a' - 'A'
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '.', r == '_', r == '-':
			return r
		}
		return '-'
	}, repo), "-._")
}

// pull is the body of the operation.
func (s *Service) pull(ctx context.Context, h *operation.Handle, reference, name string) error {
	tool, err := ext4.FindTool(ctx)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.paths.Images(), 0o700); err != nil {
		return fault.Wrap(err, fault.Permission, s.paths.Images(), "cannot be made")
	}
	dir, err := os.MkdirTemp(s.paths.Images(), importPrefix)
	if err != nil {
		return fault.Wrap(err, fault.Permission, s.paths.Images(), "cannot be written to")
	}
	defer os.RemoveAll(dir) // what a crash leaves is swept at the next start
	tell := tellPull(h)
	puller := oci.Puller{Cache: s.layers(), Progress: tell}
	defer s.boundLayers()
	img, err := puller.Pull(ctx, reference)
	if err != nil {
		return err
	}
	defer img.Close()
	if err := img.AddContainer(); err != nil {
		return err
	}
	ssh := true
	if c := img.Container(); c.NoInit {
		if ssh, err = s.addSSHServer(img); err != nil {
			return err
		}
	}
	p := publication{Name: name, Rootfs: filepath.Join(dir, "rootfs.ext4"), Own: true, Managed: true, Source: img.Reference}
	seed := filepath.Join(dir, "seed.ext4")
	made, err := img.Flatten(ctx, tool, p.Rootfs, seed, tell)
	if err != nil {
		return err
	}
	if made.Seed {
		p.Seed = seed
	}
	c := img.Container()
	p.Config = configOf(&c)
	if img.Digest != "" {
		p.Source += "@" + img.Digest
	}
	if _, err := s.publish(ctx, h, p); err != nil {
		return err
	}
	if !ssh {
		h.Notice("the runtime bundle has no SSH server for it, so its VMs are entered by `banger vm exec` alone; to have one: make runtime, then pull again")
	}
	h.Notice(fmt.Sprintf("%s: %d files; %s", img.Reference, made.Files, initNotice(c.NoInit, len(c.Command) > 0)))
	return nil
}

// configOf is what is on record of what a root filesystem says of its programs; nil is nothing.
func configOf(c *boot.Container) *image.Config {
	if c == nil {
		return nil
	}
	return &image.Config{Environment: c.SessionEnvironment(), User: c.User, WorkingDir: c.WorkingDir, Command: c.Command, NoInit: c.NoInit}
}

// layersKept bounds what pulls leave in the cache of layers: what was used lately, as much as a handful of large images has.
const (
	layersKept = 10 * vm.GiB
	layersAge  = 30 * 24 * time.Hour
)

// layers is the cache of layers of pulled images. Installations of one user share it.
func (s *Service) layers() string { return filepath.Join(s.paths.Cache, "oci") }

// boundLayers removes the layers that need not be kept. The last one of several pulls at once does it.
func (s *Service) boundLayers() {
	swept, err := oci.Sweep(s.layers(), oci.Keep{Since: time.Now().Add(-layersAge), Bytes: layersKept}, false)
	if err != nil { // the next pull tries again
		s.log.Warn("layers that were not used lately could not be removed", "err", err)
	} else if swept.Layers > 0 {
		s.log.Info("layers that were not used lately were removed", "layers", swept.Layers, "bytes", swept.Bytes)
	}
}

// addSSHServer puts the bundle's SSH server for guests into an image. It says whether there is one.
func (s *Service) addSSHServer(img *oci.Image) (bool, error) {
	b, err := s.images.bundle()
	if fault.Is(err, fault.NotFound) || err == nil && b.Path(bundle.GuestSSHD) == "" {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	program, err := os.ReadFile(b.Path(bundle.GuestSSHD))
	if err != nil {
		return false, fault.Wrap(err, fault.NotFound, b.Path(bundle.GuestSSHD), "cannot be read").WithHint("%s", bundle.Repair(b.Dir()))
	}
	return true, img.AddSSHServer(program)
}

// initNotice says what will be process 1 of the image's VMs.
func initNotice(noInit, command bool) string {
	switch {
	case !noInit:
		return "it boots with its own init"
	case command:
		return "it has no init, so its VMs run banger's, and the image's command under it"
	}
	return "it has no init and no command, so its VMs run banger's init alone"
}

// tellPull makes an operation's stages and details of a pull's progress.
func tellPull(h *operation.Handle) func(oci.Progress) {
	stage := ""
	var began time.Time
	return func(p oci.Progress) {
		if p.Stage != stage {
			stage, began = p.Stage, time.Now()
			h.Stage(stage)
			return
		}
		if text := pullDetail(p, time.Since(began)); text != "" {
			h.Detail(text)
		}
	}
}

// pullDetail says how far a pull is, and how fast.
func pullDetail(p oci.Progress, took time.Duration) string {
	if p.Total == 0 || took <= 0 {
		return ""
	}
	rate := vm.FormatSize(int64(float64(p.Done-p.Cached)/took.Seconds())) + "/s"
	switch {
	case p.Stage == oci.StageFlatten:
		return fmt.Sprintf("%s of %s, %s", vm.FormatSize(p.Done), vm.FormatSize(p.Total), rate)
	case p.Cached >= p.Total:
		return fmt.Sprintf("%d of %d layers checked, %s were here already", p.LayersDone, p.Layers, vm.FormatSize(p.Cached))
	}
	text := fmt.Sprintf("%d of %d layers, %s of %s, %s", p.LayersDone, p.Layers, vm.FormatSize(p.Done), vm.FormatSize(p.Total), rate)
	if p.Cached > 0 {
		text += fmt.Sprintf(", %s were here already", vm.FormatSize(p.Cached))
	}
	return text
}
