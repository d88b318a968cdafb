package kernel

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// elfKernel is the smallest file that passes for an x86-64 kernel, with a version banner.
func elfKernel(t *testing.T) []byte {
	t.Helper()
	body := append([]byte("Linux version %s\x00"), "Linux version 6.12.9-test (builder@host)\x00"...)
	body = append(body, bytes.Repeat([]byte("kernel"), 20000)...)
	const head = 64 + 56
	var b bytes.Buffer
	for _, v := range []any{
		elf.Header64{
			Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
			Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
		},
		elf.Prog64{Type: uint32(elf.PT_LOAD), Off: head, Filesz: uint64(len(body)), Memsz: uint64(len(body))},
	} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	return append(b.Bytes(), body...)
}

// bzImage wraps a payload as the kernel's build does, with a setup part of 3 sectors.
func bzImage(payload []byte) []byte {
	const setup = 4 * 512
	b := make([]byte, setup+32)
	b[hdrSetupSects] = 3
	copy(b[hdrMagic:], "HdrS")
	le := binary.LittleEndian
	le.PutUint16(b[hdrVersion:], 0x20f)
	le.PutUint16(b[hdrKernelVersion:], 0x300)
	copy(b[0x500:], "6.12.9-test (builder@host) #1\x00")
	le.PutUint32(b[hdrPayloadOffset:], 32)
	le.PutUint32(b[hdrPayloadLength:], uint32(len(payload)))
	return slices.Concat(b, payload, []byte("trailing padding"))
}

func compressed(t *testing.T, format string, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	var err error
	write := func(w interface {
		Write([]byte) (int, error)
		Close() error
	}) {
		if _, err = w.Write(b); err == nil {
			err = w.Close()
		}
	}
	switch format {
	case "none":
		return b
	case "gzip":
		write(gzip.NewWriter(&out))
		return out.Bytes() // the size is in its trailer
	case "zstd":
		w, _ := zstd.NewWriter(&out)
		write(w)
	case "xz":
		w, _ := xz.NewWriter(&out)
		write(w)
	case "lz4":
		w := lz4.NewWriter(&out)
		if err := w.Apply(lz4.LegacyOption(true)); err != nil {
			t.Fatal(err)
		}
		write(w)
	}
	if err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.AppendUint32(out.Bytes(), uint32(len(b)))
}

func TestUnpackEveryCompression(t *testing.T) {
	want := elfKernel(t)
	for _, format := range []string{"none", "gzip", "zstd", "xz", "lz4"} {
		image := bzImage(compressed(t, format, want))
		got, err := Unpack(image, "vmlinuz")
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes of %d, %v", format, len(got), len(want), err)
		}
		if v, err := Version(image, "vmlinuz"); v != "6.12.9-test" {
			t.Errorf("%s: version %q, %v", format, v, err)
		}
	}
	if got, err := Unpack(want, "vmlinux"); err != nil || !bytes.Equal(got, want) {
		t.Errorf("an ELF kernel: %v", err)
	}
	if v, err := Version(want, "vmlinux"); v != "6.12.9-test" {
		t.Errorf("version of an ELF kernel: %q, %v", v, err)
	}
}

