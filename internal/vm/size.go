package vm

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Binary units, in bytes. G and GiB mean the same here; GB is refused because it means two things.
const (
	KiB int64 = 1 << (10 * (iota + 1))
	MiB
	GiB
	TiB
)

// ParseDiskSize reads the size of a disk in bytes: a number with a unit, as 16G, 16GiB, 512M, 1.5T;
// a whole number of MiB. what names the flag or the key in the error. A number without a unit is
// refused: nobody means 16 bytes, and 16 MiB or 16 GiB are equally likely. The limits are
// ValidateDiskSize's.
func ParseDiskSize(what, s string) (int64, error) {
	number, unit, err := splitSize(what, s, "16G")
	if err != nil {
		return 0, err
	}
	if unit == 0 && strings.Trim(number, "0") == "" {
		return 0, fault.New(fault.Invalid, what, "%q is zero", s).WithHint("type a size like 16G")
	}
	if unit == 0 {
		return 0, fault.New(fault.Invalid, what, "%q has no unit", s).WithHint("did you mean %sG?", strings.TrimSpace(s))
	}
	return wholeMiB(what, s, number, unit)
}

// ParseMemory reads a memory size in MiB: as ParseDiskSize, and a bare number is MiB.
func ParseMemory(what, s string) (int64, error) {
	number, unit, err := splitSize(what, s, "2048 (MiB) or 2G")
	if err != nil {
		return 0, err
	}
	if unit == 0 {
		unit = MiB
	}
	n, err := wholeMiB(what, s, number, unit)
	return n / MiB, err
}

// splitSize takes a size apart. unit is 0 if there is none.
func splitSize(what, s, example string) (number string, unit int64, err error) {
	t := strings.ToLower(strings.TrimSpace(s))
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, what, format, args...).WithHint("type a size like %s", example)
	}
	switch {
	case t == "":
		return "", 0, bad("is empty")
	case len(t) > 32:
		return "", 0, bad("%q... is too long for a size", t[:32])
	case strings.HasPrefix(t, "-"):
		return "", 0, bad("%q is negative", s)
	}
	end := strings.IndexFunc(t, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	if end < 0 {
		end = len(t)
	}
	number = t[:end]
	if whole, _, _ := strings.Cut(number, "."); whole == "" || strings.Count(number, ".") > 1 || strings.HasSuffix(number, ".") {
		return "", 0, bad("%q is not a size", s)
	}
	switch strings.TrimSpace(t[end:]) {
	case "":
		if strings.Contains(number, ".") {
			return "", 0, bad("%q has no unit", s)
		}
	case "m", "mib":
		unit = MiB
	case "g", "gib":
		unit = GiB
	case "t", "tib":
		unit = TiB
	case "k", "kib":
		unit = KiB
	case "kb", "mb", "gb", "tb":
		return "", 0, fault.New(fault.Invalid, what, "%q could mean thousands or 1024s", s).
			WithHint("type %s%s", number, strings.ToUpper(t[end:][strings.IndexAny(t[end:], "kmgt"):][:1]))
	default:
		return "", 0, bad("%q is not a size", s)
	}
	return number, unit, nil
}

// wholeMiB multiplies without rounding: a size that was asked for is what is made, or is refused.
func wholeMiB(what, s, number string, unit int64) (int64, error) {
	tooLarge := fault.New(fault.Invalid, what, "%q is absurdly large", s).WithHint("type a size like 16G")
	whole, fraction, _ := strings.Cut(number, ".")
	n, err := strconv.ParseInt(whole, 10, 64)
	if err != nil || n > math.MaxInt64/unit {
		return 0, tooLarge
	}
	n *= unit
	if fraction != "" {
		scale := int64(1)
		for range fraction {
			if scale *= 10; scale > 1_000_000 {
				return 0, fault.New(fault.Invalid, what, "%q has more than six decimals", s).WithHint("give it in MiB, as 1536M")
			}
		}
		f, err := strconv.ParseInt(fraction, 10, 64)
		if err != nil || n > math.MaxInt64-unit {
			return 0, tooLarge
		}
		if f*unit%(scale*MiB) != 0 && unit > KiB { // f < 1e6 and unit <= 2^40: no overflow
			return 0, fault.New(fault.Invalid, what, "%q is not a whole number of MiB", s).
				WithHint("did you mean %s?", FormatSize(max(1, (n+f*unit/scale)/MiB)*MiB))
		}
		n += f * unit / scale
	}
	switch {
	case n == 0:
		return 0, fault.New(fault.Invalid, what, "%q is zero", s).WithHint("type a size like 16G")
	case n%MiB != 0:
		return 0, fault.New(fault.Invalid, what, "%q is not a whole number of MiB", s).
			WithHint("did you mean %s?", FormatSize(max(1, n/MiB)*MiB))
	}
	return n, nil
}

// FormatSize renders bytes as ParseDiskSize reads them, exactly where they are whole MiB (16G,
// 1536M), else rounded to a tenth of the unit (1.3G, 12.5M, 40K).
func FormatSize(bytes int64) string {
	units := []struct {
		size   int64
		letter string
	}{{TiB, "T"}, {GiB, "G"}, {MiB, "M"}, {KiB, "K"}}
	for _, u := range units {
		if bytes >= u.size && bytes%u.size == 0 {
			return strconv.FormatInt(bytes/u.size, 10) + u.letter
		}
		if bytes >= u.size && bytes%MiB != 0 {
			return strings.TrimSuffix(fmt.Sprintf("%.1f", float64(bytes)/float64(u.size)), ".0") + u.letter
		}
	}
	return strconv.FormatInt(bytes, 10)
}
