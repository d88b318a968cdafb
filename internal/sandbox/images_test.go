package sandbox

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/kernel"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
)

// remake puts another root filesystem into the rig's own bundle, in place, as a new build does.
func (r *rig) remake(rootfs string) {
	r.t.Helper()
	b, err := bundle.Load(r.bundle)
	if err != nil {
		r.t.Fatal(err)
	}
	name := bundle.FileName(bundle.RootFS)
	if err := os.WriteFile(filepath.Join(r.bundle, name), []byte(rootfs), 0o644); err != nil {
		r.t.Fatal(err)
	}
	if b.Artifacts[bundle.RootFS], err = bundle.Describe(context.Background(), r.bundle, name); err != nil {
		r.t.Fatal(err)
	}
	if err := b.Write(r.bundle); err != nil {
		r.t.Fatal(err)
	}
}

// machine is the running machine of a VM.
func (r *rig) machine(v vm.VM) fakevmm.Record {
	r.t.Helper()
	for _, m := range r.machines() {
		if m.Spec.ID == string(v.ID) {
			return m
		}
	}
	r.t.Fatalf("%s has no machine", v.Name)
	return fakevmm.Record{}
}

func (r *rig) drive(v vm.VM, role vmm.Role) string {
	r.t.Helper()
	for _, d := range r.machine(v).Spec.Drives {
		if d.Role == role {
			return r.read(d.Path)
		}
	}
	r.t.Fatalf("%s has no drive %s", v.Name, role)
	return ""
}

func (r *rig) read(path string) string {
	r.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b)
}

func (r *rig) file(name, content string) string {
	r.t.Helper()
	path := filepath.Join(r.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		r.t.Fatal(err)
	}
	return path
}

func (r *rig) defaultImage() image.Image {
	r.t.Helper()
	list, name, err := r.s.Images(r.ctx())
	if err != nil || len(list) != 1 || list[0].Name != name {
		r.t.Fatalf("images: %+v, default %q, %v", list, name, err)
	}
	return list[0]
}

func TestTheBundlesImageIsRegisteredByItself(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	img := r.defaultImage()
	if img.Source != filepath.Join(r.bundle, "rootfs-docker.ext4") || img.Seed == "" || img.SizeBytes == 0 {
		t.Errorf("%+v", img)
	}
	r.restart()
	if again := r.defaultImage(); again.ID != img.ID || !again.CreatedAt.Equal(img.CreatedAt) {
		t.Error("it was registered again")
	}
}

func TestVMsKeepTheBaseTheyWereMadeFrom(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ownBundle()
	r.start()
	old := r.create("old")
	base := old.Pins.Base
	r.done(r.s.Stop(r.ctx(), old.ID, false))
	r.remake("a newer root filesystem, of another length")
	young := r.create("young")
	if got := r.drive(young, vmm.RoleBase); !strings.HasPrefix(got, "a newer") {
		t.Errorf("the new VM has %q", got)
	}
	r.done(r.s.Start(r.ctx(), old.ID))
	if got := r.drive(old, vmm.RoleBase); got != "a root filesystem" {
		t.Errorf("the old VM has %q", got)
	}
	r.check()
	// Also when the bundle is gone altogether, and with another daemon.
	keep := r.bundle + ".away"
	r.done(r.s.Stop(r.ctx(), old.ID, false))
	if err := os.Rename(r.bundle, keep); err != nil {
		t.Fatal(err)
	}
	r.restart()
	if v := r.vm(young.ID); v.State != vm.Running {
		t.Errorf("without a bundle: %s", brief([]vm.VM{v}))
	}
	r.done(r.s.Stop(r.ctx(), young.ID, false))
	r.done(r.s.Delete(r.ctx(), young.ID))
	if err := os.Rename(keep, r.bundle); err != nil {
		t.Fatal(err)
	}
	r.done(r.s.Start(r.ctx(), old.ID))
	// What nobody refers to is collected; what is no content of ours is not.
	other := filepath.Join(r.paths.Images(), "my-notes")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.done(r.s.Delete(r.ctx(), old.ID))
	if exists(r.s.images.content(base)) || !exists(other) {
		t.Error("the old base is still there, or what is not ours has gone")
	}
	r.nothing()
}

