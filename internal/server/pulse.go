package server

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

func (h *vmHandler) WatchGuest(ctx context.Context, r *bangerv1.WatchGuestRequest, stream *connect.ServerStream[bangerv1.WatchGuestResponse]) error {
	return streamed(ctx, h.info.Ending, func(ctx context.Context) error {
		return h.svc.WatchGuest(ctx, vm.ID(r.GetId()), time.Duration(r.GetSilentMs())*time.Millisecond, func(p sandbox.Pulse) error {
			m := &bangerv1.WatchGuestResponse{State: string(p.State), Note: p.Note}
			if !p.Since.IsZero() {
				m.Since = timestamppb.New(p.Since)
			}
			return stream.Send(m)
		})
	})
}
