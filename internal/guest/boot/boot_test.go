package boot_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
)

func sample() boot.Config {
	return boot.Config{
		Version: boot.ConfigVersion, VMID: "aa12bb34", Hostname: "calm-otter.vm",
		MachineID: "0123456789abcdef0123456789abcdef", Secret: "0123456789abcdef", CID: 7,
		Mounts:      []boot.Mount{{Role: "work", Target: "/root", Options: "noatime", Grow: true}},
		Native:      []string{"/var/lib/docker"},
		Files:       []boot.File{{Path: "/etc/x", Mode: 0o640, UID: 1, GID: 2, Content: []byte("\x00\xff binary\n")}},
		Environment: map[string]string{"LANG": "C.UTF-8"},
		TimeUnixMS:  1234567890123,
		Network: &boot.Network{
			MAC: "02:00:00:00:00:01", MTU: 1420,
			Addresses: []netip.Prefix{netip.MustParsePrefix("172.30.0.2/24"), netip.MustParsePrefix("fd00::2/64")},
			Routes:    []boot.Route{{To: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("172.30.0.1")}},
			DNS:       []netip.Addr{netip.MustParseAddr("172.30.0.1")}, Search: []string{"vm"},
		},
	}
}

func TestDriveRoundTrip(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.tar")
	for _, size := range []int{0, 100, 5000} {
		want := sample()
		want.Files[0].Content = bytes.Repeat([]byte{0xa5}, size)
		if err := boot.WriteDrive(path, want); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != 0o600 || info.Size()%512 != 0 || info.Size() < 4096 {
			t.Errorf("mode %v, size %d: want 0600 and whole sectors, 4 KiB at least", info.Mode(), info.Size())
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		got, err := boot.ReadDrive(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		if size == 0 {
			got.Files[0].Content = want.Files[0].Content // JSON has one kind of empty
		}
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("read (+) differs from written (-):\n%s", diff)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 {
		t.Errorf("%v (%v): want the drive alone, no temporary file", left, err)
	}
}

func TestWriteDriveKeepsTheOldOneOnFailure(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.tar")
	if err := boot.WriteDrive(path, sample()); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	bad := sample()
	bad.Hostname = "-x"
	if err := boot.WriteDrive(path, bad); !fault.Is(err, fault.Invalid) {
		t.Errorf("got %v, want invalid", err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the drive changed (%v)", err)
	}
}

func archive(t testing.TB, name, content string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(content))})
	_, writeErr := io.WriteString(w, content)
	if err := errors.Join(err, writeErr, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestReadDriveRefuses(t *testing.T) {
	for _, c := range []struct {
		name  string
		drive []byte
		code  fault.Code
		says  string
	}{
		{"empty", nil, fault.Corrupt, "tar archive"},
		{"zeros", make([]byte, 4096), fault.Corrupt, "tar archive"},
		{"noise", bytes.Repeat([]byte("x"), 4096), fault.Corrupt, "tar archive"},
		{"other member", archive(t, "other", "{}"), fault.Corrupt, `"other"`},
		{"cut short", archive(t, boot.ConfigName, strings.Repeat(" ", 2000))[:1024], fault.Corrupt, "cut short"},
		{"no JSON", archive(t, boot.ConfigName, "hello"), fault.Corrupt, "not JSON"},
		{"newer", archive(t, boot.ConfigName, `{"version":2,"vm_id":{"new":"form"}}`), fault.VersionSkew, "version 2"},
		{"no version", archive(t, boot.ConfigName, `{}`), fault.Corrupt, "version 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := boot.ReadDrive(bytes.NewReader(c.drive))
			if !fault.Is(err, c.code) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %s with %q", err, c.code, c.says)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	for name, spoil := range map[string]func(*boot.Config){
		"vm_id":            func(c *boot.Config) { c.VMID = "" },
		"hostname":         func(c *boot.Config) { c.Hostname = strings.Repeat("a", 64) },
		"machine_id":       func(c *boot.Config) { c.MachineID = strings.Repeat("0", 32) },
		"secret":           func(c *boot.Config) { c.Secret = "short" },
		"mount":            func(c *boot.Config) { c.Mounts[0].Target = "/" },
		"native":           func(c *boot.Config) { c.Native[0] = "/a/../b" },
		"file":             func(c *boot.Config) { c.Files[0].Path = "etc/x" },
		"mode":             func(c *boot.Config) { c.Files[0].Mode = 0o100644 },
		"owner":            func(c *boot.Config) { c.Files[0].UID = -1 },
		"environment":      func(c *boot.Config) { c.Environment["A"] = "b\nc" },
		"hardware address": func(c *boot.Config) { c.Network.MAC = "02-00-00-00-00-01" },
		"MTU of 67":        func(c *boot.Config) { c.Network.MTU = 67 },
		"IPv6 needs":       func(c *boot.Config) { c.Network.MTU = 1279 },
		"0.0.0.0/24":       func(c *boot.Config) { c.Network.Addresses[0] = netip.MustParsePrefix("0.0.0.0/24") },
		"no route":         func(c *boot.Config) { c.Network.Routes[0].Via = netip.MustParseAddr("fd00::1") },
		"4 DNS servers":    func(c *boot.Config) { c.Network.DNS = make([]netip.Addr, 4) },
		"DNS server":       func(c *boot.Config) { c.Network.DNS[0] = netip.Addr{} },
		"search domain":    func(c *boot.Config) { c.Network.Search[0] = "a\nnameserver 1.1.1.1" },
	} {
		c := sample()
		if err := c.Validate(); err != nil {
			t.Fatal(err)
		}
		spoil(&c)
		if err := c.Validate(); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v, want an invalid fault that names it", name, err)
		}
	}
}

func TestFatalReason(t *testing.T) {
	for _, c := range []struct{ name, tail, stage, reason string }{
		{"none", "boot messages\n", "", ""},
		{"one", "x\n" + boot.FatalLine("root", "no\n init") + "reboot\n", "root", "no init"},
		{"last wins", boot.FatalLine("a", "b") + boot.FatalLine("c", "d: e"), "c", "d: e"},
		{"carriage return", "\r\nbanger: fatal: root: lost\r\n", "root", "lost"},
		{"not ended", "banger: fatal: root: lost", "root", "lost"},
		{"no stage", "banger: fatal: hello\n", "", ""},
		{"terminal tricks", "banger: fatal: root: \x1b[31mred\x07\n", "root", "red"},
	} {
		stage, reason, ok := boot.FatalReason([]byte(c.tail))
		if stage != c.stage || reason != c.reason || ok != (c.stage != "") {
			t.Errorf("%s: got %q, %q, %v", c.name, stage, reason, ok)
		}
	}
}

func FuzzReadDrive(f *testing.F) {
	f.Add(archive(f, boot.ConfigName, `{"version":1,"vm_id":"x","hostname":"x","machine_id":"0123456789abcdef0123456789abcdef","secret":"0123456789abcdef"}`))
	f.Add(make([]byte, 1024))
	f.Fuzz(func(t *testing.T, drive []byte) {
		if c, err := boot.ReadDrive(bytes.NewReader(drive)); err == nil && c.Validate() != nil {
			t.Error("an invalid config was read")
		}
		boot.FatalReason(drive)
	})
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"plain":                                    "plain",
		"\x1b[1;31mred\x1b[0m \x1b(Btext":          "red text",
		"\x1b]0;title\x07after":                    "after",
		"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\": "link",
		"\x1bPq secret \x1b\\x":                    "x",
		"a\x9b31mb":                                "a31mb",
		"over\rwrite\b\b":                          "overwrite",
		"one\ttwo\nthree":                          "one two three",
		"\u202eevil\u2066 \u200b\ufeff":            "evil",
		"\xff\xfe ok \xc3":                         "ok",
		"grüße 日本":                                 "grüße 日本",
		"\x1b":                                     "",
		"\x1b[":                                    "",
		strings.Repeat("é", 1000):                  strings.Repeat("é", 150) + "...",
	} {
		if got := boot.Printable(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func FuzzPrintable(f *testing.F) {
	for _, s := range []string{"\x1b[31m", "\x1b]0;", "\x9b", "\u202e", "a\nb", "\xff", "\x1b\x1b[[31mm", "\x1b[\x1b[31m31mred"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p := boot.Printable(s)
		if !utf8.ValidString(p) || strings.ContainsFunc(p, func(r rune) bool { return !unicode.IsPrint(r) }) || len(p) > 303 {
			t.Errorf("%q became %q", s, p)
		}
	})
}
