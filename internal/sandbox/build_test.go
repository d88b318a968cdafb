package sandbox

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// rootFile makes a root filesystem that could boot; text is what is in it besides.
func (r *rig) rootFile(name, text string) string {
	r.t.Helper()
	root := filepath.Join(r.dir, name+".tree")
	if err := os.MkdirAll(filepath.Join(root, "sbin"), 0o755); err != nil {
		r.t.Fatal(err)
	}
	err := errors.Join(os.WriteFile(filepath.Join(root, "sbin", "init"), []byte("#!/bin/sh\n"), 0o755), os.WriteFile(filepath.Join(root, "text"), []byte(text), 0o644))
	if err != nil {
		r.t.Fatal(err)
	}
	tool, err := ext4.FindTool(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	path := filepath.Join(r.dir, name)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		r.t.Fatal(err)
	}
	if err := tool.Make(context.Background(), path, ext4.Format{Kind: ext4.ReadOnly, Size: 2 << 20, Root: root}); err != nil {
		r.t.Fatal(err)
	}
	return path
}

// archiveOf makes a tar archive of one file.
func (r *rig) archiveOf(name, file string) string {
	r.t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "top/" + file, Mode: 0o755, Size: 1}), second(w.Write([]byte("x"))), w.Close()); err != nil {
		r.t.Fatal(err)
	}
	return r.file(name, b.String())
}

func second(_ int, err error) error { return err }

// newBuilder is a rig in which images can be built, on an image "base".
func newBuilder(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.cfg.MiseSource, r.cfg.OpencodeSource = r.file("mise", "#!/bin/sh\n"), r.file("opencode", "#!/bin/sh\n")
	r.cfg.TmuxResurrectSource, r.cfg.TmuxContinuumSource = r.archiveOf("resurrect.tar", "resurrect.tmux"), r.archiveOf("continuum.tar", "continuum.tmux")
	r.start()
	r.done(r.s.RegisterImage(r.ctx(), RegisterRequest{Name: "base", Rootfs: r.rootFile("base.ext4", "a base")}))
	return r
}

func (r *rig) build(b BuildRequest) (operation.Operation, string) {
	r.t.Helper()
	op, log, err := r.s.BuildImage(r.ctx(), b)
	if err != nil {
		r.t.Fatal(err)
	}
	return op, log
}

// onlyImages checks which images there are, and that nothing is left of anything else.
func (r *rig) onlyImages(want ...string) {
	r.t.Helper()
	list, _, err := r.s.Images(r.ctx())
	if err != nil {
		r.t.Fatal(err)
	}
	keep := map[string]bool{}
	var have []string
	for _, img := range list {
		have = append(have, img.Name)
		keep[img.Base], keep[img.Seed] = true, true
	}
	for _, v := range r.s.store.VMs() {
		keep[v.Pins.Base], keep[v.Pins.Seed] = true, true
	}
	if !slices.Equal(have, want) {
		r.t.Errorf("images %v, want %v", have, want)
	}
	for _, name := range r.list(r.paths.Images()) {
		if !keep[name] {
			r.t.Errorf("%s is left among the images", name)
		}
	}
}

