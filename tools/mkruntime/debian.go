package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// kernelPackages are what the kernel, its modules index and the images are made with. The tools
// are the suite's own: e2fsprogs of Debian 12 does not read a tar, and the host may have no kmod.
var kernelPackages = []string{"linux-image-cloud-amd64", "e2fsprogs", "libarchive13t64", "kmod"}

var packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?$`)

// readPackages parses packages.apt: one package a line, # begins a comment. Two names for the same are one.
func readPackages(file string) ([]string, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, fault.Wrap(err, fault.NotFound, file, "cannot be read").WithHint("it lists the packages of the default image, one a line")
	}
	var out []string
	seen := map[string]bool{}
	for i, line := range strings.Split(string(raw), "\n") {
		line, _, _ = strings.Cut(line, "#")
		name := strings.TrimSpace(line)
		if name == "" || seen[name] {
			continue
		}
		if !packageName.MatchString(name) {
			return nil, fault.New(fault.Invalid, fmt.Sprintf("%s:%d", file, i+1), "%q is no package name", name).
				WithHint("one package a line, # begins a comment")
		}
		seen[name] = true
		out = append(out, name)
	}
	return out, nil
}

// debootstrapArgs gives mmdebstrap's arguments for a tar on its standard output. No mirror is named:
// mmdebstrap knows the release's.
func debootstrapArgs(mode, variant, release string, packages []string, more ...string) []string {
	args := []string{"--mode=" + mode, "--variant=" + variant, "--format=tar"}
	if variant != "extract" {
		for _, o := range dpkgExcludes {
			args = append(args, "--dpkgopt="+o)
		}
	}
	if len(packages) > 0 {
		args = append(args, "--include="+strings.Join(packages, ","))
	}
	args = append(args, more...)
	return append(args, release, "-")
}

// debootstrapMode decides how mmdebstrap gets a root of its own and says exactly what is missing.
// fakechroot is never used: packages with setuid programs and capabilities come out wrong.
func debootstrapMode() (string, error) {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return "", fault.Wrap(err, fault.Unavailable, "mmdebstrap", "is not installed").WithHint("scripts/deps.sh sandbox, or: sudo apt install mmdebstrap")
	}
	if _, err := os.Stat("/usr/share/keyrings/debian-archive-keyring.gpg"); err != nil {
		return "", fault.Wrap(err, fault.Unavailable, "debian-archive-keyring", "is not installed").
			WithHint("scripts/deps.sh sandbox, or: sudo apt install debian-archive-keyring")
	}
	if os.Geteuid() == 0 {
		return "root", nil
	}
	if _, err := exec.LookPath("newuidmap"); err != nil {
		return "", fault.Wrap(err, fault.Unavailable, "uidmap", "is not installed; it lets an ordinary user build the image").
			WithHint("scripts/deps.sh sandbox, or: sudo apt install uidmap")
	}
	u, err := user.Current()
	if err != nil {
		return "", fault.Wrap(err, fault.Internal, "user", "cannot be determined")
	}
	for _, file := range []string{"/etc/subuid", "/etc/subgid"} {
		raw, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", fault.Wrap(err, fault.Permission, file, "cannot be read")
		}
		ok, free := subordinate(string(raw), u.Username, u.Uid)
		if !ok {
			return "", fault.New(fault.Permission, file, "gives %s no range of 65536 ids, which building the image as an ordinary user takes", u.Username).
				WithHint("sudo usermod --add-subuids %d-%d --add-subgids %d-%d %s", free, free+65535, free, free+65535, u.Username)
		}
	}
	for _, s := range []struct{ file, bad, hint string }{
		{"/proc/sys/kernel/unprivileged_userns_clone", "0", "sudo sysctl kernel.unprivileged_userns_clone=1"},
		{"/proc/sys/user/max_user_namespaces", "0", "sudo sysctl user.max_user_namespaces=10000"},
	} {
		if raw, err := os.ReadFile(s.file); err == nil && strings.TrimSpace(string(raw)) == s.bad {
			return "", fault.New(fault.Permission, s.file, "keeps ordinary users from having user namespaces, which building the image takes").WithHint("%s", s.hint)
		}
	}
	return "unshare", nil
}

// subordinate says whether a subuid(5) file gives the user, by name or number, 65536 ids in one range, and
// where the first range free for all users would begin.
func subordinate(file, name, uid string) (ok bool, free int64) {
	free = 100000
	for _, line := range strings.Split(file, "\n") {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) != 3 {
			continue
		}
		start, err1 := strconv.ParseInt(f[1], 10, 64)
		count, err2 := strconv.ParseInt(f[2], 10, 64)
		if err1 != nil || err2 != nil {
			continue
		}
		free = max(free, start+count)
		ok = ok || (f[0] == name || f[0] == uid) && count >= 65536
	}
	return ok, free
}

// debootstrap runs mmdebstrap and gives its tar to consume, which must read all of it.
func debootstrap(ctx context.Context, p *progress, args []string, consume func(io.Reader) error) error {
	release := args[len(args)-2]
	tmp, err := scratchDir()
	if err != nil {
		return err
	}
	// consume may fail first: then mmdebstrap is stopped and waited for, so that its own
	// scratch directory, which only it can remove, is gone as well.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "mmdebstrap", args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "LC_ALL=C.UTF-8", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C reaches it through us, once
	// Its workers go on without it, so the whole group is told; mmdebstrap then removes its directory.
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = 30 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	errs, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fault.Wrap(err, fault.Unavailable, "mmdebstrap", "cannot be started")
	}
	var last tail
	read := make(chan struct{})
	go func() {
		defer close(read)
		s := bufio.NewScanner(errs)
		s.Split(scanProgress)
		for s.Scan() {
			line := strings.TrimSpace(s.Text())
			if line == "" {
				continue
			}
			last.add(line)
			if what, ok := strings.CutPrefix(line, "I: "); ok {
				p.note(strings.TrimSuffix(what, "..."))
			}
		}
		// A line too long for the scanner must not block the program.
		_, _ = io.Copy(io.Discard, errs)
	}()
	consumed := consume(out)
	if consumed == nil {
		_, consumed = io.Copy(io.Discard, out)
	}
	if consumed != nil {
		cancel()
	}
	<-read
	waited := cmd.Wait()
	switch {
	case context.Cause(ctx) != nil && consumed == nil:
		return ctx.Err()
	case waited != nil && consumed != nil && errors.Is(waited, context.Canceled):
		return consumed
	case waited != nil:
		return fault.Wrap(waited, fault.Unavailable, "mmdebstrap", "could not build from Debian %s:\n%s", release, last.String()).
			WithHint("check the network, and that every package in packages.apt exists in Debian %s", release)
	}
	return consumed
}

// scanProgress splits at line feeds and at the carriage returns of progress bars.
func scanProgress(data []byte, atEOF bool) (int, []byte, error) {
	if i := bytes.IndexAny(data, "\r\n"); i >= 0 {
		return i + 1, data[:i], nil
	}
	if atEOF && len(data) > 0 {
		return len(data), data, nil
	}
	return 0, nil, nil
}

// tail keeps the last lines of a program's output for the error message.
type tail struct{ lines []string }

func (t *tail) add(line string) {
	t.lines = append(t.lines, line)
	if len(t.lines) > 15 {
		t.lines = t.lines[1:]
	}
}

func (t *tail) String() string { return "  " + strings.Join(t.lines, "\n  ") }

// scratchNeed is what mmdebstrap unpacks beside the downloaded packages, in bytes.
const scratchNeed = 3 << 30

// scratchDir is where mmdebstrap works: a directory that any user can enter, because in a user namespace
// it is another one, with room. /tmp is often a small tmpfs.
func scratchDir() (string, error) {
	dirs := []string{"/tmp", "/var/tmp"}
	if d := os.Getenv("TMPDIR"); d != "" {
		dirs = []string{d}
	}
	var found []string
	for _, d := range dirs {
		free, err := freeBytes(d)
		if err == nil && free >= scratchNeed {
			return d, nil
		}
		found = append(found, fmt.Sprintf("%s has %s", d, gib(free)))
	}
	return "", fault.New(fault.Exhausted, "building the image", "takes %s of scratch space: %s", gib(scratchNeed), strings.Join(found, ", ")).
		WithHint("free some space, or set TMPDIR to a directory with more that every user can enter")
}

func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}

func gib(n int64) string { return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30)) }

// toolchain runs programs of the unpacked packages with their own dynamic linker and libraries, so that they
// work on a host whose libraries are older.
type toolchain struct{ root string }

func (t toolchain) command(ctx context.Context, name string, args ...string) (*exec.Cmd, error) {
	lib := filepath.Join(t.root, "usr/lib/x86_64-linux-gnu")
	file := ""
	for _, dir := range []string{"usr/sbin", "usr/bin"} {
		if f := filepath.Join(t.root, dir, name); fileExists(f) {
			file = f
			break
		}
	}
	if file == "" {
		return nil, fault.New(fault.Corrupt, name, "is missing from the build tools in %s", t.root)
	}
	argv := append([]string{"--library-path", lib, "--argv0", name, file}, args...)
	cmd := exec.CommandContext(ctx, filepath.Join(lib, "ld-linux-x86-64.so.2"), argv...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 10 * time.Second
	return cmd, nil
}

func (t toolchain) run(ctx context.Context, name string, args ...string) error {
	cmd, err := t.command(ctx, name, args...)
	if err != nil {
		return err
	}
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fault.Wrap(err, fault.Internal, name, "failed: %s", strings.TrimSpace(string(out)))
	}
	return nil
}

func fileExists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}
