//go:build e2e

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// smallTree is a root filesystem with busybox and an init of its own, as a directory. Its owners are whoever runs the test.
func smallTree(t *testing.T) string {
	t.Helper()
	program, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal("busybox is not installed: scripts/deps.sh test")
	}
	dir := t.TempDir()
	must(0, os.Chmod(dir, 0o755))
	for _, d := range strings.Fields("bin sbin etc root dev proc sys run tmp var usr lib") {
		must(0, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	must(0, os.WriteFile(filepath.Join(dir, "bin/busybox"), must(os.ReadFile(program)), 0o755))
	for _, applet := range strings.Fields("sh cat ls grep sleep touch mount stat dmesg init poweroff") {
		must(0, os.Symlink("busybox", filepath.Join(dir, "bin", applet)))
	}
	for name, text := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "etc/group": "root:x:0:\n", "etc/inittab": "::respawn:/bin/sleep 100000\n",
		"sbin/init": "#!/bin/sh\necho its own > /run/init-was-here\nexec /bin/busybox init\n", "etc/origin": "the image's\n",
	} {
		must(0, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	must(0, os.Chmod(filepath.Join(dir, "sbin/init"), 0o755))
	return dir
}

// TestReadOnlyRootFilesystems boots VMs of filesystems that nobody can write to: what a VM writes is on its own disk, and is
// there after a stop.
func TestReadOnlyRootFilesystems(t *testing.T) {
	h := newHost(t)
	tree := smallTree(t)
	for _, c := range []struct {
		kind string
		make func(file string) []string
	}{
		{"erofs", func(file string) []string {
			return []string{"mkfs.erofs", "--quiet", "--force-uid=0", "--force-gid=0", "-zlz4", file, tree}
		}},
		{"squashfs", func(file string) []string {
			return []string{"mksquashfs", tree, file, "-all-root", "-quiet", "-no-progress", "-comp", "zstd"}
		}},
	} {
		t.Run(c.kind, func(t *testing.T) {
			h := *h
			h.t = t
			file := filepath.Join(t.TempDir(), "root."+c.kind)
			command := c.make(file)
			run(t, command[0], command[1:]...)
			h.do("image", "register", "--name", c.kind, "--rootfs", file)
			if got := h.do("image", "show", c.kind); !strings.Contains(got, c.kind) {
				t.Errorf("image show: %s", got)
			}
			h.create(c.kind, "--image", c.kind, "--memory", "512M")
			in := func(command string) string {
				t.Helper()
				return strings.TrimSuffix(h.do("vm", "exec", c.kind, "--", "sh", "-c", command), "\n")
			}
			if got := in("cat /run/init-was-here; stat -c %u:%g /etc/origin; grep -o '^overlay / overlay' /proc/mounts; grep -o " + c.kind + " /proc/filesystems"); got != "its own\n0:0\noverlay / overlay\n"+c.kind {
				t.Errorf("the guest says %q", got)
			}
			in("echo mine > /etc/origin; echo new > /etc/new; mkdir /etc/dir 2>/dev/null || true")
			h.do("vm", "stop", c.kind)
			h.disksAreClean(h.show(c.kind))
			h.do("vm", "start", c.kind)
			if got := in("cat /etc/origin /etc/new"); got != "mine\nnew" {
				t.Errorf("after a stop: %q", got)
			}
			h.create(c.kind+"-2", "--image", c.kind, "--memory", "512M")
			if got := h.do("vm", "exec", c.kind+"-2", "--", "cat", "/etc/origin"); got != "the image's\n" {
				t.Errorf("another VM of it: %q", got)
			}
			h.do("vm", "delete", c.kind, c.kind+"-2")
		})
	}
}

// foreignInitrd is an initrd that Debian's own tools made, by initramfs-tools: in a VM, which fetches them. In the lab, where nothing
// is fetched, it is the one that the host itself was booted with.
func foreignInitrd(t *testing.T, h *host) string {
	t.Helper()
	if underFirecracker() {
		found := must(filepath.Glob("/boot/initrd.img-*"))
		if len(found) != 1 {
			t.Fatalf("the lab's own initrd: %v", found)
		}
		return found[0]
	}
	h.create("maker", "--nat")
	made := h.tryFor(buildTime, "vm", "exec", "maker", "--", "sh", "-c", "set -e; export DEBIAN_FRONTEND=noninteractive\n"+
		"apt-get -q -o Acquire::Retries=3 update; apt-get -q -y --no-install-recommends install initramfs-tools zstd\n"+
		"mkinitramfs -o /root/initrd.img $(uname -r); lsinitramfs /root/initrd.img | grep -x -E 'init|scripts/local'")
	t.Logf("%s", made)
	if made.code != 0 || !strings.HasSuffix(made.stdout, "init\nscripts/local\n") {
		t.Fatal("no initrd was made")
	}
	initrd := filepath.Join(t.TempDir(), "initrd.img")
	h.do("vm", "cp", "maker:/root/initrd.img", initrd)
	h.do("vm", "delete", "maker")
	return initrd
}

// TestForeignInitrd boots with an initrd that Debian's own tools made: banger's comes first, and disks, agent and shutdown are as
// always.
func TestForeignInitrd(t *testing.T) {
	slow(t)
	h := newHost(t)
	initrd := foreignInitrd(t, h)
	h.do("image", "register", "--name", "foreign", "--rootfs", bundleFile("rootfs-docker.ext4"), "--work-seed", bundleFile("rootfs-docker.work-seed.ext4"), "--initrd", initrd)
	h.create("guest", "--image", "foreign")
	fi := must(os.Stat(initrd))
	got := strings.Fields(h.in("guest", `systemctl is-system-running --wait; findmnt -no FSTYPE /; findmnt -no FSTYPE /root; hostname; ls -d /run/initramfs; sed -n 's/.*\(rdinit=[^ ]*\).*/\1/p' /proc/cmdline; dmesg | sed -n 's/.*Freeing initrd memory: \([0-9]*\)K/\1/p'`))
	if len(got) != 7 || strings.Join(got[:6], " ") != "running overlay ext4 guest /run/initramfs rdinit=/banger/init" {
		t.Fatalf("the guest says %q", got)
	}
	// The kernel had all of it, and ours.
	if kib, err := strconv.ParseInt(got[6], 10, 64); err != nil || kib<<10 < fi.Size()+2<<20 {
		t.Errorf("the kernel's initrd had %s KiB, the foreign one has %d bytes", got[6], fi.Size())
	}
	h.in("guest", "echo kept > /root/note")
	h.do("vm", "stop", "guest")
	h.disksAreClean(h.show("guest"))
	h.do("vm", "start", "guest")
	h.until("it is up again", time.Minute, func() bool { return h.in("guest", "cat /root/note") == "kept" })
}

// TestKernelOfAnotherRelease boots the default image with the kernel of another release of Debian as that release ships it, a
// bzImage, its modules, and the initrd that its own tools made: those of the lab's host.
func TestKernelOfAnotherRelease(t *testing.T) {
	lab := filepath.Join(checkout, "dist/lab/host")
	if _, err := os.Stat(lab); err != nil {
		t.Skip("there is no kernel of another release: make lab brings one")
	}
	disk, dir := filepath.Join(lab, "disk.ext4"), t.TempDir()
	fields := strings.Split(debugfs(t, disk, "ls -p /usr/lib/modules"), "/")
	var version string
	for _, f := range fields {
		if strings.Contains(f, "-cloud-") {
			version = f
		}
	}
	run(t, "debugfs", "-R", "rdump /usr/lib/modules/"+version+" "+dir, disk)
	h := newHost(t)
	h.do("image", "register", "--name", "other", "--rootfs", bundleFile("rootfs-docker.ext4"), "--work-seed", bundleFile("rootfs-docker.work-seed.ext4"),
		"--kernel", filepath.Join(lab, "vmlinuz"), "--modules", filepath.Join(dir, version), "--initrd", filepath.Join(lab, "initrd.img"))
	if got := h.do("image", "show", "other"); !strings.Contains(got, version) {
		t.Errorf("the image's kernel is not %s:\n%s", version, got)
	}
	h.create("guest", "--image", "other")
	if got := h.in("guest", `uname -r; modprobe dummy && lsmod | grep -c '^dummy '; findmnt -no FSTYPE /; systemctl is-system-running --wait`); got != version+"\n1\noverlay\nrunning" {
		t.Errorf("the guest says %q, want kernel %s", got, version)
	}
	h.do("vm", "stop", "guest")
	h.disksAreClean(h.show("guest"))
}