func TestAnImageIsBuilt(t *testing.T) {
	t.Parallel()
	r := newBuilder(t)
	op, log := r.build(BuildRequest{Name: "dev", From: "base", Docker: true, Packages: []string{"vim"}, Steps: []BuildStep{{Name: "mine", Script: "fake: say hello \x1b[31mred\n"}, {Name: "more", Packages: []string{"less"}}}})
	op = r.done(op, nil)
	if op.Image != "dev" || op.VMName == "" {
		t.Errorf("%+v", op)
	}
	var stages []string
	for _, s := range op.Stages {
		stages = append(stages, s.Name)
	}
	if text := strings.Join(stages, " "); !strings.Contains(text, "agent prepare packages tools mine more finish trim shutdown") || !strings.Contains(text, "publish") {
		t.Errorf("stages %v", stages)
	}
	r.nothing()
	r.onlyImages("base", "default", "dev")
	d, err := r.s.Image(r.ctx(), "dev")
	if err != nil || !d.Image.Managed || d.Image.Seed == "" || d.Image.Kernel != "" || d.Image.Source != "built on base, with Docker" || d.Filesystem != "ext4" {
		t.Errorf("%+v, %v", d, err)
	}
	said := r.read(log)
	for _, want := range []string{"== prepare", "== mine\nhello ", "was given something", "dev is built"} {
		if !strings.Contains(said, want) {
			t.Errorf("the log lacks %q:\n%s", want, said)
		}
	}
	if strings.Contains(said, "\x1b") {
		t.Errorf("the log has what a terminal acts upon: %q", said)
	}
	var sent bytes.Buffer // whoever asks late gets the same
	if err := r.s.BuildLog(r.ctx(), op.ID, func(b []byte) error { sent.Write(b); return nil }); err != nil || sent.String() != said {
		t.Errorf("the log that is sent: %v, %q", err, sent.String())
	}
	done := r.done(r.s.Create(r.ctx(), CreateRequest{Name: "young", Image: "dev", Spec: vm.Spec{DiskSize: 4 * vm.GiB}}))
	v := r.vm(vm.ID(done.VMID))
	if v.Pins.Base != d.Image.Base || v.Pins.Seed != d.Image.Seed {
		t.Errorf("the VM has %+v", v.Pins)
	}
	// Built again under the name: the VM keeps what it has.
	op, _ = r.build(BuildRequest{Name: "dev", From: "base", Packages: []string{"vim"}, Size: 2 << 20})
	r.done(op, nil)
	if again, err := r.s.Image(r.ctx(), "dev"); err != nil || len(again.VMs) != 0 && again.Image.ID != d.Image.ID {
		t.Errorf("%+v, %v", again, err)
	}
	r.done(r.s.Restart(r.ctx(), v.ID))
	r.check()
	// An image that was built is built upon with its seed.
	op, _ = r.build(BuildRequest{Name: "more", From: "dev"})
	r.done(op, nil)
	r.onlyImages("base", "default", "dev", "more")
}

// The builder is what it must be: a writable root of its own, no overlay, the network, no keys of its own in the image.
func TestTheBuilder(t *testing.T) {
	t.Parallel()
	r := newBuilder(t)
	op, _ := r.build(BuildRequest{Name: "dev", From: "base", Steps: []BuildStep{{Name: "waiting", Script: "fake: wait"}}})
	r.untilStage(op.ID, "waiting")
	v := r.vm(vm.ID(op.VMID))
	if v.Build == nil || !v.Spec.NAT || v.Build.Image != "dev" {
		t.Errorf("%+v", v)
	}
	for _, d := range r.machine(v).Spec.Drives {
		switch d.Role {
		case vmm.RoleBase:
			if d.ReadOnly || d.Path != rootDisk(r.paths, v.ID) {
				t.Errorf("its root is %+v", d)
			}
		case vmm.RoleConfig:
			config := r.read(d.Path)
			if !strings.Contains(config, `"direct":true`) || strings.Contains(config, "ssh_host") || strings.Contains(config, "authorized_keys") {
				t.Error("its configuration is not that of a builder")
			}
		}
	}
	// The base is in use meanwhile.
	_, err := r.s.DeleteImage(r.ctx(), "base")
	wants(t, "delete", err, fault.Precondition, v.Name, "banger vm delete")
	if _, err := r.s.Cancel(r.ctx(), op.ID); err != nil {
		t.Fatal(err)
	}
	ended(t, r.wait(op, nil), operation.Cancelled, fault.Cancelled, "cancelled by request", "")
	r.nothing()
	r.onlyImages("base", "default")
	if _, err := r.s.DeleteImage(r.ctx(), "base"); err != nil {
		t.Error(err)
	}
	r.onlyImages("default")
}

