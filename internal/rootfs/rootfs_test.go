package rootfs

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// program is the head of an ELF file for a machine.
func program(machine uint16) string {
	b := make([]byte, 64)
	copy(b, "\x7fELF\x02\x01\x01")
	binary.LittleEndian.PutUint16(b[18:], machine)
	return string(b)
}

// filesystem makes an ext4 filesystem of files and, where the value begins with "->", symbolic links.
func filesystem(t *testing.T, files map[string]string) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(text, "->"); ok {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(text), 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	tool, err := ext4.FindTool(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "root.ext4")
	if err := tool.Make(context.Background(), out, ext4.Format{Kind: ext4.ReadOnly, Size: 32 << 20, Label: "root", Root: root}); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestCheckFindsInit(t *testing.T) {
	t.Parallel()
	many := map[string]string{"sbin/init": program(62)}
	for i := range 400 { // a directory with an index, of many blocks
		many[filepath.Join("sbin", strings.Repeat("x", 40)+string(rune('a'+i%26))+strings.Repeat("y", i/26))] = ""
	}
	for name, c := range map[string]struct {
		files map[string]string
		init  string
	}{
		"a program":                {map[string]string{"sbin/init": program(62)}, "/sbin/init"},
		"a script":                 {map[string]string{"sbin/init": "#!/bin/sh\n"}, "/sbin/init"},
		"merged usr, as Debian":    {map[string]string{"sbin": "->usr/sbin", "lib": "->usr/lib", "usr/sbin/init": "->/lib/systemd/systemd", "usr/lib/systemd/systemd": program(62)}, "/usr/lib/systemd/systemd"},
		"links that climb":         {map[string]string{"sbin/init": "->../../../usr/../bin/real", "bin/real": program(62), "usr/x": ""}, "/bin/real"},
		"a long link":              {map[string]string{"sbin/init": "->" + strings.Repeat("/.", 60) + "/bin/real", "bin/real": program(62), "usr/x": ""}, "/bin/real"},
		"only systemd":             {map[string]string{"usr/lib/systemd/systemd": program(62)}, "/usr/lib/systemd/systemd"},
		"among hundreds of others": {many, "/sbin/init"},
	} {
		info, err := Check(filesystem(t, c.files))
		if err != nil || info.Init != c.init || info.Filesystem != Ext4 || info.Bytes != 32<<20 {
			t.Errorf("%s: %+v, %v", name, info, err)
		}
	}
}

// An image made for containers needs no init if it says that banger's own is to run; with a file that a guest could not read
// it does.
func TestCheckReadsWhatContainersSay(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		files   map[string]string
		init    string
		command string // "" if nothing is said
		refused bool
	}{
		"no init":         {map[string]string{"etc/banger/image.json": `{"version":1,"no_init":true,"command":["/bin/app"]}`}, "", "/bin/app", false},
		"an init besides": {map[string]string{"sbin/init": "#!/bin/sh\n", "etc/banger/image.json": `{"version":1,"command":["/bin/app"]}`}, "/sbin/init", "/bin/app", false},
		"a link":          {map[string]string{"etc/banger/image.json": "->/opt/said", "opt/said": `{"version":1,"no_init":true,"command":["/bin/app"]}`}, "", "/bin/app", false},
		"none, by itself": {map[string]string{"etc/banger/image.json": `{"version":1}`}, "", "", true},
		"damaged":         {map[string]string{"sbin/init": "#!/bin/sh\n", "etc/banger/image.json": `{"version":`}, "/sbin/init", "", false},
		"of the future":   {map[string]string{"etc/banger/image.json": `{"version":99,"no_init":true}`}, "", "", true},
		"a directory":     {map[string]string{"sbin/init": "#!/bin/sh\n", "etc/banger/image.json/x": ""}, "/sbin/init", "", false},
		"too large":       {map[string]string{"sbin/init": "#!/bin/sh\n", "etc/banger/image.json": `{"version":1}` + strings.Repeat(" ", 1<<20)}, "/sbin/init", "", false},
	} {
		info, err := Check(filesystem(t, c.files))
		if c.refused {
			if !fault.Is(err, fault.Invalid) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		command := ""
		if info.Container != nil {
			command = strings.Join(info.Container.Command, " ")
		}
		if err != nil || info.Init != c.init || command != c.command {
			t.Errorf("%s: %+v, %v", name, info, err)
		}
	}
}

func TestCheckRefuses(t *testing.T) {
	t.Parallel()
	dirty := filesystem(t, map[string]string{"sbin/init": program(62)})
	edit(t, dirty, 1024+0x3A, 2) // s_state: errors, not valid
	cut := filesystem(t, map[string]string{"sbin/init": program(62)})
	if err := os.Truncate(cut, 1<<20); err != nil {
		t.Fatal(err)
	}
	plain := func(content string) string {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pad := strings.Repeat("\x00", 8192)
	for name, c := range map[string]struct {
		path string
		code fault.Code
		text string
	}{
		"no init":                {filesystem(t, map[string]string{"etc/hosts": "x"}), fault.Invalid, "has no init"},
		"init of arm64":          {filesystem(t, map[string]string{"sbin/init": program(183)}), fault.Invalid, "is for arm64"},
		"init that is text":      {filesystem(t, map[string]string{"sbin/init": "hello"}), fault.Invalid, "neither a program nor a script"},
		"init that is a folder":  {filesystem(t, map[string]string{"sbin/init/x": "hello"}), fault.Invalid, "is not a program"},
		"a loop of links":        {filesystem(t, map[string]string{"sbin/init": "->init"}), fault.Invalid, "has no init"},
		"cut off":                {cut, fault.Corrupt, "is cut off"},
		"an empty file":          {plain(""), fault.Invalid, "too short"},
		"zeroes":                 {plain(pad), fault.Invalid, "none of the filesystems"},
		"qcow2":                  {plain("QFI\xfb" + pad), fault.Invalid, "none of the filesystems"},
		"a disk with partitions": {plain(pad[:510] + "\x55\xaa" + pad), fault.Invalid, "none of the filesystems"},
		"a folder":               {t.TempDir(), fault.Invalid, "not a regular file"},
		"nothing":                {"/nowhere", fault.NotFound, "does not exist"},
	} {
		if _, err := Check(c.path); !fault.Is(err, c.code) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %s with %q", name, err, c.code, c.text)
		}
	}
	if _, err := Check(dirty); err == nil {
		t.Error("a filesystem that was not unmounted passes")
	}
}

func edit(t *testing.T, path string, at int64, value byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{value}, at); err != nil {
		t.Fatal(err)
	}
}

