package kernel

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// maxModule bounds the size of one unpacked module; the largest of Debian's are a few MiB.
const maxModule = 64 << 20

// Wanted is a module that the initrd should carry. A kernel may have it built in, or, unless
// Required, not at all.
type Wanted struct {
	Name     string
	Required bool
}

// InitrdModules is everything that disks, network and the agent's connection need before the root
// filesystem, and with it modprobe, is there: no udev runs in a guest that could load them later.
func InitrdModules() []Wanted {
	return []Wanted{
		{"virtio_pci", false}, // QEMU's q35
		{"virtio_mmio", false},
		{"virtio_blk", true},
		{"virtio_net", false},
		{"tun", false}, // loaded only where the agent carries the network's frames
		{"vsock", false},
		{"vmw_vsock_virtio_transport", false},
		{"virtio_console", false},
		{"virtio_rng", false},
		{"crc32c_generic", false}, // ext4 asks for it by an alias that only modprobe resolves
		{"crc32c_intel", false},
		{"ext4", true},
		{"overlay", true},
	}
}

// RootModules are filesystems, other than ext4, that an image may have as its root. The initrd carries those that the kernel
// does not have built in, and init loads one when it is needed: on an emulated CPU each costs every boot some time.
func RootModules() []Wanted {
	return []Wanted{{"erofs", false}, {"squashfs", false}}
}

// Tree is a directory of modules, the content of lib/modules/<version> with the indexes of depmod.
type Tree struct {
	dir     string
	deps    map[string][]string // module file -> files it needs, both relative to dir
	files   map[string]string   // module name -> file
	builtin map[string]bool     // module name
}

// OpenTree reads the indexes of a module tree: dir itself, or the only directory with a
// modules.dep in dir or in dir's lib/modules. Missing is fault.NotFound, several are fault.Ambiguous.
func OpenTree(dir string) (*Tree, error) {
	root, err := findTree(dir)
	if err != nil {
		return nil, err
	}
	t := &Tree{dir: root, deps: map[string][]string{}, files: map[string]string{}, builtin: map[string]bool{}}
	err = eachLine(filepath.Join(root, "modules.dep"), func(line string) {
		file, needs, ok := strings.Cut(line, ":")
		if !ok {
			return
		}
		t.files[ModuleName(file)] = file
		t.deps[file] = strings.Fields(needs)
	})
	if err == nil {
		err = eachLine(filepath.Join(root, "modules.builtin"), func(line string) { t.builtin[ModuleName(line)] = true })
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Corrupt, root, "its module index cannot be read").WithHint("depmod writes the index: depmod -b <prefix> <version>")
	}
	return t, nil
}

func findTree(dir string) (string, error) {
	has := func(d string) bool {
		_, err := os.Stat(filepath.Join(d, "modules.dep"))
		return err == nil
	}
	if has(dir) {
		return dir, nil
	}
	var found []string
	for _, parent := range []string{dir, filepath.Join(dir, "lib/modules")} {
		entries, err := os.ReadDir(parent)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fault.Wrap(err, fault.NotFound, parent, "cannot be read")
		}
		for _, e := range entries {
			if d := filepath.Join(parent, e.Name()); has(d) {
				found = append(found, d)
			}
		}
	}
	switch len(found) {
	case 0:
		return "", fault.New(fault.NotFound, dir, "holds no kernel modules (no modules.dep)").
			WithHint("give the directory of one kernel version, such as /lib/modules/<version>; depmod writes its modules.dep")
	case 1:
		return found[0], nil
	}
	return "", fault.New(fault.Ambiguous, dir, "holds the modules of %d kernels", len(found)).
		WithHint("give the directory of one of them: %s", strings.Join(found, ", "))
}

// eachLine calls f with every line that is not blank. A missing file counts as empty for the optional
// modules.builtin only: findTree has seen modules.dep.
func eachLine(file string, f func(string)) error {
	h, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer h.Close()
	s := bufio.NewScanner(h)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if line := strings.TrimSpace(s.Text()); line != "" {
			f(line)
		}
	}
	return s.Err()
}

// Dir is the directory with modules.dep in it.
func (t *Tree) Dir() string { return t.dir }

// Order gives the files to load for wanted, relative to Dir, every module after those it needs and each
// once. What is built in is left out; what is required and neither a module nor built in is fault.Unsupported.
func (t *Tree) Order(wanted []Wanted) ([]string, error) {
	var order []string
	seen := map[string]bool{}
	var visit func(file string) error
	visit = func(file string) error {
		if seen[file] {
			return nil
		}
		seen[file] = true // before its needs: a cycle, which depmod reports as an error, ends here
		needs, ok := t.deps[file]
		if !ok {
			return fault.New(fault.Corrupt, t.dir, "its modules.dep names %s but does not list it", file)
		}
		for _, n := range needs {
			if err := visit(n); err != nil {
				return err
			}
		}
		order = append(order, file)
		return nil
	}
	for _, w := range wanted {
		name := ModuleName(w.Name)
		file, ok := t.files[name]
		if !ok {
			if w.Required && !t.builtin[name] {
				return nil, fault.New(fault.Unsupported, t.dir, "the kernel has no %s, which every sandbox needs", w.Name).
					WithHint("use a kernel with %s, or the one of the runtime bundle", w.Name)
			}
			continue
		}
		if err := visit(file); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// Read gives a module's content, unpacked. file is relative to Dir.
func (t *Tree) Read(file string) ([]byte, error) {
	full := filepath.Join(t.dir, filepath.FromSlash(file))
	b, err := os.ReadFile(full)
	if err != nil {
		return nil, fault.Wrap(err, fault.Corrupt, t.dir, "a module that its modules.dep lists cannot be read")
	}
	var r io.Reader = bytes.NewReader(b)
	switch path.Ext(file) {
	case ".ko":
		return b, nil
	case ".xz":
		r, err = xz.NewReader(r)
	case ".zst":
		var z *zstd.Decoder
		if z, err = zstd.NewReader(r); err == nil {
			defer z.Close()
			r = z
		}
	case ".gz":
		r, err = gzip.NewReader(r)
	default:
		return nil, fault.New(fault.Unsupported, full, "is compressed in a way banger does not know")
	}
	if err == nil {
		if b, err = io.ReadAll(io.LimitReader(r, maxModule)); err == nil {
			return b, nil
		}
	}
	return nil, fault.Wrap(err, fault.Corrupt, full, "cannot be unpacked")
}

// Version is the kernel release that the modules were made for, from the vermagic of one of them:
// the directory's name may be anything.
func (t *Tree) Version() (string, error) {
	order, err := t.Order(InitrdModules())
	if err != nil {
		return "", err
	}
	for _, file := range order {
		b, err := t.Read(file)
		if err != nil {
			return "", err
		}
		if _, after, ok := bytes.Cut(b, []byte("\x00vermagic=")); ok {
			if v := firstWord(after); v != "" {
				return v, nil
			}
		}
	}
	return filepath.Base(t.dir), nil
}

// ModuleName gives the kernel's name of a module from its file: "virtio-rng.ko.xz" is virtio_rng. The kernel
// takes - and _ for the same.
func ModuleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}
