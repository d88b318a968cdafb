package install

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/helper/wire"
)

// socketUnit has systemd listen for one user, whose number is the instance's name, at a socket whose name begins so.
func socketUnit(what, socket string) string {
	return `# Written by "banger system install" and removed by "banger system uninstall".
[Unit]
Description=` + what + ` of banger for user %i (socket)

[Socket]
ListenStream=` + wire.RunDir + `/` + socket + `-%i.sock
SocketUser=%i
SocketMode=0600
DirectoryMode=0755
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
`
}

// The helper's sockets: of what makes networks, and of what makes jails.
var (
	helperSocketUnit = socketUnit("Root helper", "helper")
	jailSocketUnit   = socketUnit("Jailer", "jailer")
)

// jailServiceUnit is for what makes jails, which takes mounts, user ids, device nodes and signals. It has no mount namespace of its own, which files
// that come from users would not be mounted in; so nothing of ProtectSystem= and its like. Filters of system calls are
// inherited by the VMs: they hold nothing that Firecracker needs. KillMode: VMs that got no scope of their own are in its group.
const jailServiceUnit = `# Written by "banger system install" and removed by "banger system uninstall".
[Unit]
Description=Jailer of banger for user %i

[Service]
ExecStart=` + Program + ` -jails -uid %i
KillMode=process
TimeoutStopSec=40
RuntimeDirectory=banger
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
UMask=0077
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_NET_ADMIN CAP_MKNOD CAP_CHOWN CAP_DAC_OVERRIDE CAP_SETUID CAP_SETGID CAP_KILL
NoNewPrivileges=yes
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=user mnt
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=~@clock @cpu-emulation @keyring @module @obsolete @raw-io @reboot @swap
SystemCallErrorNumber=EPERM
DevicePolicy=closed
DeviceAllow=/dev/kvm rwm
DeviceAllow=/dev/net/tun rwm
DeviceAllow=/dev/userfaultfd rwm
KeyringMode=private
`

// serviceUnit lets the helper do what its verbs take, and see nothing else: two capabilities, its kinds
// of sockets, one device, and of the files the kernel's settings of networks and its own records alone to write.
func serviceUnit(ranges []netip.Prefix) string {
	var words strings.Builder
	for _, r := range ranges {
		fmt.Fprintf(&words, " -range %s", r)
	}
	return `# Written by "banger system install" and removed by "banger system uninstall".
[Unit]
Description=Root helper of banger for user %i

[Service]
ExecStart=` + Program + ` -uid %i` + words.String() + `
TimeoutStopSec=40
RuntimeDirectory=banger
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
UMask=0077
CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_BIND_SERVICE
NoNewPrivileges=yes
RestrictAddressFamilies=AF_UNIX AF_NETLINK AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
DevicePolicy=closed
DeviceAllow=/dev/net/tun rw
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectKernelTunables=yes
ReadWritePaths=/proc/sys/net
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
ProtectProc=invisible
KeyringMode=private
MemoryMax=256M
TasksMax=128
`
}

var rangeFlag = regexp.MustCompile(`(?m)^ExecStart=.*$`)

// rangesOf returns those that a service unit was written with.
func rangesOf(unit string) []netip.Prefix {
	var out []netip.Prefix
	words := strings.Fields(rangeFlag.FindString(unit))
	for i, w := range words {
		if w == "-range" && i+1 < len(words) {
			if p, err := netip.ParsePrefix(words[i+1]); err == nil {
				out = append(out, p)
			}
		}
	}
	return out
}
