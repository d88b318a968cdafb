package network

import (
	"encoding/binary"
	"net/netip"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Used is a range that the host has addresses in, or a route to.
type Used struct {
	Range netip.Prefix
	By    string // the device, for people
}

// defaultLike is the length up to which a route is one to everywhere: VPNs split the default route in two.
const defaultLike = 3

// Conflict says whether what the host uses overlaps the plan's ranges: fault.Exists, whose hint has a
// range that is free.
func Conflict(p Plan, used []Used) error {
	for _, u := range used {
		if u.Range.Bits() <= defaultLike {
			continue
		}
		switch {
		case u.Range.Overlaps(p.IPv4):
			f := fault.New(fault.Exists, p.IPv4.String(), "the host reaches %s by %s, which overlaps the range for VMs", u.Range, u.By).WithOp("host network")
			if free := Free(p.IPv4.Bits(), used); free.IsValid() {
				return f.WithHint("choose another range in config.toml, as cidr = \"%s\", then `banger daemon stop`", free)
			}
			return f.WithHint("choose a range that nothing uses, as cidr in config.toml")
		case p.IPv6.IsValid() && u.Range.Overlaps(p.IPv6):
			return fault.New(fault.Exists, p.IPv6.String(), "the host reaches %s by %s, which overlaps the range for VMs", u.Range, u.By).WithOp("host network").
				WithHint("choose another range in config.toml, or ipv6_cidr = \"auto\", then `banger daemon stop`")
		}
	}
	return nil
}

// Free finds a private IPv4 range (RFC 1918) of a length that nothing uses; zero if there is none. It looks first
// where Docker, libvirt and home routers do not.
func Free(bits int, used []Used) netip.Prefix {
	for _, pool := range []string{"172.16.0.0/16", "10.64.0.0/10", "10.128.0.0/9", "192.168.128.0/17"} {
		in := netip.MustParsePrefix(pool)
		if bits < in.Bits() {
			continue
		}
		first := in.Addr().As4()
		base, step := binary.BigEndian.Uint32(first[:]), uint32(1)<<(32-bits)
		for n := uint32(0); n < uint32(1)<<(bits-in.Bits()) && n < 1<<12; n++ {
			var a [4]byte
			binary.BigEndian.PutUint32(a[:], base+n*step)
			candidate := netip.PrefixFrom(netip.AddrFrom4(a), bits)
			if !overlapsAny(candidate, used) {
				return candidate
			}
		}
	}
	return netip.Prefix{}
}

func overlapsAny(p netip.Prefix, used []Used) bool {
	for _, u := range used {
		if u.Range.Bits() > defaultLike && u.Range.Overlaps(p) {
			return true
		}
	}
	return false
}
