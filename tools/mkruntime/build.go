package main

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/kernel"
)

// Names of files in the cache's entries.
const (
	fileVmlinux = "vmlinux"
	fileModules = "modules.ext4"
	fileInitrd  = "initrd-base.img" // with an empty guest program
	fileVersion = "kernel-version"
	fileImage   = "rootfs.ext4"
	fileSeed    = "work-seed.ext4"
	dirTools    = "tools"
)

// cacheNeed is the space a build takes in the cache for a moment: two images and their tar, in bytes.
const cacheNeed = 5 << 30

// seedBlocks is the size of the work seed, 256 MiB: enough for its journal; sparse, and enlarged with
// every disk that is cloned from it.
const seedBlocks = 256 << 20 / ext4.BlockSize

// kernelKey and imageKey name what the artifacts are made of. An image's key has all of packages.apt
// that counts: names, not comments; and what its tools are, whether they could be reached or not.
func kernelKey() string {
	return contentKey("kernel", recipeVersion, suite, runtime.GOARCH, kernelPackages, kernel.InitrdModules(), kernel.RootModules(), ext4.MkfsArgs(ext4.ReadOnly))
}

func imageKey(packages []string, tools string) (string, error) {
	repl, err := replacements()
	if err != nil {
		return "", err
	}
	var own []string
	for _, r := range repl {
		own = append(own, r.name, r.link, string(r.content), strconv.FormatInt(r.mode, 8))
	}
	return contentKey("image", recipeVersion, suite, runtime.GOARCH, debootstrapArgs("", "minbase", suite, packages), own, dropped,
		ext4.MkfsArgs(ext4.Base), ext4.MkfsArgs(ext4.Growing), kernelPackages, tools), nil
}

// buildKernel unpacks the kernel package: vmlinux, the modules image, the initrd but for the guest program,
// and the tools that make images.
func buildKernel(ctx context.Context, p *progress, mode, dir string) ([]string, error) {
	p.begin("fetching the kernel and the image tools")
	root := filepath.Join(dir, dirTools)
	err := debootstrap(ctx, p, debootstrapArgs(mode, "extract", suite, kernelPackages), func(r io.Reader) error { return extract(r, root, isKernelTool) })
	if err != nil {
		return nil, err
	}
	p.begin("unpacking the kernel")
	images, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return nil, fault.New(fault.Corrupt, kernelPackages[0], "holds %d kernels instead of one", len(images))
	}
	raw, err := os.ReadFile(images[0])
	if err != nil {
		return nil, err
	}
	vmlinux, err := kernel.Unpack(raw, filepath.Base(images[0]))
	if err != nil {
		return nil, err
	}
	version, err := kernel.Version(raw, filepath.Base(images[0]))
	if err != nil {
		return nil, err
	}
	// Packages carry no index; depmod looks in lib/modules, which usrmerge makes a link.
	if err := os.Symlink("usr/lib", filepath.Join(root, "lib")); err != nil {
		return nil, err
	}
	tools := toolchain{root}
	if err := tools.run(ctx, "depmod", "-b", root, version); err != nil {
		return nil, err
	}
	tree, err := kernel.OpenTree(filepath.Join(root, "usr/lib/modules", version))
	if err != nil {
		return nil, err
	}
	initrd, err := kernel.BuildInitrd(nil, tree)
	if err != nil {
		return nil, err
	}
	for name, content := range map[string][]byte{fileVmlinux: vmlinux, fileInitrd: initrd, fileVersion: []byte(version)} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return nil, fault.Wrap(err, fault.Exhausted, name, "cannot be written")
		}
	}
	if err := buildModulesImage(ctx, tools, tree.Dir(), filepath.Join(dir, fileModules)); err != nil {
		return nil, err
	}
	// The packages' rest has served.
	for _, d := range []string{"boot", "usr/lib/modules", "lib"} {
		if err := os.RemoveAll(filepath.Join(root, d)); err != nil {
			return nil, err
		}
	}
	return []string{fileVmlinux, fileModules, fileInitrd, fileVersion}, nil
}