func TestABuildThatFailsLeavesNothingButItsLog(t *testing.T) {
	t.Parallel()
	r := newBuilder(t)
	failing := []BuildStep{{Name: "mine", Script: "fake: say this is why\nfake: exit 3"}}
	op, log := r.build(BuildRequest{Name: "dev", From: "base", Steps: failing})
	ended(t, r.wait(op, nil), operation.Failed, fault.Failed, "exit code 3: this is why", log)
	r.nothing()
	r.onlyImages("base", "default")
	if said := r.read(log); !strings.Contains(said, "this is why") || !strings.Contains(said, "the build failed") {
		t.Errorf("the log: %s", said)
	}
	// Kept, to be looked into; then it is a VM like others.
	op, _ = r.build(BuildRequest{Name: "dev", From: "base", Steps: failing, KeepOnFailure: true})
	op = r.wait(op, nil)
	if op.State != operation.Failed || !strings.Contains(strings.Join(op.Notices, "\n"), "banger vm exec "+op.VMName) {
		t.Errorf("%+v", op)
	}
	if v := r.vm(vm.ID(op.VMID)); v.State != vm.Running || !v.Build.Kept {
		t.Errorf("%+v", v)
	}
	r.restart()
	if v := r.vm(vm.ID(op.VMID)); v.State != vm.Running {
		t.Errorf("after a restart of the daemon: %+v", v)
	}
	r.done(r.s.Delete(r.ctx(), vm.ID(op.VMID)))
	r.nothing()
	// A source that is out of reach is named by its setting, before any machine runs.
	r.stop()
	r.cfg.TmuxResurrectSource = "/nowhere/repository"
	r.restart()
	op, _ = r.build(BuildRequest{Name: "dev", From: "base"})
	ended(t, r.wait(op, nil), operation.Failed, fault.NotFound, "tmux_resurrect_source", "tmux_resurrect_source in config.toml")
	r.nothing()
	// A guest that dies in the middle.
	r.stop()
	r.cfg.TmuxResurrectSource = r.cfg.TmuxContinuumSource
	r.cfg.TmuxResurrectSource = r.archiveOf("resurrect.tar", "resurrect.tmux")
	r.restart()
	op, _ = r.build(BuildRequest{Name: "dev", From: "base", Steps: []BuildStep{{Name: "waiting", Script: "fake: wait"}}})
	r.untilStage(op.ID, "waiting")
	if _, err := r.s.Kill(r.ctx(), vm.ID(op.VMID), 9); err != nil {
		t.Fatal(err)
	}
	ended(t, r.wait(op, nil), operation.Failed, fault.Unavailable, "was lost in this step", "see what it said")
	r.settled()
	r.nothing()
	r.onlyImages("base", "default")
}

// Whatever stage the daemon ends at, the next one takes the builder away, and the operation ends.
func TestABuildThatADaemonsEndInterrupts(t *testing.T) {
	t.Parallel()
	for _, stage := range []string{"system disk", "vmm", "agent", "waiting"} {
		r := newBuilder(t)
		op, _ := r.build(BuildRequest{Name: "dev", From: "base", Steps: []BuildStep{{Name: "waiting", Script: "fake: wait"}}})
		if stage == "waiting" {
			r.untilStage(op.ID, stage)
		} else {
			_ = r.s.WatchOperation(r.ctx(), op.ID, func(o operation.Operation) error {
				if slices.ContainsFunc(o.Stages, func(s operation.Stage) bool { return s.Name == stage }) {
					return errors.New("reached")
				}
				return nil
			})
		}
		r.restart()
		got, err := r.s.Operation(r.ctx(), op.ID)
		if err != nil || got.State != operation.Failed || !fault.Is(got.Fault, fault.Cancelled) {
			t.Errorf("at %s: %+v, %v", stage, got, err)
		}
		r.nothing()
		r.onlyImages("base", "default")
	}
}

