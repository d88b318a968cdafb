package boot

import (
	"net"
	"path"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

const minSecret = 16 // bytes; a shorter one could be guessed by whoever records a handshake

// Validate checks a config before it is rendered and after it is read. fault.Invalid names the
// field. It does not look at any filesystem.
func (c Config) Validate() error {
	invalid := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "guest config", format, args...)
	}
	if c.Version < 1 || c.Version > ConfigVersion {
		return invalid("version %d is not between 1 and %d", c.Version, ConfigVersion)
	}
	if c.VMID == "" {
		return invalid("vm_id is empty")
	}
	if !validHostname(c.Hostname) {
		return invalid("hostname %q is not made of DNS labels (RFC 1123)", c.Hostname)
	}
	if !validMachineID(c.MachineID) {
		return invalid("machine_id %q is not 32 lower-case hex digits, not all zero (machine-id(5))", c.MachineID)
	}
	if len(c.Secret) < minSecret {
		return invalid("the secret has %d bytes, the least is %d", len(c.Secret), minSecret)
	}
	for _, m := range c.Mounts {
		if m.Role == "" || !validPath(m.Target) {
			return invalid("mount of drive %q at %q: the target must be an absolute, clean path below /", m.Role, m.Target)
		}
	}
	for _, p := range c.Native {
		if !validPath(p) {
			return invalid("native directory %q is not an absolute, clean path below /", p)
		}
	}
	for _, f := range c.Files {
		if !validPath(f.Path) {
			return invalid("file %q is not an absolute, clean path below /", f.Path)
		}
		if f.Mode&^0o7777 != 0 {
			return invalid("file %s: mode %o holds more than permission bits", f.Path, f.Mode)
		}
		if f.UID < 0 || f.GID < 0 {
			return invalid("file %s: owner %d:%d is negative", f.Path, f.UID, f.GID)
		}
	}
	for name, value := range c.Environment {
		if name == "" || strings.ContainsAny(name, "=\n\x00 \t#\"'") || strings.ContainsAny(value, "\n\x00") {
			return invalid("environment variable %q cannot be written to /etc/environment", name)
		}
	}
	if c.Network != nil {
		return c.Network.validate(invalid)
	}
	return nil
}

// Limits of a Network. A resolver looks at no more servers than this (MAXNS of glibc's resolv.h).
const (
	maxDNS    = 3
	minMTU    = 68   // RFC 791 3.2
	minMTUv6  = 1280 // RFC 8200 5: below it the kernel takes IPv6 off the interface
	maxMTU    = 65535
	maxRoutes = 64
)

func (n Network) validate(invalid func(format string, args ...any) error) error {
	if mac, err := net.ParseMAC(n.MAC); err != nil || len(mac) != 6 || mac.String() != n.MAC {
		return invalid("network: %q is no hardware address", n.MAC)
	}
	if n.MTU != 0 && (n.MTU < minMTU || n.MTU > maxMTU) {
		return invalid("network: an MTU of %d", n.MTU)
	}
	for _, a := range n.Addresses {
		switch {
		case !a.IsValid() || a.Addr().IsUnspecified() || a.Addr().IsMulticast() || a.Addr().Is4In6() || a.Bits() == 0:
			return invalid("network: %s is no address of an interface with its network's length", a)
		case a.Addr().Is6() && n.MTU != 0 && n.MTU < minMTUv6:
			return invalid("network: IPv6 needs an MTU of %d, not %d", minMTUv6, n.MTU)
		}
	}
	if len(n.Routes) > maxRoutes {
		return invalid("network: %d routes", len(n.Routes))
	}
	for _, r := range n.Routes {
		if !r.To.IsValid() || r.To != r.To.Masked() || !r.Via.IsValid() || r.To.Addr().Is4() != r.Via.Is4() || r.Via.IsUnspecified() {
			return invalid("network: no route to %s by %s", r.To, r.Via)
		}
	}
	if len(n.DNS) > maxDNS {
		return invalid("network: %d DNS servers, the most is %d", len(n.DNS), maxDNS)
	}
	for _, a := range n.DNS {
		if !a.IsValid() || a.IsUnspecified() || a.Zone() != "" {
			return invalid("network: %s is no address of a DNS server", a)
		}
	}
	for _, d := range n.Search {
		if !validHostname(d) {
			return invalid("network: search domain %q is not made of DNS labels (RFC 1123)", d)
		}
	}
	return nil
}

// validPath wants what path.Clean returns, so that two spellings of one path cannot disagree.
func validPath(p string) bool {
	return len(p) > 1 && p[0] == '/' && path.Clean(p) == p && !strings.ContainsAny(p, "\x00\n")
}

// validMachineID follows machine-id(5): 32 lower-case hex digits; all zero means unset.
func validMachineID(id string) bool {
	return len(id) == 32 && strings.Trim(id, "0123456789abcdef") == "" && strings.Trim(id, "0") != ""
}

// validHostname takes DNS labels of RFC 1123, 64 bytes in all (HOST_NAME_MAX of Linux).
func validHostname(h string) bool {
	if len(h) == 0 || len(h) > 64 {
		return false
	}
	for label := range strings.SplitSeq(h, ".") {
		if len(label) == 0 || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return false
		}
	}
	return true
}
