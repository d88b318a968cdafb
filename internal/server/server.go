// Package server owns the daemon's front door: the Connect API on one unix socket, and beside it
// the dial socket, which hands out raw streams to a guest's ports.
//
// It translates: requests to use cases, domain values to messages, faults to Connect codes (each in
// one place). It decides nothing about VMs, keeps no state of its own, and never runs a program.
package server

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"git.thaloco.com/thaloco/banger/api/banger/v1/bangerv1connect"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/image"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Machines is what the VM calls need of the use cases. *sandbox.Service documents each method.
type Machines interface {
	Create(ctx context.Context, r sandbox.CreateRequest) (operation.Operation, error)
	Start(ctx context.Context, id vm.ID) (operation.Operation, error)
	Stop(ctx context.Context, id vm.ID, force bool) (operation.Operation, error)
	PowerOff(ctx context.Context, id vm.ID) (operation.Operation, error)
	Restart(ctx context.Context, id vm.ID) (operation.Operation, error)
	Delete(ctx context.Context, id vm.ID) (operation.Operation, error)
	Set(ctx context.Context, id vm.ID, r sandbox.SetRequest) (operation.Operation, error)
	Kill(ctx context.Context, id vm.ID, signal int) (vm.VM, error)
	Resolve(ctx context.Context, ref string) (vm.VM, error)
	Show(ctx context.Context, ref string) (sandbox.Detail, error)
	List(ctx context.Context) ([]vm.VM, error)
	Images(ctx context.Context) ([]image.Image, string, error)
	Defaults(ctx context.Context) (sandbox.Defaults, error)
	SSHTarget(ctx context.Context, id vm.ID) (sandbox.SSHTarget, error)
	Trim(ctx context.Context, id vm.ID) (operation.Operation, error)
	Stats(ctx context.Context, refs []string) []sandbox.Stats
	Ports(ctx context.Context, refs []string) []sandbox.Ports
	WatchUsage(ctx context.Context, r sandbox.UsageRequest, send func(sandbox.Usage) error) error
	WatchGuest(ctx context.Context, id vm.ID, silent time.Duration, send func(sandbox.Pulse) error) error
	ReadLog(ctx context.Context, id vm.ID, r sandbox.LogRequest, send func([]byte) error) error
	RunningOperation(id vm.ID) string
	KernelVersion(ctx context.Context, id string) string
}

// Images is what the image calls need, beside Machines.
type Images interface {
	Image(ctx context.Context, ref string) (sandbox.ImageDetail, error)
	ImageUsers() map[string][]string
	ImageAllocated(img image.Image) (base, seed int64)
	RegisterImage(ctx context.Context, r sandbox.RegisterRequest) (operation.Operation, error)
	DeleteImage(ctx context.Context, ref string) (image.Image, error)
	PromoteImage(ctx context.Context, ref string) (image.Image, bool, error)
	PruneImages(ctx context.Context, r sandbox.PruneRequest) (sandbox.Pruned, error)
	ExportImage(ctx context.Context, ref, path string) (operation.Operation, error)
	ImportImage(ctx context.Context, path, name string) (operation.Operation, error)
	PullImage(ctx context.Context, reference, name string) (operation.Operation, error)
	BuildImage(ctx context.Context, r sandbox.BuildRequest) (op operation.Operation, log string, err error)
	BuildLog(ctx context.Context, opID string, send func([]byte) error) error
}

// Operations is what the operation calls need.
type Operations interface {
	Operation(ctx context.Context, id string) (operation.Operation, error)
	Operations(ctx context.Context) ([]operation.Operation, error)
	WatchOperation(ctx context.Context, id string, send func(operation.Operation) error) error
	Cancel(ctx context.Context, id string) (operation.Operation, error)
}

// Host is what the daemon calls need.
type Host interface {
	Watch(ctx context.Context, send func(sandbox.Event) error) error
	Doctor(ctx context.Context, fix bool) []doctor.Finding
	Status(ctx context.Context) (sandbox.Status, error)
	SSHConfig(ctx context.Context, program string) (sandbox.SSHConfig, error)
	InstallSSHConfig(ctx context.Context, program string, include bool) (sandbox.SSHConfig, error)
	RemoveSSHConfig(ctx context.Context) error
	OperationCounts() []sandbox.OperationCount
}

// Dialer opens streams to guests, for the dial socket.
type Dialer interface {
	DialGuest(ctx context.Context, id vm.ID, port int, wait bool) (net.Conn, error)
	DialForward(ctx context.Context, id vm.ID, port int) (net.Conn, error)
	DialAgent(ctx context.Context, id vm.ID, service wire.Kind) (net.Conn, error)
}

// Service is everything that the server serves. *sandbox.Service is the one in the daemon.
type Service interface {
	Machines
	Images
	Operations
	Host
	Dialer
}

var _ Service = (*sandbox.Service)(nil)

// Info is what the daemon's process knows of itself and the use cases do not.
type Info struct {
	PID       int
	Version   string
	Revision  int // bangerv1.Revision, except in tests of version skew
	Socket    string
	Log       string
	StateDir  string
	StartedAt time.Time
	Warnings  []string // found while starting, e.g. retired config keys
	// Ending is closed when the daemon stops accepting work: streams end then, calls finish.
	Ending <-chan struct{}
	// Shutdown asks the process to end. It returns at once.
	Shutdown func()
}

// maxRequest bounds a request's message. The largest sensible one is a create with labels.
const maxRequest = 1 << 20

// New returns the API's handler. Calls log at debug level to log, with the ids of the operation and
// the VM they were about.
func New(svc Service, info Info, log *slog.Logger) http.Handler {
	opts := connect.WithHandlerOptions(
		connect.WithReadMaxBytes(maxRequest),
		// The first interceptor is the outermost: a panic and a refused revision are logged, too.
		connect.WithInterceptors(accessLog{log}, faults{log}, revision{info.Revision}),
	)
	mux := http.NewServeMux()
	mux.Handle(bangerv1connect.NewVMServiceHandler(&vmHandler{svc, info}, opts))
	mux.Handle(bangerv1connect.NewImageServiceHandler(&imageHandler{svc, svc, info.Ending}, opts))
	mux.Handle(bangerv1connect.NewOperationServiceHandler(&operationHandler{svc, svc, svc, info.Ending}, opts))
	mux.Handle(bangerv1connect.NewDaemonServiceHandler(&daemonHandler{svc, info}, opts))
	mux.Handle(MetricsPath, Metrics(svc, info, log))
	return mux
}
