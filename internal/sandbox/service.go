// Package sandbox owns the use cases (create, start, stop, restart, kill, delete, ...) and the list
// of capabilities that a VM is made of. Front ends call it; it calls lifecycle, which knows the order.
//
// It never talks HTTP, never prints, and executes no program: what a VM costs the host is in the
// capabilities.
package sandbox

import (
	"context"
	"net"

	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Service is the daemon's use cases. Safe for concurrent use.
type Service struct{}

// CreateRequest is what a user asked for. Zero values mean the default.
type CreateRequest struct {
	Name    string
	Image   string
	Spec    vm.Spec
	NoStart bool
}

// Defaults are what Create chooses for what is not asked.
type Defaults struct {
	Image string
	Spec  vm.Spec
}

// Detail is a VM with what costs system calls to find out.
type Detail struct {
	VM              vm.VM
	KernelVersion   string
	DiskAllocated   int64
	SystemAllocated int64
	Directory       string
	Log             string
	VMMState        string
	Agent           string // "answers", or why not
}

// Event is one change. Exactly one field is set.
type Event struct {
	Snapshot  *Snapshot
	VM        *vm.VM
	Deleted   vm.ID
	Operation *operation.Operation
}

// Snapshot is the whole state: the first event of every watch.
type Snapshot struct {
	VMs        []vm.VM
	Operations []operation.Operation // running, and those that ended lately
	Images     []image.Image
}

// Status is what the daemon knows of itself.
type Status struct {
	InstallationID    string
	VMM               string
	Accel             string
	VMMNotice         string // why not KVM, "" if it is
	Total, Running    int
	OperationsRunning int
	Warnings          []string
}

// Create validates, admits the VM in one transaction and starts it in an operation.
// fault.Invalid, Exists, NotFound (image), Exhausted (disk), Corrupt (bundle): nothing was made.
func (s *Service) Create(ctx context.Context, r CreateRequest) (operation.Operation, error) {
	panic("skeleton")
}

// Start starts a VM by id. Starting a running VM succeeds with the notice "already running".
func (s *Service) Start(ctx context.Context, id vm.ID) (operation.Operation, error) {
	panic("skeleton")
}

// Stop shuts a VM down by its agent, then hard when the bound passes. force skips the agent.
// Stopping a stopped VM succeeds with the notice "already stopped".
func (s *Service) Stop(ctx context.Context, id vm.ID, force bool) (operation.Operation, error) {
	panic("skeleton")
}

// Restart stops and starts as one operation. A stopped VM is started.
func (s *Service) Restart(ctx context.Context, id vm.ID) (operation.Operation, error) {
	panic("skeleton")
}

// Delete takes a VM away in any state, its disks included.
func (s *Service) Delete(ctx context.Context, id vm.ID) (operation.Operation, error) {
	panic("skeleton")
}

// Kill sends a signal to the VMM process. fault.Precondition if the VM does not run.
func (s *Service) Kill(ctx context.Context, id vm.ID, signal int) (vm.VM, error) { panic("skeleton") }

// Resolve maps a reference (name, id, unique id prefix of at least 4 digits) to a VM.
// fault.NotFound, fault.Ambiguous.
func (s *Service) Resolve(ctx context.Context, ref string) (vm.VM, error) { panic("skeleton") }

// Show is Resolve plus what costs system calls.
func (s *Service) Show(ctx context.Context, ref string) (Detail, error) { panic("skeleton") }

// List returns all VMs, oldest first. No system call per VM.
func (s *Service) List(ctx context.Context) ([]vm.VM, error) { panic("skeleton") }

// Images returns all images, and the name of the default one.
func (s *Service) Images(ctx context.Context) ([]image.Image, string, error) { panic("skeleton") }

// Defaults tells what Create chooses.
func (s *Service) Defaults(ctx context.Context) (Defaults, error) { panic("skeleton") }

// Operation returns one operation by id. fault.NotFound.
func (s *Service) Operation(ctx context.Context, id string) (operation.Operation, error) {
	panic("skeleton")
}

// Operations returns the running operations and the latest ended ones, newest first.
func (s *Service) Operations(ctx context.Context) ([]operation.Operation, error) { panic("skeleton") }

// WatchOperation calls send with the operation as it is, then after each change, and returns after
// the final state was sent, when ctx ends, or with send's error.
func (s *Service) WatchOperation(ctx context.Context, id string, send func(operation.Operation) error) error {
	panic("skeleton")
}

// Cancel asks an operation to stop and undo. No effect on one that ended.
func (s *Service) Cancel(ctx context.Context, id string) (operation.Operation, error) {
	panic("skeleton")
}

// Watch calls send with a snapshot, then with each change, until ctx ends or send fails. A watcher
// that is too slow is sent a fresh snapshot instead of the changes it missed.
func (s *Service) Watch(ctx context.Context, send func(Event) error) error { panic("skeleton") }

// DialGuest opens a TCP connection to a port on the guest's loopback through the agent and waits
// until something listens there or ctx ends. The connection is a *net.UnixConn or vsock-backed
// file where the VMM has vsock; otherwise (virtio-serial) it is a stream of the daemon's session.
func (s *Service) DialGuest(ctx context.Context, id vm.ID, port int) (net.Conn, error) {
	panic("skeleton")
}

// SSHTarget tells what `vm ssh` needs: the VM's host key in authorized_keys form.
func (s *Service) SSHTarget(ctx context.Context, id vm.ID) (hostKeyPub string, err error) {
	panic("skeleton")
}

// Doctor runs every capability's check and the host's.
func (s *Service) Doctor(ctx context.Context) []doctor.Finding { panic("skeleton") }

// Status tells what the daemon knows of itself.
func (s *Service) Status(ctx context.Context) (Status, error) { panic("skeleton") }
