// Package wire owns what a daemon and the root helper say to each other: where the helper listens, the
// messages, how they are framed, and which versions of the two fit.
//
// It decides nothing about what a caller may do, which is internal/helper's, and never touches the host's
// network. docs/decisions/helper.md has the reasons.
package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Revision is raised with every change of the messages or of what a verb does. A helper and a daemon of
// different ones do not work together.
const Revision = 2

// Subject is what faults are about that concern the helper itself.
const Subject = "root helper"

// RunDir is where the helper keeps what goes with a reboot: the sockets, and its records.
const RunDir = "/run/banger"

// Socket is where the helper of one user listens. Only that user can open it.
func Socket(uid int) string { return filepath.Join(RunDir, fmt.Sprintf("helper-%d.sock", uid)) }

// JailSocket is where what makes the jails of one user listens: a process of its own, with other rights.
func JailSocket(uid int) string { return filepath.Join(RunDir, fmt.Sprintf("jailer-%d.sock", uid)) }

// Jails is the directory of RunDir in which the records of jails are.
const Jails = RunDir + "/jails"

// Verb is what a caller asks for.
type Verb string

// The verbs. Most are of bridge.Host; ListenDNS and KeepNames are what guests' and hosts' resolvers take.
const (
	Version    Verb = "version" // says which helper it is; whatever the caller's revision
	Check      Verb = "check"
	Setup      Verb = "setup"
	AddTAP     Verb = "add-tap"
	DeleteTAPs Verb = "delete-taps"
	TAPs       Verb = "taps"
	Policy     Verb = "policy"
	Remove     Verb = "remove"
	Watch      Verb = "watch" // answered with every change, until the caller hangs up
	Obstacles  Verb = "obstacles"
	ListenDNS  Verb = "listen-dns" // answered with two descriptors: of a listener over TCP, of a socket over UDP
	KeepNames  Verb = "keep-names" // answered if it does not work, or no more; else until the caller hangs up
)

// The verbs at JailSocket. JailCheck comes with the descriptor of a directory, JailStart with those of jail.Files. JailFind is
// answered with the process, JailStart with that and with a pipe, by which the status of its end comes while the helper lives.
const (
	JailCheck  Verb = "jail-check"
	JailStart  Verb = "jail-start"
	JailFind   Verb = "jail-find"
	JailSignal Verb = "jail-signal"
	JailList   Verb = "jail-list"
)

// Jail names the jail of a VM of Network.Installation, and says what JailStart makes. Slots are of its TAPs.
type Jail struct {
	VM        string      `json:"vm"`
	Place     string      `json:"place"` // the caller's own word: tells copies of an installation apart
	VCPU      int         `json:"vcpu,omitempty"`
	MemoryMiB int64       `json:"memory_mib,omitempty"`
	Drives    []JailDrive `json:"drives,omitempty"`
	Signal    int         `json:"signal,omitempty"` // JailSignal
}

// JailDrive is a drive of a VM in a jail.
type JailDrive struct {
	Role     string `json:"role"`
	ReadOnly bool   `json:"read_only,omitempty"`
}

// Network names the network of one installation. It is data of the caller's and nothing in it is believed.
type Network struct {
	Installation string       `json:"installation"`
	Bridge       string       `json:"bridge"`
	IPv4         netip.Prefix `json:"ipv4"`
	IPv6         netip.Prefix `json:"ipv6"` // zero: none
}

// Guest is a VM in a policy. Its device and its hardware address follow from the slot.
type Guest struct {
	Slot  int        `json:"slot"`
	IPv4  netip.Addr `json:"ipv4"`
	IPv6  netip.Addr `json:"ipv6"` // zero: none
	NAT   bool       `json:"nat"`
	Group string     `json:"group"`
}

// Request is one call: each has a connection of its own.
type Request struct {
	Revision  int            `json:"revision"`
	Verb      Verb           `json:"verb"`
	Network   Network        `json:"network"`
	Addresses []netip.Prefix `json:"addresses,omitempty"` // Setup
	Slots     []int          `json:"slots,omitempty"`     // AddTAP (one), DeleteTAPs, JailStart
	Isolated  bool           `json:"isolated,omitempty"`  // AddTAP
	Hosts     []netip.Addr   `json:"hosts,omitempty"`     // Policy
	Guests    []Guest        `json:"guests,omitempty"`    // Policy
	HostPorts []uint16       `json:"hostports,omitempty"` // Policy
	At        netip.Addr     `json:"at"`                  // ListenDNS: an address of the bridge
	Server    netip.AddrPort `json:"server"`              // KeepNames: who answers for .vm
	Jail      *Jail          `json:"jail,omitempty"`      // the verbs of jails
}

// Fault is a fault.Error.
type Fault struct {
	Code    fault.Code `json:"code"`
	Op      string     `json:"op,omitempty"`
	Subject string     `json:"subject,omitempty"`
	Message string     `json:"message"`
	Hint    string     `json:"hint,omitempty"`
	Cause   string     `json:"cause,omitempty"`
	Errno   int        `json:"errno,omitempty"` // of the system, if it comes down to one
}

