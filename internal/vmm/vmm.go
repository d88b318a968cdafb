// Package vmm owns the port between banger and the programs that run virtual machines: what a
// machine is made of, and what a driver must be able to do with one.
//
// One VMM process runs one VM, in a session of its own, and lives on when the daemon dies. The
// port never decides when a VM starts or stops, never touches the store, and never edits a disk.
// Drivers live in subpackages; vmmtest is the conformance suite that each of them passes.
package vmm

import (
	"context"
	"errors"
	"net"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Role names what a drive is for. It is also the drive's serial where the VMM has serials.
type Role string

// The drives, in the order in which they are attached (vda, vdb, ...). Firecracker tells drives
// apart only by this order.
const (
	RoleBase    Role = "base"    // base root filesystem, shared, read-only
	RoleSystem  Role = "system"  // system overlay, rw
	RoleWork    Role = "work"    // work disk, rw, /root
	RoleModules Role = "modules" // kernel modules, shared, read-only
	RoleConfig  Role = "config"  // config drive: a raw tar, read-only
)

// Drive is one raw disk image. Drives that are not ReadOnly hold a user's data: a guest's flush
// must reach the host's disk before it is acknowledged, and a full host must stop the guest
// instead of failing its writes.
type Drive struct {
	Role     Role
	Path     string
	ReadOnly bool
}

// NIC is one network interface. Exactly one of TAP and Socket says where its frames go.
type NIC struct {
	MAC string // six lower-case hex pairs with colons, of one station
	MTU int    // bytes; 0 leaves it to the guest. A hint to the guest's driver, where the VMM can give it
	TAP string // a TAP device that exists, of this user or a root daemon's; the VMM attaches to it
	// Socket is a unix stream socket that something listens on when the machine starts. Each frame
	// follows its length, 4 bytes big-endian. It may lie in the run directory, whatever that one's length.
	// Where Features.NICVsock says so, the guest has no device for it: whatever it sends to NICPort of its
	// host comes out there.
	Socket string
}

// Spec describes a machine to start. Paths are absolute and outlive the machine.
type Spec struct {
	ID        string // VM id; appears on the VMM's command line so that people can tell VMMs apart
	Owner     string // installation id; an adopted process must carry it
	Name      string
	RunDir    string // exists, 0700, private to this VM; sockets and pidfile go here
	Kernel    string // vmlinux
	Initrd    string
	Cmdline   string // the guest's part; the driver adds what its machine type needs
	VCPU      int
	MemoryMiB int64
	Drives    []Drive
	NICs      []NIC
	CID       uint32
	Log       string // console and VMM output are appended here; cut back in place at any time after Start

	// Cgroup goes into process.Command; nil: no control group of its own. It is no description: records of a
	// Spec leave it out.
	Cgroup func(ctx context.Context) (put func(ctx context.Context, pid int)) `json:"-"`
}

// State is what a driver knows of a machine's execution.
type State string

// What a VMM process may be doing.
const (
	Running State = "running"
	Paused  State = "paused" // stopped by the VMM, e.g. because the host's disk is full
)

// The reasons of an Exit.
const (
	GuestShutdown = "guest-shutdown" // the guest powered itself off
	GuestReset    = "guest-reset"    // the guest rebooted; VMMs are told to exit instead
	Killed        = "killed"         // a signal ended the VMM, ours or someone's
	Crashed       = "crashed"        // it ended by itself, or nobody saw why
)

// Exit says how a machine ended.
type Exit struct {
	Reason string // one of the constants above; for people and logs
	At     time.Time
}

// Where the agent in the guest listens: on this vsock port, or on the virtio-serial port of this
// name (/sys/class/virtio-ports/*/name). Drivers and the guest's programs share them.
const (
	AgentPort     = 1024
	AgentPortName = "banger.agent"
)

// NICPort is the vsock port of the host that leads to the Socket of a machine's network interface, where
// Features.NICVsock says so.
const NICPort = 1025

// UpPort is the vsock port of the host that the guest's agent connects to once when it listens: Link.Up. The connection
// carries nothing, and an agent whose host does not listen there goes on.
const UpPort = 1026

// Link reaches the guest's agent. A link with Mux true carries one connection at a time (a
// virtio-serial port): internal/guest/agent resynchronises and multiplexes on it. Otherwise each
// Dial is a fresh stream to the agent's port (vsock). Stale bytes may precede what the peer sends
// on a Mux link.
type Link struct {
	Dial func(ctx context.Context) (net.Conn, error)
	Mux  bool
	// Up is closed when the guest has said that its agent listens, or has long been running. nil if the VMM cannot tell.
	// It is the guest's word, which may never come.
	Up <-chan struct{}
}

// Machine is a VMM process that was started or adopted. Safe for concurrent use. Dropping it
// without a call leaves the process running.
type Machine interface {
	// PID of the VMM process.
	PID() int
	// Done is closed when the process is really gone (pidfd), however it ended.
	Done() <-chan struct{}
	// Exit is valid after Done.
	Exit() Exit
	// State asks the VMM. fault.Unavailable if the process is gone.
	State(ctx context.Context) (State, error)
	// Kill ends the process with SIGKILL and returns when it is gone. Fine if it is gone already.
	Kill(ctx context.Context) error
	// Signal sends one signal to the process, after checking that it still is the process it was.
	// fault.Precondition if it is gone.
	Signal(ctx context.Context, sig int) error
	// Resume lets a Paused machine go on. No effect on a running one. fault.Exhausted if the host's disk
	// has no room for it yet.
	Resume(ctx context.Context) error
	// Link reaches the agent in the guest.
	Link() Link
	// Close releases what the daemon holds (sockets, watchers) and leaves the process running.
	Close() error
}

// Features says what a driver has, for people, doctor and tests.
type Features struct {
	Accel string // "kvm" or "tcg"
	Vsock bool   // agent over vsock, else over virtio-serial
	// NICVsock: a NIC with a Socket is no device of the guest's, which connects to NICPort by itself.
	NICVsock bool
	// OverheadMiB is memory that it may need beside the guest's and beside the 256 MiB that any VMM gets.
	OverheadMiB int64
}

// Versioned is a Driver that knows which version of its VMM it uses.
type Versioned interface {
	// Version is the one that the latest Check found, e.g. "1.12.1"; "" before one.
	Version() string
}

// Reasons of a Change to Paused that users of the port tell apart.
const (
	IOError = "io-error" // the host could not take a guest's write; the guest waits with it
	NoRoom  = "no-room"  // the host's disk is all but full; it was paused before a write could fail
)

// Change is one change of a machine's State. Reason is one of the constants above or the driver's own
// words, for people and logs; "" when it is not known.
type Change struct {
	State  State
	Reason string
	At     time.Time
}

// Reporter is an optional power of a Machine: it tells of changes of State that nobody asked for,
// such as the pause of a guest whose host ran out of disk.
type Reporter interface {
	// Changes holds the newest change that was not received yet; an older one that nobody
	// received is replaced. A machine that is Paused when it is adopted has one waiting. The
	// channel is closed after Done or Close. All callers share one channel.
	Changes() <-chan Change
	// Last asks for the state together with its reason. fault.Unavailable if the process is gone.
	Last(ctx context.Context) (Change, error)
}

// Resizer is an optional power of a Machine: a drive's file that was enlarged gets larger for the guest
// while it runs. The guest's filesystem on it is not its business.
type Resizer interface {
	// Resize tells the machine, and by it the guest, how many bytes the file of a drive has now. It may
	// be repeated. fault.Precondition if the machine has no such drive or refuses, as a Paused one may;
	// fault.Unavailable if the process is gone.
	Resize(ctx context.Context, drive Drive, bytes int64) error
}

// Sweeper is an optional power of a Driver: it ends machines that nobody keeps a record of, which a
// database that was restored from a backup leaves behind.
type Sweeper interface {
	// Sweep ends, with SIGKILL, every machine of the owner whose run directory lies below under and
	// whose id known refuses, and returns the ids. Machines of a copy of this installation, which
	// carry the same owner, lie below another directory and are left alone.
	Sweep(ctx context.Context, owner, under string, known func(id string) bool) (ended []string, err error)
}

// Jailed is an optional power of a Machine: its VMM may run in a jail.
type Jailed interface {
	// Jailed says whether it does.
	Jailed() bool
}

// Jailer is an optional power of a Driver: it may start VMMs in jails.
type Jailer interface {
	// CheckJail says whether a VM whose files lie below a directory would be started in a jail, and in one line why it would not.
	// err is set if that is not as it should be, with a hint.
	CheckJail(ctx context.Context, dir string) (jailed bool, why string, err error)
	// NoJail is why a machine that is in no jail is in none, as far as that is known.
	NoJail() string
}

// Driver runs machines of one kind.
type Driver interface {
	// Name is "firecracker", "qemu" or "fake".
	Name() string
	// Features of this driver on this host.
	Features() Features
	// Check reads the host and says whether Start can work: binary present and of a version that is
	// known to work. The fault's hint names the command that repairs it. Changes nothing.
	Check(ctx context.Context) error
	// Start runs a machine and returns once the VMM has accepted its configuration. Before it
	// starts the process it removes stale sockets of the run directory; if it fails, nothing it
	// made is left. If the machine of this spec runs already it is adopted.
	Start(ctx context.Context, spec Spec) (Machine, error)
	// Adopt finds the running machine of this spec (ID, Owner, Name, RunDir, Log and CID are all it
	// takes: the artifacts it was started from may be gone) by its pidfile (pid, start time, command line)
	// and socket. fault.NotFound if none runs, with everything stale in the run directory removed.
	Adopt(ctx context.Context, spec Spec) (Machine, error)
}

// StartFailed marks the error of a driver's Start with the operation, and makes a fault of what is none; program is what could not
// be started then.
func StartFailed(err error, program string) error {
	var f *fault.Error
	if errors.As(err, &f) {
		f.Op = "vmm start"
		return err
	}
	return fault.Wrap(err, fault.CodeOf(err), "", "%s cannot be started", program).WithOp("vmm start")
}
