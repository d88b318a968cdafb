package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"git.thaloco.com/thaloco/banger/internal/server"
)

// serveMetrics serves the metrics, and nothing else, at an address until the returned function is called. Without an
// address it does nothing. That it cannot be had is a warning: the daemon is for other things.
func serveMetrics(addr string, svc server.Measured, info *server.Info, log *slog.Logger) (end func()) {
	if addr == "" {
		return func() {}
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		log.Warn("there are no metrics at their address", "addr", addr, "error", err)
		info.Warnings = append(info.Warnings[:len(info.Warnings):len(info.Warnings)], "there are no metrics at "+addr+": "+err.Error())
		return func() {}
	}
	mux := http.NewServeMux()
	mux.Handle(server.MetricsPath, server.Metrics(svc, *info, log))
	srv := &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("metrics are not served any more", "error", err)
		}
	}()
	log.Info("metrics are served", "addr", l.Addr().String())
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), callGrace)
		defer cancel()
		if err := srv.Shutdown(ctx); err != nil {
			_ = srv.Close()
		}
		<-done
	}
}
