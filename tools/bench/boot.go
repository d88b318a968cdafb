package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// variant is a guest as banger makes it, but for something that banger left out or put in to make it boot sooner.
type variant struct {
	name, label string
	without     []string // words of the kernel's command line that are left out, values aside
	initrd      string   // instead of the guest's
	system      string   // what its system disk begins as, instead of a blank one
}

// What the variants of bench-boot are held against.
const asMade = "made"

// variants are the machines of bench-boot. initrd, units, generators and both are files that measureBoot makes.
func variants(initrd, units, generators, both string) []variant {
	keyboard := []string{"i8042.noaux", "i8042.nomux", "i8042.nopnp", "i8042.dumbkbd"}
	words := append([]string{"quiet", "cryptomgr.notests", "lsm", "random.trust_cpu", "TERM"}, keyboard...)
	return []variant{
		{name: asMade, label: "a guest as banger makes it"},
		{name: "again", label: "the same once more: what differs by chance"},
		{name: "quiet", label: "without `quiet`", without: []string{"quiet"}},
		{name: "notests", label: "without `cryptomgr.notests`", without: []string{"cryptomgr.notests"}},
		{name: "lsm", label: "without `lsm=`, which leaves out bpf", without: []string{"lsm"}},
		{name: "trust", label: "without `random.trust_cpu=on`", without: []string{"random.trust_cpu"}},
		{name: "term", label: "without `TERM=dumb`", without: []string{"TERM"}},
		{name: "i8042", label: "without the four options of i8042", without: keyboard},
		{name: "cmdline", label: "without any of these", without: words},
		{name: "initrd", label: "with Debian's initrd unpacked before banger's", initrd: initrd},
		{name: "units", label: "with the units that are masked", system: units},
		{name: "generators", label: "with systemd's generators that are masked", system: generators},
		{name: "both", label: "with both", system: both},
		{name: "all", label: "with all of this at once", without: words, initrd: initrd, system: both},
	}
}

// source is Firecracker's boot-source of a variant. A word that is not on the command line is an error: it would measure nothing.
func (v variant) source(model json.RawMessage) (map[string]string, error) {
	var s map[string]string
	if err := json.Unmarshal(model, &s); err != nil {
		return nil, err
	}
	var kept []string
	found := map[string]bool{}
	for _, word := range strings.Fields(s["boot_args"]) {
		name, _, _ := strings.Cut(word, "=")
		if slices.Contains(v.without, name) {
			found[name] = true
			continue
		}
		kept = append(kept, word)
	}
	if len(found) != len(v.without) {
		return nil, fault.New(fault.Internal, v.name, "of %q only %d are on the command line %q", v.without, len(found), s["boot_args"])
	}
	s["boot_args"] = strings.Join(kept, " ")
	if v.initrd != "" {
		s["initrd_path"] = v.initrd
	}
	return s, nil
}

// measureBoot makes the variants in turn. It mounts disks, which takes root.
func measureBoot(ctx context.Context, r *report, m *model, dir string, say func(string, ...any)) error {
	initrd := filepath.Join(dir, "both.img")
	if err := m.appendInitrd(initrd); err != nil {
		return err
	}
	masks, err := m.masks(ctx, filepath.Join(dir, "base"))
	if err != nil {
		return err
	}
	blank := func(name string, wanted func(path string) bool) (string, error) {
		file := filepath.Join(dir, name+".ext4")
		return file, m.unmask(ctx, file, masks, wanted)
	}
	generator := func(path string) bool { return strings.Contains(path, "-generators/") }
	units, err := blank("units", func(path string) bool { return !generator(path) })
	if err != nil {
		return err
	}
	generators, err := blank("generators", generator)
	if err != nil {
		return err
	}
	both, err := blank("both", func(string) bool { return true })
	if err != nil {
		return err
	}
	var kinds []kind
	for _, v := range variants(initrd, units, generators, both) {
		kinds = append(kinds, kind{v.name, func(ctx context.Context, r *report, dir string) error {
			// Not until systemd has finished: some of Debian's generators have it wait a minute and a half for a console.
			return m.boot(ctx, r, dir, v, []string{boot.StageSSH}, func(context.Context, string, int) error { return nil })
		}})
	}
	return r.inTurn(ctx, dir, kinds, say)
}

