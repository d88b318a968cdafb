//go:build e2e

package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The test's own internet: two network namespaces and a wire between them.
const (
	hostAddr  = "10.99.0.1" // of the namespace that the daemon and its VMs are in
	worldAddr = "10.99.0.2" // of the other one, where a server and a resolver are
)

// ownNetwork puts this goroutine's thread, and all programs that it starts, into a network namespace of their own, with its own
// /etc/resolv.conf, and serves there. The thread ends with the test. Connections to port 9000 of the world come to the caller.
func ownNetwork(t *testing.T) (came <-chan net.Conn) {
	t.Helper()
	runtime.LockOSThread() // never unlocked
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	must("make a network namespace", unix.Unshare(unix.CLONE_NEWNET|unix.CLONE_NEWNS))
	must("keep mounts to ourselves", unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	must("write resolv.conf", os.WriteFile(resolv, []byte("nameserver "+worldAddr+"\n"), 0o644))
	must("make it readable", os.Chmod(filepath.Dir(resolv), 0o755))
	must("mount resolv.conf", unix.Mount(resolv, "/etc/resolv.conf", "", unix.MS_BIND, ""))
	ours, err := os.Open("/proc/thread-self/ns/net")
	must("open the namespace", err)
	defer ours.Close()

	ready := make(chan error, 1)
	end := make(chan struct{})
	conns := make(chan net.Conn, 16)
	t.Cleanup(func() { close(end) })
	go func() {
		runtime.LockOSThread()
		ready <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "world"}, PeerName: "uplink", PeerNamespace: netlink.NsFd(ours.Fd())}
			if err := netlink.LinkAdd(veth); err != nil {
				return err
			}
			if err := address("lo", ""); err != nil {
				return err
			}
			if err := address("world", worldAddr+"/24"); err != nil {
				return err
			}
			l, err := net.Listen("tcp", worldAddr+":8080")
			if err != nil {
				return err
			}
			u, err := net.ListenPacket("udp", worldAddr+":53")
			if err != nil {
				return err
			}
			raw, err := net.Listen("tcp", worldAddr+":9000")
			if err != nil {
				return err
			}
			go func() { <-end; _, _, _ = l.Close(), u.Close(), raw.Close() }()
			go func() {
				for {
					conn, err := raw.Accept()
					if err != nil {
						return
					}
					conns <- conn
				}
			}()
			go func() {
				_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					_, _ = fmt.Fprintf(w, "the world, to %s\n", r.RemoteAddr[:strings.LastIndex(r.RemoteAddr, ":")])
				}))
			}()
			go func() {
				_ = dns.ActivateAndServe(nil, u, dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
					m := new(dns.Msg).SetReply(q)
					if q.Question[0].Name == "server.example." && q.Question[0].Qtype == dns.TypeA {
						rr, _ := dns.NewRR("server.example. 60 IN A " + worldAddr)
						m.Answer = append(m.Answer, rr)
					}
					_ = w.WriteMsg(m)
				}))
			}()
			return nil
		}()
		<-end
	}()
	must("make the world", <-ready)
	must("bring lo up", address("lo", ""))
	must("bring the uplink up", address("uplink", hostAddr+"/24"))
	return conns
}

