package ext4

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Node is one inode of a filesystem that Populate fills. A node may have several names.
type Node struct {
	Mode         uint32 // type and permission bits as in stat(2)
	UID, GID     uint32
	Time         time.Time // of modification, and the other times, too
	Size         int64     // of a regular file, in bytes
	Target       string    // of a symbolic link, 1 to 4095 bytes
	Major, Minor uint32    // of a device
	Xattrs       map[string]string
	Names        []Name // of a directory, in any order, without "." and ".."

	inode   uint32
	links   uint32
	parent  uint32 // of a directory
	extents []extent
	blocks  int64 // all that it takes: content, extent tree, attributes
	xattrAt int64
}

// Name is a name in a directory: 1 to 255 bytes, neither "/" nor zero among them.
type Name struct {
	Name string
	Node *Node
}

// extent is a run of blocks.
type extent struct{ start, length int64 }

// Facts of the format, from the kernel's Documentation/filesystems/ext4.
const (
	inodeSize    = 256
	descSize     = 64
	firstInode   = 11 // lost+found's; e2fsck makes one when it needs it
	extraSize    = 32 // what of the inode beyond 128 bytes is in use
	flagExtents  = 0x80000
	inodeUninit  = 0x1
	blockUninit  = 0x2
	maxExtent    = 32768 // blocks
	inlineLeaves = 4     // extents, or indexes, in an inode
	leafExtents  = (BlockSize - 12 - 4) / 12
	dirTail      = 12
	maxLinks     = 65000
)

// MaxXattrs is how many bytes the extended attributes of one file may take in all: one block, in which each has an
// entry of 16 bytes, its name without the class, and its value, rounded up to 4.
const MaxXattrs = BlockSize - 32 - 4

// filling is a filesystem while it is filled.
type filling struct {
	f      *os.File
	sb     []byte
	gdt    []byte
	groups int64
	perGrp int64 // blocks in a group
	inoGrp int64 // inodes in a group
	total  int64 // blocks
	seed   uint32
	used   [][]byte // block bitmap of each group
	next   int64    // block from which on is looked for free ones
	inodes map[int64][]byte
	last   int64           // inode that was given out last
	dirs   map[int64]int64 // directories in each group
}

var le = binary.LittleEndian

// crc is the raw crc32c that ext4 chains: the kernel's ext4_chksum.
func crc(seed uint32, b []byte) uint32 { return ^crc32.Update(^seed, castagnoli, b) }

// Populate fills the filesystem in f, which Make has just made without content and nobody has mounted, with the
// tree below root: directories, links, devices, attributes, and inodes of files with room for their content,
// which WriteContent
// writes. f must be open for reading and writing.
//
// It takes what mke2fs -d does not: names that are no text, every extended attribute, times after 2038. What it
// leaves is complete but for the contents; a failure leaves a filesystem that is not to be used.
// fault.Exhausted if the tree does not fit, Corrupt if f holds another filesystem, Invalid for what ext4 cannot hold.
func Populate(f *os.File, root *Node) error {
	p, err := openEmpty(f)
	if err != nil {
		return err
	}
	if err := p.number(root, rootInode, rootInode); err != nil {
		return err
	}
	done := map[*Node]bool{}
	if err := p.place(root, done); err != nil {
		return err
	}
	return p.finish()
}

func (p *filling) block(n int64) ([]byte, error) {
	b := make([]byte, BlockSize)
	_, err := p.f.ReadAt(b, n*BlockSize)
	return b, err
}

func (p *filling) write(n int64, b []byte) error {
	_, err := p.f.WriteAt(b, n*BlockSize)
	return err
}

