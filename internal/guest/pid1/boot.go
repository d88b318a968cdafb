// Package pid1 owns the guest program's lives as process 1 and what it leaves running: init of the
// initrd (Boot), the shutdown program (Shutdown), and the supervisor of the agent (Supervise).
//
// Boot never hangs and never returns: it ends in the distribution's init, or prints one line with
// boot.FatalMarker and ends the machine, so that the host sees the VMM exit. It writes only to the
// VM's own disks and reads nothing from the network.
package pid1

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// newRoot is where the root is put together before it becomes "/".
const newRoot = system.NewRoot

// moduleDir holds the initrd's modules and their order.
const moduleDir = "/banger/modules"

// binaryDir is what stays of the initramfs.
const binaryDir = "/banger/program"

// Names of this binary's other lives, by argv[0].
const (
	SupervisorName = "banger-supervisor"
	AgentName      = "banger-vsock-agent"
	OwnInitName    = "banger-init"
)

// Boot boots the guest. It must be process 1 of an initramfs.
func Boot(args []string) {
	b := &booter{args: args}
	defer func() {
		if r := recover(); r != nil {
			fatal("internal", fmt.Errorf("%v %s", r, debug.Stack()))
		}
	}()
	b.state.Stages = append(b.state.Stages, system.Now(boot.StageInit, ""))
	for _, step := range []struct {
		stage string
		limit time.Duration
		run   func(*booter) error
	}{
		{"kernel filesystems", time.Minute, (*booter).mountKernel},
		{"modules", time.Minute, (*booter).modules},
		{"drives", time.Minute, (*booter).drives},
		{"config", time.Minute, (*booter).config},
		{"root", 10 * time.Minute, (*booter).root},                 // may grow a filesystem by terabytes
		{"native directories", 10 * time.Minute, (*booter).native}, // may copy much
		{"mounts", 10 * time.Minute, (*booter).mounts},             // may grow as well
		{"files", time.Minute, (*booter).files},
		{"network", time.Minute, (*booter).network},
		{"agent", time.Minute, (*booter).agent},
		{"init", time.Minute, (*booter).init},
	} {
		late := func() { fatal(step.stage, fmt.Errorf("not finished within %s", step.limit)) }
		if err := within(step.limit, late, func() error { return step.run(b) }); err != nil {
			fatal(step.stage, err)
		}
	}
}

// within runs a step, which hangs only in the kernel, on a drive that does not answer. After limit it calls late,
// which ends the machine, and does not return any more: a boot that went on while the disks are taken away from it would
// come up with read-only ones.
func within(limit time.Duration, late func(), step func() error) error {
	timer := time.AfterFunc(limit, late)
	err := step()
	if !timer.Stop() {
		select {}
	}
	return err
}

// booter carries what one step finds out for the next.
type booter struct {
	args       []string
	moduleErr  error
	have       drives
	cfg        boot.Config
	state      system.State
	rootFS     rootDir
	initPath   string
	rootDetail []string
	own        []string // mount points that the booted system sees and must leave to us
	container  boot.Container
}

// keep remembers that at, a directory of the new root, is a mount of ours.
func (b *booter) keep(at *os.File) error {
	resolved, err := os.Readlink(magicPath(at))
	b.own = append(b.own, strings.TrimPrefix(resolved, newRoot))
	return err
}