// Between the choice of an image and the record of the VM another create may find a new bundle: what
// was chosen is not collected.
func TestWhatACreateChoseIsNotCollected(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ownBundle()
	r.start()
	v := r.create("calm-otter") // so that the content is captured
	pins, release, err := r.s.images.pins(r.ctx(), "")
	if err != nil {
		t.Fatal(err)
	}
	r.remake("another root filesystem")
	r.done(r.s.Delete(r.ctx(), v.ID))
	r.defaultImage() // looks at the bundle again
	if !exists(r.s.images.content(pins.Base)) {
		t.Error("it was collected")
	}
	release()
	if err := r.s.images.collectUnused(r.ctx()); err != nil {
		t.Fatal(err)
	}
	if exists(r.s.images.content(pins.Base)) {
		t.Error("it is kept for ever")
	}
}

// A crash between the capture of an image and its record leaves content that nothing refers to: the next daemon takes it away.
func TestContentOfACrashIsCollected(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start()
	v := r.create("calm-otter")
	left := r.s.images.content(strings.Repeat("a1", sha256.Size))
	if err := os.WriteFile(left, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.restart()
	if exists(left) || !exists(r.s.images.content(v.Pins.Base)) {
		t.Error("it is still there, or what a VM refers to has gone")
	}
}

// An image that could not be recorded is not taken for seen.
func TestAFailedRegistrationIsTriedAgain(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ownBundle()
	r.start()
	r.remake("another root filesystem")
	gone, cancel := context.WithCancel(context.Background())
	b, err := bundle.Load(r.bundle)
	if err != nil {
		t.Fatal(err)
	}
	r.s.store.AtCommit(cancel) // the write of the kernel goes through, that of the image does not
	_, _, err = r.s.images.pins(gone, "")
	r.s.store.AtCommit(func() {})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("it was to fail: %v", err)
	}
	if img := r.defaultImage(); img.Base != b.Artifacts[bundle.RootFS].SHA256 {
		t.Error("the new image never got registered")
	}
}

