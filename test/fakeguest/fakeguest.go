// Package fakeguest owns what runs inside fake machines in tests: the real agent server, fed from
// the machine's own config drive as the real guest program is.
//
// It never touches the host: shutting down ends the fake machine, growing a disk does nothing.
package fakeguest

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
)

// Dial connects to a port of the fake guest; a port that nobody serves is syscall.ECONNREFUSED.
type Dial func(ctx context.Context, g *fakevmm.Guest, port int) (net.Conn, error)

// Boot is the boot that a real guest reports.
func Boot() []string {
	return []string{boot.StageInit, boot.StageRoot, boot.StageListening, boot.StageAgent, boot.StageSSH, boot.StageUserspace}
}

// Agent plays the guest program of a fake machine that reports these stages of its boot. A guest that
// reports none makes the daemon write nothing at moments of its own. A nil dial refuses every port. While the faults file has the line
// "<who> services" the guest's services are still starting.
func Agent(dial Dial, reports ...string) fakevmm.Agent {
	return func(ctx context.Context, g *fakevmm.Guest, conn net.Conn) {
		defer conn.Close()
		config, err := readConfig(g.Spec())
		if err != nil {
			_ = g.Console(boot.FatalLine("config", err.Error())) // the machine may be gone; then nobody reads it
			return
		}
		for _, dir := range []string{"/guest", "/guest/root"} { // not the run directory: the machine may be gone, and the directory with it
			if err := os.Mkdir(g.Spec().RunDir+dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return
			}
		}
		stages := &agentd.Stages{}
		for i, name := range reports {
			st := agentd.Stage{Name: name, At: time.Duration(i+1) * time.Millisecond}
			if _, late := g.Fault("services"); late && name == boot.StageUserspace {
				go func() {
					if g.UntilHealed(ctx, "services") == nil {
						stages.Reach(st)
					}
				}()
				continue
			}
			stages.Reach(st)
		}
		guest := &agentd.Guest{
			Version: "fake",
			Stages:  stages,
			Facts: func() agentd.Facts {
				userspace := "running"
				if _, late := g.Fault("services"); late {
					userspace = "starting"
				}
				return agentd.Facts{BootID: g.Boot(), Uptime: time.Since(g.StartedAt()), Userspace: userspace}
			},
			Shutdown: func(_ context.Context, reboot bool) error {
				if reboot {
					return g.Reset()
				}
				return g.PowerOff()
			},
			Sync:  func(context.Context) error { return nil },
			Grow:  func(context.Context) ([]agentd.Grown, error) { return grow(g) },
			Stats: func(context.Context) (*agentv1.StatsResponse, error) { return stats(g), nil },
			Ports: func(context.Context) (*agentv1.PortsResponse, error) { return ports(), nil },
			FollowPorts: func(ctx context.Context, send func([]uint16) error) error {
				return followPorts(ctx, g.Spec().RunDir, send)
			},
			Trim: func(context.Context) (*agentv1.TrimResponse, error) { return trim(g) },
			Exec: run,
			// Files of a fake guest lie in its run directory, and go with the machine.
			Files: func(path string) string { return g.Spec().RunDir + "/guest" + agentd.LocalPath(path) },
			DialTCP: func(ctx context.Context, port int) (net.Conn, error) {
				if dial == nil {
					return nil, syscall.ECONNREFUSED
				}
				return dial(ctx, g, port)
			},
		}
		_ = agentd.ServeConn(ctx, conn, false, config.Secret, guest) // ends with the connection; the host sees why
	}
}

// grow says what a guest would that compares its filesystems with its drives; it touches no file.
func grow(g *fakevmm.Guest) ([]agentd.Grown, error) {
	var grown []agentd.Grown
	for role, target := range map[vmm.Role]string{vmm.RoleSystem: "/", vmm.RoleWork: "/root"} {
		grown = append(grown, agentd.Grown{Target: target, After: g.Size(role)})
	}
	return grown, nil
}

// stats is a guest that is half busy, with disks as large as it was told.
func stats(g *fakevmm.Guest) *agentv1.StatsResponse {
	up := time.Since(g.StartedAt()).Milliseconds()
	return &agentv1.StatsResponse{UptimeMs: up, Cpus: int32(g.Spec().VCPU), CpuBusyMs: up / 2, CpuIdleMs: up - up/2,
		Load1Milli: 500, Load5Milli: 250, Load15Milli: 125,
		MemoryTotalBytes: g.Spec().MemoryMiB << 20, MemoryAvailableBytes: g.Spec().MemoryMiB << 19,
		Disks: []*agentv1.DiskStats{
			{Target: "/", TotalBytes: g.Size(vmm.RoleSystem), UsedBytes: 1 << 20},
			{Target: "/root", TotalBytes: g.Size(vmm.RoleWork), UsedBytes: 2 << 20},
		},
		Interfaces: []*agentv1.InterfaceStats{{Name: "eth0", ReceivedBytes: up * 1024, SentBytes: up * 512}}}
}

// ports are an SSH server, and, where Dial serves them, web servers. What the guest has a say in is as bad as
// it can be.
func ports() *agentv1.PortsResponse {
	return &agentv1.PortsResponse{Listeners: []*agentv1.Listener{
		{Protocol: "tcp", Address: "0.0.0.0", Port: 22, Pid: 100, Process: "sshd", Command: "sshd: /usr/sbin/sshd -D [listener]"},
		{Protocol: "tcp", Address: "::", Port: 22, Pid: 100, Process: "sshd", Command: "sshd: /usr/sbin/sshd -D [listener]"},
		{Protocol: "tcp", Address: "127.0.0.1", Port: 5432, Pid: 101, Process: "postgres", Command: "postgres -D /var/lib/postgresql"},
		{Protocol: "tcp", Address: "0.0.0.0", Port: 8080, Pid: 102, Process: "web\x1b[31m", Command: "web --port 8080\x1b]0;evil\x07"},
		{Protocol: "tcp", Address: "::", Port: 8443, Pid: 103, Process: "docker-proxy", Command: "docker-proxy -host-port 8443 -container-ip 172.17.0.2"},
		{Protocol: "udp", Address: "0.0.0.0", Port: 53, Pid: 104, Process: "dnsmasq", Command: "dnsmasq"},
	}}
}

// trim discards nothing; a VMM that has the fault "stiff" takes no discards either.
func trim(g *fakevmm.Guest) (*agentv1.TrimResponse, error) {
	_, stiff := g.Fault("stiff")
	return &agentv1.TrimResponse{Trimmed: []*agentv1.Trimmed{{Target: "/", Bytes: 1 << 20, Unsupported: stiff}, {Target: "/root", Bytes: 1 << 20, Unsupported: stiff}}}, nil
}

func readConfig(spec vmm.Spec) (boot.Config, error) {
	for _, d := range spec.Drives {
		if d.Role == vmm.RoleConfig {
			f, err := os.Open(d.Path)
			if err != nil {
				return boot.Config{}, err
			}
			defer f.Close()
			return boot.ReadDrive(f)
		}
	}
	return boot.Config{}, errors.New("the machine has no config drive")
}
