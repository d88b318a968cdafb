package ext4

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// fakeTime is the creation time of every filesystem, 2024-01-01: the same recipe gives the same bytes.
const fakeTime = "1704067200"

// Format says what to make.
type Format struct {
	Kind  Kind
	Size  int64  // bytes, a multiple of BlockSize; the file is made sparse
	Label string // at most 16 bytes
	// Root is a directory whose content is put in (owners and modes as they are there, so the
	// caller sees to being root or in a user namespace). Tar is an archive to put in instead; only
	// tools since 1.47.1 that were built with libarchive can. Neither makes an empty filesystem.
	Root string
	Tar  io.Reader
	// Inodes is how many there are to be; 0 means one for 16 KiB.
	Inodes int64
}

// Tool is an mke2fs: its argv prefix, since a newer one may have to be run through its own dynamic
// linker, and its version. Run it with Env.
type Tool struct {
	Argv    []string
	Version Version
}

// Version of e2fsprogs, e.g. 1.47.0.
type Version [3]int

// String renders 1.47.0.
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

// AtLeast reports whether v is w or newer.
func (v Version) AtLeast(w Version) bool {
	for i := range v {
		if v[i] != w[i] {
			return v[i] > w[i]
		}
	}
	return true
}

// prezeroed is the first release with -E assume_storage_prezeroed: inode tables in a hole are
// known to be zero, so the guest's kernel does not write them (2 MiB a group, 256 MiB for 16 GiB)
// in the background after the first mount.
var prezeroed = Version{1, 47, 0}

// FindTool looks for mke2fs in PATH and, since an ordinary user's PATH often lacks them, in
// /usr/sbin and /sbin. fault.Unavailable if there is none.
func FindTool(ctx context.Context) (Tool, error) {
	for _, p := range []string{"mke2fs", "/usr/sbin/mke2fs", "/sbin/mke2fs"} {
		if path, err := exec.LookPath(p); err == nil {
			return ProbeTool(ctx, path)
		}
	}
	return Tool{}, fault.New(fault.Unavailable, "mke2fs", "not found in PATH, /usr/sbin or /sbin").
		WithHint("install it: apt install e2fsprogs")
}

var versionLine = regexp.MustCompile(`mke2fs (\d+)\.(\d+)(?:\.(\d+))?`)

// ProbeTool asks the mke2fs that argv runs for its version. fault.Unavailable if it does not answer as one.
func ProbeTool(ctx context.Context, argv ...string) (Tool, error) {
	cmd := exec.CommandContext(ctx, argv[0], append(append([]string{}, argv[1:]...), "-V")...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return Tool{}, fault.Wrap(err, fault.Unavailable, argv[0], "does not tell its version").
			WithHint("check the e2fsprogs package: %s -V", strings.Join(argv, " "))
	}
	m := versionLine.FindSubmatch(out)
	if m == nil {
		return Tool{}, fault.New(fault.Unavailable, argv[0], "is not mke2fs: it answered %q", firstLine(out))
	}
	t := Tool{Argv: argv}
	for i := range t.Version {
		t.Version[i], _ = strconv.Atoi(string(m[i+1])) // digits by the expression; "" means 0
	}
	return t, nil
}

// validate refuses what mke2fs would refuse later or, worse, would do differently.
func (f Format) validate() error {
	switch {
	case f.Size <= 0 || f.Size%BlockSize != 0:
		return fault.New(fault.Invalid, "filesystem size", "%d is not a positive multiple of %d", f.Size, BlockSize)
	case f.Kind == Growing && (f.Size < MinGrowBytes || f.Size > MaxGrowBytes):
		return fault.New(fault.Invalid, "filesystem size", "%d is not between %d and %d", f.Size, MinGrowBytes, MaxGrowBytes)
	case f.Root != "" && f.Tar != nil:
		return fault.New(fault.Internal, "filesystem content", "comes from a directory and from an archive at once")
	case len(f.Label) > 16:
		return fault.New(fault.Invalid, "filesystem label", "%q is longer than 16 bytes", f.Label)
	}
	return nil
}

// Key identifies the bytes that Make writes for an empty filesystem: arguments and the tool's
// version. 64 hex digits. Root and Tar do not take part: content has its own keys.
func (f Format) Key(t Tool) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\n%s\n%q\n", fakeTime, t.Version, f.args(t, "", "")))
	return hex.EncodeToString(sum[:])
}

// uuid is made from what the filesystem is, so that system and work disk of a VM differ and the
// same recipe gives the same bytes. Two VMs' disks may share it: they never meet in one guest.
func (f Format) uuid() string {
	h := sha256.Sum256(fmt.Appendf(nil, "%d %s %d", f.Size, f.Label, f.Kind))
	h[6] = h[6]&0x0f | 0x80 // RFC 9562, version 8: made by our own rule
	h[8] = h[8]&0x3f | 0x80
	return formatUUID(h[:16])
}

func (f Format) args(t Tool, path, root string) []string {
	uuid := f.uuid()
	a := MkfsArgs(f.Kind)
	ext := ",hash_seed=" + uuid
	if t.Version.AtLeast(prezeroed) {
		ext += ",assume_storage_prezeroed=1"
	}
	a[len(a)-1] += ext // the value of -E, which mke2fs takes once
	a = append(a, "-e", "remount-ro", "-L", f.Label, "-U", uuid)
	if f.Inodes != 0 {
		a = append(a, "-N", strconv.FormatInt(f.Inodes, 10))
	}
	if root != "" {
		a = append(a, "-d", root)
	}
	return append(a, path, strconv.FormatInt(f.Size/1024, 10)+"k")
}

// Make writes a filesystem into path, which must not exist; what is left of a failure is removed.
// The file is sparse and 0600, and is on the disk when Make returns. fault.Exhausted on a full disk.
func (t Tool) Make(ctx context.Context, path string, f Format) (err error) {
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, out.Close())
		if err != nil {
			_ = os.Remove(path) // the failure being returned says more
		}
	}()
	return t.Fill(ctx, out, f)
}

// Fill is Make for a file that the caller made, empty and open for writing, and removes on failure.
func (t Tool) Fill(ctx context.Context, out *os.File, f Format) error {
	if err := f.validate(); err != nil {
		return err
	}
	if err := out.Truncate(f.Size); err != nil {
		return err
	}
	root := f.Root
	if f.Tar != nil {
		root = "-"
	}
	argv := append(append([]string{}, t.Argv...), f.args(t, out.Name(), root)...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "E2FSPROGS_FAKE_TIME="+fakeTime, "SOURCE_DATE_EPOCH="+fakeTime)
	cmd.Stdin = f.Tar
	msg, err := cmd.CombinedOutput()
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if strings.Contains(string(msg), "No space left") || strings.Contains(string(msg), "Could not allocate") {
			return fault.Wrap(err, fault.Exhausted, out.Name(), "mke2fs failed: %s", firstLine(msg)).WithHint("free space on its disk (df -h %s)", filepath.Dir(out.Name()))
		}
		return fault.Wrap(err, fault.Internal, out.Name(), "mke2fs failed: %s", firstLine(msg))
	}
	return out.Sync()
}

func firstLine(b []byte) string {
	s, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return s
}
