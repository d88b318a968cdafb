package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/frame"
)

// batch is how many bytes of frames are collected before they are sent: small files share a write.
// It is the memory that sending takes.
const batch = 256 << 10

// sender sends one tree.
type sender struct {
	w        io.Writer
	buffer   []byte // frames not sent yet
	progress *Progress

	links   map[inode]*linked // files whose other names have not come yet
	numbers int64             // how many got one
}

// source is an open place that can be sent.
type source struct {
	f    *os.File
	info fs.FileInfo
	made []byte // of sizeless; nil: it has the size that it says
	name string
}

// openSource opens what is to be sent; a symbolic link that was named is followed, those below are not.
func openSource(path string) (*source, error) {
	// Non-blocking: a FIFO would wait for somebody to write into it.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.IsDir() && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: is neither a file nor a directory", path)
	}
	var made []byte
	if err == nil && info.Mode().IsRegular() {
		if made, err = sizeless(f, info); err != nil {
			err = fmt.Errorf("%s: %w", path, err)
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	name := filepath.Base(path)
	if name == "/" || name == "." || name == ".." {
		name = "root" // the receiver has a name of its own for it
	}
	return &source{f: f, info: info, made: made, name: name}, nil
}

// send sends a source and the end.
func send(w io.Writer, s *source, p *Progress) error {
	out := &sender{w: w, buffer: make([]byte, 0, batch), progress: p}
	var err error
	if s.info.IsDir() {
		var root *os.Root
		if root, err = os.OpenRoot(s.f.Name()); err == nil {
			err = out.directory(root, s.name, s.name, 0)
			_ = root.Close()
		}
	} else {
		err = out.file(s.f, s.info, s.made, s.name, s.name)
	}
	if err != nil {
		return err
	}
	if err := out.frame(kindEnd, nil); err != nil {
		return err
	}
	return out.flush()
}

func entryOf(info fs.FileInfo, kind byte, name string) entry {
	e := entry{kind: kind, name: name, mode: uint32(info.Mode().Perm()), mtime: info.ModTime().UnixNano()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		e.mode, e.uid, e.gid = st.Mode&0o7777, st.Uid, st.Gid
	}
	if kind == file {
		e.size = info.Size()
	}
	return e
}

// directory sends an open directory. where is its path for warnings.
func (s *sender) directory(root *os.Root, name, where string, depth int) error {
	info, err := root.Stat(".")
	if err != nil {
		return s.warning("%s: %v", where, err)
	}
	if depth == maxDepth {
		return s.warning("%s: more than %d directories below each other", where, maxDepth)
	}
	d, err := root.Open(".")
	if err != nil {
		return s.warning("%s: %v", where, err)
	}
	defer d.Close()
	if err := s.attributes(int(d.Fd()), where); err != nil {
		return err
	}
	if err := s.entry(entryOf(info, directory, name)); err != nil {
		return err
	}
	for {
		names, err := d.Readdirnames(1000) // an agent has little memory, a directory may be large
		for _, name := range names {
			if err := s.child(root, name, where+"/"+name, depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			if err := s.warning("%s: %v", where, err); err != nil {
				return err
			}
			break
		}
	}
	return s.frame(kindUp, nil)
}

// child sends what is in a directory under a name. What cannot be read is a warning.
func (s *sender) child(root *os.Root, name, where string, depth int) error {
	info, err := root.Lstat(name)
	if err != nil {
		return s.warning("%s: %v", where, err)
	}
	switch mode := info.Mode(); {
	case mode.IsDir():
		sub, err := root.OpenRoot(name)
		if err != nil {
			return s.warning("%s: %v", where, err)
		}
		defer sub.Close()
		return s.directory(sub, name, where, depth+1)
	case mode&fs.ModeSymlink != 0:
		link, err := root.Readlink(name)
		if err != nil {
			return s.warning("%s: %v", where, err)
		}
		e := entryOf(info, symlink, name)
		e.link = link
		return s.entry(e)
	case mode.IsRegular():
		f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if err != nil {
			return s.warning("%s: %v", where, err)
		}
		defer f.Close()
		if info, err = f.Stat(); err != nil || !info.Mode().IsRegular() {
			return s.warning("%s: was replaced while it was copied", where)
		}
		made, err := sizeless(f, info)
		if err != nil {
			return s.warning("%s: %v", where, err)
		}
		return s.file(f, info, made, name, where)
	}
	return s.warning("%s: is neither a file, a directory nor a symbolic link", where)
}

// file sends an open file, and if it is sizeless with what was read of it: of what is declared neither more nor less, whatever happens to it meanwhile.
func (s *sender) file(f *os.File, info fs.FileInfo, made []byte, name, where string) error {
	e := entryOf(info, file, name)
	number, first := s.other(info)
	if number != "" {
		e.kind, e.size, e.link = hardlink, 0, number
		return s.entry(e)
	}
	e.link = first
	fd := int(f.Fd())
	st, ok := info.Sys().(*syscall.Stat_t)
	sparse := ok && st.Blocks*512 < e.size
	if made != nil {
		return s.made(fd, e, made, where)
	}
	if err := s.attributes(fd, where); err != nil {
		return err
	}
	if err := s.entry(e); err != nil {
		return err
	}
	for at := int64(0); at < e.size; {
		end := e.size
		if sparse {
			// ENXIO: no more data. A filesystem without the notion says that all is data.
			data, err := unix.Seek(fd, at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				data, err = e.size, nil
			}
			if err == nil && data > at {
				data = min(data, e.size)
				if err := s.hole(data - at); err != nil {
					return err
				}
				at = data
				continue
			}
			if hole, err := unix.Seek(fd, at, unix.SEEK_HOLE); err == nil && hole > at {
				end = min(end, hole)
			}
		}
		for at < end {
			n, err := s.data(fd, at, end-at)
			at += int64(n)
			if n > 0 && err == nil {
				continue
			}
			if n < 0 {
				return err
			}
			// It became shorter, or cannot be read: the rest is zero, and that is said.
			if err == nil {
				err = errors.New("became shorter while it was copied")
			}
			return errors.Join(s.hole(e.size-at), s.warning("%s: %v", where, err))
		}
	}
	return nil
}

// The kernel makes what is in a file of /proc or /sys when it is read: the one says that it has no size, the other that it has a page
// (proc(5), sysfs(5)).
const (
	maxPage     = 64 << 10 // of any architecture
	maxSizeless = 1 << 20  // is read of one; it is held in memory
)

// sizeless reads such a file to its end. Of one that says the truth it returns nothing.
func sizeless(f *os.File, info fs.FileInfo) ([]byte, error) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if size := info.Size(); size > maxPage || size > 0 && (!ok || st.Blocks > 0) {
		return nil, nil
	}
	content, err := readAll(int(f.Fd()))
	if int64(len(content)) == info.Size() {
		content = nil
	}
	return content, err
}

func readAll(fd int) ([]byte, error) {
	content := []byte{}
	part := make([]byte, 4<<10)
	for {
		n, err := unix.Pread(fd, part, int64(len(content)))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, err
		case n == 0:
			return content, nil
		case len(content)+n > maxSizeless:
			return nil, fmt.Errorf("does not say how much is in it, and it is more than %d bytes", maxSizeless)
		default:
			content = append(content, part[:n]...)
		}
	}
}

