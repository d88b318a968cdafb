package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/api/banger/v1/bangerv1connect"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// silent is a daemon that lists no VMs until it may, and answers other calls unless it is stuck.
type silent struct {
	bangerv1connect.UnimplementedVMServiceHandler
	bangerv1connect.UnimplementedDaemonServiceHandler
	stuck chan struct{} // closed: no more
	list  chan struct{}
	asked atomic.Int32
}

func (s *silent) ListVMs(ctx context.Context, _ *bangerv1.ListVMsRequest) (*bangerv1.ListVMsResponse, error) {
	select {
	case <-s.list:
		return &bangerv1.ListVMsResponse{}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *silent) GetStatus(ctx context.Context, _ *bangerv1.GetStatusRequest) (*bangerv1.GetStatusResponse, error) {
	s.asked.Add(1)
	select {
	case <-s.stuck:
		return &bangerv1.GetStatusResponse{}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// serve gives a client of a daemon of that kind.
func serve(t *testing.T, s *silent) *Client {
	t.Helper()
	c := New(Options{Socket: filepath.Join(t.TempDir(), "bangerd.sock")})
	c.quiet, c.most = 20*time.Millisecond, 200*time.Millisecond
	l, err := net.Listen("unix", c.opts.Socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(bangerv1connect.NewVMServiceHandler(s))
	mux.Handle(bangerv1connect.NewDaemonServiceHandler(s))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	t.Cleanup(func() {
		c.Close()
		_ = server.Close()
	})
	go func() { _ = server.Serve(l) }()
	return c
}

// TestStuck: a daemon that takes connections and answers nothing is given up, with the process to end.
func TestStuck(t *testing.T) {
	c := serve(t, &silent{stuck: make(chan struct{}), list: make(chan struct{})})
	_, err := c.VMs.ListVMs(t.Context(), &bangerv1.ListVMsRequest{})
	pid := fmt.Sprintf("kill -KILL %d", os.Getpid())
	if !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "does not answer") || !strings.Contains(fault.HintOf(err), pid) {
		t.Errorf("%v, hint %q, without %q", err, fault.HintOf(err), pid)
	}
	// An interrupt is an interrupt all the same.
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := c.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{}); !fault.Is(err, fault.Cancelled) || !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

// TestSlow: a call of a daemon that answers others takes as long as it takes.
func TestSlow(t *testing.T) {
	s := &silent{stuck: make(chan struct{}), list: make(chan struct{})}
	close(s.stuck)
	c := serve(t, s)
	done := make(chan error)
	go func() {
		_, err := c.VMs.ListVMs(t.Context(), &bangerv1.ListVMsRequest{})
		done <- err
	}()
	for deadline := time.Now().Add(10 * time.Second); s.asked.Load() < 3; time.Sleep(time.Millisecond) {
		select {
		case err := <-done:
			t.Fatalf("given up: %v", err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("asked %d times in 10 s whether it is there", s.asked.Load())
		}
	}
	close(s.list)
	if err := <-done; err != nil {
		t.Error(err)
	}
	asked := s.asked.Load()
	time.Sleep(100 * time.Millisecond)
	if now := s.asked.Load(); now > asked+1 { // one may have been on its way
		t.Errorf("asked %d times more after the answer", now-asked)
	}
}
