package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// maxTree bounds the tar of a tree, in bytes.
const maxTree = maxImage

// droppedFromGuests are what banger itself wrote into the guest that a tree comes from.
var droppedFromGuests = []string{
	"etc/machine-id",
	"etc/ssh/banger_authorized_keys",
	"etc/ssh/sshd_config.d/10-banger.conf",
}

// makeTree makes a root filesystem and its work seed of a distribution's tree, which comes as a tar on in: FILE.ext4 of o.to, and
// FILE.work-seed.ext4 beside it. /root becomes the seed's content as well. Facts about the machine that built it are left out. Both are
// complete on the disk before either is put in place; the seed is first, since it fits the image before as well. With o.tools it has
// mise and opencode, where those can be had.
func makeTree(ctx context.Context, p *progress, o options, in io.Reader) (err error) {
	base, ok := strings.CutSuffix(o.to, ".ext4")
	if !ok {
		return fault.New(fault.Invalid, "-to", "names no file that ends in .ext4")
	}
	var blocks int64
	if o.size != "" && o.size != "0" {
		size, err := vm.ParseDiskSize("-size", o.size)
		if err != nil {
			return err
		}
		blocks = size / ext4.BlockSize
	}
	c, err := openCache(ctx, p)
	if err != nil {
		return err
	}
	defer c.close()
	tools, err := c.tools(ctx, p)
	if err != nil {
		return err
	}
	// The cache's lock keeps everybody else from making one: what is there was left by a killed process.
	old, err := filepath.Glob(filepath.Join(filepath.Dir(o.to), stagingPrefix(o.to)+"*"))
	for _, d := range old {
		err = errors.Join(err, os.RemoveAll(d))
	}
	if err != nil {
		return fault.Wrap(err, fault.Permission, filepath.Dir(o.to), "cannot be cleaned up")
	}
	dir, err := os.MkdirTemp(filepath.Dir(o.to), stagingPrefix(o.to))
	if err != nil {
		return fault.Wrap(err, fault.Permission, filepath.Dir(o.to), "cannot be written")
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var add addition
	if o.tools {
		sources, err := toolSources(o.manifest)
		if err != nil {
			return err
		}
		sources.TmuxResurrect, sources.TmuxContinuum = "", "" // the default image's alone
		var without []string
		if add, without, err = fetchTools(ctx, p, o, sources); err != nil {
			return err
		}
		for _, line := range without {
			p.say("%s is without %s", o.to, line)
		}
	}
	p.begin("reading the tree")
	sizes, err := splitTree(ctx, &bounded{r: &counted{ctx: ctx, r: in, p: p}, left: maxTree, what: "the tree"}, dir, slices.Concat(droppedAnywhere, droppedFromGuests), nil, add)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return wrapWrite(err, fault.Corrupt, "the tree", "is no whole tar archive")
	case sizes[0].inodes < 2 || sizes[1].inodes == 0:
		return fault.New(fault.Invalid, "the tree", "is no root filesystem: it has no /root")
	}
	p.begin("writing %s", o.to)
	if err := makeImages(ctx, tools, dir, sizes, blocks); err != nil {
		if blocks != 0 && ctx.Err() == nil {
			return fault.Wrap(err, fault.Exhausted, o.to, "cannot be made with %s", o.size).WithHint("its content takes about %s", gib((sizes[0].blocks+sizes[0].inodes/16)*ext4.BlockSize))
		}
		return err
	}
	for _, f := range []struct{ from, to string }{{fileSeed, base + ".work-seed.ext4"}, {fileImage, o.to}} {
		file, err := os.Open(filepath.Join(dir, f.from))
		if err != nil {
			return err
		}
		if err := errors.Join(file.Sync(), file.Close()); err != nil {
			return fault.Wrap(err, fault.Exhausted, f.to, "cannot be written")
		}
		if err := os.Rename(filepath.Join(dir, f.from), f.to); err != nil {
			return fault.Wrap(err, fault.Permission, f.to, "cannot be put in place")
		}
	}
	return bundle.SyncDir(filepath.Dir(o.to))
}

// adopt makes an image that makeTree made the default one of a bundle, with the list of packages that it was made of. The rest of the
// bundle stays.
func adopt(ctx context.Context, p *progress, o options) error {
	base, ok := strings.CutSuffix(o.to, ".ext4")
	if !ok {
		return fault.New(fault.Invalid, "-to", "names no file that ends in .ext4")
	}
	b, err := bundle.Load(o.runtime)
	if err != nil {
		return err
	}
	s, err := newStaging(ctx, p, o.runtime)
	if err != nil {
		return err
	}
	defer s.discard()
	for r, a := range b.Artifacts {
		s.done[r] = a
	}
	p.begin("taking %s into the bundle", o.to)
	for _, a := range []struct {
		role bundle.Role
		file string
	}{{bundle.RootFS, o.to}, {bundle.WorkSeed, base + ".work-seed.ext4"}, {bundle.Packages, o.packages}} {
		if a.role != bundle.Packages {
			f, err := os.Open(a.file)
			if err != nil {
				return fault.Wrap(err, fault.NotFound, a.file, "cannot be read")
			}
			_, err = ext4.ReadSuperblock(f, a.file)
			if err := errors.Join(err, f.Close()); err != nil {
				return err
			}
		}
		if err := s.add(ctx, a.role, a.file, 0o644); err != nil {
			return err
		}
	}
	if err := s.stamp(); err != nil {
		return err
	}
	return s.commit(b)
}