// address brings a link of this thread's namespace up, with an address if there is one.
func address(link, cidr string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	if cidr != "" {
		a, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(l)
}

// TestUserNetwork is the network of a user without any privilege: out, in by a published port, names both ways,
// and nothing of it lost when the daemon is restarted.
func TestUserNetwork(t *testing.T) {
	settings := []string{"default_nat = true", `network = "user"`}
	if !underFirecracker() { // newHostIn sets the VMM there
		settings = append(settings, `vmm = "qemu"`)
	}
	h, _ := newOrdinaryUser(t, settings...)
	userNetwork(t, h)
}

// TestUserNetworkInAJail is the same for root, whose VMs are jailed, when root asks for it.
func TestUserNetworkInAJail(t *testing.T) {
	if !underFirecracker() || os.Geteuid() != 0 {
		t.Skip("Firecracker is what is jailed, by root: the lab runs it")
	}
	userNetwork(t, newHost(t, "default_nat = true", `network = "user"`))
}

func userNetwork(t *testing.T, h *host) {
	byAgent := underFirecracker() // frames go by the guest's agent
	came := ownNetwork(t)
	l, err := net.Listen("tcp", ":8080") // the host's own server, which guests must not get to
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "the host") }))
	}()
	// The privileged step that lets users have ports below 1024, as docs/network.md has it.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("22"), 0o644); err != nil {
		t.Fatal(err)
	}
	h.create("web")
	if jailed := strings.Contains(h.do("vm", "show", "web"), "in a jail"); jailed != (byAgent && h.sys == nil) {
		t.Errorf("in a jail: %v", jailed)
	}

	get := func(url string) string { return h.in("web", "curl -sS --max-time 20 "+url+" 2>&1 || true") }
	if got := get("http://" + worldAddr + ":8080/"); got != "the world, to "+hostAddr {
		t.Errorf("out by address: %q", got)
	}
	if got := get("http://server.example:8080/"); got != "the world, to "+hostAddr {
		t.Errorf("out by name: %q", got)
	}
	for _, own := range []string{hostAddr, "127.0.0.1", "172.16.88.1"} {
		if got := get("http://" + own + ":8080/"); strings.Contains(got, "the host") || !strings.Contains(got, "curl:") {
			t.Errorf("the host's own %s: %q", own, got)
		}
	}
	if got := h.in("web", "systemctl is-system-running --wait || systemctl list-units --failed --no-legend"); got != "running" {
		t.Errorf("the guest's services: %s", got)
	}

	// In: by the VM's name, which the daemon's server has.
	h.in("web", "mkdir -p /srv/www && echo hello from web > /srv/www/index.html && systemd-run --quiet python3 -m http.server --protocol HTTP/1.1 --directory /srv/www 3000")
	status := h.do("daemon", "status", "-o", "json")
	server := between(status, `"dns_address": "`, `"`)
	lookup := func() string {
		t.Helper()
		c := dns.Client{Timeout: callTime}
		m, _, err := c.Exchange(new(dns.Msg).SetQuestion("web.vm.", dns.TypeA), server)
		if err != nil || len(m.Answer) != 1 {
			t.Fatalf("web.vm at %q: %v, %v", server, m, err)
		}
		return m.Answer[0].(*dns.A).A.String()
	}
	at := lookup()
	if !strings.HasPrefix(at, "127.") {
		t.Errorf("web.vm is %s", at)
	}
	var conn net.Conn
	for deadline := time.Now().Add(callTime); ; time.Sleep(200 * time.Millisecond) { // until Python listens
		if conn, err = net.Dial("tcp", at+":3000"); err == nil {
			if err = request(conn); err == nil {
				break
			}
			_ = conn.Close()
		}
		if time.Now().After(deadline) {
			t.Fatalf("the published port: %v", err)
		}
	}
	defer conn.Close()
	h.in("web", "systemd-run --quiet python3 -c 'import socket, time; s = socket.socket(type=socket.SOCK_DGRAM); s.bind((\"\", 3001)); time.sleep(9999)'")
	var listed string
	h.until("UDP is listed", callTime, func() bool {
		listed = h.do("vm", "ports", "web", "-o", "json")
		return strings.Contains(listed, `"port": 3001`)
	})
	if !strings.Contains(listed, `"endpoint": "http://web.vm:3000/"`) || strings.Contains(listed, "web.vm:3001") {
		t.Errorf("TCP is published, UDP is not: %s", listed)
	}

	h.portsFollow("web", at)

	h.do("daemon", "stop")
	if err := request(conn); err != nil {
		t.Errorf("a connection, with the daemon gone: %v", err)
	}
	h.do("vm", "list")
	if err := request(conn); err != nil {
		t.Errorf("a connection, with the next daemon: %v", err)
	}
	h.throughDaemons("web", at, came)
	if again := lookup(); again != at {
		t.Errorf("web.vm was %s, and is %s", at, again)
	}
	if got := get("http://server.example:8080/"); got != "the world, to "+hostAddr {
		t.Errorf("out, with the next daemon: %q", got)
	}
	if got := h.in("web", "ip -o -4 addr show dev eth0 | awk '{print $4}'; ip route show default; cat /sys/class/net/eth0/carrier /sys/class/net/eth0/mtu; grep -c ^nameserver /etc/resolv.conf"); !strings.HasPrefix(got, "172.16.") ||
		!strings.HasSuffix(got, "\n1\n65520\n1") || !strings.Contains(got, "default via 172.16.88.1 dev eth0") {
		t.Errorf("the guest's interface: %q", got)
	}
	if byAgent {
		// A program that is killed is started again, and the agent connects to it.
		for pid := range h.processes() {
			if args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && strings.HasPrefix(string(args), "banger-usernet\x00") {
				run(t, "kill", "-KILL", fmt.Sprint(pid))
			}
		}
		for deadline := time.Now().Add(callTime); ; time.Sleep(time.Second) {
			got := get("http://server.example:8080/")
			if got == "the world, to "+hostAddr {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("out, after the end of the network's program: %q", got)
			}
		}
	}
	h.containers("web", at)

	// A network manager that would have every interface by DHCP (without banger's file it takes the address away) leaves this one
	// alone, and what waits for it waits for nothing. The guest has no udev, whose word systemd-networkd waits for: "I" in its database.
	if r := h.tryInput(`set -e
cat >/etc/systemd/network/50-all.network <<END
[Match]
Name=*
[Network]
DHCP=yes
END
mkdir -p /etc/systemd/system/systemd-networkd.service.d
cat >/etc/systemd/system/systemd-networkd.service.d/udev.conf <<'END'
[Service]
ExecStartPre=+/bin/sh -c "mkdir -p /run/udev/data; for i in /sys/class/net/*/ifindex; do echo I:1 >/run/udev/data/n$$(cat $$i); done"
END
systemctl unmask systemd-networkd-wait-online
systemctl enable --quiet systemd-networkd
`, "vm", "exec", "web", "--", "sh"); r.code != 0 {
		t.Fatal(r)
	}
	h.do("vm", "restart", "web")
	if got := h.in("web", "systemctl is-system-running --wait; timeout 20 systemctl start systemd-networkd-wait-online && systemctl is-active systemd-networkd; networkctl list --no-legend eth0; ip -o -4 addr show dev eth0 | awk '{print $4}'; ip route show default"); !regexp.MustCompile(
		`^running\nactive\n *\d+ eth0 \S+ +\S+ +unmanaged\n172\.16\.\S+\ndefault via 172\.16\.88\.1 dev eth0 .*$`).MatchString(got) {
		t.Errorf("beside systemd-networkd: %q", got)
	}
	if got := get("http://server.example:8080/"); got != "the world, to "+hostAddr {
		t.Errorf("out, beside systemd-networkd: %q", got)
	}
	h.do("vm", "stop", "web")
	if c, err := net.Dial("tcp", at+":3000"); err == nil {
		_ = c.Close()
		t.Error("the port of a stopped VM still is published")
	}
	h.do("vm", "delete", "web")
}

