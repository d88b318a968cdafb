package cli

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A person whose daemon is older than banger is asked whether to restart it, and then gets what was asked for.
func TestOlderDaemonIsRestartedOnRequest(t *testing.T) {
	work := t.TempDir()
	env, err := install.Env(work)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := install.EndDaemons(work); err != nil {
			t.Error(err)
		}
	})
	banger := filepath.Join(install.Bin, "banger")
	old := func() {
		t.Helper()
		cmd := exec.Command(banger, "daemon", "restart")
		cmd.Env = append(append(os.Environ(), env...), "BANGER_TEST_API_REVISION=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	for answer, want := range map[string]string{"n\r": "hint: banger daemon restart", "\r": "No VMs yet", "\x03": "hint: banger daemon restart"} {
		old()
		term := openTerminal(t, env, banger, "vm", "list")
		shows := func(text string) {
			t.Helper()
			for deadline := time.Now().Add(20 * time.Second); !strings.Contains(term.tail(), text); time.Sleep(20 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("answer %q: %q never came; on the screen:\n%q", answer, text, term.tail())
				}
			}
		}
		shows("Restart it now? [Y/n] ")
		term.typed(t, answer)
		shows(want)
	}
}
