package system

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseMounts(t *testing.T) {
	got := parseMounts(`24 32 0:22 / /oldroot/proc rw,nosuid - proc proc rw
32 28 0:25 / /old\040root ro,noatime shared:1 master:2 - overlay overlay ro,lowerdir=/a
35 32 254:32 / /old\040root/root rw - ext4 /dev/vdc rw
broken line
`)
	want := []Mount{
		{Path: "/oldroot/proc", FSType: "proc", Device: "0:22", Source: "proc"},
		{Path: "/old root", FSType: "overlay", Device: "0:25", Source: "overlay"},
		{Path: "/old root/root", FSType: "ext4", Device: "254:32", Source: "/dev/vdc"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if isDisk(got[0]) || !isDisk(got[1]) || !isDisk(got[2]) || belowDisk(got[0], got) || !belowDisk(got[2], got) {
		t.Error("disks and kernel filesystems are confused")
	}
}

func TestFSType(t *testing.T) {
	dir := t.TempDir()
	image := func(name string, edit func(b []byte)) string {
		b := make([]byte, 8192)
		edit(b)
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	le := binary.LittleEndian
	for name, edit := range map[string]func(b []byte){
		"ext4":     func(b []byte) { le.PutUint16(b[1024+0x38:], 0xef53) },
		"squashfs": func(b []byte) { copy(b, "hsqs") },
		"erofs":    func(b []byte) { le.PutUint32(b[1024:], 0xe0f5e1e2) },
		"":         func([]byte) {},
	} {
		if got, err := FSType(image("fs-"+name, edit)); got != name || err != nil {
			t.Errorf("%q: got %q, %v", name, got, err)
		}
	}
	damaged := image("damaged", func(b []byte) {
		le.PutUint16(b[1024+0x38:], 0xef53)
		le.PutUint16(b[1024+0x3a:], 2)
		le.PutUint32(b[1024+4:], 5)
		le.PutUint32(b[1024+0x60:], 0x80)
		le.PutUint32(b[1024+0x150:], 1)
		le.PutUint32(b[1024+0x18:], 2)
	})
	if !HasErrors(damaged) {
		t.Error("the error flag is not seen")
	}
	if blocks, size, err := ext4Size(damaged); blocks != 1<<32+5 || size != 4096 || err != nil {
		t.Errorf("size: %d blocks of %d, %v", blocks, size, err)
	}
	// A device that is no larger is left alone, without a mount being looked at.
	if before, after, err := Grow(damaged, "/nonexistent"); before != after || err != nil {
		t.Errorf("grow: %d to %d, %v", before, after, err)
	}
}

func TestStateRoundTrip(t *testing.T) {
	root := t.TempDir()
	s := State{VMID: "x", Secret: "s", CID: 3, Systemd: true, Stages: []Stage{{Name: "init", At: time.Second}}}
	if err := s.Write(root); err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{RunDir: os.ModeDir | 0o700, StatePath: 0o600} {
		if info, err := os.Stat(filepath.Join(root, path)); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
}

func TestWaitDeviceIsBounded(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	looked := 0
	err := WaitDevice(ctx, "the thing", func() (bool, error) { looked++; return false, nil })
	if err == nil || looked == 0 {
		t.Errorf("got %v after %d looks", err, looked)
	}
	if err := WaitDevice(t.Context(), "the thing", func() (bool, error) { return true, nil }); err != nil {
		t.Error(err)
	}
}
