package cli

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/version"
)

// The values of --cache, and of a run's kind.
const (
	cacheBoth = "both"
	cacheCold = "cold" // images, kernels and templates are on the disk
	cacheWarm = "warm" // they are in the host's page cache
)

type benchView struct {
	Version string          `json:"version"`
	Daemon  string          `json:"daemon_version"`
	VMM     string          `json:"vmm"`
	Accel   string          `json:"accel"`
	Image   string          `json:"image"`
	CPUs    int             `json:"host_cpus"`
	Cold    *benchGroupView `json:"cold,omitempty"`
	Warm    *benchGroupView `json:"warm,omitempty"`
}

// benchGroupView is the runs of one kind: cold and warm ones are never mixed.
type benchGroupView struct {
	CreateMS   spread         `json:"create_ms"`    // wall time of banger vm create
	SSHReadyMS spread         `json:"ssh_ready_ms"` // from its begin until banger vm ssh NAME -- true succeeded
	Runs       []benchRunView `json:"runs"`
}

type benchRunView struct {
	CreateMS   float64          `json:"create_ms"`
	SSHReadyMS float64          `json:"ssh_ready_ms"`
	Stages     []benchStageView `json:"stages"` // of the create, by the daemon's clock
	Boot       []bootView       `json:"boot"`   // by the guest's clock, since its kernel started
}

type benchStageView struct {
	Name string  `json:"name"`
	MS   float64 `json:"ms"`
}

// spread is how values lie. Percentiles are of the nearest rank: values that were measured.
type spread struct {
	Min  float64 `json:"min"`
	P50  float64 `json:"p50"`
	P90  float64 `json:"p90"`
	P95  float64 `json:"p95"`
	P99  float64 `json:"p99"`
	Max  float64 `json:"max"`
	Mean float64 `json:"mean"`
}

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	sorted := slices.Sorted(slices.Values(values))
	rank := func(p float64) float64 { return sorted[max(0, int(math.Ceil(p*float64(len(sorted))))-1)] }
	sum := 0.0
	for _, v := range sorted {
		sum += v
	}
	return spread{sorted[0], rank(0.5), rank(0.9), rank(0.95), rank(0.99), sorted[len(sorted)-1], sum / float64(len(sorted))}
}

func (a *app) benchCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use: "bench", Short: "Measure this host",
		Example: `  banger bench create --runs 3`,
	})
	runs, cache := &count{value: 3, what: "runs"}, newChoice(cacheBoth, cacheBoth, cacheCold, cacheWarm)
	var image string
	create := &cobra.Command{
		Use: "create", Short: "Measure how long a VM takes to be made and entered, as JSON",
		Long: `Measure how long banger vm create takes, and how long it is until banger vm ssh NAME -- true succeeds, both as whole
programs, and print it as JSON: for each run, and as percentiles. VMs are made one after another and deleted again.

Before a cold run what VMs are made of is dropped from the host's page cache, as far as nothing that runs holds it. Warm
runs have it there: of the run before, or of one that is not counted.`,
		Example: `  banger bench create
  banger bench create --runs 10 --image docker-dev --cache warm
  banger bench create --runs 5 | jq .warm.ssh_ready_ms.p50`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !a.json { // there is no table of it
				a.output, a.json = outputJSON, true
			}
			return a.bench(cmd.Context(), int(runs.value), cache.value, image)
		},
	}
	f := create.Flags()
	f.SortFlags = false
	f.Var(runs, "runs", "how many VMs, of each kind")
	f.Var((*text)(&image), "image", "image to make them from"+createDefaults().image)
	f.Var(cache, "cache", "which kinds of runs")
	cmd.AddCommand(create)
	return cmd
}

