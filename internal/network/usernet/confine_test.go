package usernet

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// probeEnv makes the test binary bind itself, look what it can still do, and say so. Its value is a directory.
const probeEnv = "BANGER_USERNET_PROBE"

func probe() {
	runtime.LockOSThread()
	err := confine([]string{filepath.Join(os.Getenv(probeEnv), "readable"), "/is/not/there"}, func(trap, a1, a2, a3 uintptr) syscall.Errno {
		_, _, e := syscall.Syscall6(trap, a1, a2, a3, 0, 0, 0)
		return e
	})
	fmt.Println("confine:", err)
	at := func(name string) string { return filepath.Join(os.Getenv(probeEnv), name) }
	try := func(what string, f func() error) {
		if err := f(); err != nil {
			fmt.Println(what + ": no")
			return
		}
		fmt.Println(what + ": yes")
	}
	read := func(name string) func() error { return func() error { _, err := os.ReadFile(at(name)); return err } }
	try("read", read("readable/file"))
	try("read by link", read("link"))
	try("read another", read("secret"))
	try("list", func() error { _, err := os.ReadDir(at(".")); return err })
	try("write", func() error { return os.WriteFile(at("readable/new"), nil, 0o600) })
	try("append", func() error {
		_, err := os.OpenFile(at("readable/file"), os.O_APPEND|os.O_WRONLY, 0)
		return err
	})
	try("remove", func() error { return os.Remove(at("readable/file")) })
	try("execute", func() error { return syscall.Exec("/bin/true", []string{"true"}, nil) })
	try("listen", func() error { _, err := net.Listen("tcp", "127.0.0.1:0"); return err })
	os.Exit(0)
}

// TestConfine: of the host's files none is in reach but what may be read.
func TestConfine(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"readable/file": "x", "secret": "y"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("readable/file", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), probeEnv+"="+dir)
	out, err := cmd.CombinedOutput()
	if strings.HasPrefix(string(out), "confine: "+errNoLandlock.Error()) {
		t.Skip(errNoLandlock)
	}
	const want = "confine: <nil>\nread: yes\nread by link: yes\nread another: no\nlist: no\nwrite: no\nappend: no\nremove: no\nexecute: no\nlisten: yes\n"
	if err != nil || string(out) != want {
		t.Errorf("%v:\n%s", err, out)
	}
}

// TestProgramIsConfined where the kernel can and the program has no cgo, as ours are built: its log says so.
func TestProgramIsConfined(t *testing.T) {
	h := NewHost(t.TempDir(), "a1b2c3d4e5f6")
	if err := h.Start(t.Context(), "one", filepath.Join(t.TempDir(), Socket), config(t), Settings{}, nil); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Stop(t.Context(), "one"); err != nil {
			t.Error(err)
		}
	}()
	if _, err := h.Status(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(h.Log("one"))
	if err != nil || !strings.Contains(string(log), fmt.Sprintf(`"landlock":%v`, confinable())) {
		t.Errorf("%v: %s", err, log)
	}
}

// confinable says whether a program of this build and kernel can be confined.
func confinable() bool {
	_, _, e := syscall.AllThreadsSyscall(syscall.SYS_GETPID, 0, 0, 0)
	_, _, none := syscall.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	return e != syscall.ENOTSUP && none == 0
}
