package jail

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/process"
)

// newHost is one without programs and with no records yet.
func newHost(t *testing.T, user int) *Host {
	t.Helper()
	return NewHost(Options{User: user, Dir: filepath.Join(t.TempDir(), "run", "jails"), Root: t.TempDir(),
		Programs: func() (Programs, error) {
			return Programs{}, fault.New(fault.Unsupported, "jailer", "there is none")
		}})
}

// sleeper runs a program with an argument of its own.
func sleeper(t *testing.T, marker string) (pid int, start uint64) {
	t.Helper()
	cmd := exec.Command("sh", "-c", "read x", marker, marker)
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		start, err = process.StartTime(cmd.Process.Pid)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
	return cmd.Process.Pid, start
}

// TestRecords: what counts as running, and what is forgotten.
func TestRecords(t *testing.T) {
	h, ctx := newHost(t, 1000), t.Context()
	if _, _, err := h.Find(ctx, aName); !fault.Is(err, fault.NotFound) {
		t.Errorf("nothing was started: %v", err)
	}
	if vms, err := h.List(ctx, aName.Installation, aName.Place); err != nil || len(vms) != 0 {
		t.Errorf("%v, %v", vms, err)
	}
	note, err := h.reserve(ctx, aName, Programs{})
	if err != nil || !Inside(note.UID) || note.User != 1000 || note.By != os.Getpid() {
		t.Fatalf("%+v, %v", note, err)
	}
	// It is being made.
	if _, err := h.reserve(ctx, aName, Programs{}); !fault.Is(err, fault.Busy) {
		t.Errorf("a second one: %v", err)
	}
	if _, _, err := h.Find(ctx, aName); !fault.Is(err, fault.Busy) {
		t.Errorf("while it is made: %v", err)
	}
	note.PID, note.Start = sleeper(t, "x")
	if err := h.d.put(note); err != nil {
		t.Fatal(err)
	}
	if _, err := h.reserve(ctx, aName, Programs{}); !fault.Is(err, fault.Busy) {
		t.Errorf("beside one that runs: %v", err)
	}
	if pid, pidfd, err := h.Find(ctx, aName); err != nil || pid != note.PID || pidfd.Close() != nil {
		t.Errorf("process %d, %v", pid, err)
	}
	// Others' names are others', another place is another copy.
	for _, other := range []*Host{NewHost(Options{User: 1001, Dir: h.o.Dir, Programs: h.o.Programs}), h} {
		n := aName
		if other == h {
			n.Place = "cd"
		}
		if _, _, err := other.Find(ctx, n); !fault.Is(err, fault.NotFound) {
			t.Errorf("of user %d at %s: %v", other.o.User, n.Place, err)
		}
		if err := other.Signal(ctx, n, 9); !fault.Is(err, fault.NotFound) {
			t.Errorf("of user %d at %s is signalled: %v", other.o.User, n.Place, err)
		}
	}
	if vms, err := h.List(ctx, aName.Installation, aName.Place); err != nil || len(vms) != 1 || vms[0] != aName.VM {
		t.Errorf("%v, %v", vms, err)
	}
	if n, err := CountAll(ctx, h.o.Dir); err != nil || n != 1 {
		t.Errorf("%d run, %v", n, err)
	}
	for _, sig := range []int{-1, 10, 11, 64} {
		if err := h.Signal(ctx, aName, sig); !fault.Is(err, fault.Invalid) {
			t.Errorf("signal %d: %v", sig, err)
		}
	}
	if err := h.Signal(ctx, aName, 0); err != nil {
		t.Error(err)
	}

	// The pid is another process's by now: it is neither found nor signalled, and the record goes, with the user id.
	note.Start++
	if err := h.d.put(note); err != nil {
		t.Fatal(err)
	}
	if err := h.Sweep(ctx); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(h.d.path("*-*")); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
	if err := h.Signal(ctx, aName, 9); !fault.Is(err, fault.NotFound) {
		t.Errorf("%v", err)
	}
	if !runs(note.PID, note.Start-1) {
		t.Error("somebody else's process was ended")
	}

	// What is damaged is no jail, and is said.
	if err := os.WriteFile(h.d.path(aName.file(1000)), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := h.List(ctx, aName.Installation, aName.Place); !fault.Is(err, fault.Internal) {
		t.Errorf("%v", err)
	}
}

// TestMakerKilled: who made a jail was killed before it could note the process, which is found; or before it had started one.
func TestMakerKilled(t *testing.T) {
	h, ctx := newHost(t, 1000), t.Context()
	for _, lost := range []bool{true, false} {
		note, err := h.reserve(ctx, aName, Programs{})
		if err != nil {
			t.Fatal(err)
		}
		note.BySince++ // another process has its pid
		if lost {
			// As the jail's user it can only be started by root: here the test's own stands for it.
			note.UID = os.Getuid()
			note.PID, _ = sleeper(t, aName.Marker())
		}
		want := note.PID
		note.PID = 0
		if err := h.d.put(note); err != nil {
			t.Fatal(err)
		}
		pid, pidfd, err := h.Find(ctx, aName)
		if lost {
			if err != nil || pid != want || pidfd.Close() != nil {
				t.Errorf("process %d, want %d, %v", pid, want, err)
			}
			if r, err := h.d.get(aName.file(1000)); err != nil || r.PID != want || r.Start == 0 {
				t.Errorf("it is not noted: %+v, %v", r, err)
			}
		} else if !fault.Is(err, fault.NotFound) {
			t.Errorf("process %d, %v", pid, err)
		}
		if err := errors.Join(os.RemoveAll(string(h.d))); err != nil {
			t.Fatal(err)
		}
	}
}

// TestClaim: no two jails get the same id, nobody's is taken, and the range ends.
func TestClaim(t *testing.T) {
	h := newHost(t, 1000)
	release, err := h.d.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seen := map[int]bool{}
	for range 200 {
		uid, err := h.d.claim(func(uid int) bool { return uid%2 == 0 }, "x")
		if err != nil || !Inside(uid) || uid%2 == 0 || seen[uid] {
			t.Fatalf("%d, %v", uid, err)
		}
		seen[uid] = true
	}
	if _, err := h.d.claim(func(int) bool { return true }, "x"); !fault.Is(err, fault.Exhausted) {
		t.Errorf("all are taken: %v", err)
	}
	// Whoever waits for the records waits no longer than it wants to.
	bounded, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := h.d.lock(bounded); !fault.Is(err, fault.Timeout) {
		t.Errorf("%v", err)
	}
	release()
	// The directory above, which has the helpers' sockets, is for all to pass.
	if st, err := os.Stat(filepath.Dir(h.o.Dir)); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if st, err := os.Stat(h.o.Dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}
