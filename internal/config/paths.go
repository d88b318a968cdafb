package config

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Environment is what settings and paths are derived from. Tests make their own.
type Environment struct {
	Getenv func(string) string
	Home   string // absolute; "" if the user has none
	UID    int
	// Tmp holds the private runtime directory where XDG_RUNTIME_DIR is unset. It is not $TMPDIR, which
	// differs between the shells of one user who must find one daemon.
	Tmp string
}

// System is the environment of this process.
func System() Environment {
	e := Environment{Getenv: os.Getenv, Home: os.Getenv("HOME"), UID: os.Geteuid(), Tmp: "/tmp"}
	if !filepath.IsAbs(e.Home) {
		e.Home = ""
		if u, err := user.LookupId(strconv.Itoa(e.UID)); err == nil && filepath.IsAbs(u.HomeDir) {
			e.Home = u.HomeDir
		}
	}
	return e
}

// Paths are the directories of one installation: state directory and all. Absolute; nothing is
// made by asking.
type Paths struct {
	ConfigFile string // config.toml
	State      string // everything that must survive
	Cache      string // everything that can be made again
	Runtime    string // the daemon's socket; goes away with the login session or the reboot

	configRequired bool   // BANGER_CONFIG names it, so it must exist
	runtimeParent  string // must belong to the user; "" where it is a shared directory such as /tmp
	runtimeBase    string // Runtime without the part that tells installations apart
	uid            int
}

// ResolvePaths derives the paths. XDG variables that are not absolute are ignored, as the XDG Base
// Directory Specification asks. BANGER_STATE_DIR must be absolute, since the daemon outlives the
// directory that it was started in: fault.Invalid.
func ResolvePaths(e Environment) (Paths, error) {
	p := Paths{uid: e.UID}
	base := func(variable, fallback string) (string, error) {
		if v := e.Getenv(variable); filepath.IsAbs(v) {
			return filepath.Join(v, "banger"), nil
		}
		if e.Home == "" {
			return "", fault.New(fault.Precondition, "home directory", "user %d has none", e.UID).
				WithHint("set HOME, or set %s to an absolute path", variable)
		}
		return filepath.Join(e.Home, fallback, "banger"), nil
	}
	var err error
	if v := e.Getenv("BANGER_CONFIG"); v != "" {
		if p.ConfigFile, err = filepath.Abs(v); err != nil {
			return Paths{}, err
		}
		p.configRequired = true
	} else {
		dir, err := base("XDG_CONFIG_HOME", ".config")
		if err != nil {
			return Paths{}, err
		}
		p.ConfigFile = filepath.Join(dir, "config.toml")
	}
	if p.Cache, err = base("XDG_CACHE_HOME", ".cache"); err != nil {
		return Paths{}, err
	}

	if v := e.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(v) {
		p.runtimeParent = filepath.Clean(v)
		p.Runtime = filepath.Join(v, "banger")
	} else {
		p.Runtime = filepath.Join(e.Tmp, "banger-"+strconv.Itoa(e.UID))
	}

	p.runtimeBase = p.Runtime

	standard, err := base("XDG_STATE_HOME", filepath.Join(".local", "state"))
	own := e.Getenv("BANGER_STATE_DIR")
	switch {
	case own == "" && err != nil:
		return Paths{}, err
	case own == "":
		p.State = standard
	case !filepath.IsAbs(own):
		return Paths{}, fault.New(fault.Invalid, "BANGER_STATE_DIR", "%q is not an absolute path", own).
			WithHint(`export BANGER_STATE_DIR="$PWD/%s"`, own)
	default:
		p.State = filepath.Clean(own)
		// Two installations must not share a socket, and one that is spelled in two ways (a
		// symbolic link on the way) must not have two.
		if where := canonical(p.State); err != nil || where != canonical(standard) {
			sum := sha256.Sum256([]byte(where))
			p.Runtime = filepath.Join(p.Runtime, hex.EncodeToString(sum[:6]))
		}
	}
	return p, nil
}

