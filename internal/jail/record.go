package jail

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/filelock"
	"git.thaloco.com/thaloco/banger/internal/process"
)

// record says which process a jail is, and whose. It is written before anything is made, and goes with a reboot.
type record struct {
	Name
	User  int    `json:"user"` // whose it is
	UID   int    `json:"uid"`  // the jail's own
	PID   int    `json:"pid"`  // 0: about to be started
	Start uint64 `json:"start_ticks"`
	// By is who is about to start it.
	By      int    `json:"by"`
	BySince uint64 `json:"by_start_ticks"`
}

// records is a directory of root's with a file for each jail of all users, and one for each user id that is taken.
type records string

// jailBase is the directory in it over which jails are mounted.
const jailBase = "root"

func (d records) path(name string) string { return filepath.Join(string(d), name) }

func (d records) broken(err error) error {
	return fault.Wrap(err, fault.Internal, string(d), "the records of jails cannot be used")
}

// lock keeps all others from changing records until it is released, and makes the directory.
func (d records) lock(ctx context.Context) (release func(), err error) {
	// Whoever is first makes the directory that has the helpers' sockets, too, which is for all to pass.
	above := filepath.Dir(string(d))
	if err := os.Mkdir(above, 0o755); err == nil {
		if err := os.Chmod(above, 0o755); err != nil { // the umask is for files
			return nil, d.broken(err)
		}
	}
	if err := os.MkdirAll(d.path(jailBase), 0o700); err != nil {
		return nil, d.broken(err)
	}
	f, err := os.OpenFile(d.path("lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, d.broken(err)
	}
	if err := filelock.Wait(ctx, f, unix.LOCK_EX); err != nil {
		_ = f.Close()
		if ctx.Err() != nil { // which others hold for some milliseconds
			return nil, fault.Wrap(ctx.Err(), fault.CodeOf(ctx.Err()), "jail", "others that make jails did not end in time")
		}
		return nil, d.broken(err)
	}
	return func() { _ = f.Close() }, nil
}

func (n Name) file(user int) string {
	return fmt.Sprintf("vm-%d-%s-%s-%s", user, n.Place, n.VM, n.Installation)
}

func uidFile(uid int) string { return "uid-" + strconv.Itoa(uid) }

// get returns a record, nil if there is none.
func (d records) get(file string) (*record, error) {
	b, err := os.ReadFile(d.path(file))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var r record
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		return nil, d.broken(err)
	}
	return &r, nil
}

// put needs no fsync: /run is memory, and a host that loses it has lost the process, too.
func (d records) put(r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	file := d.path(r.file(r.User))
	if err := os.WriteFile(file+".new", b, 0o600); err != nil {
		return d.broken(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		return d.broken(err)
	}
	return nil
}

// drop forgets a jail and its user id. Fine if it is forgotten.
func (d records) drop(r record) error {
	for _, file := range []string{r.file(r.User), uidFile(r.UID)} {
		if err := os.Remove(d.path(file)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return d.broken(err)
		}
	}
	return nil
}

// of returns the records of a user.
func (d records) of(user int) ([]record, error) { return d.named(fmt.Sprintf("vm-%d-", user)) }

// all returns everybody's.
func (d records) all() ([]record, error) { return d.named("vm-") }

func (d records) named(prefix string) (out []record, err error) {
	entries, err := os.ReadDir(string(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, d.broken(err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), prefix) || strings.HasSuffix(e.Name(), ".new") {
			continue
		}
		r, err := d.get(e.Name())
		if err != nil {
			return nil, err
		}
		if r != nil {
			out = append(out, *r)
		}
	}
	return out, nil
}

// claim finds a user id that nobody has, and notes that it is a jail's. Any in the range may be asked first, so that no two VMs in
// a row get the same one, and nobody has to look at all.
func (d records) claim(taken func(uid int) bool, file string) (int, error) {
	const tries = 256
	for range tries {
		uid := FirstUID + rand.IntN(UIDs)
		if taken(uid) {
			continue
		}
		f, err := os.OpenFile(d.path(uidFile(uid)), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err == nil {
			_, err = f.WriteString(file)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			return 0, d.broken(err)
		}
		return uid, nil
	}
	return 0, fault.New(fault.Exhausted, "jail", "no user id from %d on is free", FirstUID)
}

// taken reads which ids of the range users, groups and their containers have (passwd(5), group(5), subuid(5)). Users of directory
// services are not among them, whose ids are other ones as a rule.
func taken(root string) (func(id int) bool, error) {
	type span struct{ first, count int }
	var spans []span
	for file, field := range map[string]int{"etc/passwd": 2, "etc/group": 2, "etc/subuid": 1, "etc/subgid": 1} {
		b, err := os.ReadFile(filepath.Join(root, file))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fault.Wrap(err, fault.Internal, file, "it cannot be told which user ids are free")
		}
		for line := range bytes.Lines(b) {
			fields := strings.Split(strings.TrimSpace(string(line)), ":")
			if len(fields) <= field {
				continue
			}
			first, err := strconv.Atoi(fields[field])
			if err != nil {
				continue
			}
			s := span{first, 1}
			if field == 1 && len(fields) > 2 {
				if s.count, err = strconv.Atoi(fields[2]); err != nil {
					continue
				}
			}
			spans = append(spans, s)
			if field == 2 && file == "etc/passwd" && len(fields) > 3 { // the user's group, which may have no line
				if gid, err := strconv.Atoi(fields[3]); err == nil {
					spans = append(spans, span{gid, 1})
				}
			}
		}
	}
	return func(id int) bool {
		for _, s := range spans {
			if id >= s.first && id-s.first < s.count {
				return true
			}
		}
		return false
	}, nil
}

// runs says whether a process is the one that was noted, and has not ended: one that nobody has waited for yet does not run.
func runs(pid int, start uint64) bool {
	if pid <= 0 {
		return false
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	ticks, err := process.StartTime(pid)
	if err != nil || ticks != start {
		return false
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 0
}

// lost finds the process of a jail whose helper was killed before it could note it: its command line has the marker, and it has the
// jail's user id or is still the jailer. A start takes milliseconds, so this is rare, and looks at all processes.
func (r record) lost(jailer string) (pid int, start uint64) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, 0
	}
	for _, e := range entries {
		id, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		var st unix.Stat_t
		if unix.Stat(dir, &st) != nil {
			continue
		}
		if int(st.Uid) != r.UID {
			exe, err := os.Readlink(filepath.Join(dir, "exe"))
			if st.Uid != 0 || err != nil || exe != jailer {
				continue
			}
		}
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || !bytes.Contains(cmdline, []byte("\x00"+r.Marker()+"\x00")) {
			continue
		}
		if ticks, err := process.StartTime(id); err == nil {
			return id, ticks
		}
	}
	return 0, 0
}
