package vm

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Limits of a VM.
const (
	MaxName = 63 // one DNS label, RFC 1035 2.3.4

	MinVCPU = 1
	MaxVCPU = 32 // Firecracker's own limit (MAX_SUPPORTED_VCPUS)

	MinMemoryMiB = 128     // below it a Debian guest with systemd does not come up
	MaxMemoryMiB = 1 << 20 // 1 TiB: no sandbox, a typing error

	// MinDiskBytes holds a journal of 64 MiB and what a first boot writes, with room to work.
	MinDiskBytes = 512 * MiB
	// MaxDiskBytes is what the group descriptors of our filesystems have room for; internal/disk
	// has a test that holds it against internal/ext4.
	MaxDiskBytes = 2 * TiB

	MaxLabels     = 32
	maxLabelKey   = 63
	maxLabelValue = 255
)

// Host is what a Spec is measured against.
type Host struct {
	CPUs      int
	MemoryMiB int64
}

// ValidateName checks a VM's name: one DNS label in lower case (RFC 1123 2.1), since the name is
// the guest's hostname and its name under .vm. Refused as well are localhost, names of digits only
// (ssh and others read them as an IPv4 address), and names that look like an id as it is printed
// (12 hex digits or more, no other letter), since references may be either. A shorter name of
// hex digits (cafe) is fine: an exact name always wins over an id prefix.
func ValidateName(name string) error {
	bad := func(format string, args ...any) error {
		f := fault.New(fault.Invalid, "name "+quote(name), format, args...)
		if s := suggestName(name); s != "" {
			return f.WithHint("try --name %s", s)
		}
		return f.WithHint("choose a name like calm-otter, or leave --name out")
	}
	switch {
	case name == "":
		return bad("is empty")
	case len(name) > MaxName:
		return bad("is %d characters long; the limit is %d", len(name), MaxName)
	case name == "localhost":
		return bad("is reserved for the machine itself")
	}
	for _, r := range name {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '-':
		case r >= 'A' && r <= 'Z':
			return bad("has the upper-case letter %q; only a-z, 0-9 and hyphens may be used", r)
		default:
			return bad("has the character %q; only a-z, 0-9 and hyphens may be used", r)
		}
	}
	switch {
	case name[0] == '-' || name[len(name)-1] == '-':
		return bad("begins or ends with a hyphen")
	case strings.Trim(name, "0123456789") == "":
		return bad("has only digits and would be taken for an address")
	case len(name) >= 12 && strings.Trim(name, "0123456789abcdef") == "":
		return bad("looks like a VM's id")
	}
	return nil
}

// suggestName makes the nearest valid name, or "".
func suggestName(name string) string {
	if len(name) > 4*MaxName {
		return "" // nobody typed that
	}
	var b strings.Builder
	for _, r := range strings.ToLower(name) {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			b.WriteRune(r)
		} else if b.Len() > 0 && !strings.HasSuffix(b.String(), "-") {
			b.WriteByte('-')
		}
	}
	s := b.String()
	s = strings.Trim(s[:min(len(s), MaxName)], "-")
	if s == "" || s == "localhost" || strings.Trim(s, "0123456789abcdef") == "" {
		return ""
	}
	return s
}

// quote shortens what would flood a terminal.
func quote(s string) string {
	if len(s) > 80 {
		return fmt.Sprintf("%q...", s[:80])
	}
	return fmt.Sprintf("%q", s)
}

// ValidateDiskSize checks the size of a system or work disk in bytes; what names it. A work seed may
// set a higher minimum, which internal/disk knows.
func ValidateDiskSize(what string, bytes int64) error {
	switch {
	case bytes < MinDiskBytes:
		return fault.New(fault.Invalid, what, "%s is less than %s, the smallest disk", FormatSize(bytes), FormatSize(MinDiskBytes)).
			WithHint("type a size like 16G; disks are sparse and take only what is written")
	case bytes > MaxDiskBytes:
		return fault.New(fault.Invalid, what, "%s is more than %s, the largest its filesystem can become", FormatSize(bytes), FormatSize(MaxDiskBytes)).
			WithHint("type a size like 16G; a disk can be enlarged later, never made smaller")
	case bytes%MiB != 0:
		return fault.New(fault.Invalid, what, "%d bytes is not a whole number of MiB", bytes).WithHint("type a size like 16G")
	}
	return nil
}

