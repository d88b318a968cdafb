package sandbox

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/imagebuild"
	"git.thaloco.com/thaloco/banger/internal/version"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Doctor runs every capability's check, in order, and the host's. With fix, what can be repaired without losing
// anything is.
func (s *Service) Doctor(ctx context.Context, fix bool) []doctor.Finding {
	var checks []doctor.Check
	for _, c := range s.machines.parts {
		checks = append(checks, c.Check)
	}
	return doctor.Run(ctx, append(checks, checkSSH, s.checkState, s.checkLingering, s.checkBuilds, s.checkNames, s.checkAgents, s.checkWarnings), fix)
}

func checkSSH(context.Context) []doctor.Finding {
	f := doctor.Finding{Code: "ssh", Severity: doctor.Pass, Title: "SSH client"}
	path, err := exec.LookPath("ssh")
	if f.Detail = path; err != nil {
		f.Severity, f.Detail, f.Fix = doctor.Fail, err.Error(), "sudo apt install openssh-client"
	}
	return []doctor.Finding{f}
}

// scarce is how much room on the host's disk is worth a warning: VMs stop when it is used up.
const scarce = 4 * vm.GiB

// checkState looks at where all VMs lie: the room there, what the filesystem can do, and who may look in.
func (s *Service) checkState(context.Context) []doctor.Finding {
	const title = "Filesystem of VMs"
	dir := s.paths.State
	fs, err := disk.FilesystemOf(dir)
	if err != nil {
		return []doctor.Finding{doctor.FromError("disk", "Room for VMs", err, seeDir(dir))}
	}
	room := doctor.Finding{Code: "disk", Severity: doctor.Pass, Title: "Room for VMs",
		Detail: fmt.Sprintf("%s of %s free in %s", size(fs.Free), size(fs.Total), dir)}
	if err := disk.CheckRoom(dir, 0); err != nil {
		room = doctor.FromError("disk", room.Title, err, seeDir(dir))
	} else if fs.Free < scarce {
		room.Severity, room.Fix = doctor.Warn, fmt.Sprintf("free space on it (df -h %s), or delete a VM (banger vm list)", dir)
	}
	kind := doctor.Finding{Code: "filesystem", Severity: doctor.Pass, Title: title, Detail: fs.Name + ": a new disk shares blocks with what it is copied from"}
	switch {
	case fs.Doubt != "":
		kind.Severity, kind.Detail, kind.Fix = doctor.Warn, fs.Name+": "+fs.Doubt, "export BANGER_STATE_DIR=<a directory on a disk of this host>"
	case !fs.Clones:
		kind.Detail = fs.Name + ": new disks are copied block by block, which btrfs and xfs need not do"
	}
	return []doctor.Finding{room, kind, s.checkPrivate()}
}

// seeDir is the fix of a directory that something is the matter with, nobody knows what.
func seeDir(dir string) string { return "see it: ls -ld " + dir + "; df -h " + dir }

// size is a size for people: whole units below ten would hide too much.
func size(n int64) string { return fmt.Sprintf("%.1f GiB", float64(n)/float64(vm.GiB)) }

// checkPrivate looks whether others may look at disks and secrets of VMs.
func (s *Service) checkPrivate() doctor.Finding {
	f := doctor.Finding{Code: "state-mode", Severity: doctor.Pass, Title: "Privacy of VMs", Detail: "only this user may look into " + s.paths.State}
	st, err := os.Stat(s.paths.State)
	if err != nil {
		return doctor.FromError(f.Code, f.Title, err, seeDir(s.paths.State))
	}
	if open := st.Mode().Perm() & 0o077; open != 0 {
		f.Severity, f.Fix = doctor.Warn, "chmod 700 "+s.paths.State
		f.Detail = fmt.Sprintf("others may look into %s (mode %04o)", s.paths.State, st.Mode().Perm())
		f.Repair = func(context.Context) error { return s.paths.EnsureState() }
	}
	return f
}

// checkLingering looks whether VMs outlive the user's last session.
func (s *Service) checkLingering(context.Context) []doctor.Finding {
	user, ok := s.cgroups.Lingering()
	f := doctor.Finding{Code: "linger", Severity: doctor.Pass, Title: "VMs after logging out", Detail: "they run on"}
	if !ok {
		f.Severity, f.Fix = doctor.Warn, "sudo loginctl enable-linger "+user
		f.Detail = "systemd may end them with the last session of " + user + ", who does not linger"
	}
	return []doctor.Finding{f}
}

// checkBuilds looks at what image builds need beside what VMs do. A VM takes nothing of it.
func (s *Service) checkBuilds(context.Context) []doctor.Finding {
	f := doctor.Finding{Code: "image-build", Severity: doctor.Pass, Title: "Image builds", Detail: "their sources are named and pinned; what is not here is fetched by a build"}
	if err := imagebuild.Check(s.sources()); err != nil {
		f = doctor.FromError(f.Code, f.Title, err, doctor.ShowLog)
		f.Severity = doctor.Warn
	}
	return []doctor.Finding{f}
}

func (s *Service) checkNames(ctx context.Context) []doctor.Finding {
	return append([]doctor.Finding{s.checkDNS(ctx)}, s.links.check()...)
}

// agentTime bounds the question to one guest; guestsAtOnce how many are asked beside each other.
const (
	agentTime    = 2 * time.Second
	guestsAtOnce = 16
)

// checkAgents asks the guests that run which version of banger they were started by.
func (s *Service) checkAgents(ctx context.Context) []doctor.Finding {
	f := doctor.Finding{Code: "agents", Severity: doctor.Pass, Title: "Agents in VMs"}
	var mu sync.Mutex
	var older, silent []string
	asked := 0
	var all sync.WaitGroup
	slots := make(chan struct{}, guestsAtOnce)
	for _, v := range s.store.VMs() {
		if v.State != vm.Running {
			continue
		}
		asked++
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			bounded, cancel := context.WithTimeout(ctx, agentTime)
			defer cancel()
			told, err := s.agentVersion(bounded, v.ID)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				silent = append(silent, v.Name)
			case told != version.String():
				older = append(older, v.Name)
			}
		})
	}
	all.Wait()
	slices.Sort(older)
	slices.Sort(silent)
	switch {
	case len(silent) > 0:
		f.Severity, f.Detail = doctor.Warn, "no answer from "+strings.Join(silent, ", ")
		f.Fix = "banger vm show " + silent[0] + ", and if it hangs: banger vm restart " + silent[0]
	case len(older) > 0:
		f.Severity, f.Detail = doctor.Warn, "of another version than the daemon ("+version.String()+"): "+strings.Join(older, ", ")
		f.Fix = "banger vm restart " + strings.Join(older, " ")
	case asked == 0:
		f.Detail = "no VM runs"
	default:
		f.Detail = fmt.Sprintf("%d answer, all of version %s", asked, version.String())
	}
	return []doctor.Finding{f}
}

func (s *Service) checkWarnings(context.Context) []doctor.Finding {
	s.warnMu.Lock()
	defer s.warnMu.Unlock()
	var out []doctor.Finding
	for _, w := range s.warnings {
		out = append(out, doctor.Finding{Code: "state", Severity: doctor.Warn, Title: "State directory", Detail: w.text, Fix: w.fix})
	}
	return out
}
