package agentd

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/wire"
)

// TestStreamGivenUpWhileItIsRead: the reader of a stream of a port, and who discards the rest of one that was given up, both
// come to the end that the host makes. Neither may hold the other.
func TestStreamGivenUpWhileItIsRead(t *testing.T) {
	a, b := net.Pipe()
	host, err := wire.DialMux(a)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	guest, err := wire.ServeMux(b)
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	block := make([]byte, 300<<10) // more than a window: a reader has to say that there is room again
	for range 100 {
		out, err := host.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		in, err := guest.AcceptStream()
		if err != nil {
			t.Fatal(err)
		}
		m := &muxStream{Stream: in}
		var all sync.WaitGroup
		all.Go(func() {
			_, _ = out.Write(block)
			_ = out.Close()
			_, _ = io.Copy(io.Discard, out)
		})
		all.Go(func() {
			for few := make([]byte, 64); ; { // so that there is much to read when the other begins
				if _, err := m.Read(few); err != nil {
					return
				}
			}
		})
		all.Go(func() { _ = m.Close() })
		ended := make(chan struct{})
		go func() { all.Wait(); close(ended) }()
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Fatal("the readers hold each other")
		}
	}
}