func TestOtherFilesystems(t *testing.T) {
	t.Parallel()
	head := make([]byte, 8192)
	binary.LittleEndian.PutUint32(head[1024:], 0xE0F5E1E2)
	head[1024+12] = 12
	binary.LittleEndian.PutUint32(head[1024+36:], 2)
	path := filepath.Join(t.TempDir(), "x")
	write := func() {
		if err := os.WriteFile(path, head, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write()
	if info, err := Check(path); err != nil || info.Filesystem != Erofs || info.Bytes != 8192 {
		t.Errorf("erofs: %+v, %v", info, err)
	}
	binary.LittleEndian.PutUint32(head[1024+36:], 3)
	write()
	if _, err := Check(path); !fault.Is(err, fault.Corrupt) {
		t.Errorf("erofs that is cut off: %v", err)
	}
	head = make([]byte, 8192)
	copy(head, "hsqs")
	binary.LittleEndian.PutUint64(head[40:], 5000)
	write()
	if info, err := Check(path); err != nil || info.Filesystem != Squashfs || info.Bytes != 5000 {
		t.Errorf("squashfs: %+v, %v", info, err)
	}
}

// FuzzCheck wants no file to crash or hang the look.
func FuzzCheck(f *testing.F) {
	root := filepath.Join(f.TempDir(), "root", "sbin")
	if err := os.MkdirAll(root, 0o755); err != nil {
		f.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "init"), []byte(program(62)), 0o755); err != nil {
		f.Fatal(err)
	}
	tool, err := ext4.FindTool(context.Background())
	if err != nil {
		f.Fatal(err)
	}
	path := filepath.Join(f.TempDir(), "fs")
	if err := tool.Make(context.Background(), path, ext4.Format{Kind: ext4.ReadOnly, Size: 1 << 20, Root: filepath.Dir(root)}); err != nil {
		f.Fatal(err)
	}
	sound, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(2048), []byte{1, 2, 3})
	f.Add(uint32(3*4096), []byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, at uint32, with []byte) {
		b := append([]byte(nil), sound...)
		copy(b[int(at)%len(b):], with)
		if p := int(at) % len(b); p > 1024 || p+len(with) < 2048 {
			path := filepath.Join(t.TempDir(), "fs")
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			_, _ = Check(path)
		}
	})
}
