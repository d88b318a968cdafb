package jail

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// TestNoPlaceForJails: where root may not do what a jail takes, that is said, and is no other error: the VM is started without one then.
func TestNoPlaceForJails(t *testing.T) {
	const variable = "JAIL_TEST_WITHOUT"
	if dir := os.Getenv(variable); dir != "" {
		run, err := os.Open(filepath.Join(dir, "run"))
		if err != nil {
			t.Fatal(err)
		}
		err = realHost(t, dir).Check(t.Context(), run)
		fmt.Println("says:", fault.CodeOf(err), err)
		return
	}
	dir := t.TempDir()
	h := realHost(t, dir)
	f := files(t, dir)
	if err := h.Check(t.Context(), f.Run); fault.Is(err, fault.Unsupported) {
		t.Skip("this host has no jails: ", err)
	}
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		t.Skip("takes setpriv (util-linux)")
	}
	for _, without := range []string{"sys_admin", "mknod", "setuid"} {
		cmd := exec.Command(setpriv, "--bounding-set", "-"+without, "--inh-caps", "-all", os.Args[0], "-test.run", "^TestNoPlaceForJails$")
		cmd.Env = append(os.Environ(), variable+"="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "says: "+string(fault.Unsupported)) {
			t.Errorf("without %s: %v\n%s", without, err, out)
		}
	}
	// A file of a filesystem whose ids cannot be mapped.
	proc, err := os.Open("/proc/self")
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	roots := *h
	roots.o.User = 0
	if err := roots.Check(t.Context(), proc); !fault.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "cannot map user ids") {
		t.Errorf("/proc: %v", err)
	}
	nothing(t, h)
}
