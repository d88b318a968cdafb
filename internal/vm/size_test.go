package vm

import (
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func TestParseDiskSize(t *testing.T) {
	for in, want := range map[string]int64{
		"4G": 4 * GiB, "4GiB": 4 * GiB, "4g": 4 * GiB, "4gib": 4 * GiB, " 16G ": 16 * GiB, "16 GiB": 16 * GiB,
		"512M": 512 * MiB, "1.5G": 1536 * MiB, "0.5t": 512 * GiB, "2T": 2 * TiB, "2048K": 2 * MiB, "1.000000G": GiB,
	} {
		got, err := ParseDiskSize("disk size", in)
		if err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", in, got, err, want)
		}
	}
	for in, hint := range map[string]string{
		"": "16G", "16": "did you mean 16G?", "0": "16G", "-1G": "16G", "G": "16G", "1.5": "16G", "1..5G": "16G", ".5G": "16G", "5.G": "16G",
		"4GB": "type 4G", "4 gb": "type 4G", "1e3G": "16G", "0x10G": "16G", "NaN": "16G", "inf": "16G", "4Q": "16G", "4G 4G": "16G", "٤G": "16G",
		"0G": "", "9999999999T": "", "99999999999999999999999G": "", "1K": "did you mean 1M?", "0.1G": "did you mean 102M?",
		"1.0000001G": "1536M", "8388607.9T": "", strings.Repeat("9", 100) + "G": "16G", "1.5K": "did you mean 1M?",
	} {
		got, err := ParseDiskSize("disk size", in)
		if !fault.Is(err, fault.Invalid) || got != 0 {
			t.Errorf("%q: %d, %v; want invalid", in, got, err)
			continue
		}
		if !strings.Contains(err.Error(), "disk size") || !strings.Contains(fault.HintOf(err), hint) {
			t.Errorf("%q: %v, hint %q; want it to name the thing and hint %q", in, err, fault.HintOf(err), hint)
		}
	}
}

func TestParseMemory(t *testing.T) {
	for in, want := range map[string]int64{"2048": 2048, "2G": 2048, "512M": 512, "1.5GiB": 1536} {
		if got, err := ParseMemory("memory", in); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "0", "-5", "lots", "1.5", "9223372036854775807"} {
		if got, err := ParseMemory("memory", in); !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: %d, %v; want invalid", in, got, err)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{16 * GiB: "16G", 1536 * MiB: "1536M", TiB: "1T", 0: "0", 100: "100", 4096: "4K",
		GiB + 300*MiB + 1: "1.3G", 12*MiB + 512*KiB: "12.5M", 1000 * GiB: "1000G"} {
		if got := FormatSize(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

// Whatever is typed: no panic, no negative or zero size, and what is accepted round-trips exactly.
func FuzzParseDiskSize(f *testing.F) {
	for _, s := range []string{"4G", "1.5GiB", "-1", "9999999999T", "٤", "0x1", "1e9G", "8388607.999999T", "gb", " . "} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseDiskSize("size", s)
		if err != nil {
			if n != 0 || !fault.Is(err, fault.Invalid) {
				t.Fatalf("%q: %d, %v", s, n, err)
			}
			return
		}
		if n <= 0 || n%MiB != 0 {
			t.Fatalf("%q: accepted as %d", s, n)
		}
		if back, err := ParseDiskSize("size", FormatSize(n)); err != nil || back != n {
			t.Fatalf("%q is %d, shown as %s, read back as %d, %v", s, n, FormatSize(n), back, err)
		}
		if _, err := ParseMemory("memory", s); err != nil {
			t.Fatalf("%q is a disk size but no memory size: %v", s, err)
		}
	})
}
