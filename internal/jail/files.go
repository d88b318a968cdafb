package jail

import (
	"os"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Files are what a jail is made of, open. They stay the caller's to close. A lock on the first drive that is written lives
// as long as the process does, which has that descriptor as its standard input. So those that are written are not open for reading:
// what Firecracker reads there is what the guest's console hears.
type Files struct {
	Log            *os.File // its output, appended
	Run            *os.File // a directory, for sockets
	Kernel, Initrd *os.File
	Drives         []*os.File
	Net            *os.File // a directory; nil if there is none
}

// All returns them in the order in which Restore takes them.
func (f Files) All() []*os.File {
	out := append([]*os.File{f.Log, f.Run, f.Kernel, f.Initrd}, f.Drives...)
	if f.Net != nil {
		out = append(out, f.Net)
	}
	return out
}

// MaxFiles bounds how many a request goes with.
const MaxFiles = 5 + maxDrives

// Restore makes Files of what All returned, for a request. fault.Invalid if it is another number.
func Restore(r Request, all []*os.File) (f Files, err error) {
	least := 4 + len(r.Drives)
	if len(all) != least && len(all) != least+1 {
		return f, invalid("%d descriptors come with %d drives", len(all), len(r.Drives))
	}
	f = Files{Log: all[0], Run: all[1], Kernel: all[2], Initrd: all[3], Drives: all[4:least]}
	if len(all) > least {
		f.Net = all[least]
	}
	return f, nil
}

// bound are those that are mounted, as Request.mounts has them.
func (f Files) bound() []*os.File { return f.All()[1:] }

// check says whether a user may give a file for a mount, and returns its group. The user must own it, so that nobody else's file is a jail's
// to change; and must have opened it for what the jail does with it: a descriptor that was opened for nothing (O_PATH) proves no right to
// read. What is written is not open for reading (Files).
func check(f *os.File, user int, what string, dir, write bool) (gid int, err error) {
	no := func(format string, args ...any) error {
		return fault.New(fault.Permission, what, format, args...)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, fault.Wrap(err, fault.Invalid, what, "it is no file")
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return 0, fault.Wrap(err, fault.Invalid, what, "it is no file")
	}
	kind, mode := uint32(unix.S_IFREG), flags&unix.O_ACCMODE
	if dir {
		kind, write = unix.S_IFDIR, false // which nobody opens for writing
	}
	switch {
	case st.Mode&unix.S_IFMT != kind:
		return 0, no("it is a file of another kind")
	case flags&unix.O_PATH != 0, write != (mode == unix.O_WRONLY):
		return 0, no("it was not opened for what it is for")
	case int(st.Uid) != user:
		return 0, no("it belongs to user %d, not to user %d", st.Uid, user)
	case st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 && !dir:
		return 0, no("it runs with another's rights")
	case dir && st.Mode&0o022 != 0:
		return 0, no("others may write to the directory")
	}
	return int(st.Gid), nil
}

// checkAll looks at all that come with a request.
func checkAll(r Request, f Files, user int) (gids []int, err error) {
	var log unix.Stat_t
	flags, err := unix.FcntlInt(f.Log.Fd(), unix.F_GETFL, 0)
	if err == nil {
		err = unix.Fstat(int(f.Log.Fd()), &log)
	}
	switch {
	case err != nil:
		return nil, fault.Wrap(err, fault.Invalid, "log", "it is no file")
	case log.Mode&unix.S_IFMT != unix.S_IFREG, int(log.Uid) != user, flags&unix.O_PATH != 0, flags&unix.O_APPEND == 0, flags&unix.O_ACCMODE == unix.O_RDONLY:
		return nil, fault.New(fault.Permission, "log", "it is no file of user %d that is open for appending", user)
	}
	mounts := r.mounts(f.Net != nil)
	for i, file := range f.bound() {
		gid, err := check(file, user, mounts[i].at, mounts[i].dir, !mounts[i].readOnly)
		if err != nil {
			return nil, err
		}
		gids = append(gids, gid)
	}
	return gids, nil
}

// locked is the first drive that is written: QEMU's locks and ours on it are those of the whole VM, whose drives are never apart.
func (f Files) locked(r Request) *os.File {
	for i, d := range r.Drives {
		if !d.ReadOnly {
			return f.Drives[i]
		}
	}
	return nil
}
