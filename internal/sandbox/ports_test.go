package sandbox

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

func listener(protocol, address string, port uint32) *agentv1.Listener {
	return &agentv1.Listener{Protocol: protocol, Address: address, Port: port, Pid: 7, Process: "p", Command: "c"}
}

// What a guest lists is cleaned: no listener of nonsense, none twice, nothing that a terminal would act upon.
func TestTamePorts(t *testing.T) {
	bad := &agentv1.Listener{Protocol: "tcp", Address: "10.0.0.1", Port: 80, Pid: -1, Process: "\x1b[2Jx", Command: strings.Repeat("y", 5000) + "\n"}
	got := tamePorts(&agentv1.PortsResponse{Listeners: []*agentv1.Listener{
		listener("tcp", "0.0.0.0", 22), listener("tcp", "::", 22), listener("tcp", "127.0.0.1", 5432), listener("tcp", "::1", 5432),
		listener("udp", "127.0.0.53", 53), listener("tcp", "127.0.0.54", 53), bad, listener("tcp", "fe80::1%eth0", 81),
		listener("sctp", "0.0.0.0", 1), listener("tcp", "0.0.0.0", 0), listener("tcp", "0.0.0.0", 70000), listener("tcp", "evil", 1),
	}})
	var lines []string
	for _, p := range got {
		asked := "not asked"
		if at, ok := p.asked(); ok && at.IsValid() {
			asked = "asked at " + at.String()
		} else if ok {
			asked = "asked by loopback"
		}
		lines = append(lines, fmt.Sprintf("%s %s %d loopback=%v %s", p.Protocol, p.Address, p.Port, p.Loopback, asked))
	}
	want := `tcp 0.0.0.0 22 loopback=false asked by loopback
tcp 127.0.0.1 5432 loopback=true asked by loopback
udp 127.0.0.53 53 loopback=true not asked
tcp 127.0.0.54 53 loopback=true asked at 127.0.0.54:53
tcp 10.0.0.1 80 loopback=false asked at 10.0.0.1:80
tcp fe80::1 81 loopback=false not asked`
	if s := strings.Join(lines, "\n"); s != want {
		t.Errorf("got\n%s\nwant\n%s", s, want)
	}
	if p := got[4]; p.Process != "x" || len(p.Command) > 400 || strings.Contains(p.Command, "\n") || p.PID != 0 {
		t.Errorf("%q, %d bytes, pid %d", p.Process, len(p.Command), p.PID)
	}
}

// Servers that hang, flood, lie or are none: each is given up within its bound, and keeps no other from its
// answer.
func TestPortsOfHostileServers(t *testing.T) {
	t.Parallel()
	servers := map[int]func(c net.Conn){
		1000: func(c net.Conn) { // good
			request(c)
			fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 48\r\n\r\n<title>&#27;[31mred &lt;b&gt;\n  page</title>\x1b[2J.....")
		},
		1001: func(c net.Conn) { _, _ = io.Copy(io.Discard, c) },                 // silent
		1002: func(c net.Conn) { endless(c, "\x16\x03\x03\x40\x00") },            // endless TLS records
		1003: func(c net.Conn) { fmt.Fprint(c, "SSH-2.0-x\r\n"); request(c) },    // speaks first
		1004: func(c net.Conn) { request(c); endless(c, "HTTP/1.1 200 OK\r\n") }, // endless header
		1005: func(c net.Conn) { // endless page without a title
			request(c)
			fmt.Fprint(c, "HTTP/1.1 503 Busy\r\n\r\n")
			endless(c, "<p>")
		},
		1006: func(c net.Conn) { // a status that is no status, by a server that closes
			request(c)
			fmt.Fprint(c, "HTTP/1.1 99999 \x1b[2J\r\n\r\n")
		},
		1007: func(c net.Conn) { // a redirect to the host itself is not followed
			request(c)
			fmt.Fprint(c, "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
		},
		1008: func(c net.Conn) { slowTLS(c, probeTime+time.Second) },
		1009: func(c net.Conn) { slowTLS(c, time.Minute) },
		1010: func(c net.Conn) { // a server of HTTP that does not like being asked
			request(c)
			fmt.Fprint(c, "HTTP/1.1 400 Bad Request\r\nContent-Length: 6\r\n\r\nno API")
		},
	}
	r := newRig(t)
	r.agent = guestWith(func(g *agentd.Guest) {
		g.Ports = func(context.Context) (*agentv1.PortsResponse, error) {
			answer := &agentv1.PortsResponse{}
			for port := range servers {
				answer.Listeners = append(answer.Listeners, listener("tcp", "0.0.0.0", uint32(port)))
			}
			return answer, nil
		}
		g.DialTCP = func(_ context.Context, port int) (net.Conn, error) {
			serve := servers[port]
			if serve == nil {
				return nil, syscall.ECONNREFUSED
			}
			here, there := net.Pipe()
			go func() {
				defer there.Close()
				serve(there)
			}()
			return here, nil
		}
	})
	r.start()
	r.create("web")
	began := time.Now()
	p := r.s.Ports(r.ctx(), nil)[0]
	if took := time.Since(began); took > probesTime+3*time.Second {
		t.Errorf("took %s", took)
	}
	if p.Err != nil || p.Host != "web.vm" || len(p.Ports) != len(servers) {
		t.Fatalf("%+v", p)
	}
	want := map[int]string{1000: "http 200 red <b> page", 1005: "http 503 ", 1007: "http 302 ", 1008: "https 200 slow", 1009: "https 0 ", 1010: "http 400 "}
	for _, port := range p.Ports {
		got := fmt.Sprintf("%s %d %s", port.Scheme, port.Status, port.Title)
		w, speaks := want[port.Port]
		if !speaks {
			w = " 0 "
		}
		if w != got {
			t.Errorf("port %d: %q, want %q", port.Port, got, w)
		}
	}
}

// slowTLS serves a page by HTTPS after a while, and says at once to who comes by HTTP that it does, as nginx would.
func slowTLS(c net.Conn, after time.Duration) {
	in := bufio.NewReader(c)
	if first, err := in.Peek(1); err != nil || first[0] != 0x16 { // handshake (RFC 8446, 5.1)
		request(readFirst{c, in})
		fmt.Fprint(c, "HTTP/1.1 400 Bad Request\r\nContent-Length: 50\r\n\r\nThe plain HTTP request was sent to HTTPS port     .")
		return
	}
	time.Sleep(after)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return
	}
	form := &x509.Certificate{SerialNumber: big.NewInt(1)}
	certificate, err := x509.CreateCertificate(rand.Reader, form, form, &key.PublicKey, key)
	if err != nil {
		return
	}
	secure := tls.Server(readFirst{c, in}, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{certificate}, PrivateKey: key}}})
	if _, err := secure.Read(make([]byte, 4096)); err == nil {
		fmt.Fprint(secure, "HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n<title>slow</title>")
	}
}