// portsFollow wants ports at a VM's address to be there while its guest listens on them, and not otherwise.
func (h *host) portsFollow(name, at string) {
	t := h.t
	t.Helper()
	dial := func(port string) error {
		conn, err := net.Dial("tcp", net.JoinHostPort(at, port))
		if err != nil {
			return err
		}
		return conn.Close()
	}
	// What listened before the daemon asked: SSH's is for the daemon's user to have by a setting of the host's alone.
	h.until("SSH is published", callTime, func() bool {
		conn, err := net.Dial("tcp", net.JoinHostPort(at, "22"))
		if err != nil {
			return false
		}
		defer conn.Close()
		greeting := make([]byte, 4)
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, err = io.ReadFull(conn, greeting)
		return err == nil && string(greeting) == "SSH-"
	})
	if err := dial("3456"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a port that nobody listens on: %v", err)
	}
	// It says when it begins and ceases to listen, and waits for a word before each.
	server := exec.Command(h.program, "vm", "exec", "--interactive", name, "--", "python3", "-uc", `import socket, sys
input()
s = socket.create_server(("", 3456))
print("listens")
input()
s.close()
print("ceased")
sys.stdin.read()`)
	server.Env, server.SysProcAttr, server.Dir, server.Stderr = h.env, h.sys, "/", os.Stderr
	in, err := server.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	said := bufio.NewScanner(out)
	for _, step := range []struct {
		says string
		want error
	}{{"listens", nil}, {"ceased", syscall.ECONNREFUSED}} {
		if _, err := io.WriteString(in, "\n"); err != nil {
			t.Fatal(err)
		}
		if !said.Scan() || said.Text() != step.says {
			t.Fatalf("the guest says %q, %v", said.Text(), said.Err())
		}
		began := time.Now()
		for deadline := began.Add(callTime); ; time.Sleep(5 * time.Millisecond) {
			if err := dial("3456"); errors.Is(err, step.want) {
				break
			} else if time.Now().After(deadline) {
				t.Fatalf("the guest %s, and the host's port: %v", step.says, err)
			}
		}
		t.Logf("%5.3fs  after the guest said that it %s, the host's port did", time.Since(began).Seconds(), step.says)
	}
	if err := errors.Join(in.Close(), server.Wait()); err != nil {
		t.Errorf("the guest's server ended with %v", err)
	}
}

// request asks the guest's server for its page, on a connection that stays open.
func request(conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(callTime)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: web\r\n\r\n"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "hello from web\n" {
		return fmt.Errorf("%s: %q, %w", resp.Status, body, err)
	}
	return nil
}

func between(s, before, after string) string {
	_, s, _ = strings.Cut(s, before)
	s, _, _ = strings.Cut(s, after)
	return s
}
