package ext4

import (
	"encoding/binary"
	"encoding/hex"
	"io"
	"math"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Feature bits that banger looks at, from the kernel's Documentation/filesystems/ext4/super.rst.
const (
	compatHasJournal  = 0x4
	compatResizeInode = 0x10

	incompatRecover = 0x4
	incompatMetaBG  = 0x10
	incompat64bit   = 0x80
	roCompatMeta    = 0x400
	roCompatOrphans = 0x10000

	stateValid  = 0x1
	stateErrors = 0x2
)

// Superblock is the part of an ext4 superblock that banger decides by. Sizes are in blocks of
// BlockSize bytes.
type Superblock struct {
	BlockSize   int64
	Blocks      int64
	FreeBlocks  int64
	Inodes      int64
	FreeInodes  int64
	UUID        string // 8-4-4-4-12, lower case
	Label       string
	Journal     bool
	ResizeInode bool
	MetaBG      bool
	// Valid is the flag that unmounting sets and mounting clears.
	Valid bool
	// Errors is set by the kernel when it found the filesystem inconsistent.
	Errors bool
	// NeedsRecovery says that the journal holds transactions that are not replayed.
	NeedsRecovery bool
	// Orphans says that files were deleted while open, and not cleaned up by an unmount.
	Orphans bool
	// GrowLimit is the size in bytes up to which the kernel grows it online with the descriptors that
	// resize_inode reserves; the present size without that (kernels that convert to meta_bg go further).
	GrowLimit int64
	// ReservedGDTBlocks is what resize_inode holds back for group descriptors.
	ReservedGDTBlocks int
}

// Clean says that the filesystem was unmounted in order and no error was recorded since.
func (s Superblock) Clean() bool { return s.Valid && !s.Errors && !s.NeedsRecovery && !s.Orphans }

// Bytes is the size of the filesystem, which may be less than that of the file that holds it.
func (s Superblock) Bytes() int64 { return s.Blocks * s.BlockSize }

// ReadSuperblock reads the primary superblock, at byte 1024 of r. What is not an ext2, ext3 or ext4
// filesystem, or claims impossible sizes, is fault.Corrupt about subject.
func ReadSuperblock(r io.ReaderAt, subject string) (Superblock, error) {
	var b [1024]byte
	if n, err := r.ReadAt(b[:], 1024); n < len(b) {
		return Superblock{}, fault.Wrap(err, fault.Corrupt, subject, "is too short to hold an ext4 filesystem")
	}
	le := binary.LittleEndian
	if le.Uint16(b[0x38:]) != 0xEF53 {
		return Superblock{}, fault.New(fault.Corrupt, subject, "holds no ext4 filesystem")
	}
	logSize, perGroup := le.Uint32(b[0x18:]), int64(le.Uint32(b[0x20:]))
	if logSize > 6 || perGroup == 0 {
		return Superblock{}, fault.New(fault.Corrupt, subject, "claims an ext4 block size of 2^%d KiB in groups of %d", logSize, perGroup)
	}
	compat, incompat, roCompat := le.Uint32(b[0x5C:]), le.Uint32(b[0x60:]), le.Uint32(b[0x64:])
	s := Superblock{
		BlockSize:         1024 << logSize,
		Blocks:            int64(le.Uint32(b[0x4:])),
		FreeBlocks:        int64(le.Uint32(b[0xC:])),
		Inodes:            int64(le.Uint32(b[0x0:])),
		FreeInodes:        int64(le.Uint32(b[0x10:])),
		UUID:              formatUUID(b[0x68:0x78]),
		Label:             strings.TrimRight(string(b[0x78:0x88]), "\x00"),
		Journal:           compat&compatHasJournal != 0,
		ResizeInode:       compat&compatResizeInode != 0,
		MetaBG:            incompat&incompatMetaBG != 0,
		Valid:             le.Uint16(b[0x3A:])&stateValid != 0,
		Errors:            le.Uint16(b[0x3A:])&stateErrors != 0,
		NeedsRecovery:     incompat&incompatRecover != 0,
		Orphans:           roCompat&roCompatOrphans != 0 || le.Uint32(b[0xE8:]) != 0,
		ReservedGDTBlocks: int(le.Uint16(b[0xCE:])),
	}
	descSize := int64(32)
	if incompat&incompat64bit != 0 {
		if le.Uint32(b[0x150:])>>16 != 0 {
			return Superblock{}, fault.New(fault.Corrupt, subject, "claims more blocks than ext4 can have")
		}
		s.Blocks |= int64(le.Uint32(b[0x150:])) << 32
		s.FreeBlocks |= int64(le.Uint32(b[0x158:])&0xffff) << 32
		descSize = max(descSize, int64(le.Uint16(b[0xFE:])))
	}
	if s.Blocks > math.MaxInt64/s.BlockSize {
		return Superblock{}, fault.New(fault.Corrupt, subject, "claims more bytes than a file can have")
	}
	if roCompat&roCompatMeta != 0 && le.Uint32(b[0x3FC:]) != checksum(b[:0x3FC]) {
		return Superblock{}, fault.New(fault.Corrupt, subject, "has an ext4 superblock with a wrong checksum")
	}
	s.GrowLimit = s.Bytes()
	if perBlock := s.BlockSize / descSize; s.ResizeInode && perBlock > 0 && s.Blocks < 1<<40 && perGroup <= 8*s.BlockSize {
		groups := (s.Blocks + perGroup - 1) / perGroup
		used := (groups + perBlock - 1) / perBlock
		s.GrowLimit = max(s.GrowLimit, (used+int64(s.ReservedGDTBlocks))*perBlock*perGroup*s.BlockSize)
	}
	return s, nil
}

func formatUUID(b []byte) string {
	h := hex.EncodeToString(b)
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}
