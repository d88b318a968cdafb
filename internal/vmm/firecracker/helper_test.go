package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/helper"
	"git.thaloco.com/thaloco/banger/internal/jail"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/vmmtest"
)

// someUser is an ordinary user, of whom the host need not know.
const someUser = 54321

// userVariable tells the test program that it is that user, and where it finds what it needs.
const userVariable = "FIRECRACKER_TEST_USER"

// TestHelperConformance is TestJailedConformance for an ordinary user: the suite runs as one, in a process of its own, and asks a helper, which
// is this process, for what takes root. /dev/kvm is root's here, perhaps; a jail has one of its own.
func TestHelperConformance(t *testing.T) {
	if dir := os.Getenv(userVariable); dir != "" {
		asUser(t, dir)
		return
	}
	jailHost(t) // or skips
	program, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	// All that the user gets to see: directories of tests are root's alone.
	dir, err := os.MkdirTemp("", "helper")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, d := range []string{"", "user", "golden"} {
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, d), 0o755), os.Chmod(filepath.Join(dir, d), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{exe: "test", program: "firecracker", filepath.Join(filepath.Dir(program), "jailer"): "jailer", "testdata/firecracker.skips": "golden/firecracker.skips"} {
		copyFile(t, from, filepath.Join(dir, to))
	}
	if err := os.Chown(filepath.Join(dir, "user"), someUser, someUser); err != nil {
		t.Fatal(err)
	}
	host := jail.NewHost(jail.Options{User: someUser, Dir: filepath.Join(dir, "jails"), GiveTAP: func(string, int) error { return errors.New("there are no TAPs in these tests") },
		Programs: func() (jail.Programs, error) {
			return jail.Programs{Firecracker: filepath.Join(dir, "firecracker"), Jailer: filepath.Join(dir, "jailer")}, nil
		}})
	socket := filepath.Join(dir, "jailer.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err == nil {
		err = os.Chown(socket, someUser, someUser)
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error)
	go func() {
		served <- helper.NewServer(helper.Options{UID: someUser, Records: filepath.Join(dir, "records"), Jails: host,
			Bound: func(context.Context, jail.Request, int) {}, Log: slog.New(slog.DiscardHandler)}).Serve(ctx, l)
	}()
	defer func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	cmd := exec.Command(filepath.Join(dir, "test"), "-test.run", "^TestHelperConformance$", "-test.v", "-test.timeout=5m")
	cmd.Dir = filepath.Join(dir, "user")
	cmd.Env = []string{userVariable + "=" + dir, "TMPDIR=" + filepath.Join(dir, "user"), "PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: someUser, Gid: someUser}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), "--- PASS: TestHelperConformance/sweep-ends-what-nobody-knows") {
		t.Errorf("the suite did not run:\n%s", out)
	}
	// What is left of all of them: no record, no user id, no mount.
	left, err := filepath.Glob(filepath.Join(dir, "jails", "*-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("mounts are left, %v", err)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE, 0o755)
	if err == nil {
		_, err = io.Copy(out, in)
		err = errors.Join(err, out.Chmod(0o755), out.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// asUser runs the suite, and looks at what a jail is besides.
func asUser(t *testing.T, dir string) {
	j := helper.NewJailer(filepath.Join(dir, "jailer.sock"))
	c := conformance()
	c.Golden = filepath.Join(dir, "golden")
	c.New = func(*testing.T) vmm.Driver {
		d := driverOf(filepath.Join(dir, "firecracker"))
		d.UseJails(Jails{Jail: j, Want: true, Must: true})
		return d
	}
	c.End = func(t *testing.T, s vmm.Spec) {
		p, err := process.Open(t.Context(), filepath.Join(s.RunDir, pidfile), s.Marker())
		if err != nil {
			t.Fatal(err)
		}
		p.SignalBy(func(sig int) error { return j.Signal(t.Context(), jailName(s), sig) })
		if err := errors.Join(p.Kill(t.Context()), p.Close()); err != nil {
			t.Fatal(err)
		}
	}
	vmmtest.Run(t, c)

	s := newSpec(t)
	m := start(t, c.New(t).(*Driver), s)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("no %q in\n%s", want, status)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d", m.PID()), &st); err != nil || !jail.Inside(int(st.Uid)) || st.Uid != st.Gid {
		t.Errorf("it is user %d, group %d, %v", st.Uid, st.Gid, err)
	}
	if err := unix.Kill(m.PID(), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("its user may signal it: %v", err)
	}
	// What it made is its user's; what it was given was not touched.
	for _, path := range []string{filepath.Join(s.RunDir, jailDir, apiSocket), filepath.Join(s.RunDir, jailDir, agentSocket), s.Kernel, s.Drives[1].Path} {
		if err := unix.Lstat(path, &st); err != nil || st.Uid != someUser {
			t.Errorf("%s is user %d's, %v", path, st.Uid, err)
		}
	}
}
