// Package system owns what the lives of the guest program (init, agent, shutdown) share of the
// running kernel: the state that init leaves for the others, mounts and their end, growing
// filesystems, device events, the console, and the power switch.
//
// It runs inside guests only and decides nothing: when a guest stops or grows is its callers'.
package system

import (
	"encoding/json"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Paths in the guest. RunDir is 0700 and on a tmpfs that is carried from the initrd into the root.
const (
	RunDir      = "/run/banger"
	StatePath   = RunDir + "/state.json"
	SystemMount = RunDir + "/system" // the system disk's own filesystem
	BaseMount   = RunDir + "/base"   // the base, below the overlay
	ModuleMount = RunDir + "/modules"
	ShutdownDir = "/run/initramfs" // systemd's place for a shutdown program (bootup(7))
	NewRoot     = "/sysroot"       // in the initrd: where the root is put together
	Binary      = ShutdownDir + "/shutdown"
)

// Stage is one step of this boot that was reached, At by CLOCK_BOOTTIME.
type Stage struct {
	Name   string        `json:"name"`
	At     time.Duration `json:"at"`
	Detail string        `json:"detail,omitempty"`
}

// Mounted is a banger drive with a filesystem that may grow.
type Mounted struct {
	Role   string `json:"role"`
	Device string `json:"device"`
	Path   string `json:"path"`   // where it is mounted, as the booted system sees it
	Target string `json:"target"` // what people know it as
}

// State is what init tells the agent and its supervisor. It holds the VM's secret: the file is 0600
// in a 0700 directory, in memory.
type State struct {
	VMID    string    `json:"vm_id"`
	Secret  string    `json:"secret"`
	CID     uint32    `json:"cid"`
	Systemd bool      `json:"systemd"`            // the distribution's init is systemd
	Runit   string    `json:"runit,omitempty"`    // path of the distribution's init, if it is runit with our program as its last script
	OwnInit bool      `json:"own_init,omitempty"` // banger's own init runs, since the image has none
	Stages  []Stage   `json:"stages"`
	Mounted []Mounted `json:"mounted"`
	Tunnel  *Tunnel   `json:"tunnel,omitempty"` // nil: the network interface is a device of the machine's, or there is none
}

// Tunnel is a network interface whose frames the agent carries.
type Tunnel struct {
	Interface string `json:"interface"` // a TAP device
	Port      uint32 `json:"port"`      // of the host's, by vsock
}

// Write puts the state below root ("" for the running system).
func (s State) Write(root string) error {
	content, err := json.Marshal(s)
	if err != nil {
		return err
	}
	path := filepath.Join("/", root, StatePath)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	// Not read before it is complete: the agent starts later. So no rename.
	return os.WriteFile(path, content, 0o600)
}

// ReadState reads what init left.
func ReadState() (State, error) {
	var s State
	content, err := os.ReadFile(StatePath)
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(content, &s)
}

// BootTime is CLOCK_BOOTTIME: the time since the kernel started, suspension included.
func BootTime() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0 // cannot fail on Linux >= 2.6.39
	}
	return time.Duration(now.Nano())
}

// Now makes a stage reached at this moment.
func Now(name, detail string) Stage { return Stage{Name: name, At: BootTime(), Detail: detail} }

// PathError names what a system call was made on: errno alone tells nobody which mount failed.
func PathError(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}
