// Package install owns where the root helper lies on a host: its program, its systemd units, and who may use
// it.
//
// It never runs a shell, takes no program but the one that it is given, and does not touch networks: what users
// have of those, the helper itself takes away.
package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/record"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
)

// Where things are.
const (
	dir     = "/usr/local/libexec/banger" // root's, so that no user can change what is in it
	Program = dir + "/banger-helper"
	units   = "/etc/systemd/system"
	service = "banger-helper@.service"
	socket  = "banger-helper@.socket"
	wants   = units + "/sockets.target.wants" // where systemd notes which sockets are enabled
	// Of jails, where there is a Firecracker: its programs, beside the helper, and a socket and a service of their own.
	Firecracker             = dir + "/firecracker"
	Jailer                  = dir + "/jailer"
	jailService, jailSocket = "banger-jailer@.service", "banger-jailer@.socket"
)

// DefaultRanges are those in which users may have networks, unless root says otherwise. Few hosts reach anything there.
func DefaultRanges() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("172.16.0.0/16")}
}

// Host is where the helper is installed.
type Host struct {
	// Root begins each path; "" for the host itself.
	Root string
	// Systemctl runs systemctl(1) with args; nil where systemd does not run.
	Systemctl func(ctx context.Context, args ...string) error
	// Run runs the installed program and returns what it prints.
	Run func(ctx context.Context, program string, args ...string) (string, error)
}

// commandTime bounds one run of a program.
const commandTime = 60 * time.Second

// System is this host.
func System() Host {
	h := Host{Run: command}
	if _, err := os.Stat("/run/systemd/system"); err == nil { // sd_booted(3)
		h.Systemctl = func(ctx context.Context, args ...string) error {
			_, err := command(ctx, "systemctl", args...)
			return err
		}
	}
	return h
}

func command(ctx context.Context, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		words := strings.Join(append([]string{program}, args...), " ")
		return "", fault.Wrap(err, fault.Unavailable, words, "it failed: %s", strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

func (h Host) path(p string) string { return filepath.Join(h.Root, p) }

// asRoot refuses others.
func asRoot(uid int, verb string) error {
	if uid == 0 {
		return nil
	}
	return fault.New(fault.Permission, "root helper", "only root can %s it", verb).
		WithHint("%s%s", strings.TrimSuffix(wire.InstallCommand(), "install"), verb)
}

func failed(err error, path string) error {
	code := fault.Internal
	if errors.Is(err, fs.ErrPermission) {
		code = fault.Permission
	}
	return fault.Wrap(err, code, path, "it cannot be written or removed")
}

// Request says what to install.
type Request struct {
	UID    int            // of whoever asks
	Source string         // the program to copy
	Users  []int          // who may use it, besides those who may already
	Ranges []netip.Prefix // none: as before, or the default
	// Firecracker and Jailer are the programs to copy for jails; "" to leave those that are there, or to have none.
	Firecracker, Jailer string
}

// Install puts the helper of this version in place for users, over another one if need be. Networks and VMs that
// are there stay. What it returns is left to do by hand, a line for each command; nothing under systemd.
func (h Host) Install(ctx context.Context, r Request) (byHand []string, err error) {
	if err := asRoot(r.UID, "install"); err != nil {
		return nil, err
	}
	for _, uid := range r.Users {
		if uid <= 0 {
			return nil, fault.New(fault.Invalid, "root helper", "root's daemons need no helper").WithHint("name who shall use it: --user NAME")
		}
	}
	before, err := h.Users()
	if err != nil {
		return nil, err
	}
	if len(before)+len(r.Users) == 0 {
		return nil, fault.New(fault.Invalid, "root helper", "nobody was named who may use it").WithHint("banger system install --user NAME")
	}
	if len(r.Ranges) == 0 {
		if unit, err := os.ReadFile(h.path(filepath.Join(units, service))); err == nil {
			r.Ranges = rangesOf(string(unit))
		}
		if len(r.Ranges) == 0 {
			r.Ranges = DefaultRanges()
		}
	}
	jails, err := h.installJailer(ctx, r)
	if err != nil {
		return nil, err
	}
	if err := h.copyProgram(r.Source, Program); err != nil {
		return nil, err
	}
	// A program that cannot run is not told to systemd.
	if _, err := h.Run(ctx, h.path(Program), "-version"); err != nil {
		return nil, err
	}
	if h.Systemctl == nil {
		for _, uid := range r.Users {
			line := fmt.Sprintf("%s -uid %d", Program, uid)
			for _, p := range r.Ranges {
				line += fmt.Sprintf(" -range %s", p)
			}
			byHand = append(byHand, line)
			if jails {
				byHand = append(byHand, fmt.Sprintf("%s -jails -uid %d", Program, uid))
			}
		}
		return byHand, nil
	}
	texts, kinds := map[string]string{socket: helperSocketUnit, service: serviceUnit(r.Ranges)}, []string{service}
	sockets := []string{socket}
	if jails {
		texts[jailSocket], texts[jailService] = jailSocketUnit, jailServiceUnit
		kinds, sockets = append(kinds, jailService), append(sockets, jailSocket)
	}
	for name, text := range texts {
		if err := h.write(filepath.Join(units, name), 0o644, strings.NewReader(text)); err != nil {
			return nil, err
		}
	}
	if err := h.Systemctl(ctx, "daemon-reload"); err != nil {
		return nil, err
	}
	// A former helper ends what it does, and the next call starts this one.
	for _, kind := range kinds {
		if err := h.Systemctl(ctx, "stop", strings.Replace(kind, "@", "@*", 1)); err != nil {
			return nil, err
		}
	}
	for _, uid := range union(before, r.Users) {
		for _, kind := range sockets {
			for _, verb := range []string{"enable", "restart"} { // one that is enabled may have failed
				if err := h.Systemctl(ctx, verb, instance(kind, uid)); err != nil {
					return nil, err
				}
			}
		}
	}
	return nil, nil
}

// installJailer puts the programs of jails in place, and says whether there are any now.
func (h Host) installJailer(ctx context.Context, r Request) (bool, error) {
	if r.Firecracker == "" || r.Jailer == "" {
		for _, program := range []string{Firecracker, Jailer} {
			if _, err := os.Stat(h.path(program)); err != nil {
				return false, nil //nolint:nilerr // without them there are no jails, which is no error
			}
		}
		return true, nil
	}
	var said []string
	for _, p := range []struct{ from, to string }{{r.Firecracker, Firecracker}, {r.Jailer, Jailer}} {
		if err := h.copyProgram(p.from, p.to); err != nil {
			return false, err
		}
		out, err := h.Run(ctx, h.path(p.to), "--version")
		if err != nil {
			return false, err
		}
		said = append(said, versionOf(out))
	}
	if said[0] != said[1] {
		return false, fault.New(fault.Invalid, r.Jailer, "it is of version %s, and the Firecracker beside it of %s", said[1], said[0]).WithHint("make runtime brings two that fit")
	}
	return true, nil
}

// versionOf is the second word of what Firecracker and its jailer say of themselves.
func versionOf(output string) string {
	words := strings.Fields(output)
	if len(words) < 2 {
		return ""
	}
	return words[1]
}

func union(a, b []int) []int {
	out := slices.Concat(a, b)
	slices.Sort(out)
	return slices.Compact(out)
}

func instance(unit string, uid int) string {
	return strings.Replace(unit, "@", "@"+strconv.Itoa(uid), 1)
}

func (h Host) copyProgram(source, to string) error {
	f, err := os.Open(source)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.Wrap(err, fault.NotFound, source, "the program is not there").WithHint("make build, or make install")
	}
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, source, "the program cannot be read")
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return fault.Wrap(err, fault.Invalid, source, "the program is no file")
	}
	return h.write(to, 0o755, f)
}

