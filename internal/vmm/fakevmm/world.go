// Package fakevmm owns a VMM that runs nothing: machines that behave like processes of a host, but
// are records in a directory, the World. It is for tests and benchmarks that boot nothing, also for
// those in which the daemon itself is killed: what a World holds outlives every process that uses it.
//
// It never starts a program, never opens a drive for writing, and is never offered to users.
//
// # The world
//
//	machines/<marker>.json   one running machine: the process table. A file gone is a machine gone.
//	exits/<marker>.json      how the last machine of that marker ended
//	journal                  one line for each start and exit, in order: what a test counts
//	faults                   what goes wrong, see below; written by tests, read by drivers
//	lock                     flock(2)ed around each change
//
// A driver notices by inotify what others do to the world, so a test in another process can end
// machine x by removing its record (nobody saw why: vmm.Crashed) or by World.End with a reason.
// Removing all of machines/ is what a reboot of the host looks like.
//
// # Faults
//
// Each line is "<who> <fault> [argument]"; who is a VM's name, its id, or * for every VM. Empty lines
// and lines that start with # are skipped. The file is read whenever it matters, so removing a line
// heals the VM.
//
//	refuse [text]      Start fails, as if the VMM had ended before it answered; nothing is left
//	hold               Start waits until the line is gone (or its context ends)
//	die [reason]       the machine ends as soon as it has started, for one of the port's reasons;
//	                   without one it has crashed
//	mute               connections to the guest succeed, and nobody answers until the line is gone
//	freeze             the guest stands still: of what is connected to it, now or before, nothing is
//	                   read or answered until the line is gone
//	deaf               the guest ignores that it is asked to power off or to reset
//	pause              the guest is paused (io-error) as soon as it has started; a Resume while
//	                   the line is there leaves it paused
//	stiff              the machine refuses to be told of a new size of a drive, and takes no discards
//	console <text>     the line appears in the machine's log when it starts
package fakevmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// World is a directory that stands for a host's process table. Any number of processes may use the
// same one at once. Safe for concurrent use.
type World struct{ dir string }

// Record is one running machine.
type Record struct {
	Spec     vmm.Spec  `json:"spec"`
	Instance int       `json:"instance"` // counts the starts in this world, from 1
	State    vmm.State `json:"state"`
	Reason   string    `json:"reason,omitempty"` // why it is Paused
	// Sizes are what the guest believes of its drives, in bytes: as at the start, or as it was told since.
	Sizes     map[vmm.Role]int64 `json:"sizes,omitempty"`
	StartedAt time.Time          `json:"started_at"`
	ChangedAt time.Time          `json:"changed_at"`
}

// exitRecord is how the machine with this instance number ended.
type exitRecord struct {
	Instance int      `json:"instance"`
	Exit     vmm.Exit `json:"exit"`
}

// pidBase is above the kernel's largest possible pid (PID_MAX_LIMIT, 4 * 1024 * 1024, proc(5)), so
// that a signal sent by mistake to a fake pid reaches nobody.
const pidBase = 4 * 1024 * 1024

// PID of the machine: unique in its world, and never the pid of a real process.
func (r Record) PID() int { return pidBase + r.Instance }

// Open makes the directory if need be and returns the world in it.
func Open(dir string) (*World, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	for _, d := range []string{dir, filepath.Join(dir, "machines"), filepath.Join(dir, "exits")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	return &World{dir: dir}, nil
}

// Dir is where the world lies.
func (w *World) Dir() string { return w.dir }

// Machines lists what runs, by marker: a test's proof that nothing was left behind.
func (w *World) Machines() ([]Record, error) {
	entries, err := os.ReadDir(filepath.Join(w.dir, "machines"))
	if err != nil {
		return nil, err
	}
	var out []Record
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".json") {
			continue // half-written by someone who was killed
		}
		r, err := readRecord(filepath.Join(w.dir, "machines", e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // ended since ReadDir
		}
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Spec.Marker() < out[j].Spec.Marker() })
	return out, nil
}

