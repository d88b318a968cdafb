package sandbox

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/test/fakeguest"
	"git.thaloco.com/thaloco/banger/test/ownmounts"
)

func TestCreateChoosesDefaults(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.agent = fakeguest.Agent(nil, fakeguest.Boot()...)
	r.start()
	op := r.done(r.s.Create(r.ctx(), CreateRequest{}))
	v := r.vm(vm.ID(op.VMID))
	if err := vm.ValidateName(v.Name); err != nil || !strings.Contains(v.Name, "-") {
		t.Errorf("name %q: %v", v.Name, err)
	}
	want := vm.Spec{VCPU: 2, MemoryMiB: 2048, DiskSize: vm.MinDiskBytes, SystemSize: vm.MinDiskBytes}
	if got := v.Spec; got.VCPU != want.VCPU || got.MemoryMiB != want.MemoryMiB || got.DiskSize != want.DiskSize || got.SystemSize != want.SystemSize {
		t.Errorf("spec %+v", got)
	}
	if v.State != vm.Running || v.Pins.Image != "default" || v.StartedAt == nil || v.VMM != "fake" {
		t.Errorf("record %+v", v)
	}
	r.untilVM(v.ID, "with its boot", func(v vm.VM) bool {
		return len(v.Boot) > 0 && v.Boot[len(v.Boot)-1].Name == boot.StageUserspace
	})
	var stages []string
	for _, st := range op.Stages {
		stages = append(stages, st.Name)
		if st.FinishedAt.IsZero() {
			t.Errorf("stage %s never finished", st.Name)
		}
	}
	if want := []string{stepImage, stepSystem, stepWork, stepNetwork, stepConfig, stepVMM, stepAgent}; !slices.Equal(stages, want) {
		t.Errorf("stages %q", stages)
	}
	m := r.machines()[0].Spec
	var roles []vmm.Role
	for _, d := range m.Drives {
		roles = append(roles, d.Role)
		if shared := d.Role != vmm.RoleSystem && d.Role != vmm.RoleWork; d.ReadOnly != shared {
			t.Errorf("drive %s read-only: %v", d.Role, d.ReadOnly)
		}
	}
	if want := []vmm.Role{vmm.RoleBase, vmm.RoleSystem, vmm.RoleWork, vmm.RoleModules, vmm.RoleConfig}; !slices.Equal(roles, want) {
		t.Errorf("drives %q", roles)
	}
	if m.VCPU != 2 || m.MemoryMiB != 2048 || m.CID != v.Lease.CID || m.Name != v.Name {
		t.Errorf("machine %+v", m)
	}
	r.check()
}

func TestCreateWithoutStart(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	op := r.done(r.s.Create(r.ctx(), CreateRequest{Name: "calm-otter", NoStart: true}))
	v := r.vm(vm.ID(op.VMID))
	if v.State != vm.Stopped || len(r.machines()) != 0 {
		t.Errorf("%s, %d machines", v.State, len(r.machines()))
	}
	r.check()
	r.done(r.s.Start(r.ctx(), v.ID))
	r.check()
}

// TestMoreMemoryThanTheHostHas: who starts more VMs than the host has memory for is told so, by each that is too much.
func TestMoreMemoryThanTheHostHas(t *testing.T) {
	t.Parallel()
	r := newRig(t).start() // 8 GiB
	told := func(op operation.Operation) bool {
		return slices.ContainsFunc(op.Notices, func(n string) bool { return strings.Contains(n, "9.0 GiB of memory, and this host has 8.0") })
	}
	create := func(name string, mib int64, noStart bool) operation.Operation {
		t.Helper()
		return r.done(r.s.Create(r.ctx(), CreateRequest{Name: name, NoStart: noStart, Spec: vm.Spec{MemoryMiB: mib}}))
	}
	if told(create("first", 4096, false)) || told(create("second", 4096, false)) || told(create("idle", 1024, true)) {
		t.Error("what fits is too much")
	}
	third := create("third", 1024, false)
	if !told(third) {
		t.Errorf("9 GiB of VMs on a host of 8: %q", third.Notices)
	}
	id := vm.ID(third.VMID)
	r.done(r.s.Stop(r.ctx(), id, false))
	if op := r.done(r.s.Start(r.ctx(), id)); !told(op) {
		t.Errorf("started again: %q", op.Notices)
	}
	if op := r.done(r.s.Start(r.ctx(), id)); told(op) {
		t.Errorf("it runs already: %q", op.Notices)
	}
}

