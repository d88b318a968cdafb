package cgroup

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/process"
)

// patience bounds waits that end at once when all is well.
const patience = 20 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestForVM keeps the arithmetic, and what the rest of it is for: room beside the guest.
func TestForVM(t *testing.T) {
	for _, c := range []struct {
		vcpu             int
		memory, overhead int64
		want             Limits
	}{
		{2, 1024, 0, Limits{Memory: (1024 + 16 + 256) << 20, CPUs: 3, Tasks: 258}},
		{1, 128, 512, Limits{Memory: (128 + 2 + 256 + 512) << 20, CPUs: 2, Tasks: 257}},
	} {
		if diff := cmp.Diff(c.want, ForVM(c.vcpu, c.memory, c.overhead)); diff != "" {
			t.Errorf("%d CPUs, %d MiB (-want +got):\n%s", c.vcpu, c.memory, diff)
		}
	}
}

// fake is a host made of files, on which this process is in the group own.
func fake(t *testing.T, own string) *Host {
	t.Helper()
	top := t.TempDir()
	h := New("0123456789ab")
	h.root, h.run, h.linger = filepath.Join(top, "cgroup"), filepath.Join(top, "run"), filepath.Join(top, "linger")
	h.user = func() (*user.User, error) { return &user.User{Uid: "0", Username: "root"}, nil }
	h.of = func(int) (string, error) { return own, nil }
	for _, dir := range []string{h.root, h.run, h.linger} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(h.root, &st); err != nil {
		t.Fatal(err)
	}
	h.magic = st.Type
	return h
}

// files writes files below dir: path, then content.
func files(t *testing.T, dir string, pairs ...string) {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		p := filepath.Join(dir, pairs[i])
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(pairs[i+1]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestMissing goes through what hosts lack.
func TestMissing(t *testing.T) {
	systemd := []string{"systemd/system/x", ""}
	for _, c := range []struct {
		name string
		own  string
		make func(t *testing.T, h *Host)
		want string
	}{
		{"cgroup v1", "/", func(_ *testing.T, h *Host) { h.magic++ }, "no cgroup v2 on"},
		{"systemd", "/", func(t *testing.T, h *Host) { files(t, h.run, append(systemd, "systemd/private", "")...) }, ""},
		{"systemd, starting", "/", func(t *testing.T, h *Host) { files(t, h.run, systemd...) }, "systemd's manager does not run for this user"},
		{"a user who does not linger", "/", func(t *testing.T, h *Host) {
			h.user = func() (*user.User, error) { return &user.User{Uid: "1000", Username: "you"}, nil }
			files(t, h.run, append(systemd, "systemd/private", "", "user/1000/systemd/private", "")...)
		}, "sudo loginctl enable-linger you"},
		{"a user who lingers", "/", func(t *testing.T, h *Host) {
			h.user = func() (*user.User, error) { return &user.User{Uid: "1000", Username: "you"}, nil }
			files(t, h.run, append(systemd, "user/1000/systemd/private", "")...)
			files(t, h.linger, "you", "")
		}, ""},
		{"the root group", "/", func(t *testing.T, h *Host) {
			files(t, h.root, "cgroup.controllers", "cpuset cpu io memory pids\n", "cgroup.subtree_control", "\n", "cgroup.procs", "1\n2\n")
		}, ""},
		{"a container's own group", "/", func(t *testing.T, h *Host) {
			files(t, h.root, "cgroup.controllers", "cpu memory\n", "cgroup.subtree_control", "", "cgroup.procs", "1\n", "cgroup.type", "domain\n")
		}, "the control group / cannot be divided: processes run in it"},
		{"one that passes its controllers on", "/you/shell", func(t *testing.T, h *Host) {
			files(t, h.root, "cgroup.procs", "", "cgroup.type", "domain\n")
			files(t, filepath.Join(h.root, "you"), "cgroup.controllers", "cpu memory pids\n", "cgroup.subtree_control", "cpu memory pids\n", "cgroup.procs", "", "cgroup.type", "domain\n")
			files(t, filepath.Join(h.root, "you/shell"), "cgroup.controllers", "cpu memory pids\n", "cgroup.subtree_control", "", "cgroup.procs", "7\n", "cgroup.type", "domain\n")
		}, ""},
		{"without controllers", "/", func(t *testing.T, h *Host) {
			files(t, h.root, "cgroup.controllers", "hugetlb\n", "cgroup.subtree_control", "", "cgroup.procs", "1\n")
		}, "neither the memory nor the cpu controller"},
		{"outside of what is seen", "/../x", func(*testing.T, *Host) {}, "is not below"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := fake(t, c.own)
			c.make(t, h)
			got := h.Missing()
			if (got == "") != (c.want == "") || !strings.Contains(got, c.want) || strings.Contains(got, "\n") {
				t.Errorf("%q, want %q", got, c.want)
			}
			if who, lingers := h.Lingering(); lingers == strings.Contains(c.want, "enable-linger") || !lingers && who != "you" {
				t.Errorf("lingering: %q, %v", who, lingers)
			}
		})
	}
}

// TestGroup reads limits as the kernel writes them, and says why there are none.
func TestGroup(t *testing.T) {
	h := fake(t, "/")
	const name = "banger-0123456789ab-aaaaaaaaaaaa-7.scope"
	files(t, filepath.Join(h.root, "system.slice", name),
		"memory.max", "1342177280\n", "cpu.max", "250000 100000\n", "pids.max", "258\n")
	files(t, filepath.Join(h.root, "banger-0123456789ab-bbbbbbbbbbbb-8"), "memory.max", "max\n", "cpu.max", "max 100000\n")
	for _, c := range []struct {
		group, name string
		want        Limits
	}{
		{"/system.slice/" + name, name, Limits{Memory: 1280 << 20, CPUs: 2.5, Tasks: 258}},
		{"/banger-0123456789ab-bbbbbbbbbbbb-8", "banger-0123456789ab-bbbbbbbbbbbb-8", Limits{}},
		{"/system.slice/banger-ba9876543210-aaaaaaaaaaaa-7.scope", "", Limits{}}, // another installation's
		{"/user.slice", "", Limits{}},
	} {
		group, limits, why := h.Group("aaaaaaaaaaaa", c.group)
		if group != c.name || (why == "") != (c.name != "") {
			t.Errorf("%s: %q, because %q", c.group, group, why)
		}
		if diff := cmp.Diff(c.want, limits); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.group, diff)
		}
	}
}

