package sandbox

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"git.thaloco.com/thaloco/banger/internal/oci"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// observed runs fn in an operation, with a function that gives the detail of the stage it is in.
func observed(t *testing.T, fn func(h *operation.Handle, detail func() string)) {
	t.Helper()
	ops := operation.NewRunner(func(context.Context, operation.Operation) error { return nil }, func(operation.Operation) {}, func(_ operation.Operation, err error) { t.Error(err) })
	op := operation.Operation{ID: operation.NewID(), Kind: operation.ImageImport}
	over := make(chan struct{})
	ops.Go(op, errors.ErrUnsupported, func(_ context.Context, h *operation.Handle) error {
		defer close(over)
		fn(h, func() string {
			op, err := ops.Get(op.ID)
			if err != nil || len(op.Stages) == 0 {
				t.Errorf("%+v, %v", op, err)
				return ""
			}
			return op.Stages[len(op.Stages)-1].Detail
		})
		return nil
	})
	<-over
}

// TestProgressOfFiles: how far work on bytes is, and how fast, is told a few times a second, of each phase for itself.
func TestProgressOfFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		observed(t, func(h *operation.Handle, detail func() string) {
			h.Stage("kernel")
			tell := told(h, "vmlinux")
			for _, c := range []struct {
				after time.Duration
				phase string
				done  int64
				total int64
				want  string // of what is shown then
			}{
				{0, "copied", 8 * vm.MiB, vm.GiB, ""}, // no rate is known yet
				{100 * time.Millisecond, "copied", 64 * vm.MiB, vm.GiB, ""},
				{400 * time.Millisecond, "copied", 128 * vm.MiB, vm.GiB, "vmlinux: 128M of 1G copied, 256M/s"},
				{100 * time.Millisecond, "copied", 200 * vm.MiB, vm.GiB, "vmlinux: 128M of 1G copied, 256M/s"}, // too soon
				{1400 * time.Millisecond, "copied", vm.GiB, vm.GiB, "vmlinux: 1G of 1G copied, 512M/s"},
				{time.Second, "hashed", 0, vm.GiB, "vmlinux: 1G of 1G copied, 512M/s"},
				{time.Second, "hashed", 300*vm.MiB + 512*vm.KiB, vm.GiB, "vmlinux: 300.5M of 1G hashed, 300.5M/s"},
				{time.Second, "hashed", 301 * vm.MiB, 0, "vmlinux: 300.5M of 1G hashed, 300.5M/s"}, // of how much is not known
			} {
				time.Sleep(c.after)
				tell(c.phase, c.done, c.total)
				if got := detail(); got != c.want {
					t.Errorf("%d bytes %s: %q, want %q", c.done, c.phase, got, c.want)
				}
			}
			h.Stage("unpack")
			tell = told(h, "") // of one file, or of all together
			tell("unpacked", 0, 10*vm.MiB)
			time.Sleep(2 * time.Second)
			tell("unpacked", 5*vm.MiB, 10*vm.MiB)
			if got, want := detail(), "5M of 10M unpacked, 2.5M/s"; got != want {
				t.Errorf("%q, want %q", got, want)
			}
		})
	})
}

// TestProgressOfAPull: stages follow what the puller does, and each says how far it is once that is known.
func TestProgressOfAPull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		observed(t, func(h *operation.Handle, detail func() string) {
			tell := tellPull(h)
			for _, c := range []struct {
				after time.Duration
				p     oci.Progress
				want  string
			}{
				{0, oci.Progress{Stage: oci.StageResolve}, ""},
				{time.Second, oci.Progress{Stage: oci.StageResolve}, ""},
				{0, oci.Progress{Stage: oci.StageFetch, Total: 100 * vm.MiB, Layers: 4}, ""},
				{2 * time.Second, oci.Progress{Stage: oci.StageFetch, Done: 30 * vm.MiB, Total: 100 * vm.MiB, Cached: 20 * vm.MiB, Layers: 4, LayersDone: 1},
					"1 of 4 layers, 30M of 100M, 5M/s, 20M were here already"},
				{2 * time.Second, oci.Progress{Stage: oci.StageFetch, Done: 60 * vm.MiB, Total: 100 * vm.MiB, Layers: 4, LayersDone: 2}, "2 of 4 layers, 60M of 100M, 15M/s"},
				{0, oci.Progress{Stage: oci.StageFlatten, Total: vm.GiB}, ""},
				{4 * time.Second, oci.Progress{Stage: oci.StageFlatten, Done: 512 * vm.MiB, Total: vm.GiB}, "512M of 1G, 128M/s"},
			} {
				time.Sleep(c.after)
				tell(c.p)
				if got := detail(); got != c.want {
					t.Errorf("%+v: %q, want %q", c.p, got, c.want)
				}
			}
		})
	})
	all := oci.Progress{Stage: oci.StageFetch, Done: 8 * vm.MiB, Total: 8 * vm.MiB, Cached: 8 * vm.MiB, Layers: 3, LayersDone: 2}
	if got, want := pullDetail(all, time.Second), "2 of 3 layers checked, 8M were here already"; got != want {
		t.Errorf("nothing had to be fetched: %q, want %q", got, want)
	}
	if got := pullDetail(all, 0); got != "" {
		t.Errorf("at once: %q", got)
	}
}

// TestStagesOfAPull: a pull of a whole image goes through all of them.
func TestStagesOfAPull(t *testing.T) {
	t.Parallel()
	r := newRig(t).start()
	op := r.done(r.s.PullImage(r.ctx(), "docker-archive:"+r.saved("saved.tar", noise(1<<20)), "mine"))
	var stages []string
	for _, s := range op.Stages {
		if s.Name != oci.StageResolve { // is over before it is told, as a rule
			stages = append(stages, s.Name)
		}
	}
	if want := []string{oci.StageFetch, oci.StageFlatten, "root filesystem", "publish"}; !slices.Equal(stages, want) {
		t.Errorf("stages %q, want %q", stages, want)
	}
}
