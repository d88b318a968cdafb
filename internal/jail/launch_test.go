package jail

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/process"
)

// someUser owns the files in these tests; the host need not know it.
const someUser, someGroup = 54321, 54322

const patience = 20 * time.Second

// realHost is a Host of an ordinary user's, with the real programs. It needs root, and changes nothing of this host but directories of the
// test's: mounts are in namespaces of the processes.
func realHost(t *testing.T, dir string) *Host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("jails take root")
	}
	runtime := os.Getenv("BANGER_RUNTIME_DIR")
	if runtime == "" {
		runtime = "../../runtime"
	}
	runtime, err := filepath.Abs(runtime)
	if err != nil {
		t.Fatal(err)
	}
	p := Programs{Firecracker: filepath.Join(runtime, "firecracker"), Jailer: filepath.Join(runtime, "jailer")}
	for _, program := range []string{p.Firecracker, p.Jailer} {
		if _, err := os.Stat(program); err != nil {
			t.Skip("no jailer runs here (make runtime brings one): ", err)
		}
	}
	if kvm, err := os.Stat("/dev/kvm"); err != nil || kvm.Mode()&os.ModeCharDevice == 0 {
		t.Skip("this host has no /dev/kvm")
	}
	return NewHost(Options{User: someUser, Dir: filepath.Join(dir, "jails"), Programs: func() (Programs, error) { return p, nil },
		GiveTAP: func(string, int) error { return nil }})
}

// files makes what a jail needs in a directory, as that user's.
func files(t *testing.T, dir string) Files {
	t.Helper()
	open := func(name string, flags int) *os.File {
		t.Helper()
		path := filepath.Join(dir, name)
		if flags&unix.O_DIRECTORY != 0 {
			if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(path, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, someUser, someGroup); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	return Files{
		Log: open("log", os.O_WRONLY|os.O_APPEND), Run: open("run", os.O_RDONLY|unix.O_DIRECTORY), Kernel: open("kernel", os.O_RDONLY), Initrd: open("initrd", os.O_RDONLY),
		Drives: []*os.File{open("base", os.O_RDONLY), open("system", os.O_WRONLY)}, Net: open("net", os.O_RDONLY|unix.O_DIRECTORY),
	}
}

var twoDrives = Request{Name: aName, VCPU: 1, MemoryMiB: 64, Drives: []Drive{{"base", true}, {"system", false}}}

// asks has Firecracker's API answer at the socket in the run directory.
func asks(t *testing.T, dir string) int {
	t.Helper()
	for end := time.Now().Add(patience); ; {
		conn, err := net.Dial("unix", filepath.Join(dir, "run", APISocket))
		if err != nil {
			if time.Now().After(end) {
				log, _ := os.ReadFile(filepath.Join(dir, "log"))
				t.Fatalf("%v; its log:\n%s", err, log)
			}
			time.Sleep(5 * time.Millisecond)
			continue
		}
		defer conn.Close()
		if _, err := fmt.Fprint(conn, "GET /version HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		return answer.StatusCode
	}
}

func end(t *testing.T, s process.Started) {
	t.Helper()
	if err := unix.PidfdSendSignal(int(s.PIDFD.Fd()), unix.SIGKILL, nil, 0); err != nil {
		t.Fatal(err)
	}
	select {
	case ws := <-s.Exit:
		if !ws.Signaled() {
			t.Errorf("it ended with %v", ws)
		}
	case <-time.After(patience):
		t.Fatal("it does not end")
	}
}

// nothing wants no trace of a jail: records, user ids, mounts. Records go just after the end was told.
func nothing(t *testing.T, h *Host) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		left, err := filepath.Glob(h.d.path("*-*"))
		if err != nil {
			t.Fatal(err)
		}
		if len(left) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("left are %v", left)
		}
	}
	if left, err := os.ReadDir(h.d.path(jailBase)); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), "banger-jail") {
		t.Errorf("mounts are left, %v", err)
	}
}

// TestJail starts a real Firecracker in a real jail and looks at it from outside, and at what is there inside: with files here, and on
// filesystems of other kinds, since not all let the ids of their files be mapped.
func TestJail(t *testing.T) {
	t.Run("here", func(t *testing.T) { jailIn(t, t.TempDir()) })
	for _, kind := range []string{"xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) { jailIn(t, mounted(t, kind)) })
	}
}

