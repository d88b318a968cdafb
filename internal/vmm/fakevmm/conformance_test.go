package fakevmm_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/vmmtest"
)

// TestConformance runs the port's suite on the fake.
func TestConformance(t *testing.T) {
	w := newWorld(t)
	var n atomic.Int64
	vmmtest.Run(t, vmmtest.Config{
		New: func(t *testing.T) vmm.Driver {
			return fakevmm.New(w, func(_ context.Context, _ *fakevmm.Guest, c net.Conn) { io.Copy(c, c) })
		},
		Spec: func(t *testing.T) vmm.Spec {
			s := newSpec(t, fmt.Sprintf("m%d", n.Add(1)))
			for _, role := range []vmm.Role{vmm.RoleBase, vmm.RoleSystem} {
				d := vmm.Drive{Role: role, Path: filepath.Join(t.TempDir(), string(role)), ReadOnly: role == vmm.RoleBase}
				if err := os.WriteFile(d.Path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				s.Drives = append(s.Drives, d)
			}
			return s
		},
		Processes: func(t *testing.T, s vmm.Spec) int {
			all, err := w.Machines()
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for _, r := range all {
				if r.Spec.Marker() == s.Marker() {
					n++
				}
			}
			return n
		},
		End: func(t *testing.T, s vmm.Spec) {
			if err := os.Remove(filepath.Join(w.Dir(), "machines", s.Marker()+".json")); err != nil {
				t.Fatal(err)
			}
		},
		Leave: func(t *testing.T, s *vmm.Spec, reason string) {
			if err := w.SetFaults(s.ID + " die " + reason); err != nil {
				t.Fatal(err)
			}
		},
		Pause: func(t *testing.T, s vmm.Spec, m vmm.Machine) {
			if err := w.Pause(s.ID, "io-error"); err != nil {
				t.Fatal(err)
			}
		},
		Echo: true,
	})
}
