package agentd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
)

// TestMethodsAreTheContract: each call of the schema is served, as what it is, and nothing else.
func TestMethodsAreTheContract(t *testing.T) {
	contract := agentv1.File_banger_agent_v1_agent_proto.Services().ByName("AgentService")
	if want := "/" + string(contract.FullName()) + "/"; servicePath != want {
		t.Errorf("served at %s, want %s", servicePath, want)
	}
	have := methods(service{})
	for i := range contract.Methods().Len() {
		m := contract.Methods().Get(i)
		served, ok := have[string(m.Name())]
		if !ok || (served.stream != nil) != m.IsStreamingServer() || (served.unary != nil) == m.IsStreamingServer() || m.IsStreamingClient() {
			t.Errorf("%s: served %v, as a stream %v", m.Name(), ok, served.stream != nil)
		}
		delete(have, string(m.Name()))
	}
	if len(have) != 0 {
		t.Errorf("served, and not in the schema: %v", have)
	}
}

// speak serves one connection of the API, without the session before it.
func speak(t *testing.T, g *Guest) net.Conn {
	t.Helper()
	s := NewServer("0123456789abcdef", g)
	host, guest := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer guest.Close()
		s.serveHTTP(t.Context(), guest)
	}()
	t.Cleanup(func() {
		_ = host.Close()
		<-done
		_ = s.Close()
	})
	if err := host.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return host
}

const healthHead = "POST /banger.agent.v1.AgentService/Health HTTP/1.1\r\nHost: agent\r\ncontent-type: application/proto\r\n"

// TestRequests sends what a client may and what none does, byte for byte.
func TestRequests(t *testing.T) {
	for _, test := range []struct {
		name, request string
		status        int
		ends          bool // the connection does, too
	}{
		{"no body", healthHead + "Content-Length: 0\r\n\r\n", 200, false},
		{"neither length nor chunks", healthHead + "\r\n", 200, false},
		{"chunks", healthHead + "Transfer-Encoding: chunked\r\n\r\n3;x=y\r\n\x1a\x01x\r\n0\r\nTrailer: 1\r\n\r\n", 200, false},
		{"the last one", healthHead + "Connection: Close\r\n\r\n", 200, true},
		{"bare line feeds", strings.ReplaceAll(healthHead, "\r", "") + "\n", 200, false},
		{"no such call", strings.Replace(healthHead, "Health", "Fly", 1) + "\r\n", 404, false},
		{"another service", strings.Replace(healthHead, "Agent", "Other", 1) + "\r\n", 404, false},
		{"GET", strings.Replace(healthHead, "POST", "GET", 1) + "\r\n", 405, false},
		{"JSON", strings.Replace(healthHead, "/proto", "/json", 1) + "Content-Length: 2\r\n\r\n{}", 415, false},
		{"compressed", healthHead + "Content-Encoding: gzip\r\n\r\n", 415, false},
		{"a call as a stream", strings.Replace(healthHead, "/proto", "/connect+proto", 1) + "\r\n", 415, false},
		{"no protobuf", healthHead + "Content-Length: 1\r\n\r\n\xff", 400, false},
		{"cannot", strings.Replace(healthHead, "Health", "Trim", 1) + "\r\n", 501, false},
		{"too long", healthHead + "Content-Length: 1048582\r\n\r\n", 429, true},
		{"too long in chunks", healthHead + "Transfer-Encoding: chunked\r\n\r\n100006\r\n", 429, true},
		{"a chunk that is longer", healthHead + "Transfer-Encoding: chunked\r\n\r\n1\r\nxx\r\n0\r\n\r\n", 429, true},
		{"two lengths", healthHead + "Content-Length: 0\r\nContent-Length: 1\r\n\r\n", 400, true},
		{"length and chunks", healthHead + "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n", 400, true},
		{"a negative length", healthHead + "Content-Length: -1\r\n\r\n", 400, true},
		{"HTTP/1.0", "POST / HTTP/1.0\r\n\r\n", 400, true},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\n", 400, true},
		{"no colon", healthHead + "nothing\r\n\r\n", 400, true},
		{"a long head", healthHead + "X: " + strings.Repeat("x", maxHead) + "\r\n\r\n", 400, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn := speak(t, &Guest{Version: "v1", Stages: &Stages{}})
			in := bufio.NewReader(conn)
			// Twice: an answered request leaves the connection as it was.
			for range 2 {
				go func() { _, _ = io.WriteString(conn, test.request) }()
				resp, err := http.ReadResponse(in, nil)
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				if err != nil || resp.StatusCode != test.status {
					t.Fatalf("%s, %q, %v; want %d", resp.Status, body, err, test.status)
				}
				var h agentv1.HealthResponse
				if test.status == 200 && (proto.Unmarshal(body, &h) != nil || h.AgentVersion != "v1") {
					t.Errorf("answered %q", body)
				}
				if test.ends {
					if n, err := io.Copy(io.Discard, in); n != 0 || err != nil {
						t.Errorf("the connection goes on: %d bytes, %v", n, err)
					}
					return
				}
			}
		})
	}
}

// TestCallEndsWithItsCaller: a client that goes, or whose time is over, is noticed while the call runs.
func TestCallEndsWithItsCaller(t *testing.T) {
	began, ended := make(chan struct{}, 1), make(chan error, 1)
	g := &Guest{Stages: &Stages{}, Trim: func(ctx context.Context) (*agentv1.TrimResponse, error) {
		began <- struct{}{}
		<-ctx.Done()
		ended <- ctx.Err()
		return nil, ctx.Err()
	}}
	head := strings.Replace(healthHead, "Health", "Trim", 1)
	wait := func(want error) {
		t.Helper()
		select {
		case err := <-ended:
			if !errors.Is(err, want) {
				t.Errorf("ended with %v, want %v", err, want)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("the call runs on")
		}
	}
	conn := speak(t, g)
	if _, err := io.WriteString(conn, head+"\r\n"); err != nil {
		t.Fatal(err)
	}
	<-began
	_ = conn.Close()
	wait(context.Canceled)

	conn = speak(t, g)
	if _, err := io.WriteString(conn, head+"Connect-Timeout-Ms: 20\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusGatewayTimeout || !strings.Contains(string(body), `"deadline_exceeded"`) {
		t.Errorf("%s: %s", resp.Status, body)
	}
	wait(context.DeadlineExceeded)
}

// FuzzRequest: whatever comes, reading it ends, and what is taken for a request is within its bounds.
func FuzzRequest(f *testing.F) {
	f.Add([]byte(healthHead + "Content-Length: 3\r\n\r\nabc"))
	f.Add([]byte(healthHead + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"))
	f.Add([]byte(healthHead + "Transfer-Encoding: chunked\r\n\r\n7fffffff\r\n"))
	f.Add([]byte("POST / HTTP/1.1\r\n: \r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		in := bufio.NewReaderSize(bytes.NewReader(data), 16)
		r, err := readHead(in)
		if err != nil {
			return
		}
		body, err := readBody(in, r.length)
		if err == nil && (len(body) > wire.MaxMessage+envelopeSize || len(body) > len(data)) {
			t.Errorf("a body of %d bytes", len(body))
		}
		if _, err := envelope(body); err == nil && len(body) < envelopeSize {
			t.Error("a message without its length")
		}
	})
}
