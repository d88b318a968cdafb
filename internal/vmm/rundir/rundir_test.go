package rundir

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A connection that was given up stands in the queue until QEMU gets to it: the next one waits for
// room instead of failing, and no longer than it is told to.
func TestDialWaitsForRoomInTheQueue(t *testing.T) {
	dir, err := Open(t.TempDir())
	must(t, err)
	defer dir.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: dir.Path("s")}))
	must(t, unix.Listen(fd, 0)) // room for one
	first, err := dir.Dial(t.Context(), "s")
	must(t, err)
	defer first.Close()

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := dir.Dial(ctx, "s"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a full queue: %v", err)
	}
	second := make(chan net.Conn, 1)
	go func() {
		conn, err := dir.Dial(t.Context(), "s")
		if err != nil {
			t.Error(err)
		}
		second <- conn
	}()
	time.Sleep(30 * time.Millisecond)
	accepted, _, err := unix.Accept(fd)
	must(t, err)
	defer unix.Close(accepted)
	if conn := <-second; conn != nil {
		_ = conn.Close()
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
