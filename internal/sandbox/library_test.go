package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

func (r *rig) register(q RegisterRequest) image.Image {
	r.t.Helper()
	r.done(r.s.RegisterImage(r.ctx(), q))
	d, err := r.s.Image(r.ctx(), q.Name)
	if err != nil {
		r.t.Fatal(err)
	}
	return d.Image
}

func (r *rig) createFrom(name, img string) vm.VM {
	r.t.Helper()
	op := r.done(r.s.Create(r.ctx(), CreateRequest{Name: name, Image: img}))
	return r.vm(vm.ID(op.VMID))
}

// What is registered is captured: neither a change of the files nor another registration reaches VMs that exist.
func TestARegisteredImageIsCaptured(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	path := r.rootFile("root.ext4", "one")
	first := r.register(RegisterRequest{Name: "mine", Rootfs: path})
	old := r.createFrom("old", "mine")
	want := r.drive(old, vmm.RoleBase)
	if want != r.read(path) {
		t.Error("the VM's base is not what was registered")
	}
	r.rootFile("root.ext4", "two, in place")
	if got := r.drive(r.createFrom("same", "mine"), vmm.RoleBase); got != want {
		t.Error("a change of the file reaches new VMs without a registration")
	}
	second := r.register(RegisterRequest{Name: "mine", Rootfs: path})
	if second.ID == first.ID || second.Base == first.Base {
		t.Error("another content has the same id")
	}
	if got := r.drive(r.createFrom("young", first.Name), vmm.RoleBase); got == want {
		t.Error("a new VM has the old content")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	r.done(r.s.Restart(r.ctx(), old.ID))
	if got := r.drive(old, vmm.RoleBase); got != want {
		t.Error("the old VM has another base")
	}
	r.check()
	// By id and its start as well.
	for _, ref := range []string{second.ID, second.ID[:6]} {
		if d, err := r.s.Image(r.ctx(), ref); err != nil || d.Image.Name != "mine" || len(d.VMs) != 1 || d.VMs[0] != "young" {
			t.Errorf("%s: %+v, %v", ref, d, err)
		}
	}
	// The old content goes with the last VM of it.
	for _, name := range []string{"old", "same"} {
		v, _ := r.s.store.VMByName(name)
		r.done(r.s.Delete(r.ctx(), v.ID))
	}
	if exists(r.s.images.content(first.Base)) || !exists(r.s.images.content(second.Base)) {
		t.Error("content that nothing refers to is kept, or the other is not")
	}
}

// An image with a kernel of its own keeps it, whatever the bundle's becomes; one without follows the default image.
func TestKernelsOfImages(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	root := r.rootFile("root.ext4", "x")
	modules := moduleTree(r, "6.99.0-mine")
	img := r.register(RegisterRequest{Name: "own", Rootfs: root, Kernel: r.file("vmlinux", elfKernel()), Modules: modules,
		Initrd: r.file("initrd", "070701 somebody else's")})
	if err := errors.Join(os.RemoveAll(filepath.Join(r.dir, "lib")), os.Remove(filepath.Join(r.dir, "vmlinux")), os.Remove(filepath.Join(r.dir, "initrd"))); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(r.paths.Cache, "kernels")); err != nil {
		t.Fatal(err)
	}
	m := r.machine(r.createFrom("calm-otter", "own")).Spec
	if !strings.Contains(r.read(m.Kernel), "6.99.0-mine") || !strings.HasSuffix(r.read(m.Initrd), "somebody else's") || !strings.Contains(m.Cmdline, "rdinit=") {
		t.Errorf("the VM does not boot with the image's kernel and initrd: %s", m.Cmdline)
	}
	if img.Kernel == "" {
		t.Error("the image is bound to no kernel")
	}
	follows := r.register(RegisterRequest{Name: "follows", Rootfs: root})
	if v := r.createFrom("young", "follows"); follows.Kernel != "" || v.Pins.Kernel != r.createFrom("plain", "").Pins.Kernel {
		t.Errorf("%+v", v.Pins)
	}
	r.check()
	// Exported and imported with it.
	out := filepath.Join(r.dir, "own.tar.zst")
	r.done(r.s.ExportImage(r.ctx(), "own", out))
	r.done(r.s.ImportImage(r.ctx(), out, "again"))
	if d, err := r.s.Image(r.ctx(), "again"); err != nil || d.Image.Kernel != img.Kernel || d.Image.Base != img.Base || !d.Image.Managed || d.KernelVersion != "6.99.0-mine" {
		t.Errorf("%+v, %v", d, err)
	}
	// Modules of another kernel.
	_, err := r.s.RegisterImage(r.ctx(), RegisterRequest{Name: "bad", Rootfs: root, Kernel: r.file("vmlinux", elfKernel()), Modules: moduleTree(r, "6.0.0-other")})
	if err == nil {
		op := r.wait(r.s.RegisterImage(r.ctx(), RegisterRequest{Name: "bad", Rootfs: root, Kernel: filepath.Join(r.dir, "vmlinux"), Modules: filepath.Join(r.dir, "lib", "modules", "6.0.0-other")}))
		ended(t, op, operation.Failed, fault.Invalid, "are for kernel 6.0.0-other", "/lib/modules/6.99.0-mine")
	}
	op := r.wait(r.s.RegisterImage(r.ctx(), RegisterRequest{Name: "bad", Rootfs: root, Kernel: r.file("text", "no kernel"), Modules: filepath.Join(r.dir, "lib", "modules", "6.0.0-other")}))
	if op.State != operation.Failed {
		t.Errorf("a text passes for a kernel: %+v", op)
	}
}