// buildModulesImage goes by a tar, so that the modules belong to root whoever builds.
func buildModulesImage(ctx context.Context, tools toolchain, tree, file string) error {
	tarFile := file + ".tar"
	defer os.Remove(tarFile)
	f, err := os.Create(tarFile)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	var size imageSize
	err = filepath.WalkDir(tree, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(tree, p)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		h := &tar.Header{Name: tarName(rel, tar.TypeReg), Typeflag: tar.TypeReg, Mode: 0o644, Size: info.Size(), ModTime: info.ModTime()}
		if d.IsDir() {
			h = &tar.Header{Name: tarName(rel, tar.TypeDir), Typeflag: tar.TypeDir, Mode: 0o755, ModTime: info.ModTime()}
		} else if !d.Type().IsRegular() {
			return nil // links to headers that are not in the package
		}
		size.add(h)
		if err := w.WriteHeader(h); err != nil || d.IsDir() {
			return err
		}
		in, err := os.Open(p)
		if err != nil {
			return err
		}
		defer in.Close()
		_, err = io.Copy(w, in)
		return err
	})
	if err := errors.Join(err, w.Close()); err != nil {
		return err
	}
	return makeImage(ctx, tools, ext4.ReadOnly, "modules", tarFile, file, size, 0)
}

// isKernelTool says whether buildKernel needs a file of the packages: the kernel, its modules, the programs
// with their libraries.
func isKernelTool(name string) bool {
	switch {
	case path.Dir(name) == "boot":
		return strings.HasPrefix(name, "boot/vmlinuz-")
	case strings.HasPrefix(name, "usr/lib/modules/"):
		return true
	}
	switch name {
	case "usr/sbin/mke2fs", "usr/sbin/debugfs", "usr/bin/kmod", "usr/sbin/depmod":
		return true
	}
	return isLibrary(name)
}

// isLibrary says whether a file of a package is one that toolchain links programs with.
func isLibrary(name string) bool {
	return path.Dir(name) == "usr/lib/x86_64-linux-gnu" && strings.Contains(path.Base(name), ".so")
}

// extract unpacks the files and links of a tar that are wanted. Nothing is written through a link: links
// are made last.
func extract(r io.Reader, root string, wanted func(name string) bool) error {
	links := map[string]string{}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		name := path.Clean(h.Name)
		if !filepath.IsLocal(name) || !wanted(name) {
			continue
		}
		file := filepath.Join(root, name)
		switch h.Typeflag {
		case tar.TypeSymlink:
			links[file] = h.Linkname
		case tar.TypeReg:
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				return err
			}
			f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fs.FileMode(h.Mode&0o755))
			if err != nil {
				return err
			}
			_, err = io.Copy(f, tr)
			if err := errors.Join(err, f.Close()); err != nil {
				return err
			}
		}
	}
	for file, target := range links {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(target, file); err != nil {
			return err
		}
	}
	return nil
}

// buildImage makes the root filesystem and the work seed in dir, with what is added to the packages.
func buildImage(ctx context.Context, p *progress, mode, dir string, packages []string, add addition, tools toolchain) ([]string, error) {
	if free, err := freeBytes(dir); err != nil || free < cacheNeed {
		return nil, fault.Wrap(err, fault.Exhausted, dir, "building the image takes %s, and there are %s", gib(cacheNeed), gib(free)).
			WithHint("free some space, or set XDG_CACHE_HOME to a directory with more")
	}
	repl, err := replacements()
	if err != nil {
		return nil, err
	}
	p.begin("building the root filesystem from %d packages", len(packages))
	var sizes [2]imageSize
	err = debootstrap(ctx, p, debootstrapArgs(mode, "minbase", suite, packages), func(r io.Reader) (err error) {
		sizes, err = splitTree(ctx, r, dir, dropped, repl, add)
		return err
	})
	if err != nil {
		return nil, err
	}
	p.begin("writing the root filesystem image")
	return []string{fileImage, fileSeed}, makeImages(ctx, tools, dir, sizes, 0)
}

// Names of the tars that splitTree writes.
const (
	imageTar = "rootfs.tar"
	seedTar  = "seed.tar"
)

// splitTree rewrites the tar of a tree into two files in dir, the image's and the work seed's, and says what they need.
func splitTree(ctx context.Context, r io.Reader, dir string, drop []string, repl []replacement, add addition) (sizes [2]imageSize, err error) {
	image, err := os.Create(filepath.Join(dir, imageTar))
	if err != nil {
		return sizes, err
	}
	defer func() { err = errors.Join(err, image.Close()) }()
	seed, err := os.Create(filepath.Join(dir, seedTar))
	if err != nil {
		return sizes, err
	}
	defer func() { err = errors.Join(err, seed.Close()) }()
	sizes[0], sizes[1], err = rewriteTar(ctx, r, image, seed, drop, repl, add, time.Now())
	return sizes, err
}

// makeImages makes the image, of so many blocks or as many as it needs if that is 0, and the work seed of what splitTree left in dir.
func makeImages(ctx context.Context, tools toolchain, dir string, sizes [2]imageSize, blocks int64) error {
	image, seed := filepath.Join(dir, imageTar), filepath.Join(dir, seedTar)
	if err := makeImage(ctx, tools, ext4.Base, "rootfs", image, filepath.Join(dir, fileImage), sizes[0], blocks); err != nil {
		return err
	}
	if err := makeImage(ctx, tools, ext4.Growing, "work", seed, filepath.Join(dir, fileSeed), sizes[1], seedBlocks); err != nil {
		return err
	}
	// The seed's root is somebody's home directory; e2fsck makes lost+found when it needs one.
	if err := tools.run(ctx, "debugfs", "-w", "-R", "rmdir lost+found", filepath.Join(dir, fileSeed)); err != nil {
		return err
	}
	return errors.Join(os.Remove(image), os.Remove(seed))
}

// makeImage makes an ext4 image of a tar. blocks 0 means as many as the content needs.
func makeImage(ctx context.Context, tools toolchain, kind ext4.Kind, label, tarFile, file string, size imageSize, blocks int64) error {
	args := append(ext4.MkfsArgs(kind), "-L", label)
	if blocks == 0 {
		inodes := size.inodes + 32
		blocks = size.blocks + size.blocks/50 + 512
		switch kind {
		case ext4.ReadOnly:
			args = append(args, "-N", strconv.FormatInt(inodes, 10))
			blocks += inodes / 16
		default:
			// One inode for 16 KiB as usual, so that a clone which is enlarged has enough; more if
			// the content is of small files. An inode table block holds 16.
			inodes = max(inodes, blocks/4)
			args = append(args, "-N", strconv.FormatInt(inodes, 10))
			// A journal needs a filesystem of some size around it, however small the content.
			blocks = max(blocks+inodes/16+ext4.FixedBlocks, seedBlocks)
		}
	}
	args = append(args, "-d", tarFile, file, strconv.FormatInt(blocks, 10))
	if err := tools.run(ctx, "mke2fs", args...); err != nil {
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	sb, err := ext4.ReadSuperblock(f, file)
	if err == nil && (sb.Blocks != blocks || !sb.Clean()) {
		err = fault.New(fault.Internal, file, "mke2fs made %d blocks instead of %d", sb.Blocks, blocks)
	}
	return err
}

// buildAgent gives the guest program: the one named, or the checkout's own.
func buildAgent(ctx context.Context, o options, file string) error {
	if o.agent != "" {
		_, err := placeFile(ctx, o.agent, file, 0o755)
		return err
	}
	return buildProgram(ctx, o, "banger-vsock-agent", file)
}

// buildSSHD gives the guests' SSH server: the one beside the guest program that is named, if there is one, or the
// checkout's own.
func buildSSHD(ctx context.Context, o options, file string) (bool, error) {
	if o.agent == "" {
		return true, buildProgram(ctx, o, "banger-guest-sshd", file)
	}
	beside := filepath.Join(filepath.Dir(o.agent), bundle.FileName(bundle.GuestSSHD))
	if !fileExists(beside) {
		return false, nil
	}
	_, err := placeFile(ctx, beside, file, 0o755)
	return true, err
}

// buildProgram builds a program of the checkout that runs in guests, static.
func buildProgram(ctx context.Context, o options, name, file string) error {
	ldflags := "-s -w -X git.thaloco.com/thaloco/banger/internal/version.release=" + o.version
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", ldflags, "-o", file, "./cmd/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+runtime.GOARCH)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fault.Wrap(err, fault.Internal, name, "cannot be built:\n%s", strings.TrimSpace(string(out)))
	}
	return nil
}

