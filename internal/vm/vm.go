// Package vm owns what a VM is: its identity, its settings and their limits, its states.
//
// It is the domain: it imports only internal/fault, does no I/O, and knows no VMM, database or API.
package vm

import (
	"crypto/rand"
	"encoding/hex"
	"net/netip"
	"time"
)

// ID identifies a VM for good: 32 lower-case hex digits, random. Every host resource of the VM
// derives its name from it.
type ID string

// NewID returns a fresh random ID.
func NewID() ID {
	var b [16]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never returns an error (Go 1.24 release notes)
	return ID(hex.EncodeToString(b[:]))
}

// Short is the first 12 digits: what people see, and the name of the VM's run directory, which
// must leave room for socket names in the 108 bytes of sockaddr_un.
func (id ID) Short() string { return string(id[:min(12, len(id))]) }

// State is where a VM is in its life.
//
//	defined -> starting -> running -> stopping -> stopped (-> starting ...)
//	failed: a step gave up; Failure says which; start and delete work from it
//	deleting: being taken away; ends with the record
type State string

// The states of a VM, as stored and as shown.
const (
	Defined  State = "defined"
	Starting State = "starting"
	Running  State = "running"
	Stopping State = "stopping"
	Stopped  State = "stopped"
	Failed   State = "failed"
	Deleting State = "deleting"
)

// Desired is what the user last asked for. It is saved before anything is done, so that a crash
// in the middle is finished, not forgotten.
type Desired string

// What a user can want of a VM.
const (
	WantRunning Desired = "running"
	WantStopped Desired = "stopped"
	WantDeleted Desired = "deleted"
)

// Spec is what the user chose. Sizes are bytes, memory is MiB.
type Spec struct {
	VCPU       int               `json:"vcpu"`
	MemoryMiB  int64             `json:"memory_mib"`
	DiskSize   int64             `json:"disk_size"`   // work disk, mounted at /root
	SystemSize int64             `json:"system_size"` // system overlay, everything else that is written
	Labels     map[string]string `json:"labels,omitempty"`
	Autostart  bool              `json:"autostart,omitempty"` // started again after a reboot of the host that it ran in
	// NAT lets the guest reach what its host reaches, through the host's own addresses.
	NAT bool `json:"nat,omitempty"`
	// NetworkGroup names the VMs that may talk to each other, "" for none: see ValidateNetworkGroup.
	NetworkGroup string `json:"network_group,omitempty"`
}

// The kinds of network that a VM's interface may be on.
const (
	BridgeNetwork = "bridge" // a bridge of the host, which the guest reaches by a TAP
	UserNetwork   = "user"   // a network stack in a program of the host, without any privilege
)

// Interface is what a VM's network interface was given at its last start. Everything but the kind
// and the MTU derives from the lease's slot, so that a VM keeps its addresses over stop and start
// for as long as the network's ranges are the same.
type Interface struct {
	Kind     string       `json:"kind"`          // BridgeNetwork or UserNetwork
	MAC      string       `json:"mac"`           // six hex pairs with colons
	IPv4     netip.Prefix `json:"ipv4"`          // address and its network's length
	IPv6     netip.Prefix `json:"ipv6,omitzero"` // likewise; zero: none
	Gateway4 netip.Addr   `json:"gateway4"`      // the host on the guest's network, and its DNS server
	Gateway6 netip.Addr   `json:"gateway6,omitzero"`
	MTU      int          `json:"mtu"`              // bytes
	TAP      string       `json:"tap,omitempty"`    // device of the host, on a bridge network
	Tunnel   bool         `json:"tunnel,omitempty"` // the guest's agent carries its frames by vsock, on a user network
}

// Pins are the artifacts a VM was made from, by content id. They never change with the image's
// name or the bundle: a VM keeps the base it was made from.
type Pins struct {
	Image   string `json:"image"`    // image name at creation, for people
	ImageID string `json:"image_id"` // record of the image
	Base    string `json:"base"`     // content id of the root filesystem
	Seed    string `json:"seed"`     // content id of the work seed, "" for none
	Kernel  string `json:"kernel"`   // content id of the kernel (vmlinux, modules image, initrd parts)
}

// Lease holds what was allocated to the VM in the transaction that admitted it. Steps allocate nothing.
type Lease struct {
	Slot int    `json:"slot"` // smallest free integer >= 0; addresses and TAP names derive from it
	CID  uint32 `json:"cid"`  // vsock context id, >= 3 (vsock(7): 0..2 are reserved)
}

// Secrets are made on the host at create and reach the guest by the config drive alone.
type Secrets struct {
	Agent      string `json:"agent"`        // 64 hex digits; opens agent sessions
	HostKey    string `json:"host_key"`     // ed25519 SSH host key, OpenSSH PEM
	HostKeyPub string `json:"host_key_pub"` // authorized_keys form, without a comment
	MachineID  string `json:"machine_id"`   // 32 hex digits, machine-id(5)
}

// Failure says which step gave up, why, and what to do.
type Failure struct {
	Step    string    `json:"step"`
	Code    string    `json:"code"`
	Message string    `json:"message"`
	Hint    string    `json:"hint,omitempty"`
	At      time.Time `json:"at"`
}

// VM is the record of one VM. It is a value: the store returns copies, changes go through the store.
type VM struct {
	ID      ID      `json:"id"`
	Name    string  `json:"name"`
	State   State   `json:"state"`
	Desired Desired `json:"desired"`
	Spec    Spec    `json:"spec"`
	Pins    Pins    `json:"pins"`
	Lease   Lease   `json:"lease"`
	Secrets Secrets `json:"secrets"`

	Interface *Interface `json:"interface,omitempty"` // nil: it has not had a network so far

	Failure *Failure `json:"failure,omitempty"`
	VMM     string   `json:"vmm,omitempty"`   // driver of the current or last run: firecracker, qemu, fake
	Accel   string   `json:"accel,omitempty"` // kvm or tcg
	PID     int      `json:"pid,omitempty"`   // of the VMM while it runs
	Note    string   `json:"note,omitempty"`  // last thing that happened by itself, e.g. "guest powered off"

	// Build is set for a VM that an image is built in; it lives as long as that takes.
	Build *Build `json:"build,omitempty"`

	CreatedAt time.Time  `json:"created_at"`
	StartedAt *time.Time `json:"started_at,omitempty"` // agent answered
	StoppedAt *time.Time `json:"stopped_at,omitempty"`
	Boot      []Stage    `json:"boot,omitempty"` // stages of the last boot, stamped in the guest
}

// Stage is one boot stage as the guest stamped it: milliseconds since the guest's kernel started
// (CLOCK_BOOTTIME), so host clock and guest clock need not agree.
type Stage struct {
	Name string  `json:"name"`
	AtMS float64 `json:"at_ms"`
}

// Build is what a VM has that an image is built in: its root filesystem is a private, writable clone of the base, without
// an overlay.
type Build struct {
	Image    string `json:"image"`     // name of the image that is built
	RootSize int64  `json:"root_size"` // bytes of the root filesystem
	// Kept says that the build failed and the user wanted to look: it is a VM like others from then on. Else it
	// goes with the daemon that began it.
	Kept bool `json:"kept,omitempty"`
}