func (b *booter) mountKernel() error {
	for _, m := range []struct {
		fs, at string
		flags  uintptr
		data   string
	}{
		{"proc", "/proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", unix.MS_NOSUID, "mode=0755"},
		// As systemd mounts it (its mount_setup, which leaves alone what is mounted), but before: the
		// agent gives commands terminals as soon as it answers.
		{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,gid=5"},
		{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755,size=20%"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.fs, m.at, m.fs, m.flags, m.data)
		if err != nil && !errors.Is(err, unix.EBUSY) { // a foreign initrd's kernel may have /dev already
			return system.PathError("mount", m.at, err)
		}
	}
	for _, dir := range []string{system.RunDir, system.SystemMount, system.BaseMount, system.ModuleMount} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	return os.MkdirAll(newRoot, 0o755)
}

func (b *booter) modules() error {
	b.moduleErr = loadModules(moduleDir)
	return nil
}

func (b *booter) drives() (err error) {
	if b.have, err = waitDrives(vmm.RoleBase, vmm.RoleConfig); err != nil {
		return errors.Join(err, b.moduleErr)
	}
	return nil
}

func (b *booter) config() (err error) {
	if b.cfg, err = readConfig(b.have[vmm.RoleConfig]); err != nil {
		return err
	}
	b.state.VMID, b.state.Secret = b.cfg.VMID, b.cfg.Secret
	// Every VM is given a context id, also where its host has no vsock: listening there would make the
	// kernel run modprobe for a transport that leads nowhere.
	if hasDevice(virtioDevices, vsockDevice) {
		b.state.CID = b.cfg.CID
	}
	// A machine whose clock is behind what its host read before it was started has no clock (no RTC),
	// or lost time; one that is ahead knows better than a config that waited.
	if host := b.cfg.Time(); time.Until(host) > time.Second {
		tv := unix.NsecToTimeval(host.UnixNano())
		if err := unix.Settimeofday(&tv); err != nil {
			return fmt.Errorf("set the clock: %w", err)
		}
	}
	var wanted []vmm.Role
	if !b.cfg.Direct {
		wanted = append(wanted, vmm.RoleSystem)
	}
	for _, m := range b.cfg.Mounts {
		wanted = append(wanted, vmm.Role(m.Role))
	}
	if b.have, err = waitDrives(wanted...); err != nil {
		return errors.Join(err, b.moduleErr)
	}
	return nil
}

// overlayOptions are given one by one, since their defaults are the kernel's build's: renames of
// lower directories work (redirect_dir), hard links survive copy-up (index), inode numbers are
// stable and unique (xino), and a copied-up file is whole, so that the lower is never needed to
// read it (metacopy).
const overlayOptions = "redirect_dir=on,index=on,xino=on,metacopy=off"

func (b *booter) root() error {
	base := b.have[vmm.RoleBase]
	if b.cfg.Direct {
		if err := b.mountDisk(base, newRoot, 0, ""); err != nil {
			return err
		}
		b.mounted(string(vmm.RoleBase), base, "/", "/")
		b.grow(base, newRoot)
	} else {
		// noload: the base is shared and read-only, its journal is nobody's to replay.
		if err := b.mountDisk(base, system.BaseMount, unix.MS_RDONLY, "noload"); err != nil {
			return err
		}
		disk := b.have[vmm.RoleSystem]
		if err := b.mountDisk(disk, system.SystemMount, unix.MS_NOATIME, ""); err != nil {
			return err
		}
		b.mounted(string(vmm.RoleSystem), disk, system.SystemMount, "/")
		b.grow(disk, system.SystemMount)
		for _, dir := range []string{"upper", "work", "native"} {
			if err := os.Mkdir(filepath.Join(system.SystemMount, dir), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
				return err
			}
		}
		options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work,%s",
			system.BaseMount, system.SystemMount, system.SystemMount, overlayOptions)
		if err := unix.Mount("overlay", newRoot, "overlay", unix.MS_NOATIME, options); err != nil {
			if errors.Is(err, unix.ESTALE) {
				return errors.New("the system disk belongs to another base image (overlayfs: stale file handle)")
			}
			return fmt.Errorf("join base and system disk (overlayfs): %w", err)
		}
	}
	var err error
	if b.rootFS, err = openRoot(newRoot); err != nil {
		return err
	}
	b.readContainer()
	if b.container.NoInit {
		b.initPath, b.state.OwnInit = system.Binary, true
	} else if b.initPath, err = findInit(b.rootFS); err != nil {
		return err
	}
	b.state.Systemd = filepath.Base(b.initPath) == "systemd"
	return b.mountModules()
}

// readContainer looks what an image that was made for containers says of itself. What cannot be read is noted:
// with an init of its own the guest boots without it.
func (b *booter) readContainer() {
	content, err := b.rootFS.read(boot.ContainerPath)
	if err == nil && content == nil {
		return
	}
	if err == nil {
		b.container, err = boot.ParseContainer(content)
	}
	if err != nil {
		b.container = boot.Container{}
		b.note("%v", err)
	}
}

// findInit returns the path, in the root, of the distribution's init with symlinks resolved.
func findInit(root rootDir) (string, error) {
	for _, p := range []string{"/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/etc/init", "/bin/init"} {
		f, err := root.open(p, unix.O_PATH, 0)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			continue
		}
		if err != nil {
			return "", err
		}
		defer f.Close()
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return "", system.PathError("stat", p, err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o111 == 0 {
			return "", fmt.Errorf("%s of the root filesystem is not a program", p)
		}
		resolved, err := os.Readlink(magicPath(f))
		if err != nil {
			return "", err
		}
		return strings.TrimPrefix(resolved, newRoot), nil
	}
	return "", errors.New("the root filesystem has no init (looked for /sbin/init and systemd)")
}

// mountModules puts the kernel's modules where the root's own tools look for them.
func (b *booter) mountModules() error {
	device, ok := b.have[vmm.RoleModules]
	if !ok {
		return nil
	}
	if err := b.mountDisk(device, system.ModuleMount, unix.MS_RDONLY, "noload"); err != nil {
		return err
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	// /lib first: it is a symlink to usr/lib in most, a directory of its own in some.
	at, err := b.rootFS.mkdirAll("/lib/modules/" + unix.ByteSliceToString(uts.Release[:]))
	if err != nil {
		return err
	}
	defer at.Close()
	if err := b.keep(at); err != nil {
		return err
	}
	return system.PathError("bind", at.Name(), unix.Mount(system.ModuleMount, magicPath(at), "", unix.MS_BIND, ""))
}

// mountDisk mounts a device by the filesystem that is on it. ext4Data is for ext4 only.
func (b *booter) mountDisk(device, at string, flags uintptr, ext4Data string) error {
	fs, err := system.FSType(device)
	if err != nil {
		return err
	}
	data := ""
	switch fs {
	case "":
		return fmt.Errorf("%s holds no filesystem that is known", b.describe(device))
	case "ext4":
		data = ext4Data
	}
	if fs != "ext4" && flags&unix.MS_RDONLY == 0 {
		return fmt.Errorf("%s holds %s, which cannot be written", b.describe(device), fs)
	}
	err = unix.Mount(device, at, fs, flags, data)
	if errors.Is(err, unix.ENODEV) {
		if loadErr := loadFilesystem(moduleDir, fs); loadErr != nil {
			return fmt.Errorf("%s holds %s: %w", b.describe(device), fs, loadErr)
		}
		err = unix.Mount(device, at, fs, flags, data)
	}
	switch {
	case errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EBADMSG), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EIO):
		return fmt.Errorf("the %s filesystem on %s is damaged: %w", fs, b.describe(device), err)
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%s holds %s, which this kernel cannot mount", b.describe(device), fs)
	case err != nil:
		return fmt.Errorf("mount %s: %w", b.describe(device), err)
	}
	if fs == "ext4" && system.HasErrors(device) {
		b.note("%s was marked as damaged; it needs e2fsck", b.describe(device))
	}
	return nil
}