// Obstacle is a hostnet.Obstacle.
type Obstacle struct {
	Table string `json:"table"`
	Chain string `json:"chain"`
	Fix   string `json:"fix"`
}

// Answer answers a Request. With a Fault nothing else counts.
type Answer struct {
	Revision  int        `json:"revision"`
	Release   string     `json:"release"` // of the helper, for people
	Fault     *Fault     `json:"fault,omitempty"`
	MTU       int        `json:"mtu,omitempty"`       // Setup
	Slots     []int      `json:"slots,omitempty"`     // TAPs
	Obstacles []Obstacle `json:"obstacles,omitempty"` // Obstacles
	PID       int        `json:"pid,omitempty"`       // JailStart, JailFind
	Start     uint64     `json:"start,omitempty"`     // JailStart: since when, in clock ticks since the boot
	VMs       []string   `json:"vms,omitempty"`       // JailList
}

// longest bounds a message, in bytes: the policy of as many VMs as one network may have is half of it.
const longest = 1 << 20

// Write sends a message: its length as four bytes, the most significant first, and JSON.
func Write(w io.Writer, message any) error {
	body, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(body) > longest {
		return fmt.Errorf("a message of %d bytes is longer than %d", len(body), longest)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...))
	return err
}

func read(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(head[:])
	if length > longest {
		return nil, fmt.Errorf("a message of %d bytes is announced, and %d are allowed", length, longest)
	}
	// What is announced and does not come takes no memory.
	var body bytes.Buffer
	if n, err := io.CopyN(&body, r, int64(length)); err != nil {
		return nil, fmt.Errorf("the message ends after %d of %d bytes: %w", n, length, err)
	}
	return body.Bytes(), nil
}

// ReadRequest reads one. Of another revision it gets no more than that and the verb, fault.VersionSkew unless
// the verb is Version. fault.Invalid for what is no request.
func ReadRequest(r io.Reader) (Request, error) {
	body, err := read(r)
	if err != nil {
		return Request{}, fault.Wrap(err, fault.Invalid, Subject, "the request cannot be read")
	}
	var head struct {
		Revision int  `json:"revision"`
		Verb     Verb `json:"verb"`
	}
	if err := json.Unmarshal(body, &head); err != nil {
		return Request{}, fault.Wrap(err, fault.Invalid, Subject, "the request is none")
	}
	if head.Verb == Version {
		return Request{Revision: head.Revision, Verb: Version}, nil
	}
	if head.Revision != Revision {
		return Request{}, fault.New(fault.VersionSkew, Subject, "it speaks revision %d, and the caller %d", Revision, head.Revision)
	}
	var out Request
	strict := json.NewDecoder(bytes.NewReader(body))
	strict.DisallowUnknownFields()
	if err := strict.Decode(&out); err != nil {
		return Request{}, fault.Wrap(err, fault.Invalid, Subject, "the request is none")
	}
	if strict.More() {
		return Request{}, fault.New(fault.Invalid, Subject, "the request has something after its end")
	}
	return out, nil
}

// ReadAnswer reads one, and returns its fault as the error. io.EOF if there is none any more.
func ReadAnswer(r io.Reader) (Answer, error) {
	body, err := read(r)
	if err != nil {
		return Answer{}, err
	}
	var out Answer
	if err := json.Unmarshal(body, &out); err != nil {
		return Answer{}, fmt.Errorf("the answer is none: %w", err)
	}
	if f := out.Fault; f != nil && out.Revision == Revision {
		e := &fault.Error{Code: f.Code, Op: f.Op, Subject: f.Subject, Message: f.Message, Hint: f.Hint}
		if f.Cause != "" {
			e.Cause = cause{f.Cause, unix.Errno(f.Errno)}
		}
		return out, e
	}
	return out, nil
}

// cause is an error of the helper's: its words, and the system's number for errors.Is.
type cause struct {
	text  string
	errno unix.Errno
}

func (c cause) Error() string { return c.text }

func (c cause) Unwrap() error {
	if c.errno == 0 {
		return nil
	}
	return c.errno
}

// FaultOf makes an error fit for an answer; nil of nil.
func FaultOf(err error) *Fault {
	if err == nil {
		return nil
	}
	var f *fault.Error
	if !errors.As(err, &f) {
		return &Fault{Code: fault.CodeOf(err), Subject: Subject, Message: err.Error()}
	}
	out := &Fault{Code: f.Code, Op: f.Op, Subject: f.Subject, Message: f.Message, Hint: fault.HintOf(err)}
	if f.Cause != nil {
		out.Cause = f.Cause.Error()
	}
	var errno unix.Errno
	if errors.As(err, &errno) {
		out.Errno = int(errno)
	}
	return out
}

// InstallCommand is what to type so that the helper that fits this program is installed. It names the
// banger beside this program where there is one: sudo does not look where users install.
func InstallCommand() string {
	if exe, err := os.Executable(); err == nil {
		banger := filepath.Join(filepath.Dir(exe), "banger")
		if fi, err := os.Stat(banger); err == nil && fi.Mode().IsRegular() {
			return "sudo " + banger + " system install"
		}
	}
	return "sudo banger system install"
}
