package sandbox

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/klauspost/compress/zstd"

	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/rootfs"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// An exported image is a tar archive, compressed with zstd: archiveManifest first, then the files that it names, in its
// order, each under its content id. So it can be checked while it is read, and is worth nothing if it was changed.
const (
	archiveManifest = "banger-image.json"
	archiveVersion  = 1
	maxManifest     = 1 << 20
	// maxArchived bounds what one file of an archive may unpack to: the largest disk that a VM can have.
	maxArchived = vm.MaxDiskBytes
)

// archive is the manifest of an exported image.
type archive struct {
	Version int           `json:"version"`
	Image   image.Image   `json:"image"`
	Kernel  *image.Kernel `json:"kernel,omitempty"` // nil: it boots with that of the default image
	Files   []archiveFile `json:"files"`
}

type archiveFile struct {
	ID    string `json:"id"`   // SHA-256, and name in the archive
	Size  int64  `json:"size"` // bytes
	image bool   // not of the kernel
}

// ExportImage writes an image into a new file of the user's, in an operation. fault.NotFound, Exists, Invalid.
func (s *Service) ExportImage(ctx context.Context, ref, path string) (operation.Operation, error) {
	if !filepath.IsAbs(path) {
		return operation.Operation{}, fault.New(fault.Invalid, path, "is no absolute path")
	}
	if _, err := os.Lstat(path); err == nil {
		return operation.Operation{}, fault.New(fault.Exists, path, "is there already").WithHint("choose another file, or remove it")
	}
	if err := s.images.refreshed(ctx); err != nil && ref == defaultImage {
		return operation.Operation{}, err
	}
	img, err := s.images.find(ctx, ref)
	if err != nil {
		return operation.Operation{}, err
	}
	return s.beginImage(ctx, operation.ImageExport, img.Name, func(ctx context.Context, h *operation.Handle) error {
		return s.export(ctx, h, img, path)
	})
}

func (s *Service) export(ctx context.Context, h *operation.Handle, img image.Image, path string) (err error) {
	// The default image's kernel goes with it: elsewhere the default image has another one.
	p, release, err := s.images.pins(ctx, img.Name)
	if err != nil {
		return err
	}
	defer release()
	h.Stage("capture")
	if err := s.images.capture(ctx, p); err != nil {
		return err
	}
	a := archive{Version: archiveVersion, Image: img}
	if img.Kernel != "" && img.Name != defaultImage {
		k, err := s.images.kernelRecord(ctx, img.Kernel)
		if err != nil {
			return err
		}
		a.Kernel = &k
	}
	var paths []string
	add := func(id, path string) error {
		fi, err := os.Stat(path)
		if err != nil {
			return fault.Wrap(err, fault.Corrupt, img.Name, "its captured content cannot be read")
		}
		a.Files, paths = append(a.Files, archiveFile{ID: id, Size: fi.Size()}), append(paths, path)
		return nil
	}
	if err := add(img.Base, s.images.content(img.Base)); err != nil {
		return err
	}
	if img.Seed != "" {
		if err := add(img.Seed, s.images.content(img.Seed)); err != nil {
			return err
		}
	}
	if a.Kernel != nil {
		for _, id := range a.Kernel.Files {
			if err := add(id, s.images.kernelPart(id)); err != nil {
				return err
			}
		}
	}
	h.Stage("write")
	out, err := os.CreateTemp(filepath.Dir(path), ".banger-export-*") // 0600
	if err != nil {
		return fault.Wrap(err, fault.Permission, filepath.Dir(path), "cannot be written to").WithHint("check it: ls -ld %s", filepath.Dir(path))
	}
	published := false
	defer func() {
		if !published {
			_ = os.Remove(out.Name()) // the failure that led here is being returned
		}
		_ = out.Close() // synced where it matters
	}()
	if err := a.write(ctx, out, paths, told(h, "")); err != nil {
		return exportFault(err, path)
	}
	if err := out.Sync(); err != nil {
		return exportFault(err, path)
	}
	// A link never replaces what somebody put there meanwhile.
	if err := os.Link(out.Name(), path); errors.Is(err, fs.ErrExist) {
		return fault.Wrap(err, fault.Exists, path, "is there already").WithHint("choose another file, or remove it")
	} else if err != nil {
		if err := os.Rename(out.Name(), path); err != nil { // a filesystem without hard links
			return exportFault(err, path)
		}
		published = true
	}
	return nil
}

