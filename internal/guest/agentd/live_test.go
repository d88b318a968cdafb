package agentd

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestTableListens(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0100007F:0050 0100007F:1234 01 00000000:00000000 00:00000000 00000000     0        0 2 1
`
	if !tableListens(table, 22) || tableListens(table, 80) || tableListens(table, 23) || tableListens("", 22) {
		t.Error("port 22 listens, port 80 is only connected")
	}
}

func TestWaitPath(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "run/systemd/private")
	done := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	go func() { done <- waitPath(ctx, path) }()
	for _, step := range []func() error{
		func() error { return os.Mkdir(filepath.Join(dir, "other"), 0o755) },
		func() error { return os.Mkdir(filepath.Join(dir, "run"), 0o755) },
		func() error { return os.Mkdir(filepath.Join(dir, "run/systemd"), 0o755) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-done:
			t.Fatalf("returned early: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := waitPath(short, filepath.Join(dir, "never/comes")); err == nil {
		t.Error("waited for what never came without an error")
	}
}

func TestFindPort(t *testing.T) {
	dir := t.TempDir()
	if got, err := findPort(dir); got != "" || err != nil {
		t.Errorf("no port: %q, %v", got, err)
	}
	for port, name := range map[string]string{"vport0p1": "other\n", "null": "banger.agent\n"} {
		if err := os.Mkdir(filepath.Join(dir, port), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, port, "name"), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := findPort(dir); got != "/dev/null" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}
