package console

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// patience bounds waits that end soon when all is well.
const patience = 20 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// numbered appends n lines that tell their number, about 32 bytes each.
func numbered(t *testing.T, f *os.File, from, n int) {
	t.Helper()
	var b bytes.Buffer
	for i := from; i < from+n; i++ {
		fmt.Fprintf(&b, "console line %018d\n", i)
	}
	if _, err := f.Write(b.Bytes()); err != nil {
		t.Fatal(err)
	}
}

const lineSize = 32

// appended opens a log as a VMM does.
func appended(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func refused(int, uint32, int64, int64) error { return unix.EOPNOTSUPP }

// TestBound cuts logs of each size in both ways, with a writer that has it open and goes on.
func TestBound(t *testing.T) {
	for _, way := range []struct {
		name      string
		fallocate func(int, uint32, int64, int64) error
	}{{"collapse", unix.Fallocate}, {"move", refused}} {
		for _, size := range []int{0, Keep / lineSize, Max / lineSize, Max/lineSize + 1, 3 * Max / lineSize} {
			t.Run(fmt.Sprintf("%s %d lines", way.name, size), func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "log")
				f := appended(t, path)
				numbered(t, f, 0, size)
				if err := bound(path, way.fallocate); err != nil {
					t.Fatal(err)
				}
				numbered(t, f, size, 2) // the writer's own position is not asked
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				want := size + 2 // lines
				if size*lineSize > Max {
					if len(b) < Keep || len(b) > Keep+64<<10 {
						t.Errorf("%d bytes are left", len(b))
					}
					want = len(b) / lineSize
				}
				// Whole and in order to the end: nothing is lost, doubled or full of zeros.
				var expect bytes.Buffer
				for i := size + 2 - want; i < size+2; i++ {
					fmt.Fprintf(&expect, "console line %018d\n", i)
				}
				if !bytes.Equal(b, expect.Bytes()) {
					t.Errorf("%d bytes are left, not the last %d lines", len(b), want)
				}
				tail, err := Tail(path, 100)
				if err != nil || string(tail) != string(expect.Bytes()[max(0, expect.Len()-3*lineSize):]) {
					t.Errorf("tail %q, %v", tail, err)
				}
			})
		}
	}
	if err := Bound(filepath.Join(t.TempDir(), "none")); err != nil {
		t.Errorf("a log that is not there: %v", err)
	}
}

// TestTail begins at the start of a line where it can.
func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for _, c := range []struct{ content, want string }{
		{"", ""},
		{"short\n", "short\n"},
		{"exactly10\n", "exactly10\n"},
		{"first line\nlast\n", "last\n"},
		{"no line end at all in this", "ll in this"},
		{"x\n\n\n\n\n\n\n\n\n\n\n\n", "\n\n\n\n\n\n\n\n\n"},
	} {
		if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := Tail(path, 10); err != nil || string(got) != c.want {
			t.Errorf("%q: %q, %v; want %q", c.content, got, err, c.want)
		}
	}
	if _, err := Tail(path+".none", 10); !os.IsNotExist(err) {
		t.Errorf("no log: %v", err)
	}
}

// cpu is what this process used so far.
func cpu(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestFlood lets a program write as a guest does that prints for ever, far beyond the bound, and looks
// at what the log takes, what looking costs, and whether the newest lines can be read all the while.
func TestFlood(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	f := appended(t, path)
	failures := make(chan error, 1)
	k, err := NewKeeper(func(_ string, err error) { failures <- err })
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	defer k.Add(path)()

	// 128 KiB every 10 ms or so, 12 MiB/s: more than an emulated serial port can carry.
	const perSecond, total = 12 << 20, 24 << 20
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	flood := exec.CommandContext(ctx, "sh", "-c",
		`i=0; while [ $i -lt 192 ]; do yes "console line" | head -c 131040; echo "chunk $i"; i=$((i+1)); sleep 0.01; done`)
	flood.Stdout = f
	before := cpu(t)
	began := time.Now()
	if err := flood.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- flood.Wait() }()
	var largest int64
	var cuts int
	var last int64
	for running := true; running; {
		select {
		case err := <-ended:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		case <-time.After(5 * time.Millisecond): // samples, not a wait
		}
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if st.Size() < last {
			cuts++
		}
		largest, last = max(largest, st.Size()), st.Size()
		if tail, err := Tail(path, 4096); err != nil || last > 1<<20 && len(tail) == 0 && running {
			t.Errorf("the tail of %d bytes: %d bytes, %v", last, len(tail), err)
		}
	}
	took, used := time.Since(began), cpu(t)-before
	t.Logf("%d MiB in %v: at most %d KiB on the disk, %d cuts seen, %v of CPU for them and for the samples", total>>20, took, largest>>10, cuts, used)
	if cuts < 2 {
		t.Errorf("%d cuts seen of %d MiB", cuts, total>>20)
	}
	if largest > Max+2*perSecond {
		t.Errorf("the log grew to %d bytes", largest)
	}
	if used > took/4 {
		t.Errorf("%v of CPU in %v", used, took)
	}
	tail, err := Tail(path, 64)
	if err != nil || !strings.HasSuffix(string(tail), "\nchunk 191\n") {
		t.Errorf("the log ends with %q, %v", tail, err)
	}
	select {
	case err := <-failures:
		t.Errorf("told of %v", err)
	default:
	}
}

// until waits for a condition of a file that a Keeper changes, looking when it was written to.
func until(t *testing.T, path string, ok func(size int64) bool) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_MODIFY); err != nil {
		t.Fatal(err)
	}
	events.SetReadDeadline(time.Now().Add(patience))
	for {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if ok(st.Size()) {
			return
		}
		if _, err := events.Read(make([]byte, 4096)); err != nil {
			t.Fatalf("%s stays at %d bytes: %v", path, st.Size(), err)
		}
	}
}

// TestKeeper adds and removes logs: one that is large already, two users of one, and one that is gone.
func TestKeeper(t *testing.T) {
	k, err := NewKeeper(func(path string, err error) { t.Errorf("%s: %v", path, err) })
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	path := filepath.Join(t.TempDir(), "log")
	f := appended(t, path)
	small := func(size int64) bool { return size < 2*Keep }
	numbered(t, f, 0, 2*Max/lineSize)
	first, second := k.Add(path), k.Add(path)
	until(t, path, small)
	first()
	first() // once counts
	numbered(t, f, 0, 2*Max/lineSize)
	until(t, path, small)
	second()
	numbered(t, f, 0, 2*Max/lineSize)
	gone := k.Add(filepath.Join(t.TempDir(), "none"))
	// Another log's cut shows that the Keeper had its chance.
	other := filepath.Join(t.TempDir(), "other")
	numbered(t, appended(t, other), 0, 2*Max/lineSize)
	defer k.Add(other)()
	until(t, other, small)
	if st, err := os.Stat(path); err != nil || st.Size() < 2*Max {
		t.Errorf("a log that was let go of was cut: %v, %v", st, err)
	}
	gone()
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A log that cannot be bounded is told once.
func TestFailure(t *testing.T) {
	failures := make(chan string, 2)
	k, err := NewKeeper(func(path string, err error) { failures <- path })
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	dir := t.TempDir() // no file: EISDIR
	defer k.Add(dir)()
	select {
	case path := <-failures:
		if path != dir {
			t.Errorf("told of %s", path)
		}
	case <-time.After(patience):
		t.Error("not told")
	}
}