// describe names a drive as people know it.
func (b *booter) describe(device string) string {
	for role, d := range b.have {
		if d == device {
			return fmt.Sprintf("the %s drive (%s)", role, device)
		}
	}
	return device
}

func (b *booter) note(format string, args ...any) {
	b.rootDetail = append(b.rootDetail, fmt.Sprintf(format, args...))
}

func (b *booter) mounted(role, device, path, target string) {
	b.state.Mounted = append(b.state.Mounted, system.Mounted{Role: role, Device: device, Path: path, Target: target})
}

// grow enlarges a filesystem to its drive. One that cannot grow is as good as before: it is noted
// with the stage, and the boot goes on.
func (b *booter) grow(device, at string) {
	before, after, err := system.Grow(device, at)
	if err != nil {
		b.note("%s did not grow: %v", b.describe(device), err)
	} else if after > before {
		b.note("%s grew from %d to %d bytes", b.describe(device), before, after)
	}
}

func (b *booter) native() error {
	if b.cfg.Direct {
		return nil
	}
	for _, p := range b.cfg.Native {
		at, err := b.rootFS.mkdirAll(p)
		if err != nil {
			return err
		}
		err = errors.Join(b.keep(at), bindNative(at, p), at.Close())
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *booter) mounts() error {
	for _, m := range b.cfg.Mounts {
		device := b.have[vmm.Role(m.Role)]
		at, err := b.rootFS.mkdirAll(m.Target)
		if err != nil {
			return err
		}
		defer at.Close()
		if err := b.keep(at); err != nil {
			return err
		}
		flags, data := mountOptions(m.Options)
		if err := b.mountDisk(device, magicPath(at), flags, data); err != nil {
			return err
		}
		if !m.Grow && !m.Seed {
			continue
		}
		top, err := b.rootFS.open(m.Target, unix.O_PATH, 0) // at still means what is below the mount
		if err != nil {
			return err
		}
		defer top.Close()
		if m.Grow {
			b.grow(device, magicPath(top))
			b.mounted(m.Role, device, m.Target, m.Target)
		}
		if m.Seed {
			if err := fill(at, magicPath(top)); err != nil {
				return fmt.Errorf("copy %s of the image to %s: %w", m.Target, b.describe(device), err)
			}
		}
	}
	b.state.Stages = append(b.state.Stages, system.Now(boot.StageRoot, strings.Join(b.rootDetail, "; ")))
	return nil
}

// mountOptions splits options as mount(8) writes them into flags and the filesystem's own.
func mountOptions(options string) (flags uintptr, data string) {
	known := map[string]uintptr{"ro": unix.MS_RDONLY, "rw": 0, "defaults": 0, "noatime": unix.MS_NOATIME,
		"relatime": unix.MS_RELATIME, "nodev": unix.MS_NODEV, "nosuid": unix.MS_NOSUID, "noexec": unix.MS_NOEXEC}
	var own []string
	for option := range strings.SplitSeq(options, ",") {
		if flag, ok := known[option]; ok {
			flags |= flag
		} else if option != "" {
			own = append(own, option)
		}
	}
	return flags, strings.Join(own, ",")
}

func (b *booter) files() error {
	if err := unix.Sethostname([]byte(b.cfg.Hostname)); err != nil {
		return fmt.Errorf("hostname: %w", err)
	}
	short, _, _ := strings.Cut(b.cfg.Hostname, ".")
	names := b.cfg.Hostname
	if short != names {
		names += " " + short
	}
	text := func(p, content string, mode os.FileMode) error {
		return b.rootFS.write(p, []byte(content), mode, 0, 0)
	}
	err := errors.Join(
		text("/etc/hostname", b.cfg.Hostname+"\n", 0o644),
		text("/etc/hosts", "127.0.0.1 localhost\n127.0.1.1 "+names+"\n::1 localhost ip6-localhost ip6-loopback\n", 0o644),
		text("/etc/machine-id", b.cfg.MachineID+"\n", 0o444),
		// A root line of the image would make systemd-remount-fs fail: what is mounted is mounted here.
		text("/etc/fstab", "# The guest's filesystems are mounted before its init starts.\n", 0o644),
	)
	if err != nil {
		return err
	}
	environment := b.container.SessionEnvironment()
	maps.Copy(environment, b.cfg.Environment)
	if len(environment) > 0 {
		have, err := b.rootFS.read("/etc/environment")
		if err != nil {
			return err
		}
		merged := mergeEnvironment(string(have), environment, slices.Sorted(maps.Keys(environment)))
		if err := text("/etc/environment", merged, 0o644); err != nil {
			return err
		}
	}
	for _, f := range b.cfg.Files {
		if err := b.rootFS.write(f.Path, f.Content, os.FileMode(f.Mode), f.UID, f.GID); err != nil {
			return err
		}
	}
	return nil
}

// agent moves the kernel filesystems into the new root, leaves the shutdown program and the state
// there, and starts the supervisor inside it: so the agent answers before the distribution starts.
func (b *booter) agent() error {
	if isRunit(b.initPath) {
		if err := b.takeRunitEnd(); err != nil {
			return err
		}
	}
	for _, dir := range []string{"/run", "/dev", "/sys", "/proc"} {
		at, err := b.rootFS.mkdirAll(dir)
		if err != nil {
			return err
		}
		if dir == "/proc" { // magicPath needs /proc where it is until now
			err = unix.Mount(dir, newRoot+dir, "", unix.MS_MOVE, "")
		} else {
			err = unix.Mount(dir, magicPath(at), "", unix.MS_MOVE, "")
		}
		if err := errors.Join(system.PathError("move", dir, err), at.Close()); err != nil {
			return err
		}
	}
	if err := leaveBinary(newRoot); err != nil {
		return err
	}
	if err := b.state.Write(newRoot); err != nil {
		return err
	}
	if b.state.Systemd {
		own := append(slices.Clone(b.own), system.ShutdownDir, system.SystemMount, system.BaseMount, system.ModuleMount)
		if err := leaveMounted(newRoot, own); err != nil {
			return err
		}
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("bring the loopback interface up: %w", err)
	}
	null, err := os.OpenFile(newRoot+"/dev/null", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	supervisor := exec.Cmd{
		Path: system.Binary, Args: []string{SupervisorName},
		Dir: "/", Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Stdin: null, Stdout: null, Stderr: null,
		SysProcAttr: &syscall.SysProcAttr{Chroot: newRoot, Setsid: true},
	}
	// It and the agent, and not what this process becomes.
	if err := system.SetSmallPages(true); err != nil {
		return err
	}
	err = supervisor.Start()
	if unset := system.SetSmallPages(false); unset != nil {
		return errors.Join(unset, err)
	}
	if err != nil {
		return fmt.Errorf("start the agent's supervisor: %w", err)
	}
	return supervisor.Process.Release() // it is the distribution's init's child from now on
}

// loopbackUp configures lo, as every distribution will again: the agent reaches the guest's ports by
// it from its first moment, and an init that knows no network still has it. The kernel gives lo its
// addresses when it comes up (net/ipv4/devinet.c, inetdev_event).
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, ifr); err != nil {
		return err
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
}

// leaveBinary shows this program to the new root, in a small root of its own: for the agent, and for
// systemd's last step. It is the very file that runs now, in the initramfs, and no copy: what a kernel
// has read and an emulator has translated of it serves its other lives, too.
func leaveBinary(root string) error {
	for _, dir := range []string{"/proc", "/sys", "/dev", "/run", "/tmp", "/oldroot"} {
		if err := os.MkdirAll(binaryDir+dir, 0o755); err != nil {
			return err
		}
	}
	self, err := os.Readlink(root + "/proc/self/exe")
	if err != nil {
		return err
	}
	if err := os.Link(self, binaryDir+"/"+filepath.Base(system.Binary)); err != nil {
		return err
	}
	at := root + system.ShutdownDir
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	return system.PathError("mount", at, unix.Mount(binaryDir, at, "", unix.MS_BIND, ""))
}

// leaveMounted keeps systemd from unmounting our mounts while it stops services: it does not know
// that Docker needs /var/lib/docker, would pull it away from under it or complain that it is busy.
// They go at the very end, by the shutdown program (systemd.mount(5), DefaultDependencies=).
func leaveMounted(root string, mounts []string) error {
	for _, m := range mounts {
		dir := root + "/run/systemd/system/" + unitName(m) + ".mount.d"
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(dir+"/banger.conf", []byte("[Unit]\nDefaultDependencies=no\n"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// unitName escapes a path as systemd-escape(1) --path does.
func unitName(p string) string {
	var b strings.Builder
	for i, c := range []byte(strings.Trim(p, "/")) {
		switch {
		case c == '/':
			b.WriteByte('-')
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == ':', c == '_', c == '.' && i > 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, `\x%02x`, c)
		}
	}
	return b.String()
}

// init switches to the new root, empties the initramfs, whose files are memory, and becomes the
// distribution's init.
func (b *booter) init() error {
	if err := b.rootFS.f.Close(); err != nil {
		return err
	}
	emptyInitramfs()
	if err := unix.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("switch to the new root: %w", err)
	}
	if err := errors.Join(unix.Chroot("."), unix.Chdir("/")); err != nil {
		return err
	}
	args := append([]string{b.initPath}, b.args...)
	env := []string{"HOME=/", "TERM=linux", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	// systemd wants its name in argv[0] only for messages; others look at it for a mode.
	args[0] = "/sbin/init"
	if b.state.OwnInit {
		args = []string{OwnInitName}
	}
	return fmt.Errorf("%s cannot be executed: %w", b.initPath, unix.Exec(b.initPath, args, env))
}

// emptyInitramfs removes every file of the first root's own filesystem but this program. What cannot be
// removed costs memory and nothing else.
func emptyInitramfs() {
	var rootStat unix.Stat_t
	if unix.Lstat("/", &rootStat) != nil {
		return
	}
	var empty func(dir string)
	empty = func(dir string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return
		}
		for _, e := range entries {
			p := filepath.Join(dir, e.Name())
			var st unix.Stat_t
			if p == binaryDir || unix.Lstat(p, &st) != nil || st.Dev != rootStat.Dev {
				continue
			}
			if e.IsDir() {
				empty(p)
			}
			_ = os.Remove(p)
		}
	}
	empty("/")
}