// write puts a file in place whole. Directories that are missing are made.
func (h Host) write(path string, mode os.FileMode, from io.Reader) error {
	path = h.path(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return failed(err, path)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".banger-new-*")
	if err != nil {
		return failed(err, path)
	}
	defer os.Remove(f.Name())
	_, err = io.Copy(f, from)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return failed(err, path)
	}
	return nil
}

// Users are those who may use the helper by systemd, in order.
func (h Host) Users() ([]int, error) {
	entries, err := os.ReadDir(h.path(wants))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, wants, "it cannot be read")
	}
	before, after, _ := strings.Cut(socket, "@")
	var out []int
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), before+"@")
		if !ok {
			continue
		}
		if uid, err := strconv.Atoi(strings.TrimSuffix(name, after)); err == nil {
			out = append(out, uid)
		}
	}
	slices.Sort(out)
	return out, nil
}

// Uninstall takes the helper away, and leaves nothing. fault.Precondition if somebody's network is there, unless force is
// set: then it goes, too, and VMs that run lose theirs.
func (h Host) Uninstall(ctx context.Context, uid int, force bool) error {
	if err := asRoot(uid, "uninstall"); err != nil {
		return err
	}
	networks, err := record.Dir(h.path(filepath.Join(wire.RunDir, "records"))).All()
	if err != nil {
		return err
	}
	if len(networks) > 0 && !force {
		n := networks[0]
		return fault.New(fault.Precondition, n.Bridge, "user %d has this network, and %d in all are there", n.UID, len(networks)).
			WithHint("have VMs stopped and `banger daemon stop` run by their users; or take away the networks of VMs that run: banger system uninstall --force")
	}
	jails := 0
	if _, err := os.Stat(h.path(wire.Jails)); err == nil {
		out, err := h.Run(ctx, h.path(Program), "-list-jails")
		if err != nil {
			return err
		}
		if jails, err = strconv.Atoi(strings.TrimSpace(out)); err != nil {
			return fault.Wrap(err, fault.Internal, Program, "it cannot be told how many VMs run in jails")
		}
	}
	if jails > 0 && !force {
		return fault.New(fault.Precondition, "root helper", "%d VMs run in jails, and nobody else could end them", jails).
			WithHint("have them stopped by their users; or end them: banger system uninstall --force")
	}
	if h.Systemctl == nil {
		if err := h.startedByHand(); err != nil {
			return err
		}
	}
	users, err := h.Users()
	if err != nil {
		return err
	}
	if h.Systemctl != nil {
		sockets, services := []string{socket}, []string{service}
		if _, err := os.Stat(h.path(filepath.Join(units, jailSocket))); err == nil {
			sockets, services = append(sockets, jailSocket), append(services, jailService)
		}
		for _, uid := range users {
			for _, kind := range sockets {
				if err := h.Systemctl(ctx, "disable", "--now", instance(kind, uid)); err != nil {
					return err
				}
			}
		}
		for _, kind := range services {
			if err := h.Systemctl(ctx, "stop", strings.Replace(kind, "@", "@*", 1)); err != nil {
				return err
			}
		}
	}
	if len(networks)+jails > 0 {
		if _, err := h.Run(ctx, h.path(Program), "-remove"); err != nil {
			return err
		}
	}
	for _, path := range []string{filepath.Join(units, service), filepath.Join(units, socket), filepath.Join(units, jailService), filepath.Join(units, jailSocket), Firecracker, Jailer, Program} {
		if err := os.Remove(h.path(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return failed(err, path)
		}
	}
	if err := h.removeRun(); err != nil {
		return err
	}
	// Its directory goes if there is nothing else in it.
	if err := os.Remove(filepath.Dir(h.path(Program))); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
		return failed(err, filepath.Dir(Program))
	}
	if h.Systemctl != nil {
		return h.Systemctl(ctx, "daemon-reload")
	}
	return nil
}

