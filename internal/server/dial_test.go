package server_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/exec"
	"git.thaloco.com/thaloco/banger/internal/guest/frame"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/server"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// daemonWith serves both sockets over svc. end stops the daemon and waits for it.
func daemonWith(t *testing.T, svc *fake) (c *client.Client, dir string, end func()) {
	t.Helper()
	dir = t.TempDir()
	log := slog.New(slog.DiscardHandler)
	dial, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, bangerv1.DialSocketName)})
	if err != nil {
		t.Fatal(err)
	}
	api, err := net.Listen("unix", filepath.Join(dir, "bangerd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: server.New(svc, server.Info{Revision: bangerv1.Revision}, log)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.ServeDial(ctx, dial, svc, log) }()
	go func() { _ = srv.Serve(api) }()
	c = client.New(client.Options{Socket: filepath.Join(dir, "bangerd.sock"), StateDir: dir})
	ended := false
	end = func() {
		if ended {
			return
		}
		ended = true
		c.Close()
		cancel()
		_ = srv.Close()
		if err := <-done; err != nil {
			t.Errorf("ServeDial: %v", err)
		}
	}
	t.Cleanup(end)
	return c, dir, end
}

// guest is a unix socket pair: one end to hand out, the other to play the guest.
func guest(t *testing.T) (host, inside *net.UnixConn) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "guest")})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	host, err = net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	inside, err = l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = host.Close(); _ = inside.Close() })
	return host, inside
}