// canonical resolves the symbolic links of the part of path that exists.
func canonical(path string) string {
	rest := ""
	for dir := path; ; dir = filepath.Dir(dir) {
		if resolved, err := filepath.EvalSymlinks(dir); err == nil {
			return filepath.Join(resolved, rest)
		}
		if dir == filepath.Dir(dir) {
			return path
		}
		rest = filepath.Join(filepath.Base(dir), rest)
	}
}

// Socket is where the daemon listens. It may be longer than the 108 bytes of sun_path (unix(7)).
func (p Paths) Socket() string { return filepath.Join(p.Runtime, "bangerd.sock") }

// Database of the daemon.
func (p Paths) Database() string { return filepath.Join(p.State, "banger.db") }

// DaemonLog is the daemon's structured log.
func (p Paths) DaemonLog() string { return filepath.Join(p.State, "bangerd.log") }

// VMs holds one directory a VM, named by its full id: disks, config drive, VMM log.
func (p Paths) VMs() string { return filepath.Join(p.State, "vms") }

// VM is the directory of one VM.
func (p Paths) VM(id string) string { return filepath.Join(p.State, "vms", id) }

// Run is the directory of a VM's sockets and pidfile. It lies in the state directory because VMMs
// survive a logout, which empties XDG_RUNTIME_DIR.
func (p Paths) Run(shortID string) string { return filepath.Join(p.State, "run", shortID) }

// Networks holds what serves VMs' networks keeps for each of them: pidfile, socket, log.
func (p Paths) Networks() string { return filepath.Join(p.State, "net") }

// Images holds captured root filesystems and work seeds by content id.
func (p Paths) Images() string { return filepath.Join(p.State, "images") }

// Kernels holds one directory a captured kernel, by content id.
func (p Paths) Kernels() string { return filepath.Join(p.State, "kernels") }

// BuildLogs holds the output of image builds.
func (p Paths) BuildLogs() string { return filepath.Join(p.State, "image-build") }

// Templates holds empty filesystems by recipe.
func (p Paths) Templates() string { return filepath.Join(p.Cache, "templates") }

// EnsureState makes the state directory, private to the user. It may be a symbolic link to one:
// people keep large state elsewhere. fault.Permission if it belongs to someone else.
func (p Paths) EnsureState() error { return ensurePrivate(p.State, "state directory", p.uid, true) }

// EnsureCache makes the cache directory as EnsureState makes the other.
func (p Paths) EnsureCache() error { return ensurePrivate(p.Cache, "cache directory", p.uid, true) }

// EnsureRuntime makes the directory of the socket, private to the user: whoever may write there can
// pose as the daemon. A symbolic link, another owner, or a directory that others could write to is
// refused with fault.Permission: in /tmp anyone may have put it there.
func (p Paths) EnsureRuntime() error {
	if p.runtimeParent != "" {
		fi, err := os.Stat(p.runtimeParent)
		switch {
		case err != nil:
			return fault.Wrap(err, fault.Precondition, "XDG_RUNTIME_DIR", "%s cannot be used", p.runtimeParent).
				WithHint("log in afresh, or unset XDG_RUNTIME_DIR to use %s", "/tmp/banger-"+strconv.Itoa(p.uid))
		case !fi.IsDir():
			return fault.New(fault.Precondition, "XDG_RUNTIME_DIR", "%s is not a directory", p.runtimeParent).
				WithHint("unset XDG_RUNTIME_DIR")
		case ownerOf(fi) != p.uid:
			return fault.New(fault.Permission, "XDG_RUNTIME_DIR", "%s belongs to %s; you are %s",
				p.runtimeParent, userName(ownerOf(fi)), userName(p.uid)).
				WithHint("unset XDG_RUNTIME_DIR, or log in as the user instead of using su")
		}
	}
	// The directory of a second installation lies in the first one's, which must be safe as well.
	if err := ensurePrivate(p.runtimeBase, "socket directory", p.uid, false); err != nil || p.Runtime == p.runtimeBase {
		return err
	}
	return ensurePrivate(p.Runtime, "socket directory", p.uid, false)
}

