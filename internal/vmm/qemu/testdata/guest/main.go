// The guest of the driver's e2e tests, as /init of an initrd: it echoes on the agent's port and does
// what the kernel command line says (poweroff, reset, write).
package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	for _, m := range []struct{ kind, dir string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		os.Mkdir(m.dir, 0o755)
		check(m.dir, unix.Mount(m.kind, m.dir, m.kind, 0, ""))
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	check("cmdline", err)
	words := strings.Fields(string(cmdline))
	switch {
	case slices.Contains(words, "poweroff"):
		check("poweroff", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
	case slices.Contains(words, "reset"):
		check("reset", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART))
	case slices.Contains(words, "write"):
		go write()
	}
	echo()
}

func check(what string, err error) {
	if err != nil {
		fmt.Printf("guest: %s: %v\n", what, err)
		unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
}

// find waits for the sysfs attribute with that content and returns its directory's name.
func find(pattern, content string) string {
	for {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == content {
				return filepath.Base(filepath.Dir(f))
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func echo() {
	fd, err := unix.Open("/dev/"+find("/sys/class/virtio-ports/*/name", "banger.agent"), unix.O_RDWR, 0)
	check("agent port", err)
	fmt.Println("guest: ready")
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.Read(fd, buf)
		if n <= 0 || err != nil { // nobody is connected
			time.Sleep(10 * time.Millisecond)
			continue
		}
		for b := buf[:n]; len(b) > 0; {
			n, err := unix.Write(fd, b)
			if err != nil {
				break
			}
			b = b[n:]
		}
	}
}

// write fills the system drive, each block flushed before the next, reads it again, and says so.
func write() {
	f, err := os.Open("/banger/modules/virtio_blk.ko")
	check("module", err)
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != syscall.EEXIST {
		check("module", err)
	}
	disk, err := os.OpenFile("/dev/"+find("/sys/block/*/serial", "system"), os.O_RDWR, 0)
	check("drive", err)
	size, err := disk.Seek(0, 2)
	check("drive", err)
	block := func(i int64) []byte { return bytes.Repeat([]byte{byte(i + 1)}, 1<<20) }
	for i := range size >> 20 {
		_, err := disk.WriteAt(block(i), i<<20)
		check("write", err)
		check("fsync", disk.Sync())
		fmt.Printf("guest: %d written\n", i+1)
	}
	for i := range size >> 20 {
		got := make([]byte, 1<<20)
		_, err := disk.ReadAt(got, i<<20)
		check("read", err)
		if !bytes.Equal(got, block(i)) {
			check("compare", fmt.Errorf("block %d differs", i))
		}
	}
	fmt.Println("guest: all written")
}
