// Command bench measures what a VM costs its host (`make bench`) and holds the figures against floors
// that it measures in the same run: a bare process, a bare transaction, a bare copy of the disks, a
// bare QEMU. Thresholds are ratios and counts, so they hold on a slow or a busy machine as well.
//
// With the fake driver it measures whole processes of `banger vm create` and `vm list` at 1, 100 and
// 1,000 VMs, the programs executed and the bytes written for each create; with QEMU, the stages of
// real creates. It writes dist/bench.json and the table in docs/benchmarks.md. A figure that is missing
// or over its threshold ends it with status 1. It works in a directory of its own and leaves nothing.
//
// BENCH_QUICK=1 takes fewer samples and leaves the documentation alone.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/test/fakebundle"
)

// plan is how much is measured.
type plan struct {
	Levels  []int // numbers of VMs
	Creates int   // samples of a create at each level
	Lists   int   // samples of a list at each level
	Starts  int   // samples of the programs' own start
	Warm    int   // real creates after the first
	Boots   int   // samples of each machine of bench-floor and bench-boot
	quick   bool
}

var (
	fullPlan  = plan{Levels: []int{1, 100, 1000}, Creates: 60, Lists: 60, Starts: 100, Warm: 3, Boots: 5}
	quickPlan = plan{Levels: []int{1, 100, 1000}, Creates: 20, Lists: 20, Starts: 25, Warm: 1, Boots: 3, quick: true}
)

type options struct {
	banger, bangerd, fake string // programs
	runtime               string // bundle of the real creates
	json, docs            string
	only                  string
	floor, boot, bare     bool
	stock                 string
}

func main() {
	var o options
	flag.StringVar(&o.banger, "banger", "banger", "the `program`")
	flag.StringVar(&o.bangerd, "bangerd", "bangerd", "the daemon")
	flag.StringVar(&o.fake, "bangerd-fake", "dist/bangerd-fake", "the daemon whose machines are fake")
	flag.StringVar(&o.runtime, "runtime", "runtime", "the runtime bundle's `directory`")
	flag.StringVar(&o.json, "json", "dist/bench.json", "where the figures go")
	flag.StringVar(&o.docs, "docs", "docs/benchmarks.md", "the page whose table is refreshed")
	flag.StringVar(&o.only, "only", "", "measure only `fake` or `real`: for looking, the rest is missing then")
	flag.BoolVar(&o.floor, "floor", false, "make bench-floor: hold a create on Firecracker against Firecracker alone, in the lab")
	flag.BoolVar(&o.boot, "boot", false, "make bench-boot: what command line, initrd and units cost a guest's boot on Firecracker, in the lab")
	flag.BoolVar(&o.bare, "bare", false, "measure that on this machine, which needs KVM, and print the figures as JSON")
	flag.StringVar(&o.stock, "stock", "dist/lab/stock", "the untrimmed guest's `directory`, for -bare")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		if hint := fault.HintOf(err); hint != "" {
			fmt.Fprintln(os.Stderr, "hint:", hint)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	p := fullPlan
	if os.Getenv("BENCH_QUICK") == "1" {
		p = quickPlan
	}
	if o.boot { // there are fourteen machines
		if p.Boots = 3; p.quick {
			p.Boots = 1
		}
	}
	if o.boot && !o.bare {
		return labBench(ctx, p, o, "make bench-boot", (*report).judgeBoot, (*report).tableOfBoot)
	}
	if o.floor {
		return labBench(ctx, p, o, "make bench-floor", (*report).judgeFloor, (*report).tableOfFloor)
	}
	needed := []*string{&o.banger, &o.bangerd, &o.runtime}
	if o.bare {
		needed = append(needed, &o.stock)
	} else {
		needed = append(needed, &o.fake)
	}
	for _, path := range needed {
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
		if _, err := os.Stat(*path); err != nil {
			return fault.Wrap(err, fault.NotFound, *path, "it is not there").WithHint("make build runtime")
		}
	}
	// Beside the state of everyday use, on the same filesystem: a /tmp in memory would measure nothing.
	base, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(base, 0o700); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(base, "banger-bench-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	r := newReport(p, dir)
	began := time.Now()
	say := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%5.0fs  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}
	if o.bare {
		if err := measureBare(ctx, r, o, dir, say); err != nil {
			return err
		}
		r.derive()
		return json.NewEncoder(os.Stdout).Encode(r)
	}
	bundle := filepath.Join(dir, "bundle")
	if err := fakebundle.Make(bundle); err != nil {
		return err
	}
	if o.only != "real" {
		say("starting programs")
		if err := measureStarts(ctx, r, o, dir); err != nil {
			return err
		}
		if err := measureFake(ctx, r, o, dir, bundle, say); err != nil {
			return err
		}
	}
	if o.only != "fake" {
		if err := measureReal(ctx, r, o, dir, say); err != nil {
			return err
		}
	}
	r.derive()
	failed := r.judge()
	if err := r.writeJSON(o.json); err != nil {
		return err
	}
	fmt.Print(r.table())
	if !p.quick && o.only == "" {
		if err := refresh(o.docs, "make bench", r.table()); err != nil {
			return err
		}
	}
	return verdict(r, failed)
}

// labBench is `make bench-floor` and `make bench-boot`.
func labBench(ctx context.Context, p plan, o options, command string, judge func(*report) []string, render func(*report) string) error {
	r, err := inLab(ctx, p, o.boot)
	if err != nil {
		return err
	}
	r.Command = strings.Replace(r.Command, "make bench", command, 1)
	failed := judge(r)
	if err := r.writeJSON(o.json); err != nil {
		return err
	}
	table := render(r)
	fmt.Print(table)
	if !p.quick {
		if err := refresh(o.docs, command, table); err != nil {
			return err
		}
	}
	return verdict(r, failed)
}

func verdict(r *report, failed []string) error {
	if len(failed) > 0 {
		return fault.New(fault.Internal, "", "%d of %d thresholds are not met:%s", len(failed), len(r.Thresholds), bullets(failed))
	}
	return nil
}

func bullets(lines []string) string {
	out := ""
	for _, l := range lines {
		out += "\n  " + l
	}
	return out
}
