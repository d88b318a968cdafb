//go:build e2e

package e2e

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// startHelper runs the root helper for a user, as root does where there is no systemd, and waits until it listens. The
// caller is in a network and a mount namespace of its own.
func startHelper(t *testing.T, uid string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(filepath.Join(checkout, "banger-helper"), "-uid", uid, "-range", "172.16.0.0/16")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	socket := "/run/banger/helper-" + uid + ".sock"
	for deadline := time.Now().Add(callTime); ; time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial("unix", socket); err == nil {
			_ = c.Close()
			return cmd
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// TestRootHelper is the bridge network of an ordinary user: made by the root helper alone, as good when that
// is killed, and gone with the last VM.
func TestRootHelper(t *testing.T) {
	h, u := newOrdinaryUser(t, `network = "auto"`)
	ownNetwork(t)
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	// A helper that is installed on this host is not this test's, and its networks are not here.
	must("make /run/banger", os.MkdirAll("/run/banger", 0o755))
	must("mount over it", unix.Mount("none", "/run/banger", "tmpfs", 0, "mode=755"))
	if unix.Access("/dev/net/tun", unix.F_OK) != nil {
		t.Fatal("there is no /dev/net/tun: sudo modprobe tun")
	}
	tun := filepath.Join("/run/banger", "tun") // the host's own may be root's alone
	must("make a device", unix.Mknod(tun, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))))
	must("let everybody open it", os.Chmod(tun, 0o666))
	must("mount it", unix.Mount(tun, "/dev/net/tun", "", unix.MS_BIND, ""))

	if got := h.do("system", "status", "-o", "json"); !strings.Contains(got, `"usable": false`) {
		t.Errorf("without a helper: %s", got)
	}
	helper := startHelper(t, u.Uid)
	if got := h.do("system", "status", "-o", "json"); !strings.Contains(got, `"usable": true`) {
		t.Errorf("with a helper: %s", got)
	}
	h.create("web", "--nat")
	shown := h.do("vm", "show", "web", "-o", "json")
	at := between(shown, `"address": "`, `"`)
	if !strings.Contains(shown, `"network": "bridge"`) || !strings.HasPrefix(at, "172.16.") {
		t.Fatalf("the VM is on another network: %s", shown)
	}
	get := func(url string) string { return h.in("web", "curl -sS --max-time 20 "+url+" 2>&1 || true") }
	if got := get("http://" + worldAddr + ":8080/"); got != "the world, to "+hostAddr {
		t.Errorf("out: %q", got)
	}
	if got := get("http://server.example:8080/"); got != "the world, to "+hostAddr { // by the DNS server at port 53, which no user may open
		t.Errorf("out by name: %q", got)
	}
	h.in("web", "mkdir -p /srv/www && echo hello from web > /srv/www/index.html && systemd-run --quiet python3 -m http.server --protocol HTTP/1.1 --directory /srv/www 3000")
	var conn net.Conn
	for deadline := time.Now().Add(callTime); ; time.Sleep(200 * time.Millisecond) { // until Python listens
		var err error
		if conn, err = net.Dial("tcp", at+":3000"); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("in: %v", err)
		}
	}
	defer conn.Close()
	must("a connection", request(conn))

	must("kill the helper", helper.Process.Kill())
	_ = helper.Wait()
	must("a connection, with the helper gone", request(conn))
	if r := h.try("vm", "set", "web", "--no-nat"); !strings.Contains(r.stderr, "root helper") {
		t.Errorf("without the helper NAT is changed: %s", r)
	}
	startHelper(t, u.Uid)
	h.do("vm", "set", "web", "--no-nat")
	if got := get("http://" + worldAddr + ":8080/"); !strings.Contains(got, "curl:") {
		t.Errorf("out, without NAT: %q", got)
	}
	h.do("daemon", "stop")
	must("a connection, with the daemon gone", request(conn))
	h.do("vm", "list")
	must("a connection, with the next daemon", request(conn))
	_ = conn.Close()

	h.do("vm", "delete", "web")
	h.do("daemon", "stop")
	links, err := net.Interfaces()
	must("list the links", err)
	for _, l := range links {
		if strings.HasPrefix(l.Name, "b") {
			t.Errorf("%s is left", l.Name)
		}
	}
	if records, err := filepath.Glob("/run/banger/records/[0-9a-f]*"); err != nil || len(records) != 0 {
		t.Errorf("records %v are left, %v", records, err)
	}
}
