package agentd

import (
	"context"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/boot"
)

// service is the API over a Guest.
type service struct {
	guest *Guest
	clock *clockOrder
}

var errNotHere = &callError{codeUnimplemented, "this guest cannot do that"}

func (s service) Health(context.Context, *agentv1.HealthRequest) (*agentv1.HealthResponse, error) {
	r := &agentv1.HealthResponse{AgentVersion: s.guest.Version, Features: s.guest.features()}
	for _, stage := range s.guest.Stages.All() {
		r.Stages = append(r.Stages, message(stage))
	}
	if s.guest.Facts != nil {
		f := s.guest.Facts()
		r.BootId = f.BootID
		r.UptimeMs = milliseconds(f.Uptime)
		r.Userspace = f.Userspace
		r.FailedUnits = f.FailedUnits
		r.AgentRssBytes = f.RSS
		r.Restarts = int32(f.Restarts)
	}
	return r, nil
}

// WatchBoot sends what it has to say until it has said all, ctx ends, or sending fails.
func (s service) WatchBoot(ctx context.Context, send func(*agentv1.WatchBootResponse) error) error {
	userspace, ssh := false, false
	for sent := 0; ; {
		stages, err := s.guest.Stages.after(ctx, sent)
		if err != nil {
			return err
		}
		for _, stage := range stages {
			if err := send(&agentv1.WatchBootResponse{Stage: message(stage), UptimeMs: milliseconds(s.uptime())}); err != nil {
				return err
			}
			userspace = userspace || stage.Name == boot.StageUserspace
			ssh = ssh || stage.Name == boot.StageSSH
		}
		if userspace && ssh {
			return nil
		}
		sent += len(stages)
	}
}

func (s service) uptime() time.Duration {
	if s.guest.Facts == nil {
		return 0
	}
	return s.guest.Facts().Uptime
}

func (s service) Shutdown(ctx context.Context, r *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	if s.guest.Shutdown == nil {
		return nil, errNotHere
	}
	return &agentv1.ShutdownResponse{}, s.guest.Shutdown(ctx, r.Reboot)
}

func (s service) Sync(ctx context.Context, _ *agentv1.SyncRequest) (*agentv1.SyncResponse, error) {
	if s.guest.Sync == nil {
		return nil, errNotHere
	}
	return &agentv1.SyncResponse{}, s.guest.Sync(ctx)
}

func (s service) GrowFilesystems(ctx context.Context, _ *agentv1.GrowFilesystemsRequest) (*agentv1.GrowFilesystemsResponse, error) {
	if s.guest.Grow == nil {
		return nil, errNotHere
	}
	grown, err := s.guest.Grow(ctx)
	if err != nil {
		return nil, err
	}
	r := &agentv1.GrowFilesystemsResponse{}
	for _, g := range grown {
		r.Grown = append(r.Grown, &agentv1.GrownFilesystem{Target: g.Target, BeforeBytes: g.Before, AfterBytes: g.After})
	}
	return r, nil
}

func message(s Stage) *agentv1.Stage {
	return &agentv1.Stage{Name: s.Name, AtMs: milliseconds(s.At), Detail: s.Detail}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
