package privatedir

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := "/usr" // root's
	if os.Geteuid() == 0 {
		foreign = filepath.Join(dir, "foreign")
		if err := os.Mkdir(foreign, 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(foreign, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	for name, path := range map[string]string{"link": link, "file": file, "somebody else's": foreign} {
		if d, err := Open(path); !fault.Is(err, fault.Permission) || fault.HintOf(err) == "" || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, %v", name, d, err)
		}
	}
	if _, err := Open(filepath.Join(dir, "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}

// A socket is reached however deep its directory lies.
func TestLongPath(t *testing.T) {
	path := filepath.Join(t.TempDir(), strings.Repeat("a", 100), strings.Repeat("b", 100))
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	d, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	l, err := net.Listen("unix", d.Address("socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if fi, err := os.Stat(filepath.Join(path, "socket")); err != nil || fi.Mode().Type() != fs.ModeSocket {
		t.Errorf("%v, %v", fi, err)
	}
	conn, err := net.Dial("unix", d.Address("socket"))
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
}
