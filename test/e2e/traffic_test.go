//go:build e2e

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// echoProgram sends back what it is sent: to whoever connects to a port of the guest's, or over a connection of its own.
const echoProgram = `import socket, sys, threading
def echo(c):
    while True:
        b = c.recv(65536)
        if not b:
            break
        c.sendall(b)
    c.shutdown(socket.SHUT_WR)
    c.close()
if sys.argv[1] == "to":
    echo(socket.create_connection((sys.argv[2], int(sys.argv[3]))))
else:
    s = socket.create_server(("", int(sys.argv[1])))
    while True:
        threading.Thread(target=echo, args=(s.accept()[0],)).start()
`

// transfer is a connection that is busy both ways: bytes go out, and have to come back as they were, in their order, each once.
type transfer struct {
	name string
	back atomic.Int64 // bytes that came back
	stop chan struct{}
	done chan error
}

func begin(name string, conn net.Conn) *transfer {
	const part = 64 << 10
	tr := &transfer{name: name, stop: make(chan struct{}), done: make(chan error, 1)}
	seed := [32]byte{1}
	sent := make(chan error, 1)
	var out int64
	go func() {
		stream, buf := rand.NewChaCha8(seed), make([]byte, part)
		sent <- func() error {
			for {
				select {
				case <-tr.stop:
					return conn.(*net.TCPConn).CloseWrite()
				case <-time.After(10 * time.Millisecond): // the machine is shared
				}
				_, _ = stream.Read(buf)
				n, err := conn.Write(buf)
				out += int64(n)
				if err != nil {
					return err
				}
			}
		}()
	}()
	go func() {
		defer conn.Close()
		stream, got, want := rand.NewChaCha8(seed), make([]byte, part), make([]byte, part)
		err := func() error {
			for {
				n, err := io.ReadFull(conn, got)
				_, _ = stream.Read(want)
				if !bytes.Equal(got[:n], want[:n]) {
					return fmt.Errorf("after %d bytes others came back", tr.back.Load())
				}
				tr.back.Add(int64(n))
				if errors.Is(err, io.EOF) {
					return nil
				}
				if err != nil {
					return err
				}
			}
		}()
		if err == nil {
			if err = <-sent; err == nil && tr.back.Load() != out {
				err = fmt.Errorf("%d bytes were sent and %d came back", out, tr.back.Load())
			}
		}
		tr.done <- err
	}()
	return tr
}

// grows wants more to come back.
func (tr *transfer) grows(t *testing.T, when string) {
	t.Helper()
	const more = 512 << 10
	from := tr.back.Load()
	for deadline := time.Now().Add(callTime); tr.back.Load() < from+more; time.Sleep(20 * time.Millisecond) {
		select {
		case err := <-tr.done:
			tr.done <- err
			t.Fatalf("%s, the transfer %s ended: %v", when, tr.name, err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s, the transfer %s stands still after %d bytes", when, tr.name, tr.back.Load())
		}
	}
}

// throughDaemons keeps two connections of a VM's busy, in and out, while daemons are killed, end and begin: no byte is lost.
// at is the address by which the host reaches the guest; what the guest connects to is the world's.
func (h *host) throughDaemons(name, at string, came <-chan net.Conn) {
	t := h.t
	t.Helper()
	h.in(name, "cat > /root/echo.py <<'END'\n"+echoProgram+"END\nsystemd-run --quiet python3 /root/echo.py 3001; systemd-run --quiet --property=Restart=on-failure python3 /root/echo.py to "+worldAddr+" 9000")
	var conn net.Conn
	h.until("the guest echoes", callTime, func() bool {
		c, err := net.Dial("tcp", net.JoinHostPort(at, "3001"))
		if err != nil {
			return false
		}
		one := []byte{0} // a port of the user network may be there before its listener is
		_ = c.SetDeadline(time.Now().Add(time.Second))
		if _, err = c.Write(one); err == nil {
			_, err = io.ReadFull(c, one)
		}
		_ = c.Close()
		if err == nil {
			conn, err = net.Dial("tcp", net.JoinHostPort(at, "3001"))
		}
		return err == nil
	})
	transfers := []*transfer{begin("in", conn)}
	select {
	case conn := <-came:
		transfers = append(transfers, begin("out", conn))
	case <-time.After(callTime):
		t.Fatal("the guest does not connect to the world")
	}
	grow := func(when string) {
		t.Helper()
		for _, tr := range transfers {
			tr.grows(t, when)
		}
	}
	grow("before anything")
	began := time.Now()
	for _, end := range []func(pid int){
		func(pid int) { _ = syscall.Kill(pid, syscall.SIGKILL); gone(t, pid) },
		func(int) { h.do("daemon", "stop") },
		func(pid int) { _ = syscall.Kill(pid, syscall.SIGKILL); gone(t, pid) },
	} {
		end(h.daemon())
		grow("with the daemon gone")
		h.do("vm", "list")
		grow("with the next daemon")
	}
	for _, tr := range transfers {
		close(tr.stop)
		select {
		case err := <-tr.done:
			t.Logf("%5.1fs  %s: %d bytes there and back, %v", time.Since(began).Seconds(), tr.name, tr.back.Load(), err)
			if err != nil {
				t.Errorf("the transfer %s: %v", tr.name, err)
			}
		case <-time.After(callTime):
			t.Errorf("the transfer %s does not end: %d bytes came back", tr.name, tr.back.Load())
		}
	}
}
