//go:build e2e

package lab

import (
	"strings"
	"testing"
	"time"
)

// box makes an image for Docker of one program.
const box = `mkdir -p /tmp/box/bin && cp /bin/busybox /tmp/box/bin && tar -C /tmp/box -c . | docker import - box`

// boxed is what a container of Docker's hears from the world.
const boxed = `docker run --rm box /bin/busybox sh -c '/bin/busybox timeout 10 /bin/busybox nc 10.99.0.2 2222 </dev/null | /bin/busybox head -n 1' 2>&1`

// TestNeighbours has Docker and firewalld, as their packages and units have them, beside a VM of root's under Firecracker: both
// started, restarted and stopped while it runs. The host finds it by its name through systemd-resolved all along.
func TestNeighbours(t *testing.T) {
	slow(t)
	alongside(t)
	programs := packed(t, Content{})
	m := boot(t, Options{Payload: programs})
	root := person{t, m, "root"}
	root.do(theWorld + " && ip link set eth0 mtu 1400")
	if got := strings.TrimSpace(root.do("systemctl is-active docker docker.socket containerd firewalld; sysctl -n net.ipv4.ip_forward")); got != "inactive\ninactive\ninactive\ninactive\n0" {
		t.Errorf("before anything: %q", got)
	}
	want := func(what, got, want string) {
		t.Helper()
		if got = strings.TrimSpace(got); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	greets := func(when string) {
		t.Helper()
		got := ""
		for end := time.Now().Add(time.Minute); time.Now().Before(end); { // rules may have to settle
			if got = root.in("web", greeting); strings.HasPrefix(got, "SSH-2.0") {
				break
			}
		}
		if !strings.HasPrefix(got, "SSH-2.0") {
			t.Errorf("%s, the guest hears %q of the world", when, got)
		}
		want(when+", by its name", root.do("curl -sS --max-time 30 http://web.vm:3000/ 2>&1 || true"), "hello from web")
	}
	contained := func(when string) {
		t.Helper()
		if got := root.do(boxed); !strings.HasPrefix(got, "SSH-2.0") {
			t.Errorf("%s, a container of Docker's hears %q of the world", when, got)
		}
	}
	firewall := func() string {
		t.Helper()
		return strings.TrimSpace(root.do(`./banger doctor -o json | jq -r '.[] | select(.code == "firewall" and .severity != "pass") | .fix'`))
	}

	root.do("./banger vm list") // the daemon starts while the host is not busy with Docker's
	root.do("systemctl start docker && " + box)
	want("what Docker does with what is not its own", root.do("iptables -S FORWARD | head -n 1"), "-P FORWARD DROP")
	root.do("./banger vm create --name web --memory 512M --nat")
	root.wantDriver("web")
	want("the network", root.do("./banger vm show web -o json | jq -r .network"), "bridge")
	root.in("web", "mkdir -p /srv/www && echo hello from web > /srv/www/index.html && systemd-run --quiet python3 -m http.server --directory /srv/www 3000")
	root.do("timeout 60 sh -c 'until curl -sS --max-time 5 http://web.vm:3000/ >/dev/null 2>&1; do sleep 1; done'") // until Python listens
	greets("beside Docker")
	contained("beside the VM")
	root.do("systemctl restart docker")
	greets("with Docker restarted")
	contained("restarted")
	want("what doctor says beside Docker", firewall(), "")

	// firewalld drops what it was not told of, and Docker has to be restarted for its own.
	root.do("systemctl start firewalld && systemctl restart docker")
	want("before firewalld is told", root.in("web", greeting), "silence")
	fix := firewall()
	if !strings.Contains(fix, "firewall-cmd") || strings.Contains(fix, "\n") {
		t.Errorf("doctor says to type %q", fix)
	}
	root.do(strings.ReplaceAll(fix, "sudo ", ""))
	greets("with firewalld told")
	want("what doctor says with firewalld told", firewall(), "")
	root.do("firewall-cmd --reload")
	greets("with firewalld loaded again")
	contained("beside firewalld")
	root.do("systemctl stop firewalld && systemctl restart docker")
	greets("with firewalld stopped")
	contained("with firewalld stopped")

	want("the bridge's MTU", root.do("cat /sys/class/net/banger0/mtu"), "1400")
	want("the guest's MTU", root.in("web", "cat /sys/class/net/eth0/mtu"), "1400")
	root.do("ip netns pids world | xargs -r kill; ip link del world; ip netns del world")
	root.do("./banger vm delete web && ./banger daemon stop")
	want("what is left in Docker's chain", root.do("iptables -S DOCKER-USER | grep -c banger || true"), "0")
	want("what is left of the rules", root.do("nft list tables | grep banger || true"), "")
	want("forwarding, which others may need by now", root.do("sysctl -n net.ipv4.ip_forward"), "1")
	want("a name of a VM that is gone", root.do("resolvectl query web.vm >/dev/null 2>&1 && echo found || echo none"), "none")
	root.do("systemctl stop docker.socket docker containerd; ip link del docker0; ! ./banger vm list | grep -q web")
	root.leave()
}
