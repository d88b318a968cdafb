// Package cgroup owns the control groups that VMMs run in: one for each, with bounds on its memory,
// its CPU time and its number of tasks, so that a VMM that runs wild costs its host no more than a guest
// may. It never starts or ends a process.
//
// Where systemd runs, a VMM gets a transient scope from it: the system's manager if the daemon is root's,
// else the user's. A scope is a unit of its own, so that the end of the unit or session that the daemon
// belongs to does not end the VMs. Without systemd it gets a directory in the cgroup v2 hierarchy, where
// this user may make one. Elsewhere, and on hosts with cgroup v1, it gets none, and
// Group says why.
//
// A group is called banger-<installation>-<VM>-<pid>, with the short id of the VM; a scope of that name
// ends in .scope. The pid lets a VM start again while the kernel or systemd still clears its last group.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/process"
)

const (
	// putTime bounds what a start of a VM waits for systemd's greeting, and again for its group: a few milliseconds
	// where systemd is well.
	putTime = time.Second
	// emptyTime bounds the wait for a group to be empty after its process was seen to end.
	emptyTime = 2 * time.Second
)

// Limits bound a group. 0 means no bound.
type Limits struct {
	Memory int64   // bytes: memory.max
	CPUs   float64 // cpu.max, as CPUs kept busy
	Tasks  int64   // processes and threads: pids.max
}

// ForVM is what the VMM of a machine is held to. overheadMiB is what its kind of VMM may need beside the
// guest's memory and beside what every VMM needs.
//
// Memory: the guest's; a 64th of it for what the kernel keeps about it (its pages are in two page tables,
// 8 bytes for each 4 KiB: a 256th); and 256 MiB for the program, its kernel buffers, and the page cache of
// the disks that it reads and writes, which counts as its own and shrinks first. A guest that uses all of
// its memory must not meet the bound: it is for a VMM that leaks, or was taken over.
//
// CPU: the virtual CPUs, and one for the threads that serve devices. Less would be taken from the virtual
// CPUs while a disk or the network is busy, in pauses of tens of milliseconds.
//
// Tasks: a thread for each virtual CPU, QEMU's workers (64 for an event loop unless told otherwise: thread-pool-max
// in its qapi/qom.json), and what KVM and vhost add; generously.
func ForVM(vcpu int, memoryMiB, overheadMiB int64) Limits {
	return Limits{
		Memory: (memoryMiB + memoryMiB/64 + 256 + overheadMiB) << 20,
		CPUs:   float64(vcpu) + 1,
		Tasks:  int64(vcpu) + 256,
	}
}

// Host makes the groups of one installation on this host. Safe for concurrent use.
type Host struct {
	owner  string
	behalf int    // the user whose they are, if root makes them of another's
	root   string // where cgroup v2 should be mounted
	run    string // /run, where systemd is found
	linger string // names the users whose manager runs without a session
	user   func() (*user.User, error)
	of     func(pid int) (group string, err error)
	magic  int64 // of the filesystem that cgroup v2 is

	mu  sync.Mutex
	why map[string]string // why a VM has no group, by its short id
}

// New returns the host's groups for the installation of that id, and looks at nothing yet.
func New(owner string) *Host {
	return &Host{
		owner: owner, root: "/sys/fs/cgroup", run: "/run", linger: "/var/lib/systemd/linger",
		user: user.Current, of: process.CgroupOf, magic: unix.CGROUP2_SUPER_MAGIC, why: map[string]string{},
	}
}

// For makes the groups those of another user's VMs: root makes them, and that user's bounds hold for them. Before anything else is
// asked of the Host.
func (h *Host) For(uid int) { h.behalf = uid }

func (h *Host) prefix() string { return "banger-" + h.owner + "-" }

// owns says whether a group of that path is one of this installation's.
func (h *Host) owns(group string) bool { return strings.HasPrefix(path.Base(group), h.prefix()) }

