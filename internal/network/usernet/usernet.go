// Package usernet owns the user network: a guest's network without any privilege on the host. A TCP/IP stack in a
// program of its own ends the guest's connections and makes its own to where the guest wanted to go; the other way round,
// it listens on a loopback address of the host's and connects to the guest.
//
// One such program serves one VM and outlives the daemon as the VMM does, which is connected to it by a unix socket. It
// opens no TUN, sets no route, address or filter of the host, and keeps nothing on disk.
package usernet

import (
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/netip"
	"slices"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// MTU of the guest's interface, in bytes. No link of the host has to carry its packets: TCP ends in the stack, and the
// kernel fragments the rest. Fewer, larger packets are most of the speed; this is the largest multiple of four (passt(1)
// takes the same).
const MTU = 65520

// Config is what a program is started with, and has for its life.
type Config struct {
	Name     string       `json:"name,omitempty"`  // of the VM: all that the guest finds under .vm
	MAC      string       `json:"mac"`             // of the gateway, as the guest sees it
	Guest4   netip.Prefix `json:"guest4"`          // the guest's address and its network's length
	Gateway4 netip.Addr   `json:"gateway4"`        // the stack's own address: it answers DNS there
	Guest6   netip.Prefix `json:"guest6,omitzero"` // zero: no IPv6
	Gateway6 netip.Addr   `json:"gateway6,omitzero"`
	MTU      int          `json:"mtu"`
	Publish  netip.Addr   `json:"publish"` // of the host, in 127.0.0.0/8: where the guest's ports are
	// KeyHash is the SHA-256, in hex, of what a connection begins with where the guest itself connects: any program in
	// it can, and one of them alone is to be its network interface. A hash, since arguments of programs are
	// everybody's to read. "": the VMM connects, and has nothing to show.
	KeyHash string `json:"key_hash,omitempty"`
}

// Settings can be changed while the guest runs.
type Settings struct {
	NAT   bool     `json:"nat"`   // the guest may go out
	Ports []uint16 `json:"ports"` // of TCP, to be published; nil: those that are
}

// Status is what a program says of itself.
type Status struct {
	Settings
	Attached bool              `json:"attached"`         // a VMM is connected
	Failed   map[uint16]string `json:"failed,omitempty"` // ports that are not published, and why
	TCP      int               `json:"tcp"`              // connections and flows that are open
	UDP      int               `json:"udp"`
}

// loopback is where guests' ports are published. Addresses under 127.0 are taken by others: systemd-resolved has 127.0.0.53
// and 127.0.0.54, Debian's /etc/hosts 127.0.1.1.
var loopback = netip.MustParsePrefix("127.0.0.0/8")

// PublishAddr is the loopback address of the VM with a lease's slot in an installation: the second byte is the installation's, the others are
// the slot's. Two users of a host get different ones, unless their installations' ids meet in one byte of a
// hash; then they see it as ports that are taken.
func PublishAddr(installation string, slot int) netip.Addr {
	a := loopbackOf(installation).Addr().As4()
	n := slot + 1 // no address ends in two zero bytes: it would look like a network's
	a[2], a[3] = byte(n>>8), byte(n)
	return netip.AddrFrom4(a)
}

// loopbackOf is the range that PublishAddr chooses from.
func loopbackOf(installation string) netip.Prefix {
	hash := uint32(2166136261) // FNV-1a
	for _, c := range []byte(installation) {
		hash = (hash ^ uint32(c)) * 16777619
	}
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{127, byte(hash%254) + 1}), 16)
}

// Validate says what is wrong with a configuration: fault.Invalid.
func (c Config) Validate() error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "user network", format, args...)
	}
	mac, err := net.ParseMAC(c.MAC)
	switch {
	case err != nil || len(mac) != 6 || mac[0]&1 != 0:
		return bad("%q is no hardware address of a network interface", c.MAC)
	case !c.Guest4.IsValid() || !c.Guest4.Addr().Is4():
		return bad("the guest has no IPv4 address")
	case !c.Gateway4.IsValid() || !c.Guest4.Contains(c.Gateway4) || c.Gateway4 == c.Guest4.Addr():
		return bad("%s is no gateway of %s", c.Gateway4, c.Guest4)
	case c.Guest6.IsValid() && (!c.Guest6.Addr().Is6() || !c.Guest6.Contains(c.Gateway6) || c.Gateway6 == c.Guest6.Addr()):
		return bad("%s is no gateway of %s", c.Gateway6, c.Guest6)
	case c.MTU < 1280 || c.MTU > MTU: // RFC 8200 5
		return bad("an MTU of %d; it may be from 1280 to %d", c.MTU, MTU)
	case c.KeyHash != "" && !isHash(c.KeyHash):
		return bad("%q is no SHA-256 in hex", c.KeyHash)
	case !loopback.Contains(c.Publish):
		return bad("ports would be published at %s, which is not in %s", c.Publish, loopback)
	}
	return nil
}

func isHash(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size
}

// clean sorts ports, and takes out what is there twice, and port 0.
func clean(ports []uint16) []uint16 {
	ports = slices.Clone(ports)
	slices.Sort(ports)
	return slices.DeleteFunc(slices.Compact(ports), func(p uint16) bool { return p == 0 })
}
