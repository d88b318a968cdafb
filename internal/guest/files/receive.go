package files

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/frame"
)

// receiver makes one tree.
type receiver struct {
	Result
	target  string // as it was named
	name    string // of the source
	trusted bool   // setuid, setgid and sticky bits are kept
	Options

	dirs []*level
	file *incoming // nil if it is complete

	next     []attribute       // of the next entry
	kept     int               // bytes of them
	numbered map[string]string // paths, below the top directory, of files that may get other names
	paths    int               // bytes of them
}

// level is a directory that is being filled. The first is the one that is written below.
type level struct {
	root  *os.Root
	name  string      // in the one above
	made  *entry      // to be given its mode and times when it is complete; nil: it was there before
	attrs []attribute // likewise
}

// incoming is a file that is not complete.
type incoming struct {
	entry
	f    *os.File
	root *os.Root
	as   string // the name it has so far
	at   int64

	attrs []attribute
}

// receive makes what the frames say until their end. What it counted is good also with an error. A file
// that is not complete is removed.
func receive(r *frame.Reader, target, name string, o Options, trusted bool) (Result, error) {
	in := &receiver{target: target, name: name, trusted: trusted, Options: o}
	defer in.close()
	for {
		kind, payload, err := r.Next()
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return in.Result, errors.Join(errLost, err)
		}
		done, err := in.take(kind, payload)
		if err != nil || done {
			return in.Result, err
		}
	}
}

// errLost marks a stream that broke.
var errLost = errors.New("the stream ended before the copy did")

// errForm marks a peer that does not keep to the form.
var errForm = errors.New("the stream is not in its form")

// refusal is a sender's Result instead of its files.
type refusal struct{ Result }

func (r refusal) Error() string { return r.Failed }

func (in *receiver) take(kind byte, payload []byte) (done bool, err error) {
	if in.file != nil && kind != kindData && kind != kindHole {
		return false, fmt.Errorf("%w: %q is not complete", errForm, in.file.name)
	}
	switch kind {
	case kindEntry:
		e, err := parseEntry(payload)
		if err != nil {
			return false, errors.Join(errForm, err)
		}
		in.Progress.begun()
		return false, in.begin(e)
	case kindAttribute:
		return false, in.keep(payload)
	case kindData:
		return false, in.data(payload)
	case kindHole:
		if len(payload) != 8 {
			return false, fmt.Errorf("%w: a hole of %d bytes", errForm, len(payload))
		}
		return false, in.hole(binary.BigEndian.Uint64(payload))
	case kindUp:
		if len(in.dirs) < 2 {
			return false, fmt.Errorf("%w: up from the top", errForm)
		}
		return false, in.up()
	case kindWarning:
		in.warn(string(payload))
		if in.Left > maxLeft {
			return false, fmt.Errorf("%w: more than %d warnings", errForm, maxLeft)
		}
		return false, nil
	case kindEnd:
		if len(in.dirs) != 1 {
			return false, fmt.Errorf("%w: an end inside of %d directories", errForm, len(in.dirs))
		}
		return true, nil
	case kindResult:
		r, err := parseResult(payload)
		if err != nil || r.Failed == "" {
			return false, errors.Join(errForm, err)
		}
		return false, refusal{r}
	}
	return false, fmt.Errorf("%w: a frame of unknown kind %q", errForm, kind)
}

// begin begins an entry where it belongs.
func (in *receiver) begin(e entry) error {
	if len(in.dirs) == 0 {
		name, contents, err := in.place(e)
		if err != nil {
			return err
		}
		if contents {
			root, err := os.OpenRoot(in.target)
			if err == nil {
				in.dirs = append(in.dirs, &level{root: root, name: "."}) // the entry itself; it ends with an "up"
			}
			in.taken() // it was there before, as it is
			return err
		}
		e.name = name
	} else if len(in.dirs) == 1 {
		return fmt.Errorf("%w: a second thing at the top", errForm)
	}
	root, attrs := in.dirs[len(in.dirs)-1].root, in.taken()
	switch e.kind {
	case directory:
		return in.mkdir(root, e, attrs)
	case symlink:
		return in.symlink(root, e)
	case hardlink:
		return in.hardlink(root, e)
	}
	return in.create(root, e, attrs)
}