// An image that a VM is being made from is not deleted under it, whoever comes first.
func TestAnImageIsDeletedWhileAVMIsMade(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	root := r.rootFile("root.ext4", "x")
	for range 20 {
		r.register(RegisterRequest{Name: "mine", Rootfs: root})
		made := make(chan operation.Operation, 1)
		refused := make(chan error, 1)
		go func() {
			op, err := r.s.Create(r.ctx(), CreateRequest{Name: "calm-otter", Image: "mine"})
			refused <- err
			made <- op
		}()
		_, deleteErr := r.s.DeleteImage(r.ctx(), "mine")
		createErr, op := <-refused, <-made
		switch {
		case createErr == nil:
			op = r.done(op, nil)
			if deleteErr == nil { // then it was deleted after its record was read, with the content held
				t.Error("the image was deleted although a VM is made from it")
			} else if !fault.Is(deleteErr, fault.Precondition) && !fault.Is(deleteErr, fault.Busy) {
				t.Errorf("delete: %v", deleteErr)
			}
			r.check()
			r.done(r.s.Delete(r.ctx(), vm.ID(op.VMID)))
		case deleteErr != nil:
			t.Errorf("both were refused: %v, %v", createErr, deleteErr)
		case !fault.Is(createErr, fault.NotFound):
			t.Errorf("create: %v", createErr)
		}
	}
	r.nothing()
}

// Two registrations of one name at once: each is whole, and one of them is what the name is.
func TestTwoRegistrationsAtOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	one, two := r.rootFile("one.ext4", "one"), r.rootFile("two.ext4", "two")
	for range 5 {
		a, errA := r.s.RegisterImage(r.ctx(), RegisterRequest{Name: "mine", Rootfs: one})
		b, errB := r.s.RegisterImage(r.ctx(), RegisterRequest{Name: "mine", Rootfs: two})
		r.done(a, errA)
		r.done(b, errB)
		r.onlyImages("default", "mine")
		v := r.createFrom("calm-otter", "mine")
		if got := r.drive(v, vmm.RoleBase); got != r.read(one) && got != r.read(two) {
			t.Error("the image is neither")
		}
		r.done(r.s.Delete(r.ctx(), v.ID))
	}
}

// Archives that are not what they say leave nothing behind.
func TestImportsThatAreRefused(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	r.register(RegisterRequest{Name: "mine", Rootfs: r.rootFile("root.ext4", strings.Repeat("noise ", 1000))})
	out := filepath.Join(r.dir, "mine.tar.zst")
	r.done(r.s.ExportImage(r.ctx(), "mine", out))
	whole := r.read(out)
	for name, content := range map[string]string{
		"empty":   "",
		"text":    "hello",
		"half":    whole[:len(whole)/2],
		"flipped": whole[:len(whole)/2] + "\xff\x00\xff" + whole[len(whole)/2+3:],
	} {
		op, err := r.s.ImportImage(r.ctx(), r.file("x.tar.zst", content), "bad")
		if err == nil {
			op = r.wait(op, nil)
			if op.State != operation.Failed || !fault.Is(op.Fault, fault.Corrupt) {
				t.Errorf("%s: %s, %v", name, op.State, op.Fault)
			}
		} else if !fault.Is(err, fault.Invalid) && !fault.Is(err, fault.Corrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	r.onlyImages("default", "mine")
	_, err := r.s.ImportImage(r.ctx(), out, "")
	wants(t, "import", err, fault.Exists, "mine", "--name")
	_, err = r.s.ExportImage(r.ctx(), "mine", out)
	wants(t, "export", err, fault.Exists, out, "choose another file")
}

// What a daemon's end interrupts is ended by the next one, and nothing half made is left.
func TestARegistrationThatADaemonsEndInterrupts(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	root := r.rootFile("root.ext4", "x")
	op, err := r.s.RegisterImage(r.ctx(), RegisterRequest{Name: "mine", Rootfs: root})
	if err != nil {
		t.Fatal(err)
	}
	r.restart()
	got, err := r.s.Operation(r.ctx(), op.ID)
	if err != nil || got.State == operation.Running || got.Image != "mine" {
		t.Errorf("%+v, %v", got, err)
	}
	if got.State == operation.Succeeded {
		r.onlyImages("default", "mine")
	} else {
		r.onlyImages("default")
	}
	for _, name := range r.list(r.paths.Images()) {
		if strings.HasPrefix(name, ".") {
			t.Errorf("%s is left", name)
		}
	}
}