// ensurePrivate makes dir with mode 0700, or checks that it is the user's and closes it to others.
func ensurePrivate(dir, what string, uid int, followLink bool) error {
	if followLink {
		// Parents of XDG directories are made 0700 by the specification.
		if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
			return denied(err, dir, what)
		}
	}
	err := os.Mkdir(dir, 0o700)
	if err == nil {
		err = os.Chmod(dir, 0o700) // whatever the umask is; nobody else can have exchanged a directory of ours
	}
	if err != nil && !errors.Is(err, os.ErrExist) {
		return denied(err, dir, what)
	}
	fi, err := os.Lstat(dir)
	if err != nil {
		return denied(err, dir, what)
	}
	if fi.Mode()&os.ModeSymlink != 0 {
		if !followLink {
			return fault.New(fault.Permission, what, "%s is a symbolic link, made by %s; the socket in it could be anyone's",
				dir, userName(ownerOf(fi))).WithHint("remove it: rm %s", dir)
		}
		if fi, err = os.Stat(dir); err != nil {
			return fault.Wrap(err, fault.Precondition, what, "%s is a symbolic link that leads nowhere", dir).
				WithHint("make the directory it points to, or remove the link")
		}
	}
	if !fi.IsDir() {
		return fault.New(fault.Precondition, what, "%s is not a directory", dir).WithHint("move it away")
	}
	// What was seen by name is checked again by descriptor: between the two it could be exchanged.
	flags := unix.O_DIRECTORY | unix.O_RDONLY | unix.O_CLOEXEC
	if !followLink {
		flags |= unix.O_NOFOLLOW
	}
	if ownerOf(fi) != uid {
		return foreign(dir, what, ownerOf(fi), uid)
	}
	fd, err := unix.Open(dir, flags, 0)
	if err != nil {
		return denied(os.NewSyscallError("open", err), dir, what)
	}
	defer unix.Close(fd) // nothing was written through it
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return denied(os.NewSyscallError("fstat", err), dir, what)
	}
	switch {
	case int(st.Uid) != uid:
		return foreign(dir, what, int(st.Uid), uid)
	case st.Mode&0o022 != 0:
		return fault.New(fault.Permission, what, "%s can be written to by others (mode %04o)", dir, st.Mode&0o7777).
			WithHint("look at what is in it, then: chmod 700 %s", dir)
	case st.Mode&0o777 != 0o700:
		if err := unix.Fchmod(fd, 0o700); err != nil {
			return denied(os.NewSyscallError("chmod", err), dir, what)
		}
	}
	return nil
}

func foreign(dir, what string, owner, uid int) error {
	return fault.New(fault.Permission, what, "%s belongs to %s; you are %s", dir, userName(owner), userName(uid)).
		WithHint("run banger as %s, or have %s removed by its owner", userName(owner), dir)
}

func denied(err error, dir, what string) error {
	code := fault.Internal
	switch {
	case errors.Is(err, os.ErrPermission), errors.Is(err, syscall.EROFS):
		code = fault.Permission
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		code = fault.Exhausted
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, os.ErrNotExist), errors.Is(err, os.ErrExist):
		code = fault.Precondition
	}
	return fault.Wrap(err, code, what, "%s cannot be used", dir).WithHint("check it: ls -ld %s %s", filepath.Dir(dir), dir)
}

func ownerOf(fi os.FileInfo) int { return int(fi.Sys().(*syscall.Stat_t).Uid) }

// userName is the name of a user, or the number where there is none.
func userName(uid int) string {
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return u.Username
	}
	return "user " + strconv.Itoa(uid)
}
