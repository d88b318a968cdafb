package server

import (
	"context"
	"time"

	"connectrpc.com/connect"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
)

func (h *vmHandler) WatchUsage(ctx context.Context, r *bangerv1.WatchUsageRequest, stream *connect.ServerStream[bangerv1.WatchUsageResponse]) error {
	request := sandbox.UsageRequest{Refs: r.GetRefs(), Every: time.Duration(r.GetEveryMs()) * time.Millisecond, Ports: r.GetPorts()}
	return streamed(ctx, h.info.Ending, func(ctx context.Context) error {
		return h.svc.WatchUsage(ctx, request, func(u sandbox.Usage) error {
			m := &bangerv1.WatchUsageResponse{Stats: statsMessage(u.Stats)}
			if u.Ports != nil {
				m.Ports = portsMessage(*u.Ports)
			}
			return stream.Send(m)
		})
	})
}
