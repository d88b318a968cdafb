// Package bundle owns the runtime bundle: the directory with the kernel, the initrd, the default
// image, the guest program, and Firecracker with its jailer if it has them, and bundle.json, which
// lists them with their checksums.
//
// It finds, reads, checks and describes a bundle. It never builds an artifact (tools/mkruntime
// does), never downloads one, and never changes one that it did not make: the SSH key only.
package bundle

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Format is the version of bundle.json that this program writes, and the newest that it reads.
const Format = 1

// ManifestName is the file in a bundle's directory that describes it. It is written last, so a
// bundle without it is one that was never finished.
const ManifestName = "bundle.json"

// Role is what an artifact is for. Roles are stable: they are the keys in bundle.json.
type Role string

// The roles, and the file names that they have in a bundle made by `make runtime`.
const (
	Kernel     Role = "kernel"      // vmlinux: ELF, unpacked
	Initrd     Role = "initrd"      // initrd.img: kernel.BuildInitrd with the bundle's agent
	Modules    Role = "modules"     // modules.ext4: kernel.WriteModulesImage
	RootFS     Role = "rootfs"      // rootfs-docker.ext4: the default image
	WorkSeed   Role = "work_seed"   // rootfs-docker.work-seed.ext4: what a new work disk is cloned from
	BaseRootFS Role = "base_rootfs" // rootfs.ext4, optional: what image builds begin with
	Agent      Role = "agent"       // banger-vsock-agent: the guest program
	Packages   Role = "packages"    // packages.apt: what the default image was made of
	SSHKey     Role = "ssh_key"     // id_ed25519, with .pub beside: one an installation, no checksum; none in a bundle for all users (KeyFor)

	Firecracker Role = "firecracker" // firecracker, optional: the VMM where there is KVM; static
	Jailer      Role = "jailer"      // jailer, optional: of the same version as firecracker; static

	GuestSSHD Role = "guest_sshd" // banger-guest-sshd, optional: the SSH server of images that have none; static
)

// FileName gives the name of a role's artifact in a bundle that `make runtime` makes.
func FileName(r Role) string { return fileNames[r] }

var fileNames = map[Role]string{
	Kernel: "vmlinux", Initrd: "initrd.img", Modules: "modules.ext4",
	RootFS: "rootfs-docker.ext4", WorkSeed: "rootfs-docker.work-seed.ext4", BaseRootFS: "rootfs.ext4",
	Agent: "banger-vsock-agent", Packages: "packages.apt", SSHKey: "id_ed25519",
	Firecracker: "firecracker", Jailer: "jailer", GuestSSHD: "banger-guest-sshd",
}

// Required are the roles without which a bundle is damaged, in the order in which they are checked; the SSH key only where the bundle
// lists it.
func Required() []Role {
	return []Role{Kernel, Initrd, Modules, RootFS, WorkSeed, Agent, Packages, SSHKey}
}

// Optional are the roles that a whole bundle may lack: without Firecracker, VMs run under QEMU. One
// that is listed is checked as the required ones are.
func Optional() []Role {
	return []Role{BaseRootFS, Firecracker, Jailer, GuestSSHD}
}

// Artifact is one file of a bundle. The SSH key has neither size nor checksum: it is made where the
// bundle is installed and is not part of what was published.
type Artifact struct {
	Path   string `json:"path"` // relative to the bundle's directory, within it
	Size   int64  `json:"size,omitempty"`
	SHA256 string `json:"sha256,omitempty"` // lower-case hex
}

// Bundle is bundle.json and where it lies. A loaded one is not changed: safe for concurrent use.
type Bundle struct {
	Format        int               `json:"format"`
	CreatedBy     string            `json:"created_by"` // version of the program that made it
	Arch          string            `json:"arch"`       // as GOARCH names it
	KernelVersion string            `json:"kernel_version"`
	Artifacts     map[Role]Artifact `json:"artifacts"`

	// Of firecracker and jailer, "" without them: MAJOR.MINOR.PATCH as they say themselves, and where they
	// came from, for people.
	FirecrackerVersion string `json:"firecracker_version,omitempty"`
	FirecrackerFrom    string `json:"firecracker_from,omitempty"`

	dir string
}