// A stop or delete of the builder ends its build.
func TestWhoTakesTheBuilderAwayEndsTheBuild(t *testing.T) {
	t.Parallel()
	r := newBuilder(t)
	for _, do := range []func(vm.ID) (operation.Operation, error){
		func(id vm.ID) (operation.Operation, error) { return r.s.Delete(r.ctx(), id) },
		func(id vm.ID) (operation.Operation, error) { return r.s.Stop(r.ctx(), id, false) },
	} {
		op, _ := r.build(BuildRequest{Name: "dev", From: "base", Steps: []BuildStep{{Name: "waiting", Script: "fake: wait"}}})
		r.untilStage(op.ID, "waiting")
		other, err := do(vm.ID(op.VMID))
		r.wait(other, err)
		if last := r.wait(op, nil); last.State != operation.Cancelled {
			t.Errorf("the build: %s, %v", last.State, last.Fault)
		}
		r.nothing()
		r.onlyImages("base", "default")
	}
}

// default_base_rootfs is what builds begin with that name nothing else, and what is in it is captured.
func TestBuildsBeginWithTheConfiguredBase(t *testing.T) {
	t.Parallel()
	r := newBuilder(t)
	r.stop()
	r.cfg.DefaultBaseRootfs = r.rootFile("mine.ext4", "a base of my own")
	r.restart()
	op, _ := r.build(BuildRequest{Name: "dev", Steps: []BuildStep{{Name: "waiting", Script: "fake: wait"}}})
	r.untilStage(op.ID, "waiting")
	v := r.vm(vm.ID(op.VMID))
	if r.read(r.s.images.content(v.Pins.Base)) != r.read(r.cfg.DefaultBaseRootfs) || v.Pins.Seed != "" {
		t.Errorf("the build begins with %+v", v.Pins)
	}
	if _, err := r.s.Cancel(r.ctx(), op.ID); err != nil {
		t.Fatal(err)
	}
	r.wait(op, nil)
	r.onlyImages("base", "default")
	if err := os.WriteFile(r.cfg.DefaultBaseRootfs, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := r.s.BuildImage(r.ctx(), BuildRequest{Name: "dev"})
	wants(t, "build", err, fault.Invalid, "default_base_rootfs", "config.toml")
}

func TestBuildsThatAreRefused(t *testing.T) {
	t.Parallel()
	r := newBuilder(t)
	squash := make([]byte, 8192)
	copy(squash, "hsqs")
	r.done(r.s.RegisterImage(r.ctx(), RegisterRequest{Name: "squash", Rootfs: r.file("squash", string(squash))}))
	for name, c := range map[string]struct {
		request BuildRequest
		code    fault.Code
		text    string
	}{
		"no name":              {BuildRequest{}, fault.Invalid, "no name for an image"},
		"the default's name":   {BuildRequest{Name: "default"}, fault.Invalid, "runtime bundle"},
		"a registered name":    {BuildRequest{Name: "base", From: "base"}, fault.Exists, "registered"},
		"an unknown base":      {BuildRequest{Name: "dev", From: "nobody"}, fault.NotFound, "nobody"},
		"a base of squashfs":   {BuildRequest{Name: "dev", From: "squash"}, fault.Invalid, "squashfs"},
		"too small":            {BuildRequest{Name: "dev", From: "base", Size: 1 << 20}, fault.Invalid, "size"},
		"larger than it grows": {BuildRequest{Name: "dev", From: "base", Size: 1 << 40}, fault.Invalid, "can become"},
		"no name of a package": {BuildRequest{Name: "dev", From: "base", Packages: []string{"vim; reboot"}}, fault.Invalid, "no name of a package"},
		"a flag for a package": {BuildRequest{Name: "dev", From: "base", Packages: []string{"-oX=y"}}, fault.Invalid, "no name of a package"},
		"an empty step":        {BuildRequest{Name: "dev", From: "base", Steps: []BuildStep{{Name: "x"}}}, fault.Invalid, "either packages or a script"},
		"a script too long":    {BuildRequest{Name: "dev", From: "base", Steps: []BuildStep{{Name: "x", Script: strings.Repeat("x", maxScript+1)}}}, fault.Invalid, "no text"},
	} {
		_, _, err := r.s.BuildImage(r.ctx(), c.request)
		if !fault.Is(err, c.code) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %s with %q", name, err, c.code, c.text)
		}
	}
	if logs := r.list(r.paths.BuildLogs()); len(logs) != 0 {
		t.Errorf("logs of builds that never began: %v", logs)
	}
	r.nothing()
}