func TestSettingsOfTheImage(t *testing.T) {
	t.Parallel()
	t.Run("default_rootfs", func(t *testing.T) {
		t.Parallel()
		r := newRig(t)
		r.cfg.DefaultRootfs = r.file("my.ext4", "my root filesystem")
		r.start()
		v := r.create("calm-otter")
		if got := r.drive(v, vmm.RoleBase); got != "my root filesystem" {
			t.Errorf("base: %q", got)
		}
		// The bundle's seed is /root of another root filesystem: the work disk is blank, and the guest copies its own.
		if img := r.defaultImage(); v.Pins.Seed != "" || img.Source != r.cfg.DefaultRootfs {
			t.Errorf("seed %q, source %s", v.Pins.Seed, img.Source)
		}
		if m := r.guestConfig(v).Mounts; len(m) != 1 || !m[0].Seed {
			t.Errorf("mounts: %+v", m)
		}
		// Overwritten in place: the old VM keeps what it has.
		r.file("my.ext4", "my newer root filesystem")
		if got := r.drive(r.create("young"), vmm.RoleBase); got != "my newer root filesystem" {
			t.Errorf("base of a new VM: %q", got)
		}
		r.done(r.s.Restart(r.ctx(), v.ID))
		if got := r.drive(v, vmm.RoleBase); got != "my root filesystem" {
			t.Errorf("base of the old VM: %q", got)
		}
		r.check()
		if err := os.Remove(r.cfg.DefaultRootfs); err != nil {
			t.Fatal(err)
		}
		_, err := r.s.Create(r.ctx(), CreateRequest{})
		wants(t, "create", err, fault.NotFound, "default_rootfs", "config.toml")
	})
	t.Run("default_work_seed", func(t *testing.T) {
		t.Parallel()
		r := newRig(t)
		r.start()
		blank, err := r.s.blank(r.ctx(), systemLabel, vm.MinDiskBytes) // any clean filesystem
		if err != nil {
			t.Fatal(err)
		}
		r.stop()
		r.cfg.DefaultWorkSeed = blank
		r.restart()
		v := r.create("calm-otter")
		if !strings.Contains(r.drive(v, vmm.RoleWork)[:4096], systemLabel) {
			t.Error("the work disk is not made from the configured seed")
		}
		r.check()
	})
	t.Run("default_packages_file", func(t *testing.T) {
		t.Parallel()
		r := newRig(t).start()
		before := r.defaultImage()
		r.cfg.DefaultPackagesFile = r.file("packages", "vim\n")
		r.restart()
		if img := r.defaultImage(); img.Packages != r.cfg.DefaultPackagesFile || before.Packages != filepath.Join(r.bundle, "packages.apt") {
			t.Errorf("packages %s, before %s", img.Packages, before.Packages)
		}
	})
	t.Run("runtime_dir", func(t *testing.T) {
		t.Parallel()
		r := newRig(t)
		r.ownBundle() // sets it
		r.remake("of another bundle")
		r.start()
		if got := r.drive(r.create("calm-otter"), vmm.RoleBase); got != "of another bundle" {
			t.Errorf("base: %q", got)
		}
	})
	t.Run("vsock_agent_path", func(t *testing.T) {
		t.Parallel()
		r := newRig(t)
		r.cfg.VsockAgentPath = r.file("agent", "the agent that I built")
		r.start()
		v := r.create("calm-otter")
		initrd := r.read(r.machine(v).Spec.Initrd)
		if !strings.Contains(initrd, "the agent that I built") || strings.Contains(initrd, "the bundle's agent") || !kernel.IsOwn([]byte(initrd)) {
			t.Error("the initrd does not carry the configured agent, and it alone")
		}
		// A newer one is in the next boot.
		r.file("agent", "the agent that I built later")
		r.done(r.s.Restart(r.ctx(), v.ID))
		if !strings.Contains(r.read(r.machine(v).Spec.Initrd), "built later") {
			t.Error("a restart boots the old agent")
		}
		if err := os.Remove(r.cfg.VsockAgentPath); err != nil {
			t.Fatal(err)
		}
		op := r.wait(r.s.Restart(r.ctx(), v.ID))
		ended(t, op, "failed", fault.NotFound, r.cfg.VsockAgentPath, "vsock_agent_path")
		r.check()
	})
	t.Run("default_initrd", func(t *testing.T) {
		t.Parallel()
		r := newRig(t)
		r.cfg.DefaultInitrd = r.file("initrd", "somebody else's initrd")
		r.start()
		m := r.machine(r.create("calm-otter")).Spec
		initrd := r.read(m.Initrd)
		if !strings.HasSuffix(initrd, "somebody else's initrd") || !strings.Contains(initrd, kernel.ForeignAgentPath) {
			t.Error("the initrd is not ours followed by the configured one")
		}
		if !strings.Contains(" "+m.Cmdline+" ", " rdinit=/banger/init ") {
			t.Errorf("command line %q", m.Cmdline)
		}
		r.check()
	})
	t.Run("default_kernel and default_modules_dir", func(t *testing.T) {
		t.Parallel()
		r := newRig(t)
		r.cfg.DefaultKernel, r.cfg.DefaultModulesDir = r.file("vmlinux", elfKernel()), moduleTree(r, "6.99.0-mine")
		r.paths.Cache = filepath.Join(r.dir, "cache") // no other test's
		r.start()
		if err := os.RemoveAll(filepath.Join(r.paths.Cache, "kernels")); err != nil { // before anything was captured of it
			t.Fatal(err)
		}
		// What was used long ago makes room.
		old := time.Now().Add(-2 * cacheYoung)
		for i := range 2 * initrdsKept {
			for _, kind := range []string{"initrd", "kernels"} {
				path := filepath.Join(r.paths.Cache, kind, "old-"+strconv.Itoa(i))
				if err := errors.Join(os.MkdirAll(path, 0o700), os.Chtimes(path, old, old)); err != nil {
					t.Fatal(err)
				}
			}
		}
		v := r.create("calm-otter")
		m := r.machine(v).Spec
		if got := r.read(m.Kernel); !strings.Contains(got, "Linux version 6.99.0-mine") {
			t.Error("the machine does not boot the configured kernel")
		}
		if got := r.drive(v, vmm.RoleModules); !strings.Contains(got, "modules.builtin") {
			t.Error("the modules image does not hold the configured tree")
		}
		if d, err := r.s.Show(r.ctx(), "calm-otter"); err != nil || d.KernelVersion != "6.99.0-mine" {
			t.Errorf("kernel version %q, %v", d.KernelVersion, err)
		}
		if initrd := r.read(m.Initrd); !kernel.IsOwn([]byte(initrd)) || !strings.Contains(initrd, "an agent") {
			t.Error("the initrd is not one of ours")
		}
		for kind, kept := range map[string]int{"initrd": initrdsKept, "kernels": kernelsKept} {
			if have, err := names(filepath.Join(r.paths.Cache, kind)); err != nil || len(have) != kept {
				t.Errorf("%d are cached of %s, not %d: %v", len(have), kind, kept, err)
			}
		}
		r.check()
		// With an initrd of somebody else's besides.
		r.cfg.DefaultInitrd = r.file("initrd", "somebody else's initrd")
		r.restart()
		if m := r.machine(r.create("young")).Spec; !strings.HasSuffix(r.read(m.Initrd), "somebody else's initrd") || !strings.Contains(m.Cmdline, "rdinit=") {
			t.Error("default_initrd has no effect with default_kernel")
		}
		r.check()
	})
	t.Run("one without the other", func(t *testing.T) {
		t.Parallel()
		for _, key := range []string{"default_kernel", "default_modules_dir"} {
			r := newRig(t)
			if key == "default_kernel" {
				r.cfg.DefaultKernel = r.file("vmlinux", elfKernel())
			} else {
				r.cfg.DefaultModulesDir = moduleTree(r, "6.99.0-mine")
			}
			r.start()
			_, err := r.s.Create(r.ctx(), CreateRequest{})
			wants(t, key, err, fault.Invalid, "default_kernel and default_modules_dir go together", "config.toml")
			r.nothing()
		}
	})
	t.Run("files that are not there", func(t *testing.T) {
		t.Parallel()
		for key, set := range map[string]func(r *rig){
			"default_rootfs":    func(r *rig) { r.cfg.DefaultRootfs = "/nowhere" },
			"default_work_seed": func(r *rig) { r.cfg.DefaultWorkSeed = "/nowhere" },
			"default_initrd":    func(r *rig) { r.cfg.DefaultInitrd = "/nowhere" },
			"default_kernel": func(r *rig) {
				r.cfg.DefaultKernel, r.cfg.DefaultModulesDir = "/nowhere", moduleTree(r, "6.99.0-mine")
			},
		} {
			r := newRig(t)
			set(r)
			r.start()
			_, err := r.s.Create(r.ctx(), CreateRequest{})
			wants(t, key, err, fault.NotFound, "/nowhere", key)
			r.nothing()
		}
	})
}

