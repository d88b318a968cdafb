package cli

import (
	"time"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

// The views are what --output json prints: snake_case, numbers as numbers, sizes in bytes unless
// the name says otherwise, times in RFC 3339. Fields are only ever added (docs/cli.md).

type vmView struct {
	ID          string            `json:"id"`
	Name        string            `json:"name"`
	State       string            `json:"state"`
	Desired     string            `json:"desired"`
	Image       string            `json:"image"`
	ImageID     string            `json:"image_id"`
	VCPU        int32             `json:"vcpu"`
	MemoryMiB   int64             `json:"memory_mib"`
	DiskBytes   int64             `json:"disk_bytes"`
	SystemBytes int64             `json:"system_bytes"`
	Labels      map[string]string `json:"labels"`
	Autostart   bool              `json:"autostart"`
	NAT         bool              `json:"nat"`
	Group       string            `json:"network_group,omitempty"`
	Network     string            `json:"network,omitempty"`
	Address     string            `json:"address,omitempty"`
	CreatedAt   *time.Time        `json:"created_at"`
	StartedAt   *time.Time        `json:"started_at,omitempty"`
	StoppedAt   *time.Time        `json:"stopped_at,omitempty"`
	Failure     *failureView      `json:"failure,omitempty"`
	VMM         string            `json:"vmm,omitempty"`
	Accel       string            `json:"accel,omitempty"`
	PID         int32             `json:"pid,omitempty"`
	Note        string            `json:"note,omitempty"`
	Boot        []bootView        `json:"boot"`

	// Only in `vm show`.
	Kernel               string           `json:"kernel,omitempty"`
	OperationID          string           `json:"operation_id,omitempty"`
	DiskAllocatedBytes   int64            `json:"disk_allocated_bytes,omitempty"`
	SystemAllocatedBytes int64            `json:"system_allocated_bytes,omitempty"`
	Directory            string           `json:"directory,omitempty"`
	Log                  string           `json:"log,omitempty"`
	VMMState             string           `json:"vmm_state,omitempty"`
	Agent                string           `json:"agent,omitempty"`
	Confinement          *confinementView `json:"confinement,omitempty"`
	HostAddresses        []string         `json:"host_addresses,omitempty"`
}

type confinementView struct {
	UID             int32   `json:"uid"`
	NoNewPrivileges bool    `json:"no_new_privileges"`
	Seccomp         string  `json:"seccomp,omitempty"`
	Cgroup          string  `json:"cgroup,omitempty"`
	NoCgroup        string  `json:"no_cgroup,omitempty"`
	MemoryMaxBytes  int64   `json:"memory_max_bytes,omitempty"`
	CPUMax          float64 `json:"cpu_max,omitempty"`
	TasksMax        int64   `json:"tasks_max,omitempty"`
	Jailed          bool    `json:"jailed"`
	NoJail          string  `json:"no_jail,omitempty"`
}

type failureView struct {
	Step  string     `json:"step"`
	Error *errorView `json:"error"`
	At    *time.Time `json:"at"`
}

type bootView struct {
	Name string  `json:"name"`
	AtMS float64 `json:"at_ms"` // since the guest's kernel started
}

func viewVM(m *bangerv1.VM) *vmView {
	if m == nil {
		return nil
	}
	v := &vmView{
		ID: m.GetId(), Name: m.GetName(), State: m.GetState(), Desired: m.GetDesired(),
		Image: m.GetImage(), ImageID: m.GetImageId(), VCPU: m.GetVcpu(), MemoryMiB: m.GetMemoryMib(),
		DiskBytes: m.GetDiskBytes(), SystemBytes: m.GetSystemBytes(), Labels: m.GetLabels(), Autostart: m.GetAutostart(),
		NAT: m.GetNat(), Group: m.GetNetworkGroup(), Network: m.GetNetwork(), Address: m.GetAddress(),
		CreatedAt: timeOf(m.GetCreatedAt()), StartedAt: timeOf(m.GetStartedAt()), StoppedAt: timeOf(m.GetStoppedAt()),
		VMM: m.GetVmm(), Accel: m.GetAccel(), PID: m.GetPid(), Note: m.GetNote(), Boot: []bootView{},
		Kernel: m.GetKernel(), OperationID: m.GetOperationId(),
		DiskAllocatedBytes: m.GetDiskAllocatedBytes(), SystemAllocatedBytes: m.GetSystemAllocatedBytes(),
		Directory: m.GetDirectory(), Log: m.GetLog(), VMMState: m.GetVmmState(), Agent: m.GetAgent(), HostAddresses: m.GetHostAddresses(),
	}
	if v.Labels == nil {
		v.Labels = map[string]string{}
	}
	if f := m.GetFailure(); f != nil {
		v.Failure = &failureView{Step: f.GetStep(), Error: viewError(client.FromFault(f.GetFault())), At: timeOf(f.GetAt())}
	}
	if c := m.GetConfinement(); c != nil {
		v.Confinement = &confinementView{
			UID: c.GetUid(), NoNewPrivileges: c.GetNoNewPrivileges(), Seccomp: c.GetSeccomp(),
			Cgroup: c.GetCgroup(), NoCgroup: c.GetNoCgroup(),
			MemoryMaxBytes: c.GetMemoryMaxBytes(), CPUMax: c.GetCpuMax(), TasksMax: c.GetTasksMax(),
			Jailed: c.GetJailed(), NoJail: c.GetNoJail(),
		}
	}
	for _, s := range m.GetBoot() {
		v.Boot = append(v.Boot, bootView{s.GetName(), s.GetAtMs()})
	}
	return v
}

type operationView struct {
	ID         string      `json:"id"`
	Kind       string      `json:"kind"`
	VMID       string      `json:"vm_id"`
	VMName     string      `json:"vm_name"`
	State      string      `json:"state"`
	Stages     []stageView `json:"stages"`
	Notices    []string    `json:"notices"`
	CreatedAt  *time.Time  `json:"created_at"`
	FinishedAt *time.Time  `json:"finished_at,omitempty"`
	Error      *errorView  `json:"error,omitempty"`
	Image      string      `json:"image,omitempty"` // that it is about
}

type stageView struct {
	Name       string     `json:"name"`
	Detail     string     `json:"detail,omitempty"`
	StartedAt  *time.Time `json:"started_at"`
	FinishedAt *time.Time `json:"finished_at,omitempty"`
}

func viewOperation(m *bangerv1.Operation) operationView {
	v := operationView{
		ID: m.GetId(), Kind: m.GetKind(), VMID: m.GetVmId(), VMName: m.GetVmName(), State: m.GetState(),
		Stages: []stageView{}, Notices: append([]string{}, m.GetNotices()...),
		CreatedAt: timeOf(m.GetCreatedAt()), FinishedAt: timeOf(m.GetFinishedAt()),
		Error: viewError(client.FromFault(m.GetFault())), Image: m.GetImage(),
	}
	for _, s := range m.GetStages() {
		v.Stages = append(v.Stages, stageView{s.GetName(), s.GetDetail(), timeOf(s.GetStartedAt()), timeOf(s.GetFinishedAt())})
	}
	return v
}

// resultView is one reference's result in a batch.
type resultView struct {
	Ref     string     `json:"ref"`
	OK      bool       `json:"ok"`
	ID      string     `json:"id,omitempty"`
	Name    string     `json:"name,omitempty"`
	State   string     `json:"state,omitempty"`
	Notices []string   `json:"notices"`
	Error   *errorView `json:"error,omitempty"`
}

type daemonView struct {
	Running           bool       `json:"running"`
	PID               int32      `json:"pid,omitempty"`
	Version           string     `json:"version,omitempty"`
	APIRevision       int32      `json:"api_revision,omitempty"`
	Socket            string     `json:"socket"`
	Log               string     `json:"log"`
	StateDir          string     `json:"state_dir"`
	RuntimeDir        string     `json:"runtime_dir,omitempty"`
	DNSAddress        string     `json:"dns_address,omitempty"`
	VMM               string     `json:"vmm,omitempty"`
	Accel             string     `json:"accel,omitempty"`
	VMMNotice         string     `json:"vmm_notice,omitempty"`
	StartedAt         *time.Time `json:"started_at,omitempty"`
	VMsTotal          int32      `json:"vms_total"`
	VMsRunning        int32      `json:"vms_running"`
	OperationsRunning int32      `json:"operations_running"`
	Warnings          []string   `json:"warnings"`
	InstallationID    string     `json:"installation_id,omitempty"`

	UptimeMS   int64            `json:"uptime_ms,omitempty"`
	VMMVersion string           `json:"vmm_version,omitempty"`
	Network    string           `json:"network,omitempty"`
	Images     int32            `json:"images"`
	VMsByState map[string]int32 `json:"vms_by_state,omitempty"`
}

type findingView struct {
	Code     string `json:"code"`
	Severity string `json:"severity"`
	Title    string `json:"title"`
	Detail   string `json:"detail,omitempty"`
	Fix      string `json:"fix,omitempty"`
	Fixable  bool   `json:"fixable"` // by --fix
	Fixed    bool   `json:"fixed"`   // it was
}

type socketView struct {
	Socket string `json:"socket"`
}

type stoppedView struct {
	WasRunning bool         `json:"was_running"`
	VMs        []resultView `json:"vms,omitempty"` // with --all
}

type versionView struct {
	Version     string `json:"version"`
	APIRevision int    `json:"api_revision"`
	Daemon      string `json:"daemon_version,omitempty"`
}

type logView struct {
	Log string `json:"log"`
}
