// Package client is the public Go client of bangerd: it finds the daemon, starts it when it does
// not run, and gives typed clients of its API.
//
//	c := client.New(client.Options{Socket: socket, StateDir: state, Daemon: "/usr/lib/banger/bangerd"})
//	defer c.Close()
//	vms, err := c.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{})
//
// Every error is an *Error with a stable code. The package keeps no state on disk and never reads
// the daemon's.
package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/api/banger/v1/bangerv1connect"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Error is what every call fails with: a stable Code, a Message for people, a Hint saying what to
// type next, and the Cause.
type Error = fault.Error

// Options say where the daemon is and how to start it.
type Options struct {
	// Socket is the API socket's path; any length. The dial socket lies beside it.
	Socket string
	// StateDir is the daemon's state directory: its log and the lock under which it is started.
	StateDir string
	// Daemon is the bangerd to start when the socket does not answer. Empty: never start one.
	Daemon string
	// Starting, if set, is called when a daemon is about to be started.
	Starting func()
	// Revision is sent as the API revision. 0: bangerv1.Revision. AnyRevision: none.
	Revision int
}

// AnyRevision is for the calls by which VMs are stopped: daemons of every revision take them from clients that do not
// say theirs, since a host that goes down must be able to power its guests off whatever was installed last.
const AnyRevision = -1

// Client talks to one daemon. Safe for concurrent use.
type Client struct {
	VMs        bangerv1connect.VMServiceClient
	Images     bangerv1connect.ImageServiceClient
	Operations bangerv1connect.OperationServiceClient
	Daemon     bangerv1connect.DaemonServiceClient

	opts        Options
	transport   *http.Transport
	starting    sync.Mutex
	quiet, most time.Duration // quietTime and aliveTime, but for tests
}

// url is the daemon's for HTTP: whatever it says, calls go to the socket.
const url = "http://bangerd"

// New makes a client. Nothing is dialled before the first call.
func New(o Options) *Client {
	if o.Revision == 0 {
		o.Revision = bangerv1.Revision
	}
	c := &Client{opts: o, quiet: quietTime, most: aliveTime}
	c.transport = &http.Transport{
		DialContext:         func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     time.Minute,
		DisableCompression:  true, // a unix socket is faster than gzip
	}
	httpClient := &http.Client{Transport: c.transport}
	sent := interceptor{client: c}
	if o.Revision != AnyRevision {
		sent.revision = strconv.Itoa(o.Revision)
	}
	opt := connect.WithInterceptors(sent)
	c.VMs = bangerv1connect.NewVMServiceClient(httpClient, url, opt)
	c.Images = bangerv1connect.NewImageServiceClient(httpClient, url, opt)
	c.Operations = bangerv1connect.NewOperationServiceClient(httpClient, url, opt)
	c.Daemon = bangerv1connect.NewDaemonServiceClient(httpClient, url, opt)
	return c
}

// Close releases idle connections. Calls in flight go on.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// interceptor sends the revision, if it has one, turns errors into *Error, and gives no daemon that is stuck a call to wait for.
type interceptor struct {
	client   *Client
	revision string
}

func (i interceptor) say(h http.Header) {
	if i.revision != "" {
		h.Set(bangerv1.RevisionHeader, i.revision)
	}
}

func (i interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		i.say(req.Header())
		for tries := 0; ; tries++ {
			heard, stop := i.client.listen(ctx)
			resp, err := next(heard, req)
			stuck := context.Cause(heard)
			stop()
			if err == nil {
				return resp, nil
			}
			if ctx.Err() == nil && stuck != nil {
				return nil, stuck
			}
			err = FromConnect(err)
			if !errors.Is(err, errLost) || !readOnly(req.Spec().Procedure) || tries == dyingTries || !pause(ctx, tries) {
				return nil, err
			}
		}
	}
}

// readOnly reports whether a call may be made twice.
func readOnly(procedure string) bool {
	name := procedure[strings.LastIndexByte(procedure, '/')+1:]
	return strings.HasPrefix(name, "Get") || strings.HasPrefix(name, "List") || strings.HasPrefix(name, "Resolve")
}

func (i interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		i.say(conn.RequestHeader())
		return conn
	}
}

func (interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// FromConnect gives err as an *Error: the daemon's own fault where it sent one. Unary calls of a
// Client need no FromConnect; the Err of a stream does. A nil error gives nil.
func FromConnect(err error) error {
	if err == nil {
		return nil
	}
	var own *Error
	if errors.As(err, &own) {
		return own
	}
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return fault.Wrap(err, fault.CodeOf(err), "", "the call to the daemon failed")
	}
	for _, d := range ce.Details() {
		value, err := d.Value()
		if err != nil {
			continue
		}
		if f, ok := value.(*bangerv1.Fault); ok {
			return FromFault(f)
		}
	}
	switch {
	case errors.Is(err, context.Canceled):
		return fault.Wrap(err, fault.Cancelled, "", "interrupted")
	case errors.Is(err, context.DeadlineExceeded):
		return fault.Wrap(err, fault.Timeout, "", "the daemon did not answer in time").WithHint("banger daemon status")
	case ce.Code() == connect.CodeUnimplemented:
		return fault.Wrap(err, fault.VersionSkew, "", "the running daemon does not know this call").
			WithHint("banger daemon restart (VMs keep running)")
	case connect.IsWireError(err):
		return fault.Wrap(err, fault.Internal, "", "the daemon refused the call: %s", ce.Message())
	}
	return fault.Wrap(errors.Join(errLost, err), fault.Unavailable, "", "lost the connection to the daemon").WithHint("banger daemon status")
}

