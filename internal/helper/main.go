package helper

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/cgroup"
	"git.thaloco.com/thaloco/banger/internal/dns"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/record"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/jail"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/version"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// idle is how long a helper that systemd can start again stays without a caller.
const idle = 30 * time.Second

// Main is the main function of banger-helper. It returns the exit code.
func Main(args []string) int {
	err := run(args, os.Stdout, os.Stderr)
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage): // said already
		return 2
	}
	fmt.Fprintln(os.Stderr, "banger-helper:", err)
	if hint := fault.HintOf(err); hint != "" {
		fmt.Fprintln(os.Stderr, "hint:", hint)
	}
	return 1
}

var errUsage = errors.New("usage")

func run(args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("banger-helper", flag.ContinueOnError)
	flags.SetOutput(stderr)
	uid := flags.Int("uid", 0, "number of the user to serve; never root")
	var ranges []netip.Prefix
	flags.Func("range", "IPv4 range in which the user may have networks (may be repeated)", func(s string) error {
		p, err := netip.ParsePrefix(s)
		if err == nil && (!p.Addr().Is4() || p != p.Masked()) {
			err = errors.New("an IPv4 range begins with its first address")
		}
		ranges = append(ranges, p)
		return err
	})
	jails := flags.Bool("jails", false, "make the user's jails, and no networks")
	list := flags.Bool("list-jails", false, "print how many VMs run in jails, of all users, and exit")
	remove := flags.Bool("remove", false, "take away every user's network, end all VMs in jails, and exit")
	showVersion := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage
	}
	switch {
	case *showVersion:
		_, err := fmt.Fprintf(stdout, "banger-helper %s, revision %d\n", version.String(), wire.Revision)
		return err
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "banger-helper: %q is no flag\nhint: banger-helper --help\n", flags.Arg(0))
		return errUsage
	case os.Geteuid() != 0:
		return fault.New(fault.Permission, "", "it runs as root alone").WithHint("%s", wire.InstallCommand())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	records := filepath.Join(wire.RunDir, "records")
	switch {
	case *remove:
		return errors.Join(jail.EndAll(ctx, wire.Jails), removeAll(ctx, record.Dir(records)))
	case *list:
		n, err := jail.CountAll(ctx, wire.Jails)
		if err == nil {
			_, err = fmt.Fprintln(stdout, n)
		}
		return err
	case *uid <= 0 || len(ranges) == 0 && !*jails:
		fmt.Fprintln(stderr, "banger-helper: -uid is needed, and -range or -jails\nhint: banger-helper --help")
		return errUsage
	}
	unix.Umask(0o077)
	log := slog.New(slog.NewTextHandler(stderr, nil))
	path := wire.Socket(*uid)
	if *jails {
		path = wire.JailSocket(*uid)
	}
	l, started, err := listener(path, *uid)
	if err != nil {
		return err
	}
	defer l.Close()
	if *jails {
		h := jail.NewHost(jail.Options{User: *uid, Dir: wire.Jails, Programs: jailPrograms, GiveTAP: hostnet.GiveTAP})
		if err := h.Sweep(ctx); err != nil {
			return err
		}
		o := Options{UID: *uid, Records: records, Jails: h, Bound: bound(*uid), Log: log}
		if started {
			o.Idle = idle
		}
		return NewServer(o).Serve(ctx, l)
	}
	o := Options{UID: *uid, Ranges: ranges, Records: records, Log: log,
		Open: func(s hostnet.Settings) (Host, error) { return hostnet.Open(s) }, ListenDNS: dns.ListenForGuests,
		KeepNames: func(ctx context.Context, link int, addr netip.AddrPort) error { return dns.Keep(ctx, link, addr, log) }}
	if started {
		o.Idle = idle
	}
	return NewServer(o).Serve(ctx, l)
}

// jailPrograms are those that were installed beside this program, which are root's.
func jailPrograms() (p jail.Programs, err error) {
	exe, err := os.Executable()
	if err != nil {
		return p, err
	}
	dir := filepath.Dir(exe)
	p = jail.Programs{Firecracker: filepath.Join(dir, "firecracker"), Jailer: filepath.Join(dir, "jailer")}
	for _, program := range []string{p.Firecracker, p.Jailer} {
		var st unix.Stat_t
		if err := unix.Stat(program, &st); err != nil {
			return p, fault.Wrap(err, fault.Unsupported, "jailer", "the root helper has no %s", filepath.Base(program)).WithHint("make runtime, then %s", wire.InstallCommand())
		}
		if st.Uid != 0 || st.Mode&0o022 != 0 {
			return p, fault.New(fault.Permission, program, "others than root can change it").WithHint("%s", wire.InstallCommand())
		}
	}
	return p, nil
}

// bound puts VMs of a user into control groups. One that gets none runs on where the helper is; its daemon says why.
func bound(uid int) func(ctx context.Context, r jail.Request, pid int) {
	return func(ctx context.Context, r jail.Request, pid int) {
		groups := cgroup.New(r.Installation)
		groups.For(uid)
		_ = groups.Sweep(ctx) // of those that ended, where no systemd does it; what is left is tried again
		groups.Put(ctx, vm.ID(r.VM).Short(), "banger VM "+vm.ID(r.VM).Short()+" of user "+strconv.Itoa(uid), cgroup.ForVM(r.VCPU, r.MemoryMiB, 0), pid)
	}
}

// listener returns the socket that systemd has opened (sd_listen_fds(3)), or else opens one that the user alone
// may use.
func listener(path string, uid int) (l *net.UnixListener, started bool, err error) {
	if os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
		if n := os.Getenv("LISTEN_FDS"); n != "1" {
			return nil, false, fmt.Errorf("systemd passed %q sockets, want one", n)
		}
		f := os.NewFile(3, "systemd's socket")
		defer f.Close()
		passed, err := net.FileListener(f)
		if err != nil {
			return nil, false, fmt.Errorf("what systemd passed is no socket: %w", err)
		}
		l, ok := passed.(*net.UnixListener)
		if !ok {
			return nil, false, fmt.Errorf("systemd passed a socket of another kind: %s", passed.Addr().Network())
		}
		return l, true, nil
	}
	if err := os.MkdirAll(wire.RunDir, 0o755); err != nil {
		return nil, false, err
	}
	// The umask is for files; who may look into the directory is said here.
	if err := os.Chmod(wire.RunDir, 0o755); err != nil {
		return nil, false, err
	}
	if conn, err := net.Dial("unix", path); err == nil {
		_ = conn.Close()
		return nil, false, fault.New(fault.Exists, path, "another helper serves user %d already", uid)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, false, err
	}
	l, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, false, err
	}
	if err := os.Chown(path, uid, -1); err != nil {
		_ = l.Close()
		return nil, false, err
	}
	return l, false, nil
}

// removeAll takes away what is on record, of all users.
func removeAll(ctx context.Context, records record.Dir) error {
	release, err := records.Lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	all, err := records.All()
	if err != nil {
		return err
	}
	var failures []error
	for _, r := range all {
		h, err := hostnet.Open(hostnet.Settings{Plan: network.Plan{Installation: r.Installation}, Bridge: r.Bridge, Owner: r.UID})
		if err != nil {
			return err
		}
		err = h.Remove(ctx)
		h.Close()
		if err == nil {
			err = records.Drop(r.Installation)
		}
		if err != nil {
			failures = append(failures, err)
		}
	}
	return errors.Join(failures...)
}