// Every kind of bad input is refused at once: no operation, no record, no file.
func TestBadInputChangesNothing(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	taken := r.create("calm-otter")
	trace := func() string {
		ops, err := r.s.store.Operations(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(len(ops), len(r.s.ops.List()), len(r.s.store.VMs()), r.list(r.paths.VMs()), r.list(r.paths.State), len(r.machines()))
	}
	before := trace()
	labels := map[string]string{}
	for i := range vm.MaxLabels + 1 {
		labels[fmt.Sprintf("k%d", i)] = "v"
	}
	for name, c := range map[string]struct {
		request    CreateRequest
		code       fault.Code
		text, hint string
	}{
		"name taken":         {CreateRequest{Name: taken.Name}, fault.Exists, "calm-otter", "banger vm delete calm-otter"},
		"name not a label":   {CreateRequest{Name: "Calm_Otter"}, fault.Invalid, "Calm_Otter", "--name calm-otter"},
		"name too long":      {CreateRequest{Name: strings.Repeat("a", 64)}, fault.Invalid, "64 characters", "--name"},
		"name localhost":     {CreateRequest{Name: "localhost"}, fault.Invalid, "localhost", "--name"},
		"name of digits":     {CreateRequest{Name: "1234"}, fault.Invalid, "1234", "--name"},
		"name like an id":    {CreateRequest{Name: "0123456789ab"}, fault.Invalid, "id", "--name"},
		"name with escapes":  {CreateRequest{Name: "a\x1b[31m"}, fault.Invalid, `\x1b`, "--name"},
		"vcpu negative":      {CreateRequest{Spec: vm.Spec{VCPU: -1}}, fault.Invalid, "vcpu", "--vcpu"},
		"vcpu absurd":        {CreateRequest{Spec: vm.Spec{VCPU: 1000}}, fault.Invalid, "1000", "--vcpu"},
		"memory negative":    {CreateRequest{Spec: vm.Spec{MemoryMiB: -1}}, fault.Invalid, "memory", "--memory"},
		"memory too little":  {CreateRequest{Spec: vm.Spec{MemoryMiB: 1}}, fault.Invalid, "memory", "--memory"},
		"memory over host":   {CreateRequest{Spec: vm.Spec{MemoryMiB: 9000}}, fault.Invalid, "8192", "--memory"},
		"disk negative":      {CreateRequest{Spec: vm.Spec{DiskSize: -vm.GiB}}, fault.Invalid, "disk size", "16G"},
		"disk too small":     {CreateRequest{Spec: vm.Spec{DiskSize: vm.MiB}}, fault.Invalid, "disk size", "16G"},
		"disk too large":     {CreateRequest{Spec: vm.Spec{DiskSize: 3 * vm.TiB}}, fault.Invalid, "2T", "16G"},
		"disk uneven":        {CreateRequest{Spec: vm.Spec{DiskSize: vm.GiB + 1}}, fault.Invalid, "disk size", "16G"},
		"system disk":        {CreateRequest{Spec: vm.Spec{SystemSize: 3 * vm.TiB}}, fault.Invalid, "system size", "16G"},
		"label key":          {CreateRequest{Spec: vm.Spec{Labels: map[string]string{"A b": "c"}}}, fault.Invalid, "A b", "--label"},
		"label value":        {CreateRequest{Spec: vm.Spec{Labels: map[string]string{"a": "\x1b[2J"}}}, fault.Invalid, "unprintable", "--label"},
		"labels":             {CreateRequest{Spec: vm.Spec{Labels: labels}}, fault.Invalid, "33", "leave some out"},
		"unknown image":      {CreateRequest{Image: "nixos"}, fault.NotFound, "nixos", "default"},
		"everything at once": {CreateRequest{Name: "-", Image: "nixos", Spec: vm.Spec{VCPU: -1}}, fault.Invalid, "hyphen", "--name"},
	} {
		_, err := r.s.Create(r.ctx(), c.request)
		wants(t, name, err, c.code, c.text, c.hint)
		if after := trace(); after != before {
			t.Errorf("%s changed something: %s, then %s", name, before, after)
		}
	}
	r.check()
}

func TestADamagedBundleIsNamed(t *testing.T) {
	t.Parallel()
	for _, role := range append(bundle.Required(), "manifest", "directory") {
		for _, damage := range []string{"missing", "cut off"} {
			t.Run(string(role)+" "+damage, func(t *testing.T) {
				t.Parallel()
				r := newRig(t)
				r.ownBundle()
				file := filepath.Join(r.bundle, bundle.FileName(role))
				switch role {
				case "manifest":
					file = filepath.Join(r.bundle, bundle.ManifestName)
				case "directory":
					file = r.bundle
				}
				named := file
				if role == "manifest" && damage == "missing" {
					named = r.bundle
				}
				r.start()
				if damage == "missing" || role == "directory" {
					if err := os.RemoveAll(file); err != nil {
						t.Fatal(err)
					}
				} else if err := os.Truncate(file, 0); err != nil {
					t.Fatal(err)
				}
				_, err := r.s.Create(r.ctx(), CreateRequest{Name: "calm-otter"})
				code := fault.NotFound
				if damage == "cut off" && role != "directory" {
					code = fault.Corrupt
				}
				wants(t, "create", err, code, named, "make install")
				r.nothing()
				if found := r.findings(); found[0].Code != "bundle" || found[0].Severity != "fail" || found[0].Fix == "" {
					t.Errorf("doctor: %+v", found[0])
				}
			})
		}
	}
}

// An artifact with the right size and wrong content is only found when it is read: the create fails
// then, and leaves nothing.
func TestCorruptContentLeavesNothing(t *testing.T) {
	t.Parallel()
	for _, role := range []bundle.Role{bundle.RootFS, bundle.WorkSeed, bundle.Kernel, bundle.Initrd, bundle.Modules} {
		t.Run(string(role), func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.ownBundle()
			f, err := os.OpenFile(filepath.Join(r.bundle, bundle.FileName(role)), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte{0xff}, 3); err != nil {
				t.Fatal(err)
			}
			f.Close()
			r.start()
			op := r.wait(r.s.Create(r.ctx(), CreateRequest{Name: "calm-otter"}))
			ended(t, op, operation.Failed, fault.Corrupt, bundle.FileName(role), "make runtime")
			r.nothing()
		})
	}
}

