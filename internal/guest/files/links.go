package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Hard links inside of one tree stay links. The sender gives a file that has several names a number of its own choice, in the
// entry's link field; what comes later under another name is an entry of kind hardlink with that number. So a receiver
// links to nothing but files that it has made itself in this copy.
const (
	maxNumber = 20 // bytes
	// maxLinks bounds the files whose other names are waited for, on both ends: they are remembered. A sender gives no
	// more numbers while it has so many.
	maxLinks = 1 << 16
	// maxPaths bounds the bytes of what a receiver remembers of them.
	maxPaths = 16 << 20
)

// inode is a file of the sender's.
type inode struct{ dev, ino uint64 }

// linked is a file that has been sent, and how many of its names have not been.
type linked struct {
	number string
	left   uint64
}

// other says whether a file that is to be sent has been, under another name, and gives its number. first is the number for one that has
// not, "" if it has no other name.
func (s *sender) other(info fs.FileInfo) (number, first string) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Nlink < 2 {
		return "", ""
	}
	key := inode{st.Dev, st.Ino}
	if l := s.links[key]; l != nil {
		if l.left--; l.left == 0 {
			delete(s.links, key)
		}
		return l.number, ""
	}
	if len(s.links) >= maxLinks {
		return "", ""
	}
	if s.links == nil {
		s.links = map[inode]*linked{}
	}
	s.numbers++
	first = strconv.FormatInt(s.numbers, 10)
	s.links[key] = &linked{number: first, left: st.Nlink - 1}
	return "", first
}

// here is the path of a name in the directory that is being filled, below the top one.
func (in *receiver) here(name string) string {
	p := ""
	for _, d := range in.dirs[1:] {
		p = path.Join(p, d.name)
	}
	return path.Join(p, name)
}

// remember keeps where a file with a number is.
func (in *receiver) remember(e entry) {
	if e.link == "" {
		return
	}
	p := in.here(e.name)
	if in.paths += len(p); len(in.numbered) >= maxLinks || in.paths > maxPaths {
		return
	}
	if in.numbered == nil {
		in.numbered = map[string]string{}
	}
	in.numbered[e.link] = p
}

// hardlink gives a file that was made before another name. Where the filesystem cannot, the file is copied.
func (in *receiver) hardlink(root *os.Root, e entry) error {
	from, known := in.numbered[e.link]
	if !known {
		return fmt.Errorf("%w: %q is a link to number %q, which did not come", errForm, e.name, e.link)
	}
	as := e.name
	if _, err := root.Lstat(as); err == nil {
		if err := replaceable(root, e.name); err != nil {
			return err
		}
		as = temporary()
	}
	top := in.dirs[0].root
	err := top.Link(from, in.here(as))
	if err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) {
		err = in.copyOf(top, from, root, as, e)
	}
	if err == nil && as != e.name {
		if err = root.Rename(as, e.name); err == nil {
			// Two names of one file: rename(2) does nothing then, and says that all is well.
			if gone := root.Remove(as); gone != nil && !errors.Is(gone, fs.ErrNotExist) {
				err = gone
			}
		}
	}
	if err != nil {
		return err
	}
	in.Files++
	return nil
}

// copyOf copies a file of this tree.
func (in *receiver) copyOf(top *os.Root, from string, root *os.Root, as string, e entry) error {
	// The sender may have put a link in its place, which an os.Root follows.
	if st, err := top.Lstat(from); err != nil || !st.Mode().IsRegular() {
		return errors.Join(fmt.Errorf("%s: is no file any more", from), err)
	}
	source, err := top.OpenFile(from, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer source.Close()
	f, err := root.OpenFile(as, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, source)
	if err = errors.Join(err, f.Close()); err == nil {
		err = in.finish(root, as, e)
	}
	if err != nil {
		return errors.Join(err, root.Remove(as))
	}
	return nil
}
