package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/ext4"
)

// Flattened is what Flatten made.
type Flattened struct {
	Files   int64 // inodes
	Content int64 // bytes of files
	Seed    bool  // the image has something in /root, and a work seed was made
}

// home is the directory that becomes the work seed: the work disk is mounted over it.
const home = "root"

// Flatten writes the image's tree as an ext4 filesystem to the file rootfs, and what is in /root to the file
// seed as one for work disks. Neither may exist; after an error neither does. Layers are read again, several at
// once, and checked again: what is written is what the digests say.
//
// fault.Corrupt, Exhausted, and what Pull gives.
func (img *Image) Flatten(ctx context.Context, tool ext4.Tool, rootfs, seed string, progress func(Progress)) (out Flattened, err error) {
	img.report = newReporter(progress)
	defer img.report.stop()
	img.report.stage(StageFlatten)
	t := &target{kind: ext4.Base, label: "rootfs", file: rootfs, top: img.root}
	targets := []*target{t}
	if home := img.root.children[home]; home != nil && home.isDir() && len(home.children) > 0 {
		targets = append(targets, &target{kind: ext4.Growing, label: "work", file: seed, top: home})
		out.Seed = true
	}
	need := int64(0)
	for _, t := range targets {
		if t.nodes, err = list(t.top); err != nil {
			return out, err
		}
		t.tally = count(t.nodes)
		need += t.tally.blocks * ext4.BlockSize
	}
	out.Files, out.Content = t.tally.inodes, t.tally.content
	img.report.total.Store(t.tally.content)
	if err := disk.CheckRoom(filepath.Dir(rootfs), need); err != nil {
		return out, err
	}
	defer func() {
		if err = finish(targets, err); err != nil {
			err = classify(ctx, err, img.Reference)
		}
	}()
	for _, t := range targets {
		if err := t.make(ctx, tool); err != nil {
			return out, err
		}
	}
	return out, img.fill(ctx, targets)
}

// target is one filesystem that is made of the tree, or of a part of it.
type target struct {
	kind  ext4.Kind
	label string
	file  string
	top   *node
	nodes []*node
	tally tally

	f     *os.File // nil until it is made
	files map[*node]*ext4.Node
}

// make makes the filesystem with everything but the content of files.
func (t *target) make(ctx context.Context, tool ext4.Tool) (err error) {
	if err := tool.Make(ctx, t.file, t.tally.format(t.kind, t.label)); err != nil {
		return err
	}
	if t.f, err = os.OpenFile(t.file, os.O_RDWR, 0); err != nil {
		return errors.Join(err, os.Remove(t.file))
	}
	t.files = make(map[*node]*ext4.Node, len(t.nodes))
	for _, n := range t.nodes {
		t.files[n] = &ext4.Node{Mode: n.stat(), UID: uint32(n.uid), GID: uint32(n.gid), Time: n.mtime, Size: n.size, Target: n.link,
			Major: uint32(n.major), Minor: uint32(n.minor), Xattrs: n.xattrs}
	}
	for _, n := range t.nodes {
		for _, name := range slices.Sorted(maps.Keys(n.children)) {
			t.files[n].Names = append(t.files[n].Names, ext4.Name{Name: name, Node: t.files[n.children[name]]})
		}
	}
	if err := ext4.Populate(t.f, t.files[t.top]); err != nil {
		return err
	}
	for _, n := range t.nodes {
		if n.layer < 0 && n.kind == tar.TypeReg {
			if _, err := t.files[n].WriteContent(t.f, bytes.NewReader(n.own)); err != nil {
				return err
			}
		}
	}
	return nil
}

// finish makes the files durable, or removes them all: after an error of who filled them, and if one cannot be made durable.
func finish(targets []*target, err error) error {
	for _, t := range targets {
		if err == nil {
			err = t.f.Sync()
		}
	}
	made := slices.DeleteFunc(slices.Clone(targets), func(t *target) bool { return t.f == nil })
	for _, t := range made {
		err = errors.Join(err, t.f.Close())
	}
	if err != nil {
		for _, t := range made {
			err = errors.Join(err, os.Remove(t.file))
		}
	}
	return err
}