func TestUnpackRefuses(t *testing.T) {
	good := elfKernel(t)
	old := bzImage(compressed(t, "gzip", good))
	binary.LittleEndian.PutUint16(old[hdrVersion:], 0x206)
	arm := slices.Clone(good)
	binary.LittleEndian.PutUint16(arm[18:], uint16(elf.EM_AARCH64))
	broken := compressed(t, "zstd", good)
	broken[len(broken)/2] ^= 0xff
	for name, c := range map[string]struct {
		image []byte
		code  fault.Code
		want  string
	}{
		"text":         {[]byte(strings.Repeat("no kernel ", 100)), fault.Corrupt, "neither"},
		"empty":        {nil, fault.Corrupt, "neither"},
		"old protocol": {old, fault.Unsupported, "2.06"},
		"cut bzImage":  {bzImage(compressed(t, "none", good))[:4000], fault.Corrupt, "cut short"},
		"cut ELF":      {good[:200], fault.Corrupt, "cut short"},
		"unknown":      {bzImage([]byte("BZh91AY&SY.........")), fault.Unsupported, "does not know"},
		"damaged":      {bzImage(broken), fault.Corrupt, "cannot be unpacked"},
		"other arch":   {arm, fault.Unsupported, "AARCH64"},
		"not ELF":      {bzImage(compressed(t, "gzip", []byte("hello"))), fault.Corrupt, "no ELF"},
	} {
		_, err := Unpack(c.image, "vmlinuz")
		if !fault.Is(err, c.code) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// tree writes a module tree whose modules' contents are their names.
func tree(t *testing.T, dep, builtin string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "6.12.9-test")
	write := func(name string, b []byte) {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("modules.dep", []byte(dep))
	write("modules.builtin", []byte(builtin))
	for _, line := range strings.Split(strings.TrimSpace(dep), "\n") {
		file, _, _ := strings.Cut(line, ":")
		content := []byte("module " + ModuleName(file) + "\x00vermagic=6.12.9-test SMP \x00")
		switch filepath.Ext(file) {
		case ".xz":
			content = compressed(t, "xz", content)
			content = content[:len(content)-4]
		case ".zst":
			content = compressed(t, "zstd", content)
			content = content[:len(content)-4]
		case ".gz":
			content = compressed(t, "gzip", content)
		}
		write(file, content)
	}
	return dir
}

const testDep = `kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio.ko:
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/char/hw_random/virtio-rng.ko.zst: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/fs/overlayfs/overlay.ko.gz:
kernel/sound/unwanted.ko:
`

func open(t *testing.T, dir string) *Tree {
	t.Helper()
	tr, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func TestModulesInOrderWithWhatTheyNeed(t *testing.T) {
	tr := open(t, tree(t, testDep, "kernel/fs/ext4/ext4.ko\n"))
	got, err := tr.Order(InitrdModules())
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"kernel/drivers/virtio/virtio.ko",
		"kernel/drivers/virtio/virtio_ring.ko",
		"kernel/drivers/block/virtio_blk.ko.xz",
		"kernel/drivers/char/hw_random/virtio-rng.ko.zst",
		"kernel/fs/overlayfs/overlay.ko.gz",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for _, file := range got {
		b, err := tr.Read(file)
		if err != nil || !bytes.HasPrefix(b, []byte("module "+ModuleName(file))) {
			t.Errorf("%s: %q, %v", file, b, err)
		}
	}
	if v, err := tr.Version(); v != "6.12.9-test" || err != nil {
		t.Errorf("Version() = %q, %v", v, err)
	}
}

func TestModuleTreesThatCannotServe(t *testing.T) {
	_, err := open(t, tree(t, testDep, "")).Order(InitrdModules())
	if !fault.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "ext4") {
		t.Errorf("without ext4: %v", err)
	}
	_, err = open(t, tree(t, "kernel/fs/ext4/ext4.ko: kernel/jbd2.ko\n", "")).Order([]Wanted{{"ext4", true}})
	if !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "jbd2") {
		t.Errorf("with a need that is not listed: %v", err)
	}
	if _, err := OpenTree(t.TempDir()); !fault.Is(err, fault.NotFound) {
		t.Errorf("an empty directory: %v", err)
	}
	// The parent of one version will do, of two it will not.
	dir := tree(t, testDep, "")
	if tr := open(t, filepath.Dir(dir)); tr.Dir() != dir {
		t.Errorf("Dir() = %s", tr.Dir())
	}
	if err := os.CopyFS(dir+"-2", os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenTree(filepath.Dir(dir)); !fault.Is(err, fault.Ambiguous) || !strings.Contains(fault.HintOf(err), dir+"-2") {
		t.Errorf("two versions: %v", err)
	}
}

func TestInitrd(t *testing.T) {
	tr := open(t, tree(t, testDep, "kernel/fs/ext4/ext4.ko\n"))
	first, err := BuildInitrd([]byte("agent one"), tr)
	if err != nil {
		t.Fatal(err)
	}
	again, err := BuildInitrd([]byte("agent one"), tr)
	if err != nil || !bytes.Equal(first, again) {
		t.Errorf("the same input gave another initrd (%v)", err)
	}
	second, err := RegenerateInitrd(first, []byte("another agent"), "initrd.img")
	if err != nil {
		t.Fatal(err)
	}
	fromScratch, err := BuildInitrd([]byte("another agent"), tr)
	if err != nil || !bytes.Equal(second, fromScratch) {
		t.Errorf("a regenerated initrd differs from one made from scratch (%v)", err)
	}
	entries, err := parseCPIO(second, "initrd.img")
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, e := range entries {
		got[e.name] = string(e.content)
	}
	if got["init"] != "another agent" {
		t.Errorf("/init is %q", got["init"])
	}
	if want := "virtio.ko\nvirtio_ring.ko\nvirtio_blk.ko\nvirtio-rng.ko\noverlay.ko\n"; got["banger/modules/order"] != want {
		t.Errorf("order is %q", got["banger/modules/order"])
	}
	if !strings.HasPrefix(got["banger/modules/virtio-rng.ko"], "module virtio_rng") {
		t.Errorf("a module is not unpacked: %q", got["banger/modules/virtio-rng.ko"])
	}
	if _, err := RegenerateInitrd([]byte("no archive"), nil, "foreign.img"); !fault.Is(err, fault.Corrupt) {
		t.Errorf("no cpio: %v", err)
	}
	foreign := appendCPIO(nil, []entry{{name: "init", mode: modeFile, content: []byte("busybox")}})
	if _, err := RegenerateInitrd(foreign, nil, "foreign.img"); !fault.Is(err, fault.Invalid) || IsOwn(foreign) || !IsOwn(first) {
		t.Errorf("a foreign initrd: %v", err)
	}
	for cut := 1; cut < len(first); cut += len(first)/50 + 1 {
		if _, err := parseCPIO(first[:cut], "x"); !fault.Is(err, fault.Corrupt) {
			t.Fatalf("cut at %d: %v", cut, err)
		}
	}
}

// Filesystems that not every guest has are carried, each with its own order, and not loaded with the others.
func TestInitrdCarriesFilesystemsOfRoots(t *testing.T) {
	const dep = testDep + "kernel/fs/erofs/erofs.ko: kernel/lib/libcrc32c.ko kernel/drivers/virtio/virtio.ko\nkernel/lib/libcrc32c.ko:\n"
	initrd, err := BuildInitrd([]byte("agent"), open(t, tree(t, dep, "kernel/fs/ext4/ext4.ko\nkernel/fs/squashfs/squashfs.ko\n")))
	if err != nil {
		t.Fatal(err)
	}
	entries, err := parseCPIO(initrd, "initrd.img")
	if err != nil {
		t.Fatal(err)
	}
	got, times := map[string]string{}, map[string]int{}
	for _, e := range entries {
		got[e.name] = string(e.content)
		times[e.name]++
	}
	order := got["banger/modules/order-erofs"]
	if !strings.HasSuffix(order, "erofs.ko\n") || !strings.Contains(order, "libcrc32c.ko\n") || strings.Contains(got["banger/modules/order"], "erofs") {
		t.Errorf("orders %q and %q", order, got["banger/modules/order"])
	}
	if got["banger/modules/erofs.ko"] == "" || got["banger/modules/libcrc32c.ko"] == "" || times["banger/modules/virtio.ko"] != 1 {
		t.Errorf("files %v", times)
	}
	if _, ok := got["banger/modules/order-squashfs"]; ok {
		t.Error("what is built in has an order")
	}
}

func TestForeignInitrdStaysBehindOurs(t *testing.T) {
	tr := open(t, tree(t, testDep, "kernel/fs/ext4/ext4.ko\n"))
	foreign := compressed(t, "zstd", []byte("a foreign archive"))
	own, err := BuildInitrd(nil, tr)
	if err != nil {
		t.Fatal(err)
	}
	both, err := JoinForeign(foreign, []byte("agent"), own, "initrd.img")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasSuffix(both, foreign) || (len(both)-len(foreign))%4 != 0 {
		t.Error("the foreign initrd is not whole, at a multiple of 4")
	}
	entries, err := parseCPIO(both, "joined")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.name != "banger" && !strings.HasPrefix(e.name, "banger/") {
			t.Errorf("%s may hide a file of the foreign initrd", e.name)
		}
	}
	if last := entries[len(entries)-1]; last.name != ForeignAgentPath || string(last.content) != "agent" {
		t.Errorf("the last entry is %s", last.name)
	}
}

// The header's layout, byte for byte: a reader of our own would agree with any mistake.
func TestCPIOFormat(t *testing.T) {
	got := appendCPIO(nil, []entry{{name: "dev/console", mode: modeDevice | 0o600, major: 5, minor: 1}, {name: "ab", mode: modeFile | 0o644, content: []byte("xyz")}})
	want := "070701" + "00000001" + "00002180" + "00000000" + "00000000" + "00000001" + "00000000" + "00000000" +
		"00000000" + "00000000" + "00000005" + "00000001" + "0000000c" + "00000000" + "dev/console\x00" + "\x00\x00" +
		"070701" + "00000002" + "000081a4" + "00000000" + "00000000" + "00000001" + "00000000" + "00000003" +
		"00000000" + "00000000" + "00000000" + "00000000" + "00000003" + "00000000" + "ab\x00" + "\x00\x00\x00" + "xyz" + "\x00" +
		"070701" + "00000000" + "00000000" + "00000000" + "00000000" + "00000001" + "00000000" + "00000000" +
		"00000000" + "00000000" + "00000000" + "00000000" + "0000000b" + "00000000" + "TRAILER!!!\x00" + "\x00\x00\x00"
	if d := cmp.Diff(want, string(got)); d != "" {
		t.Error(d)
	}
}

func TestModulesImage(t *testing.T) {
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	dir := tree(t, testDep, "")
	odd := filepath.Join(dir, "kernel/sound/unwanted.ko")
	if os.Geteuid() == 0 {
		if err := os.Chown(odd, 1234, 1234); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(t.TempDir(), "modules.ext4")
	if err := WriteModulesImage(t.Context(), open(t, dir), file); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sb, err := ext4.ReadSuperblock(f, file)
	if err != nil || sb.Journal || !sb.Clean() {
		t.Errorf("%+v, %v", sb, err)
	}
	debugfs := func(command string) string {
		out, err := exec.Command("debugfs", "-R", command, file).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
		return string(out)
	}
	if got := debugfs("stat /kernel/sound/unwanted.ko"); !strings.Contains(got, "User:     0   Group:     0") {
		t.Errorf("a module does not belong to root:\n%s", got)
	}
	if got := debugfs("cat /modules.dep"); !strings.HasSuffix(got, testDep) {
		t.Errorf("/modules.dep is\n%s", got)
	}
	if out, err := exec.Command("e2fsck", "-fn", file).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := WriteModulesImage(cancelled, open(t, dir), file); err == nil {
		t.Error("a cancelled build succeeded")
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(file), ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