// moduleTree makes the module directory of a kernel that has everything built in.
func moduleTree(r *rig, version string) string {
	r.t.Helper()
	dir := filepath.Join(r.dir, "lib", "modules", version)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		r.t.Fatal(err)
	}
	var builtin strings.Builder
	for _, m := range kernel.InitrdModules() {
		builtin.WriteString("kernel/" + m.Name + ".ko\n")
	}
	for name, text := range map[string]string{"modules.dep": "", "modules.builtin": builtin.String()} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			r.t.Fatal(err)
		}
	}
	return dir
}

// elfKernel is the smallest file that passes for an x86-64 kernel.
func elfKernel() string {
	body := []byte("Linux version 6.99.0-mine (me@here)\x00")
	const head = 64 + 56
	var b bytes.Buffer
	for _, v := range []any{
		elf.Header64{Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
			Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1},
		elf.Prog64{Type: uint32(elf.PT_LOAD), Off: head, Filesz: uint64(len(body)), Memsz: uint64(len(body))},
	} {
		_ = binary.Write(&b, binary.LittleEndian, v) // to memory
	}
	return b.String() + string(body)
}

// The manifest of the bundle is read once, and again when it is another one.
func TestBundleIsReadWhenItChanges(t *testing.T) {
	r := newRig(t)
	r.ownBundle()
	r.start()
	first, err := r.s.images.bundle()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := r.s.images.bundle(); err != nil || again != first {
		t.Errorf("read again: %v", err)
	}
	manifest := filepath.Join(r.bundle, bundle.ManifestName)
	raw, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(manifest); err != nil {
		t.Fatal(err)
	}
	if _, err := r.s.images.bundle(); !fault.Is(err, fault.NotFound) {
		t.Errorf("without a manifest: %v", err)
	}
	if err := os.WriteFile(manifest, []byte(strings.Replace(string(raw), `"created_by": "`, `"created_by": "another `, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	if other, err := r.s.images.bundle(); err != nil || !strings.HasPrefix(other.CreatedBy, "another ") {
		t.Errorf("another manifest: %+v, %v", other, err)
	}
}