// Dir is the directory that the bundle was loaded from or written to.
func (b *Bundle) Dir() string { return b.dir }

// Path is the absolute path of a role's artifact, or "" if the bundle has none.
func (b *Bundle) Path(r Role) string {
	a, ok := b.Artifacts[r]
	if !ok {
		return ""
	}
	return filepath.Join(b.dir, a.Path)
}

// Base is the root filesystem that image builds begin with: rootfs.ext4 if the bundle has one, else
// the default image.
func (b *Bundle) Base() string {
	if p := b.Path(BaseRootFS); p != "" {
		return p
	}
	return b.Path(RootFS)
}

// Load reads and validates bundle.json of dir; it does not look at the artifacts (Check does).
// Missing is fault.NotFound, unreadable or incomplete fault.Corrupt, a format from the future
// fault.VersionSkew, a bundle for other processors fault.Unsupported; each says what repairs it.
func Load(dir string) (*Bundle, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, dir, "is no usable path")
	}
	file := filepath.Join(dir, ManifestName)
	raw, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, dir, "holds no runtime bundle (no %s)", ManifestName).WithHint("%s", Repair(dir))
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Permission, file, "cannot be read").WithHint("%s", Repair(dir))
	}
	// The version first: what follows may mean something else in another format.
	var v struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, fault.Wrap(err, fault.Corrupt, file, "is damaged").WithHint("%s", Repair(dir))
	}
	if v.Format > Format {
		return nil, fault.New(fault.VersionSkew, file, "has format %d; this banger reads up to %d", v.Format, Format).
			WithHint("update banger, or make a bundle that fits it: %s", Repair(dir))
	}
	b := &Bundle{dir: dir}
	if err := json.Unmarshal(raw, b); err != nil {
		return nil, fault.Wrap(err, fault.Corrupt, file, "is damaged").WithHint("%s", Repair(dir))
	}
	if v.Format < 1 {
		return nil, fault.New(fault.Corrupt, file, "has no format version").WithHint("%s", Repair(dir))
	}
	if b.Arch != runtime.GOARCH {
		return nil, fault.New(fault.Unsupported, file, "is a bundle for %s, and this machine is %s", b.Arch, runtime.GOARCH).WithHint("%s", Repair(dir))
	}
	for _, r := range Required() {
		if _, ok := b.Artifacts[r]; !ok && r != SSHKey {
			return nil, fault.New(fault.Corrupt, file, "lists no %s", r).WithHint("%s", Repair(dir))
		}
	}
	for r, a := range b.Artifacts {
		if !filepath.IsLocal(a.Path) {
			return nil, fault.New(fault.Corrupt, file, "its %s lies outside of the bundle: %q", r, a.Path).WithHint("%s", Repair(dir))
		}
	}
	return b, nil
}

// Check looks at every artifact without reading it: a missing one is fault.NotFound, one of another
// size fault.Corrupt. All that is wrong is reported in one fault.
func (b *Bundle) Check() error {
	var errs []error
	for _, r := range b.roles() {
		if err := b.checkOne(r); err != nil {
			errs = append(errs, err)
		}
	}
	return b.oneFault(errs)
}

// Verify checks every artifact's content as well. It reads about 1.5 GB; ctx ends it.
func (b *Bundle) Verify(ctx context.Context) error {
	var errs []error
	for _, r := range b.roles() {
		if err := b.checkOne(r); err != nil {
			errs = append(errs, err)
			continue
		}
		want := b.Artifacts[r]
		if want.SHA256 == "" {
			continue
		}
		got, err := Describe(ctx, b.dir, want.Path)
		if err != nil {
			return err
		}
		if got.SHA256 != want.SHA256 {
			errs = append(errs, fault.New(fault.Corrupt, b.Path(r), "is damaged: its checksum is not that of the bundle's %s", r).
				WithHint("%s", Repair(b.dir)))
		}
	}
	return b.oneFault(errs)
}