// openEmpty reads what mke2fs wrote, and takes lost+found and the root directory's block out of it.
func openEmpty(f *os.File) (*filling, error) {
	s, err := ReadSuperblock(f, f.Name())
	if err != nil {
		return nil, err
	}
	p := &filling{f: f, sb: make([]byte, 1024), total: s.Blocks, inodes: map[int64][]byte{}, dirs: map[int64]int64{}, last: firstInode - 1}
	if _, err := f.ReadAt(p.sb, 1024); err != nil {
		return nil, err
	}
	const wantIncompat, wantRO = incompat64bit, roCompatMeta
	foreign := s.BlockSize != BlockSize || le.Uint32(p.sb[0x60:])&wantIncompat == 0 || le.Uint32(p.sb[0x64:])&wantRO == 0 || s.MetaBG ||
		le.Uint16(p.sb[0x58:]) != inodeSize || le.Uint16(p.sb[0xFE:]) != descSize || le.Uint32(p.sb[0x54:]) != firstInode
	if foreign || s.Inodes-s.FreeInodes != firstInode {
		return nil, fault.New(fault.Corrupt, f.Name(), "is not an empty filesystem as banger makes them")
	}
	p.perGrp, p.inoGrp = int64(le.Uint32(p.sb[0x20:])), int64(le.Uint32(p.sb[0x28:]))
	p.groups = (p.total + p.perGrp - 1) / p.perGrp
	p.seed = crc(math.MaxUint32, p.sb[0x68:0x78])
	p.gdt = make([]byte, p.groups*descSize)
	if _, err := f.ReadAt(p.gdt, BlockSize); err != nil {
		return nil, err
	}
	for g := range p.groups {
		bitmap, err := p.blockBitmap(g, int64(s.ReservedGDTBlocks))
		if err != nil {
			return nil, err
		}
		p.used = append(p.used, bitmap)
	}
	table, err := p.table(0)
	if err != nil {
		return nil, err
	}
	for _, ino := range []int64{rootInode, firstInode} {
		raw := table[(ino-1)*inodeSize : ino*inodeSize]
		node := raw[0x28:]
		if le.Uint16(node) != 0xF30A || le.Uint16(node[6:]) != 0 {
			return nil, fault.New(fault.Corrupt, f.Name(), "has a root directory of another form")
		}
		for i := range int(le.Uint16(node[2:])) {
			e := node[12+12*i:]
			start := int64(le.Uint32(e[8:])) | int64(le.Uint16(e[6:]))<<32
			for n := start; n < start+int64(le.Uint16(e[4:])); n++ {
				p.used[n/p.perGrp][n%p.perGrp/8] &^= 1 << (n % 8)
				if err := p.write(n, zeroBlock[:]); err != nil { // zeros of files that get it are not written
					return nil, err
				}
			}
		}
		clear(raw)
	}
	return p, nil
}

func (p *filling) desc(g int64) []byte { return p.gdt[g*descSize : (g+1)*descSize] }

func descBlock(d []byte, lo, hi int) int64 {
	return int64(le.Uint32(d[lo:])) | int64(le.Uint32(d[hi:]))<<32
}

// blockBitmap is a group's: mke2fs has not written those of groups that hold nothing but their own metadata.
func (p *filling) blockBitmap(g, reserved int64) ([]byte, error) {
	d := p.desc(g)
	if le.Uint16(d[0x12:])&blockUninit == 0 {
		return p.block(descBlock(d, 0, 0x20))
	}
	b := make([]byte, BlockSize)
	set := func(from, n int64) {
		for i := from; i < from+n; i++ {
			if i >= g*p.perGrp && i < (g+1)*p.perGrp {
				b[i%p.perGrp/8] |= 1 << (i % 8)
			}
		}
	}
	if hasSuper(g) {
		set(g*p.perGrp, 1+(p.groups*descSize+BlockSize-1)/BlockSize+reserved)
	}
	set(descBlock(d, 0, 0x20), 1)
	set(descBlock(d, 4, 0x24), 1)
	set(descBlock(d, 8, 0x28), p.inoGrp*inodeSize/BlockSize)
	set(p.total, (g+1)*p.perGrp-min(p.total, (g+1)*p.perGrp))
	return b, nil
}

// hasSuper says which groups hold copies of the superblock: 0, 1, and powers of 3, 5 and 7 (sparse_super).
func hasSuper(g int64) bool {
	if g <= 1 {
		return true
	}
	for _, base := range []int64{3, 5, 7} {
		n := base
		for n < g {
			n *= base
		}
		if n == g {
			return true
		}
	}
	return false
}

// table is a group's inode table while it is filled.
func (p *filling) table(g int64) ([]byte, error) {
	if t, ok := p.inodes[g]; ok {
		return t, nil
	}
	t := make([]byte, p.inoGrp*inodeSize)
	if le.Uint16(p.desc(g)[0x12:])&inodeUninit == 0 {
		if _, err := p.f.ReadAt(t, descBlock(p.desc(g), 8, 0x28)*BlockSize); err != nil {
			return nil, err
		}
	}
	p.inodes[g] = t
	return t, nil
}

