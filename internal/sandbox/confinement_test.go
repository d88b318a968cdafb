package sandbox

import (
	"context"
	"os"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/cgroup"
	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
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
	if c.Jailed || c.NoJail != "" {
		t.Errorf("a VMM that knows no jail: %+v", c)
	}
	ms.service.driver = jailDriver{why: "it takes root"}
	if c := ms.confinement(vm.NewID(), m); c.Jailed || c.NoJail != "it takes root" {
		t.Errorf("without a jail: %+v", c)
	}
	if c := ms.confinement(vm.NewID(), &machine{Machine: inJail{p}}); !c.Jailed || c.NoJail != "" {
		t.Errorf("in a jail: %+v", c)
	}
	close(p.done)
	if c := ms.confinement(vm.NewID(), m); c != nil {
		t.Errorf("of a machine that ended: %+v", c)
	}
}

// inJail is a machine in a jail.
type inJail struct{ ownProcess }

func (inJail) Jailed() bool { return true }

// jailDriver starts machines in jails, or says why it does not.
type jailDriver struct {
	vmm.Driver
	jailed bool
	why    string
	err    error
}

func (d jailDriver) CheckJail(context.Context, string) (bool, string, error) {
	return d.jailed, d.why, d.err
}

func (d jailDriver) NoJail() string { return d.why }

// TestDoctorTellsOfTheJail: to be without one is no failure unless one was asked for.
func TestDoctorTellsOfTheJail(t *testing.T) {
	overlay := fault.New(fault.Unsupported, "/vm", "overlayfs cannot").WithHint("move it")
	for _, c := range []struct {
		d        vmm.Driver
		setting  string
		severity doctor.Severity
		detail   string
		fix      string
	}{
		{jailDriver{jailed: true}, config.JailerAuto, doctor.Pass, "a user id and a root directory of its own", ""},
		{jailDriver{why: "it takes root"}, config.JailerAuto, doctor.Pass, "none: it takes root", ""},
		{jailDriver{why: "overlayfs cannot", err: overlay}, config.JailerAuto, doctor.Warn, "none: overlayfs cannot", "move it"},
		{jailDriver{why: "overlayfs cannot", err: overlay}, config.JailerOn, doctor.Fail, "overlayfs cannot", "move it"},
	} {
		got, jailed := (&Service{driver: c.d, cfg: config.Config{Jailer: c.setting}}).checkJail(t.Context())
		if len(got) != 1 || got[0].Severity != c.severity || !strings.Contains(got[0].Detail, c.detail) || got[0].Fix != c.fix || jailed != c.d.(jailDriver).jailed {
			t.Errorf("%+v, want %s %q", got, c.severity, c.detail)
		}
	}
	if got, _ := (&Service{driver: struct{ vmm.Driver }{}}).checkJail(t.Context()); len(got) != 0 {
		t.Errorf("of a VMM that knows none: %+v", got)
	}
}
