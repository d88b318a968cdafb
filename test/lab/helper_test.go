//go:build e2e

package lab

import (
	"strconv"
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
	alongside(t)
	// The programs alone: it is systemd that starts the helper, and coverage is not its business.
	programs := packed(t, Content{})
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

	want("jails", user.do("./banger system status -o json | jq .jails"), "true")

	user.do("./banger vm create --name web --memory 512M --nat")
	user.wantDriver("web")
	jailed(t, root, user, uid)
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

	want("the VM is in a jail, also for who found it", user.do("./banger vm show web -o json | jq .confinement.jailed"), "true")

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
	want("what is left of jails", root.do("ls /run/banger/jails | grep - || true; grep -l banger-jail /proc/[0-9]*/mountinfo || true; systemctl list-units --all --no-legend 'banger-*.scope'"), "")
	user.do("sudo ./banger system uninstall")
	want("what is left of the helper", root.do("find / -xdev -path /proc -prune -o -path '/layers' -prune -o -name 'banger-helper*' -print 2>/dev/null | grep -v /banger/banger-helper$ || true; "+
		"ls -d /run/banger /usr/local/libexec/banger 2>/dev/null || true; systemctl list-units --all --no-legend 'banger-helper*' 'banger-jailer*'"), "")
}

// jailed looks at the VM web of a user, and has it stop and start.
func jailed(t *testing.T, root, user person, uid string) {
	t.Helper()
	pid := func() string { return strings.TrimSpace(user.do("./banger vm show web -o json | jq .pid")) }
	look := func() {
		t.Helper()
		p := pid()
		id := strings.TrimSpace(user.do("./banger vm show web -o json | jq .confinement.uid"))
		if n, err := strconv.Atoi(id); err != nil || n < 2_100_000_000 {
			t.Errorf("the jail's user is %s", id)
		}
		for what, c := range map[string][2]string{
			"its user":          {"grep -E '^(Uid|Gid|CapEff|NoNewPrivs|Seccomp):' /proc/" + p + "/status | tr -s '\t' ' ' | tr '\n' ' '", strings.ReplaceAll("Uid: I I I I Gid: I I I I CapEff: 0000000000000000 NoNewPrivs: 1 Seccomp: 2", "I", id)},
			"its root":          {"ls /proc/" + p + "/root/ | tr '\n' ' '", "dev drives firecracker firecracker.pid initrd kernel run vm"},
			"its drives":        {"ls /proc/" + p + "/root/drives | tr '\n' ' '", "base config modules system work"},
			"others' processes": {"ls /proc/" + p + "/root/proc 2>/dev/null | wc -l", "0"},
			"its mounts":        {"grep -c idmapped /proc/" + p + "/mountinfo", "8"},
			"its bounds":        {"cat /sys/fs/cgroup$(cut -d: -f3 /proc/" + p + "/cgroup)/memory.max | grep -c '^[0-9]'", "1"},
			"its slice":         {"grep -c 'user-" + uid + ".slice/banger-.*[.]scope$' /proc/" + p + "/cgroup", "1"},
			"mounts elsewhere":  {"grep -c banger-jail /proc/1/mountinfo || true", "0"},
		} {
			if got := strings.TrimSpace(root.do(c[0])); got != c[1] {
				t.Errorf("%s: %q, want %q", what, got, c[1])
			}
		}
		if got := user.do("./banger vm show web"); !strings.Contains(got, "in a jail") {
			t.Errorf("vm show does not say that it is in a jail:\n%s", got)
		}
	}
	look()
	user.in("web", "echo kept >/root/kept && echo kept >/etc/kept && sync")
	before := pid()
	user.do("pkill -9 -x bangerd; sleep 1; ./banger vm list")
	if got := pid(); got != before {
		t.Errorf("after the daemon was killed the VM is process %s, and was %s", got, before)
	}
	user.do("./banger vm stop web")
	if note := strings.TrimSpace(user.do("./banger vm show web -o json | jq -r '.note // empty'")); note != "" {
		t.Errorf("after the stop: %s\n%s", note, user.do("tail -n 40 ~/.local/state/banger/bangerd.log; tail -n 20 ~/.local/state/banger/vms/*/firecracker.log"))
	}
	if got := strings.TrimSpace(root.do("test -d /proc/" + before + " && echo there || echo gone")); got != "gone" {
		t.Error("the jailed process is there after the stop")
	}
	user.do("./banger vm start web")
	look()
	if got := user.in("web", "cat /root/kept /etc/kept"); strings.TrimSpace(got) != "kept\nkept" {
		t.Errorf("after a stop and a start there is %q", got)
	}
}
