// Package boot owns what host and guest agree on about booting: the guest configuration, the
// config drive that carries it, the kernel command line, and the console markers of a failed boot.
//
// It runs on both sides and does nothing to either: internal/guest/pid1 is the program that
// boots, capabilities of internal/sandbox contribute the content.
package boot

import (
	"crypto/hmac"
	"crypto/sha256"
	"net/netip"
)

// ConfigVersion is the version of Config. A guest program refuses a config newer than it knows.
const ConfigVersion = 1

// ConfigName is the first member of the config drive's tar.
const ConfigName = "config.json"

// Config is what a guest is told at boot. It is made afresh by the host for every start.
type Config struct {
	Version   int    `json:"version"`
	VMID      string `json:"vm_id"`
	Hostname  string `json:"hostname"`
	MachineID string `json:"machine_id"` // machine-id(5)
	Secret    string `json:"secret"`     // opens agent sessions; never leaves /run of the guest, 0600
	CID       uint32 `json:"cid,omitempty"`
	// Direct boots vda writable, without an overlay: image builds only.
	Direct bool `json:"direct,omitempty"`
	// Mounts, in order, after the root is joined. The work disk is one of them.
	Mounts []Mount `json:"mounts,omitempty"`
	// Native are directories that must not lie on overlayfs: bind-mounted from the system disk's
	// own filesystem, seeded at first boot with what the base has there.
	Native []string `json:"native,omitempty"`
	// Files are written into the root before the distribution's init starts, by unlink and create.
	Files       []File            `json:"files,omitempty"`
	Environment map[string]string `json:"environment,omitempty"` // appended to /etc/environment, replaced by name
	TimeUnixMS  int64             `json:"time_unix_ms"`          // host clock when the config was rendered
	Network     *Network          `json:"network,omitempty"`     // nil: no interface is configured but the loopback
}

// Network is the static configuration of the guest's network interface. It is applied before the agent
// starts, and network managers of the image are told to leave the interface alone: no DHCP, no waiting.
type Network struct {
	MAC       string         `json:"mac"`                 // of the interface that gets it
	MTU       int            `json:"mtu,omitempty"`       // bytes; 0 leaves the driver's
	Addresses []netip.Prefix `json:"addresses,omitempty"` // address and its network's length
	Routes    []Route        `json:"routes,omitempty"`
	DNS       []netip.Addr   `json:"dns,omitempty"`    // servers of /etc/resolv.conf, which is replaced if there is one
	Search    []string       `json:"search,omitempty"` // domains that short names are looked up in
	// Tunnel is the vsock port of the host that the agent carries the interface's frames to; the interface is a TAP
	// device that init makes then. 0: the machine has it as a device.
	Tunnel uint32 `json:"tunnel,omitempty"`
}

// TunnelKey is what an agent shows at the other end of a Tunnel before the first frame: any program in a guest can connect
// there, and only the agent knows the VM's secret.
func TunnelKey(secret string) []byte {
	m := hmac.New(sha256.New, []byte(secret))
	m.Write([]byte("banger network tunnel 1"))
	return m.Sum(nil)
}

// Route leads to a network, 0.0.0.0/0 or ::/0 for all others, by a gateway on the interface's network.
type Route struct {
	To  netip.Prefix `json:"to"`
	Via netip.Addr   `json:"via"`
}

// Mount is one drive and where it goes. Grow enlarges the filesystem to the drive before use. Seed gives one that nobody has used
// yet what the root has at Target.
type Mount struct {
	Role    string `json:"role"` // vmm.Role of the drive
	Target  string `json:"target"`
	Options string `json:"options,omitempty"`
	Grow    bool   `json:"grow,omitempty"`
	Seed    bool   `json:"seed,omitempty"`
}

// File is written as it is. Mode holds permission bits only; parents are created 0755.
type File struct {
	Path    string `json:"path"`
	Mode    uint32 `json:"mode"`
	UID     int    `json:"uid"`
	GID     int    `json:"gid"`
	Content []byte `json:"content"` // base64 in JSON
}

// FatalMarker starts the console line with which a guest that cannot boot says why:
// "banger: fatal: <stage>: <reason>". The host looks for the last such line in the VM's log.
const FatalMarker = "banger: fatal: "

// Names of boot stages that the host knows and shows; others may come between them.
const (
	StageInit      = "init"      // our /init runs
	StageRoot      = "root"      // root joined, drives mounted and grown
	StageListening = "listening" // agent waits for the host
	StageAgent     = "agent"     // agent has answered the host's first handshake
	StageUserspace = "userspace" // the distribution's init finished starting (systemd: running or degraded)
	StageSSH       = "ssh"       // sshd accepts on port 22
)
