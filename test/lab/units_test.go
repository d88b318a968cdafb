//go:build e2e

package lab

import (
	"strings"
	"testing"
	"time"
)

// TestUnits has systemd start the daemon and power guests off: a reboot of the host loses nothing that guests wrote and did
// not sync, and VMs with autostart are back without a command. For root and for a user who lingers.
func TestUnits(t *testing.T) {
	slow(t)
	alongside(t)
	image := packed(t, Content{})
	m := boot(t, Options{Payload: image})
	user, root := person{t, m, "user"}, person{t, m, "root"}
	root.do("loginctl enable-linger user")
	// The checkout is there only after units begin: they run what is installed.
	user.do("mkdir -p ~/.local/bin ~/.local/lib/banger && cp banger bangerd ~/.local/bin && cp --sparse=always runtime/* ~/.local/lib/banger")
	root.do("cp banger bangerd /usr/local/bin")
	programs := map[string]string{"user": "~/.local/bin/banger", "root": "/usr/local/bin/banger"}
	for _, p := range []person{user, root} {
		out := p.do(programs[p.name] + " daemon install 2>&1")
		if !strings.Contains(out, "enabled in ") || strings.Contains(out, "linger") {
			t.Errorf("%s: daemon install said %q", p.name, out)
		}
	}
	user.do("systemctl --user is-active bangerd.socket bangerd.service banger-guests.service")
	root.do("systemctl is-active bangerd.socket bangerd.service banger-guests.service")
	user.do("cd ~/.local/bin && ./banger vm create --name back --memory 512M && ./banger vm create --name stays --memory 512M && ./banger vm set back --autostart")

	// The daemon's end and its next start leave VMs alone, whoever starts it.
	before := user.show("back").PID
	user.do("~/.local/bin/banger daemon stop && ~/.local/bin/banger daemon restart && systemctl --user restart bangerd.service")
	// One that is killed is back by itself.
	user.do(`old=$(systemctl --user show --value -p MainPID bangerd.service); kill -KILL $old
for i in $(seq 300); do new=$(systemctl --user show --value -p MainPID bangerd.service); [ $new = 0 ] || [ $new = $old ] || exit 0; sleep 0.2; done; systemctl --user status bangerd.service; exit 1`)
	user.wantStates("back running, stays running")
	if after := user.show("back").PID; after != before {
		t.Errorf("back ran as process %d and runs as %d", before, after)
	}
	for _, v := range []struct {
		p    person
		name string
	}{{user, "back"}, {user, "stays"}} {
		v.p.wantDriver(v.name)
		v.p.in(v.name, "echo kept > /root/file && echo kept > /etc/file") // not synced
	}
	began := time.Now()
	if err := m.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("%5.1fs  the host reboots", time.Since(began).Seconds())
	if out, err := m.Output(t.Context(), "root", "pgrep -c bangerd"); err != nil || strings.TrimSpace(out) != "2" {
		t.Errorf("after the boot there run, before anybody asked, %q daemons (%v)", out, err)
	}
	user.until("back running, stays stopped")
	root.do("systemctl is-active bangerd.socket bangerd.service banger-guests.service && /usr/local/bin/banger vm list")
	user.disksAreClean("stays")
	user.do("./banger vm start stays")
	for _, v := range []struct {
		p    person
		name string
	}{{user, "back"}, {user, "stays"}} {
		if got := v.p.in(v.name, "cat /root/file /etc/file"); got != "kept\nkept" {
			t.Errorf("%s has %q in its files", v.name, got)
		}
	}
	if out, err := m.Output(t.Context(), "root", "journalctl -b -1 -u banger-guests.service -u 'user@*.service' --no-pager | tail -n 40; journalctl -b 0 --no-pager | grep -i 'ordering cycle' || true"); err == nil {
		t.Logf("the journal:\n%s", out)
	}
	user.do("~/.local/bin/banger daemon uninstall")
	user.wantStates("back running, stays running")
	root.do("/usr/local/bin/banger daemon uninstall")
	user.leave()
	root.leave()
}
