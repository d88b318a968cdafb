package pid1

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// rootDir is the new root before it is "/". Paths are resolved as the booted system would resolve
// them: symlinks of the image, absolute ones and ".." included, never lead out of it
// (openat2(2), RESOLVE_IN_ROOT).
type rootDir struct{ f *os.File }

func openRoot(at string) (rootDir, error) {
	f, err := os.OpenFile(at, unix.O_PATH|unix.O_DIRECTORY, 0)
	return rootDir{f}, err
}

func (r rootDir) open(p string, flags int, mode os.FileMode) (*os.File, error) {
	fd, err := unix.Openat2(int(r.f.Fd()), p, &unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Mode:    uint64(mode),
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: p, Err: err}
	}
	return os.NewFile(uintptr(fd), p), nil
}

// mkdirAll opens the directory at p, made with its parents as root's, 0755, if missing.
func (r rootDir) mkdirAll(p string) (*os.File, error) {
	d, err := r.open(p, unix.O_PATH|unix.O_DIRECTORY, 0)
	if !errors.Is(err, unix.ENOENT) || p == "/" {
		return d, err
	}
	parent, err := r.mkdirAll(path.Dir(p))
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	if err := unix.Mkdirat(int(parent.Fd()), path.Base(p), 0o755); err != nil {
		return nil, &os.PathError{Op: "mkdir", Path: p, Err: err} // EEXIST: a symlink to nowhere
	}
	return r.open(p, unix.O_PATH|unix.O_DIRECTORY, 0)
}

// magicPath names an open file for system calls that take only a path.
func magicPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// read returns a file's content, following symlinks inside the root. Absent is nil.
func (r rootDir) read(p string) ([]byte, error) {
	f, err := r.open(p, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 1<<20))
}

// write makes the file at p be a regular file with this content, owner and mode. What was there, a
// symlink too, is unlinked first. A file that is so already is left alone: rewriting it would copy
// it up and wear the disk on every boot.
func (r rootDir) write(p string, content []byte, mode os.FileMode, uid, gid int) error {
	dir, err := r.mkdirAll(path.Dir(p))
	if err != nil {
		return err
	}
	defer dir.Close()
	name := path.Base(p)
	if same(dir, name, content, mode, uid, gid) {
		return nil
	}
	if err := unix.Unlinkat(int(dir.Fd()), name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "replace", Path: p, Err: err}
	}
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: p, Err: err}
	}
	f := os.NewFile(uintptr(fd), p)
	_, err = f.Write(content)
	return errors.Join(err, unixError("chown", p, unix.Fchown(fd, uid, gid)),
		unixError("chmod", p, unix.Fchmod(fd, uint32(mode))), f.Close())
}

func same(dir *os.File, name string, content []byte, mode os.FileMode, uid, gid int) bool {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode != unix.S_IFREG|uint32(mode) ||
		int(st.Uid) != uid || int(st.Gid) != gid || st.Size != int64(len(content)) || st.Nlink != 1 {
		return false
	}
	have, err := io.ReadAll(f)
	return err == nil && bytes.Equal(have, content)
}

func unixError(op, p string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: p, Err: err}
}

// mergeEnvironment replaces and appends variables in the text of an /etc/environment
// (pam_env(8): NAME=value a line).
func mergeEnvironment(text string, set map[string]string, names []string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		name, _, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "export "), "=")
		if _, replaced := set[name]; ok && replaced {
			continue
		}
		b.WriteString(strings.TrimSuffix(line, "\n") + "\n")
	}
	for _, name := range names {
		b.WriteString(name + "=" + set[name] + "\n")
	}
	return b.String()
}
