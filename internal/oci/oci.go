// Package oci owns how a container image becomes a root filesystem: finding it by its reference, fetching
// and checking its layers, joining them to one tree as overlays would show it, and writing that tree as an
// ext4 image with owners, modes and devices, all as an ordinary user.
//
// It never runs anything of an image, never unpacks a layer into a directory of the host, and knows no VM:
// what becomes of the filesystem is its caller's. Everything it reads was made by strangers: each count and
// size is bounded (Limits), and whatever is not what its digest says is refused.
package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sync/errgroup"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// The platform that VMs are.
const (
	platformOS   = "linux"
	platformArch = "amd64"
)

// parallel is how many layers are fetched and read at once. Registries bound the rate of one connection,
// and reading a layer takes one processor.
const parallel = 4

// Limits bound what an image may make this program do. Zero fields mean those of DefaultLimits.
type Limits struct {
	Layers   int   // layers of one image
	Entries  int64 // members of all its layers together
	Bytes    int64 // of all its layers together, decompressed
	Metadata int64 // bytes of names, link targets and extended attributes, which are held in memory
}

// DefaultLimits are several times what the largest images in use have.
func DefaultLimits() Limits {
	return Limits{Layers: 1000, Entries: 4_000_000, Bytes: 128 << 30, Metadata: 1 << 30}
}

func (l Limits) orDefault() Limits {
	d := DefaultLimits()
	if l.Layers != 0 {
		d.Layers = l.Layers
	}
	if l.Entries != 0 {
		d.Entries = l.Entries
	}
	if l.Bytes != 0 {
		d.Bytes = l.Bytes
	}
	if l.Metadata != 0 {
		d.Metadata = l.Metadata
	}
	return d
}

// Stages of a pull.
const (
	StageResolve = "resolving"  // which image a reference means
	StageFetch   = "fetching"   // layers come, and are checked and read as they are there
	StageFlatten = "flattening" // the filesystem is written
)

// Progress is how far a pull is. Done and Total are bytes: of compressed layers while fetching, of file
// content while flattening. Cached is the part of Done that was here already.
type Progress struct {
	Stage               string
	Done, Total, Cached int64
	Layers, LayersDone  int
}

// Puller pulls images. Its fields are set before its first use; it may then be used concurrently.
type Puller struct {
	// Cache is the directory that keeps layers, compressed as they came, by digest. Several processes may
	// share it.
	Cache string
	// Keychain knows the credentials of registries. nil is Docker's: config.json and its helpers.
	Keychain authn.Keychain
	// Transport carries requests to registries. nil is one with bounded waits.
	Transport http.RoundTripper
	Limits    Limits
	// Progress, if set, is called several times a second, from one goroutine at a time.
	Progress func(Progress)
}

// Image is an image whose layers are here and were found to be what their digests say.
type Image struct {
	Reference string        // as people know it: docker.io/library/alpine:3.22, or the path it was read from
	Digest    string        // of the manifest for this platform, "sha256:..."; "" of an archive of docker save
	Config    v1.ConfigFile // what is to run in it, and how

	layers []*layer
	root   *node
	limits Limits
	report *reporter
	held   *os.File // the lock on the cache; nil without layers in it
}

// Close lets go of the image's layers: from then on they may be swept from the cache. It may be called again.
func (img *Image) Close() {
	if img.held != nil {
		_ = img.held.Close() // nothing was written to it
	}
}

// Pull fetches an image: a reference to a registry (Docker Hub's short names included), oci:DIR[:TAG] for a
// local OCI layout, docker-archive:FILE[:REFERENCE] for what docker save writes, or the absolute path of
// either. When it returns, every layer was read and checked once, and they stay in Cache until the image is closed.
//
// fault.Invalid for a reference that cannot be one; NotFound, Permission, Unavailable as the registry says;
// Unsupported for an image of another platform or kind; Corrupt for what is not what it says it is;
// Exhausted beyond the limits or without room.
func (p *Puller) Pull(ctx context.Context, reference string) (*Image, error) {
	report := newReporter(p.Progress)
	defer report.stop()
	report.stage(StageResolve)
	limits := p.Limits.orDefault()
	found, err := p.resolve(ctx, reference)
	if err != nil {
		return nil, classify(ctx, err, reference)
	}
	if n := len(found.layers); n > limits.Layers {
		return nil, fault.New(fault.Exhausted, found.name, "has %d layers, the most is %d", n, limits.Layers)
	}
	img := &Image{Reference: found.name, Digest: found.digest, Config: found.config, layers: found.layers, limits: limits, report: report}
	if slices.ContainsFunc(img.layers, func(l *layer) bool { return l.blob != nil }) {
		if img.held, err = holdCache(ctx, p.Cache); err != nil {
			return nil, classify(ctx, err, p.Cache)
		}
	}
	err = p.fetch(ctx, img)
	if err == nil {
		err = img.join()
	}
	if err != nil {
		img.Close()
		return nil, classify(ctx, err, found.name)
	}
	return img, nil
}

// fetch brings every layer here and reads it, several at once.
func (p *Puller) fetch(ctx context.Context, img *Image) error {
	img.report.stage(StageFetch)
	img.report.layers.Store(int64(len(img.layers)))
	for _, l := range img.layers {
		img.report.total.Add(l.size)
	}
	budget := newBudget(img.limits)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallel)
	for _, l := range img.layers {
		group.Go(func() error {
			if err := l.bring(ctx, img.report, budget); err != nil {
				return err
			}
			img.report.layersDone.Add(1)
			return nil
		})
	}
	return group.Wait()
}

// budget is what is left of the limits while layers are read in parallel.
type budget struct {
	limits                   Limits
	entries, bytes, metadata atomic.Int64
}

