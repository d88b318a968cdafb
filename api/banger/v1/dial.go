// Package bangerv1 is the public contract of the daemon: messages and services generated from the
// protobuf schema beside it, the revision that clients compare, and the dial socket. It decides nothing.
package bangerv1

// The dial socket hands out raw streams to a guest's TCP ports and to its agent's services. A client sends one DialRequest as a
// JSON line; the daemon answers with one DialAnswer as a JSON line. If the answer has Descriptor, a
// connected descriptor came with its first byte (SCM_RIGHTS, unix(7)) and the connection itself is
// over: nothing copies and the stream outlives the daemon. Otherwise what follows the line is the
// stream, and it ends with the daemon.

// MaxDialLine bounds both lines, in bytes.
const MaxDialLine = 4096

// DialRequest asks for a stream.
type DialRequest struct {
	VMID string `json:"vm_id"`
	Port int    `json:"port,omitempty"` // 1..65535, on the guest's loopback
	// Service is asked of the guest's agent instead: DialExec, DialCopy, or DialForward with a port. Nothing is waited for.
	Service string `json:"service,omitempty"`
	// Wait lets the daemon wait until something listens, for WaitMS milliseconds (0: two minutes).
	Wait   bool  `json:"wait,omitempty"`
	WaitMS int64 `json:"wait_ms,omitempty"`
}

// The services. What such a stream carries is for the Go client alone to know: see its Exec, CopyTo,
// CopyFrom and Forward.
const (
	DialExec    = "exec"    // runs a command
	DialCopy    = "cp"      // copies files
	DialForward = "forward" // a TCP port, with an end for each direction on every VMM
)

// DialAnswer is the daemon's answer. Without Fault the stream is there.
type DialAnswer struct {
	Descriptor bool   `json:"descriptor,omitempty"`
	Fault      *Fault `json:"fault,omitempty"`
}

// DialSocketName is the dial socket's name, in the API socket's directory.
const DialSocketName = "bangerd-dial.sock"
