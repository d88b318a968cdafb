// Package files owns how files travel between host and guest: the stream, and what either end does
// with its own files. Both ends run the same code; which of them sends is what the request says.
//
// A receiver never writes outside of the place it was given: names are single components, everything
// is opened below a directory that is held open (os.Root), no symbolic link is followed on the way, and
// what exists is replaced by rename, never written through. Sizes, depths and lengths are bounded, and a
// peer that is silent for too long is cut off. It never syncs a disk and knows no devices: what is neither file,
// directory nor symbolic link is left out with a warning.
//
// # The stream
//
// After the header and the agent's "ok" the host sends a Request. Then the sender sends frames (package
// frame), depth first:
//
//	entry     a file, directory, symbolic link, or another name of a file that came before and had a number
//	          (links.go); what follows up to "up" is inside a directory
//	attribute an extended attribute of the file or directory that is the next entry (attributes.go)
//	data      bytes of the file that was named last, one after the other
//	hole      a number of bytes (64 bits) of that file that are zero and take no room
//	up        the directory is complete
//	warning   why something was left out
//	end       that was all
//
// and the receiver answers with a Result, early if it cannot go on. A guest that sends and cannot begin
// answers with a Result instead.
package files

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
)

// The kinds of frames.
const (
	kindRequest = 'R'
	kindEntry   = 'E'
	kindData    = 'D'
	kindHole    = 'H'
	kindUp      = 'U'
	kindWarning = 'W'
	kindEnd     = 'Z'
	kindResult  = 'X'

	kindAttribute = 'A'
)

// Bounds of a stream.
const (
	maxName  = 255  // NAME_MAX of Linux's filesystems
	maxLink  = 4095 // PATH_MAX without its zero byte
	maxDepth = 256  // directories below each other; each is held open
	// maxResult bounds a result in bytes, maxWarnings the warnings in it.
	maxResult   = 32 << 10
	maxWarnings = 20
	// maxLeft is how much a sender may leave out before it counts as one that only keeps a receiver busy.
	maxLeft = 1 << 20
	// Silence is how long a side waits for the other to take or send anything: an emulated guest on a
	// busy host takes seconds for what costs a disk a moment.
	Silence = 2 * time.Minute
)

// Request is what a host asks of a guest.
type Request struct {
	Put  bool   `json:"put"`            // host to guest; else guest to host
	Path string `json:"path"`           // in the guest; relative to /root
	Name string `json:"name,omitempty"` // Put: what the source is called, if Path is a directory to put it into
	Options
}

// Options say what beside content, permissions and times of modification is kept.
type Options struct {
	Owners   bool `json:"owners,omitempty"`   // numbers of user and group; else whoever receives owns all
	Contents bool `json:"contents,omitempty"` // of a directory: what is in it goes into the destination, not itself
	// Progress counts while the copy goes on; nil: nobody looks.
	Progress *Progress `json:"-"`
}

// Progress is how far a copy has come. It may be read at any time.
type Progress struct {
	Files atomic.Int64 // files, directories and links that were begun
	Bytes atomic.Int64 // of content, without holes
}

// begun counts an entry.
func (p *Progress) begun() {
	if p != nil {
		p.Files.Add(1)
	}
}

// moved counts bytes of content.
func (p *Progress) moved(n int) {
	if p != nil {
		p.Bytes.Add(int64(n))
	}
}

// Result is how a copy went.
type Result struct {
	Failed   string   `json:"failed,omitempty"` // why it ended early
	Files    int64    `json:"files"`            // files, directories and symbolic links that were made or replaced
	Bytes    int64    `json:"bytes"`            // of content, without holes
	Warnings []string `json:"warnings,omitempty"`
	Left     int64    `json:"left,omitempty"` // how many warnings there were
}

// warn adds a warning. The first ones are kept, all are counted.
func (r *Result) warn(text string) {
	r.Left++
	if len(r.Warnings) < maxWarnings {
		r.Warnings = append(r.Warnings, boot.Printable(text))
	}
}

func (r Result) encode() []byte {
	r.Failed = boot.Printable(r.Failed)
	b, err := json.Marshal(r)
	if err != nil { // of strings and numbers there is none
		return []byte("{}")
	}
	return b
}

