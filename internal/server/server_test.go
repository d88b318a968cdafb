package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/api/banger/v1/bangerv1connect"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/server"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake serves what a test sets; anything else is a nil dereference, which shows as an internal fault.
type fake struct {
	server.Service
	create    func(sandbox.CreateRequest) (operation.Operation, error)
	resolve   func(ref string) (vm.VM, error)
	watchOp   func(ctx context.Context, id string, send func(operation.Operation) error) error
	dialGuest func(ctx context.Context, id vm.ID, port int, wait bool) (net.Conn, error)
	dialAgent func(ctx context.Context, id vm.ID, service wire.Kind) (net.Conn, error)
}

func (f *fake) Create(_ context.Context, r sandbox.CreateRequest) (operation.Operation, error) {
	return f.create(r)
}
func (f *fake) Resolve(_ context.Context, ref string) (vm.VM, error) { return f.resolve(ref) }
func (f *fake) WatchOperation(ctx context.Context, id string, send func(operation.Operation) error) error {
	return f.watchOp(ctx, id, send)
}
func (f *fake) DialGuest(ctx context.Context, id vm.ID, port int, wait bool) (net.Conn, error) {
	return f.dialGuest(ctx, id, port, wait)
}
func (f *fake) DialAgent(ctx context.Context, id vm.ID, service wire.Kind) (net.Conn, error) {
	return f.dialAgent(ctx, id, service)
}
func (f *fake) Status(context.Context) (sandbox.Status, error) {
	return sandbox.Status{VMM: "fake", Total: 3, Running: 2}, nil
}
func (f *fake) Doctor(context.Context, bool) []doctor.Finding {
	return []doctor.Finding{{Code: "kvm", Severity: doctor.Warn, Title: "no KVM", Fix: "banger doctor"}}
}

type daemon struct {
	url  string
	log  *bytes.Buffer
	stop func() // closes Ending
}

func serve(t *testing.T, svc server.Service, shutdown func()) daemon {
	t.Helper()
	log := &bytes.Buffer{}
	ending := make(chan struct{})
	h := server.New(svc, server.Info{PID: 42, Version: "test", Revision: 5, Ending: ending, Shutdown: shutdown},
		slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	return daemon{url: s.URL, log: log, stop: func() { close(ending) }}
}

// withRevision sends the header with every call.
func withRevision(value string) connect.ClientOption {
	return connect.WithInterceptors(connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			req.Header().Set(bangerv1.RevisionHeader, value)
			return next(ctx, req)
		}
	}))
}

// Every fault code has a Connect code of its own choice and arrives whole at the client.
func TestFaultsArriveWhole(t *testing.T) {
	codes := map[fault.Code]connect.Code{
		fault.Invalid: connect.CodeInvalidArgument, fault.NotFound: connect.CodeNotFound, fault.Exists: connect.CodeAlreadyExists,
		fault.Ambiguous: connect.CodeInvalidArgument, fault.Precondition: connect.CodeFailedPrecondition, fault.Busy: connect.CodeAborted,
		fault.Exhausted: connect.CodeResourceExhausted, fault.Permission: connect.CodePermissionDenied,
		fault.Unavailable: connect.CodeUnavailable, fault.Timeout: connect.CodeDeadlineExceeded, fault.Cancelled: connect.CodeCanceled,
		fault.Corrupt: connect.CodeDataLoss, fault.Unsupported: connect.CodeUnimplemented,
		fault.VersionSkew: connect.CodeFailedPrecondition, fault.Failed: connect.CodeUnknown, fault.Internal: connect.CodeInternal,
	}
	svc := &fake{}
	d := serve(t, svc, nil)
	c := bangerv1connect.NewVMServiceClient(http.DefaultClient, d.url)
	for code, want := range codes {
		svc.create = func(sandbox.CreateRequest) (operation.Operation, error) {
			f := fault.Wrap(errors.New("the cause"), code, "otter", "went %s", "wrong").WithHint("try %d", 2).WithOp("vm create")
			return operation.Operation{}, errors.Join(f) // a fault inside another error counts as well
		}
		_, err := c.CreateVM(t.Context(), &bangerv1.CreateVMRequest{})
		if got := connect.CodeOf(err); got != want {
			t.Errorf("%s: Connect code %s, want %s", code, got, want)
		}
		var f *client.Error
		if !errors.As(client.FromConnect(err), &f) {
			t.Fatalf("%s: no *client.Error in %v", code, err)
		}
		got := []string{string(f.Code), f.Op, f.Subject, f.Message, f.Hint, f.Cause.Error()}
		if diff := cmp.Diff([]string{string(code), "vm create", "otter", "went wrong", "try 2", "the cause"}, got); diff != "" {
			t.Errorf("%s: %s", code, diff)
		}
	}
}