// Put moves a process into a group of its own with these limits, unless it is in one already. A failure
// is told by Group, and the process runs on where it is. It takes two seconds at most.
func (h *Host) Put(ctx context.Context, id, description string, l Limits, pid int) {
	if group, err := h.of(pid); err == nil && h.owns(group) {
		return // systemd is not greeted for each VM that a daemon finds running
	}
	h.Begin(ctx, id, description, l)(ctx, pid)
}

// Begin is Put for a process that is about to be started: it returns at once, and systemd is greeted meanwhile. put has to be
// called once, with the process, or with 0 if none was started.
func (h *Host) Begin(ctx context.Context, id, description string, l Limits) (put func(ctx context.Context, pid int)) {
	w, failed := h.way()
	var m *manager
	greeted := make(chan struct{})
	go func() {
		defer close(greeted)
		if failed == nil && w.manager != "" { // it may be there, and not be one to ask
			ctx, cancel := context.WithTimeout(ctx, putTime)
			defer cancel()
			m, failed = greet(ctx, w.manager, w.uid)
		}
	}()
	return func(ctx context.Context, pid int) {
		<-greeted
		if m != nil {
			defer m.close()
		}
		if pid == 0 {
			return
		}
		ctx, cancel := context.WithTimeout(ctx, putTime)
		defer cancel()
		h.note(id, func() error {
			group, err := h.of(pid)
			if err != nil || h.owns(group) {
				return err
			}
			name := fmt.Sprintf("%s%s-%d", h.prefix(), id, pid)
			switch {
			case failed != nil:
				return failed
			case m != nil:
				return m.startScope(ctx, h.behalf, name+".scope", description, l, pid)
			case len(w.missing) > 0:
				if err := write(filepath.Join(w.parent, "cgroup.subtree_control"), "+"+strings.Join(w.missing, " +")); err != nil {
					return err
				}
			}
			return makeGroup(filepath.Join(w.parent, name), l, pid)
		}())
	}
}

// note keeps why a VM has no group, for Group.
func (h *Host) note(id string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil {
		delete(h.why, id)
		return
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("systemd did not answer within %v", putTime)
	}
	h.why[id] = line(err)
}

// Missing says in one line why a process that is started now would get no group, "" if it would. It
// changes nothing.
func (h *Host) Missing() (reason string) {
	if _, err := h.way(); err != nil {
		return line(err)
	}
	return ""
}

// Lingering tells whether this user's programs outlive the user's last session, as far as systemd has a say in it, and who
// the user is. Root's and those of a host without systemd do.
func (h *Host) Lingering() (user string, ok bool) {
	u, err := h.user()
	if err != nil || u.Uid == "0" || !h.systemd() {
		return "", true
	}
	_, err = os.Stat(filepath.Join(h.linger, u.Username))
	return u.Username, err == nil
}

