package oci

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"os"
	"path"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Limits of a Linux filesystem, in bytes (path_resolution(7), ext4).
const (
	maxName   = 255
	maxTarget = 4095
	// maxXattrs is what one file's extended attributes may take together: ext4 keeps them in the inode and one
	// block of 4096 bytes, with a header and an entry for each.
	maxXattrs = 3900
)

// zstdWindow bounds the memory that a layer compressed by zstd takes to read (the format allows 3.75 TiB).
const zstdWindow = 128 << 20

// layer is one layer of an image: how to read it, and what is in it.
type layer struct {
	digest v1.Hash // of what open gives; zero in an archive of docker save
	diffID v1.Hash // of the tar inside
	size   int64   // of what open gives, in bytes
	open   func() (io.ReadCloser, error)
	blob   *blob // of a registry, nil elsewhere

	entries []entry
}

// entry is one member of a layer.
type entry struct {
	name   string // clean, without a leading slash; "" is the root
	kind   byte   // tar.TypeReg, TypeDir, TypeSymlink, TypeLink, TypeChar, TypeBlock, TypeFifo
	mode   int64  // permission bits with setuid, setgid and sticky
	uid    int
	gid    int
	mtime  time.Time
	size   int64
	link   string
	major  int64
	minor  int64
	xattrs map[string]string
	member int // which member of the tar it is, from 0
}

// bring makes the layer be here, checks it, and reads what is in it.
func (l *layer) bring(ctx context.Context, report *reporter, b *budget) error {
	if l.blob == nil {
		err := l.index(ctx, l.open, b)
		report.done.Add(l.size)
		return err
	}
	return l.blob.bring(ctx, report, func(path string) error {
		return l.index(ctx, func() (io.ReadCloser, error) { return os.Open(path) }, b)
	})
}

// index reads the layer once: both of its digests, and all but the content.
func (l *layer) index(ctx context.Context, open func() (io.ReadCloser, error), b *budget) error {
	f, err := open()
	if err != nil {
		return err
	}
	defer f.Close()
	l.entries = nil
	// The compressed bytes are hashed on the way, so that they are read once.
	compressed := sha256.New()
	in := io.TeeReader(bounded{ctx, f}, compressed)
	readErr := l.read(in, func(member int, h *tar.Header, _ io.Reader) error {
		if err := b.take(1, 0, 0); err != nil {
			return err
		}
		e, err := newEntry(h)
		if err != nil {
			return err
		}
		e.member = member
		n := int64(len(e.name) + len(e.link))
		for k, v := range e.xattrs {
			n += int64(len(k) + len(v))
		}
		l.entries = append(l.entries, e)
		return b.take(0, 0, n)
	}, func(n int64) error { return b.take(0, n, 0) })
	if fault.Is(readErr, fault.Exhausted) || ctx.Err() != nil {
		return readErr
	}
	// Of a layer that cannot be read it is told first that it is the wrong one.
	if l.digest != (v1.Hash{}) {
		if _, err := io.Copy(io.Discard, in); err != nil {
			return errors.Join(readErr, err)
		}
		if err := compare(compressed, l.digest, "layer"); err != nil {
			return err
		}
	}
	return readErr
}

// read decompresses the layer and calls visit for each member of the tar. At the end it checks that the tar
// was the one that the image's config names. count, unless nil, is told of decompressed bytes.
func (l *layer) read(in io.Reader, visit func(member int, h *tar.Header, content io.Reader) error, count func(int64) error) error {
	plain, closePlain, err := decompress(in)
	if err != nil {
		return l.damaged(err)
	}
	defer closePlain()
	sum := sha256.New()
	tee := &hashing{r: plain, h: sum, count: count}
	t := tar.NewReader(tee)
	for member := 0; ; member++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return l.damaged(err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := visit(member, h, t); err != nil {
			return l.damaged(err)
		}
	}
	// What follows the end of the archive is part of the digest.
	if _, err := io.Copy(io.Discard, tee); err != nil {
		return l.damaged(err)
	}
	return compare(sum, l.diffID, "layer's content")
}

func (l *layer) damaged(err error) error {
	var f *fault.Error
	if errors.As(err, &f) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	var path *os.PathError
	if errors.As(err, &path) {
		return err
	}
	return fault.Wrap(err, fault.Corrupt, "", "layer %s is damaged or cut short", l.diffID)
}

func compare(got hash.Hash, want v1.Hash, what string) error {
	if want.Algorithm != "sha256" {
		return fault.New(fault.Unsupported, "", "the digest of the image's %s is a %q, and only sha256 is known", what, want.Algorithm)
	}
	if sum := hex.EncodeToString(got.Sum(nil)); sum != want.Hex {
		return corrupt("the image's %s is not what its digest says: it is sha256:%s, and should be %s", what, sum, want)
	}
	return nil
}

