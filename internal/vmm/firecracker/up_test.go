package firecracker

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// TestGuestSaysThatItListens connects as Firecracker does for a guest, once and once more.
func TestGuestSaysThatItListens(t *testing.T) {
	dir, err := rundir.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	u, err := listenUp(dir)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-u.said:
		t.Error("said before anybody has")
	default:
	}
	conn, err := dir.Dial(t.Context(), upSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	select {
	case <-u.said:
	case <-time.After(10 * time.Second):
		t.Fatal("not said")
	}
	<-u.over
	if _, err := dir.Dial(t.Context(), upSocket); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a second word: %v, want a refusal", err)
	}
	u.close()
	if err := clean(dir); err != nil {
		t.Fatal(err)
	}

	silent, err := listenUp(dir)
	if err != nil {
		t.Fatal(err)
	}
	silent.close()
	<-silent.said // nobody waits for what cannot come any more
}