// oneFault gives a single finding as it is, and several as one fault that lists them.
func (b *Bundle) oneFault(errs []error) error {
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return errs[0]
	}
	return fault.Wrap(errors.Join(errs...), fault.CodeOf(errs[0]), b.dir, "%d artifacts of the runtime bundle are missing or damaged", len(errs)).
		WithHint("%s", Repair(b.dir))
}

// roles gives the artifacts that the bundle has, the required ones first.
func (b *Bundle) roles() []Role {
	roles := Required()
	if !b.hasKey() {
		roles = slices.DeleteFunc(roles, func(r Role) bool { return r == SSHKey })
	}
	for _, r := range Optional() {
		if _, ok := b.Artifacts[r]; ok {
			roles = append(roles, r)
		}
	}
	return roles
}

func (b *Bundle) checkOne(r Role) error {
	want, file := b.Artifacts[r], b.Path(r)
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fault.New(fault.NotFound, file, "is missing from the runtime bundle (%s)", r).WithHint("%s", Repair(b.dir))
	case err != nil:
		return fault.Wrap(err, fault.Permission, file, "cannot be examined").WithHint("%s", Repair(b.dir))
	case !info.Mode().IsRegular():
		return fault.New(fault.Corrupt, file, "is not a regular file").WithHint("%s", Repair(b.dir))
	case r == SSHKey && info.Mode().Perm()&0o077 != 0:
		return fault.New(fault.Corrupt, file, "can be read by others (mode %04o), so ssh refuses it", info.Mode().Perm()).
			WithHint("chmod 600 %s", file)
	case r == SSHKey && info.Size() == 0:
		return fault.New(fault.Corrupt, file, "is empty").WithHint("%s", Repair(b.dir))
	case (r == Firecracker || r == Jailer) && info.Mode().Perm()&0o111 == 0:
		return fault.New(fault.Corrupt, file, "cannot be executed (mode %04o)", info.Mode().Perm()).WithHint("%s", Repair(b.dir))
	case r != SSHKey && info.Size() != want.Size:
		return fault.New(fault.Corrupt, file, "is damaged: it has %d bytes, and the bundle's %s has %d", info.Size(), r, want.Size).
			WithHint("%s", Repair(b.dir))
	}
	return nil
}

// Describe measures the artifact at path, relative to dir.
func Describe(ctx context.Context, dir, path string) (Artifact, error) {
	f, err := os.Open(filepath.Join(dir, path))
	if err != nil {
		return Artifact{}, fault.Wrap(err, fault.NotFound, path, "cannot be read")
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.CopyBuffer(h, &contextReader{ctx, f}, make([]byte, 1<<20))
	if err != nil {
		return Artifact{}, fmt.Errorf("%s: %w", path, err)
	}
	return Artifact{Path: path, Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}, nil
}

// contextReader ends a long read when the context does.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// Write puts bundle.json into dir, at once and durably, and makes dir the bundle's directory. The artifacts
// must be in place and on disk before.
func (b *Bundle) Write(dir string) error {
	b.Format, b.dir = Format, dir
	raw, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return fault.Wrap(err, fault.Internal, ManifestName, "cannot be written")
	}
	return replaceFile(filepath.Join(dir, ManifestName), append(raw, '\n'), 0o644)
}

// replaceFile writes a file under another name, syncs it, renames it, and syncs the directory: after
// a crash there is the old file or the new one.
func replaceFile(file string, content []byte, mode fs.FileMode) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(file), ".new-*")
	if err != nil {
		return fault.Wrap(err, fault.Permission, file, "cannot be written")
	}
	defer func() {
		if err != nil {
			err = fault.Wrap(errors.Join(err, os.Remove(tmp.Name())), fault.Permission, file, "cannot be written")
		}
	}()
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), file); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(file))
}

// SyncDir makes renames within a directory durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