func newBudget(l Limits) *budget { return &budget{limits: l} }

func (b *budget) take(entries, bytes, metadata int64) error {
	for _, t := range []struct {
		have  *atomic.Int64
		n     int64
		limit int64
		what  string
	}{
		{&b.entries, entries, b.limits.Entries, "files"},
		{&b.bytes, bytes, b.limits.Bytes, "bytes when it is unpacked"},
		{&b.metadata, metadata, b.limits.Metadata, "bytes of names and attributes"},
	} {
		if t.have.Add(t.n) > t.limit {
			return fault.New(fault.Exhausted, "", "the image has more than %d %s, which is more than banger unpacks", t.limit, t.what)
		}
	}
	return nil
}

// classify makes a fault of an error of the libraries below, about subject.
func classify(ctx context.Context, err error, subject string) error {
	var f *fault.Error
	if errors.As(err, &f) {
		if f.Subject == "" {
			f.Subject = subject
		}
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var refused *transport.Error
	if errors.As(err, &refused) {
		return classifyStatus(refused, subject)
	}
	var dialled *net.OpError
	var requested *url.Error
	var unknown *net.DNSError
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		full := fault.Wrap(err, fault.Exhausted, subject, "the disk is full").WithHint("free space on it, then pull again: what was fetched is kept")
		if at := (*os.PathError)(nil); errors.As(err, &at) { // layers and images may lie on disks of their own
			full.Hint = fmt.Sprintf("free space on it (df -h %s), then pull again: what was fetched is kept", filepath.Dir(at.Path))
		}
		return full
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fault.Wrap(err, fault.Corrupt, subject, "a layer of the image is cut short")
	case errors.As(err, &unknown):
		return fault.Wrap(err, fault.Unavailable, subject, "the registry's name %q is not known", unknown.Name).WithHint("check the spelling and the network")
	case errors.As(err, &dialled), errors.As(err, &requested):
		return fault.Wrap(err, fault.Unavailable, subject, "the registry cannot be reached").WithHint("check the network, then pull again: what was fetched is kept")
	case errors.Is(err, os.ErrPermission):
		return fault.Wrap(err, fault.Permission, subject, "cannot be read")
	case errors.Is(err, os.ErrNotExist):
		return fault.Wrap(err, fault.NotFound, subject, "does not exist")
	}
	return fault.Wrap(err, fault.Corrupt, subject, "is no image that can be read")
}

// classifyStatus goes by the distribution specification's errors, then by the status.
func classifyStatus(err *transport.Error, subject string) error {
	registry, _, _ := strings.Cut(subject, "/")
	for _, d := range err.Errors {
		switch d.Code {
		case transport.ManifestUnknownErrorCode, transport.NameUnknownErrorCode, transport.BlobUnknownErrorCode:
			return fault.Wrap(err, fault.NotFound, subject, "the registry has no such image").WithHint("check name and tag")
		case transport.TooManyRequestsErrorCode:
			return fault.Wrap(err, fault.Unavailable, subject, "the registry says that there were too many requests").
				WithHint("wait, or log in: docker login %s", registry)
		}
	}
	switch err.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return fault.Wrap(err, fault.Permission, subject, "the registry gives it to nobody without credentials that it accepts, if there is such an image").
			WithHint("check the name, or log in: docker login %s", registry)
	case http.StatusNotFound:
		return fault.Wrap(err, fault.NotFound, subject, "the registry has no such image").WithHint("check name and tag")
	case http.StatusTooManyRequests:
		return fault.Wrap(err, fault.Unavailable, subject, "the registry says that there were too many requests").
			WithHint("wait, or log in: docker login %s", registry)
	}
	return fault.Wrap(err, fault.Unavailable, subject, "the registry does not answer as one").WithHint("try again later: what was fetched is kept")
}

// reportEvery is how often progress is told.
const reportEvery = 250 * time.Millisecond

// reporter tells progress from a goroutine of its own, so that nobody who works waits for who listens.
type reporter struct {
	tell                func(Progress)
	name                atomic.Pointer[string]
	done, total, cached atomic.Int64
	layers, layersDone  atomic.Int64
	quit, stopped       chan struct{}
}

func newReporter(tell func(Progress)) *reporter {
	r := &reporter{tell: tell, quit: make(chan struct{}), stopped: make(chan struct{})}
	go r.run()
	return r
}

func (r *reporter) run() {
	defer close(r.stopped)
	ticker := time.NewTicker(reportEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			r.now()
		case <-r.quit:
			r.now()
			return
		}
	}
}

func (r *reporter) now() {
	name := r.name.Load()
	if r.tell == nil || name == nil {
		return
	}
	r.tell(Progress{Stage: *name, Done: r.done.Load(), Total: r.total.Load(), Cached: r.cached.Load(),
		Layers: int(r.layers.Load()), LayersDone: int(r.layersDone.Load())})
}

// stage begins another stage, whose counts begin at zero.
func (r *reporter) stage(name string) {
	r.done.Store(0)
	r.total.Store(0)
	r.cached.Store(0)
	r.name.Store(&name)
}

// stop tells the last state and ends the reporter.
func (r *reporter) stop() {
	select {
	case <-r.quit:
	default:
		close(r.quit)
	}
	<-r.stopped
}

// bounded ends a read when the context does.
type bounded struct {
	ctx context.Context
	r   io.Reader
}

func (b bounded) Read(p []byte) (int, error) {
	if b.ctx.Err() != nil {
		return 0, context.Cause(b.ctx)
	}
	return b.r.Read(p)
}

func corrupt(format string, args ...any) error {
	return fault.New(fault.Corrupt, "", "%s", fmt.Sprintf(format, args...))
}