// number gives every file its inode, and counts its names.
func (p *filling) number(n *Node, ino, parent uint32) error {
	n.inode, n.parent, n.links = ino, parent, 2
	seen := map[string]bool{}
	for _, c := range n.Names {
		if c.Name == "" || len(c.Name) > 255 || c.Name == "." || c.Name == ".." || strings.ContainsAny(c.Name, "/\x00") || seen[c.Name] {
			return fault.New(fault.Invalid, f255(c.Name), "is no name that a directory can hold, or is there twice")
		}
		seen[c.Name] = true
		child := c.Node
		dir := child.Mode&unix.S_IFMT == unix.S_IFDIR
		switch {
		case child.inode == 0:
			p.last++
			if p.last > p.groups*p.inoGrp {
				return fault.New(fault.Exhausted, p.f.Name(), "has inodes for %d files, and there are more", p.groups*p.inoGrp)
			}
			child.inode = uint32(p.last)
			if dir {
				n.links++
				if err := p.number(child, child.inode, n.inode); err != nil {
					return err
				}
				continue
			}
			child.links = 1
		case dir:
			return fault.New(fault.Invalid, c.Name, "is a directory with two names")
		default:
			if child.links++; child.links > maxLinks {
				return fault.New(fault.Invalid, c.Name, "is a file with more than %d names, and ext4 takes no more", maxLinks)
			}
		}
	}
	return nil
}

func f255(s string) string { return strings.ToValidUTF8(s[:min(len(s), 255)], "?") }

// allocate takes free blocks, the next ones there are.
func (p *filling) allocate(n int64) ([]extent, error) {
	var out []extent
	for ; n > 0; p.next++ {
		if p.next >= p.total {
			return nil, fault.New(fault.Exhausted, p.f.Name(), "is too small for what it is to hold")
		}
		bits := &p.used[p.next/p.perGrp][p.next%p.perGrp/8]
		if *bits&(1<<(p.next%8)) != 0 {
			continue
		}
		*bits |= 1 << (p.next % 8)
		n--
		if k := len(out) - 1; k >= 0 && out[k].start+out[k].length == p.next && out[k].length < maxExtent {
			out[k].length++
		} else {
			out = append(out, extent{p.next, 1})
		}
	}
	return out, nil
}

// place gives a file its blocks and writes all but a regular file's content.
func (p *filling) place(n *Node, done map[*Node]bool) error {
	if done[n] {
		return nil
	}
	done[n] = true
	var content []byte
	size := n.Size
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		content = p.directory(n)
		size = int64(len(content))
		p.dirs[(int64(n.inode)-1)/p.inoGrp]++
	case unix.S_IFLNK:
		if len(n.Target) == 0 || len(n.Target) > 4095 {
			return fault.New(fault.Invalid, p.f.Name(), "a symbolic link has a target of %d bytes", len(n.Target))
		}
		size = int64(len(n.Target))
		if size >= 60 {
			content = []byte(n.Target)
		}
	case unix.S_IFREG:
	default:
		size = 0
	}
	inline := n.Mode&unix.S_IFMT == unix.S_IFLNK && content == nil
	if !inline && size > 0 {
		var err error
		if n.extents, err = p.allocate((size + BlockSize - 1) / BlockSize); err != nil {
			return err
		}
	}
	if content != nil {
		if _, err := n.fill(p.f, bytes.NewReader(content), size); err != nil {
			return err
		}
	}
	if err := p.inode(n, size, inline); err != nil {
		return err
	}
	for _, c := range n.Names {
		if err := p.place(c.Node, done); err != nil {
			return err
		}
	}
	return nil
}

// directory renders a directory's blocks: a plain list of names, as mke2fs makes it. The kernel looks through
// it name by name.
func (p *filling) directory(n *Node) []byte {
	var out []byte
	start, lastAt := 0, -1
	add := func(ino uint32, name string, kind byte) {
		length := (8 + len(name) + 3) / 4 * 4
		if len(out)-start+length > BlockSize-dirTail {
			out = p.closeDirectory(n, out, start, lastAt)
			start, lastAt = len(out), -1
		}
		lastAt = len(out)
		out = le.AppendUint32(out, ino)
		out = le.AppendUint16(out, uint16(length))
		out = append(append(out, byte(len(name)), kind), name...)
		out = append(out, make([]byte, length-8-len(name))...)
	}
	add(n.inode, ".", 2)
	add(n.parent, "..", 2)
	for _, c := range n.Names {
		add(c.Node.inode, c.Name, fileType(c.Node.Mode))
	}
	return p.closeDirectory(n, out, start, lastAt)
}