func (a *app) bench(ctx context.Context, runs int, cache, image string) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	s, err := c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
	if err != nil {
		return err
	}
	if image == "" {
		d, err := c.VMs.GetDefaults(ctx, &bangerv1.GetDefaultsRequest{})
		if err != nil {
			return err
		}
		image = d.GetImage()
	}
	view := benchView{Version: version.String(), Daemon: s.GetVersion(), VMM: strings.TrimSpace(s.GetVmm() + " " + s.GetVmmVersion()), Accel: s.GetAccel(),
		Image: image, CPUs: runtime.NumCPU()}
	one := func(kind string, n int) (benchRunView, error) {
		fmt.Fprintf(a.stderr, "%s run %d of %d\n", kind, n, runs)
		return a.benchRun(ctx, c, image)
	}
	several := func(kind string, before func() error) (*benchGroupView, error) {
		g := &benchGroupView{}
		var create, ready []float64
		for n := range runs {
			if err := before(); err != nil {
				return nil, err
			}
			r, err := one(kind, n+1)
			if err != nil {
				return nil, err
			}
			g.Runs = append(g.Runs, r)
			create, ready = append(create, r.CreateMS), append(ready, r.SSHReadyMS)
		}
		g.CreateMS, g.SSHReadyMS = spreadOf(create), spreadOf(ready)
		return g, nil
	}
	if cache != cacheWarm {
		p, err := a.place()
		if err != nil {
			return err
		}
		dirs := []string{filepath.Join(p.stateDir, "images"), filepath.Join(p.stateDir, "kernels"), p.paths.Cache, s.GetRuntimeDir()}
		if view.Cold, err = several(cacheCold, func() error { return dropCached(dirs) }); err != nil {
			return err
		}
	}
	if cache != cacheCold {
		if cache == cacheWarm {
			fmt.Fprintln(a.stderr, "a run that is not counted")
			if _, err := a.benchRun(ctx, c, image); err != nil {
				return err
			}
		}
		if view.Warm, err = several(cacheWarm, func() error { return nil }); err != nil {
			return err
		}
	}
	return a.printJSON(view)
}

// dropCached has the kernel forget what it holds of files in these directories (POSIX_FADV_DONTNEED, posix_fadvise(2)). It
// keeps what was not written to the disk yet, so that is written first, and what a program has mapped.
func dropCached(dirs []string) error {
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
				return nil
			}
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			f, err := os.Open(path)
			if err != nil {
				return nil // gone, or not this user's to read: then it is none of a VM's either
			}
			defer f.Close()
			if err := unix.Fdatasync(int(f.Fd())); err != nil {
				return err
			}
			return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		})
		if err != nil {
			return fault.Wrap(err, fault.Internal, dir, "cannot be dropped from the page cache: %v", err)
		}
	}
	return nil
}

// benchRun makes a VM, enters it and deletes it, whatever happens in between.
func (a *app) benchRun(ctx context.Context, c *client.Client, image string) (r benchRunView, err error) {
	random := make([]byte, 4)
	if _, err := rand.Read(random); err != nil {
		return r, err
	}
	name := "bench-" + hex.EncodeToString(random)
	defer func() {
		if removal := a.removeNamed(ctx, c, name); removal != nil && err == nil {
			err = removal
		}
	}()
	began := time.Now()
	if err := runSelf(ctx, "vm", "create", "--quiet", "--name", name, "--image", image); err != nil {
		return r, err
	}
	created := time.Now()
	if err := runSelf(ctx, "vm", "ssh", name, "--", "true"); err != nil {
		return r, err
	}
	r.CreateMS, r.SSHReadyMS = inMS(created.Sub(began)), inMS(time.Since(began))
	ops, err := c.Operations.ListOperations(ctx, &bangerv1.ListOperationsRequest{})
	if err != nil {
		return r, err
	}
	r.Stages, r.Boot = []benchStageView{}, []bootView{}
	for _, op := range ops.GetOperations() {
		if op.GetVmName() != name || op.GetKind() != "create" {
			continue
		}
		for _, st := range op.GetStages() {
			r.Stages = append(r.Stages, benchStageView{st.GetName(), inMS(st.GetFinishedAt().AsTime().Sub(st.GetStartedAt().AsTime()))})
		}
	}
	v, err := c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Id: name})
	for _, st := range v.GetVm().GetBoot() {
		r.Boot = append(r.Boot, bootView{st.GetName(), st.GetAtMs()})
	}
	return r, err
}

// removeNamed deletes a VM that may have been made.
func (a *app) removeNamed(ctx context.Context, c *client.Client, name string) error {
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), admitTime)
	defer cancel()
	resp, err := c.VMs.GetVM(bounded, &bangerv1.GetVMRequest{Id: name})
	switch {
	case fault.Is(err, fault.NotFound):
		return nil
	case err != nil:
		return err
	}
	return a.removeAfter(ctx, c, resp.GetVm())
}

func inMS(d time.Duration) float64 { return math.Round(float64(d.Microseconds())/10) / 100 }

// runSelf runs this program as a user would, and makes its error ours.
func runSelf(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	var errs bytes.Buffer
	cmd.Stderr = &errs
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return errInterrupted
	case err != nil:
		return fault.Wrap(err, fault.Internal, "banger "+strings.Join(args, " "), "failed: %s", strings.TrimSpace(errs.String()))
	}
	return nil
}