// A guest connection with a descriptor is handed over: nothing copies, and it works on after the
// daemon has ended.
func TestDialPassesTheDescriptor(t *testing.T) {
	host, inside := guest(t)
	c, _, end := daemonWith(t, &fake{dialGuest: func(_ context.Context, id vm.ID, port int, wait bool) (net.Conn, error) {
		if id != "aa12" || port != 22 || !wait {
			t.Errorf("dialled %s port %d", id, port)
		}
		return host, nil
	}})
	// The guest speaks first, as an SSH server does: not a byte of it may be lost or read early.
	if _, err := inside.Write([]byte("SSH-2.0-guest\r\n")); err != nil {
		t.Fatal(err)
	}
	f, err := c.DialGuest(t.Context(), "aa12", 22, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	end()
	if line, err := bufio.NewReader(conn).ReadString('\n'); line != "SSH-2.0-guest\r\n" {
		t.Errorf("read %q, %v", line, err)
	}
	if _, err := conn.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(inside, b); err != nil || string(b) != "ping" {
		t.Errorf("the guest read %q, %v", b, err)
	}
}

// half is a connection without a descriptor, like a stream of a multiplexed port.
type half struct{ *net.UnixConn }

func (half) SyscallConn() {} // hides the embedded one

// Without a descriptor the daemon copies both ways and passes half-closes on.
func TestDialCopies(t *testing.T) {
	host, inside := guest(t)
	c, _, _ := daemonWith(t, &fake{dialGuest: func(context.Context, vm.ID, int, bool) (net.Conn, error) { return half{host}, nil }})
	const size = 1 << 20
	go func() {
		_, _ = inside.Write([]byte("hello"))
		got, _ := io.ReadAll(inside) // until the client's half-close
		_, _ = inside.Write(got)
		_ = inside.CloseWrite()
	}()
	f, err := c.DialGuest(t.Context(), "aa12", 22, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	generic, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		t.Fatal(err)
	}
	conn := generic.(*net.UnixConn)
	defer conn.Close()
	sent := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	go func() {
		_, _ = conn.Write(sent)
		_ = conn.CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || string(got[:5]) != "hello" || !bytes.Equal(got[5:], sent) {
		t.Errorf("%v: %d bytes came back, want %d", err, len(got), size+5)
	}
}

func TestDialFaults(t *testing.T) {
	c, dir, _ := daemonWith(t, &fake{dialGuest: func(context.Context, vm.ID, int, bool) (net.Conn, error) {
		return nil, fault.New(fault.Precondition, "calm-otter", "is stopped").WithHint("banger vm start calm-otter")
	}})
	_, err := c.DialGuest(t.Context(), "aa12", 22, time.Minute)
	if !fault.Is(err, fault.Precondition) || fault.HintOf(err) != "banger vm start calm-otter" {
		t.Errorf("got %v, hint %q", err, fault.HintOf(err))
	}
	for name, request := range map[string]string{
		"no JSON":         "hello\n",
		"too long":        strings.Repeat("x", 3*bangerv1.MaxDialLine) + "\n",
		"no port":         `{"vm_id":"aa12"}` + "\n",
		"bad port":        `{"vm_id":"aa12","port":65536}` + "\n",
		"no such service": `{"vm_id":"aa12","service":"http"}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("unix", filepath.Join(dir, bangerv1.DialSocketName))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			go func() { _, _ = conn.Write([]byte(request)) }()
			line, err := bufio.NewReader(conn).ReadBytes('\n')
			var a bangerv1.DialAnswer
			if json.Unmarshal(line, &a) != nil || a.Fault.GetCode() != "invalid" {
				t.Errorf("answer %q, %v", line, err)
			}
		})
	}
}

// A client that goes away while the daemon waits for the guest ends that wait.
func TestDialHangUp(t *testing.T) {
	waiting, ended := make(chan struct{}), make(chan struct{})
	c, _, _ := daemonWith(t, &fake{dialGuest: func(ctx context.Context, _ vm.ID, _ int, _ bool) (net.Conn, error) {
		close(waiting)
		<-ctx.Done()
		close(ended)
		return nil, ctx.Err()
	}})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-waiting; cancel() }()
	if _, err := c.DialGuest(ctx, "aa12", 22, time.Hour); !fault.Is(err, fault.Cancelled) {
		t.Errorf("got %v", err)
	}
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("the daemon still waits for the guest")
	}
}

// A wait that runs out is a timeout, bounded by what the client asked for.
func TestDialTimeout(t *testing.T) {
	c, _, _ := daemonWith(t, &fake{dialGuest: func(ctx context.Context, _ vm.ID, _ int, _ bool) (net.Conn, error) {
		<-ctx.Done()
		return nil, fault.Wrap(ctx.Err(), fault.Timeout, "calm-otter", "nothing listens on port 22")
	}})
	if _, err := c.DialGuest(t.Context(), "aa12", 22, 20*time.Millisecond); !fault.Is(err, fault.Timeout) {
		t.Errorf("got %v", err)
	}
}

// A command's stream is asked of the agent and handed over as a port's is: it works on without the
// daemon. An agent that cannot do it is named with what to type.
func TestExecOverTheDialSocket(t *testing.T) {
	host, inside := guest(t)
	var lacks atomic.Bool
	c, _, end := daemonWith(t, &fake{dialAgent: func(_ context.Context, id vm.ID, service wire.Kind) (net.Conn, error) {
		if lacks.Load() {
			return nil, fault.New(fault.VersionSkew, "calm-otter", "its agent lacks it").WithHint("banger vm restart calm-otter")
		}
		if id != "aa12" || service != wire.KindExec {
			t.Errorf("asked %s for %q", id, service)
		}
		return host, nil
	}})
	lacks.Store(true)
	_, err := c.Exec(t.Context(), "aa12", client.Command{Args: []string{"true"}}, client.CommandStreams{})
	if !fault.Is(err, fault.VersionSkew) || fault.HintOf(err) != "banger vm restart calm-otter" {
		t.Errorf("got %v", err)
	}
	lacks.Store(false)
	done := make(chan struct{})
	defer func() { <-done }()
	go func() {
		defer close(done)
		r, w := frame.NewReader(inside), frame.NewWriter(inside)
		kind, payload, err := r.Next()
		if request, bad := exec.ParseRequest(payload); err != nil || bad != nil || kind != exec.KindRequest || len(request.Args) != 2 {
			t.Errorf("the guest got %q %q, %v", kind, payload, err)
		}
		end() // the daemon's
		_ = w.Write(exec.KindOutput, []byte("out"))
		_ = w.Write(exec.KindStatus, exec.Status{Code: 3}.Encode())
	}()
	var out bytes.Buffer
	status, err := c.Exec(t.Context(), "aa12", client.Command{Args: []string{"a", "b"}}, client.CommandStreams{Stdout: &out, Stderr: io.Discard})
	if err != nil || status.Code != 3 || out.String() != "out" {
		t.Errorf("%+v, %v, %q", status, err, out.String())
	}
}