// closeDirectory ends a block: its last name's entry goes to the tail, which holds the checksum.
func (p *filling) closeDirectory(n *Node, out []byte, start, lastAt int) []byte {
	le.PutUint16(out[lastAt+4:], uint16(start+BlockSize-dirTail-lastAt))
	out = append(out, make([]byte, start+BlockSize-dirTail-len(out))...)
	sum := crc(p.inodeSeed(n), out[start:])
	out = append(out, 0, 0, 0, 0, dirTail, 0, 0, 0xDE)
	return le.AppendUint32(out, sum)
}

func fileType(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFCHR:
		return 3
	case unix.S_IFBLK:
		return 4
	case unix.S_IFIFO:
		return 5
	case unix.S_IFSOCK:
		return 6
	}
	return 7 // a symbolic link
}

// inodeSeed begins the checksums of what belongs to an inode: its number and generation, which is 0.
func (p *filling) inodeSeed(n *Node) uint32 {
	return crc(crc(p.seed, le.AppendUint32(nil, n.inode)), make([]byte, 4))
}

// inode writes a file's inode into its table, and its extent tree and attributes to the disk.
func (p *filling) inode(n *Node, size int64, inline bool) error {
	group := (int64(n.inode) - 1) / p.inoGrp
	table, err := p.table(group)
	if err != nil {
		return err
	}
	at := (int64(n.inode) - 1) % p.inoGrp * inodeSize
	b := table[at : at+inodeSize]
	clear(b)
	for _, e := range n.extents {
		n.blocks += e.length
	}
	switch kind := n.Mode & unix.S_IFMT; {
	case inline:
		copy(b[0x28:], n.Target)
	case kind == unix.S_IFCHR || kind == unix.S_IFBLK:
		if n.Major < 256 && n.Minor < 256 { // linux/kdev_t.h, old_encode_dev and new_encode_dev
			le.PutUint32(b[0x28:], n.Major<<8|n.Minor)
		} else {
			le.PutUint32(b[0x2C:], n.Minor&0xff|n.Major<<8|n.Minor&^0xff<<12)
		}
	case kind == unix.S_IFREG || kind == unix.S_IFDIR || kind == unix.S_IFLNK:
		le.PutUint32(b[0x20:], flagExtents)
		if err := p.extentTree(n, b[0x28:0x28+60]); err != nil {
			return err
		}
	}
	if err := p.attributes(n); err != nil {
		return err
	}
	links := n.links
	if links > maxLinks { // of a directory with very many others in it (dir_nlink)
		links = 1
	}
	le.PutUint16(b[0:], uint16(n.Mode))
	le.PutUint16(b[2:], uint16(n.UID))
	le.PutUint16(b[0x78:], uint16(n.UID>>16))
	le.PutUint16(b[0x18:], uint16(n.GID))
	le.PutUint16(b[0x7A:], uint16(n.GID>>16))
	le.PutUint32(b[4:], uint32(size))
	le.PutUint32(b[0x6C:], uint32(size>>32))
	le.PutUint16(b[0x1A:], uint16(links))
	sectors := n.blocks * (BlockSize / 512)
	le.PutUint32(b[0x1C:], uint32(sectors))
	le.PutUint16(b[0x74:], uint16(sectors>>32))
	le.PutUint32(b[0x68:], uint32(n.xattrAt))
	le.PutUint16(b[0x76:], uint16(n.xattrAt>>32))
	le.PutUint16(b[0x80:], extraSize)
	low, extra := encodeTime(n.Time)
	for _, t := range [][2]int{{0x8, 0x8C}, {0xC, 0x84}, {0x10, 0x88}, {0x90, 0x94}} { // access, change, modification, birth
		le.PutUint32(b[t[0]:], low)
		le.PutUint32(b[t[1]:], extra)
	}
	sum := crc(p.inodeSeed(n), b)
	le.PutUint16(b[0x7C:], uint16(sum))
	le.PutUint16(b[0x82:], uint16(sum>>16))
	return nil
}

