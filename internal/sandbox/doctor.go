package sandbox

import (
	"context"
	"os/exec"

	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/doctor"
)

// Doctor runs every capability's check, in order, and the host's.
func (s *Service) Doctor(ctx context.Context) []doctor.Finding {
	var out []doctor.Finding
	for _, c := range s.machines.parts {
		out = append(out, c.Check(ctx)...)
	}
	if path, err := exec.LookPath("ssh"); err != nil {
		out = append(out, doctor.Finding{Code: "ssh", Severity: doctor.Fail, Title: "SSH client", Detail: err.Error(), Fix: "sudo apt install openssh-client"})
	} else {
		out = append(out, doctor.Finding{Code: "ssh", Severity: doctor.Pass, Title: "SSH client", Detail: path})
	}
	if err := disk.CheckRoom(s.paths.State, 0); err != nil {
		out = append(out, doctor.FromError("disk", "Room for VMs", err))
	} else {
		out = append(out, doctor.Finding{Code: "disk", Severity: doctor.Pass, Title: "Room for VMs", Detail: s.paths.State})
	}
	out = append(out, s.checkDNS(ctx))
	out = append(out, s.links.check()...)
	s.warnMu.Lock()
	defer s.warnMu.Unlock()
	for _, w := range s.warnings {
		out = append(out, doctor.Finding{Code: "state", Severity: doctor.Warn, Title: "State directory", Detail: w})
	}
	return out
}
