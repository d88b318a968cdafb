package kernel

import (
	"bytes"
	"fmt"
	"strconv"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// File types and the archive's shape, from the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
const (
	modeDir    = 0o040000
	modeFile   = 0o100000
	modeDevice = 0o020000
	modeType   = 0o170000

	cpioMagic   = "070701"
	cpioHeader  = 110
	cpioTrailer = "TRAILER!!!"
)

// entry is one member of a newc archive; name has no leading slash.
type entry struct {
	name         string
	mode         uint32
	major, minor uint32 // of a device node
	content      []byte
}

// cpioSize is the length of the archive that appendCPIO makes, so that it is allocated once.
func cpioSize(entries []entry) int {
	n := cpioHeader + len(cpioTrailer) + 8
	for _, e := range entries {
		n += cpioHeader + len(e.name) + len(e.content) + 8
	}
	return n
}

// appendCPIO appends an archive of the entries to b, which must end on a multiple of 4. Inode
// numbers count from 1, times and owners are zero: the same entries give the same bytes.
func appendCPIO(b []byte, entries []entry) []byte {
	for i, e := range append(entries[:len(entries):len(entries)], entry{name: cpioTrailer}) {
		ino, links := i+1, 1
		if e.name == cpioTrailer {
			ino = 0
		}
		if e.mode&modeType == modeDir {
			links = 2
		}
		// ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
		b = fmt.Appendf(b, "%s%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", cpioMagic,
			ino, e.mode, 0, 0, links, 0, len(e.content), 0, 0, e.major, e.minor, len(e.name)+1, 0)
		b = append(b, e.name...)
		b = pad4(append(b, 0))
		b = pad4(append(b, e.content...))
	}
	return b
}

func pad4(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// parseCPIO reads the archive at the start of b. Contents share b's memory. What is not a whole newc archive is
// fault.Corrupt.
func parseCPIO(b []byte, subject string) ([]entry, error) {
	var out []entry
	for at := 0; ; {
		if len(b)-at < cpioHeader || !bytes.HasPrefix(b[at:], []byte(cpioMagic)) {
			return nil, fault.New(fault.Corrupt, subject, "is no cpio archive, or one that is cut short")
		}
		var field [13]uint32
		for i := range field {
			v, err := strconv.ParseUint(string(b[at+6+8*i:at+14+8*i]), 16, 32)
			if err != nil {
				return nil, fault.Wrap(err, fault.Corrupt, subject, "holds a damaged cpio header")
			}
			field[i] = uint32(v)
		}
		nameStart := at + cpioHeader
		nameEnd := nameStart + int(field[11])
		start := align4(nameEnd)
		end := start + int(field[6])
		if field[11] == 0 || end > len(b) || start > end {
			return nil, fault.New(fault.Corrupt, subject, "is a cpio archive that is cut short")
		}
		e := entry{
			name: string(b[nameStart : nameEnd-1]), mode: field[1],
			major: field[9], minor: field[10], content: b[start:end:end],
		}
		if e.name == cpioTrailer {
			return out, nil
		}
		out = append(out, e)
		at = align4(end)
	}
}

func align4(n int) int { return (n + 3) &^ 3 }