// line renders an error as one line for people.
func line(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

// Group is the group of a VM's process, which runs in the given path of the cgroup v2 hierarchy
// (process.CgroupOf), with the limits that the kernel holds it to; or why it has none of its own.
func (h *Host) Group(id, group string) (name string, l Limits, why string) {
	if h.owns(group) {
		return path.Base(group), readLimits(filepath.Join(h.root, group)), ""
	}
	h.mu.Lock()
	why = h.why[id]
	h.mu.Unlock()
	if why == "" {
		why = h.Missing()
	}
	if why == "" {
		why = "it was started without one"
	}
	return "", Limits{}, why
}

// way is how a process gets a group: from a manager of systemd, or below a directory.
type way struct {
	manager string // systemd's private socket
	uid     int
	parent  string
	missing []string // controllers that parent does not hand on yet
}

// way looks at the host. The error is the reason why there is none.
func (h *Host) way() (w way, err error) {
	if !h.mounted() {
		return w, fmt.Errorf("this host has no cgroup v2 on %s", h.root)
	}
	if !h.systemd() {
		w.parent, w.missing, err = h.parent()
		return w, err
	}
	u, err := h.user()
	if err != nil {
		return w, fmt.Errorf("who is this? %w", err)
	}
	if w.uid, err = strconv.Atoi(u.Uid); err != nil {
		return w, err
	}
	// The sockets that systemctl itself uses (systemd's src/shared/bus-util.c, bus_connect_transport_systemd).
	w.manager = filepath.Join(h.run, "systemd/private")
	if w.uid != 0 {
		w.manager = filepath.Join(h.run, "user", u.Uid, "systemd/private")
		// The user's manager, and all of its scopes, end with the last session of a user who does not linger
		// (logind.conf(5), loginctl(1)). A VM that stays where the daemon is outlives that as a rule.
		if _, err := os.Stat(filepath.Join(h.linger, u.Username)); err != nil {
			return w, fmt.Errorf("user %s does not linger, and logging out would end it (sudo loginctl enable-linger %s)", u.Username, u.Username)
		}
	}
	if _, err := os.Stat(w.manager); err != nil {
		return w, errors.New("systemd's manager does not run for this user")
	}
	return w, nil
}

// controllers are those that the limits take.
var controllers = []string{"memory", "cpu", "pids"}

// parent finds the directory for groups: the nearest at or above this process's own that this user may
// write, and that passes controllers on or can be made to. Above a delegated subtree nothing is writable.
func (h *Host) parent() (dir string, missing []string, err error) {
	own, err := h.of(os.Getpid())
	if err != nil {
		return "", nil, err
	}
	if own == "" || strings.HasPrefix(own, "/..") { // cgroup_namespaces(7)
		return "", nil, errors.New("this process's control group is not below " + h.root)
	}
	var nearest error // explains best
	for group := own; ; group = path.Dir(group) {
		dir := filepath.Join(h.root, group)
		// Moving a process takes the right to write the cgroup.procs of what both places are below
		// (the kernel's cgroup-v2.rst, "Delegation Containment").
		err := unix.Access(filepath.Join(dir, "cgroup.procs"), unix.W_OK)
		foreign := err != nil
		if !foreign {
			if missing, err = divisible(dir); err == nil {
				return dir, missing, nil
			}
		}
		if nearest == nil {
			nearest = fmt.Errorf("the control group %s cannot be divided: %w", group, err)
		}
		if foreign || group == "/" {
			return "", nil, nearest
		}
	}
}

// divisible says whether a group can hand controllers on to groups below it, and which of them it does not
// yet. A group other than the root that holds processes itself cannot (cgroup-v2.rst, "No Internal
// Process Constraint").
func divisible(dir string) (missing []string, err error) {
	words := map[string][]string{}
	for _, file := range []string{"cgroup.controllers", "cgroup.subtree_control", "cgroup.procs"} {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return nil, err
		}
		words[file] = strings.Fields(string(b))
	}
	has := words["cgroup.controllers"]
	if !slices.Contains(has, "memory") && !slices.Contains(has, "cpu") {
		return nil, errors.New("it has neither the memory nor the cpu controller")
	}
	for _, c := range controllers {
		if slices.Contains(has, c) && !slices.Contains(words["cgroup.subtree_control"], c) {
			missing = append(missing, c)
		}
	}
	_, err = os.Stat(filepath.Join(dir, "cgroup.type")) // the root has none
	if len(missing) > 0 && len(words["cgroup.procs"]) > 0 && err == nil {
		return nil, errors.New("processes run in it")
	}
	return missing, nil
}

// write puts one value into a file of the hierarchy, in one write(2).
func write(file, value string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// makeGroup makes a group and moves a process into it; nothing is left of one that fails. Limits whose
// controller is missing are left out: what holds is read from the group later.
func makeGroup(dir string, l Limits, pid int) (err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Rmdir(dir))
		}
	}()
	const period = 100_000 // microseconds, the kernel's default
	for _, limit := range []struct{ file, value string }{
		{"memory.max", strconv.FormatInt(l.Memory, 10)},
		{"cpu.max", fmt.Sprintf("%d %d", int64(l.CPUs*period), period)},
		{"pids.max", strconv.FormatInt(l.Tasks, 10)},
	} {
		if err := write(filepath.Join(dir, limit.file), limit.value); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return write(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid))
}

