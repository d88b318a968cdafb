package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strconv"
	"time"

	"connectrpc.com/connect"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/api/banger/v1/bangerv1connect"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// faults turns what handlers return into Connect errors, and a panic into an internal fault with
// its stack in the log.
type faults struct{ log *slog.Logger }

func (f faults) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (resp connect.AnyResponse, err error) {
		defer func() {
			if p := recover(); p != nil {
				err = f.panicked(req.Spec().Procedure, p)
			}
			err = toConnect(err)
		}()
		return next(ctx, req)
	}
}

func (f faults) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) (err error) {
		defer func() {
			if p := recover(); p != nil {
				err = f.panicked(conn.Spec().Procedure, p)
			}
			err = toConnect(err)
		}()
		return next(ctx, conn)
	}
}

func (faults) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (f faults) panicked(procedure string, p any) error {
	f.log.Error("panic in a handler", "call", procedure, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	return fault.New(fault.Internal, "", "the daemon hit a defect: %v", p).
		WithHint("the daemon's log has the details: banger daemon status shows where it is")
}

// revision refuses clients of another API revision.
type revision struct{ own int }

func (r revision) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if err := r.check(req.Spec().Procedure, req.Header().Get(bangerv1.RevisionHeader)); err != nil {
			return nil, err
		}
		return next(ctx, req)
	}
}

func (r revision) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if err := r.check(conn.Spec().Procedure, conn.RequestHeader().Get(bangerv1.RevisionHeader)); err != nil {
			return err
		}
		return next(ctx, conn)
	}
}

func (revision) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// check returns a fault if a client with this header must not make this call.
func (r revision) check(procedure, header string) error {
	switch procedure {
	case bangerv1connect.DaemonServiceGetStatusProcedure, bangerv1connect.DaemonServiceShutdownProcedure:
		// A newer client must be able to look at an older daemon and to stop it.
		return nil
	}
	if header == "" {
		return nil
	}
	client, err := strconv.Atoi(header)
	switch {
	case err != nil:
		return fault.New(fault.Invalid, bangerv1.RevisionHeader, "%q is not an API revision", header)
	case client < r.own:
		return fault.New(fault.VersionSkew, "", "this banger is older than the running daemon (API revision %d, daemon %d)", client, r.own).
			WithHint("upgrade banger, or run the banger that lies beside the daemon's bangerd")
	case client > r.own:
		return fault.New(fault.VersionSkew, "", "the running daemon is older than this banger (API revision %d, banger %d)", r.own, client).
			WithHint("banger daemon restart (VMs keep running)")
	}
	return nil
}

// accessLog records each call at debug level.
type accessLog struct{ log *slog.Logger }

func (a accessLog) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		start := time.Now()
		resp, err := next(ctx, req)
		if a.log.Enabled(ctx, slog.LevelDebug) {
			attrs := subject(req.Any())
			if err == nil {
				attrs = append(attrs, subject(resp.Any())...)
			}
			a.record(ctx, req.Spec().Procedure, start, err, attrs)
		}
		return resp, err
	}
}

func (a accessLog) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		start := time.Now()
		err := next(ctx, conn)
		a.record(ctx, conn.Spec().Procedure, start, err, nil)
		return err
	}
}

func (accessLog) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (a accessLog) record(ctx context.Context, procedure string, start time.Time, err error, attrs []slog.Attr) {
	attrs = append(attrs, slog.String("call", procedure), slog.Duration("took", time.Since(start)))
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
		var ce *connect.Error
		if errors.As(err, &ce) {
			attrs = append(attrs, slog.String("code", ce.Code().String()))
		}
	}
	a.log.LogAttrs(ctx, slog.LevelDebug, "call", attrs...)
}

// subject names the VM and the operation that a message is about.
func subject(message any) []slog.Attr {
	if m, ok := message.(interface{ GetOperation() *bangerv1.Operation }); ok && m.GetOperation() != nil {
		return []slog.Attr{slog.String("op", m.GetOperation().GetId()), slog.String("vm", m.GetOperation().GetVmId())}
	}
	switch m := message.(type) {
	case *bangerv1.GetOperationRequest:
		return []slog.Attr{slog.String("op", m.GetId())}
	case *bangerv1.CancelOperationRequest:
		return []slog.Attr{slog.String("op", m.GetId())}
	case interface{ GetId() string }:
		return []slog.Attr{slog.String("vm", m.GetId())}
	}
	return nil
}