// failingCheck is a driver whose host lacks something.
type failingCheck struct{ vmm.Driver }

func (failingCheck) Check(context.Context) error {
	return fault.New(fault.Unavailable, "qemu", "it is not installed").WithHint("sudo apt install qemu-system-x86")
}

func TestADriverThatCannotWorkIsSaidUpFront(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.driver = func(d vmm.Driver) vmm.Driver { return failingCheck{d} }
	r.start()
	_, err := r.s.Create(r.ctx(), CreateRequest{})
	wants(t, "create", err, fault.Unavailable, "not installed", "apt install")
	if n := len(r.s.ops.List()); n != 0 {
		t.Errorf("%d operations", n)
	}
	r.nothing()
}

func TestASeedLargerThanTheDiskIsRefused(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	// A filesystem of 1 GiB as the seed.
	s := rigIn(t, filepath.Join(r.dir, "other"), filepath.Join(r.dir, "world"))
	_ = os.MkdirAll(s.dir, 0o700)
	s.cfg.DefaultSystemSize = vm.GiB
	s.start()
	seed, err := s.s.blank(r.ctx(), systemLabel, vm.GiB)
	if err != nil {
		t.Fatal(err)
	}
	r.cfg.DefaultWorkSeed = seed
	r.start()
	_, err = r.s.Create(r.ctx(), CreateRequest{Spec: vm.Spec{DiskSize: 768 * vm.MiB}})
	wants(t, "create", err, fault.Invalid, "disk size", "at least 1G")
	r.nothing()
	r.done(r.s.Create(r.ctx(), CreateRequest{Spec: vm.Spec{DiskSize: vm.GiB}}))
	r.check()
}

