package arch

import (
	"strings"
	"testing"
)

// TestTheGuestProgramIsSmall: what the guest program is made of lies in every guest's memory and is read at every boot, so it
// links no HTTP stack, with the TLS and the certificates that come with one, by whatever way.
func TestTheGuestProgramIsSmall(t *testing.T) {
	all := imports(t, "../..", false)
	const program = "cmd/banger-vsock-agent"
	from := map[string]string{program: ""}
	for queue := []string{program}; len(queue) > 0; queue = queue[1:] {
		for _, imp := range all[queue[0]] {
			if under(imp, "net/http") || under(imp, "crypto/tls") || under(imp, "connectrpc.com") || under(imp, "log/slog") {
				t.Errorf("%s imports %s, and is linked by %s", queue[0], imp, from[queue[0]])
			}
			pkg, ours := strings.CutPrefix(imp, module)
			if _, seen := from[pkg]; ours && !seen {
				from[pkg] = queue[0]
				queue = append(queue, pkg)
			}
		}
	}
	if len(from) < 10 {
		t.Fatalf("only %d packages found: the test looks in the wrong place", len(from))
	}
}
