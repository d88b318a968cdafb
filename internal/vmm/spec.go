package vmm

import (
	"net"
	"path/filepath"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// The longest names, in bytes. A Marker of both has 64: the most that Firecracker takes for an --id,
// which may have letters, digits and dashes (its docs, and validate_instance_id of its source).
const (
	longestID    = 32
	longestOwner = 24
)

// named says whether s is made of letters and digits, and dashes if they are allowed, and has one to
// longest of them. An id may not hold a dash and an owner may, so that the last dash of a Marker always splits it
// into the same two parts: no two machines can share a marker. Not regular expressions: those would be
// compiled at each of the three starts of the guest program in a boot.
func named(s string, longest int, dashes bool) bool {
	for _, c := range []byte(s) {
		switch {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c == '-' && dashes:
		default:
			return false
		}
	}
	return len(s) >= 1 && len(s) <= longest
}

// Marker is the argument that every VMM of this machine carries on its command line, alone and
// exactly: it is how a process is known to be this installation's and this VM's.
func (s Spec) Marker() string { return "banger-" + s.Owner + "-" + s.ID }

func (s Spec) invalid(format string, args ...any) error {
	return fault.New(fault.Invalid, s.Name, format, args...).WithOp("vmm spec")
}

// ValidateIdentity looks at what it takes to find a running machine: ID, Owner, RunDir and Log.
// fault.Invalid names the field.
func (s Spec) ValidateIdentity() error {
	switch {
	case !named(s.ID, longestID, false):
		return s.invalid("machine id %q is not made of 1 to %d letters and digits", s.ID, longestID)
	case !named(s.Owner, longestOwner, true):
		return s.invalid("owner %q is not made of 1 to %d letters, digits and dashes", s.Owner, longestOwner)
	}
	for _, p := range []struct{ what, path string }{{"run directory", s.RunDir}, {"log", s.Log}} {
		if !filepath.IsAbs(p.path) {
			return s.invalid("the path of the %s is not absolute: %q", p.what, p.path)
		}
	}
	return nil
}

// Validate looks at what every driver needs to start a machine, without touching the host.
// fault.Invalid names the field. Limits of a driver or of the host are the driver's to check.
func (s Spec) Validate() error {
	if err := s.ValidateIdentity(); err != nil {
		return err
	}
	bad := s.invalid
	switch {
	case s.VCPU < 1:
		return bad("%d virtual CPUs", s.VCPU)
	case s.MemoryMiB < 1:
		return bad("%d MiB of memory", s.MemoryMiB)
	}
	type path struct{ what, path string }
	paths := []path{{"kernel", s.Kernel}, {"initrd", s.Initrd}}
	seen := map[Role]bool{}
	for _, d := range s.Drives {
		if d.Role == "" {
			return bad("a drive has no role: %s", d.Path)
		}
		if seen[d.Role] {
			return bad("two drives have the role %s", d.Role)
		}
		seen[d.Role] = true
		paths = append(paths, path{"drive " + string(d.Role), d.Path})
	}
	macs := map[string]bool{}
	for _, n := range s.NICs {
		switch {
		case !stationMAC(n.MAC):
			return bad("%q is no hardware address of a network interface", n.MAC)
		case macs[n.MAC]:
			return bad("two network interfaces have the hardware address %s", n.MAC)
		case n.MTU != 0 && (n.MTU < 68 || n.MTU > 65535): // RFC 791 3.2; the field of virtio has 16 bits
			return bad("network interface %s: an MTU of %d", n.MAC, n.MTU)
		case (n.TAP == "") == (n.Socket == ""):
			return bad("network interface %s has not exactly one of TAP and socket", n.MAC)
		case n.TAP != "" && !interfaceName(n.TAP):
			return bad("%q is no name of a network device", n.TAP)
		case n.Socket != "":
			paths = append(paths, path{"socket of network interface " + n.MAC, n.Socket})
		}
		macs[n.MAC] = true
	}
	for _, p := range paths {
		if !filepath.IsAbs(p.path) {
			return bad("the path of the %s is not absolute: %q", p.what, p.path)
		}
	}
	return nil
}

// stationMAC says whether s is an address of one station as NIC writes it: not a group's, not zero.
func stationMAC(s string) bool {
	mac, err := net.ParseMAC(s)
	return err == nil && len(mac) == 6 && mac.String() == s && mac[0]&1 == 0 && s != "00:00:00:00:00:00"
}

// interfaceName says whether s may name a network device: the kernel's dev_valid_name, without the
// characters that VMMs give a meaning of their own, as the % by which the kernel counts.
func interfaceName(s string) bool {
	for _, c := range []byte(s) {
		switch {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return len(s) >= 1 && len(s) <= 15 && s != "." && s != ".."
}