// encodeTime: 32 bits of seconds, and a word with two more bits and the nanoseconds.
func encodeTime(t time.Time) (low, extra uint32) {
	s := min(max(t.Unix(), math.MinInt32), 15032385535) // 2446-05-10
	epoch := (s - int64(int32(s))) >> 32
	return uint32(s), uint32(epoch)&3 | uint32(t.Nanosecond())<<2
}

func putHeader(b []byte, entries, most, depth int) {
	le.PutUint16(b, 0xF30A)
	le.PutUint16(b[2:], uint16(entries))
	le.PutUint16(b[4:], uint16(most))
	le.PutUint16(b[6:], uint16(depth))
}

func putExtents(b []byte, extents []extent, logical int64) int64 {
	for i, e := range extents {
		x := b[12*i:]
		le.PutUint32(x, uint32(logical))
		le.PutUint16(x[4:], uint16(e.length)) // 32768 stands for itself: more would mean unwritten
		le.PutUint16(x[6:], uint16(e.start>>32))
		le.PutUint32(x[8:], uint32(e.start))
		logical += e.length
	}
	return logical
}

// extentTree puts a file's extents into its inode, or into leaves that the inode leads to.
func (p *filling) extentTree(n *Node, b []byte) error {
	if len(n.extents) <= inlineLeaves {
		putHeader(b, len(n.extents), inlineLeaves, 0)
		putExtents(b[12:], n.extents, 0)
		return nil
	}
	leaves := slices.Collect(slices.Chunk(n.extents, leafExtents))
	if len(leaves) > inlineLeaves {
		return fault.New(fault.Exhausted, p.f.Name(), "a file of %d bytes lies in %d pieces", n.Size, len(n.extents))
	}
	putHeader(b, len(leaves), inlineLeaves, 1)
	logical := int64(0)
	for i, leaf := range leaves {
		at, err := p.allocate(1)
		if err != nil {
			return err
		}
		n.blocks++
		x := b[12+12*i:]
		le.PutUint32(x, uint32(logical))
		le.PutUint32(x[4:], uint32(at[0].start))
		le.PutUint16(x[8:], uint16(at[0].start>>32))
		block := make([]byte, BlockSize)
		putHeader(block, len(leaf), leafExtents, 0)
		logical = putExtents(block[12:], leaf, logical)
		le.PutUint32(block[BlockSize-4:], crc(p.inodeSeed(n), block[:BlockSize-4]))
		if err := p.write(at[0].start, block); err != nil {
			return err
		}
	}
	return nil
}

// xattr is an attribute as it lies on the disk.
type xattr struct {
	class byte
	name  string
	value []byte
}

// classes are what the beginning of an attribute's name becomes (fs/ext4/xattr.h).
var classes = []struct {
	prefix string
	class  byte
}{{"user.", 1}, {"trusted.", 4}, {"security.", 6}, {"system.", 7}}

// attributes writes a file's extended attributes to a block of their own.
func (p *filling) attributes(n *Node) error {
	if len(n.Xattrs) == 0 {
		return nil
	}
	var all []xattr
	for name, value := range n.Xattrs {
		x, err := newXattr(name, value)
		if err != nil {
			return err
		}
		all = append(all, x)
	}
	slices.SortFunc(all, func(a, b xattr) int {
		return cmp.Or(cmp.Compare(a.class, b.class), cmp.Compare(len(a.name), len(b.name)), strings.Compare(a.name, b.name))
	})
	block := make([]byte, BlockSize)
	at, end, total := 32, BlockSize, uint32(0)
	for _, x := range all {
		padded := (len(x.value) + 3) / 4 * 4
		entry := 16 + (len(x.name)+3)/4*4
		if at+entry+4 > end-padded {
			return fault.New(fault.Invalid, p.f.Name(), "a file has more than %d bytes of extended attributes", MaxXattrs)
		}
		end -= padded
		copy(block[end:], x.value)
		sum := uint32(0) // ext2fs_ext_attr_hash_entry
		for _, c := range []byte(x.name) {
			sum = sum<<5 ^ sum>>27 ^ uint32(c)
		}
		for i := 0; i < padded; i += 4 {
			sum = sum<<16 ^ sum>>16 ^ le.Uint32(block[end+i:])
		}
		b := block[at:]
		b[0], b[1] = byte(len(x.name)), x.class
		if len(x.value) > 0 {
			le.PutUint16(b[2:], uint16(end))
		}
		le.PutUint32(b[8:], uint32(len(x.value)))
		le.PutUint32(b[12:], sum)
		copy(b[16:], x.name)
		at += entry
		total = total<<16 ^ total>>16 ^ sum
	}
	where, err := p.allocate(1)
	if err != nil {
		return err
	}
	n.xattrAt = where[0].start
	n.blocks++
	le.PutUint32(block[0:], 0xEA020000)
	le.PutUint32(block[4:], 1) // inodes that share it
	le.PutUint32(block[8:], 1) // blocks
	le.PutUint32(block[12:], total)
	le.PutUint32(block[16:], crc(crc(p.seed, le.AppendUint64(nil, uint64(n.xattrAt))), block))
	return p.write(n.xattrAt, block)
}

