package ext4

import (
	"encoding/binary"
	"errors"
	"io"
	"path"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Feature bits that decide whether Reader can read a filesystem.
const (
	incompatFiletype   = 0x2
	incompatExtents    = 0x40
	incompatFlexBG     = 0x200
	incompatEAInode    = 0x400
	incompatCsumSeed   = 0x2000
	incompatLargeDir   = 0x4000
	incompatReadable   = incompatFiletype | incompatExtents | incompat64bit | incompatFlexBG | incompatEAInode | incompatCsumSeed | incompatLargeDir | incompatMMP
	incompatMMP        = 0x100
	inodeExtents       = 0x80000
	extentMagic        = 0xF30A
	rootInode          = 2
	modeType           = 0xF000
	modeDirectory      = 0x4000
	modeRegular        = 0x8000
	modeSymlink        = 0xA000
	maxSymlinks        = 40
	maxDirectory       = 16 << 20 // bytes of one directory that are looked at
	maxExtentDepth     = 5        // of the format
	maxSymlinkTarget   = 4096
	fastSymlinkBytes   = 60
	maxBlocksOfOneFile = maxDirectory / 1024
)

// ErrUnreadable says that a filesystem uses features of ext4 that Reader does not know. It may well be sound.
var ErrUnreadable = errors.New("the filesystem uses features that are not known here")

// Reader looks into an ext4 filesystem that nobody writes, without mounting it: a filesystem that somebody else made
// never meets the host's kernel. It trusts nothing that it reads. Use it by one goroutine at a time.
type Reader struct {
	r         io.ReaderAt
	subject   string
	sb        Superblock
	perGroup  uint32 // inodes
	inodeSize int64
	descSize  int64
	descStart int64 // byte at which the group descriptors begin
	firstData int64
}

// File is what Reader tells of a file, which a symbolic link was followed to.
type File struct {
	Path string // without symbolic links
	Mode uint16 // type and permissions, as stat(2) has them
	Size int64

	inode inode
}

// Regular says whether it is a regular file.
func (f File) Regular() bool { return f.Mode&modeType == modeRegular }

// Executable says whether somebody may execute it.
func (f File) Executable() bool { return f.Mode&0o111 != 0 }

type inode struct {
	mode  uint16
	flags uint32
	size  int64
	block [60]byte
}

// NewReader reads the superblock of r. fault.Corrupt if that is none, ErrUnreadable in the chain if it uses what
// Reader does not know.
func NewReader(r io.ReaderAt, subject string) (*Reader, error) {
	sb, err := ReadSuperblock(r, subject)
	if err != nil {
		return nil, err
	}
	var b [1024]byte
	if _, err := r.ReadAt(b[:], 1024); err != nil {
		return nil, fault.Wrap(err, fault.Corrupt, subject, "cannot be read")
	}
	le := binary.LittleEndian
	if incompat := le.Uint32(b[0x60:]) &^ incompatRecover; incompat&^incompatReadable != 0 {
		return nil, fault.Wrap(ErrUnreadable, fault.Unsupported, subject, "cannot be looked into")
	}
	out := &Reader{r: r, subject: subject, sb: sb, perGroup: le.Uint32(b[0x28:]), inodeSize: int64(le.Uint16(b[0x58:])), descSize: 32, firstData: int64(le.Uint32(b[0x14:]))}
	if le.Uint32(b[0x4C:]) == 0 { // revision 0
		out.inodeSize = 128
	}
	if le.Uint32(b[0x60:])&incompat64bit != 0 {
		out.descSize = max(32, int64(le.Uint16(b[0xFE:])))
	}
	out.descStart = (out.firstData + 1) * sb.BlockSize
	if out.perGroup == 0 || out.inodeSize < 128 || out.inodeSize > sb.BlockSize || out.descSize > 1024 || out.firstData > 1 {
		return nil, out.damaged(nil)
	}
	return out, nil
}

func (r *Reader) damaged(cause error) error {
	return fault.Wrap(cause, fault.Corrupt, r.subject, "its filesystem is damaged").WithHint("check it: e2fsck -f %s", r.subject)
}

// Superblock is what NewReader read.
func (r *Reader) Superblock() Superblock { return r.sb }

func (r *Reader) readAt(b []byte, at int64) error {
	if at < 0 || at+int64(len(b)) > r.sb.Bytes() {
		return r.damaged(nil)
	}
	if _, err := r.r.ReadAt(b, at); err != nil {
		return r.damaged(err)
	}
	return nil
}

func (r *Reader) inode(n uint32) (inode, error) {
	if n == 0 || int64(n) > r.sb.Inodes {
		return inode{}, r.damaged(nil)
	}
	group, index := (n-1)/r.perGroup, (n-1)%r.perGroup
	desc := make([]byte, r.descSize)
	if err := r.readAt(desc, r.descStart+int64(group)*r.descSize); err != nil {
		return inode{}, err
	}
	le := binary.LittleEndian
	table := int64(le.Uint32(desc[8:]))
	if r.descSize >= 64 {
		table |= int64(le.Uint32(desc[0x28:])) << 32
	}
	if table > r.sb.Blocks {
		return inode{}, r.damaged(nil)
	}
	var b [128]byte
	if err := r.readAt(b[:], table*r.sb.BlockSize+int64(index)*r.inodeSize); err != nil {
		return inode{}, err
	}
	i := inode{mode: le.Uint16(b[0:]), flags: le.Uint32(b[0x20:]), size: int64(le.Uint32(b[4:])) | int64(le.Uint32(b[0x6C:]))<<32}
	copy(i.block[:], b[0x28:0x64])
	if i.size < 0 {
		return inode{}, r.damaged(nil)
	}
	return i, nil
}

// content reads the first bytes of a file, at most limit. Holes are zeroes.
func (r *Reader) content(i inode, limit int64) ([]byte, error) {
	out := make([]byte, min(i.size, limit))
	if i.flags&inodeExtents == 0 {
		return out, r.mapped(i, out)
	}
	return out, r.extents(i.block[:], out, maxExtentDepth, new(int))
}

// mapped reads through the block map of ext2 and ext3: twelve blocks, then one of block numbers.
func (r *Reader) mapped(i inode, out []byte) error {
	le := binary.LittleEndian
	perBlock := r.sb.BlockSize / 4
	indirect := make([]byte, r.sb.BlockSize)
	have := false
	for n := int64(0); n*r.sb.BlockSize < int64(len(out)); n++ {
		var block int64
		switch {
		case n < 12:
			block = int64(le.Uint32(i.block[n*4:]))
		case n < 12+perBlock:
			if !have {
				if err := r.readAt(indirect, int64(le.Uint32(i.block[48:]))*r.sb.BlockSize); err != nil {
					return err
				}
				have = true
			}
			block = int64(le.Uint32(indirect[(n-12)*4:]))
		default:
			return fault.Wrap(ErrUnreadable, fault.Unsupported, r.subject, "cannot be looked into")
		}
		if block == 0 {
			continue
		}
		if err := r.readAt(out[n*r.sb.BlockSize:min(int64(len(out)), (n+1)*r.sb.BlockSize)], block*r.sb.BlockSize); err != nil {
			return err
		}
	}
	return nil
}

// extents reads what one node of an extent tree maps. visited bounds the nodes that a damaged tree makes us read.
func (r *Reader) extents(node, out []byte, depth int, visited *int) error {
	le := binary.LittleEndian
	if *visited++; le.Uint16(node) != extentMagic || depth < 0 || *visited > maxBlocksOfOneFile {
		return r.damaged(nil)
	}
	entries, leaf := int(le.Uint16(node[2:])), le.Uint16(node[6:]) == 0
	if 12+entries*12 > len(node) {
		return r.damaged(nil)
	}
	for e := range entries {
		x := node[12+e*12:]
		from := int64(le.Uint32(x)) * r.sb.BlockSize
		if from >= int64(len(out)) {
			break // in the order of the file
		}
		if !leaf {
			next := make([]byte, r.sb.BlockSize)
			if err := r.readAt(next, (int64(le.Uint32(x[4:]))|int64(le.Uint16(x[8:]))<<32)*r.sb.BlockSize); err != nil {
				return err
			}
			if err := r.extents(next, out, depth-1, visited); err != nil {
				return err
			}
			continue
		}
		length := int64(le.Uint16(x[4:]))
		if length > 32768 {
			continue // allocated, never written: zeroes
		}
		block := int64(le.Uint32(x[8:])) | int64(le.Uint16(x[6:]))<<32
		to := min(int64(len(out)), from+length*r.sb.BlockSize)
		if err := r.readAt(out[from:to], block*r.sb.BlockSize); err != nil {
			return err
		}
	}
	return nil
}

// entry looks a name up in a directory. A directory with an index reads as one without: its inner nodes look like
// empty entries.
func (r *Reader) entry(dir inode, name string) (uint32, error) {
	if dir.size > maxDirectory {
		return 0, fault.Wrap(ErrUnreadable, fault.Unsupported, r.subject, "cannot be looked into")
	}
	b, err := r.content(dir, dir.size)
	if err != nil {
		return 0, err
	}
	le := binary.LittleEndian
	for at := 0; at+8 <= len(b); {
		length := int(le.Uint16(b[at+4:]))
		if length < 8 || at+length > len(b) {
			return 0, r.damaged(nil)
		}
		n := int(b[at+6])
		if 8+n > length {
			return 0, r.damaged(nil)
		}
		if inode := le.Uint32(b[at:]); inode != 0 && string(b[at+8:at+8+n]) == name {
			return inode, nil
		}
		at += length
	}
	return 0, fault.New(fault.NotFound, name, "is not in the filesystem")
}

// Lookup finds a file by its absolute path and follows symbolic links, which never lead out of the filesystem.
// fault.NotFound, fault.Corrupt.
func (r *Reader) Lookup(name string) (File, error) {
	left := strings.Split(strings.Trim(path.Clean("/"+name), "/"), "/")
	at, done := []uint32{rootInode}, []string{}
	links := 0
	for len(left) > 0 {
		part := left[0]
		left = left[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			if len(done) > 0 {
				at, done = at[:len(at)-1], done[:len(done)-1]
			}
			continue
		}
		dir, err := r.inode(at[len(at)-1])
		if err != nil {
			return File{}, err
		}
		if dir.mode&modeType != modeDirectory {
			return File{}, fault.New(fault.NotFound, name, "is not in the filesystem")
		}
		n, err := r.entry(dir, part)
		if err != nil {
			return File{}, err
		}
		i, err := r.inode(n)
		if err != nil {
			return File{}, err
		}
		if i.mode&modeType != modeSymlink {
			at, done = append(at, n), append(done, part)
			continue
		}
		if links++; links > maxSymlinks {
			return File{}, fault.New(fault.NotFound, name, "is a loop of symbolic links")
		}
		target, err := r.target(i)
		if err != nil {
			return File{}, err
		}
		if strings.HasPrefix(target, "/") {
			at, done = at[:1], done[:0]
		}
		left = append(strings.Split(target, "/"), left...)
	}
	i, err := r.inode(at[len(at)-1])
	if err != nil {
		return File{}, err
	}
	return File{Path: "/" + strings.Join(done, "/"), Mode: i.mode, Size: i.size, inode: i}, nil
}

// target is where a symbolic link leads: short ones lie in the inode itself.
func (r *Reader) target(i inode) (string, error) {
	if i.size > maxSymlinkTarget {
		return "", r.damaged(nil)
	}
	if i.size < fastSymlinkBytes && i.flags&inodeExtents == 0 {
		return string(i.block[:i.size]), nil
	}
	b, err := r.content(i, maxSymlinkTarget)
	return string(b), err
}

// Head returns the first bytes of a file, at most n.
func (r *Reader) Head(f File, n int64) ([]byte, error) { return r.content(f.inode, n) }
