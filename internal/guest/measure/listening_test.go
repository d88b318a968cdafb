package measure

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// follow returns the lists as they are sent.
func follow(t *testing.T, watch func() (*changes, error)) <-chan []uint16 {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	lists, done := make(chan []uint16, 1000), make(chan error, 1)
	go func() {
		done <- followPorts(ctx, "/proc", watch, 20*time.Millisecond, func(p []uint16) error { lists <- p; return nil })
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err == nil || ctx.Err() == nil {
				t.Errorf("it ended with %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("it does not end")
		}
	})
	return lists
}

// until waits for a list that has the port, or has it not.
func until(t *testing.T, lists <-chan []uint16, port int, there bool) {
	t.Helper()
	for {
		select {
		case l := <-lists:
			if !slices.IsSorted(l) {
				t.Errorf("%v is not sorted", l)
			}
			if slices.Contains(l, uint16(port)) == there {
				return
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("port %d: there is no list where it is %v", port, there)
		}
	}
}

// TestFollowPorts with the kernel's word, where this user may hear it, and without.
func TestFollowPorts(t *testing.T) {
	t.Run("told", func(t *testing.T) { testFollowPorts(t, watchListeners) })
	t.Run("looked at", func(t *testing.T) {
		testFollowPorts(t, func() (*changes, error) { return nil, errors.New("it tells nothing") })
	})
}

func testFollowPorts(t *testing.T, watch func() (*changes, error)) {
	before, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	port := before.Addr().(*net.TCPAddr).Port
	lists := follow(t, watch)
	until(t, lists, port, true)
	_ = before.Close()
	until(t, lists, port, false)
	began := time.Now()
	for _, network := range []string{"tcp4", "tcp"} {
		l, err := net.Listen(network, ":0")
		if err != nil {
			t.Fatal(err)
		}
		until(t, lists, l.Addr().(*net.TCPAddr).Port, true)
		_ = l.Close()
		until(t, lists, l.Addr().(*net.TCPAddr).Port, false)
	}
	t.Logf("four changes were told in %v", time.Since(began))

	// What others cannot get to is in no list.
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		own, err := net.Listen("tcp", address)
		if err != nil {
			t.Log(err) // no IPv6
			continue
		}
		defer own.Close()
		mark, err := net.Listen("tcp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		for seen := false; !seen; {
			select {
			case l := <-lists:
				seen = slices.Contains(l, uint16(mark.Addr().(*net.TCPAddr).Port))
				if slices.Contains(l, uint16(own.Addr().(*net.TCPAddr).Port)) {
					t.Errorf("%s is in the list", own.Addr())
				}
			case <-time.After(10 * time.Second):
				t.Fatal("no list")
			}
		}
		_ = mark.Close()
	}
}

// TestWatchListeners wants the kernel itself to tell, and nothing to be left of it.
func TestWatchListeners(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("takes root, to use the kernel's tracing")
	}
	c, err := watchListeners()
	if err != nil {
		t.Skip("this kernel does not tell of listeners: ", err)
	}
	for range 3 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if err := c.pipe.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if err := c.wait(); err != nil {
			t.Errorf("a socket that listens: %v", err)
		}
		_ = l.Close()
		if err := c.wait(); err != nil {
			t.Errorf("one that does not any more: %v", err)
		}
	}
	// An agent that was killed leaves its buffer to the next one.
	if err := errors.Join(c.pipe.Close(), unix.Close(c.fs)); err != nil {
		t.Fatal(err)
	}
	if c, err = watchListeners(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Faccessat(c.fs, tracing, unix.F_OK, 0); err != nil {
		t.Errorf("it has no buffer: %v", err)
	}
	tree, err := unix.Dup(c.fs)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(tree)
	c.close()
	if err := unix.Faccessat(tree, tracing, unix.F_OK, 0); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its buffer is left: %v", err)
	}
}