// parseResult reads a result that a guest sent: in its bounds, and nothing in it harms a terminal.
func parseResult(b []byte) (Result, error) {
	var r Result
	if len(b) > maxResult {
		return r, fmt.Errorf("a result of %d bytes", len(b))
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("the result is not JSON: %w", err)
	}
	if r.Files < 0 || r.Bytes < 0 || len(r.Warnings) > maxWarnings || r.Left < int64(len(r.Warnings)) {
		return r, errors.New("the result counts wrong")
	}
	r.Failed = boot.Printable(r.Failed)
	for i, w := range r.Warnings {
		r.Warnings[i] = boot.Printable(w)
	}
	return r, nil
}

// The kinds of entries.
const (
	file      = 'f'
	directory = 'd'
	symlink   = 'l'
	hardlink  = 'h'
)

// entry is one file, directory or symbolic link.
type entry struct {
	kind     byte
	mode     uint32 // permission bits with setuid, setgid and sticky, as stat(2) has them
	uid, gid uint32
	mtime    int64 // nanoseconds since 1970
	size     int64 // of a file
	name     string
	link     string // of a symbolic link; of a file that has other names, and of those, its number
}

func (e entry) append(b []byte) []byte {
	b = append(b, e.kind)
	b = binary.BigEndian.AppendUint32(b, e.mode)
	b = binary.BigEndian.AppendUint32(b, e.uid)
	b = binary.BigEndian.AppendUint32(b, e.gid)
	b = binary.BigEndian.AppendUint64(b, uint64(e.mtime))
	b = binary.BigEndian.AppendUint64(b, uint64(e.size))
	b = binary.BigEndian.AppendUint16(b, uint16(len(e.name)))
	b = append(b, e.name...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(e.link)))
	return append(b, e.link...)
}

// parseEntry reads and checks an entry of the peer's. Of a name it takes a single component only.
func parseEntry(b []byte) (entry, error) {
	const fixed = 1 + 3*4 + 2*8
	bad := errors.New("an entry that is cut short")
	if len(b) < fixed+2 {
		return entry{}, bad
	}
	e := entry{
		kind: b[0], mode: binary.BigEndian.Uint32(b[1:]), uid: binary.BigEndian.Uint32(b[5:]), gid: binary.BigEndian.Uint32(b[9:]),
		mtime: int64(binary.BigEndian.Uint64(b[13:])), size: int64(binary.BigEndian.Uint64(b[21:])),
	}
	var ok bool
	if e.name, b, ok = cutString(b[fixed:]); !ok {
		return entry{}, bad
	}
	if e.link, b, ok = cutString(b); !ok || len(b) > 0 {
		return entry{}, bad
	}
	switch {
	case e.name == "" || e.name == "." || e.name == ".." || len(e.name) > maxName || strings.ContainsAny(e.name, "/\x00"):
		return entry{}, fmt.Errorf("%q is no name of a file", e.name)
	case e.mode > 0o7777 || e.size < 0 || e.kind != file && e.size != 0:
		return entry{}, fmt.Errorf("%q with mode %o and size %d", e.name, e.mode, e.size)
	case e.kind == symlink && (e.link == "" || len(e.link) > maxLink || strings.ContainsRune(e.link, 0)):
		return entry{}, fmt.Errorf("%q is a link to %q", e.name, e.link)
	case e.kind == directory && e.link != "":
		return entry{}, fmt.Errorf("%q is no link and has a target", e.name)
	case e.kind == hardlink && e.link == "", (e.kind == file || e.kind == hardlink) && len(e.link) > maxNumber:
		return entry{}, fmt.Errorf("%q has other names, and the number %q", e.name, e.link)
	case e.kind != file && e.kind != directory && e.kind != symlink && e.kind != hardlink:
		return entry{}, fmt.Errorf("%q is of unknown kind %q", e.name, e.kind)
	}
	return e, nil
}

func cutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 2 {
		return "", nil, false
	}
	n := int(binary.BigEndian.Uint16(b))
	if len(b) < 2+n {
		return "", nil, false
	}
	return string(b[2 : 2+n]), b[2+n:], true
}
