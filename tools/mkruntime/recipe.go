package main

import (
	"embed"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// recipeVersion is part of the content key of the images: raise it whenever a change of this
// program alters what an image holds without changing the lists and files below.
const recipeVersion = 1

// suite is the Debian release the bundle is made of.
const suite = "trixie"

// overlayFS holds the files that the image has instead of, or beside, those of the packages. All
// belong to root; the modes are 0644, or 0755 where the file begins with "#!".
//
//go:embed all:overlay
var overlayFS embed.FS

// masked are units and generators that a sandbox has no use for, or that do at every boot what was
// done when the image was made. Under emulation each of them costs 50 to 300 ms.
var masked = []string{
	// Caches and databases that are complete in the image.
	"system/ldconfig.service",
	"system/systemd-hwdb-update.service",
	"system/systemd-journal-catalog-update.service",
	"system/systemd-sysusers.service",
	"system/systemd-update-done.service",
	// The host decides machine-id, hostname, keys and random seed (virtio-rng).
	"system/sshd-keygen.service",
	"system/systemd-firstboot.service",
	"system/systemd-machine-id-commit.service",
	"system/systemd-random-seed.service",
	// Hardware that is not there: TPM, pstore, battery, disk encryption, hibernation.
	"system/systemd-hibernate-clear.service",
	"system/systemd-pcrextend.socket",
	"system/systemd-pcrlock.socket",
	"system/systemd-pcrmachine.service",
	"system/systemd-pcrphase-sysinit.service",
	"system/systemd-pcrphase.service",
	"system/systemd-pstore.service",
	"system/systemd-tpm2-setup-early.service",
	"system/systemd-tpm2-setup.service",
	"system/systemd-udev-load-credentials.service",
	"system/systemd-ask-password-console.path",
	"system/systemd-ask-password-wall.path",
	"system/systemd-creds.socket",
	"system/systemd-sysext.socket",
	"system/systemd-initctl.socket",
	// Mounts and nodes: /tmp stays on the system disk, because half the memory of a small machine
	// is not room enough to build in; the nodes come from tmpfiles.d/banger-dev.conf.
	"system/tmp.mount",
	"system/dev-hugepages.mount",
	// Message queues work unmounted (mq_overview(7)); /run/lock is a directory by tmpfiles.d.
	"system/dev-mqueue.mount",
	"system/run-lock.mount",
	// /dev/fuse loads its module when it is opened; the mount would load it at every boot.
	"system/sys-fs-fuse-connections.mount",
	"system/sys-kernel-config.mount",
	"system/sys-kernel-debug.mount",
	"system/sys-kernel-tracing.mount",
	"system/kmod-static-nodes.service",
	"system/systemd-tmpfiles-setup-dev-early.service",
	// The root is mounted as it should be before systemd starts, and so is the network; nobody logs
	// in on a console.
	"system/systemd-remount-fs.service",
	"system/getty-static.service",
	"system/systemd-networkd-wait-online.service",
	// Logins are not held back while the system starts: nologin.conf is masked as well.
	"system/systemd-user-sessions.service",
	// Housekeeping that would run at the worst moment, right after the start.
	"system/apt-daily.timer",
	"system/apt-daily-upgrade.timer",
	"system/dpkg-db-backup.timer",
	"system/e2scrub_all.timer",
	"system/e2scrub_reap.service",
	// systemd-ssh-generator would open sshd on vsock, where any user of the host can dial it.
	"system-generators/systemd-ssh-generator",
	"system-generators/systemd-debug-generator",
	"system-generators/systemd-getty-generator",
	"system-generators/systemd-gpt-auto-generator",
	"system-generators/systemd-hibernate-resume-generator",
	"system-generators/systemd-run-generator",
	"system-generators/systemd-system-update-generator",
	"system-generators/systemd-sysv-generator",
	"system-generators/systemd-tpm2-generator",
}

// droppedAnywhere are entries of a tree that no image must hold, whatever its distribution, as patterns of
// path.Match; a directory is dropped with what is in it.
var droppedAnywhere = []string{
	// Facts about the machine that built the image, or secrets made there.
	"etc/hostname",
	"etc/resolv.conf",
	"etc/ssh/ssh_host_*",
	"var/lib/systemd/random-seed",
	"var/lib/dbus/machine-id",
	// The kernel and systemd fill these.
	"dev/*",
	"proc/*",
	"sys/*",
	"run/*",
	"tmp/*",
}

// dropped are those and what Debian's packages leave besides.
var dropped = slices.Concat(droppedAnywhere, []string{
	// The exclusions of the build are not those of the user's own apt.
	"etc/dpkg/dpkg.cfg.d/99mmdebstrap",
	// Logs and backups of the build.
	"etc/*-",
	"var/log/apt/*",
	"var/log/*.log",
	"var/cache/ldconfig/aux-cache",
	"var/cache/debconf/*-old",
	"var/lib/dpkg/*-old",
	// With nothing to load or to register, the services that would do it are not started.
	"etc/modules-load.d/modules.conf",
	"usr/lib/binfmt.d/python*.conf",
	// Started by D-Bus and its socket when somebody asks.
	"usr/lib/systemd/system/multi-user.target.wants/dbus.service",
	"usr/lib/systemd/system/multi-user.target.wants/systemd-logind.service",
	// Docker starts when its socket is used; gettys do not start at all.
	"etc/systemd/system/multi-user.target.wants/docker.service",
	"etc/systemd/system/multi-user.target.wants/containerd.service",
	"etc/systemd/system/multi-user.target.wants/e2scrub_reap.service",
	"etc/systemd/system/getty.target.wants/*",
	"etc/systemd/system/sysinit.target.wants/systemd-pstore.service",
	"etc/systemd/system/timers.target.wants/apt-daily.timer",
	"etc/systemd/system/timers.target.wants/apt-daily-upgrade.timer",
	"etc/systemd/system/timers.target.wants/dpkg-db-backup.timer",
	"etc/systemd/system/timers.target.wants/e2scrub_all.timer",
	"etc/systemd/system/*.wants/sshd-keygen.service",
})

// dpkgExcludes keep manuals and translations out; the licences stay.
var dpkgExcludes = []string{
	"path-exclude=/usr/share/man/*",
	"path-exclude=/usr/share/info/*",
	"path-exclude=/usr/share/doc/*",
	"path-include=/usr/share/doc/*/copyright",
	"path-exclude=/usr/share/locale/*",
	"path-include=/usr/share/locale/locale.alias",
}

// isDropped says whether the entry, a slash-separated path without a leading slash, is left out of the patterns' tree.
func isDropped(patterns []string, name string) bool {
	for p := name; p != "."; p = path.Dir(p) {
		for _, pattern := range patterns {
			if ok, _ := path.Match(pattern, p); ok {
				return true
			}
		}
	}
	return false
}

// replacement is one file or symbolic link of the recipe.
type replacement struct {
	name    string
	link    string // target, for a symbolic link
	content []byte
	mode    int64
}

// replacements gives the recipe's own entries, ordered so that the image is the same every time:
// the overlay's files by name, then the masks, then the stamps that say "nothing to update".
func replacements() ([]replacement, error) {
	var out []replacement
	err := fs.WalkDir(overlayFS, "overlay", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := overlayFS.ReadFile(p)
		if err != nil {
			return err
		}
		mode := int64(0o644)
		if strings.HasPrefix(string(b), "#!") {
			mode = 0o755
		}
		out = append(out, replacement{name: strings.TrimPrefix(p, "overlay/"), content: b, mode: mode})
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, unit := range masked {
		out = append(out, replacement{name: "etc/systemd/" + unit, link: "/dev/null", mode: 0o777})
	}
	out = append(out, replacement{name: "etc/tmpfiles.d/systemd-nologin.conf", link: "/dev/null", mode: 0o777})
	// systemd compares the times of these with that of /usr (ConditionNeedsUpdate).
	out = append(out,
		replacement{name: "etc/.updated", mode: 0o644},
		replacement{name: "var/.updated", mode: 0o644})
	return out, nil
}
