package console_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/console"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestEnd(t *testing.T) {
	const restarting = "[    9.1] reboot: Restarting system\n"
	long := strings.Repeat("a line of an earlier run\n", 10_000)
	for _, c := range []struct {
		name, log string
		from      int64
		want      string
	}{
		{"nothing", "", 0, ""},
		{"killed", "boot\n", 0, ""},
		{"off, told by a reset", "boot\n\r\nbanger: end: poweroff\r\n" + restarting, 0, vmm.GuestShutdown},
		{"reboot", long + "\nbanger: end: reboot\n" + restarting, 0, vmm.GuestReset},
		{"reboot -f: the kernel's word alone", "boot\n" + restarting, 0, vmm.GuestReset},
		{"off by a power switch", "[    9.1] reboot: Power down\n", 0, vmm.GuestShutdown},
		{"panic", "[    9.1] Kernel panic - not syncing: sysrq triggered crash\n", 0, vmm.GuestReset},
		{"an earlier start's word", "\nbanger: end: poweroff\n\n" + console.StartMark + "now\nboot\n", 0, ""},
		{"a word before the start", "\nbanger: end: poweroff\n", 23, ""},
		{"a log that was cut back, and grew past where it began", strings.Repeat("x", console.Keep-10) + "\nbanger: end: poweroff\n", console.Keep + 8, vmm.GuestShutdown},
		{"a log that was cut back", "\nbanger: end: poweroff\n", 1 << 20, vmm.GuestShutdown},
	} {
		if got := console.End(write(t, c.log), c.from); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	if got := console.End(filepath.Join(t.TempDir(), "none"), 0); got != "" {
		t.Errorf("without a log: %q", got)
	}
}

func TestMarkStart(t *testing.T) {
	path := write(t, "before")
	if err := console.MarkStart(path); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(console.SinceStart(append(b, "after\n"...))); got != "after\n" || !strings.HasPrefix(string(b), "before\n"+console.StartMark) {
		t.Errorf("%q in %q", got, b)
	}
}

func TestQuote(t *testing.T) {
	for want, path := range map[string]string{
		", and said nothing": write(t, "before\n  \n"),
		": later":            write(t, "before\nlater\n"),
	} {
		if got := console.Quote(path, 7); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if got := console.Quote(write(t, strings.Repeat("x", 1<<20)), 0); len(got) > 2100 {
		t.Errorf("%d bytes are quoted", len(got))
	}
}
