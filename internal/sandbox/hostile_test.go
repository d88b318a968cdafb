package sandbox

import (
	"context"
	"encoding/json"
	"io"
	"math"
	"net"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
)

// shown says whether text of a guest can be printed as it is: one line of a bounded length, with nothing that a terminal acts upon.
func shown(s string) bool {
	return len(s) <= 400 && utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

// message adds what an agent that means well would send, and the same cut, to a corpus.
func message(f *testing.F, m proto.Message) {
	f.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)/2])
}

// FuzzGuestPorts: whatever a guest answers, what becomes of it are listeners that can be shown and asked.
func FuzzGuestPorts(f *testing.F) {
	message(f, &agentv1.PortsResponse{Listeners: []*agentv1.Listener{
		{Protocol: "tcp", Address: "0.0.0.0", Port: 80, Pid: 7, Process: "nginx", Command: "nginx: master"},
		{Protocol: "udp", Address: "::1", Port: 70000, Pid: -1, Process: "\x1b]0;title\x07", Command: strings.Repeat("x", 5000)},
		{Protocol: "tcp", Address: "fe80::1%eth0", Port: 22}, {Protocol: "tcp", Address: "::ffff:127.0.0.1", Port: 22}, {Protocol: "sctp", Address: "x", Port: 1},
	}})
	f.Fuzz(func(t *testing.T, data []byte) {
		var answer agentv1.PortsResponse
		if proto.Unmarshal(data, &answer) != nil {
			return
		}
		ports := tamePorts(&answer)
		if len(ports) > len(answer.GetListeners()) {
			t.Errorf("%d listeners of %d", len(ports), len(answer.GetListeners()))
		}
		for _, p := range ports {
			if p.Port < 1 || p.Port > 65535 || p.PID < 0 || p.Protocol != "tcp" && p.Protocol != "udp" || net.ParseIP(p.Address) == nil || !shown(p.Process) || !shown(p.Command) {
				t.Errorf("%+v", p)
			}
		}
	})
}

// FuzzGuestStats: likewise, with numbers to reckon with.
func FuzzGuestStats(f *testing.F) {
	message(f, &agentv1.StatsResponse{Cpus: 2, UptimeMs: 1, CpuBusyMs: math.MinInt64, MemoryTotalBytes: 1 << 30, MemoryAvailableBytes: math.MaxInt64,
		Disks:      []*agentv1.DiskStats{{Target: "/\x1b[2J", TotalBytes: -1, UsedBytes: 1}},
		Interfaces: []*agentv1.InterfaceStats{{Name: "eth0\n", ReceivedBytes: -5}}})
	f.Fuzz(func(t *testing.T, data []byte) {
		var g agentv1.StatsResponse
		if proto.Unmarshal(data, &g) != nil {
			return
		}
		tame(&g)
		if g.Cpus < 0 || g.UptimeMs < 0 || g.CpuBusyMs < 0 || g.CpuIdleMs < 0 || g.Load1Milli < 0 || g.MemoryTotalBytes < 0 || g.MemoryAvailableBytes < 0 || g.SwapFreeBytes < 0 ||
			len(g.Disks) > guestList || len(g.Interfaces) > guestList {
			t.Errorf("%v", &g)
		}
		for _, d := range g.Disks {
			if !shown(d.GetTarget()) || d.GetTotalBytes() < 0 || d.GetUsedBytes() < 0 || d.GetAvailableBytes() < 0 {
				t.Errorf("%v", d)
			}
		}
		for _, i := range g.Interfaces {
			if !shown(i.GetName()) || i.GetReceivedBytes() < 0 || i.GetSentBytes() < 0 {
				t.Errorf("%v", i)
			}
		}
	})
}

// FuzzGuestStage: a stage of a guest's boot goes into the VM's record, which must be one that can be written and read again.
func FuzzGuestStage(f *testing.F) {
	for _, at := range []float64{1.5, -1, math.NaN(), math.Inf(1), math.MaxFloat64} {
		message(f, &agentv1.WatchBootResponse{Stage: &agentv1.Stage{Name: "ssh\x1b[31m", AtMs: at, Detail: "x"}, UptimeMs: at})
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		var m agentv1.WatchBootResponse
		if proto.Unmarshal(data, &m) != nil {
			return
		}
		st := stage(m.GetStage())
		b, err := json.Marshal(st)
		if err != nil || !shown(st.Name) || st.AtMS < 0 {
			t.Errorf("%+v: %s, %v", st, b, err)
		}
	})
}

// FuzzGuestPage: a web server of a guest says what it likes.
func FuzzGuestPage(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 27\r\n\r\n<title>Hello &amp; all</title>",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n<title>\x1b]0;x\x07</title>",
		"HTTP/1.1 301 Moved\r\nLocation: http://169.254.169.254/\r\n\r\n", "HTTP/1.0 999 \x1b[2J\r\n\r\n<TITLE>&#27;[31m&#x202e;</TITLE>",
		"SSH-2.0-OpenSSH\r\n", "\x15\x03\x01\x00\x02\x02\x46", "HTTP/1.1 101 Switching Protocols\r\n\r\n", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, says string) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		p, err := get(ctx, "http://otter.vm:80/", func(context.Context) (net.Conn, error) {
			host, guest := net.Pipe()
			go func() {
				go func() { _, _ = io.Copy(io.Discard, guest) }()
				_, _ = io.WriteString(guest, says)
				_ = guest.Close()
			}()
			return host, nil
		})
		if !shown(p.title) || utf8.RuneCountInString(p.title) > maxTitle+3 || err == nil && (p.status < 100 || p.status > 999) || ctx.Err() != nil {
			t.Errorf("%+v, %v", p, err)
		}
	})
}
