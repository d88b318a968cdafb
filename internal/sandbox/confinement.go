package sandbox

import (
	"git.thaloco.com/thaloco/banger/internal/cgroup"
	"git.thaloco.com/thaloco/banger/internal/console"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Confinement is what the kernel holds a running VMM to, as it says itself.
type Confinement struct {
	process.Confinement
	Cgroup   string        // name of its control group, "" if it has none of its own
	Limits   cgroup.Limits // of that group
	NoCgroup string        // why it has none, "" if it has one
}

// confinement reads how a machine is held. nil if it is gone, or no process of this host.
func (ms *machines) confinement(id vm.ID, m *machine) *Confinement {
	facts, err := process.ConfinementOf(m.PID())
	if err != nil {
		return nil
	}
	c := &Confinement{Confinement: facts}
	c.Cgroup, c.Limits, c.NoCgroup = ms.service.cgroups.Group(id.Short(), facts.Cgroup)
	select {
	case <-m.Done():
		return nil // its pid may be somebody else's by now
	default:
		return c
	}
}

// checkCgroups says whether VMMs that are started now get control groups.
func (s *Service) checkCgroups() doctor.Finding {
	f := doctor.Finding{Code: "cgroup", Severity: doctor.Pass, Title: "Bounds on VMs", Detail: "memory, CPU and tasks of each VM's program, by its control group"}
	if why := s.cgroups.Missing(); why != "" {
		// Nothing is broken: VMs run, as they would in a terminal.
		f.Detail = "none: " + why
	}
	return f
}

// openLogKeeper makes what bounds the logs of running VMs. Without it they are bounded at each start.
func (s *Service) openLogKeeper() {
	keeper, err := console.NewKeeper(func(path string, err error) {
		s.log.Error("the log of a running VM cannot be bounded", "path", path, "err", err)
	})
	if err != nil {
		s.warn("logs of running VMs are not bounded: %v", err)
		s.log.Error("logs of running VMs are not bounded", "err", err)
		return
	}
	s.logs = keeper
}

// keepLog bounds the log of a VM until the returned function is called.
func (s *Service) keepLog(id vm.ID) (stop func()) {
	if s.logs == nil {
		return func() {}
	}
	return s.logs.Add(s.logFile(id))
}
