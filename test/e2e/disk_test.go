//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/disk"
)

// TestHostFull lets a guest write more than the host's disk takes. The VM is paused and says so
// wherever one looks; with room again it goes on, and what it wrote is whole.
func TestHostFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small disk to fill takes root")
	}
	const size, filler = 3 << 30, "filler"
	dir, err := os.MkdirTemp("", "f")
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("banger-e2e", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=755", size)); err != nil {
		t.Fatal(err)
	}
	// Registered first, so it comes after the host's end.
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
			_ = syscall.Unmount(dir, syscall.MNT_DETACH)
		}
		_ = os.Remove(dir)
	})
	h := newHostIn(t, dir)
	h.create("full", "--system-size", "2G", "--disk-size", "2G")
	h.in("full", "sync; sleep 1; sync") // so that nothing but what follows writes

	// What is left on the host: 24 MiB, beyond what Firecracker's machines always need. The guest writes 79 MB.
	left, why := int64(24<<20), "disk full"
	if underFirecracker() {
		left, why = left+128<<20, "disk is all but full"
	}
	fill(t, filepath.Join(dir, filler), left)
	h.in("full", "nohup sh -c 'seq 1 10000000 > /root/big; sync; echo all > /root/done' >/dev/null 2>&1 &")
	h.until("it is paused", bootTime, func() bool { return h.show("full").VMMState == "paused" })
	h.until("the pause is on record", callTime, func() bool { return h.show("full").Note != "" })
	paused := h.show("full")
	if paused.State != "running" || !strings.Contains(paused.Note, "banger vm start full") || !strings.Contains(paused.Note, why) {
		t.Errorf("show says %+v", paused)
	}
	if out := h.do("vm", "show", "full"); !strings.Contains(out, "paused") || !strings.Contains(out, "vm start full") {
		t.Errorf("show says:\n%s", out)
	}
	if out := h.do("vm", "list"); !strings.Contains(out, "paused") {
		t.Errorf("list says:\n%s", out)
	}
	h.refused(4, []string{"vm", "ssh", "full", "--", "true"}, "paused", "banger vm start full")
	h.refused(5, []string{"vm", "create", "--name", "another"}, "too full")
	// A daemon that comes newly finds it so, too.
	h.do("daemon", "stop")
	if again := h.show("full"); again.VMMState != "paused" || again.PID != paused.PID || !strings.Contains(again.Note, "vm start full") {
		t.Errorf("after a restart of the daemon show says %+v", again)
	}

	if err := os.Remove(filepath.Join(dir, filler)); err != nil {
		t.Fatal(err)
	}
	if r := h.try("vm", "start", "full"); r.code != 0 || !strings.Contains(r.stdout+r.stderr, "goes on") {
		t.Fatal(r)
	}
	h.until("the guest has written everything", bootTime, func() bool {
		return h.try("vm", "ssh", "full", "--", "cat", "/root/done").stdout == "all\n"
	})
	if m := h.show("full"); m.Note != "" || m.VMMState != "running" {
		t.Errorf("after it went on: %+v", m)
	}
	want := run(t, "sh", "-c", "seq 1 10000000 | sha256sum")
	if got := h.in("full", "sha256sum < /root/big"); got+"\n" != want {
		t.Errorf("the guest reads back %s, want %s", got, want)
	}
	h.do("vm", "stop", "full")
	m := h.show("full")
	h.disksAreClean(m)
	out := filepath.Join(dir, "big")
	run(t, "debugfs", "-R", "dump /big "+out, filepath.Join(m.Directory, "work.ext4"))
	if got := run(t, "sh", "-c", "sha256sum < "+out); got != want {
		t.Errorf("on the host's side it is %s, want %s", got, want)
	}
}

// fill takes all room of a filesystem but some bytes.
func fill(t *testing.T, path string, leave int64) {
	t.Helper()
	var fs syscall.Statfs_t
	if err := syscall.Statfs(filepath.Dir(path), &fs); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := syscall.Fallocate(int(f.Fd()), 0, 0, int64(fs.Bavail)*fs.Bsize-leave); err != nil {
		t.Fatal(err)
	}
}

// TestDiskSizes asks for more than the default and looks at what the guest has.
func TestDiskSizes(t *testing.T) {
	h := newHost(t)
	sizes := []string{"20G", "20G"}
	if !testing.Short() {
		sizes = []string{"2T", "20G"}
	}
	h.create("big", "--disk-size", sizes[0], "--system-size", sizes[1])
	m := h.show("big")
	for i, where := range []struct{ dir, file string }{{"/root", "work.ext4"}, {"/", "system.ext4"}} {
		want := int64(20 << 30)
		if sizes[i] == "2T" {
			want = 2 << 40
		}
		got, err := strconv.ParseInt(h.in("big", "df --block-size 1 --output=size "+where.dir+" | tail -n 1 | tr -d ' '"), 10, 64)
		if err != nil || got > want || got < want-want/40 { // a filesystem's own books take some
			t.Errorf("%s has %d bytes in the guest, %v; want about %d", where.dir, got, err, want)
		}
		info, err := os.Stat(filepath.Join(m.Directory, where.file))
		if err != nil {
			t.Fatal(err)
		}
		allocated, err := disk.Allocated(filepath.Join(m.Directory, where.file))
		if err != nil || info.Size() != want || allocated > 512<<20 {
			t.Errorf("%s: %d bytes long with %d allocated, %v; want %d and few", where.file, info.Size(), allocated, err, want)
		}
	}
	if !testing.Short() {
		// Something at the far end of the disk's first terabyte survives a stop.
		h.in("big", "fallocate -l 100G /root/a && echo far > /root/b && sync")
		h.do("vm", "stop", "big")
		h.disksAreClean(h.show("big"))
	}
}