// place finds where the first entry goes, by the rules of cp(1), and opens the directory that everything
// is written below. With contents it is the entry itself.
func (in *receiver) place(e entry) (name string, contents bool, err error) {
	st, err := os.Stat(in.target)
	var dir string
	switch {
	case err == nil && st.IsDir():
		dir, name = in.target, in.name
		contents = e.kind == directory && in.Contents
	case err == nil && e.kind == directory:
		return "", false, fmt.Errorf("%s: is a file, and a directory is to be copied there", in.target)
	case err == nil && !st.Mode().IsRegular():
		return "", false, fmt.Errorf("%s: is neither a file nor a directory", in.target)
	case err == nil:
		// A link that was named is followed: its file is replaced.
		followed, err := filepath.EvalSymlinks(in.target)
		if err != nil {
			return "", false, err
		}
		dir, name = filepath.Dir(followed), filepath.Base(followed)
	case !errors.Is(err, fs.ErrNotExist):
		return "", false, err
	case e.kind != directory && strings.HasSuffix(in.target, "/"):
		return "", false, fmt.Errorf("%s: there is no such directory", in.target)
	default:
		clean := filepath.Clean(in.target)
		dir, name = filepath.Dir(clean), filepath.Base(clean)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", false, err
	}
	in.dirs = append(in.dirs, &level{root: root})
	return name, contents, nil
}

// mkdir makes a directory, or enters the one that is there. A link to one is none.
func (in *receiver) mkdir(root *os.Root, e entry, attrs []attribute) error {
	if len(in.dirs) > maxDepth+1 {
		return fmt.Errorf("%w: more than %d directories below each other", errForm, maxDepth)
	}
	made := &e
	err := root.Mkdir(e.name, 0o700)
	if errors.Is(err, fs.ErrExist) {
		made = nil
		var st fs.FileInfo
		if st, err = root.Lstat(e.name); err == nil && !st.IsDir() {
			err = fmt.Errorf("%s: exists and is no directory", filepath.Join(root.Name(), e.name))
		}
	}
	if err != nil {
		return err
	}
	sub, err := root.OpenRoot(e.name)
	if err != nil {
		return err
	}
	in.dirs = append(in.dirs, &level{root: sub, name: e.name, made: made, attrs: attrs})
	in.Files++
	return nil
}

func (in *receiver) up() error {
	last := in.dirs[len(in.dirs)-1]
	in.dirs = in.dirs[:len(in.dirs)-1]
	var err error
	if last.made != nil && len(last.attrs) > 0 {
		var d *os.File
		if d, err = last.root.Open("."); err == nil {
			in.setAttributes(d, last.attrs)
			err = d.Close()
		}
	}
	err = errors.Join(err, last.root.Close())
	if e := last.made; e != nil {
		err = errors.Join(err, in.finish(in.dirs[len(in.dirs)-1].root, e.name, *e))
	}
	return err
}

// finish gives what was made its owner, mode and time.
func (in *receiver) finish(root *os.Root, name string, e entry) error {
	if in.Owners {
		if err := root.Lchown(name, int(e.uid), int(e.gid)); err != nil {
			return err
		}
	}
	if e.kind == symlink {
		return nil // Linux keeps no mode of one; its time matters to nobody
	}
	if err := root.Chmod(name, in.mode(e)); err != nil {
		return err
	}
	t := time.Unix(0, e.mtime)
	return root.Chtimes(name, t, t)
}