func TestPlainErrorsAreInternal(t *testing.T) {
	d := serve(t, &fake{create: func(sandbox.CreateRequest) (operation.Operation, error) {
		return operation.Operation{}, errors.New("disk on fire")
	}}, nil)
	_, err := bangerv1connect.NewVMServiceClient(http.DefaultClient, d.url).CreateVM(t.Context(), &bangerv1.CreateVMRequest{})
	if connect.CodeOf(err) != connect.CodeInternal || !fault.Is(client.FromConnect(err), fault.Internal) || !strings.Contains(err.Error(), "disk on fire") {
		t.Errorf("got %v", err)
	}
}

func TestRevision(t *testing.T) {
	stopped := 0
	d := serve(t, &fake{}, func() { stopped++ })
	for _, tt := range []struct {
		header string
		code   fault.Code // "" for accepted
		says   string
	}{
		{"5", "", ""},
		{"", "", ""},
		{"4", fault.VersionSkew, "this banger is older than the running daemon (API revision 4, daemon 5)"},
		{"6", fault.VersionSkew, "the running daemon is older than this banger (API revision 5, banger 6)"},
		{"six", fault.Invalid, `"six" is not an API revision`},
	} {
		t.Run("header "+tt.header, func(t *testing.T) {
			c := bangerv1connect.NewDaemonServiceClient(http.DefaultClient, d.url, withRevision(tt.header))
			_, err := c.RunDoctor(t.Context(), &bangerv1.RunDoctorRequest{})
			err = client.FromConnect(err)
			if fault.CodeOf(err) != tt.code || (err != nil && (!strings.Contains(err.Error(), tt.says) || (tt.code == fault.VersionSkew && fault.HintOf(err) == ""))) {
				t.Errorf("RunDoctor: got %v (%s), hint %q", err, fault.CodeOf(err), fault.HintOf(err))
			}
			// A newer client must be able to look at an older daemon and stop it.
			if s, err := c.GetStatus(t.Context(), &bangerv1.GetStatusRequest{}); err != nil || s.GetApiRevision() != 5 || s.GetVmsRunning() != 2 {
				t.Errorf("GetStatus: %v, %v", s, err)
			}
			before := stopped
			if _, err := c.Shutdown(t.Context(), &bangerv1.ShutdownRequest{}); err != nil || stopped != before+1 {
				t.Errorf("Shutdown: %v, asked %d times", err, stopped-before)
			}
		})
	}
	t.Run("stream", func(t *testing.T) {
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, d.url+bangerv1connect.OperationServiceWatchOperationProcedure, strings.NewReader("\x00\x00\x00\x00\x02{}"))
		req.Header.Set("Content-Type", "application/connect+json")
		req.Header.Set(bangerv1.RevisionHeader, "4")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if body, _ := io.ReadAll(resp.Body); !bytes.Contains(body, []byte("failed_precondition")) {
			t.Errorf("a stream of another revision was accepted: %q", body)
		}
	})
}

func TestPanicIsLoggedWithItsStack(t *testing.T) {
	d := serve(t, &fake{create: func(sandbox.CreateRequest) (operation.Operation, error) { panic("boom") }}, nil)
	c := bangerv1connect.NewVMServiceClient(http.DefaultClient, d.url)
	_, err := c.CreateVM(t.Context(), &bangerv1.CreateVMRequest{})
	if !fault.Is(client.FromConnect(err), fault.Internal) || !strings.Contains(err.Error(), "boom") {
		t.Errorf("got %v", err)
	}
	if log := d.log.String(); !strings.Contains(log, "panic in a handler") || !strings.Contains(log, "TestPanicIsLoggedWithItsStack") {
		t.Errorf("the log lacks the panic or its stack:\n%s", log)
	}
}

func TestTooLargeRequestIsRefused(t *testing.T) {
	d := serve(t, &fake{}, nil)
	c := bangerv1connect.NewVMServiceClient(http.DefaultClient, d.url)
	_, err := c.CreateVM(t.Context(), &bangerv1.CreateVMRequest{Name: strings.Repeat("x", 1<<20)})
	if connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("got %v", err)
	}
}

