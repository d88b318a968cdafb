//go:build e2e

package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// One more line in packages.apt, and the program is in the image, with the owners and modes of the
// packages, whoever builds. It fetches packages from Debian.
func TestOneMorePackageIsInTheImage(t *testing.T) {
	syscall.Umask(0o022)
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	mode, err := debootstrapMode()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	kernelDir := filepath.Join(dir, "kernel")
	if err := os.Mkdir(kernelDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := buildKernel(t.Context(), quiet(), mode, kernelDir); err != nil {
		t.Fatal(err)
	}
	packages := write(t, filepath.Join(dir, "packages.apt"), "")
	build := func() string {
		list, err := readPackages(packages)
		if err != nil {
			t.Fatal(err)
		}
		image, err := os.MkdirTemp(dir, "image-")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := buildImage(t.Context(), quiet(), mode, image, list, addition{}, toolchain{filepath.Join(kernelDir, dirTools)}); err != nil {
			t.Fatal(err)
		}
		return image
	}
	stat := func(image, file string) string {
		out, err := exec.Command("debugfs", "-R", "stat "+file, image).CombinedOutput()
		if err != nil {
			t.Fatalf("debugfs: %v\n%s", err, out)
		}
		return string(out)
	}
	before := build()
	write(t, packages, "hello # one more\n")
	after := build()
	if got := stat(filepath.Join(before, fileImage), "/usr/bin/hello"); !strings.Contains(got, "File not found") {
		t.Errorf("hello is in the image without being listed:\n%s", got)
	}
	image := filepath.Join(after, fileImage)
	if got := stat(image, "/usr/bin/hello"); !strings.Contains(got, "Mode:  0755") {
		t.Errorf("hello is not in the image:\n%s", got)
	}
	for file, want := range map[string]string{
		"/usr/bin/passwd": "Mode:  04755",
		"/etc/shadow":     "Group:    42",
		"/var/mail":       "Mode:  02775",
		"/root":           "Mode:  0700",
	} {
		if got := stat(image, file); !strings.Contains(got, want) || !strings.Contains(got, "User:     0") {
			t.Errorf("%s is not root's with %q:\n%s", file, want, got)
		}
	}
	for _, f := range []string{image, filepath.Join(after, fileSeed), filepath.Join(kernelDir, fileModules)} {
		if out, err := exec.Command("e2fsck", "-fn", f).CombinedOutput(); err != nil {
			t.Errorf("e2fsck %s: %v\n%s", f, err, out)
		}
	}
}

// The Python package as it is published: fetched by the real pip, with the checksums of the programs that were
// run, and the programs say their version here.
func TestFirecrackerFromTheRealPackage(t *testing.T) {
	path := os.Getenv("PATH")
	o := warmCache(t, "git\n")
	t.Setenv("PATH", path)
	for _, name := range []string{"firecracker", "jailer"} {
		if file, err := exec.LookPath(name); err == nil {
			t.Fatalf("%s would be taken instead", file)
		}
	}
	o.origin = published
	o.origin.releases = "http://127.0.0.1:1" // the release page is not what this is about
	b, said := made(t, o)
	if b.FirecrackerVersion != published.version || b.FirecrackerFrom != "the Python package "+published.pkg {
		t.Fatalf("%+v, said:\n%s", b, said)
	}
	for r, want := range published.sums {
		if got := b.Artifacts[r].SHA256; got != want {
			t.Errorf("%s has SHA256 %s", r, got)
		}
		out, err := exec.Command(b.Path(r), "--version").Output()
		if err != nil || !strings.Contains(string(out), " v"+published.version) {
			t.Errorf("%s --version: %q, %v", r, out, err)
		}
	}
}

// An interrupted build leaves neither a process nor mmdebstrap's directory.
func TestInterruptedBuildLeavesNothing(t *testing.T) {
	t.Setenv("TMPDIR", "")
	mode, err := debootstrapMode()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir() // before TMPDIR is the directory that must be empty in the end
	scratch, err := os.MkdirTemp("/var/tmp", "banger-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(scratch)
	if err := os.Chmod(scratch, 0o777); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", scratch)
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
	defer cancel()
	_, err = buildImage(ctx, quiet(), mode, dir, []string{"build-essential"}, addition{}, toolchain{})
	if !fault.Is(err, fault.Timeout) {
		t.Errorf("buildImage = %v", err)
	}
	left, err := os.ReadDir(scratch)
	if err != nil || len(left) > 0 {
		t.Errorf("mmdebstrap left %v, %v", left, err)
	}
}
