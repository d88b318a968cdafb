// Package ext4 owns what banger knows about the ext4 format: the one set of mke2fs options for
// every filesystem it makes, how far such a filesystem can grow, and a reader of superblocks.
//
// It never mounts a filesystem and never writes to an existing one: growing is done by the guest.
// The only program it runs is mke2fs. Where images lie and when they are made belongs to
// internal/disk and tools/mkruntime.
package ext4

import (
	"strconv"
	"strings"
)

// features is the complete feature list. It begins with "none", so that the mke2fs.conf of the
// host decides nothing: a filesystem made on any host has the same format, and one that kernels
// from 4.12 on and e2fsprogs from 1.43 on handle (no orphan_file, no metadata_csum_seed).
var features = []string{
	"none",
	"has_journal", "ext_attr", "resize_inode", "dir_index", "filetype", "extent", "64bit",
	"flex_bg", "sparse_super", "large_file", "huge_file", "dir_nlink", "extra_isize", "metadata_csum",
}

// BlockSize is the block size, in bytes, of every filesystem that banger makes.
const BlockSize = 4096

// journalMiB is set instead of left to mke2fs, which sizes the journal by the filesystem at
// its birth: a 4 MiB journal in a seed of 256 MiB would stay 4 MiB when the disk grows to
// terabytes. The journal is not written at birth (lazy_journal_init), so on a sparse file it
// costs nothing until it is used.
const journalMiB = 64

// MaxGrowBytes is how large a Growing or Base filesystem can become while mounted: resize_inode
// reserves room for the group descriptors of 2 TiB. Each block of them (64, for 8 GiB) is one block
// that every clone of a template carries: 2 TiB costs 1 MiB, the 8 TiB that ext4 can reserve at
// most would cost 4.2 MiB (measured with mke2fs 1.47.0).
//
// The kernel itself goes on beyond it, by converting to meta_bg while it resizes, but slowly: a guest under
// emulation on a busy host grew a disk from 256 MiB to 2 TiB in 30 s, and one that should have become 8 TiB
// was at 5.0 TiB when its two minutes for mounting were over.
const MaxGrowBytes int64 = 2 << 40

const reservedGrowBlocks = MaxGrowBytes / BlockSize

// MinGrowBytes is the smallest Growing filesystem that leaves room beside its journal.
const MinGrowBytes int64 = 256 << 20

// bytesPerInode is set because mke2fs.conf chooses it by the size at birth, and it cannot be changed.
const bytesPerInode = 16384

// FixedBlocks is what a filesystem of kind Growing or Base holds beside content and inode tables: the
// journal, the reserved group descriptors with their copies, bitmaps.
const FixedBlocks = journalMiB<<20/BlockSize + 4096

// Kind says what a filesystem is for.
type Kind int

const (
	// Growing is for disks that a guest writes: journalled, enlarged online (work disk, work seed,
	// system overlay).
	Growing Kind = iota
	// Base is for the root filesystem of an image: journalled so that a writable clone of it
	// can be grown and booted directly by an image build, but with no space to spare.
	Base
	// ReadOnly is for content that nobody ever writes (the modules image): no journal, no
	// room to grow.
	ReadOnly
)

// MkfsArgs gives the options of mke2fs for a filesystem of a kind: everything but the label, the
// source of the content (-d), the file, and the size. lazy_itable_init and lazy_journal_init
// leave inode tables and journal unwritten, nodiscard spares a pass over a file that is sparse
// anyway, root_owner gives the root directory to root also when an ordinary user runs mke2fs.
func MkfsArgs(kind Kind) []string {
	feat := features
	ext := []string{"lazy_itable_init=1", "lazy_journal_init=1", "nodiscard", "root_owner=0:0"}
	args := []string{"-q", "-F", "-t", "ext4", "-b", strconv.Itoa(BlockSize), "-I", "256", "-i", strconv.Itoa(bytesPerInode), "-m", "0"}
	switch kind {
	case Growing, Base:
		ext = append(ext, "resize="+strconv.FormatInt(reservedGrowBlocks, 10))
		args = append(args, "-J", "size="+strconv.Itoa(journalMiB))
	case ReadOnly:
		feat = without(features, "has_journal", "resize_inode")
	}
	return append(args, "-O", strings.Join(feat, ","), "-E", strings.Join(ext, ","))
}

func without(list []string, drop ...string) []string {
	var out []string
next:
	for _, s := range list {
		for _, d := range drop {
			if s == d {
				continue next
			}
		}
		out = append(out, s)
	}
	return out
}
