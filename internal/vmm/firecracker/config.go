package firecracker

import (
	"fmt"
	"net/http"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// The files of a run directory. Firecracker works in it and is given the sockets' bare names: their
// paths may be longer than the 108 bytes of sockaddr_un (unix(7)).
const (
	apiSocket   = "api.sock"
	agentSocket = "agent.sock"
	nicSocket   = agentSocket + "_1025" // vmm.NICPort; see linkNIC
	upSocket    = agentSocket + "_1026" // vmm.UpPort: Firecracker passes on what a guest connects to (its docs/vsock.md, "Guest-Initiated Connections")
	pidfile     = "firecracker.pid"     // not another driver's: each finds its own machines alone
)

// apiFlag is the argument by which a process with the machine's marker is known to be a Firecracker.
const apiFlag = "--api-sock"

// arguments is Firecracker's argv without the program. It takes none that it does not know, so the marker
// is its --id, which may have letters, digits and dashes (vmm.Spec sees to that).
func arguments(s vmm.Spec) []string {
	return []string{
		"--id", s.Marker(),
		apiFlag, apiSocket,
		// Its messages share the log with the guest's console.
		"--level", "Error",
	}
}

// request is one call that makes the machine, and what it is about, for people.
type request struct {
	method, path string
	body         any
	about        string
}

// requests are the calls that make a machine of a Firecracker of that version, in order, but for the one that starts it.
func requests(s vmm.Spec, at layout, v version) []request {
	out := []request{
		{http.MethodPut, "/machine-config", machineConfig{VCPU: s.VCPU, MemoryMiB: s.MemoryMiB}, "its CPUs and memory"},
		{http.MethodPut, "/boot-source", bootSource{Kernel: at.kernel(s), Initrd: at.initrd(s), BootArgs: cmdline(s)}, "the kernel " + s.Kernel + " with the initrd " + s.Initrd},
	}
	for _, d := range s.Drives { // the guest tells them apart by this order alone
		out = append(out, request{http.MethodPut, "/drives/" + string(d.Role), driveOf(d, at), "the drive " + d.Path})
	}
	for i, n := range s.NICs {
		if n.Socket != "" { // by vsock
			continue
		}
		device := networkInterface{ID: fmt.Sprintf("net%d", i), MAC: n.MAC, TAP: n.TAP}
		if v.atLeast(withMTU) {
			device.MTU = n.MTU
		}
		out = append(out, request{http.MethodPut, "/network-interfaces/" + device.ID, device, "the network device " + n.TAP})
	}
	return append(out,
		request{http.MethodPut, "/vsock", vsockDevice{CID: s.CID, Socket: at.socket(agentSocket)}, "its vsock"},
		request{http.MethodPut, "/entropy", entropy{}, "its entropy device"})
}

// driveOf renders a drive. None is the root device: with that Firecracker would put it first and write
// root= on the command line. Writeback makes a guest's flush an fsync of the host, where Unsafe, the
// default, answers it at once. Sync is the engine that is not a preview.
func driveOf(d vmm.Drive, at layout) drive {
	cache := "Writeback"
	if d.ReadOnly {
		cache = "Unsafe" // there is nothing to flush
	}
	return drive{ID: string(d.Role), Path: at.drive(d), ReadOnly: d.ReadOnly, CacheType: cache, IOEngine: "Sync"}
}

// cmdline is the kernel's. Firecracker ends when the guest resets by its keyboard controller, the one
// device that it has for that; the other i8042 options spare the kernel the search for a keyboard and
// a mouse. Devices come by ACPI and virtio-mmio: there is no PCI.
func cmdline(s vmm.Spec) string {
	return strings.TrimSpace(strings.TrimSpace(s.Cmdline) +
		" console=ttyS0 reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd " + boot.PowerOffByReboot)
}
