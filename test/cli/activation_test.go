package cli

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
)

// systemd listens, and starts the daemon for the first command: it takes the sockets as they were passed, says when it is
// ready and when it ends, and leaves the sockets to the next one.
func TestSocketActivation(t *testing.T) {
	work := t.TempDir()
	env, err := install.Env(work)
	if err != nil {
		t.Fatal(err)
	}
	env = append(os.Environ(), env...)
	t.Cleanup(func() {
		if err := install.EndDaemons(work); err != nil {
			t.Error(err)
		}
	})
	dir := filepath.Join(work, "run", "banger")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	var passed []*os.File
	for _, name := range []string{"bangerd.sock", bangerv1.DialSocketName} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		file, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = file.Close() })
		passed = append(passed, file)
	}
	told, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(work, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = told.Close() })
	hears := func(want string) {
		t.Helper()
		buf := make([]byte, 100)
		if err := told.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if n, err := told.Read(buf); err != nil || string(buf[:n]) != want {
			t.Fatalf("told %q, %v; want %q", buf[:n], err, want)
		}
	}
	banger := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(filepath.Join(install.Bin, "banger"), args...)
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	start := func() *exec.Cmd {
		t.Helper()
		cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$BANGERD"`)
		cmd.Env = slices.Concat(env, []string{"LISTEN_FDS=2", "NOTIFY_SOCKET=" + told.LocalAddr().String()})
		cmd.ExtraFiles = passed
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	for i := range 2 {
		first := start()
		if i == 0 {
			banger("vm", "create", "--name", "otter") // waits in the socket
		}
		hears("READY=1")
		if got := banger("vm", "exec", "otter", "--", "echo", "hello"); got != "hello\n" { // by the dial socket
			t.Errorf("said %q", got)
		}
		banger("daemon", "stop")
		hears("STOPPING=1")
		if err := first.Wait(); err != nil {
			t.Errorf("the daemon ended with %v", err)
		}
		for _, name := range []string{"bangerd.sock", bangerv1.DialSocketName} {
			if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
				t.Errorf("the daemon's end took systemd's socket away: %v", err)
			}
		}
	}
	// Sockets that are not those of this installation.
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$BANGERD"`)
	cmd.Env = slices.Concat(env, []string{"LISTEN_FDS=1"})
	cmd.ExtraFiles = passed[1:]
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "banger daemon install") {
		t.Errorf("one socket only: %v\n%s", err, out)
	}
}
