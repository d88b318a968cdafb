package cli

import "testing"

// TestWithout wants a subject left out where it is one, and a path that ends in it left whole.
func TestWithout(t *testing.T) {
	for _, c := range []struct{ cause, subject, want string }{
		{"step vmm: web: Firecracker ended", "web", "step vmm: Firecracker ended"},
		{"web: it ended", "web", "it ended"},
		{"it ended\nweb: and more", "web", "it ended\nand more"},
		{"web: web: twice", "web", "web: twice"},
		{"stat /opt/firecracker: no such file or directory", "firecracker", "stat /opt/firecracker: no such file or directory"},
		{"stat firecracker: no such file or directory", "firecracker", "stat firecracker: no such file or directory"},
		{"open /srv/web: web: none", "web", "open /srv/web: none"},
		{"nothing of it", "web", "nothing of it"},
		{"web: it ended", "", "web: it ended"},
	} {
		if got := without(c.cause, c.subject); got != c.want {
			t.Errorf("%q without %q: %q, want %q", c.cause, c.subject, got, c.want)
		}
	}
}