// readLimits reads what holds for a group's own processes. What cannot be read is not bounded by it.
func readLimits(dir string) (l Limits) {
	fields := func(file string) []string {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return nil
		}
		return strings.Fields(string(b))
	}
	number := func(s string) int64 {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return 0 // "max"
		}
		return n
	}
	if f := fields("memory.max"); len(f) == 1 {
		l.Memory = number(f[0])
	}
	if f := fields("cpu.max"); len(f) == 2 && number(f[1]) > 0 {
		l.CPUs = float64(number(f[0])) / float64(number(f[1]))
	}
	if f := fields("pids.max"); len(f) == 1 {
		l.Tasks = number(f[0])
	}
	return l
}

// Remove removes what is left of a VM's group when its process has ended. systemd removes scopes itself.
// Fine if there is none. fault.Busy if something still runs in it.
func (h *Host) Remove(ctx context.Context, id string) error {
	h.mu.Lock()
	delete(h.why, id)
	h.mu.Unlock()
	return h.remove(ctx, h.prefix()+id+"-", true)
}

// Sweep removes the groups of this installation in which nothing runs any more: those of VMMs that ended
// while no daemon ran.
func (h *Host) Sweep(ctx context.Context) error { return h.remove(ctx, h.prefix(), false) }

// remove removes the groups below root whose name begins so. One that is not empty is waited for, or
// left alone.
func (h *Host) remove(ctx context.Context, prefix string, wait bool) error {
	if !h.mounted() || h.systemd() {
		return nil
	}
	var errs []error
	err := filepath.WalkDir(h.root, func(dir string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			return nil // another group, gone meanwhile or not ours
		}
		if err != nil || !d.IsDir() || !strings.HasPrefix(d.Name(), prefix) {
			return err
		}
		err = unix.Rmdir(dir)
		if errors.Is(err, unix.EBUSY) && wait {
			err = rmdirWhenEmpty(ctx, dir)
		}
		if errors.Is(err, fs.ErrPermission) {
			return fs.SkipDir // root made it, of a VM in a jail, and removes it
		}
		if err != nil && !errors.Is(err, unix.ENOENT) && (wait || !errors.Is(err, unix.EBUSY)) {
			errs = append(errs, fault.Wrap(err, fault.Busy, dir, "the control group of a VM that ended cannot be removed"))
		}
		return fs.SkipDir
	})
	return errors.Join(append(errs, err)...)
}

func (h *Host) mounted() bool {
	var st unix.Statfs_t
	return unix.Statfs(h.root, &st) == nil && st.Type == h.magic
}

// systemd says whether systemd is the init: sd_booted(3).
func (h *Host) systemd() bool {
	_, err := os.Stat(filepath.Join(h.run, "systemd/system"))
	return err == nil
}

// rmdirWhenEmpty waits for the kernel to say that nothing runs in a group any more (cgroup-v2.rst,
// "[Un]populated Notification"), and removes it.
func rmdirWhenEmpty(ctx context.Context, dir string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return err
	}
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	if _, err := unix.InotifyAddWatch(fd, filepath.Join(dir, "cgroup.events"), unix.IN_MODIFY); err != nil {
		return err
	}
	deadline := time.Now().Add(emptyTime)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := events.SetReadDeadline(deadline); err != nil {
		return err
	}
	for {
		if err := unix.Rmdir(dir); err != unix.EBUSY {
			return err
		}
		if _, err := events.Read(make([]byte, 4096)); err != nil {
			return fmt.Errorf("wait for it to be empty: %w", err)
		}
	}
}
