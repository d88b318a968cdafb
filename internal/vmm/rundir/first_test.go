package rundir

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestListenFirst connects as Firecracker does for a guest that says that it listens, once and once more.
func TestListenFirst(t *testing.T) {
	dir, err := Open(t.TempDir())
	must(t, err)
	defer dir.Close()
	u, err := dir.ListenFirst("s")
	must(t, err)
	select {
	case <-u.Came:
		t.Error("said before anybody has")
	default:
	}
	conn, err := dir.Dial(t.Context(), "s")
	must(t, err)
	defer conn.Close()
	select {
	case <-u.Came:
	case <-time.After(10 * time.Second):
		t.Fatal("not said")
	}
	<-u.over
	if _, err := dir.Dial(t.Context(), "s"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a second word: %v, want a refusal", err)
	}
	u.Close()
	must(t, dir.Remove("s"))

	silent, err := dir.ListenFirst("s")
	must(t, err)
	silent.Close()
	<-silent.Came // nobody waits for what cannot come any more
}
