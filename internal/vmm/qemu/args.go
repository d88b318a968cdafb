package qemu

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// The files of a run directory.
const (
	monitorSocket = "qmp.sock"
	agentSocket   = "agent.sock"
	pidfile       = "vmm.pid"
)

// The descriptors that QEMU is given, see internal/vmm/rundir.
const (
	monitorFD = 3
	agentFD   = 4
)

// nodefaults is an argument by which a process with the machine's marker is known to be a QEMU.
const nodefaults = "-nodefaults"

// translated is how much memory QEMU's emulation keeps translated code in, in MiB. What it notes about that
// code can take as much again.
const translated = 512

// machine is what the command line depends on besides the spec.
type platform struct {
	kvm      bool
	vsock    bool
	parallel bool // emulation may use a thread for each virtual CPU
}

var uuidForm = regexp.MustCompile(`^[0-9a-f]{32}$`)

// arguments is QEMU's argv without the program. Each value that QEMU would take apart at commas is
// JSON or has its commas doubled: state directories may be called anything.
func arguments(s vmm.Spec, p platform) ([]string, error) {
	a := []string{
		"-name", s.Marker(), // alone in its argument: process.Find looks for it
		nodefaults, "-no-user-config", "-display", "none",
		// The guest waits for the monitor's first client: one that ends at once is seen to end.
		"-S",
		// A guest's reboot ends QEMU: the daemon decides what comes next.
		"-no-reboot",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		// q35, not microvm, which hangs in timer calibration on a busy emulated host.
		"-machine", "q35,usb=off,vmport=off",
	}
	cmdline := []string{strings.TrimSpace(s.Cmdline), "console=ttyS0", "reboot=t", "panic=-1"}
	if p.kvm {
		a = append(a, "-accel", "kvm", "-cpu", "host")
	} else {
		// QEMU 7.2's emulation of cmpxchg16b corrupts the memory of kernels from 6.12 on.
		threads := "single"
		if p.parallel {
			threads = "multi"
		}
		a = append(a, "-accel", "tcg,thread="+threads+",tb-size="+strconv.Itoa(translated), "-cpu", "max,-cx16")
		// Costly where each indirect branch is emulated, and no use: there is no speculation.
		cmdline = append(cmdline, "mitigations=off")
		// The kernel's test whether timer interrupts arrive panics ("IO-APIC + timer doesn't work") if
		// the host lets QEMU's timer thread wait for ten ticks meanwhile, as a busy one does.
		cmdline = append(cmdline, "no_timer_check")
	}
	if uuidForm.MatchString(s.ID) {
		a = append(a, "-uuid", fmt.Sprintf("%s-%s-%s-%s-%s", s.ID[:8], s.ID[8:12], s.ID[12:16], s.ID[16:20], s.ID[20:]))
	}
	a = append(a,
		"-smp", strconv.Itoa(s.VCPU), "-m", strconv.FormatInt(s.MemoryMiB, 10),
		"-kernel", s.Kernel, "-initrd", s.Initrd, "-append", strings.TrimSpace(strings.Join(cmdline, " ")),
		"-chardev", "file,id=console,append=on,path="+commas(s.Log), "-serial", "chardev:console",
		"-chardev", fmt.Sprintf("socket,id=monitor,server=on,wait=off,fd=%d", monitorFD), "-mon", "chardev=monitor,mode=control",
		"-device", "virtio-rng-pci",
	)
	for _, d := range s.Drives {
		node, device, err := drive(d)
		if err != nil {
			return nil, err
		}
		a = append(a, "-blockdev", node, "-device", device)
	}
	for i, n := range s.NICs {
		backend, device := nic(i, n, s.RunDir)
		a = append(a, "-netdev", backend, "-device", device)
	}
	if p.vsock {
		a = append(a, "-device", fmt.Sprintf("vhost-vsock-pci,guest-cid=%d", s.CID))
	} else {
		a = append(a,
			"-chardev", fmt.Sprintf("socket,id=agent,server=on,wait=off,fd=%d", agentFD),
			"-device", "virtio-serial-pci,id=serial", "-device", "virtserialport,bus=serial.0,chardev=agent,name="+vmm.AgentPortName)
	}
	return a, nil
}

// nodeName is how QEMU's monitor knows a drive.
func nodeName(role vmm.Role) string { return "drive-" + string(role) }

// drive renders a drive and its device. werror=stop and rerror=stop: a host that cannot take or give
// data pauses the guest, which repeats the request when it is resumed; its filesystem sees no error.
// QEMU locks the file: a second VMM on the same data drive is refused, readers share.
func drive(d vmm.Drive) (node, device string, err error) {
	name := nodeName(d.Role)
	v := map[string]any{
		"driver": "raw", "node-name": name, "read-only": d.ReadOnly,
		// no-flush off: a guest's flush is an fdatasync of the host before it is acknowledged.
		"cache": map[string]any{"direct": false, "no-flush": false},
		"file":  map[string]any{"driver": "file", "filename": d.Path},
	}
	if !d.ReadOnly {
		// What the guest discards, and what it fills with zeroes, takes no room of the host.
		v["discard"], v["detect-zeroes"] = "unmap", "unmap"
	}
	b, err := json.Marshal(v)
	if err != nil {
		return "", "", err
	}
	device = fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s,werror=stop,rerror=stop", name, d.Role)
	if !d.ReadOnly {
		device += ",write-cache=on"
	}
	return string(b), device, nil
}

// nic renders a network interface and its device. QEMU works in the run directory: a socket there is
// given by its bare name, since its path may be longer than the 108 bytes of sockaddr_un (unix(7)). No
// option ROM: nothing boots from the network, and QEMU's package need not have brought the file.
func nic(i int, n vmm.NIC, runDir string) (backend, device string) {
	backend = fmt.Sprintf("tap,id=net%d,ifname=%s,script=no,downscript=no", i, n.TAP)
	if n.Socket != "" {
		path := n.Socket
		if filepath.Dir(path) == filepath.Clean(runDir) {
			path = filepath.Base(path)
		}
		backend = fmt.Sprintf("stream,id=net%d,server=off,addr.type=unix,addr.path=%s", i, commas(path))
	}
	device = fmt.Sprintf("virtio-net-pci,netdev=net%d,mac=%s,romfile=", i, n.MAC)
	if n.MTU != 0 {
		device += ",host_mtu=" + strconv.Itoa(n.MTU)
	}
	return backend, device
}

// commas doubles commas, as QEMU's option syntax asks for.
func commas(s string) string { return strings.ReplaceAll(s, ",", ",,") }
