package main

import (
	"archive/tar"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/crypto/ssh"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// The recipe of the emulated host that tests run on (test/lab), and its release: an older one than the
// guests', so that both ends of what banger supports are run.
const (
	labPackages  = "test/lab/packages.apt"
	labCustomize = "test/lab/customize.sh"
	labSuite     = "bookworm"
)

// labBlocks is the size of the host's disk, 24 GiB; the file is sparse.
const labBlocks = 24 << 30 / ext4.BlockSize

// Two parts of it are of the suites' backports, since older ones tear each other (docs/lab.md): its kernel, and the QEMU that
// emulates it, with all that this stands on.
const (
	labHostKernel = "linux-image-cloud-amd64/" + labSuite + "-backports"
	labEmulator   = "qemu-system-x86"
)

// emulatorOptions have mmdebstrap prefer backports.
var emulatorOptions = []string{`--aptopt=APT::Default-Release "` + suite + `-backports"`, withBackports(suite)}

// withBackports is mmdebstrap's option that adds a suite's backports. No mirror is named: they are where the suite comes from.
func withBackports(suite string) string {
	return `--setup-hook=sed -n 's/^\(deb.*\) ` + suite + ` main$/\1 ` + suite + `-backports main/p' "$1/etc/apt/sources.list" >"$1/etc/apt/sources.list.d/backports.list" &&
test -s "$1/etc/apt/sources.list.d/backports.list"`
}

// Files of the host in its cache entry. test/lab reads them.
const (
	labQEMU      = "qemu" // a directory: the emulator with its libraries and firmware
	labDisk      = "disk.ext4"
	labKernel    = "vmlinuz"
	labInitrd    = "initrd.img"
	labClientKey = "id_ed25519"       // enters it as root and as user
	labHostKey   = "ssh_host_key.pub" // what its SSH server shows
)

// makeLab builds the emulated host of test/lab and makes -to a link to it. The same packages and the
// same customize.sh are built once.
func makeLab(ctx context.Context, p *progress, o options) error {
	if o.to == "" {
		return fault.New(fault.Invalid, "-to", "says where the link to the host is made").WithHint("make lab")
	}
	packages, err := readPackages(labPackages)
	if err != nil {
		return err
	}
	packages = append(packages, labHostKernel)
	script, err := os.ReadFile(labCustomize)
	if err != nil {
		return fault.Wrap(err, fault.NotFound, labCustomize, "cannot be read").WithHint("run this in the source checkout")
	}
	c, err := openCache(ctx, p)
	if err != nil {
		return err
	}
	defer c.close()
	tools, err := c.tools(ctx, p)
	if err != nil {
		return err
	}
	dir, _, err := c.get(ctx, "lab", labKey(packages, string(script)), false, func(dir string) ([]string, error) {
		mode, err := debootstrapMode()
		if err != nil {
			return nil, err
		}
		return buildLab(ctx, p, mode, dir, packages, string(script), tools)
	})
	if err != nil {
		return err
	}
	if err := replaceLink(dir, o.to); err != nil {
		return err
	}
	return c.prune(ctx, "lab")
}

// labKey names the host that these packages, labHostKernel's among them, and this customize.sh make.
func labKey(packages []string, script string) string {
	return contentKey("lab", labSuite, withBackports(labSuite), emulatorOptions, labEmulator, runtime.GOARCH, packages, script, labBlocks, ext4.MkfsArgs(ext4.Growing))
}

// buildLab makes the host's disk, its kernel and initrd, and the keys it is entered with, in dir.
func buildLab(ctx context.Context, p *progress, mode, dir string, packages []string, script string, tools toolchain) ([]string, error) {
	if free, err := freeBytes(dir); err != nil || free < cacheNeed {
		return nil, fault.Wrap(err, fault.Exhausted, dir, "building the lab takes %s, and there are %s", gib(cacheNeed), gib(free)).
			WithHint("free some space, or set XDG_CACHE_HOME to a directory with more")
	}
	public, err := writeKey(filepath.Join(dir, labClientKey))
	if err != nil {
		return nil, err
	}
	p.begin("building the lab's host from %d packages", len(packages))
	tarFile := filepath.Join(dir, "disk.tar")
	var size imageSize
	args := debootstrapArgs(mode, "minbase", labSuite, packages, withBackports(labSuite), "--customize-hook=LAB_PUBLIC_KEY='"+public+"'\n"+script)
	err = debootstrap(ctx, p, args, func(r io.Reader) (err error) {
		out, err := os.Create(tarFile)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, out.Close()) }()
		size, err = takeBoot(io.TeeReader(r, out), dir)
		return err
	})
	if err != nil {
		return nil, err
	}
	p.begin("writing the lab's disk")
	disk := filepath.Join(dir, labDisk)
	if err := makeImage(ctx, tools, ext4.Growing, "lab", tarFile, disk, size, labBlocks); err != nil {
		return nil, err
	}
	// It holds the private key that the host proves itself with.
	if err := os.Chmod(disk, 0o600); err != nil {
		return nil, err
	}
	if err := os.Remove(tarFile); err != nil {
		return nil, err
	}
	p.begin("fetching the lab's emulator")
	err = debootstrap(ctx, p, debootstrapArgs(mode, "extract", suite, []string{labEmulator}, emulatorOptions...), func(r io.Reader) error {
		return extract(r, filepath.Join(dir, labQEMU), isEmulator)
	})
	// The disk is not among what is checked: hashing 24 GiB of zeros takes a minute.
	return []string{labKernel, labInitrd, labClientKey, labHostKey}, err
}

// isEmulator says whether a file of labEmulator and the packages it stands on is needed to run it.
func isEmulator(name string) bool {
	dir := path.Dir(name)
	return name == "usr/bin/qemu-system-x86_64" || dir == "usr/share/qemu" || dir == "usr/share/seabios" || isLibrary(name)
}

// takeBoot reads a root filesystem's tar to its end, writes kernel, initrd and the SSH server's public
// key into dir, and counts what the filesystem takes. Each must be there exactly once.
func takeBoot(r io.Reader, dir string) (size imageSize, err error) {
	found := map[string]int{}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return size, err
		}
		size.add(h)
		if h.Typeflag != tar.TypeReg {
			continue
		}
		name := path.Clean(h.Name)
		var file string
		switch {
		case strings.HasPrefix(name, "boot/vmlinuz-"):
			file = labKernel
		case strings.HasPrefix(name, "boot/initrd.img-"):
			file = labInitrd
		case name == "etc/ssh/ssh_host_ed25519_key.pub":
			file = labHostKey
		default:
			continue
		}
		found[file]++
		out, err := os.Create(filepath.Join(dir, file))
		if err != nil {
			return size, err
		}
		_, err = io.Copy(out, tr)
		if err := errors.Join(err, out.Close()); err != nil {
			return size, err
		}
	}
	if _, err := io.Copy(io.Discard, r); err != nil { // the padding after the last entry belongs to the tar
		return size, err
	}
	for _, file := range []string{labKernel, labInitrd, labHostKey} {
		if found[file] != 1 {
			return size, fault.New(fault.Corrupt, labPackages, "gives %d files for %s instead of one", found[file], file)
		}
	}
	return size, nil
}

// writeKey makes an SSH key and returns the line of its public half.
func writeKey(file string) (string, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", err
	}
	block, err := ssh.MarshalPrivateKey(private, "banger lab")
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		return "", err
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey()))), nil
}

// replaceLink makes link point to target at once; what reads it sees the old one or the new one.
func replaceLink(target, link string) error {
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		return err
	}
	tmp := link + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, link)
}
