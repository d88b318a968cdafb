package pid1

import "testing"

func TestRunitIsKnownByItsInit(t *testing.T) {
	for path, want := range map[string]bool{
		"/usr/sbin/runit-init":     true, // Debian's /sbin/init, resolved
		"/usr/bin/runit-init":      true, // Void's
		"/usr/bin/runit":           true,
		"/usr/lib/systemd/systemd": false,
		"/sbin/init":               false,
		"/opt/runit/init":          false,
	} {
		if got := isRunit(path); got != want {
			t.Errorf("isRunit(%q) = %v", path, got)
		}
	}
}