// TestMakeGroup looks at what is written, in which order, and what is left when a process cannot be moved.
func TestMakeGroup(t *testing.T) {
	if err := makeGroup(filepath.Join(t.TempDir(), "none", "x"), Limits{}, 1); err == nil {
		t.Error("a group below one that is not there")
	}
	// Nothing makes cgroup.procs here: the move fails, and takes the directory back.
	dir := filepath.Join(t.TempDir(), "x")
	if err := makeGroup(dir, ForVM(1, 128, 0), os.Getpid()); err == nil {
		t.Error("moved into a directory that is no group")
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the directory of a failed move: %v", err)
	}
}

// realHierarchy is a cgroup v2 mount in which this process may make groups, with or without controllers.
func realHierarchy(t *testing.T) *Host {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		h := New(fmt.Sprintf("%012x", os.Getpid()))
		h.root, h.run = root, t.TempDir() // no systemd
		if h.mounted() && unix.Access(filepath.Join(root, "cgroup.procs"), unix.W_OK) == nil {
			return h
		}
	}
	t.Skip("no cgroup v2 hierarchy that this user may write")
	return nil
}

// sleeper starts a program in a group of its own below the hierarchy's root.
func sleeper(t *testing.T, h *Host, id string) (*process.Process, string) {
	t.Helper()
	dir := t.TempDir()
	var group string
	p, err := process.Start(t.Context(), process.Command{
		Path: "/bin/sleep", Args: []string{"sleep", "60"}, Dir: dir,
		Log: filepath.Join(dir, "log"), Pidfile: filepath.Join(dir, "pid"), Marker: "60",
		Cgroup: func(context.Context) func(context.Context, int) {
			return func(_ context.Context, pid int) {
				group = filepath.Join(h.root, fmt.Sprintf("%s%s-%d", h.prefix(), id, pid))
				if err := makeGroup(group, ForVM(1, 128, 0), pid); err != nil {
					t.Error(err)
				}
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := p.Kill(ctx); err != nil {
			t.Error(err)
		}
		_ = rmdirWhenEmpty(ctx, group) // only if the test failed before
	})
	return p, group
}

// TestRealGroup puts processes into groups of the running kernel, and removes the groups with them.
func TestRealGroup(t *testing.T) {
	h := realHierarchy(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	p, group := sleeper(t, h, "aaaaaaaaaaaa")
	other, kept := sleeper(t, h, "bbbbbbbbbbbb")

	in, err := process.CgroupOf(p.PID())
	if err != nil || filepath.Join(h.root, in) != group || !h.owns(in) {
		t.Fatalf("the process is in %s, %v; want %s", in, err, group)
	}
	if name, _, why := h.Group("aaaaaaaaaaaa", in); name != filepath.Base(group) || why != "" {
		t.Errorf("group %q, %q", name, why)
	}
	h.Put(ctx, "aaaaaaaaaaaa", "", Limits{}, p.PID()) // it is in one already: nothing happens
	if again, err := process.CgroupOf(p.PID()); err != nil || again != in {
		t.Errorf("a second Put moved it to %s, %v", again, err)
	}
	if err := h.Sweep(ctx); err != nil {
		t.Errorf("sweep while both run: %v", err)
	}
	if _, err := os.Stat(group); err != nil {
		t.Errorf("a group in use was removed: %v", err)
	}

	// Removed at the end of the process, which may have not left it yet.
	removed := make(chan error, 1)
	go func() { removed <- h.Remove(ctx, "aaaaaaaaaaaa") }()
	if err := p.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-removed; err != nil {
		t.Errorf("remove: %v", err)
	}
	if _, err := os.Stat(group); !os.IsNotExist(err) {
		t.Errorf("%s: %v, want it removed", group, err)
	}
	if _, err := os.Stat(kept); err != nil {
		t.Errorf("another VM's group: %v", err)
	}
	// As after a daemon that was away when it ended.
	if err := other.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if err := h.Sweep(ctx); err != nil {
		t.Errorf("sweep: %v", err)
	}
	if _, err := os.Stat(kept); !os.IsNotExist(err) {
		t.Errorf("%s after the sweep: %v", kept, err)
	}
	if err := h.Remove(ctx, "bbbbbbbbbbbb"); err != nil {
		t.Errorf("remove of what is gone: %v", err)
	}
}

// TestRealPut asks the running host, whatever it has: systemd or a hierarchy of its own.
func TestRealPut(t *testing.T) {
	h := New(fmt.Sprintf("%012x", os.Getpid()))
	if why := h.Missing(); why != "" {
		t.Skip(why)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	dir := t.TempDir()
	limits := ForVM(2, 1024, 0)
	var took time.Duration
	start := func() *process.Process {
		p, err := process.Start(ctx, process.Command{
			Path: "/bin/sleep", Args: []string{"sleep", "60"}, Dir: dir,
			Log: filepath.Join(dir, "log"), Pidfile: filepath.Join(dir, "pid"), Marker: "60",
			Cgroup: func(ctx context.Context) func(context.Context, int) {
				put := h.Begin(ctx, "aaaaaaaaaaaa", "banger test", limits)
				return func(ctx context.Context, pid int) {
					began := time.Now()
					put(ctx, pid)
					took = time.Since(began)
				}
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for range 3 { // at once again, as a restart does
		p := start()
		group, err := process.CgroupOf(p.PID())
		if err != nil {
			t.Error(err)
		}
		name, got, why := h.Group("aaaaaaaaaaaa", group)
		t.Logf("%s after %v", group, took)
		if name == "" || why != "" {
			t.Errorf("in %s, because %q", group, why)
		}
		if diff := cmp.Diff(limits, got); diff != "" {
			t.Errorf("limits (-want +got):\n%s", diff)
		}
		if err := p.Kill(ctx); err != nil {
			t.Error(err)
		}
		if err := h.Remove(ctx, "aaaaaaaaaaaa"); err != nil {
			t.Error(err)
		}
		if h.systemd() {
			gone(t, h, group)
		} else if _, err := os.Stat(filepath.Join(h.root, group)); !os.IsNotExist(err) {
			t.Errorf("%s: %v", group, err)
		}
	}
}

// gone waits until systemd has removed a group.
func gone(t *testing.T, h *Host, group string) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) { // removal of a directory of cgroupfs has no event
		if _, err := os.Stat(filepath.Join(h.root, group)); os.IsNotExist(err) {
			return
		}
	}
	t.Errorf("%s is still there after %v", group, patience)
}

// What does not end is not waited for without bound, and is said.
func TestRemoveInUse(t *testing.T) {
	h := realHierarchy(t)
	_, group := sleeper(t, h, "cccccccccccc")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := h.Remove(ctx, "cccccccccccc"); err == nil || !strings.Contains(err.Error(), group) {
		t.Errorf("remove of a group in use: %v", err)
	}
}

// A manager that takes the connection and says nothing costs a start its bound, and is named.
func TestSilentManager(t *testing.T) {
	h := fake(t, "/")
	files(t, h.run, "systemd/system/x", "")
	l, err := net.Listen("unix", filepath.Join(h.run, "systemd/private"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	began := time.Now()
	h.Put(t.Context(), "aaaaaaaaaaaa", "banger VM calm-otter", ForVM(1, 128, 0), os.Getpid())
	if took := time.Since(began); took < putTime || took > putTime+patience {
		t.Errorf("it took %v", took)
	}
	if _, _, why := h.Group("aaaaaaaaaaaa", "/"); why != "systemd did not answer within 1s" {
		t.Errorf("why: %q", why)
	}
}
