// Command mkruntime builds the runtime bundle (`make runtime`): kernel, initrd, modules image, the
// default root filesystem with its work seed, the guest program, Firecracker with its jailer, and
// bundle.json. It builds the emulated host of test/lab as well (`make lab`), which is made of Debian
// packages in the same way.
//
// Firecracker comes as a program (firecracker.go says from where); all else comes from Debian packages
// by mmdebstrap, as root or as an ordinary user, without a mount of its own or a loop device. What is
// slow is kept under $XDG_CACHE_HOME/banger/build by content key, never by date. It owns how artifacts
// are made; internal/bundle owns what a bundle is.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

const usage = `Usage: mkruntime [flags] <command>

Commands:
  all      build or repair the runtime bundle
  rootfs   the same, with the default image built afresh from today's packages if it is missing or of another list
  agent    build the guest program into an existing bundle
  pack     write the bundle to dist/banger-runtime.tar.gz and print its SHA256
  fetch    unpack the archive that -manifest names into the bundle's directory
  install  copy the bundle to -to, with a key of its own
  uninstall
           remove what install put into -to; the key stays
  adopt    take the image -to, and the work seed beside it, into the bundle as its default image
  image    make -to, FILE.ext4, and FILE.work-seed.ext4 of a distribution's tree, a tar on standard input
  lab      build the emulated host that tests run on, and make -to a link to it
  stock    build the untrimmed guest that bench-floor compares with, and make -to a link to it

Flags:
`

type options struct {
	runtime  string
	packages string
	agent    string
	manifest string
	to       string
	version  string
	size     string
	withKey  bool
	shared   bool
	tools    bool

	firecracker, jailer string // programs that the user names, "" for none
	origin              origin
	patience            patience
}

func main() {
	// The files made here are read by other users' programs (mmdebstrap's mapped user, the VMM).
	syscall.Umask(0o022)

	o := options{origin: published, patience: usualPatience}
	flag.StringVar(&o.runtime, "runtime", "runtime", "the bundle's `directory`")
	flag.StringVar(&o.packages, "packages", "packages.apt", "the `file` that lists the packages of the default image")
	flag.StringVar(&o.agent, "agent", "", "take this guest program instead of building ./cmd/banger-vsock-agent")
	flag.StringVar(&o.manifest, "manifest", "runtime-bundle.toml", "the `file` that says where fetch gets its archive, and where all gets Firecracker and the image's tools")
	flag.StringVar(&o.firecracker, "firecracker", "", "take this Firecracker, and the jailer beside it, into the bundle")
	flag.StringVar(&o.jailer, "jailer", "", "with -firecracker: take this jailer")
	flag.StringVar(&o.to, "to", "", "where pack, install, image, lab and stock put their result, and uninstall finds it")
	flag.BoolVar(&o.withKey, "with-key", false, "with pack: put the bundle's private SSH key into the archive as well")
	flag.BoolVar(&o.shared, "shared", false, "with install: for all users of the system, without a key")
	flag.StringVar(&o.size, "size", "", "with image: how large the filesystem is, 2G; by default as its content needs")
	flag.BoolVar(&o.tools, "tools", false, "with image: put mise and opencode into it, from where the manifest says")
	flag.StringVar(&o.version, "version", "devel", "the version to write into bundle.json")
	flag.Usage = func() {
		fmt.Fprint(os.Stderr, usage)
		flag.PrintDefaults()
	}
	flag.Parse()
	commands := map[string]func(context.Context, *progress, options) error{
		"all":       func(ctx context.Context, p *progress, o options) error { return makeRuntime(ctx, p, o, false) },
		"rootfs":    makeRootfs,
		"agent":     refreshAgent,
		"pack":      pack,
		"fetch":     fetch,
		"install":   install,
		"uninstall": uninstall,
		"adopt":     adopt,
		"image":     func(ctx context.Context, p *progress, o options) error { return makeTree(ctx, p, o, os.Stdin) },
		"lab":       makeLab,
		"stock":     makeStock,
	}
	run := commands[flag.Arg(0)]
	if run == nil || flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	for _, dir := range []*string{&o.runtime, &o.to} {
		if *dir == "" {
			continue
		}
		if abs, err := filepath.Abs(*dir); err == nil {
			*dir = abs
		}
	}
	p := newProgress(os.Stderr)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, p, o)
	interrupted := ctx.Err() != nil
	stop()
	p.end()
	if err != nil {
		if interrupted && errors.Is(err, context.Canceled) {
			fmt.Fprintln(os.Stderr, "interrupted; temporary files are removed, nothing was changed")
			os.Exit(130)
		}
		fmt.Fprintf(os.Stderr, "error: %v\n", err)
		if hint := fault.HintOf(err); hint != "" {
			fmt.Fprintf(os.Stderr, "       %s\n", hint)
		}
		os.Exit(1)
	}
}