// mounted is an empty filesystem of a kind, for the test.
func mounted(t *testing.T, kind string) (dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("jails take root")
	}
	if known, err := os.ReadFile("/proc/filesystems"); err != nil || !regexp.MustCompile(`\b`+kind+`\n`).Match(known) {
		t.Skip("this host's kernel has no " + kind)
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 400<<20)); err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	for _, command := range [][]string{{"mkfs." + kind, "-q", image}, {"mount", "-t", kind, "-o", "loop", image, dir}} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", command, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	return dir
}

func jailIn(t *testing.T, dir string) {
	h := realHost(t, dir)
	f := files(t, dir)
	if err := h.Check(t.Context(), f.Run); fault.Is(err, fault.Unsupported) {
		t.Skip("this host has no jails: ", err)
	} else if err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(filepath.Join(dir, "system"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := h.Start(t.Context(), twoDrives, f)
	if err != nil {
		t.Fatal(err)
	}
	defer s.PIDFD.Close()
	if code := asks(t, dir); code != http.StatusOK {
		t.Errorf("its API says %d", code)
	}
	r, err := h.d.get(aName.file(someUser))
	if err != nil || r.PID != s.PID || !Inside(r.UID) {
		t.Fatalf("%+v, %v", r, err)
	}

	// Its standard input holds the lock on a drive, and gives the guest's console none of it.
	if info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/0", s.PID)); err != nil || !regexp.MustCompile(`(?m)^flags:\t0\d*1$`).Match(info) {
		t.Errorf("its standard input is not for writing alone: %s, %v", info, err)
	}

	// Its root, as root sees it.
	root := fmt.Sprintf("/proc/%d/root", s.PID)
	var got []string
	err = filepath.WalkDir(root+"/", func(path string, d os.DirEntry, err error) error {
		got = append(got, strings.TrimPrefix(path, root))
		return err
	})
	want := []string{"/", "/dev", "/dev/kvm", "/dev/net", "/dev/net/tun", "/dev/urandom", "/drives", "/drives/base", "/drives/system", "/firecracker", "/firecracker.pid",
		"/initrd", "/kernel", "/net", "/run", "/vm", "/vm/api.sock"}
	got = slices.DeleteFunc(got, func(p string) bool { return p == "/dev/userfaultfd" }) // where the kernel has it
	if slices.Sort(got); err != nil || !slices.Equal(got, want) {
		t.Errorf("in the jail are %q, %v; want %q", got, err, want)
	}

	// What its user may do there, by a program that is let into its namespaces with its ids: it has to be in the jail for that.
	uid := r.UID
	inside := func(what string, f func() error) error {
		return onThread(func() error {
			if err := errors.Join(unix.Unshare(unix.CLONE_FS), enter(s.PID)); err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			for _, call := range [][4]uintptr{{unix.SYS_SETGROUPS, 0, 0, 0}, {unix.SYS_SETRESGID, uintptr(uid), uintptr(uid), uintptr(uid)}, {unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)}} {
				if _, _, errno := unix.RawSyscall(call[0], call[1], call[2], call[3]); errno != 0 {
					return errno
				}
			}
			return f()
		})
	}
	open := func(path string, flags int) func() error {
		return func() error {
			fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
			if err == nil {
				err = unix.Close(fd)
			}
			return err
		}
	}
	for _, c := range []struct {
		what string
		f    func() error
		want error
	}{
		{"read the base", open("/drives/base", unix.O_RDONLY), nil},
		{"write the base", open("/drives/base", unix.O_RDWR), unix.EROFS},
		{"write the system disk", open("/drives/system", unix.O_RDWR), nil},
		{"write the kernel", open("/kernel", unix.O_RDWR), unix.EROFS},
		{"make another drive", open("/drives/other", unix.O_RDWR|unix.O_CREAT), unix.EACCES},
		{"make a socket", open("/vm/made", unix.O_RDWR|unix.O_CREAT), nil},
		{"change the network's directory", open("/net/made", unix.O_RDWR|unix.O_CREAT), unix.EROFS},
		{"replace Firecracker", open("/firecracker", unix.O_RDWR), unix.EACCES},
		{"leave by the parent", open("/../../etc/passwd", unix.O_RDONLY), unix.ENOENT},
		{"see processes", open("/proc/self", unix.O_RDONLY), unix.ENOENT},
		{"open KVM", func() error { // what the host's driver says of it is not the jail's
			if err := open("/dev/kvm", unix.O_RDWR)(); errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOENT) {
				return err
			}
			return nil
		}, nil},
		{"mount", func() error { return unix.Mount("x", "/run", "tmpfs", 0, "") }, unix.EPERM},
		{"give its drive away", func() error { return unix.Chown("/drives/system", 0, 0) }, unix.EOVERFLOW}, // whom nobody there is
	} {
		if err := inside(c.what, c.f); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.what, err, c.want)
		}
	}

	// Outside, all belongs to whom it did, and so does what was made inside.
	for _, name := range []string{"system", "base", "kernel", "run/made", "run/" + APISocket} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil || st.Uid != someUser || st.Gid != someGroup {
			t.Errorf("%s is user %d's and group %d's, %v", name, st.Uid, st.Gid, err)
		}
	}
	if after, err := os.Stat(filepath.Join(dir, "system")); err != nil || after.Mode() != before.Mode() || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("the drive changed: %v, %v", after, err)
	}

	// A second one is refused, another VM gets another id.
	if _, err := h.Start(t.Context(), twoDrives, f); !fault.Is(err, fault.Busy) {
		t.Errorf("a second one: %v", err)
	}
	pid, pidfd, err := NewHost(h.o).Find(t.Context(), aName) // as after a restart
	if err != nil || pid != s.PID || pidfd.Close() != nil {
		t.Errorf("%d, %v", pid, err)
	}
	end(t, s)
	nothing(t, h)
}