// readFirst is a connection of which some was read.
type readFirst struct {
	net.Conn
	in io.Reader
}

func (c readFirst) Read(b []byte) (int, error) { return c.in.Read(b) }

func request(c net.Conn) {
	b := bufio.NewReader(c)
	for {
		if line, err := b.ReadString('\n'); err != nil || line == "\r\n" {
			return
		}
	}
}

func endless(c net.Conn, s string) {
	for {
		if _, err := io.WriteString(c, s); err != nil {
			return
		}
	}
}

func TestPortsThatCannotBeListed(t *testing.T) {
	r := newRig(t)
	r.agent = guestWith(func(*agentd.Guest) {})
	r.start()
	v := r.create("web")
	wants(t, "an older agent", r.s.Ports(r.ctx(), nil)[0].Err, fault.VersionSkew, "has no list of ports", "banger vm restart web")
	op := r.wait(r.s.Trim(r.ctx(), v.ID))
	ended(t, op, "failed", fault.VersionSkew, "has no trim", "banger vm restart web")
	r.done(r.s.Stop(r.ctx(), v.ID, false)) // does not depend on it
	wants(t, "a stopped VM", r.s.Ports(r.ctx(), []string{"web"})[0].Err, fault.Precondition, "does not run", "banger vm start web")
	_, err := r.s.Trim(r.ctx(), v.ID)
	wants(t, "trim of a stopped VM", err, fault.Precondition, "does not run", "banger vm start web")
	r.check()
}

// What the host reaches by a VM's name depends on what it is bound to, and on a network that brings ports one by one.
func TestPortsThatTheHostReaches(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		networks func(*rig) func(NetworkHost) []Network
		want     string
	}{
		"a bridge": {func(r *rig) func(NetworkHost) []Network { return fakeNetworks(filepath.Join(r.dir, "network")) }, "web.vm: tcp/22 tcp/80 tcp/443 udp/53"},
		"ports that are published": {func(r *rig) func(NetworkHost) []Network {
			return func(h NetworkHost) []Network {
				return []Network{&publishing{fakeNetwork: &fakeNetwork{dir: filepath.Join(r.dir, "network"), host: h}, ports: map[vm.ID][]uint16{}}}
			}
		}, "web.vm: tcp/80 tcp/443"},
		"one that does not answer": {func(r *rig) func(NetworkHost) []Network {
			return func(h NetworkHost) []Network {
				return []Network{&publishing{fakeNetwork: &fakeNetwork{dir: filepath.Join(r.dir, "network"), host: h}, ports: map[vm.ID][]uint16{}, fail: errors.New("no")}}
			}
		}, "web.vm:"},
		"none": {func(*rig) func(NetworkHost) []Network { return nil }, ":"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.networks = c.networks(r)
			r.agent = guestWith(func(g *agentd.Guest) {
				g.Ports = func(context.Context) (*agentv1.PortsResponse, error) {
					return &agentv1.PortsResponse{Listeners: []*agentv1.Listener{
						listener("tcp", "0.0.0.0", 22), listener("tcp", "::", 80), listener("tcp", "10.77.0.2", 443), listener("udp", "0.0.0.0", 53),
						listener("tcp", "127.0.0.1", 5432), listener("tcp", "172.17.0.1", 8080), listener("udp", "127.0.0.53", 53),
					}}, nil
				}
				g.DialTCP = func(context.Context, int) (net.Conn, error) { return nil, syscall.ECONNREFUSED }
			})
			r.start()
			v := r.create("web")
			if p, ok := r.s.network.of(&v).(Publisher); ok {
				_ = p.Publish(r.ctx(), v, []uint16{80, 443, 5432, 8080}) // the fake notes it, and fails if it is to
			}
			p := r.s.Ports(r.ctx(), nil)[0]
			got := p.Host + ":"
			for _, port := range p.Ports {
				if port.Reached {
					got += fmt.Sprintf(" %s/%d", port.Protocol, port.Port)
				}
			}
			if p.Err != nil || len(p.Ports) != 7 || got != c.want {
				t.Errorf("%q, want %q (%d ports, %v)", got, c.want, len(p.Ports), p.Err)
			}
		})
	}
}