// mode leaves out, of what a guest sends, the bits that would give its files the receiver's power.
func (in *receiver) mode(e entry) fs.FileMode {
	mode := fs.FileMode(e.mode & 0o777)
	if in.trusted {
		for bit, m := range map[uint32]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
			if e.mode&bit != 0 {
				mode |= m
			}
		}
	}
	return mode
}

// replaceable says whether something may be replaced by a file or a link.
func replaceable(root *os.Root, name string) error {
	st, err := root.Lstat(name)
	if err == nil && !st.Mode().IsRegular() && st.Mode()&fs.ModeSymlink == 0 {
		err = fmt.Errorf("%s: exists and is no file", filepath.Join(root.Name(), name))
	}
	return err
}

func temporary() string { return ".banger-cp-" + rand.Text() }

func (in *receiver) symlink(root *os.Root, e entry) error {
	as := e.name
	err := root.Symlink(e.link, as)
	if errors.Is(err, fs.ErrExist) {
		if err := replaceable(root, e.name); err != nil {
			return err
		}
		as = temporary()
		err = root.Symlink(e.link, as)
	}
	if err != nil {
		return err
	}
	err = in.finish(root, as, e)
	if err == nil && as != e.name {
		err = root.Rename(as, e.name)
	}
	if err != nil {
		return errors.Join(err, root.Remove(as))
	}
	in.Files++
	return nil
}

// create opens a file that was not there, under its own name or, where there is one to be replaced,
// beside it.
func (in *receiver) create(root *os.Root, e entry, attrs []attribute) error {
	const flags = os.O_WRONLY | os.O_CREATE | os.O_EXCL // follows no link
	as := e.name
	f, err := root.OpenFile(as, flags, 0o600)
	if errors.Is(err, fs.ErrExist) {
		if err := replaceable(root, e.name); err != nil {
			return err
		}
		as = temporary()
		f, err = root.OpenFile(as, flags, 0o600)
	}
	if err != nil {
		return err
	}
	in.file = &incoming{entry: e, f: f, root: root, as: as, attrs: attrs}
	return in.complete()
}

func (in *receiver) data(b []byte) error {
	if in.file == nil || len(b) == 0 || int64(len(b)) > in.file.size-in.file.at {
		return fmt.Errorf("%w: data beyond a file's end", errForm)
	}
	if _, err := in.file.f.WriteAt(b, in.file.at); err != nil {
		return err
	}
	in.file.at += int64(len(b))
	in.Bytes += int64(len(b))
	in.Progress.moved(len(b))
	return in.complete()
}

func (in *receiver) hole(n uint64) error {
	if in.file == nil || n == 0 || n > uint64(in.file.size-in.file.at) {
		return fmt.Errorf("%w: a hole beyond a file's end", errForm)
	}
	in.file.at += int64(n)
	if in.file.at == in.file.size {
		if err := in.file.f.Truncate(in.file.size); err != nil {
			return err
		}
	}
	return in.complete()
}

// complete ends the file if all of it is there.
func (in *receiver) complete() error {
	c := in.file
	if c.at < c.size {
		return nil
	}
	if in.Owners {
		if err := c.f.Chown(int(c.uid), int(c.gid)); err != nil {
			return err
		}
	}
	in.setAttributes(c.f, c.attrs) // after the owner, whose change takes capabilities away (chown(2))
	t := time.Unix(0, c.mtime)
	if err := errors.Join(c.f.Chmod(in.mode(c.entry)), c.f.Close(), c.root.Chtimes(c.as, t, t)); err != nil {
		return err
	}
	if c.as != c.name {
		if err := c.root.Rename(c.as, c.name); err != nil {
			return err
		}
	}
	in.file = nil
	in.Files++
	in.remember(c.entry)
	return nil
}

// close lets go of everything, and removes a file that is not complete.
func (in *receiver) close() {
	if c := in.file; c != nil {
		_ = c.f.Close() // it may be closed; it is removed either way
		_ = c.root.Remove(c.as)
	}
	for _, d := range in.dirs {
		_ = d.root.Close()
	}
}
