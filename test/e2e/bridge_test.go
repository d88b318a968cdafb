//go:build e2e

package e2e

import (
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// TestBridgeNetwork is the network of root's VMs, in a network namespace that stands for the host: nothing is asked for, and they
// are on a bridge. They find each other by name, the host finds them, they get out with NAT, and no daemon's end
// is felt.
func TestBridgeNetwork(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("takes root")
	}
	h := newHost(t, `default_network_group = "store"`, `network = "auto"`)
	came := ownNetwork(t)
	if err := route(worldAddr); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", ":8080") // the host's own server, which guests must not get to
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { _ = http.Serve(l, http.NotFoundHandler()) }()
	h.do("vm", "create", "--name", "web", "--nat")
	h.do("vm", "create", "--name", "db")

	if got := h.do("vm", "show", "db", "-o", "json"); !strings.Contains(got, `"network": "bridge"`) || !strings.Contains(got, `"network_group": "store"`) {
		t.Errorf("db: %s", got)
	}
	in := func(name, command string) string { return h.in(name, command+" 2>&1 || true") }
	get := func(name, url string) string { return in(name, "curl -sS --max-time 20 "+url) }
	if got := get("web", "http://server.example:8080/"); got != "the world, to "+hostAddr {
		t.Errorf("out, with NAT: %q", got)
	}
	if got := get("db", "http://"+worldAddr+":8080/"); !strings.Contains(got, "curl:") {
		t.Errorf("out, without NAT: %q", got)
	}
	if got := in("db", "getent hosts server.example; echo $?"); got != "2" {
		t.Errorf("a name of the world, without NAT: %q", got)
	}
	if got := get("web", "http://"+hostAddr+":8080/"); !strings.Contains(got, "curl:") {
		t.Errorf("the host's own server: %q", got)
	}
	if got := in("db", "getent ahostsv4 web.vm | awk 'NR==1 {print $1}'"); got != "172.16.88.2" {
		t.Errorf("web.vm is %q", got)
	}
	if got := in("db", "exec 3<>/dev/tcp/web.vm/22 && head -c 4 <&3"); got != "SSH-" {
		t.Errorf("one guest to another by its name: %q", got)
	}

	conn, err := net.DialTimeout("tcp", "172.16.88.2:22", callTime)
	if err != nil {
		t.Fatalf("the host to a guest: %v", err)
	}
	_ = conn.Close()
	h.in("web", "mkdir -p /srv/www && echo hello from web > /srv/www/index.html && systemd-run --quiet python3 -m http.server --protocol HTTP/1.1 --directory /srv/www 3000")
	for deadline := time.Now().Add(callTime); ; time.Sleep(200 * time.Millisecond) { // until Python listens
		if conn, err = net.Dial("tcp", "172.16.88.2:3000"); err == nil {
			if err = request(conn); err == nil {
				break
			}
			_ = conn.Close()
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	defer conn.Close()
	h.do("daemon", "stop")
	if err := request(conn); err != nil {
		t.Errorf("a connection, with the daemon gone: %v", err)
	}
	h.do("vm", "list")
	if err := request(conn); err != nil {
		t.Errorf("a connection, with the next daemon: %v", err)
	}

	h.throughDaemons("web", "172.16.88.2", came)
	h.containers("web", "172.16.88.2")

	h.do("vm", "set", "db", "--no-network-group", "--nat")
	if got := in("db", "timeout 3 bash -c '</dev/tcp/172.16.88.2/22'; echo $?; getent hosts web.vm; echo $?"); !strings.HasPrefix(got, "124") || !strings.HasSuffix(got, "\n2") {
		t.Errorf("out of the group: %q", got)
	}
	if got := get("db", "http://server.example:8080/"); got != "the world, to "+hostAddr {
		t.Errorf("out, with NAT of late: %q", got)
	}
	h.do("vm", "delete", "web", "db")
	h.do("daemon", "stop")
	if out, err := exec.Command("ip", "-o", "link").CombinedOutput(); err != nil || strings.Contains(string(out), "banger0") || strings.Contains(string(out), "bgr") {
		t.Errorf("devices are left: %v\n%s", err, out)
	}
}

// route gives this thread's namespace a way out.
func route(via string) error {
	return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(via)})
}