// stat is a node's mode as stat(2) has it.
func (n *node) stat() uint32 {
	switch n.kind {
	case tar.TypeDir:
		return unix.S_IFDIR | uint32(n.mode)
	case tar.TypeSymlink:
		return unix.S_IFLNK | 0o777 // as the kernel makes them
	case tar.TypeChar:
		return unix.S_IFCHR | uint32(n.mode)
	case tar.TypeBlock:
		return unix.S_IFBLK | uint32(n.mode)
	case tar.TypeFifo:
		return unix.S_IFIFO | uint32(n.mode)
	}
	return unix.S_IFREG | uint32(n.mode)
}

// fill writes the content of files: each layer that has any is read once, and each file's place is known.
func (img *Image) fill(ctx context.Context, targets []*target) error {
	wanted := make([]map[int]*node, len(img.layers))
	for _, n := range targets[0].nodes { // the others are parts of it
		if n.kind == tar.TypeReg && n.layer >= 0 && n.size > 0 {
			if wanted[n.layer] == nil {
				wanted[n.layer] = map[int]*node{}
			}
			wanted[n.layer][n.member] = n
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallel)
	for i, l := range img.layers {
		if len(wanted[i]) > 0 {
			group.Go(func() error { return img.fillFrom(ctx, l, wanted[i], targets) })
		}
	}
	return group.Wait()
}

func (img *Image) fillFrom(ctx context.Context, l *layer, wanted map[int]*node, targets []*target) error {
	f, err := l.open()
	if err != nil {
		return err
	}
	defer f.Close()
	left := len(wanted)
	err = l.read(bounded{ctx, f}, func(member int, h *tar.Header, content io.Reader) error {
		n := wanted[member]
		if n == nil {
			return nil
		}
		if h.Size != n.size {
			return corrupt("layer %s has changed since it was checked", l.diffID)
		}
		left--
		var first *target
		for _, t := range targets {
			file := t.files[n]
			if file == nil {
				continue
			}
			from := content
			if first != nil {
				from = first.files[n].Content(first.f)
			}
			if _, err := file.WriteContent(t.f, from); err != nil {
				return err
			}
			first = t
		}
		img.report.done.Add(n.size)
		return nil
	}, nil)
	if err == nil && left > 0 {
		err = corrupt("layer %s has changed since it was checked", l.diffID)
	}
	return err
}

// inodesPerBlock is how many inodes, of 256 bytes, a block of their table holds.
const inodesPerBlock = ext4.BlockSize / 256

// format is the smallest filesystem that takes the files. It has an inode for 16 KiB, as usual, so that one that
// is enlarged has enough, and more if the files are small.
func (t tally) format(kind ext4.Kind, label string) ext4.Format {
	blocks := t.blocks + t.blocks/50 + 512 + ext4.FixedBlocks
	blocks += max(t.inodes, blocks/4) / inodesPerBlock
	blocks = max(blocks, ext4.MinGrowBytes/ext4.BlockSize) // a smaller one has no room for its journal
	return ext4.Format{Kind: kind, Label: label, Size: blocks * ext4.BlockSize, Inodes: max(t.inodes+32, blocks/4)}
}

// count adds up what the files need.
func count(nodes []*node) tally {
	var t tally
	for _, n := range nodes {
		t.inodes++
		switch n.kind {
		case tar.TypeReg:
			t.content += n.size
			blocks := (n.size + ext4.BlockSize - 1) / ext4.BlockSize
			t.blocks += blocks + blocks/8192 // an extent has 32768 blocks at most, and four fit into the inode
		case tar.TypeSymlink:
			if len(n.link) >= 60 { // longer targets do not fit into the inode
				t.blocks++
			}
		case tar.TypeDir:
			entries := int64(24 + 12)
			for name := range n.children {
				entries += 8 + int64(len(name)) + 3
			}
			t.blocks += entries/(ext4.BlockSize-maxName) + 1
		}
		if len(n.xattrs) > 0 {
			t.blocks++
		}
	}
	return t
}
