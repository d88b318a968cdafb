package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// WriteModulesImage makes the read-only ext4 image of a module tree at file, replacing it at once when
// it is complete: the image's root is the content of lib/modules/<version>, for the guest to bind-mount
// there. Nothing is left out: what a guest will load is not ours to guess, and Debian's cloud kernel has
// only 25 MiB. It runs mke2fs, and debugfs if the tree does not belong to root: in the guest it does.
func WriteModulesImage(ctx context.Context, t *Tree, file string) (err error) {
	var inodes, blocks int64
	var chown []string
	err = filepath.WalkDir(t.dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		inodes++
		blocks += (info.Size() + ext4.BlockSize - 1) / ext4.BlockSize
		rel, err := filepath.Rel(t.dir, p)
		if st, ok := info.Sys().(*syscall.Stat_t); ok && rel != "." && (st.Uid != 0 || st.Gid != 0) {
			chown = append(chown, rel)
		}
		return err
	})
	if err != nil {
		return fault.Wrap(err, fault.NotFound, t.dir, "the kernel modules cannot be read")
	}

	// The name must not be known before the image is whole, nor shared with another build.
	tmp, err := os.CreateTemp(filepath.Dir(file), ".modules-*")
	if err != nil {
		return fault.Wrap(err, fault.Permission, file, "cannot be made")
	}
	defer func() {
		err = errors.Join(err, tmp.Close())
		if err != nil {
			err = errors.Join(err, os.Remove(tmp.Name()))
		}
	}()

	// Inode tables (16 inodes a block), bitmaps, directory blocks beyond their first and room for rounding.
	inodes += 16
	blocks += inodes/16 + blocks/50 + 256
	args := append(ext4.MkfsArgs(ext4.ReadOnly), "-L", "modules", "-N", strconv.FormatInt(inodes, 10),
		"-d", t.dir, tmp.Name(), strconv.FormatInt(blocks, 10))
	if err := run(ctx, nil, "mke2fs", args...); err != nil {
		return err
	}
	if len(chown) > 0 {
		if err := run(ctx, chownScript(chown), "debugfs", "-w", "-f", "-", tmp.Name()); err != nil {
			return err
		}
	}
	if err := tmp.Chmod(0o644); err != nil {
		return fault.Wrap(err, fault.Internal, file, "cannot be made readable")
	}
	if err := tmp.Sync(); err != nil {
		return fault.Wrap(err, fault.Exhausted, file, "cannot be written")
	}
	if err := os.Rename(tmp.Name(), file); err != nil {
		return fault.Wrap(err, fault.Permission, file, "cannot be put in place")
	}
	return nil
}

// chownScript gives debugfs the commands that make every path root's. A name with a quote, which
// debugfs cannot be told, keeps its owner.
func chownScript(paths []string) []byte {
	var b bytes.Buffer
	for _, p := range paths {
		if strings.ContainsAny(p, "\"\n") {
			continue
		}
		fmt.Fprintf(&b, "set_inode_field \"/%s\" uid 0\nset_inode_field \"/%s\" gid 0\n", p, p)
	}
	return b.Bytes()
}

// run runs a program of e2fsprogs, which an ordinary user's PATH may not hold.
func run(ctx context.Context, stdin []byte, name string, args ...string) error {
	file, err := exec.LookPath(name)
	if err != nil {
		for _, dir := range []string{"/usr/sbin", "/sbin"} {
			if _, err2 := os.Stat(filepath.Join(dir, name)); err2 == nil {
				file, err = filepath.Join(dir, name), nil
				break
			}
		}
	}
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, name, "is not installed").WithHint("apt install e2fsprogs")
	}
	cmd := exec.CommandContext(ctx, file, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fault.Wrap(err, fault.Internal, name, "failed: %s", strings.TrimSpace(stderr.String()))
	}
	return nil
}
