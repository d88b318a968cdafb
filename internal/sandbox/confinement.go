package sandbox

import (
	"context"

	"git.thaloco.com/thaloco/banger/internal/cgroup"
	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/console"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/process"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// Confinement is what the kernel holds a running VMM to, as it says itself.
type Confinement struct {
	process.Confinement
	Cgroup   string        // name of its control group, "" if it has none of its own
	Limits   cgroup.Limits // of that group
	NoCgroup string        // why it has none, "" if it has one
	Jailed   bool          // it runs in Firecracker's jail
	NoJail   string        // why it does not; "" if it does, or is no VMM that could
}

// confinement reads how a machine is held. nil if it is gone, or no process of this host.
func (ms *machines) confinement(id vm.ID, m *machine) *Confinement {
	facts, err := process.ConfinementOf(m.PID())
	if err != nil {
		return nil
	}
	c := &Confinement{Confinement: facts}
	if j, ok := m.Machine.(vmm.Jailed); ok {
		c.Jailed = j.Jailed()
	}
	if d, ok := ms.service.driver.(vmm.Jailer); ok && !c.Jailed {
		c.NoJail = d.NoJail()
	}
	c.Cgroup, c.Limits, c.NoCgroup = ms.service.cgroups.Group(id.Short(), facts.Cgroup)
	select {
	case <-m.Done():
		return nil // its pid may be somebody else's by now
	default:
		return c
	}
}

// checkJail says whether VMMs that are started now run in jails; nothing of those that never do. A host without is none that is broken.
func (s *Service) checkJail(ctx context.Context) (findings []doctor.Finding, jailed bool) {
	const code, title = "jail", "Jail of VMs"
	d, ok := s.driver.(vmm.Jailer)
	if !ok {
		return nil, false
	}
	jailed, why, err := d.CheckJail(ctx, s.paths.State)
	f := doctor.Finding{Code: code, Severity: doctor.Pass, Title: title, Detail: "each VM's program has a user id and a root directory of its own"}
	switch {
	case err != nil && s.cfg.Jailer == config.JailerOn:
		f = doctor.FromError(code, title, err, doctor.ShowLog)
	case err != nil:
		f.Severity, f.Detail, f.Fix = doctor.Warn, "none: "+why, doctor.FixOf(err, doctor.ShowLog)
	case !jailed:
		f.Detail = "none: " + why
	}
	return []doctor.Finding{f}, jailed
}

// checkCgroups says whether VMMs that are started now get control groups.
func (s *Service) checkCgroups(jailed bool) doctor.Finding {
	f := doctor.Finding{Code: "cgroup", Severity: doctor.Pass, Title: "Bounds on VMs", Detail: "memory, CPU and tasks of each VM's program, by its control group"}
	if why := s.cgroups.Missing(); why != "" && !jailed { // for those in jails, root makes them
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
		s.warn("sudo sysctl fs.inotify.max_user_instances=1024, then banger daemon restart", "logs of running VMs are not bounded: %v", err)
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
