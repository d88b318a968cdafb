package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/bundle"
	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/firecracker"
	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// The three machines that are made in turn, so that what disturbs one disturbs all:
//
//	bare    Firecracker with the very configuration of a VM that banger made, from a file
//	banger  banger vm create
//	stock   Firecracker with Debian as it is installed, on the same CPUs, memory and devices
const (
	kindBare   = "bare"
	kindBanger = "banger"
	kindStock  = "stock"
)

const (
	// restTime is how long a guest is left alone, after its SSH server listens and its init has finished,
	// before its memory is measured.
	restTime = 5 * time.Second
	// bootBound ends the wait for a guest that does not come up; an emulated host takes half a minute.
	bootBound = 2 * time.Minute
	// mostStalls is how many guests of a run may stand still: on an emulated host of two CPUs some do, those in which nothing is of
	// banger among them (docs/lab.md). They are made once more, and counted.
	mostStalls = 3
	// stockSaid is the console line of tools/mkruntime's untrimmed guest.
	stockSaid = "stock: sshd listens"
	// stockCmdline has what the driver gives every machine, and nothing of what banger chose for its guests.
	stockCmdline = "quiet root=/dev/vda rw console=ttyS0 reboot=k panic=1 pci=off i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd"
)

// fcConfig is Firecracker's description of a machine, which `GET /vm/config` gives and --config-file takes
// (docs/getting-started.md in its source). What is not named here is kept as it came.
type fcConfig map[string]json.RawMessage

type fcDrive struct {
	ID       string `json:"drive_id"`
	Path     string `json:"path_on_host"`
	Root     bool   `json:"is_root_device"`
	ReadOnly bool   `json:"is_read_only"`
	Cache    string `json:"cache_type,omitempty"`
	Engine   string `json:"io_engine,omitempty"`
}

// model is a VM that banger made, as Firecracker describes it, and what it takes to run it once more.
type model struct {
	program string
	config  fcConfig
	drives  []fcDrive
	sizes   map[string]int64  // of the drives that are written
	blanks  map[string]string // what they are clones of
	guest   boot.Config
	stock   string // directory of the untrimmed guest
}

// measureBare makes the three machines in turn, or those of measureBoot, without a network: Firecracker alone would need a TAP that
// banger made for it.
func measureBare(ctx context.Context, r *report, o options, dir string, say func(string, ...any)) (err error) {
	s, err := newSite(filepath.Join(dir, "site"), o.banger, o.bangerd, config.NetworkNone, "BANGER_RUNTIME_DIR="+o.runtime)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close(ctx)) }()
	if err := s.connect(ctx); err != nil {
		return err
	}
	say("the first create, which captures the image and is the model")
	m, err := s.model(ctx, dir, o)
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, m.program, "--version").Output()
	if err != nil {
		return err
	}
	r.Machine.Firecracker, _, _ = strings.Cut(string(out), "\n")
	r.Machine.Accel = "kvm"
	if o.boot {
		return measureBoot(ctx, r, m, dir, say)
	}
	return r.inTurn(ctx, dir, []kind{{kindBare, m.bare}, {kindBanger, s.sampleBanger}, {kindStock, m.untrimmed}}, say)
}

// kind is a machine that is made in turn with others; run takes one sample of it, in a directory of its own.
type kind struct {
	name string
	run  func(ctx context.Context, r *report, dir string) error
}

