package server_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/api/banger/v1/bangerv1connect"
	"git.thaloco.com/thaloco/banger/internal/server"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// many serves a list.
type many struct {
	server.Service
	vms []vm.VM
}

func (m many) List(context.Context) ([]vm.VM, error) { return m.vms, nil }
func (m many) RunningOperation(vm.ID) string         { return "" }

// BenchmarkList is the daemon's work for a list, from the request to the last byte of the answer: at
// most 20 us a VM.
func BenchmarkList(b *testing.B) {
	for _, n := range []int{1, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var m many
			for i := range n {
				now := time.Now()
				m.vms = append(m.vms, vm.VM{ID: vm.NewID(), Name: fmt.Sprintf("calm-otter-%d", i), State: vm.Running, Desired: vm.WantRunning,
					Pins: vm.Pins{Image: "default", ImageID: "0123456789abcdef"}, CreatedAt: now, StartedAt: &now, VMM: "fake", Accel: "tcg",
					Boot: []vm.Stage{{Name: "init", AtMS: 1}, {Name: "root", AtMS: 2}, {Name: "agent", AtMS: 3}}})
			}
			handler := server.New(m, server.Info{}, slog.New(slog.DiscardHandler))
			for b.Loop() {
				req := httptest.NewRequest(http.MethodPost, bangerv1connect.VMServiceListVMsProcedure, strings.NewReader(""))
				req.Header.Set("Content-Type", "application/proto")
				rec := httptest.NewRecorder()
				handler.ServeHTTP(rec, req)
				if rec.Code != http.StatusOK || rec.Body.Len() < 100*n {
					b.Fatalf("status %d, %d bytes", rec.Code, rec.Body.Len())
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*n), "us/VM")
		})
	}
}
