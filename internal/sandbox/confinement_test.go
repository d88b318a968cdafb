package sandbox

import (
	"os"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/cgroup"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// ownProcess is a machine that is this test's own process.
type ownProcess struct {
	vmm.Machine
	done chan struct{}
}

func (ownProcess) PID() int                { return os.Getpid() }
func (p ownProcess) Done() <-chan struct{} { return p.done }

// What is shown is read of the process, and not of one that may have taken its pid.
func TestConfinementOfTheProcess(t *testing.T) {
	ms := &machines{service: &Service{cgroups: cgroup.New("test")}}
	p := ownProcess{done: make(chan struct{})}
	m := &machine{Machine: p}
	c := ms.confinement(vm.NewID(), m)
	if c == nil || c.UID != os.Geteuid() || c.Cgroup != "" || c.NoCgroup == "" {
		t.Errorf("got %+v", c)
	}
	close(p.done)
	if c := ms.confinement(vm.NewID(), m); c != nil {
		t.Errorf("of a machine that ended: %+v", c)
	}
}