// inTurn takes the samples of all kinds, each of them first as often as the others.
func (r *report) inTurn(ctx context.Context, dir string, kinds []kind, say func(string, ...any)) error {
	for i := range r.plan.Boots {
		for j := range kinds {
			k := kinds[(i+j)%len(kinds)]
			say("%s, %d of %d", k.name, i+1, r.plan.Boots)
			sample := func() (stalled bool, err error) {
				work, err := os.MkdirTemp(dir, k.name+"-")
				if err != nil {
					return false, err
				}
				defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
				bounded, cancel := context.WithTimeoutCause(ctx, bootBound, fault.New(fault.Timeout, k.name, "the guest was not up within %s", bootBound))
				defer cancel()
				err = k.run(bounded, r, work)
				return bounded.Err() != nil && ctx.Err() == nil, err
			}
			stalled, err := sample()
			for ; stalled && r.Stalls < mostStalls; stalled, err = sample() {
				r.Stalls++
				say("%s: its guest stands still, once more: %v", k.name, err)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
			say("%s", r.latest(k.name))
		}
	}
	return nil
}

// model makes a VM, asks its Firecracker what it is made of, and stops it.
func (s *site) model(ctx context.Context, dir string, o options) (*model, error) {
	const name = "model"
	if _, err := s.cli(ctx, "vm", "create", "--vcpu", "1", "--name", name); err != nil {
		return nil, err
	}
	bounded, cancel := context.WithTimeoutCause(ctx, bootBound, fault.New(fault.Timeout, name, "the guest was not up within %s", bootBound))
	defer cancel()
	v, err := s.reported(bounded, name, boot.StageSSH)
	if err != nil {
		return nil, err
	}
	if v.GetVmm() != "firecracker" {
		return nil, fault.New(fault.Unavailable, name, "it runs under %s: this host has no usable KVM, or no Firecracker was found", v.GetVmm()).
			WithHint("make bench-floor measures in the lab")
	}
	m := &model{stock: o.stock, sizes: map[string]int64{}, blanks: map[string]string{}}
	proc := fmt.Sprintf("/proc/%d/", v.GetPid())
	if m.program, err = os.Readlink(proc + "exe"); err != nil {
		return nil, err
	}
	socket := proc + "cwd/api.sock"
	web := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	resp, err := web.Get("http://localhost/vm/config")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&m.config); err != nil {
		return nil, fault.Wrap(err, fault.Internal, name, "its Firecracker does not say what it is made of")
	}
	if err := json.Unmarshal(m.config["drives"], &m.drives); err != nil {
		return nil, err
	}
	for i, d := range m.drives {
		st, err := os.Stat(d.Path)
		if err != nil {
			return nil, err
		}
		switch vmm.Role(d.ID) {
		case vmm.RoleSystem:
			m.blanks[d.ID] = filepath.Join(s.dir, "cache/banger/templates", fmt.Sprintf("banger-system-%d-*.ext4", st.Size()))
		case vmm.RoleWork:
			m.blanks[d.ID] = filepath.Join(o.runtime, bundle.FileName(bundle.WorkSeed))
		case vmm.RoleConfig: // it goes when the VM stops
			b, err := os.ReadFile(d.Path)
			if err != nil {
				return nil, err
			}
			m.drives[i].Path = filepath.Join(dir, "config.tar")
			if err := os.WriteFile(m.drives[i].Path, b, 0o600); err != nil {
				return nil, err
			}
			f, err := os.Open(m.drives[i].Path)
			if err != nil {
				return nil, err
			}
			m.guest, err = boot.ReadDrive(f)
			if err := errors.Join(err, f.Close()); err != nil {
				return nil, err
			}
		default:
			if !d.ReadOnly {
				return nil, fault.New(fault.Internal, d.ID, "is a drive that is written, and it is not known what it begins as")
			}
		}
		m.sizes[d.ID] = st.Size()
	}
	for id, pattern := range m.blanks {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) != 1 {
			return nil, errors.Join(err, fault.New(fault.Internal, id, "there are %d blank disks of its size", len(found)))
		}
		m.blanks[id] = found[0]
	}
	return m, s.stopGuest(ctx, v.GetId()) // not deleted: what it pins stays
}

// launch starts Firecracker with a machine of a file. All that the machine needs is there and on disk
// before. end kills it and waits.
func (m *model) launch(ctx context.Context, c fcConfig, dir string, console io.Writer) (cmd *exec.Cmd, began time.Time, end func() error, err error) {
	b, err := json.Marshal(c)
	if err != nil {
		return nil, began, nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "vm.json"), b, 0o600); err != nil {
		return nil, began, nil, err
	}
	unix.Sync()
	cmd = exec.CommandContext(ctx, m.program, "--no-api", "--level", "Error", "--config-file", "vm.json")
	cmd.Dir, cmd.Env = dir, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout, cmd.Stderr = console, console
	cmd.WaitDelay = 10 * time.Second
	began = time.Now()
	if err := cmd.Start(); err != nil {
		return nil, began, nil, err
	}
	return cmd, began, func() error {
		_ = cmd.Process.Kill() // Wait says whether it is gone
		_ = cmd.Wait()         // killed: that is no error
		return nil
	}, nil
}

