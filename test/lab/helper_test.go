//go:build e2e

package lab

import (
	"strings"
	"testing"
	"time"
)

// theWorld is a namespace beyond the host, with an SSH server that greets.
const theWorld = `ip netns add world && ip link add world type veth peer name uplink netns world &&
ip addr add 10.99.0.1/24 dev world && ip link set world up &&
ip -n world addr add 10.99.0.2/24 dev uplink && ip -n world link set uplink up && ip -n world link set lo up &&
mkdir -p /run/sshd && ip netns exec world /usr/sbin/sshd -p 2222`

// greeting is what a guest hears from there.
const greeting = `timeout 20 bash -c 'read -r line < /dev/tcp/10.99.0.2/2222 && echo $line' || echo silence`

// TestRootHelper: systemd starts the helper for an ordinary user, whose VM under Firecracker it puts on a
// bridge; and nothing of it is left in the end.
func TestRootHelper(t *testing.T) {
	slow(t)
	// The programs alone: it is systemd that starts the helper, and coverage is not its business.
	programs, err := MakePayload(t.Context(), place.checkout, place.scratch, Content{})
	if err != nil {
		t.Fatal(err)
	}
	m := boot(t, Options{Payload: programs})
	root, user := person{t, m, "root"}, person{t, m, "user"}
	root.do(theWorld)
	uid := strings.TrimSpace(user.do("id -u"))
	unit, socket := "banger-helper@"+uid+".service", "/run/banger/helper-"+uid+".sock"

	user.do("sudo ./banger system install")
	want := func(what, got, want string) {
		t.Helper()
		if got = strings.TrimSpace(got); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	want("the socket", root.do("stat -c '%A %U' "+socket), "srw------- user")
	want("others", root.do("runuser -u nobody -- test -w "+socket+" && echo writable || echo closed"), "closed")
	want("status", user.do("./banger system status -o json | jq .usable"), "true")

	user.do("./banger vm create --name web --memory 512M --nat")
	user.wantDriver("web")
	want("network", user.do("./banger vm show web -o json | jq -r .network"), "bridge")
	address := strings.TrimSpace(user.do("./banger vm show web -o json | jq -r .address"))
	user.do("ping -c 1 -W 10 " + address)
	if got := user.in("web", greeting); !strings.HasPrefix(got, "SSH-2.0") {
		t.Errorf("with NAT the guest hears %q of the world", got)
	}
	if got := user.do("resolvectl query web.vm"); !strings.Contains(got, address) {
		t.Errorf("the host resolves web.vm: %s", got)
	}
	want("the guest resolves itself", user.in("web", "getent ahostsv4 web.vm | head -1 | cut -d' ' -f1"), address)
	// What the process has: CAP_NET_BIND_SERVICE and CAP_NET_ADMIN (bits 10 and 12 of capabilities(7)) and a filter.
	pid := strings.TrimSpace(root.do("systemctl show -P MainPID " + unit))
	want("the helper's rights", root.do("grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/"+pid+"/status | tr -d '\\t' | tr '\\n' ' '"),
		"CapEff:0000000000001400 CapBnd:0000000000001400 NoNewPrivs:1 Seccomp:2")

	// It dies, and nobody notices.
	root.do("kill -9 " + pid)
	user.do("./banger vm set web --no-nat")
	want("without NAT", user.in("web", greeting), "silence")
	user.do("./banger daemon stop")
	user.do("./banger vm set web --nat")
	if got := user.in("web", greeting); !strings.HasPrefix(got, "SSH-2.0") {
		t.Errorf("with NAT again the guest hears %q of the world", got)
	}
	// While a network is there, the helper stays.
	if out, err := root.try(callTime, "./banger system uninstall 2>&1"); err == nil || !strings.Contains(out, "--force") {
		t.Errorf("the helper is removed under a VM that runs: %s, %v", out, err)
	}

	root.do("ip netns pids world | xargs -r kill; ip link del world; ip netns del world")
	user.leave()
	want("what is left of the network", root.do("ip -o link | grep -E 'banger|bgr' || true; nft list tables | grep banger || true"), "")
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Second) {
		if state := strings.TrimSpace(root.do("systemctl is-active " + unit + " || true")); state == "inactive" {
			break
		} else if time.Now().After(end) {
			t.Fatalf("the helper is %s, and nobody has called", state)
		}
	}
	want("status", user.do("./banger system status -o json | jq .usable"), "true") // it is started again
	user.do("sudo ./banger system uninstall")
	want("what is left of the helper", root.do("find / -xdev -path /proc -prune -o -path '/layers' -prune -o -name 'banger-helper*' -print 2>/dev/null | grep -v /banger/banger-helper$ || true; "+
		"ls -d /run/banger /usr/local/libexec/banger 2>/dev/null || true; systemctl list-units --all --no-legend 'banger-helper*'"), "")
}