func newXattr(name, value string) (xattr, error) {
	switch name {
	case "system.posix_acl_access", "system.posix_acl_default":
		acl, err := encodeACL(value)
		class := byte(2)
		if name == "system.posix_acl_default" {
			class = 3
		}
		return xattr{class: class, value: acl}, err
	}
	for _, c := range classes {
		if rest, ok := strings.CutPrefix(name, c.prefix); ok && rest != "" && len(rest) <= 255 {
			return xattr{c.class, rest, []byte(value)}, nil
		}
	}
	return xattr{}, fault.New(fault.Invalid, f255(name), "is no name of an extended attribute that ext4 knows")
}

// encodeACL turns the form of an access control list that system calls speak (linux/posix_acl_xattr.h) into
// that of the disk (fs/ext4/acl.h), which has ids only where they mean something.
func encodeACL(v string) ([]byte, error) {
	const entry = 8
	b := []byte(v)
	if len(b) < 4 || le.Uint32(b) != 2 || (len(b)-4)%entry != 0 {
		return nil, fault.New(fault.Invalid, "access control list", "is damaged")
	}
	out := le.AppendUint32(nil, 1)
	for e := range slices.Chunk(b[4:], entry) {
		out = append(out, e[:4]...)
		if tag := le.Uint16(e); tag == 2 || tag == 8 { // a named user or group
			out = append(out, e[4:8]...)
		}
	}
	return out, nil
}

// finish writes bitmaps, inode tables, group descriptors and the superblock.
func (p *filling) finish() error {
	var freeBlocks, freeInodes int64
	for g := range p.groups {
		d := p.desc(g)
		flags := le.Uint16(d[0x12:])
		free := int64(0)
		for i := range min(p.perGrp, p.total-g*p.perGrp) {
			if p.used[g][i/8]&(1<<(i%8)) == 0 {
				free++
			}
		}
		freeBlocks += free
		// A group that is as mke2fs left it keeps its bitmap unwritten.
		was := int64(le.Uint16(d[0xC:])) | int64(le.Uint16(d[0x2C:]))<<16
		if flags&blockUninit == 0 || free != was {
			flags &^= blockUninit
			if err := p.write(descBlock(d, 0, 0x20), p.used[g]); err != nil {
				return err
			}
			sum := crc(p.seed, p.used[g][:p.perGrp/8])
			le.PutUint16(d[0x18:], uint16(sum))
			le.PutUint16(d[0x38:], uint16(sum>>16))
		}
		le.PutUint16(d[0xC:], uint16(free))
		le.PutUint16(d[0x2C:], uint16(free>>16))

		inUse := min(max(p.last-g*p.inoGrp, 0), p.inoGrp)
		freeInodes += p.inoGrp - inUse
		if inUse > 0 {
			flags &^= inodeUninit
			if err := p.inodeGroup(g, d, inUse); err != nil {
				return err
			}
		}
		le.PutUint16(d[0x12:], flags)
		le.PutUint16(d[0x1E:], 0)
		le.PutUint16(d[0x1E:], uint16(crc(crc(p.seed, le.AppendUint32(nil, uint32(g))), d)))
	}
	if _, err := p.f.WriteAt(p.gdt, BlockSize); err != nil {
		return err
	}
	le.PutUint32(p.sb[0xC:], uint32(freeBlocks))
	le.PutUint32(p.sb[0x158:], uint32(freeBlocks>>32))
	le.PutUint32(p.sb[0x10:], uint32(freeInodes))
	le.PutUint32(p.sb[0x3FC:], checksum(p.sb[:0x3FC]))
	_, err := p.f.WriteAt(p.sb, 1024)
	return err
}

