// Package jail owns how a Firecracker runs in a jail: Firecracker's own jailer in a mount namespace of its
// own, with a user id of its own, and in its root nothing but what its VM is made of.
//
// It takes files as open descriptors and no path from whoever asks, never copies or changes the owner of one, and never
// decides when a VM starts or ends. docs/decisions/jailer.md has the reasons. What takes root is Host; the root helper
// has one for each user, and so has a daemon that is root.
//
// A jail leaves nothing behind when its process ends, however that is: its root is a tmpfs, and all mounts are in a
// namespace that only the process is in. What stays is a record, by which the next start knows that it is stale.
package jail

import (
	"path"
	"regexp"
	"strconv"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Where a VM's things are in its jail.
const (
	Kernel = "/kernel"
	Initrd = "/initrd"
	Run    = "/vm"  // the directory that its daemon gave it: its sockets
	Net    = "/net" // the directory of the program that is its network, if it has one: to connect to, not to write
)

// DrivePath is where a drive is in the jail.
func DrivePath(role string) string { return path.Join("/drives", role) }

// User ids of jails: each VM that runs has one of its own. They are above those that directory services give away
// (SSSD and FreeIPA go to 2000200000), and below those of systemd's foreign images (from 2147352576).
const (
	FirstUID = 2_100_000_000
	UIDs     = 1 << 16
)

// Inside says whether a user id is a jail's.
func Inside(uid int) bool { return uid >= FirstUID && uid < FirstUID+UIDs }

// Name says which VM a jail is of. One user's alone: two users' names do not meet.
type Name struct {
	Installation string `json:"installation"`
	VM           string `json:"vm"`
	Place        string `json:"place"` // tells copies of an installation apart; the daemon's own word
}

// Marker is the argument that the process carries: vmm.Spec's.
func (n Name) Marker() string { return "banger-" + n.Installation + "-" + n.VM }

// Drive is one disk of a VM.
type Drive struct {
	Role     string `json:"role"`
	ReadOnly bool   `json:"read_only"`
}

// Request is a jail to make.
type Request struct {
	Name
	VCPU      int
	MemoryMiB int64
	Drives    []Drive
	TAPs      []string // of the host, which are the jail's from then on
}

// What a request may hold at most. Firecracker has fewer virtual CPUs, and a VM of ours fewer drives.
const (
	maxVCPU      = 64
	maxMemoryMiB = 16 << 20
	maxDrives    = 16
	maxTAPs      = 4
)

var (
	ownerForm = regexp.MustCompile(`^[0-9A-Za-z-]{1,24}$`) // vmm.Spec.ValidateIdentity's
	idForm    = regexp.MustCompile(`^[0-9A-Za-z]{1,32}$`)
	placeForm = regexp.MustCompile(`^[0-9a-f]{1,64}$`)
	roleForm  = regexp.MustCompile(`^[a-z]{1,16}$`)
)

func invalid(format string, args ...any) *fault.Error {
	return fault.New(fault.Invalid, "jail", format, args...)
}

// Validate looks at what can be said of a name without the host. fault.Invalid.
func (n Name) Validate() error {
	switch {
	case !ownerForm.MatchString(n.Installation):
		return invalid("%.40q is no installation's id", n.Installation)
	case !idForm.MatchString(n.VM):
		return invalid("%.40q is no VM's id", n.VM)
	case !placeForm.MatchString(n.Place):
		return invalid("%.80q is no place", n.Place)
	}
	return nil
}

// Validate looks at what can be said of a request without the host. fault.Invalid.
func (r Request) Validate() error {
	if err := r.Name.Validate(); err != nil {
		return err
	}
	switch {
	case r.VCPU < 1 || r.VCPU > maxVCPU:
		return invalid("%d virtual CPUs", r.VCPU)
	case r.MemoryMiB < 1 || r.MemoryMiB > maxMemoryMiB:
		return invalid("%d MiB of memory", r.MemoryMiB)
	case len(r.Drives) > maxDrives, len(r.TAPs) > maxTAPs:
		return invalid("%d drives and %d network devices are more than %d and %d", len(r.Drives), len(r.TAPs), maxDrives, maxTAPs)
	}
	seen := map[string]bool{}
	for _, d := range r.Drives {
		if !roleForm.MatchString(d.Role) || seen[d.Role] {
			return invalid("%.40q is no role of a drive, or another one's", d.Role)
		}
		seen[d.Role] = true
	}
	return nil
}

// mount is one thing that is bound into a jail.
type mount struct {
	at       string // in the jail
	dir      bool
	readOnly bool
}

// mounts are all of a request's, in the order of Files.bound.
func (r Request) mounts(net bool) []mount {
	out := []mount{{at: Run, dir: true}, {at: Kernel, readOnly: true}, {at: Initrd, readOnly: true}}
	for _, d := range r.Drives {
		out = append(out, mount{at: DrivePath(d.Role), readOnly: d.ReadOnly})
	}
	if net {
		out = append(out, mount{at: Net, dir: true, readOnly: true})
	}
	return out
}

// arguments are the jailer's, without the program. base is where the jail's tmpfs is mounted. Neither a network namespace (TAPs
// are the host's) nor one for pids: signals of a host to the first process of one are not all heard.
func arguments(p Programs, base, marker string, uid int) []string {
	id := strconv.Itoa(uid)
	return []string{
		"--id", marker, "--exec-file", p.Firecracker, "--uid", id, "--gid", id, "--chroot-base-dir", base,
		"--", "--api-sock", path.Join(Run, APISocket), "--level", "Error",
	}
}

// APISocket is the name of Firecracker's API in Run.
const APISocket = "api.sock"

// rootOf is the jail's root, as the jailer makes it below base.
func rootOf(p Programs, base, marker string) string {
	return path.Join(base, path.Base(p.Firecracker), marker, "root")
}

// Programs are the host's, whose content root answers for.
type Programs struct{ Firecracker, Jailer string }