// TestFullDisk has the state directory on a small tmpfs.
func TestFullDisk(t *testing.T) {
	if !ownmounts.Inside(t) {
		return
	}
	r := newRig(t)
	if err := unix.Mount("tmpfs", r.dir, "tmpfs", 0, "size=400m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(r.dir, unix.MNT_DETACH)
	var err error
	if r = rigIn(t, r.dir, filepath.Join(sharedDir(t), "full-world")); r.open() != nil {
		t.Fatal(err)
	}
	defer r.stop()
	up, down := r.create("up"), r.create("down")
	r.done(r.s.Stop(r.ctx(), down.ID, false))
	before := r.vm(down.ID)
	filler := filepath.Join(r.dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 200<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = r.s.Create(r.ctx(), CreateRequest{})
	wants(t, "create", err, fault.Exhausted, r.paths.State, "df -h")
	// A start is refused before it changes anything, and a restart before it takes the VM down.
	op := r.wait(r.s.Start(r.ctx(), down.ID))
	ended(t, op, operation.Failed, fault.Exhausted, r.paths.State, "df -h")
	if after := r.vm(down.ID); after.State != before.State || after.Failure != nil {
		t.Errorf("start left %s", brief([]vm.VM{after}))
	}
	op = r.wait(r.s.Restart(r.ctx(), up.ID))
	ended(t, op, operation.Failed, fault.Exhausted, r.paths.State, "df -h")
	if after := r.vm(up.ID); after.State != vm.Running || after.PID != up.PID {
		t.Errorf("restart left %s", brief([]vm.VM{after}))
	}
	// Nor is an image registered, and nothing of it is left. TestImagesOnAFullDisk is about all ways by which images come.
	op = r.wait(r.s.RegisterImage(r.ctx(), RegisterRequest{Name: "mine", Rootfs: r.rootFile("root.ext4", "x")}))
	ended(t, op, operation.Failed, fault.Exhausted, r.paths.State, "df -h")
	r.onlyImages("default")
	r.check()
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	r.done(r.s.Start(r.ctx(), down.ID))
	r.check()
}

func TestNamegenProgram(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	program := filepath.Join(r.dir, "name")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho blue-whale\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	r.cfg.NamegenPath = program
	r.start()
	if op := r.done(r.s.Create(r.ctx(), CreateRequest{NoStart: true})); op.VMName != "blue-whale" {
		t.Errorf("the name is %s", op.VMName)
	}
	// The name is taken now: another one is made of it.
	if op := r.done(r.s.Create(r.ctx(), CreateRequest{NoStart: true})); !strings.HasPrefix(op.VMName, "blue-whale-") {
		t.Errorf("the name is %s", op.VMName)
	}
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	_, err := r.s.Create(r.ctx(), CreateRequest{})
	wants(t, "create", err, fault.Unavailable, "namegen_path", "config.toml")
	r.check()
}

// Two creates that draw the same name: the transaction that admits decides, and the other draws again.
func TestGeneratedNamesNeverCollide(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	program := filepath.Join(r.dir, "name")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho blue-whale\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	r.cfg.NamegenPath = program
	r.start()
	got := map[string]bool{}
	results := make(chan operation.Operation, 8)
	for range cap(results) {
		go func() {
			op, err := r.s.Create(context.Background(), CreateRequest{NoStart: true})
			if err != nil {
				t.Error(err)
			}
			results <- op
		}()
	}
	for range cap(results) {
		op := r.wait(<-results, nil)
		got[op.VMName] = true
	}
	if len(got) != cap(results) {
		t.Errorf("names: %v", slices.Sorted(maps.Keys(got)))
	}
	r.check()
}

func TestResolve(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	ctx := r.ctx()
	admit := func(id, name string) vm.VM {
		v := vm.VM{ID: vm.ID(id), Name: name, State: vm.Stopped, Desired: vm.WantStopped}
		op := newOperation(operation.Create, v)
		op.State = operation.Succeeded
		v, err := r.s.store.AdmitVM(ctx, v, op)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	one := admit("cafe00112233445566778899aabbccdd", "calm-otter")
	two := admit("cafe00119999445566778899aabbccdd", "beef")
	three := admit("beef0000111122223333444455556666", "calm")
	for ref, want := range map[string]vm.VM{
		"calm-otter": one, "calm": three, "cafe00112": one, "cafe00119": two, string(one.ID): one, one.ID.Short(): one,
		"beef":  two, // a name wins over another's id
		"beef0": three,
	} {
		if got, err := r.s.Resolve(ctx, ref); err != nil || got.ID != want.ID {
			t.Errorf("%s: %s, %v; want %s", ref, got.Name, err, want.Name)
		}
	}
	_, err := r.s.Resolve(ctx, "cafe")
	wants(t, "a shared prefix", err, fault.Ambiguous, "calm-otter (cafe00112233), beef (cafe00119999)", "more digits")
	for _, ref := range []string{"", "caf", "calm-", "otter", "CAFE00112", "cafe0011223344556677889900", "%", "cafe001122334455667788 99"} {
		_, err := r.s.Resolve(ctx, ref)
		wants(t, ref, err, fault.NotFound, ref, "banger vm list")
	}
}