// errLost marks a connection that broke, as opposed to a daemon that answered or did not start.
var errLost = errors.New("connection lost")

// FromFault gives the API's fault as an *Error. A nil fault gives nil.
func FromFault(f *bangerv1.Fault) error {
	if f == nil {
		return nil
	}
	e := &Error{Code: fault.Code(f.GetCode()), Op: f.GetOp(), Subject: f.GetSubject(), Message: f.GetMessage(), Hint: f.GetHint()}
	if f.GetCause() != "" {
		e.Cause = errors.New(f.GetCause())
	}
	return e
}

// Watcher is told what happens to a watched operation. Both functions may be nil.
type Watcher struct {
	// Changed gets the operation as it is, then after each change.
	Changed func(*bangerv1.Operation)
	// Lost is called when the connection broke and is made again.
	Lost func(error)
}

// WatchOperation follows an operation until it ends and returns it in its final state. A broken
// connection is made again once. An operation that failed is no error here: look at its Fault.
func (c *Client) WatchOperation(ctx context.Context, id string, w Watcher) (*bangerv1.Operation, error) {
	last, err := c.watchOnce(ctx, id, w)
	if err == nil || !fault.Is(err, fault.Unavailable) || ctx.Err() != nil {
		return last, err
	}
	if w.Lost != nil {
		w.Lost(err)
	}
	c.transport.CloseIdleConnections() // they lead to the daemon that is lost
	heard := false
	again := Watcher{Changed: func(op *bangerv1.Operation) {
		heard = true
		if w.Changed != nil {
			w.Changed(op)
		}
	}}
	for tries := 0; ; tries++ {
		last, err = c.watchOnce(ctx, id, again)
		if heard || !fault.Is(err, fault.Unavailable) || tries == dyingTries || !pause(ctx, tries) {
			return last, err
		}
	}
}

// dyingTries is how often a call is made again to a daemon that is just being killed: its socket
// takes connections for some milliseconds longer, and then resets them.
const dyingTries = 5

// pause waits a little longer with each try, and reports whether ctx goes on.
func pause(ctx context.Context, tries int) bool {
	select {
	case <-time.After(time.Duration(10<<tries) * time.Millisecond):
		return true
	case <-ctx.Done():
		return false
	}
}

// Final reports whether the operation has ended.
func Final(op *bangerv1.Operation) bool { return op.GetState() != "running" }

func (c *Client) watchOnce(ctx context.Context, id string, w Watcher) (*bangerv1.Operation, error) {
	stream, err := c.Operations.WatchOperation(ctx, &bangerv1.WatchOperationRequest{Id: id})
	if err != nil {
		return nil, FromConnect(err)
	}
	defer stream.Close()
	for stream.Receive() {
		op := stream.Msg().GetOperation()
		if w.Changed != nil {
			w.Changed(op)
		}
		if Final(op) {
			return op, nil
		}
	}
	if err := stream.Err(); err != nil {
		return nil, FromConnect(err)
	}
	return nil, fault.New(fault.Unavailable, id, "the daemon ended the watch before the operation ended").
		WithHint("banger operation watch %s", id)
}

// Shutdown ends the daemon, if one answers, and waits until its process is gone or ctx ends. It
// reports whether there was one. It works with a daemon of any API revision.
func (c *Client) Shutdown(ctx context.Context) (bool, error) {
	running, err := c.Running(ctx)
	if err != nil || !running {
		return false, err
	}
	status, err := c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
	if err != nil {
		return false, err
	}
	gone, err := watchProcess(int(status.GetPid()))
	if err != nil {
		return false, err
	}
	defer gone.close()
	if _, err := c.Daemon.Shutdown(ctx, &bangerv1.ShutdownRequest{}); err != nil {
		return false, err
	}
	c.Close()
	if err := gone.wait(ctx); err != nil {
		return true, fault.Wrap(err, fault.Timeout, fmt.Sprintf("process %d", status.GetPid()), "the daemon is still finishing what it does").
			WithHint("its log says what: %s", status.GetLog())
	}
	return true, nil
}

// Restart ends the daemon, if one answers, and starts the one of Options. VMs run on, and operations go on in the
// new daemon; connections to guests that the old one copied (docs/ssh.md) end. It works with a daemon of any API
// revision. The status is the new daemon's.
func (c *Client) Restart(ctx context.Context) (*bangerv1.GetStatusResponse, error) {
	if _, err := c.Shutdown(ctx); err != nil {
		return nil, err
	}
	return c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
}