// appendInitrd puts Debian's initrd before the guest's: the kernel unpacks one after the other, and the later file of a name stays
// (the kernel's driver-api/early-userspace/buffer-format.rst). An archive begins at a multiple of four bytes.
func (m *model) appendInitrd(to string) error {
	var s struct {
		Initrd string `json:"initrd_path"`
	}
	if err := json.Unmarshal(m.config["boot-source"], &s); err != nil {
		return err
	}
	first, err := os.ReadFile(filepath.Join(m.stock, "initrd.img"))
	if err != nil {
		return err
	}
	second, err := os.ReadFile(s.Initrd)
	if err != nil {
		return err
	}
	pad := make([]byte, (4-len(first)%4)%4)
	return os.WriteFile(to, bytes.Join([][]byte{first, pad, second}, nil), 0o600)
}

// masks are the units and generators of the base image that are links to /dev/null (systemd.unit(5), systemd.generator(7)), as
// paths in it.
func (m *model) masks(ctx context.Context, dir string) (masks []string, err error) {
	var base string
	for _, d := range m.drives {
		if vmm.Role(d.ID) == vmm.RoleBase {
			base = d.Path
		}
	}
	// noload: as the guest mounts it, whose journal is nobody's to replay.
	err = mounted(ctx, base, dir, "ro,loop,noload", func() error {
		for _, where := range []string{"etc/systemd/system", "etc/systemd/system-generators"} {
			entries, err := os.ReadDir(filepath.Join(dir, where))
			if err != nil {
				return err
			}
			for _, e := range entries {
				if target, err := os.Readlink(filepath.Join(dir, where, e.Name())); err == nil && target == os.DevNull {
					masks = append(masks, filepath.Join(where, e.Name()))
				}
			}
		}
		return nil
	})
	if err == nil && len(masks) == 0 {
		err = fault.New(fault.Internal, base, "nothing is masked in it")
	}
	return masks, err
}

// unmask makes a system disk on which the wanted masks are deleted: the upper directory of the guest's overlay has a whiteout for
// each of them (the kernel's filesystems/overlayfs.rst, "whiteouts and opaque directories").
func (m *model) unmask(ctx context.Context, file string, masks []string, wanted func(path string) bool) error {
	if _, err := disk.Clone(ctx, m.blanks[string(vmm.RoleSystem)], file); err != nil {
		return err
	}
	dir := file + ".mounted"
	return mounted(ctx, file, dir, "loop", func() error {
		n := 0
		for _, path := range masks {
			if !wanted(path) {
				continue
			}
			n++
			at := filepath.Join(dir, "upper", path)
			if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
				return err
			}
			if err := unix.Mknod(at, unix.S_IFCHR, 0); err != nil {
				return &fs.PathError{Op: "mknod", Path: at, Err: err}
			}
		}
		if n == 0 {
			return fault.New(fault.Internal, file, "none of the masks is of its kind: %q", masks)
		}
		return nil
	})
}

// mounted calls f while a disk is mounted.
func mounted(ctx context.Context, file, dir, options string, f func() error) (err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "mount", "-o", options, file, dir).CombinedOutput(); err != nil {
		return fmt.Errorf("mount %s: %w: %s", file, err, out)
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, 0)) }()
	return f()
}

// bootColumns are the figures of a variant that the table shows.
var bootColumns = []struct{ name, label string }{
	{"agent", "the agent has answered"},
	{"ssh", "sshd answers"},
}

// judgeBoot holds a guest as it is made against one without any of it.
func (r *report) judgeBoot() []string {
	for _, v := range variants("", "", "", "") {
		for _, c := range bootColumns {
			r.p50(v.name + "." + c.name) // a figure that is missing fails
		}
	}
	for _, c := range bootColumns {
		r.hold(c.label, "of the time of a guest with all of it", r.p50(asMade+"."+c.name)/r.p50("all."+c.name), 1)
	}
	return r.wrong()
}

// tableOfBoot renders the figures of bench-boot.
func (r *report) tableOfBoot() string {
	var b strings.Builder
	b.WriteString(r.lab())
	b.WriteString("| what |")
	for _, c := range bootColumns {
		fmt.Fprintf(&b, " %s | |", c.label)
	}
	b.WriteString("\n| --- |" + strings.Repeat(" ---: | ---: |", len(bootColumns)) + "\n")
	for _, v := range variants("", "", "", "") {
		fmt.Fprintf(&b, "| %s |", v.label)
		for _, c := range bootColumns {
			f, ok := r.Figures[v.name+"."+c.name]
			made := r.Figures[asMade+"."+c.name]
			switch {
			case !ok:
				b.WriteString(" missing | |")
			case v.name == asMade:
				fmt.Fprintf(&b, " %s | |", formatMS(f.P50))
			default:
				fmt.Fprintf(&b, " %s | %+.0f %% |", formatMS(f.P50), 100*(f.P50/made.P50-1))
			}
		}
		b.WriteString("\n")
	}
	r.stalls(&b)
	r.thresholds(&b)
	return b.String()
}