func exportFault(err error, path string) error {
	var f *fault.Error
	if errors.As(err, &f) || errors.Is(err, context.Canceled) {
		return err
	}
	if diskIsFull(err) {
		return fault.Wrap(err, fault.Exhausted, path, "the disk is full").WithHint("free space on it (df -h %s), or choose another place", filepath.Dir(path))
	}
	return fault.Wrap(err, fault.Internal, path, "cannot be written")
}

func (a archive) write(ctx context.Context, out io.Writer, paths []string, progress disk.Progress) error {
	// The fastest level: holes are most of it, and vanish at any.
	z, err := zstd.NewWriter(out, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return err
	}
	w := tar.NewWriter(z)
	doc, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return err
	}
	var total, done int64
	for _, f := range a.Files {
		total += f.Size
	}
	put := func(name string, size int64, r io.Reader) error {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: size, Format: tar.FormatPAX, ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
		_, err := io.Copy(w, &counted{ctx: ctx, r: r, tell: func(n int64) { done += n; progress("written", done, total) }})
		return err
	}
	if err := w.WriteHeader(&tar.Header{Name: archiveManifest, Mode: 0o600, Size: int64(len(doc)), Format: tar.FormatPAX, ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	if _, err := w.Write(doc); err != nil {
		return err
	}
	for i, f := range a.Files {
		in, err := os.Open(paths[i])
		if err != nil {
			return err
		}
		err = put(f.ID, f.Size, in)
		if err := errors.Join(err, in.Close()); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), z.Close())
}

// counted is a reader that ends with its context and tells what it read.
type counted struct {
	ctx  context.Context
	r    io.Reader
	tell func(n int64)
}

func (c *counted) Read(b []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	n, err := c.r.Read(b)
	c.tell(int64(n))
	return n, err
}

// ImportImage makes an image of a file that ExportImage wrote, in an operation. name is "" for the one that it was
// exported under. fault.Exists if there is one of the name, fault.Corrupt if the file is damaged, fault.VersionSkew.
func (s *Service) ImportImage(ctx context.Context, path, name string) (operation.Operation, error) {
	if !filepath.IsAbs(path) {
		return operation.Operation{}, fault.New(fault.Invalid, path, "is no absolute path")
	}
	a, err := readManifest(path)
	if err != nil {
		return operation.Operation{}, err
	}
	if name == "" {
		name = a.Image.Name
	}
	if err := s.nameForImport(ctx, name); err != nil {
		return operation.Operation{}, err
	}
	return s.beginImage(ctx, operation.ImageImport, name, func(ctx context.Context, h *operation.Handle) error {
		return s.importFrom(ctx, h, path, name)
	})
}

func (s *Service) nameForImport(ctx context.Context, name string) error {
	if err := image.ValidateName(name); err != nil {
		return err
	}
	if name == defaultImage {
		return fault.New(fault.Invalid, name, "this is the name of the runtime bundle's image").WithHint("choose another one with --name")
	}
	if img, err := s.images.find(ctx, name); err == nil && img.Name == name {
		return fault.New(fault.Exists, name, "there is an image of this name").WithHint("choose another one with --name, or delete it first: banger image delete %s", name)
	}
	return nil
}

// openArchive reads the manifest of an archive and leaves the reader at the first file.
func openArchive(f *os.File) (a archive, r *tar.Reader, done func(), err error) {
	notOne := func(cause error) error {
		return fault.Wrap(cause, fault.Invalid, f.Name(), "is no exported image").WithHint("banger image export writes them")
	}
	// The window is bounded: a hostile header must not make us take memory.
	z, err := zstd.NewReader(f, zstd.WithDecoderMaxWindow(64<<20), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return a, nil, nil, notOne(err)
	}
	r = tar.NewReader(z)
	h, err := r.Next()
	if err != nil || h.Name != archiveManifest || h.Size > maxManifest {
		z.Close()
		return a, nil, nil, notOne(err)
	}
	if err := json.NewDecoder(io.LimitReader(r, maxManifest)).Decode(&a); err != nil {
		z.Close()
		return a, nil, nil, notOne(err)
	}
	if err := a.check(f.Name()); err != nil {
		z.Close()
		return a, nil, nil, err
	}
	return a, r, z.Close, nil
}

func readManifest(path string) (archive, error) {
	f, err := os.Open(path)
	if err != nil {
		return archive{}, fault.Wrap(err, fault.NotFound, path, "cannot be read").WithHint("check it: ls -l %s", path)
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return archive{}, fault.Wrap(err, fault.Invalid, path, "is not a regular file")
	}
	a, _, end, err := openArchive(f)
	if err == nil {
		end()
	}
	return a, err
}

// check refuses a manifest that does not hold together, before anything is unpacked.
func (a *archive) check(subject string) error {
	if a.Version != archiveVersion {
		return fault.New(fault.VersionSkew, subject, "is an exported image of form %d, this bangerd knows %d", a.Version, archiveVersion).WithHint("upgrade banger")
	}
	need := map[string]bool{a.Image.Base: true}
	if a.Image.Seed != "" {
		need[a.Image.Seed] = true
	}
	if a.Kernel != nil {
		if n := len(a.Kernel.Files); n != partModules+1 && n != partForeign+1 || a.Kernel.ForeignInitrd != (n == partForeign+1) || a.Image.Kernel != a.Kernel.ID || a.Kernel.ID != kernelID(a.Kernel.Files) {
			return fault.New(fault.Corrupt, subject, "its manifest does not hold together")
		}
		for _, id := range a.Kernel.Files {
			need[id] = true
		}
	}
	for i, f := range a.Files {
		raw, err := hex.DecodeString(f.ID)
		if err != nil || len(raw) != sha256.Size || f.Size < 0 || f.Size > maxArchived {
			return fault.New(fault.Corrupt, subject, "its manifest does not hold together")
		}
		a.Files[i].image = f.ID == a.Image.Base || f.ID == a.Image.Seed
		delete(need, f.ID)
	}
	if len(need) > 0 {
		return fault.New(fault.Corrupt, subject, "its manifest does not hold together")
	}
	return nil
}

func (s *Service) importFrom(ctx context.Context, h *operation.Handle, path, name string) error {
	in, err := os.Open(path)
	if err != nil {
		return fault.Wrap(err, fault.NotFound, path, "cannot be read")
	}
	defer in.Close()
	a, r, end, err := openArchive(in)
	if err != nil {
		return err
	}
	defer end()
	// How much of what it says are holes is not known, but it holds no less than it takes.
	fi, err := in.Stat()
	if err == nil {
		err = disk.CheckRoom(s.paths.State, fi.Size())
	}
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(s.paths.Images(), importPrefix)
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(s.paths.Images(), 0o700); err == nil {
			dir, err = os.MkdirTemp(s.paths.Images(), importPrefix)
		}
	}
	if err != nil {
		return fault.Wrap(err, fault.Internal, s.paths.Images(), "cannot be written to")
	}
	defer os.RemoveAll(dir) // what a crash leaves is swept at the next start
	h.Stage("unpack")
	progress := told(h, "")
	var total, done int64
	for _, f := range a.Files {
		total += f.Size
	}
	for _, f := range a.Files {
		head, err := r.Next()
		if err != nil || head.Name != f.ID || head.Size != f.Size {
			return damagedArchive(err, path)
		}
		if err := unpackSparse(filepath.Join(dir, f.ID), &counted{ctx: ctx, r: r, tell: func(n int64) { done += n; progress("unpacked", done, total) }}, f, s.paths.State); err != nil {
			if fault.Is(err, fault.Exhausted) || ctx.Err() != nil {
				return err
			}
			return damagedArchive(err, path)
		}
	}
	p := publication{Name: name, Rootfs: filepath.Join(dir, a.Image.Base), Own: true, Managed: true, Source: path, Packages: a.Image.Packages}
	if a.Image.Seed != "" {
		p.Seed = filepath.Join(dir, a.Image.Seed)
	}
	info, err := rootfs.Check(p.Rootfs)
	if err != nil {
		return fault.Wrap(err, fault.CodeOf(err), path, "the image in it could not boot")
	}
	p.Config = configOf(info.Container)
	if p.Seed != "" {
		if err := checkSeed(p.Seed); err != nil {
			return err
		}
	}
	if a.Kernel != nil {
		release, err := s.takeKernel(ctx, *a.Kernel, dir)
		if err != nil {
			return err
		}
		defer release()
		p.Kernel = a.Kernel.ID
	}
	if err := s.nameForImport(ctx, name); err != nil { // it may have been taken meanwhile
		return err
	}
	_, err = s.publish(ctx, h, p)
	return err
}

// importPrefix begins the names of directories that imports unpack into.
const importPrefix = ".import-"

func damagedArchive(cause error, path string) error {
	return fault.Wrap(cause, fault.Corrupt, path, "the exported image is damaged or cut off").WithHint("copy it again; sha256sum tells whether two copies are the same")
}

// takeKernel captures and records a kernel whose files were unpacked into dir, and keeps it until release.
func (s *Service) takeKernel(ctx context.Context, k image.Kernel, dir string) (release func(), err error) {
	im := s.images
	var staged []*disk.Staged
	defer func() {
		for _, st := range staged {
			st.Discard()
		}
	}()
	for _, id := range k.Files {
		st, err := disk.StageOwn(ctx, filepath.Join(dir, id), im.paths.Kernels(), nil)
		if err != nil {
			return nil, err
		}
		staged = append(staged, st)
	}
	unlock, err := im.mu.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	for _, st := range staged {
		if _, err := st.Publish(); err != nil {
			return nil, err
		}
	}
	if err := im.store.PutKernel(ctx, k); err != nil {
		return nil, err
	}
	return im.hold(vm.Pins{Kernel: k.ID}), nil
}

// unpackSparse writes a file of an archive, with holes for zeroes, and checks what it wrote. room is looked at on the way:
// what an archive unpacks to is not known by its size.
func unpackSparse(path string, r io.Reader, want archiveFile, room string) error {
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		_, err := io.Copy(io.Discard, r) // the same content twice, as rootfs and seed
		return err
	}
	if err != nil {
		return err
	}
	sum := sha256.New()
	buf := make([]byte, 1<<20)
	var at, checked int64
	for err == nil {
		var n int
		n, err = io.ReadFull(r, buf)
		if n == 0 {
			break
		}
		sum.Write(buf[:n])
		if at-checked >= 64<<20 {
			checked = at
			if rerr := disk.CheckRoom(room, 0); rerr != nil {
				return errors.Join(rerr, out.Close())
			}
		}
		if werr := writeSparse(out, buf[:n], at); werr != nil {
			if diskIsFull(werr) {
				werr = fault.Wrap(werr, fault.Exhausted, room, "the disk is full").WithHint("free space on it (df -h %s)", room)
			}
			return errors.Join(werr, out.Close())
		}
		at += int64(n)
	}
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.Join(err, out.Close())
	}
	if err := errors.Join(out.Truncate(at), out.Close()); err != nil {
		return err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); at != want.Size || got != want.ID {
		return fmt.Errorf("%s is %d bytes with the SHA-256 %s", want.ID, at, got)
	}
	return nil
}

// writeSparse writes b at an offset of a new file, without its blocks of zeroes.
func writeSparse(out *os.File, b []byte, at int64) error {
	const block = 4096
	for len(b) > 0 {
		n := min(block, len(b))
		if !allZero(b[:n]) {
			if _, err := out.WriteAt(b[:n], at); err != nil {
				return err
			}
		}
		b, at = b[n:], at+int64(n)
	}
	return nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
