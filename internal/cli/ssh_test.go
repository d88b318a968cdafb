package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/api/banger/v1/bangerv1connect"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// refusing is a daemon that lives, and answers every request for a stream to a guest with one fault, which it keeps.
type refusing struct {
	bangerv1connect.UnimplementedDaemonServiceHandler
	answer *bangerv1.Fault
	asked  chan bangerv1.DialRequest
}

func (*refusing) GetStatus(context.Context, *bangerv1.GetStatusRequest) (*bangerv1.GetStatusResponse, error) {
	return &bangerv1.GetStatusResponse{}, nil
}

func (r *refusing) serve(t *testing.T) *client.Client {
	t.Helper()
	dir := t.TempDir()
	var listeners [2]net.Listener
	for i, name := range []string{"bangerd.sock", bangerv1.DialSocketName} {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		listeners[i] = l
	}
	mux := http.NewServeMux()
	mux.Handle(bangerv1connect.NewDaemonServiceHandler(r))
	api := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	t.Cleanup(func() { _ = api.Close() })
	go func() { _ = api.Serve(listeners[0]) }()
	go func() {
		for {
			conn, err := listeners[1].Accept()
			if err != nil {
				return
			}
			var asked bangerv1.DialRequest
			line, _ := bufio.NewReader(conn).ReadBytes('\n')
			_ = json.Unmarshal(line, &asked)
			r.asked <- asked
			_ = json.NewEncoder(conn).Encode(bangerv1.DialAnswer{Fault: r.answer})
			_ = conn.Close()
		}
	}()
	c := client.New(client.Options{Socket: filepath.Join(dir, "bangerd.sock"), StateDir: dir})
	t.Cleanup(c.Close)
	return c
}

// TestSSHServerThatDoesNotCome is told with where to look; whatever else the daemon says is passed on.
func TestSSHServerThatDoesNotCome(t *testing.T) {
	v := &bangerv1.VM{Id: "aa12", Name: "otter", State: "running", Log: "/state/vms/aa12/firecracker.log",
		Boot: []*bangerv1.Stage{{Name: "agent"}}}
	for _, c := range []struct {
		answer *bangerv1.Fault
		code   int
		want   string
	}{
		{&bangerv1.Fault{Code: string(fault.Timeout), Message: "nothing listens on port 22 of the guest"}, exitTimeout,
			"banger: otter: its SSH server does not answer\n  cause: nothing listens on port 22 of the guest\n  hint: banger vm show otter, and its console: /state/vms/aa12/firecracker.log\n"},
		{&bangerv1.Fault{Code: string(fault.Unavailable), Subject: "otter", Message: "its VMM is gone", Hint: "banger vm start otter"}, exitUnavailable,
			"banger: otter: its VMM is gone\n  hint: banger vm start otter\n"},
	} {
		daemon := &refusing{answer: c.answer, asked: make(chan bangerv1.DialRequest, 1)}
		a := &app{stderr: &syncBuffer{}, now: time.Now}
		err := a.waitForSSH(t.Context(), daemon.serve(t), v)
		if asked := <-daemon.asked; asked.VMID != "aa12" || asked.Port != 22 || !asked.Wait || asked.WaitMS != (2*time.Minute).Milliseconds() {
			t.Errorf("asked for %+v", asked)
		}
		var told bytes.Buffer
		a.stderr = &told
		a.printError(err)
		if told.String() != c.want || exitCode(err) != c.code {
			t.Errorf("exit %d:\n%s\nwant %d:\n%s", exitCode(err), told.String(), c.code, c.want)
		}
	}
	// One that the guest said to listen is not waited for.
	v.Boot = append(v.Boot, &bangerv1.Stage{Name: "ssh"})
	if err := (&app{}).waitForSSH(t.Context(), nil, v); err != nil {
		t.Error(err)
	}
}
