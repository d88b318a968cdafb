//go:build e2e

package guest_test

import (
	"testing"

	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// TestGuest boots the bundle's image and stops it in each way.
func TestGuest(t *testing.T) {
	m := newMachine(t, artifact(t, "rootfs-docker.ext4"))
	g := m.start()
	s := g.open()
	g.boot(s)
	t.Logf("health: %v", g.health(s))
	t.Log(g.shell(s, m, "mount; ls -la /root; systemctl --failed; ps aux | grep banger; cat /etc/environment"))
	g.shutdown(s, false)
	g.gone(stopTime)
	clean(t, m.drives[vmm.RoleSystem])
	clean(t, m.drives[vmm.RoleWork])
}