// The API is for curl, too: JSON in, JSON out, and nothing of a VM's secrets in it.
func TestCurl(t *testing.T) {
	var got sandbox.CreateRequest
	v := vm.VM{ID: "aa12bb34", Name: "calm-otter", State: vm.Running, Secrets: vm.Secrets{Agent: "SECRET", HostKey: "SECRET", MachineID: "SECRET"},
		CreatedAt: time.Unix(1700000000, 0)}
	svc := &fake{
		create: func(r sandbox.CreateRequest) (operation.Operation, error) {
			got = r
			return operation.Operation{ID: "op1", Kind: operation.Create, VMID: "aa12bb34", VMName: "calm-otter", State: operation.Running}, nil
		},
		resolve: func(ref string) (vm.VM, error) {
			if ref == "nobody" {
				return vm.VM{}, fault.New(fault.NotFound, ref, "there is no such VM").WithHint("banger vm list")
			}
			return v, nil
		},
	}
	d := serve(t, svc, nil)
	post := func(procedure, body string) string {
		t.Helper()
		resp, err := http.Post(d.url+procedure, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return string(b)
	}
	post(bangerv1connect.VMServiceCreateVMProcedure, `{"name":"calm-otter","vcpu":2,"memoryMib":"512","diskBytes":"1073741824","labels":{"a":"b"},"noStart":true}`)
	want := sandbox.CreateRequest{Name: "calm-otter", NoStart: true, Spec: vm.Spec{VCPU: 2, MemoryMiB: 512, DiskSize: 1 << 30, Labels: map[string]string{"a": "b"}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if log := d.log.String(); !strings.Contains(log, `"op":"op1"`) || !strings.Contains(log, `"vm":"aa12bb34"`) {
		t.Errorf("the access log lacks the operation's and the VM's id:\n%s", log)
	}
	body := post(bangerv1connect.VMServiceResolveVMsProcedure, `{"refs":["calm-otter","nobody"]}`)
	var answer struct {
		Results []struct {
			Ref   string
			VM    struct{ Name, State, CreatedAt string }
			Fault struct{ Code, Hint string }
		}
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || len(answer.Results) != 2 {
		t.Fatalf("%v: %s", err, body)
	}
	if r := answer.Results[0]; r.VM.Name != "calm-otter" || r.VM.State != "running" || r.VM.CreatedAt != "2023-11-14T22:13:20Z" {
		t.Errorf("%+v", r)
	}
	if r := answer.Results[1]; r.Fault.Code != "not_found" || r.Fault.Hint != "banger vm list" {
		t.Errorf("%+v", r)
	}
	if strings.Contains(body, "SECRET") {
		t.Errorf("the answer carries secrets: %s", body)
	}
}

func TestWatchEndsWithTheResult(t *testing.T) {
	svc := &fake{
		resolve: func(string) (vm.VM, error) { return vm.VM{ID: "aa", Name: "calm-otter", State: vm.Running}, nil },
		watchOp: func(_ context.Context, id string, send func(operation.Operation) error) error {
			op := operation.Operation{ID: id, Kind: operation.Create, VMID: "aa", State: operation.Running, Stages: []operation.Stage{{Name: "boot", StartedAt: time.Now()}}}
			if err := send(op); err != nil {
				return err
			}
			op.State = operation.Succeeded
			return send(op)
		},
	}
	d := serve(t, svc, nil)
	c := bangerv1connect.NewOperationServiceClient(http.DefaultClient, d.url)
	stream, err := c.WatchOperation(t.Context(), &bangerv1.WatchOperationRequest{Id: "op1"})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var got []string
	for stream.Receive() {
		op := stream.Msg().GetOperation()
		got = append(got, op.GetState()+" "+op.GetVm().GetName())
	}
	if diff := cmp.Diff([]string{"running ", "succeeded calm-otter"}, got); diff != "" || stream.Err() != nil {
		t.Error(diff, stream.Err())
	}
}

// A daemon that ends does not wait for watchers: their streams end and say why.
func TestWatchEndsWithTheDaemon(t *testing.T) {
	var watching atomic.Bool
	d := serve(t, &fake{watchOp: func(ctx context.Context, _ string, send func(operation.Operation) error) error {
		if err := send(operation.Operation{ID: "op1", State: operation.Running}); err != nil {
			return err
		}
		watching.Store(true)
		<-ctx.Done()
		return ctx.Err()
	}}, nil)
	c := bangerv1connect.NewOperationServiceClient(http.DefaultClient, d.url)
	stream, err := c.WatchOperation(t.Context(), &bangerv1.WatchOperationRequest{Id: "op1"})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	d.stop()
	if stream.Receive() {
		t.Error("the stream went on")
	}
	if err := client.FromConnect(stream.Err()); !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "shutting down") {
		t.Errorf("got %v", err)
	}
}