// with returns the model's configuration with other parts.
func (m *model) with(parts map[string]any) (fcConfig, error) {
	c := fcConfig{}
	for k, v := range m.config {
		// What it cannot be given, and is null, was not asked for.
		if s := strings.TrimSpace(string(v)); s != "null" {
			c[k] = v
		}
	}
	for k, v := range parts {
		b, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		c[k] = b
	}
	return c, nil
}

// latest is the last sample of each of a machine's figures, for whoever waits: milliseconds and MiB.
func (r *report) latest(kind string) string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(r.samples)) {
		if rest, ok := strings.CutPrefix(name, kind+"."); ok {
			all := r.samples[name]
			out = append(out, fmt.Sprintf("%s %.0f", rest, all[len(all)-1]))
		}
	}
	return kind + ": " + strings.Join(out, ", ")
}

func vsockOf(m *model) map[string]any {
	return map[string]any{"guest_cid": m.guest.CID, "uds_path": "agent.sock"}
}

// bare takes one sample of the floor: the model once more, with disks as new ones are.
func (m *model) bare(ctx context.Context, r *report, dir string) error {
	return m.boot(ctx, r, dir, variant{name: kindBare}, []string{boot.StageSSH, boot.StageUserspace}, r.rest)
}

// boot takes one sample of the model, or of what it is otherwise, until its guest has reached these stages, and calls then with its
// process.
func (m *model) boot(ctx context.Context, r *report, dir string, v variant, until []string, then func(ctx context.Context, kind string, pid int) error) (err error) {
	source, err := v.source(m.config["boot-source"])
	if err != nil {
		return err
	}
	drives := slices.Clone(m.drives)
	for i, d := range drives {
		blank := m.blanks[d.ID]
		if blank == "" {
			continue
		}
		if vmm.Role(d.ID) == vmm.RoleSystem && v.system != "" {
			blank = v.system
		}
		drives[i].Path = filepath.Join(dir, d.ID+".ext4")
		if _, err := disk.Clone(ctx, blank, drives[i].Path); err != nil {
			return err
		}
		if err := os.Truncate(drives[i].Path, m.sizes[d.ID]); err != nil {
			return err
		}
	}
	c, err := m.with(map[string]any{"drives": drives, "vsock": vsockOf(m), "boot-source": source})
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(dir, "console.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	// The agent's session as the daemon opens it: what the daemon may wait for, the floor may as well.
	run, err := rundir.Open(dir)
	if err != nil {
		return err
	}
	defer run.Close()
	up, err := run.ListenFirst(fmt.Sprintf("agent.sock_%d", vmm.UpPort))
	if err != nil {
		return err
	}
	defer up.Close()
	cmd, began, end, err := m.launch(ctx, c, dir, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	sess, err := agent.Open(ctx, vmm.Link{Up: up.Came, Dial: func(ctx context.Context) (net.Conn, error) { return dialGuest(ctx, run) }}, m.guest.Secret)
	if err != nil {
		said, _ := os.ReadFile(log.Name())
		return fmt.Errorf("%w; its console:\n%s", err, said[max(0, len(said)-2000):])
	}
	r.add(v.name+".agent", time.Since(began))
	defer sess.Close()
	watch, err := sess.Client().WatchBoot(ctx, &agentv1.WatchBootRequest{})
	if err != nil {
		return err
	}
	defer watch.Close()
	var stages []*bangerv1.Stage
	for slices.ContainsFunc(until, func(s string) bool { return !slices.ContainsFunc(stages, named(s)) }) {
		if !watch.Receive() {
			return errors.Join(watch.Err(), io.ErrUnexpectedEOF)
		}
		st := watch.Msg().GetStage()
		if st.GetName() == boot.StageSSH {
			r.add(v.name+".ssh", time.Since(began))
		}
		stages = append(stages, &bangerv1.Stage{Name: st.GetName(), AtMs: st.GetAtMs()})
	}
	r.addStages(v.name, stages)
	return then(ctx, v.name, cmd.Process.Pid)
}

func named(name string) func(*bangerv1.Stage) bool {
	return func(s *bangerv1.Stage) bool { return s.GetName() == name }
}

// addStages notes when the guest reached its stages, by its own clock.
func (r *report) addStages(kind string, stages []*bangerv1.Stage) {
	for _, s := range stages {
		r.add(kind+".guest."+s.GetName(), time.Duration(s.GetAtMs()*float64(time.Millisecond)))
	}
}

// rest leaves a guest alone and notes the memory of its VMM, the guest's included, in MiB of PSS.
func (r *report) rest(ctx context.Context, kind string, pid int) error {
	select { // not a wait for anything: the measured moment
	case <-time.After(restTime):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "Pss:" {
			kib, err := strconv.ParseFloat(f[1], 64)
			r.addMiB(kind+".pss", kib/1024)
			return err
		}
	}
	return fault.New(fault.Internal, kind, "the kernel does not say how much memory process %d has", pid)
}

// dialGuest connects to the agent of a Firecracker that works in dir.
func dialGuest(ctx context.Context, dir *rundir.Dir) (net.Conn, error) {
	conn, err := dir.Dial(ctx, "agent.sock")
	if err != nil {
		return nil, err
	}
	if err := firecracker.Connect(ctx, conn, vmm.AgentPort); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// sampleBanger takes one sample of `banger vm create`, whole process.
func (s *site) sampleBanger(ctx context.Context, r *report, dir string) (err error) {
	name := filepath.Base(dir)
	defer func() {
		if err != nil {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), bootBound)
			defer cancel()
			err = errors.Join(err, s.delete(undo, name))
		}
	}()
	unix.Sync() // as before the others: what they left unwritten is not this one's
	began := time.Now()
	u, err := s.cli(ctx, "vm", "create", "--vcpu", "1", "--name", name)
	if err != nil {
		return err
	}
	r.add(kindBanger+".create", u.Wall)
	if _, err := s.reported(ctx, name, boot.StageSSH); err != nil {
		return err
	}
	r.add(kindBanger+".ssh", time.Since(began))
	v, err := s.reported(ctx, name, boot.StageSSH, boot.StageUserspace)
	if err != nil {
		return err
	}
	r.addStages(kindBanger, v.GetBoot())
	op, err := s.createOf(ctx, v.GetId())
	if err != nil {
		return err
	}
	last := began
	for i, st := range op.GetStages() {
		if i == 0 {
			r.add(kindBanger+".before", st.GetStartedAt().AsTime().Sub(began))
		}
		last = st.GetFinishedAt().AsTime()
		r.add(kindBanger+"."+st.GetName(), last.Sub(st.GetStartedAt().AsTime()))
	}
	r.add(kindBanger+".after", began.Add(u.Wall).Sub(last))
	if err := r.rest(ctx, kindBanger, int(v.GetPid())); err != nil {
		return err
	}
	return errors.Join(s.stopGuest(ctx, v.GetId()), s.delete(ctx, name))
}

// untrimmed takes one sample of Debian as it is installed, from a fresh disk.
func (m *model) untrimmed(ctx context.Context, r *report, dir string) (err error) {
	root := filepath.Join(dir, "root.ext4")
	if _, err := disk.Clone(ctx, filepath.Join(m.stock, "disk.ext4"), root); err != nil {
		return err
	}
	c, err := m.with(map[string]any{
		"drives": []fcDrive{{ID: "root", Path: root, Cache: "Writeback", Engine: "Sync"}},
		"vsock":  vsockOf(m),
		"boot-source": map[string]string{"kernel_image_path": filepath.Join(m.stock, "vmlinux"), "initrd_path": filepath.Join(m.stock, "initrd.img"),
			"boot_args": stockCmdline},
	})
	if err != nil {
		return err
	}
	read, write := io.Pipe()
	defer read.Close()
	cmd, began, end, err := m.launch(ctx, c, dir, write)
	if err != nil {
		return err
	}
	listens := make(chan error, 1)
	var reader sync.WaitGroup
	reader.Go(func() {
		var tail []string
		lines := bufio.NewScanner(read)
		found := false
		for lines.Scan() { // to its end: a pipe that nobody reads stops Firecracker
			if !found && strings.Contains(lines.Text(), stockSaid) {
				found = true
				r.add(kindStock+".ssh", time.Since(began)) // read after listens
				listens <- nil
			}
			if tail = append(tail, lines.Text()); len(tail) > 20 {
				tail = tail[1:]
			}
		}
		if !found {
			listens <- fmt.Errorf("the console ended: %s", strings.Join(tail, "\n"))
		}
	})
	defer func() {
		err = errors.Join(err, end(), write.Close())
		reader.Wait()
	}()
	select {
	case err = <-listens:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	return r.rest(ctx, kindStock, cmd.Process.Pid)
}
