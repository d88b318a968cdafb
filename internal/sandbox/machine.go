package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/cgroup"
	"git.thaloco.com/thaloco/banger/internal/console"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/lifecycle"
	"git.thaloco.com/thaloco/banger/internal/operation"
	"git.thaloco.com/thaloco/banger/internal/vm"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// machines owns the VMM processes that this daemon knows, and the agent session of each.
type machines struct {
	service *Service
	parts   []capability

	mu   sync.Mutex
	byID map[vm.ID]*machine
}

type machine struct {
	vmm.Machine
	secret string
	unkeep func() // its log is bounded until then

	// open serialises making the session; sess is the one in use, replaced when it broke.
	open     chan struct{}
	mu       sync.Mutex
	sess     *agent.Session
	released bool // no session may be put into sess any more

	pulse pulse

	stats *sharing[Stats]
	ports *sharing[Ports]
}

// whileAlive is ctx that ends with the machine as well: what is gone will never answer.
func (m *machine) whileAlive(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-m.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

func (ms *machines) get(id vm.ID) *machine {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	return ms.byID[id]
}

// add takes a machine in and watches it. One that is known already is kept, and the new handle closed.
func (ms *machines) add(v *vm.VM, vm_ vmm.Machine) error {
	ms.mu.Lock()
	if old := ms.byID[v.ID]; old != nil {
		ms.mu.Unlock()
		if old.PID() == vm_.PID() {
			return vm_.Close()
		}
		ms.drop(v.ID)
		ms.mu.Lock()
	}
	// Only now: while a driver starts a machine, it finds what that one said by an offset into the log.
	unkeep := ms.service.keepLog(v.ID)
	m := &machine{Machine: vm_, secret: v.Secrets.Agent, unkeep: unkeep, open: make(chan struct{}, 1),
		stats: newSharing[Stats](), ports: newSharing[Ports]()}
	ms.byID[v.ID] = m
	ms.mu.Unlock()
	ms.service.watchers.Go(func() { ms.watch(v.ID, m) })
	return nil
}

// drop lets go of a machine without ending it.
func (ms *machines) drop(id vm.ID) {
	ms.mu.Lock()
	m := ms.byID[id]
	delete(ms.byID, id)
	ms.mu.Unlock()
	if m != nil {
		m.release()
	}
}

func (m *machine) release() {
	m.mu.Lock()
	sess := m.sess
	m.sess, m.released = nil, true
	m.mu.Unlock()
	if sess != nil {
		_ = sess.Close() // it may be broken already; nothing is to be done about it
	}
	m.unkeep()
	_ = m.Close()
}

func (ms *machines) closeAll() {
	ms.mu.Lock()
	all := ms.byID
	ms.byID = map[vm.ID]*machine{}
	ms.mu.Unlock()
	for _, m := range all {
		m.release()
	}
}

// session returns the agent session of a running machine, opening one if there is none or it broke.
func (ms *machines) session(ctx context.Context, id vm.ID) (*agent.Session, error) {
	m := ms.get(id)
	if m == nil {
		return nil, fault.New(fault.Precondition, id.Short(), "the VM does not run")
	}
	// One opener at a time, and its waiters may give up: the link may carry one connection only.
	select {
	case m.open <- struct{}{}:
		defer func() { <-m.open }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	m.mu.Lock()
	sess := m.sess
	m.mu.Unlock()
	if sess != nil {
		select {
		case <-sess.Done():
			_ = sess.Close()
		default:
			return sess, nil
		}
	}
	ctx, cancel := m.whileAlive(ctx)
	defer cancel()
	sess, err := agent.Open(ctx, m.Link(), m.secret)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.released { // meanwhile: nobody would ever close it
		return nil, errors.Join(fault.New(fault.Precondition, id.Short(), "the VM does not run"), sess.Close())
	}
	m.sess = sess
	return sess, nil
}

// health says in a word whether the agent answers.
func (ms *machines) health(ctx context.Context, id vm.ID) string {
	sess, err := ms.session(ctx, id)
	if err != nil {
		return "does not answer: " + guestText(err.Error())
	}
	h, err := sess.Client().Health(ctx, &agentv1.HealthRequest{})
	if err != nil {
		return "does not answer: " + guestText(err.Error())
	}
	return "answers, userspace " + guestText(h.Userspace)
}

// agentVersion is that of the daemon which started a VM that runs.
func (s *Service) agentVersion(ctx context.Context, id vm.ID) (string, error) {
	sess, err := s.machines.session(ctx, id)
	if err != nil {
		return "", err
	}
	h, err := sess.Client().Health(ctx, &agentv1.HealthRequest{})
	return h.GetAgentVersion(), err
}

func (ms *machines) state(ctx context.Context, id vm.ID) (vmm.State, error) {
	m := ms.get(id)
	if m == nil {
		return "", fault.New(fault.Precondition, id.Short(), "the VM does not run")
	}
	return m.State(ctx)
}

// resume lets a machine that its VMM paused go on.
func (ms *machines) resume(ctx context.Context, id vm.ID) (bool, error) {
	m := ms.get(id)
	if m == nil {
		return false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	st, err := m.State(ctx)
	if err != nil || st != vmm.Paused {
		return false, err
	}
	return true, m.Resume(ctx)
}

// watch follows one machine until it ends or the daemon does: it notes pauses, and takes down a VM
// whose VMM ended by itself.
func (ms *machines) watch(id vm.ID, m *machine) {
	s := ms.service
	var changes <-chan vmm.Change
	if r, ok := m.Machine.(vmm.Reporter); ok {
		changes = r.Changes()
	}
	for {
		select {
		case c, ok := <-changes:
			if !ok {
				changes = nil
				continue
			}
			ms.noteChange(id, m, c)
		case <-m.Done():
			ms.ended(id, m)
			return
		case <-s.bg.Done():
			return
		}
	}
}

// update changes a VM's record under its lock if m still is its machine.
func (ms *machines) update(id vm.ID, m *machine, change func(*vm.VM) bool) {
	s := ms.service
	unlock, err := s.locks.lock(s.bg, id)
	if err != nil {
		return // the daemon stops; the next one looks for itself
	}
	defer unlock()
	v, ok := s.store.VM(id)
	if !ok || ms.get(id) != m || !change(&v) {
		return
	}
	if err := s.store.Save(s.bg, v); err != nil && s.bg.Err() == nil {
		s.log.Error("a change of a VM could not be recorded", "vm", id, "err", err)
	}
}

func (ms *machines) noteChange(id vm.ID, m *machine, c vmm.Change) {
	ms.service.log.Warn("the VMM changed state by itself", "vm", id, "state", c.State, "reason", c.Reason)
	if c.State == vmm.Running {
		ms.service.watchers.Go(func() { // a guest's clock may have stood still meanwhile
			if v, ok := ms.service.store.VM(id); ok {
				ms.service.setClock(ms.service.bg, v)
			}
		})
	}
	ms.update(id, m, func(v *vm.VM) bool {
		old := v.Note
		switch {
		case c.State == vmm.Paused && c.Reason == vmm.NoRoom:
			v.Note = fmt.Sprintf("paused: the host's disk is all but full; free space, then `banger vm start %s` lets it go on", v.Name)
		case c.State == vmm.Paused && c.Reason == vmm.IOError:
			v.Note = fmt.Sprintf("paused: the host could not take a write (is its disk full?); free space, then `banger vm start %s` lets it go on", v.Name)
		case c.State == vmm.Paused:
			v.Note = fmt.Sprintf("paused; `banger vm start %s` lets it go on", v.Name)
		default:
			v.Note = ""
		}
		return v.Note != old
	})
}

// endNotes say of each vmm.Exit's reason what a user is told.
var endNotes = map[string]string{
	vmm.GuestShutdown: "the guest powered itself off",
	vmm.GuestReset:    "the guest rebooted",
	vmm.Killed:        "its VMM was killed",
	vmm.Crashed:       "its VMM ended unexpectedly",
}

// ended takes down a running VM whose VMM is gone without anybody here having asked, and starts it
// again if the guest rebooted.
func (ms *machines) ended(id vm.ID, m *machine) {
	s := ms.service
	// An operation that is at it may see the end itself, or may have seen enough before it.
	unlock, err := s.locks.lock(s.bg, id)
	if err != nil {
		return // the daemon stops; the next one looks for itself
	}
	v, ok := s.store.VM(id)
	unlock()
	if !ok || ms.get(id) != m || v.State != vm.Running {
		return
	}
	exit := m.Exit()
	kind := operation.Stop
	if exit.Reason == vmm.GuestReset {
		kind = operation.Restart
	}
	_, err = s.begin(s.bg, kind, v, func(ctx context.Context, h *operation.Handle, v *vm.VM) error {
		if ms.get(id) != m || v.State != vm.Running {
			return nil // an operation was faster
		}
		note := endNotes[exit.Reason]
		h.Notice(note)
		if kind == operation.Stop {
			v.Desired = vm.WantStopped
		}
		v.Note = note
		if err := s.takeDown(ctx, h, v, lifecycle.Hard); err != nil {
			return err
		}
		if kind == operation.Restart {
			v.State = vm.Stopping
			if err := s.roomToRun(); err != nil {
				return s.endFailed(ctx, h, v, err, false)
			}
			return s.bringUp(ctx, h, v)
		}
		return s.store.Save(context.WithoutCancel(ctx), *v)
	})
	if err != nil && s.bg.Err() == nil {
		s.log.Error("the end of a VMM could not be recorded", "vm", id, "err", err)
	}
}

// machineCapability owns the VMM process and the VM's run directory.
type machineCapability struct{ machines *machines }

func (c *machineCapability) Name() string { return stepVMM }

// identity is the part of the spec by which a running VMM is found. It needs no artifact, so that a
// VM whose bundle is gone can still be stopped and deleted.
func (ms *machines) identity(v *vm.VM) vmm.Spec {
	s := ms.service
	return vmm.Spec{ID: string(v.ID), Owner: s.store.InstallationID(), Name: v.Name,
		RunDir: s.runDir(v.ID), Log: s.logFile(v.ID), CID: v.Lease.CID}
}

// spec gathers what every capability has to say about the machine.
func (c *machineCapability) spec(ctx context.Context, v *vm.VM) (vmm.Spec, error) {
	spec := c.machines.identity(v)
	spec.VCPU, spec.MemoryMiB = v.Spec.VCPU, v.Spec.MemoryMiB
	id, description, limits := c.machines.group(v)
	spec.Cgroup = func(ctx context.Context) func(context.Context, int) {
		return c.machines.service.cgroups.Begin(ctx, id, description, limits)
	}
	// TERM: systemd asks the console for its size and colours, and waits for an answer, unless it is a
	// dumb one (systemd's src/basic/terminal-util.c); a log file answers nothing.
	//
	// cryptomgr.notests: the kernel's self-tests of its ciphers are a sixth of an emulated kernel's boot.
	// lsm: Debian's list without bpf, for which systemd would parse the kernel's whole type information
	// at each boot, to enforce a setting (RestrictFileSystems=) that no unit has.
	spec.Cmdline = "quiet net.ifnames=0 random.trust_cpu=on TERM=dumb cryptomgr.notests" +
		" lsm=landlock,lockdown,yama,loadpin,safesetid,integrity,apparmor,selinux,smack,tomoyo,ipe"
	for _, p := range c.machines.parts {
		if mc, ok := p.(machineContributor); ok {
			if err := mc.Machine(ctx, v, &spec); err != nil {
				return spec, err
			}
		}
	}
	order := []vmm.Role{vmm.RoleBase, vmm.RoleSystem, vmm.RoleWork, vmm.RoleModules, vmm.RoleConfig}
	slices.SortStableFunc(spec.Drives, func(a, b vmm.Drive) int {
		return slices.Index(order, a.Role) - slices.Index(order, b.Role)
	})
	return spec, nil
}

// group is the control group of a VM's VMM.
func (ms *machines) group(v *vm.VM) (id, description string, l cgroup.Limits) {
	return v.ID.Short(), "banger VM " + v.Name, cgroup.ForVM(v.Spec.VCPU, v.Spec.MemoryMiB, ms.service.driver.Features().OverheadMiB)
}

// Prepare starts the VMM, or takes in the one that runs.
func (c *machineCapability) Prepare(ctx context.Context, v *vm.VM) error {
	spec, err := c.spec(ctx, v)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(spec.RunDir, 0o700); err != nil {
		return fault.Wrap(err, fault.Internal, spec.RunDir, "the run directory cannot be made")
	}
	if err := console.Bound(spec.Log); err != nil {
		return fault.Wrap(err, fault.Internal, spec.Log, "the VM's log cannot be cut back")
	}
	if err := console.MarkStart(spec.Log); err != nil {
		return fault.Wrap(err, fault.Internal, spec.Log, "the VM's log cannot be written")
	}
	s := c.machines.service
	m, err := s.driver.Start(ctx, spec)
	if err != nil {
		return err
	}
	v.VMM, v.Accel, v.PID, v.Boot = s.driver.Name(), s.driver.Features().Accel, m.PID(), nil
	return c.machines.add(v, m)
}

// Observe takes in a VMM that a former daemon left running.
func (c *machineCapability) Observe(ctx context.Context, v *vm.VM) (bool, error) {
	return c.machines.observe(ctx, v)
}

func (ms *machines) observe(ctx context.Context, v *vm.VM) (bool, error) {
	if m := ms.get(v.ID); m != nil {
		select {
		case <-m.Done():
			return false, nil
		default:
			return true, nil
		}
	}
	m, err := ms.adopt(ctx, v)
	if fault.Is(err, fault.NotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	// Its daemon may have been killed between the start and this, or knew nothing of it. What another kind
	// of VMM needs is not known here: a bound too low would end the VM.
	if d := ms.service.driver; v.VMM == "" || d.Name() == v.VMM && d.Features().Accel == v.Accel {
		id, description, limits := ms.group(v)
		pid := m.PID()
		ms.service.watchers.Go(func() { ms.service.cgroups.Put(ms.service.bg, id, description, limits, pid) })
	}
	return true, ms.add(v, m)
}

// adopt finds the VMM of a VM, whichever driver started it: the record may be older than that, if the
// daemon was killed before it was saved. The driver on record is asked first. fault.NotFound if none runs.
func (ms *machines) adopt(ctx context.Context, v *vm.VM) (vmm.Machine, error) {
	rank := func(d vmm.Driver) int {
		if d.Name() == v.VMM {
			return 0
		}
		return 1
	}
	drivers := append([]vmm.Driver{ms.service.driver}, ms.service.others...)
	slices.SortStableFunc(drivers, func(a, b vmm.Driver) int { return rank(a) - rank(b) })
	var m vmm.Machine
	var err error
	for _, d := range drivers {
		if m, err = d.Adopt(ctx, ms.identity(v)); !fault.Is(err, fault.NotFound) {
			return m, err
		}
	}
	return nil, err
}

// Cleanup ends the VMM, whatever state it is in, and removes its control group and the run directory.
func (c *machineCapability) Cleanup(ctx context.Context, v *vm.VM, _ lifecycle.How) error {
	spec := c.machines.identity(v)
	var m vmm.Machine
	if known := c.machines.get(v.ID); known != nil {
		m = known
	} else if found, err := c.machines.adopt(ctx, v); err == nil {
		m = found
	} else if !fault.Is(err, fault.NotFound) {
		return err
	}
	if m != nil {
		if err := m.Kill(ctx); err != nil {
			return err
		}
		c.machines.drop(v.ID)
		_ = m.Close()
	}
	if err := c.machines.service.cgroups.Remove(ctx, v.ID.Short()); err != nil {
		return err
	}
	if err := os.RemoveAll(spec.RunDir); err != nil {
		return fault.Wrap(err, fault.Internal, spec.RunDir, "the run directory cannot be removed")
	}
	v.PID = 0
	return nil
}

// kvmFix is what to do about a host whose KVM cannot be used, by the reason that vmm.KVMUsable gave.
func kvmFix(reason string) string {
	switch {
	case strings.Contains(reason, "may not open"):
		return "sudo usermod -aG kvm $USER, then log in again"
	case strings.Contains(reason, "no /dev/kvm"):
		return "sudo modprobe -a kvm_intel kvm_amd, or switch on virtualization (VT-x, SVM) in the firmware"
	}
	return "let the provider of this machine switch on nested virtualization; VMs run without it"
}

// vmmVersion is that of the VMM that starts VMs, "" if it is not known.
func (s *Service) vmmVersion() string {
	if v, ok := s.driver.(vmm.Versioned); ok {
		return v.Version()
	}
	return ""
}

// Check asks the driver.
func (c *machineCapability) Check(ctx context.Context) []doctor.Finding {
	s := c.machines.service
	var out []doctor.Finding
	if err := s.driver.Check(ctx); err != nil {
		out = append(out, doctor.FromError("vmm", "Virtual machine monitor", err, doctor.ShowLog))
	} else {
		out = append(out, doctor.Finding{Code: "vmm", Severity: doctor.Pass, Title: "Virtual machine monitor", Detail: strings.TrimSpace(s.driver.Name() + " " + s.vmmVersion())})
	}
	jail, jailed := s.checkJail(ctx)
	out = append(append(out, s.checkCgroups(jailed)), jail...)
	accel := s.driver.Features().Accel
	switch {
	case s.notice == "":
	case accel == "kvm":
		out = append(out, doctor.Finding{Code: "vmm-choice", Severity: doctor.Warn, Title: "Choice of the monitor", Detail: s.notice,
			Fix: "make runtime brings Firecracker, or set firecracker_bin in config.toml"})
	default:
		return append(out, doctor.Finding{Code: "kvm", Severity: doctor.Warn, Title: "Hardware virtualization", Detail: s.notice,
			Fix: kvmFix(s.notice)})
	}
	return append(out, doctor.Finding{Code: "kvm", Severity: doctor.Pass, Title: "Hardware virtualization", Detail: accel})
}

// bootTail is how much of a VM's log is searched for why a boot failed: a panic's trace may follow the
// reason.
const bootTail = 32 << 10

// agentCapability owns the session with the guest's agent. It is the last to come up, so that a VM
// is running when its agent answers, and the first to go: the orderly end of a guest is asked of it.
type agentCapability struct{ machines *machines }

func (c *agentCapability) Name() string { return stepAgent }

// Waiting says that the guest boots meanwhile, which is not to be interrupted.
func (c *agentCapability) Waiting() {}

// Prepare waits until the guest's agent answers, the VMM ends, or boot_timeout passes. A guest that
// does not come up is explained by what its console says.
func (c *agentCapability) Prepare(ctx context.Context, v *vm.VM) error {
	s := c.machines.service
	m := c.machines.get(v.ID)
	if m == nil {
		return fault.New(fault.Internal, v.Name, "there is no machine to reach the agent of")
	}
	bound := s.cfg.BootTimeout
	bounded, stop := context.WithTimeout(ctx, bound)
	defer stop()
	wait, cancel := m.whileAlive(bounded)
	defer cancel()
	// The handshake is the answer: it proves that the agent runs, and that it is this VM's. A call on top
	// of it would have to wait for the guest's first use of its HTTP server, beside an init that starts.
	if _, err := c.machines.session(wait, v.ID); err != nil {
		return c.bootError(ctx, v, m, bound, err)
	}
	now := time.Now()
	v.StartedAt = &now
	up := *v
	s.watchers.Go(func() { c.followBoot(up.ID, m) })
	s.watchers.Go(func() { s.publishPorts(up, m) })
	s.watchers.Go(func() { s.setClock(s.bg, up) }) // that of some machines begins seconds off
	return nil
}

// stage makes a guest's stage fit for a record: JSON has no way to write what is not finite.
func stage(st *agentv1.Stage) vm.Stage {
	at := st.GetAtMs()
	if !(at >= 0 && at <= maxStageMS) {
		at = 0
	}
	return vm.Stage{Name: guestText(st.GetName()), AtMS: at}
}

// maxStageMS is the latest that a guest's stage can have been reached: a hundred years.
const maxStageMS = 100 * 365 * 24 * 3600 * 1000

// followBoot records the stages of the boot as the guest reports them. It ends with the boot, the
// session, or the daemon; what it misses is shown by the next one that asks.
func (c *agentCapability) followBoot(id vm.ID, m *machine) {
	bounded, stop := context.WithTimeout(c.machines.service.bg, 10*time.Minute)
	defer stop()
	ctx, cancel := m.whileAlive(bounded)
	defer cancel()
	sess, err := c.machines.session(ctx, id)
	if err != nil {
		return
	}
	stream, err := sess.Client().WatchBoot(ctx, &agentv1.WatchBootRequest{})
	if err != nil {
		return
	}
	defer stream.Close()
	var seen []vm.Stage
	for stream.Receive() && len(seen) < maxStages {
		st := stage(stream.Msg().Stage)
		// The guest's clock beside the host's: with it the stages, which the guest stamps, can be laid
		// over what the host did.
		c.machines.service.log.Info("the guest reached a stage of its boot", "vm", id, "stage", st.Name, "detail", guestText(stream.Msg().GetStage().GetDetail()),
			"guest_ms", stream.Msg().GetUptimeMs())
		seen = append(seen, st)
		if n := st.Name; n != boot.StageAgent && n != boot.StageUserspace && n != boot.StageSSH {
			continue // those before the agent come together with it: one write for all
		}
		c.machines.update(id, m, func(v *vm.VM) bool {
			if v.State != vm.Running || len(v.Boot) >= len(seen) {
				return false
			}
			v.Boot = slices.Clone(seen)
			return true
		})
	}
}

// maxStages bounds what a guest can make us remember.
const maxStages = 64

// bootError makes the error of a guest that did not come up: why, by its own last words if it has
// any, and the last lines of its console.
func (c *agentCapability) bootError(ctx context.Context, v *vm.VM, m *machine, bound time.Duration, cause error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s := c.machines.service
	tail, err := console.Tail(s.logFile(v.ID), bootTail)
	tail = console.SinceStart(tail)
	if err != nil {
		cause = errors.Join(cause, err)
	}
	// That nobody answered is what the error says; how each attempt ended is for the log.
	s.log.Warn("the guest did not come up", "vm", v.ID, "err", cause)
	var f *fault.Error
	gone := false
	select {
	case <-m.Done():
		gone = true
	default:
	}
	if stage, reason, ok := boot.FatalReason(tail); ok {
		f = fault.New(fault.Unavailable, v.Name, "the guest could not boot: %s: %s", guestText(stage), guestText(reason))
	} else if gone {
		f = fault.New(fault.Unavailable, v.Name, "its VMM ended while the guest was booting (%s)%s", m.Exit().Reason, lastLines(tail))
	} else if c.paused(ctx, m) {
		return fault.New(fault.Exhausted, v.Name, "its VMM paused the guest while it was booting: the host could not take a write, or soon could not").
			WithHint("free space on the host (df -h %s), then try again with `banger vm start %s`", s.paths.State, v.Name)
	} else if code := fault.CodeOf(cause); code != fault.Timeout && code != fault.Unavailable {
		f = fault.New(code, v.Name, "the guest's agent did not answer as it should: %s%s", guestText(cause.Error()), lastLines(tail))
	} else {
		f = fault.New(fault.Timeout, v.Name, "the guest's agent did not answer within %s of the start%s", bound, lastLines(tail))
	}
	return f.WithHint("read its console in %s, try again with `banger vm start %s`, or delete it with `banger vm delete %s`",
		s.logFile(v.ID), v.Name, v.Name)
}

func (c *agentCapability) paused(ctx context.Context, m *machine) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	st, err := m.State(ctx)
	return err == nil && st == vmm.Paused
}

// Observe opens the session again after a restart of the daemon, in the background: a guest that
// does not answer is no reason for the daemon to wait, or to take the VM down.
func (c *agentCapability) Observe(_ context.Context, v *vm.VM) (bool, error) {
	m := c.machines.get(v.ID)
	if m == nil {
		return false, nil
	}
	s := c.machines.service
	found := *v
	s.watchers.Go(func() { c.followBoot(found.ID, m) })
	s.watchers.Go(func() { s.publishPorts(found, m) })
	s.watchers.Go(func() { s.setClock(s.bg, found) }) // the host may have slept while no daemon was there
	return true, nil
}

// Cleanup shuts the guest down if there is time for manners, then lets go of the session. A guest
// that does not go within stop_timeout is left to the VMM's Cleanup.
func (c *agentCapability) Cleanup(ctx context.Context, v *vm.VM, how lifecycle.How) error {
	m := c.machines.get(v.ID)
	if m == nil && how == lifecycle.Orderly {
		// A former daemon began this stop: its guest still runs, and holds what is not written yet. An
		// error is the next step's to report.
		if found, err := c.machines.observe(ctx, v); err == nil && found {
			m = c.machines.get(v.ID)
		}
	}
	if m == nil {
		return nil
	}
	if how == lifecycle.Orderly {
		if err := c.shutdown(ctx, v, m); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			v.Note = "forced off: " + guestText(err.Message)
			c.machines.service.log.Warn("the guest did not shut down, its VMM is ended", "vm", v.ID, "err", err)
		}
	}
	m.mu.Lock()
	sess := m.sess
	m.sess = nil
	m.mu.Unlock()
	if sess != nil {
		_ = sess.Close()
	}
	return nil
}

// shutdown asks the guest to power off and waits until it has.
func (c *agentCapability) shutdown(ctx context.Context, v *vm.VM, m *machine) *fault.Error {
	s := c.machines.service
	bound := s.cfg.StopTimeout
	wait, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	// A quarter of the time for the agent to take the request: the rest belongs to the guest's init.
	bounded, stopAsking := context.WithTimeout(wait, bound/4)
	defer stopAsking()
	ask, stop := m.whileAlive(bounded)
	defer stop()
	// A paused guest hears nothing. If what paused it has gone, it goes on and can end in order.
	if st, err := m.State(ask); err == nil && st == vmm.Paused {
		_ = m.Resume(ask) // then it is forced off, and the note says so
	}
	sess, err := c.machines.session(ask, v.ID)
	if err == nil {
		// What the guest does not use takes no room of the host while it is stopped. Not all VMMs and not all
		// agents can do it, and a stop does not depend on it.
		trim, stopTrim := context.WithTimeout(ask, min(stopTrimTime, bound/8))
		if err := c.machines.trim(trim, v); err != nil {
			s.log.Debug("a guest that stops was not trimmed", "vm", v.ID, "err", err)
		}
		stopTrim()
		_, err = sess.Client().Shutdown(ask, &agentv1.ShutdownRequest{})
	}
	if err != nil { // perhaps the answer was lost because the guest was quick
		select {
		case <-m.Done():
			return nil
		case <-bounded.Done():
		}
		return fault.Wrap(err, fault.Unavailable, v.Name, "the agent did not take the request to shut down within %s", bound/4)
	}
	select {
	case <-m.Done():
		return nil
	case <-wait.Done():
		return fault.New(fault.Timeout, v.Name, "the guest did not power off within %s", bound)
	}
}

// Check has nothing to look at on the host: the agent travels in the initrd.
func (c *agentCapability) Check(context.Context) []doctor.Finding { return nil }