// Validate checks all settings against the limits. h's memory
// bounds the guest's, since a guest that can never have its memory is a mistake; zero means unknown.
// More vCPUs than the host has are allowed, see Notices.
func (s Spec) Validate(h Host) error {
	if s.VCPU < MinVCPU || s.VCPU > MaxVCPU {
		return fault.New(fault.Invalid, "vcpu", "%d is not between %d and %d", s.VCPU, MinVCPU, MaxVCPU).
			WithHint("try --vcpu %d", min(max(s.VCPU, MinVCPU), max(MinVCPU, min(h.CPUs, MaxVCPU))))
	}
	limit, why := int64(MaxMemoryMiB), "no VM may have more"
	if h.MemoryMiB > 0 && h.MemoryMiB < limit {
		limit, why = h.MemoryMiB, "the host has no more"
	}
	switch {
	case s.MemoryMiB < MinMemoryMiB:
		return fault.New(fault.Invalid, "memory", "%d MiB is less than %d MiB, the least that boots", s.MemoryMiB, MinMemoryMiB).
			WithHint("try --memory 2G; a bare number is MiB")
	case s.MemoryMiB > limit:
		return fault.New(fault.Invalid, "memory", "%d MiB is more than %d MiB; %s", s.MemoryMiB, limit, why).
			WithHint("try --memory %d; a bare number is MiB", max(MinMemoryMiB, min(limit/2, 2048)))
	}
	if err := ValidateDiskSize("disk size", s.DiskSize); err != nil {
		return err
	}
	if err := ValidateDiskSize("system size", s.SystemSize); err != nil {
		return err
	}
	if err := ValidateNetworkGroup(s.NetworkGroup); err != nil {
		return err
	}
	return ValidateLabels(s.Labels)
}

// ValidateNetworkGroup checks the name of a network group: "" for none, else at most 63 of a-z, 0-9
// and hyphens, with a letter or digit at both ends.
func ValidateNetworkGroup(group string) error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "network group "+quote(group), format, args...).WithHint("write groups like --network-group team-web")
	}
	switch {
	case group == "":
		return nil
	case len(group) > MaxName:
		return bad("is %d characters long; the limit is %d", len(group), MaxName)
	case strings.Trim(group, "abcdefghijklmnopqrstuvwxyz0123456789-") != "":
		return bad("has other characters than a-z, 0-9 and hyphens")
	case group[0] == '-' || group[len(group)-1] == '-':
		return bad("begins or ends with a hyphen")
	}
	return nil
}

// Notices tells, one sentence each, what is allowed but probably not meant.
func (s Spec) Notices(h Host) []string {
	var n []string
	if h.CPUs > 0 && s.VCPU > h.CPUs {
		n = append(n, fmt.Sprintf("%d vCPUs share the host's %d; more than it has make a VM slower, not faster", s.VCPU, h.CPUs))
	}
	return n
}

// ValidateLabels checks labels: at most 32; keys of a-z, 0-9, dot, slash, underscore and hyphen that
// begin and end with a letter or digit; values of printable characters, at most 255 bytes.
func ValidateLabels(labels map[string]string) error {
	if len(labels) > MaxLabels {
		return fault.New(fault.Invalid, "labels", "there are %d; the limit is %d", len(labels), MaxLabels).WithHint("leave some out")
	}
	alnum := func(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		bad := func(format string, args ...any) error {
			return fault.New(fault.Invalid, "label "+quote(k), format, args...).WithHint("write labels like --label team=web")
		}
		v := labels[k]
		switch {
		case k == "":
			return bad("has no key")
		case len(k) > maxLabelKey:
			return bad("has a key of %d characters; the limit is %d", len(k), maxLabelKey)
		case !alnum(k[0]) || !alnum(k[len(k)-1]):
			return bad("must begin and end with a-z or 0-9")
		case len(v) > maxLabelValue:
			return bad("has a value of %d bytes; the limit is %d", len(v), maxLabelValue)
		case strings.ToValidUTF8(v, "") != v || strings.ContainsFunc(v, func(r rune) bool { return !unicode.IsPrint(r) }):
			return bad("has a value with unprintable characters")
		}
		for _, r := range k {
			if (r > unicode.MaxASCII || !alnum(byte(r))) && !strings.ContainsRune("._/-", r) {
				return bad("has the character %q in its key; a-z, 0-9 and . _ / - may be used", r)
			}
		}
	}
	return nil
}
