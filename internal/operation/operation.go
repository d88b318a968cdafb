// Package operation owns work that outlives its caller: an operation has an id, runs in the daemon
// until it is done or cancelled, is recorded before it starts and when it ends, and can be watched.
//
// It knows nothing of VMs beyond the id it carries, and never decides what an operation does.
package operation

import (
	"encoding/json"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// State of an operation. Running is the only one that is not final.
type State string

// The states of an operation.
const (
	Running   State = "running"
	Succeeded State = "succeeded"
	Failed    State = "failed"
	Cancelled State = "cancelled"
)

// Kind says what an operation does.
type Kind string

// The kinds of operations.
const (
	Create  Kind = "create"
	Start   Kind = "start"
	Stop    Kind = "stop"
	Restart Kind = "restart"
	Delete  Kind = "delete"
	Set     Kind = "set"
	Trim    Kind = "trim"

	// Of images. They have no VM, but for a build, which has the one that it builds in.
	ImageRegister Kind = "image-register"
	ImageExport   Kind = "image-export"
	ImageImport   Kind = "image-import"
	ImagePull     Kind = "image-pull"
	ImageBuild    Kind = "image-build"
)

// Stage is one step of an operation as people see it. FinishedAt is zero while it runs.
type Stage struct {
	Name       string    `json:"name"`
	Detail     string    `json:"detail,omitempty"`
	StartedAt  time.Time `json:"started_at"`
	FinishedAt time.Time `json:"finished_at,omitzero"`
}

// Operation is a value: a copy of what is known of an operation at one moment.
type Operation struct {
	ID         string       `json:"id"`
	Kind       Kind         `json:"kind"`
	VMID       string       `json:"vm_id"`
	VMName     string       `json:"vm_name"`
	State      State        `json:"state"`
	Stages     []Stage      `json:"stages,omitempty"`
	CreatedAt  time.Time    `json:"created_at"`
	FinishedAt time.Time    `json:"finished_at,omitzero"`
	Fault      *fault.Error `json:"-"` // set when Failed or Cancelled
	Notices    []string     `json:"notices,omitempty"`
	// Request is what was asked beyond the kind, in its owner's form: it is on record before anything is
	// done, so that the next daemon can finish it.
	Request json.RawMessage `json:"request,omitempty"`
	Image   string          `json:"image,omitempty"` // name of the image that it is about
}

// Subject is what people know the operation by: the image that it is about, else its VM.
func (op Operation) Subject() string {
	if op.Image != "" {
		return op.Image
	}
	return op.VMName
}