// hashing hashes and counts what is read.
type hashing struct {
	r     io.Reader
	h     hash.Hash
	count func(int64) error
}

func (r *hashing) Read(b []byte) (int, error) {
	n, err := r.r.Read(b)
	r.h.Write(b[:n])
	if r.count != nil && n > 0 {
		if err := r.count(int64(n)); err != nil {
			return n, err
		}
	}
	return n, err
}

// decompress goes by the first bytes.
func decompress(in io.Reader) (io.Reader, func(), error) {
	buffered := bufio.NewReaderSize(in, 128<<10)
	magic, err := buffered.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case strings.HasPrefix(string(magic), "\x1f\x8b"):
		z, err := gzip.NewReader(buffered)
		if err != nil {
			return nil, nil, err
		}
		return z, func() { _ = z.Close() }, nil
	case string(magic) == "\x28\xb5\x2f\xfd":
		z, err := zstd.NewReader(buffered, zstd.WithDecoderMaxWindow(zstdWindow), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	case len(magic) == 0:
		return nil, nil, io.ErrUnexpectedEOF
	}
	return buffered, func() {}, nil
}

const xattrRecord = "SCHILY.xattr." // as GNU tar, bsdtar and Docker write them

// newEntry takes what counts of a header and refuses what no filesystem could hold.
func newEntry(h *tar.Header) (entry, error) {
	e := entry{name: cleanName(h.Name), kind: h.Typeflag, mode: h.Mode & 0o7777, uid: h.Uid, gid: h.Gid, mtime: h.ModTime, size: h.Size}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeRegA, tar.TypeCont, tar.TypeGNUSparse: //nolint:staticcheck // old archives have TypeRegA
		e.kind = tar.TypeReg
		// The first tar had no other way to say that a name is a directory's.
		if strings.HasSuffix(h.Name, "/") {
			e.kind, e.size = tar.TypeDir, 0
		}
	case tar.TypeDir, tar.TypeFifo:
		e.size = 0
	case tar.TypeSymlink:
		e.size, e.link = 0, h.Linkname
		if e.link == "" || len(e.link) > maxTarget || strings.ContainsRune(e.link, 0) {
			return e, corrupt("the symbolic link %q has a target of %d bytes", e.name, len(e.link))
		}
	case tar.TypeLink:
		e.size, e.link = 0, cleanName(h.Linkname)
	case tar.TypeChar, tar.TypeBlock:
		e.size, e.major, e.minor = 0, h.Devmajor, h.Devminor
		if e.major < 0 || e.major >= 1<<12 || e.minor < 0 || e.minor >= 1<<20 { // dev_t of the kernel
			return e, corrupt("the device %q has the number %d:%d", e.name, e.major, e.minor)
		}
	default:
		return e, fault.New(fault.Unsupported, "", "a layer holds %q, of a kind that is unknown (%q)", e.name, h.Typeflag)
	}
	const maxID = 1<<32 - 2 // -1 means no change to chown(2)
	if e.uid < 0 || e.uid > maxID || e.gid < 0 || e.gid > maxID {
		return e, corrupt("%q belongs to %d:%d", e.name, e.uid, e.gid)
	}
	for part := range strings.SplitSeq(e.name, "/") {
		if len(part) > maxName {
			return e, corrupt("a name in %q has %d bytes, and a filesystem takes %d", e.name[:maxName], len(part), maxName)
		}
	}
	if strings.ContainsRune(e.name, 0) {
		return e, corrupt("the name %q holds a zero byte", e.name)
	}
	size := 0
	for k, v := range h.PAXRecords {
		attribute, ok := strings.CutPrefix(k, xattrRecord)
		if !ok || !keepXattr(attribute) {
			continue
		}
		if e.xattrs == nil {
			e.xattrs = map[string]string{}
		}
		e.xattrs[attribute] = v
		size += 16 + len(attribute) + len(v) + 3
	}
	if size > maxXattrs {
		return e, fault.New(fault.Unsupported, "", "%q has extended attributes of %d bytes, and ext4 takes %d", e.name, size, maxXattrs)
	}
	return e, nil
}

// keepXattr leaves out what overlayfs keeps for itself: in the lower layer of a guest's root it would
// redirect and hide files.
func keepXattr(name string) bool {
	return name != "" && !strings.HasPrefix(name, "trusted.overlay.") && !strings.HasPrefix(name, "user.overlay.")
}

// cleanName takes a member's name as one within the root: "..", which would leave it, stays there.
func cleanName(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }
