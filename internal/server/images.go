package server

import (
	"context"

	"connectrpc.com/connect"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
)

// imageHandler serves the images.
type imageHandler struct {
	vms    Machines
	svc    Images
	ending <-chan struct{}
}

func imageMessage(im image.Image) *bangerv1.Image {
	return &bangerv1.Image{
		Id: im.ID, Name: im.Name, SizeBytes: im.SizeBytes, Managed: im.Managed,
		HasWorkSeed: im.Seed != "", Source: im.Source, Packages: im.Packages, OwnKernel: im.Kernel != "",
		Base: im.Base, WorkSeed: im.Seed, CreatedAt: stamp(im.CreatedAt),
	}
}

func imageMessages(list []image.Image, byDefault string) []*bangerv1.Image {
	out := make([]*bangerv1.Image, len(list))
	for i, im := range list {
		out[i] = imageMessage(im)
		out[i].IsDefault = im.Name == byDefault
	}
	return out
}

func imageDetailMessage(d sandbox.ImageDetail) *bangerv1.Image {
	m := imageMessage(d.Image)
	m.Kernel, m.IsDefault, m.Vms = d.KernelVersion, d.Default, d.VMs
	m.BaseAllocatedBytes, m.WorkSeedAllocatedBytes, m.WorkSeedBytes, m.Filesystem = d.BaseAllocated, d.SeedAllocated, d.SeedBytes, d.Filesystem
	if c := d.Image.Config; c != nil {
		m.Config = &bangerv1.ImageConfig{NoInit: c.NoInit, Command: c.Command, Environment: c.Environment, User: c.User, WorkingDir: c.WorkingDir}
	}
	return m
}

func (h *imageHandler) ListImages(ctx context.Context, _ *bangerv1.ListImagesRequest) (*bangerv1.ListImagesResponse, error) {
	list, byDefault, err := h.vms.Images(ctx)
	if err != nil {
		return nil, err
	}
	messages := imageMessages(list, byDefault)
	users := h.svc.ImageUsers()
	kernel := "" // of the default image, with which those boot that have none of their own
	for _, im := range list {
		if im.Name == byDefault {
			kernel = im.Kernel
		}
	}
	for i := range list {
		id := list[i].Kernel
		if id == "" {
			id = kernel
		}
		messages[i].Kernel, messages[i].Vms = h.vms.KernelVersion(ctx, id), users[list[i].ID]
		messages[i].BaseAllocatedBytes, messages[i].WorkSeedAllocatedBytes = h.svc.ImageAllocated(list[i])
	}
	return &bangerv1.ListImagesResponse{Images: messages}, nil
}

func (h *imageHandler) GetImage(ctx context.Context, r *bangerv1.GetImageRequest) (*bangerv1.GetImageResponse, error) {
	d, err := h.svc.Image(ctx, r.GetRef())
	if err != nil {
		return nil, err
	}
	return &bangerv1.GetImageResponse{Image: imageDetailMessage(d)}, nil
}

func (h *imageHandler) RegisterImage(ctx context.Context, r *bangerv1.RegisterImageRequest) (*bangerv1.RegisterImageResponse, error) {
	op, err := h.svc.RegisterImage(ctx, sandbox.RegisterRequest{
		Name: r.GetName(), Rootfs: r.GetRootfs(), WorkSeed: r.GetWorkSeed(),
		Kernel: r.GetKernel(), Initrd: r.GetInitrd(), Modules: r.GetModules(), PackagesManifest: r.GetPackages(),
	})
	if err != nil {
		return nil, err
	}
	return &bangerv1.RegisterImageResponse{Operation: operationMessage(op)}, nil
}

func (h *imageHandler) DeleteImage(ctx context.Context, r *bangerv1.DeleteImageRequest) (*bangerv1.DeleteImageResponse, error) {
	im, err := h.svc.DeleteImage(ctx, r.GetRef())
	if err != nil {
		return nil, err
	}
	return &bangerv1.DeleteImageResponse{Image: imageMessage(im)}, nil
}

func (h *imageHandler) PromoteImage(ctx context.Context, r *bangerv1.PromoteImageRequest) (*bangerv1.PromoteImageResponse, error) {
	im, already, err := h.svc.PromoteImage(ctx, r.GetRef())
	if err != nil {
		return nil, err
	}
	return &bangerv1.PromoteImageResponse{Image: imageMessage(im), Already: already}, nil
}

func (h *imageHandler) ExportImage(ctx context.Context, r *bangerv1.ExportImageRequest) (*bangerv1.ExportImageResponse, error) {
	op, err := h.svc.ExportImage(ctx, r.GetRef(), r.GetPath())
	if err != nil {
		return nil, err
	}
	return &bangerv1.ExportImageResponse{Operation: operationMessage(op)}, nil
}

func (h *imageHandler) ImportImage(ctx context.Context, r *bangerv1.ImportImageRequest) (*bangerv1.ImportImageResponse, error) {
	op, err := h.svc.ImportImage(ctx, r.GetPath(), r.GetName())
	if err != nil {
		return nil, err
	}
	return &bangerv1.ImportImageResponse{Operation: operationMessage(op)}, nil
}

func (h *imageHandler) PruneImages(ctx context.Context, r *bangerv1.PruneImagesRequest) (*bangerv1.PruneImagesResponse, error) {
	p, err := h.svc.PruneImages(ctx, sandbox.PruneRequest{Unused: r.GetUnused(), DryRun: r.GetDryRun()})
	if err != nil {
		return nil, err
	}
	m := &bangerv1.PruneImagesResponse{Files: int32(p.Files), Bytes: p.Bytes,
		Layers: int32(p.Layers.Layers), LayerBytes: p.Layers.Bytes, LayersBusy: p.Layers.Busy}
	for _, im := range p.Images {
		m.Images = append(m.Images, imageMessage(im))
	}
	return m, nil
}

func (h *imageHandler) PullImage(ctx context.Context, r *bangerv1.PullImageRequest) (*bangerv1.PullImageResponse, error) {
	op, err := h.svc.PullImage(ctx, r.GetReference(), r.GetName())
	if err != nil {
		return nil, err
	}
	return &bangerv1.PullImageResponse{Operation: operationMessage(op)}, nil
}

func (h *imageHandler) BuildImage(ctx context.Context, r *bangerv1.BuildImageRequest) (*bangerv1.BuildImageResponse, error) {
	request := sandbox.BuildRequest{
		Name: r.GetName(), From: r.GetFrom(), Docker: r.GetDocker(), Packages: r.GetPackages(), Size: r.GetSizeBytes(), KeepOnFailure: r.GetKeepOnFailure(),
	}
	for _, step := range r.GetSteps() {
		request.Steps = append(request.Steps, sandbox.BuildStep{Name: step.GetName(), Packages: step.GetPackages(), Script: step.GetScript()})
	}
	op, log, err := h.svc.BuildImage(ctx, request)
	if err != nil {
		return nil, err
	}
	return &bangerv1.BuildImageResponse{Operation: operationMessage(op), Log: log}, nil
}

func (h *imageHandler) ReadBuildLog(ctx context.Context, r *bangerv1.ReadBuildLogRequest, stream *connect.ServerStream[bangerv1.ReadBuildLogResponse]) error {
	return streamed(ctx, h.ending, func(ctx context.Context) error {
		return h.svc.BuildLog(ctx, r.GetOperationId(), func(b []byte) error {
			return stream.Send(&bangerv1.ReadBuildLogResponse{Data: b})
		})
	})
}