// inodeGroup writes the inodes of a group, of which the first are in use, and their bitmap.
func (p *filling) inodeGroup(g int64, d []byte, inUse int64) error {
	bitmap := bytes.Repeat([]byte{0xff}, BlockSize) // what lies beyond a group's inodes counts as used
	for i := inUse; i < p.inoGrp; i++ {
		bitmap[i/8] &^= 1 << (i % 8)
	}
	if err := p.write(descBlock(d, 4, 0x24), bitmap); err != nil {
		return err
	}
	sum := crc(p.seed, bitmap[:p.inoGrp/8])
	le.PutUint16(d[0x1A:], uint16(sum))
	le.PutUint16(d[0x3A:], uint16(sum>>16))
	le.PutUint16(d[0xE:], uint16(p.inoGrp-inUse))
	le.PutUint16(d[0x2E:], uint16((p.inoGrp-inUse)>>16))
	le.PutUint16(d[0x10:], uint16(p.dirs[g]))
	le.PutUint16(d[0x30:], uint16(p.dirs[g]>>16))
	le.PutUint16(d[0x1C:], uint16(p.inoGrp-inUse))
	le.PutUint16(d[0x32:], uint16((p.inoGrp-inUse)>>16))
	table, err := p.table(g)
	if err != nil {
		return err
	}
	_, err = p.f.WriteAt(table[:inUse*inodeSize], descBlock(d, 8, 0x28)*BlockSize)
	return err
}

// contentChunk is how much WriteContent reads at once.
const contentChunk = 256 << 10

var zeroBlock [BlockSize]byte

// WriteContent writes the content of a file that Populate has placed in f: exactly n.Size bytes of r. Blocks of
// zeros are left as holes of f. It returns how many bytes it wrote. Several may run at once, for different files.
// io.ErrUnexpectedEOF if r is shorter.
func (n *Node) WriteContent(f *os.File, r io.Reader) (written int64, err error) {
	return n.fill(f, r, n.Size)
}

func (n *Node) fill(f *os.File, r io.Reader, size int64) (written int64, err error) {
	buffer := make([]byte, min((size+BlockSize-1)/BlockSize*BlockSize, contentChunk))
	for _, e := range n.extents {
		for at, left := e.start*BlockSize, e.length*BlockSize; left > 0 && size > 0; {
			want := min(left, size, int64(len(buffer)))
			if _, err := io.ReadFull(r, buffer[:want]); err != nil {
				if errors.Is(err, io.EOF) {
					err = io.ErrUnexpectedEOF
				}
				return written, err
			}
			n, err := writeData(f, buffer[:want], at)
			written += n
			if err != nil {
				return written, err
			}
			at, left, size = at+want, left-want, size-want
		}
	}
	if size > 0 {
		return written, io.ErrShortWrite
	}
	return written, nil
}

// Content reads what was written to a file's blocks in f: n.Size bytes.
func (n *Node) Content(f *os.File) io.Reader {
	var parts []io.Reader
	for _, e := range n.extents {
		parts = append(parts, io.NewSectionReader(f, e.start*BlockSize, e.length*BlockSize))
	}
	return io.LimitReader(io.MultiReader(parts...), n.Size)
}

// writeData writes the blocks of b that are not all zero.
func writeData(f *os.File, b []byte, at int64) (written int64, err error) {
	for i := 0; i < len(b); {
		end := i
		for end < len(b) && !isZero(b[end:min(end+BlockSize, len(b))]) {
			end = min(end+BlockSize, len(b))
		}
		if end > i {
			if _, err := f.WriteAt(b[i:end], at+int64(i)); err != nil {
				return written, err
			}
			written += int64(end - i)
			i = end
			continue
		}
		i = min(i+BlockSize, len(b))
	}
	return written, nil
}

func isZero(b []byte) bool { return bytes.Equal(b, zeroBlock[:len(b)]) }