// removeRun removes what goes with a reboot, but for the records of VMs of root's that run in jails, which need no helper.
func (h Host) removeRun() error {
	entries, err := os.ReadDir(h.path(wire.RunDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return failed(err, wire.RunDir)
	}
	roots, err := filepath.Glob(h.path(filepath.Join(wire.Jails, "vm-0-*")))
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(wire.RunDir, e.Name())
		if path == wire.Jails && len(roots) > 0 {
			continue
		}
		if err := os.RemoveAll(h.path(path)); err != nil {
			return failed(err, path)
		}
	}
	if err := os.Remove(h.path(wire.RunDir)); err != nil && !errors.Is(err, fs.ErrNotExist) && len(roots) == 0 {
		return failed(err, wire.RunDir)
	}
	return nil
}

// startedByHand refuses while a helper serves that nobody but who started it knows of.
func (h Host) startedByHand() error {
	sockets, err := filepath.Glob(h.path(filepath.Join(wire.RunDir, "*er-*.sock"))) // helper- and jailer-
	if err != nil {
		return err
	}
	for _, path := range sockets {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			continue // a socket that a helper which is gone left behind
		}
		pid, err := listenerOf(conn)
		if err := errors.Join(err, conn.Close()); err != nil {
			return fault.Wrap(err, fault.Internal, path, "it cannot be told who serves there")
		}
		return fault.New(fault.Precondition, path, "a helper that was started by hand serves there").WithHint("end it: sudo kill %d", pid)
	}
	return nil
}

// listenerOf is the process that listens where a connection leads (unix(7), SO_PEERCRED).
func listenerOf(conn *net.UnixConn) (pid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return int(cred.Pid), nil
}

// State is what is installed.
type State struct {
	Installed bool
	Version   string // what the program says of itself
	Jailer    string // the version of what jails are made with, "" if there is nothing
	Users     []int  // who may use it by systemd
	// Answer is what the caller's own helper says; Err why it says nothing. A helper of another revision is a fault.VersionSkew.
	Answer wire.Answer
	Err    error
	// JailErr is why nobody makes jails for the caller; nil if somebody does.
	JailErr error
}

// Status looks what is installed, and asks the helper of a user.
func (h Host) Status(ctx context.Context, uid int) (State, error) {
	var s State
	switch _, err := os.Stat(h.path(Program)); {
	case err == nil:
		s.Installed = true
		if out, err := h.Run(ctx, h.path(Program), "-version"); err == nil {
			s.Version = strings.TrimPrefix(strings.TrimSpace(out), "banger-helper ")
		}
	case !errors.Is(err, fs.ErrNotExist):
		return s, fault.Wrap(err, fault.Internal, Program, "it cannot be looked at")
	}
	var err error
	if s.Users, err = h.Users(); err != nil {
		return s, err
	}
	if out, err := h.Run(ctx, h.path(Jailer), "--version"); err == nil {
		s.Jailer = versionOf(out)
	}
	s.Answer, s.Err = wire.Probe(ctx, h.path(wire.Socket(uid)))
	_, s.JailErr = wire.Probe(ctx, h.path(wire.JailSocket(uid)))
	return s, nil
}