// made sends a file with the content that was read of it.
func (s *sender) made(fd int, e entry, content []byte, where string) error {
	if err := s.attributes(fd, where); err != nil {
		return err
	}
	e.size = int64(len(content))
	if err := s.entry(e); err != nil {
		return err
	}
	for len(content) > 0 {
		part := content[:min(len(content), batch/2)]
		if err := s.frame(kindData, part); err != nil {
			return err
		}
		s.progress.moved(len(part))
		content = content[len(part):]
	}
	return nil
}

// data sends up to n bytes at an offset, read right behind their header. A negative count is an error
// of the stream, any other error one of the file.
func (s *sender) data(fd int, at, n int64) (int, error) {
	most := int64(cap(s.buffer) - len(s.buffer) - frame.HeaderSize)
	if most < min(n, batch/2) {
		if err := s.flush(); err != nil {
			return -1, err
		}
		most = int64(cap(s.buffer) - frame.HeaderSize)
	}
	begin := len(s.buffer)
	room := s.buffer[begin : begin+frame.HeaderSize+int(min(n, most))]
	var got int
	var err error
	for {
		got, err = unix.Pread(fd, room[frame.HeaderSize:], at)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if got <= 0 {
		return 0, err
	}
	frame.PutHeader(room, kindData, got)
	s.buffer = s.buffer[:begin+frame.HeaderSize+got]
	s.progress.moved(got)
	return got, nil
}

func (s *sender) hole(n int64) error {
	if n <= 0 {
		return nil
	}
	return s.frame(kindHole, binary.BigEndian.AppendUint64(nil, uint64(n)))
}

func (s *sender) entry(e entry) error {
	s.progress.begun()
	return s.frame(kindEntry, e.append(nil))
}

func (s *sender) warning(format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	return s.frame(kindWarning, []byte(strings.ToValidUTF8(text[:min(len(text), 1024)], "")))
}

func (s *sender) frame(kind byte, payload []byte) error {
	if len(s.buffer)+frame.HeaderSize+len(payload) > cap(s.buffer) {
		if err := s.flush(); err != nil {
			return err
		}
	}
	begin := len(s.buffer)
	s.buffer = s.buffer[:begin+frame.HeaderSize]
	frame.PutHeader(s.buffer[begin:], kind, len(payload))
	s.buffer = append(s.buffer, payload...)
	return nil
}

func (s *sender) flush() error {
	_, err := s.w.Write(s.buffer)
	s.buffer = s.buffer[:0]
	return err
}