// makeRuntime builds or repairs the bundle, which changes as a whole or not at all. The image is built afresh, from
// today's packages, if fresh says so.
func makeRuntime(ctx context.Context, p *progress, o options, fresh bool) error {
	packages, err := readPackages(o.packages)
	if err != nil {
		return err
	}
	c, err := openCache(ctx, p)
	if err != nil {
		return err
	}
	defer c.close()
	// Only a build needs mmdebstrap: with a warm cache neither it nor the network is asked for.
	var mode string
	needMode := func() (err error) {
		if mode == "" {
			mode, err = debootstrapMode()
		}
		return err
	}
	kernelDir, kernelFiles, err := c.get(ctx, "kernel", kernelKey(), false, func(dir string) ([]string, error) {
		if err := needMode(); err != nil {
			return nil, err
		}
		return buildKernel(ctx, p, mode, dir)
	})
	if err != nil {
		return err
	}
	sources, err := toolSources(o.manifest)
	if err != nil {
		return err
	}
	identity, err := sources.Identity(ctx)
	if err != nil {
		return err
	}
	key, err := imageKey(packages, identity)
	if err != nil {
		return err
	}
	imageDir, imageFiles, err := c.get(ctx, "image", key, fresh, func(dir string) ([]string, error) {
		if err := needMode(); err != nil {
			return nil, err
		}
		add, without, err := fetchTools(ctx, p, o, sources)
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, fileWithout), []byte(strings.Join(without, "\n")), 0o644); err != nil {
			return nil, err
		}
		return buildImage(ctx, p, mode, dir, packages, add, toolchain{filepath.Join(kernelDir, dirTools)})
	})
	if err != nil {
		return err
	}
	without, err := readWithout(imageDir)
	if err != nil {
		return err
	}
	sayWithout(p, without)

	s, err := newStaging(ctx, p, o.runtime)
	if err != nil {
		return err
	}
	defer s.discard()
	b := &bundle.Bundle{CreatedBy: o.version, Arch: runtime.GOARCH}
	if err := s.addFirecracker(ctx, p, o, c, b); err != nil {
		return err
	}
	p.begin("putting the bundle together in %s", o.runtime)
	version, err := os.ReadFile(filepath.Join(kernelDir, fileVersion))
	if err != nil {
		return fault.Wrap(err, fault.Corrupt, kernelDir, "is damaged").WithHint("remove it and try again")
	}
	for _, a := range []struct {
		role  bundle.Role
		dir   string
		file  string
		files map[string]bundle.Artifact
	}{
		{bundle.Kernel, kernelDir, fileVmlinux, kernelFiles},
		{bundle.Modules, kernelDir, fileModules, kernelFiles},
		{bundle.RootFS, imageDir, fileImage, imageFiles},
		{bundle.WorkSeed, imageDir, fileSeed, imageFiles},
	} {
		p.note(bundle.FileName(a.role))
		if err := s.addCached(ctx, a.role, filepath.Join(a.dir, a.file), a.files[a.file]); err != nil {
			return err
		}
	}
	p.note(bundle.FileName(bundle.Agent))
	if err := s.addAgent(ctx, o, filepath.Join(kernelDir, fileInitrd)); err != nil {
		return err
	}
	if err := s.add(ctx, bundle.Packages, o.packages, 0o644); err != nil {
		return err
	}
	if fileExists(filepath.Join(o.runtime, bundle.FileName(bundle.BaseRootFS))) {
		p.note(bundle.FileName(bundle.BaseRootFS))
		if err := s.keep(ctx, bundle.BaseRootFS); err != nil {
			return err
		}
	}
	if err := s.stamp(); err != nil {
		return err
	}
	b.KernelVersion = string(version)
	if err := s.commit(b); err != nil {
		return err
	}
	return errors.Join(c.prune(ctx, "kernel"), c.prune(ctx, "image"), c.prune(ctx, cacheKind))
}

// makeRootfs builds the image afresh, with its work seed, if it is missing, or if it was made of another list of packages than
// today's, as the stamp beside it says.
func makeRootfs(ctx context.Context, p *progress, o options) error {
	raw, err := os.ReadFile(o.packages)
	if err != nil {
		return fault.Wrap(err, fault.NotFound, o.packages, "cannot be read").WithHint("it lists the packages of the default image, one a line")
	}
	sum := sha256.Sum256(raw)
	image := filepath.Join(o.runtime, bundle.FileName(bundle.RootFS))
	stamp, err := os.ReadFile(image + stampSuffix)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.Wrap(err, fault.Permission, image+stampSuffix, "cannot be read")
	}
	if !fileExists(image) || strings.TrimSpace(string(stamp)) != hex.EncodeToString(sum[:]) {
		return makeRuntime(ctx, p, o, true)
	}
	p.say("%s is of today's %s; to build it afresh all the same: rm %s", image, filepath.Base(o.packages), image+stampSuffix)
	return nil
}

// refreshAgent builds the guest program into a bundle that is there, and the initrd with it.
func refreshAgent(ctx context.Context, p *progress, o options) error {
	b, err := bundle.Load(o.runtime)
	if err != nil {
		return err
	}
	p.begin("building the guest program")
	s, err := newStaging(ctx, p, o.runtime)
	if err != nil {
		return err
	}
	defer s.discard()
	for r, a := range b.Artifacts {
		s.done[r] = a
	}
	if err := s.addAgent(ctx, o, b.Path(bundle.Initrd)); err != nil {
		return err
	}
	return s.commit(b)
}