// enter has the thread be in the mount namespace of a process, at its root.
func enter(pid int) error {
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Setns(fd, unix.CLONE_NEWNS) // which is at the namespace's root then (setns(2))
}

// TestJailFails: of a jail that cannot be made nothing is left, and what the jailer says is in the log.
func TestJailFails(t *testing.T) {
	dir := t.TempDir()
	h := realHost(t, dir)
	f := files(t, dir)
	ctx := t.Context()

	// A file whose filesystem has no owners that could be mapped.
	proc, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	odd, as := f, *h
	odd.Kernel, as.o.User = proc, 0
	if _, err := as.Start(ctx, twoDrives, odd); err == nil {
		t.Error("a file of /proc is put into a jail")
	}
	// A program that ends at once.
	gone := *h
	gone.o.Programs = func() (Programs, error) {
		p, err := h.o.Programs()
		p.Jailer = "/bin/false"
		return p, err
	}
	s, err := gone.Start(ctx, twoDrives, f)
	if err != nil {
		t.Fatal(err)
	}
	if ws := <-s.Exit; ws.ExitStatus() != 1 {
		t.Errorf("%v", ws)
	}
	_ = s.PIDFD.Close()
	nothing(t, h)
	// One that is not there.
	nowhere := *h // each its own: the first one's process is still seen to its end
	nowhere.o.Programs = func() (Programs, error) { return Programs{"/nowhere/firecracker", "/nowhere/jailer"}, nil }
	if _, err := nowhere.Start(ctx, twoDrives, f); !fault.Is(err, fault.Unsupported) {
		t.Errorf("%v", err)
	}
	// A TAP that cannot be given.
	busy := *h
	busy.o.GiveTAP = func(string, int) error { return fault.New(fault.Busy, "tap", "somebody has it") }
	r := twoDrives
	r.TAPs = []string{"bgra1b2c3-0"}
	if _, err := busy.Start(ctx, r, f); !fault.Is(err, fault.Busy) {
		t.Errorf("%v", err)
	}
	nothing(t, h)
}

// TestMakerIsKilled kills the process that makes a jail after it has started one: the next one finds it by its record.
func TestMakerIsKilled(t *testing.T) {
	const variable = "JAIL_TEST_DIR"
	if dir := os.Getenv(variable); dir != "" {
		s, err := realHost(t, dir).Start(context.Background(), twoDrives, files(t, dir))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("started", s.PID)
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	dir := t.TempDir()
	h := realHost(t, dir)
	cmd := exec.Command(os.Args[0], "-test.run", "^TestMakerIsKilled$")
	cmd.Env = append(os.Environ(), variable+"="+dir)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "started") {
		t.Skipf("no jail was made: %v\n%s", err, out)
	}
	if code := asks(t, dir); code != http.StatusOK {
		t.Errorf("its API says %d", code)
	}
	pid, pidfd, err := h.Find(t.Context(), aName)
	if err != nil {
		t.Fatal(err)
	}
	defer pidfd.Close()
	if vms, err := h.List(t.Context(), aName.Installation, aName.Place); err != nil || len(vms) != 1 {
		t.Errorf("%v, %v", vms, err)
	}
	if err := h.Signal(t.Context(), aName, int(unix.SIGKILL)); err != nil {
		t.Fatal(err)
	}
	fds := []unix.PollFd{{Fd: int32(pidfd.Fd()), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, int(patience.Milliseconds())); err != nil || n != 1 {
		t.Fatalf("process %d does not end: %v", pid, err)
	}
	if err := h.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	nothing(t, h)
}