// Journal returns its lines: "start <marker> <name>" and "exit <marker> <reason>".
func (w *World) Journal() ([]string, error) {
	b, err := os.ReadFile(filepath.Join(w.dir, "journal"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n"), nil
}

// SetFaults replaces the faults file. See the package comment for its form.
func (w *World) SetFaults(text string) error {
	return writeAtomic(filepath.Join(w.dir, "faults"), []byte(text))
}

// End makes the running machine with this VM id or name end for the given reason, from outside.
// fault.NotFound if none runs.
func (w *World) End(who, reason string) error {
	r, err := w.find(who)
	if err != nil {
		return err
	}
	_, err = w.end(r.Spec.Marker(), r.Instance, reason)
	return err
}

// Pause pauses the running machine with this VM id or name, as a full host disk would.
// fault.NotFound if none runs.
func (w *World) Pause(who, reason string) error {
	r, err := w.find(who)
	if err != nil {
		return err
	}
	return w.setState(r.Spec.Marker(), r.Instance, vmm.Paused, reason)
}

func (w *World) find(who string) (Record, error) {
	all, err := w.Machines()
	if err != nil {
		return Record{}, err
	}
	for _, r := range all {
		if r.Spec.ID == who || r.Spec.Name == who {
			return r, nil
		}
	}
	return Record{}, fault.New(fault.NotFound, who, "no such machine runs in %s", w.dir)
}

func (w *World) machineFile(marker string) string {
	return filepath.Join(w.dir, "machines", marker+".json")
}

func (w *World) exitFile(marker string) string {
	return filepath.Join(w.dir, "exits", marker+".json")
}

// locked runs f while no other process or goroutine changes the world. The lock is the kernel's and
// goes with a process that is killed while it holds it.
func (w *World) locked(f func() error) error {
	fd, err := os.OpenFile(filepath.Join(w.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer fd.Close()
	for {
		err = unix.Flock(int(fd.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", w.dir, err)
	}
	return f()
}

// running reads the record of a marker's machine; ok is false if none runs.
func (w *World) running(marker string) (r Record, ok bool, err error) {
	r, err = readRecord(w.machineFile(marker))
	if errors.Is(err, fs.ErrNotExist) {
		return Record{}, false, nil
	}
	return r, err == nil, err
}

// start puts a machine into the table, or returns the one that is there already. The rename is the
// moment at which the machine runs: whoever is killed before it started nothing.
func (w *World) start(spec vmm.Spec) (r Record, started bool, err error) {
	err = w.locked(func() error {
		var ok bool
		if r, ok, err = w.running(spec.Marker()); err != nil || ok {
			return err
		}
		n, err := w.nextInstance()
		if err != nil {
			return err
		}
		now := time.Now()
		r = Record{Spec: spec, Instance: n, State: vmm.Running, StartedAt: now, ChangedAt: now, Sizes: map[vmm.Role]int64{}}
		for _, d := range spec.Drives {
			fi, err := os.Stat(d.Path)
			if err != nil {
				return err
			}
			r.Sizes[d.Role] = fi.Size()
		}
		if err := w.journal("start", spec.Marker(), spec.Name); err != nil {
			return err
		}
		started = true
		return writeJSON(w.machineFile(spec.Marker()), r)
	})
	return r, started, err
}

// end takes a machine out of the table. ended is false if that instance does not run any more.
func (w *World) end(marker string, instance int, reason string) (ended bool, err error) {
	err = w.locked(func() error {
		r, ok, err := w.running(marker)
		if err != nil || !ok || r.Instance != instance {
			return err
		}
		e := exitRecord{Instance: instance, Exit: vmm.Exit{Reason: reason, At: time.Now()}}
		if err := writeJSON(w.exitFile(marker), e); err != nil {
			return err
		}
		if err := w.journal("exit", marker, reason); err != nil {
			return err
		}
		ended = true
		return os.Remove(w.machineFile(marker))
	})
	return ended, err
}

func (w *World) setState(marker string, instance int, state vmm.State, reason string) error {
	return w.locked(func() error {
		r, ok, err := w.running(marker)
		if err != nil {
			return err
		}
		if !ok || r.Instance != instance {
			return fault.New(fault.Unavailable, marker, "the machine is gone")
		}
		if r.State == state {
			return nil
		}
		r.State, r.Reason, r.ChangedAt = state, reason, time.Now()
		return writeJSON(w.machineFile(marker), r)
	})
}

// resize tells the guest of a machine how large one of its drives is.
func (w *World) resize(marker string, instance int, role vmm.Role, bytes int64) error {
	return w.locked(func() error {
		r, ok, err := w.running(marker)
		if err != nil {
			return err
		}
		if !ok || r.Instance != instance {
			return fault.New(fault.Unavailable, marker, "the machine is gone")
		}
		if _, has := r.Sizes[role]; !has {
			return fault.New(fault.Precondition, marker, "the machine has no drive %s", role)
		}
		if r.Sizes[role] == bytes {
			return nil
		}
		r.Sizes[role] = bytes
		return writeJSON(w.machineFile(marker), r)
	})
}

// exitOf tells how an instance ended: what its exit record says, else that nobody saw why.
func (w *World) exitOf(marker string, instance int) vmm.Exit {
	var e exitRecord
	b, err := os.ReadFile(w.exitFile(marker))
	if err == nil && json.Unmarshal(b, &e) == nil && e.Instance == instance {
		return e.Exit
	}
	return vmm.Exit{Reason: vmm.Crashed, At: time.Now()}
}

// nextInstance counts starts. Called with the lock held.
func (w *World) nextInstance() (int, error) {
	path := filepath.Join(w.dir, "instances")
	n := 0
	b, err := os.ReadFile(path)
	if err == nil {
		_, err = fmt.Sscan(string(b), &n)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return n + 1, writeAtomic(path, fmt.Appendln(nil, n+1))
}

// journal appends a line. Called with the lock held.
func (w *World) journal(words ...string) error {
	return appendLine(filepath.Join(w.dir, "journal"), strings.Join(words, " "), os.O_CREATE)
}

// fault returns the argument of the first such line about the machine; ok is false without one.
func (w *World) fault(spec vmm.Spec, kind string) (arg string, ok bool) {
	b, err := os.ReadFile(filepath.Join(w.dir, "faults"))
	if err != nil {
		return "", false
	}
	for line := range strings.Lines(string(b)) {
		who, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		what, arg, _ := strings.Cut(strings.TrimSpace(rest), " ")
		if what == kind && (who == "*" || who == spec.Name || who == spec.ID) {
			return strings.TrimSpace(arg), true
		}
	}
	return "", false
}

func readRecord(path string) (r Record, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeAtomic(path, append(b, '\n'))
}

// writeAtomic has no fsync: a fake machine does not outlive its host any more than a process does.
func writeAtomic(path string, b []byte) error {
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// appendLine appends to a file, which flags may make: os.O_CREATE.
func appendLine(path, line string, flags int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|flags, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line + "\n")
	return errors.Join(err, f.Close())
}
