package agentd

import (
	"context"
	"net"
	"os"
	"syscall"
	"testing"
)

// A guest that is still booting has no route to its own loopback: that is no refusal.
func TestDialWaitsForTheLoopback(t *testing.T) {
	failures := []error{syscall.ENETUNREACH, syscall.EADDRNOTAVAIL, syscall.ECONNREFUSED}
	want, other := net.Pipe()
	defer want.Close()
	defer other.Close()
	got, err := dialWaiting(t.Context(), func(context.Context, int) (net.Conn, error) {
		if len(failures) > 0 {
			next := failures[0]
			failures = failures[1:]
			return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", next)}
		}
		return want, nil
	}, 22)
	if err != nil || got != want {
		t.Fatalf("got %v, %v", got, err)
	}
	if _, err := dialWaiting(t.Context(), func(context.Context, int) (net.Conn, error) { return nil, syscall.EACCES }, 22); err == nil {
		t.Error("an error that stays was waited out")
	}
}
