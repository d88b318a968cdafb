package ext4

import (
	"encoding/binary"
	"encoding/hex"
	"io"
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
	// ReservedGDTBlocks is what resize_inode holds back for group descriptors.
	ReservedGDTBlocks int
}

// Clean says that the filesystem was unmounted in order and no error was recorded since.
func (s Superblock) Clean() bool { return s.Valid && !s.Errors && !s.NeedsRecovery }

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
	logSize := le.Uint32(b[0x18:])
	if logSize > 6 {
		return Superblock{}, fault.New(fault.Corrupt, subject, "claims an ext4 block size of 2^%d KiB", logSize)
	}
	compat, incompat := le.Uint32(b[0x5C:]), le.Uint32(b[0x60:])
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
		ReservedGDTBlocks: int(le.Uint16(b[0xCE:])),
	}
	if incompat&incompat64bit != 0 {
		s.Blocks |= int64(le.Uint32(b[0x150:])&0x7fffffff) << 32
		s.FreeBlocks |= int64(le.Uint32(b[0x158:])&0x7fffffff) << 32
	}
	if le.Uint32(b[0x64:])&roCompatMeta != 0 && le.Uint32(b[0x3FC:]) != checksum(b[:0x3FC]) {
		return Superblock{}, fault.New(fault.Corrupt, subject, "has an ext4 superblock with a wrong checksum")
	}
	return s, nil
}

func formatUUID(b []byte) string {
	h := hex.EncodeToString(b)
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}
